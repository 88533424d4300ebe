"""The measured times as Markdown, from benchmarks/results/<gpu>/*.json.

python scripts/performance_tables.py [--folder benchmarks/results/h200]   # the tables of docs/performance.md
python scripts/performance_tables.py --headlines                          # the short table of the README
python scripts/performance_tables.py --write                              # both, between their markers
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200"
OURS = "geobased"
# files in the order of the page; `kernels` holds what was measured before attention_kernels.py
FILES = ("attention_kernels", "decode", "generation", "training", "image_geolocalization", "kernels")
SUPERSEDED = {"kernels": "attention_kernels"}
TITLES = {
    "taylor_linear_attention_forward": "Taylor linear attention, forward",
    "taylor_linear_attention_backward": "Taylor linear attention, forward and backward",
    "taylor_linear_attention_decode": "Taylor linear attention, one token",
    "sliding_window_attention_forward": "Sliding window attention, forward",
    "sliding_window_attention_backward": "Sliding window attention, forward and backward",
    "sliding_window_attention_decode": "Sliding window attention, one token",
    "flash_attention_forward": "Full attention of the image tower, forward",
    "flash_attention_backward": "Full attention of the image tower, forward and backward",
    "gated_short_convolution_forward": "Gated short convolution, forward",
    "gated_short_convolution_backward": "Gated short convolution, forward and backward",
    "gated_short_convolution_decode": "Gated short convolution, one token",
    "generation": "Generation",
    "prompt": "Reading a long prompt",
    "training": "Training",
    "image_geolocalization": "Image geolocalization",
}
SPEEDS = {"generation": "tokens/s", "training": "tokens/s", "image_geolocalization": "images/s"}  # others: milliseconds
NOT_COMPARED = ("new_tokens",)  # how long was timed: a slow peer is timed for fewer tokens
# README: benchmark, and keys of the case; of several cases that fit, the one with most sequences
HEADLINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("taylor_linear_attention_forward", {"seq_len": 4096, "head_dim": 64}),
    ("taylor_linear_attention_backward", {"seq_len": 4096, "head_dim": 64}),
    ("taylor_linear_attention_backward", {"seq_len": 32768, "head_dim": 64}),
    ("sliding_window_attention_backward", {"head_dim": 64}),
    ("flash_attention_forward", {}),
    ("generation", {"model": "1.3b", "batch_size": 1}),
    ("generation", {"model": "1.3b", "batch_size": 128}),
    ("generation", {"model": "1.3b"}),
    ("training", {"model": "1.3b", "seq_len": 2048}),
    ("training", {"model": "1.3b", "seq_len": 16384}),
    ("image_geolocalization", {}),
)

Rows = list[dict[str, Any]]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by name of the file."""
    found = {}
    for name in FILES:
        path = folder / f"{name}.json"
        if path.is_file() and SUPERSEDED.get(name) not in found:
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 1000 else str(value)


def cases(rows: Rows) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """(case, implementation -> row), in the order of the file."""
    grouped: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for row in rows:
        case = {key: value for key, value in row["case"].items() if key not in NOT_COMPARED}
        _, implementations = grouped.setdefault(json.dumps(case, sort_keys=True), (case, {}))
        implementations[row["implementation"]] = row
    return list(grouped.values())


def value_of(row: dict[str, Any]) -> str:
    if row["benchmark"] in SPEEDS:
        return f"{row['tokens_per_second']:,.0f}"
    return f"{row['milliseconds']:.{3 if row['milliseconds'] >= 0.1 else 4}f}"


def ratio(row: dict[str, Any], ours: dict[str, Any]) -> str:
    """How many times as long a peer takes, or as fast it is, as ours."""
    key = "tokens_per_second" if row["benchmark"] in SPEEDS else "milliseconds"
    times = row[key] / ours[key]
    return f"{times:.{2 if times < 10 else 1 if times < 100 else 0}f}×"


def table(rows: Rows) -> str:
    """One line per case: ours with share of the floor, error and memory, then each peer with its ratio to ours."""
    grouped = cases(rows)
    keys = list(dict.fromkeys(key for case, _ in grouped for key in case))
    fixed = {key for key in keys if len({str(case.get(key, "")) for case, _ in grouped}) == 1}
    varying = [key for key in keys if key not in fixed] or keys[:1]
    peers = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != OURS))
    unit = SPEEDS.get(rows[0]["benchmark"], "ms")
    ours_rows = [row for row in rows if row["implementation"] == OURS]
    columns = {
        f"{OURS}, {unit}": lambda row: f"**{value_of(row)}**",
        "of the floor": lambda row: f"{100 * row['floor_milliseconds'] / row['milliseconds']:.0f} %",
        "error": lambda row: f"{row['relative_error']:.1e}",
        "memory, GB": lambda row: f"{row['peak_memory_bytes'] / 1e9:.2f}",
    }
    needs = {"of the floor": "floor_milliseconds", "error": "relative_error", "memory, GB": "peak_memory_bytes"}
    shown = [c for c in columns if c not in needs or any(row.get(needs[c]) is not None for row in ours_rows)]
    lines = ["| " + " | ".join([*varying, *shown, *(f"{peer}, {unit}" for peer in peers)]) + " |"]
    lines.append("|" + "---:|" * (len(varying) + len(shown) + len(peers)))
    for case, implementations in grouped:
        ours = implementations.get(OURS)
        cells = [number(case.get(key, "")) for key in varying]
        for column in shown:
            missing = ours is None or (column in needs and ours.get(needs[column]) is None)
            cells.append("" if missing else columns[column](ours))
        for peer in peers:
            row = implementations.get(peer)
            times = f" ({ratio(row, ours)})" if row and ours else ""
            cells.append(f"{value_of(row)}{times}" if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    about = [f"{key} {number(grouped[0][0][key])}" for key in keys if key in fixed and key not in varying]
    errors = peer_errors(rows, peers)
    notes = [text for text in (", ".join(about), f"largest relative errors: {errors}" if errors else "") if text]
    return "\n".join([*([f"{'; '.join(notes)}.", ""] if notes else []), *lines])


def peer_errors(rows: Rows, peers: list[str]) -> str:
    found = []
    for peer in peers:
        errors = [row["relative_error"] for row in rows if row["implementation"] == peer and row["relative_error"] is not None]
        if errors:
            found.append(f"{peer} {max(errors):.1e}")
    return ", ".join(found)


def headline(name: str, results: dict[str, Any]) -> str:
    """Where, with what and when a file was measured."""
    versions = results["versions"]
    installed = [
        "torch",
        "triton",
        *(n for n, v in versions.items() if n in ("transformers", "flash-linear-attention") and v != "absent"),
    ]
    text = f"{results['device']}, " + ", ".join(f"{n} {versions[n]}" for n in installed) + f", {results['date']}"
    if "ceilings" in results:
        ceilings = results["ceilings"]
        text += f"; copy {ceilings['copy_tb_per_s']:.2f} TB/s, matrix product {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s"
    absent = results.get("absent")
    if absent is None:
        absent = {n: "not installed" for n, version in versions.items() if version == "absent"}
    if absent:
        text += ". Not measured: " + ", ".join(f"{peer} ({reason})" for peer, reason in absent.items())
    return f"`{name}.json`: {text}."


def losses(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each case in which a peer is faster."""
    lines = []
    for results in found.values():
        for benchmark in dict.fromkeys(row["benchmark"] for row in results["rows"]):
            for case, implementations in cases([row for row in results["rows"] if row["benchmark"] == benchmark]):
                ours = implementations.get(OURS)
                for peer, row in implementations.items():
                    if ours and not peer.startswith(OURS) and row["milliseconds"] < 0.99 * ours["milliseconds"]:
                        where = ", ".join(f"{key} {number(value)}" for key, value in case.items() if key != "dtype")
                        share = row["milliseconds"] / ours["milliseconds"]
                        lines.append(f"- {TITLES.get(benchmark, benchmark)} ({where}): {peer} takes {share:.2f} of our time")
    return lines


def page(folder: Path = RESULTS) -> str:
    """Everything that was measured, with the plots that lie beside the files of this repository."""
    found = load(folder)
    parts = ["\n".join(f"- {headline(name, results)}" for name, results in found.items())]
    for name, results in found.items():
        benchmarks = list(dict.fromkeys(row["benchmark"] for row in results["rows"]))
        for benchmark in benchmarks:
            rows = [row for row in results["rows"] if row["benchmark"] == benchmark]
            plain = [row for row in rows if "variant" not in row["case"]]
            variants = [row for row in rows if "variant" in row["case"]]
            title = TITLES.get(benchmark, benchmark)
            parts.append(f"## {title}\n\n{table(plain or variants)}")
            if plain and variants:
                parts.append(table(variants))
            parts += plot(folder, benchmark, title)
        if name not in benchmarks:
            parts += plot(folder, name, name.replace("_", " "))
    slower = losses(found)
    parts.append("## Where a peer is faster\n\n" + ("\n".join(slower) if slower else "In none of these cases."))
    return "\n\n".join(parts)


def plot(folder: Path, name: str, title: str) -> list[str]:
    """The plot of that name as an image of docs/performance.md, if there is one."""
    path = folder.resolve() / f"{name}.png"
    if not path.is_file() or ROOT not in path.parents:
        return []
    return [f"![{title}](../{path.relative_to(ROOT).as_posix()})"]


def headlines(folder: Path = RESULTS) -> str:
    """A short table: ours beside each peer, one line per task."""
    rows = [row for results in load(folder).values() for row in results["rows"]]
    lines = ["| task | geobased | beside |", "|---|---:|---|"]
    for benchmark, wanted in HEADLINES:
        fitting = [
            (case, implementations)
            for case, implementations in cases([row for row in rows if row["benchmark"] == benchmark])
            if "variant" not in case and OURS in implementations and wanted.items() <= case.items()
        ]
        peers = [entry for entry in fitting if any(not name.startswith((OURS, "torch")) for name in entry[1])]
        if not peers:
            continue
        case, implementations = max(peers, key=lambda entry: entry[0].get("batch_size", 0))
        ours = implementations.pop(OURS)
        unit = SPEEDS.get(benchmark, "ms")
        beside = ", ".join(
            f"{peer} {value_of(row)} {unit} ({ratio(row, ours)})"
            for peer, row in implementations.items()
            if peer != "torch" and not peer.startswith(OURS)
        )
        about = ", ".join(
            f"{label} {number(case[key])}"
            for key, label in (("model", "model"), ("batch_size", "batch"), ("seq_len", "length"), ("head_dim", "head_dim"))
            if key in case
        )
        lines.append(f"| {TITLES.get(benchmark, benchmark)}; {about} | **{value_of(ours)} {unit}** | {beside} |")
    device = next(iter(load(folder).values()))["device"]
    return "\n".join([f"One {device}, bfloat16; times each beside ours in one run:", "", *lines])


def between(path: Path, start: str, end: str, text: str) -> None:
    """Replaces what stands between two markers of a document."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(rf"({re.escape(start)}\n).*?(\n{re.escape(end)})", lambda m: m[1] + text + m[2], old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{path}: the markers {start} and {end} must occur once, they occur {count} times")
    path.write_text(new, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--headlines", action="store_true", help="the README's table instead of the page's")
    parser.add_argument("--write", action="store_true", help="update docs/performance.md and README.md")
    arguments = parser.parse_args()
    if not load(arguments.folder):
        sys.exit(f"{arguments.folder} holds no results: run `make bench` on a GPU")
    if arguments.write:
        between(ROOT / "docs" / "performance.md", "<!-- tables -->", "<!-- end of tables -->", page(arguments.folder))
        between(ROOT / "README.md", "<!-- speed table -->", "<!-- end of speed table -->", headlines(arguments.folder))
        return
    print(headlines(arguments.folder) if arguments.headlines else page(arguments.folder))


if __name__ == "__main__":
    main()
