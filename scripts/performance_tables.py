"""The measured kernel times as Markdown tables, from benchmarks/results/<gpu>/kernels.json.

python scripts/performance_tables.py [benchmarks/results/nvidia-h200/kernels.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "nvidia-h200" / "kernels.json"
TITLES = {
    "taylor_linear_attention_forward": "Taylor linear attention, forward",
    "taylor_linear_attention_backward": "Taylor linear attention, forward and backward",
    "taylor_linear_attention_decode": "Taylor linear attention, one token",
    "sliding_window_attention_forward": "Sliding window attention, forward",
    "sliding_window_attention_backward": "Sliding window attention, forward and backward",
    "gated_short_convolution_forward": "Gated short convolution, forward",
    "gated_short_convolution_backward": "Gated short convolution, forward and backward",
}
COLUMNS = ("batch_size", "seq_len", "num_heads", "feature_dim", "head_dim", "window", "channels")


def table(rows: list[dict[str, Any]]) -> str:
    columns = [name for name in COLUMNS if any(name in row["case"] for row in rows)]
    lines = ["| " + " | ".join(columns) + " | implementation | ms | floor, ms | relative error |"]
    lines.append("|---:" * len(columns) + "|---|---:|---:|---:|")
    for row in rows:
        case = [f"{row['case'].get(name, '')}" for name in columns]
        floor, error = row["floor_milliseconds"], row["relative_error"]
        cells = [
            *case,
            f"**{row['implementation']}**" if row["implementation"] == "geobased" else row["implementation"],
            f"{row['milliseconds']:.3f}",
            "" if floor is None else f"{floor:.3f}",
            "" if error is None else f"{error:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    versions = results["versions"]
    absent = [name for name, version in versions.items() if version == "absent"]
    parts = [
        f"{results['device']}, torch {versions['torch']}, triton {versions['triton']}, {results['date']}, bfloat16. "
        f"Not installed there, so not measured: {', '.join(absent)}."
    ]
    for name, title in TITLES.items():
        rows = [row for row in results["rows"] if row["benchmark"] == name]
        if rows:
            parts.append(f"## {title}\n\n{table(rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULTS).read_text(encoding="utf-8"))))
