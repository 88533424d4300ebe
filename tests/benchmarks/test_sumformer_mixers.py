"""The benchmark of Sumformer mixers in tiny cases, and what the page makes of stored results."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from geobased.training.sumformer_experiment_models import Architecture

ROOT = Path(__file__).resolve().parent.parent.parent
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the lengths would be compiled")
def test_every_mixer_is_checked_timed_and_written(load, tmp_path, capsys):
    bench = load("benchmarks", "sumformer_mixers")
    sizes = replace(bench.SMOKE, seq_lens=(32, 64), tokens=64)
    rows = bench.run(sizes, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["rows"] == rows and written["absent"] == {} and written["ceilings"]
    names = {"Sumformer", "softmax (SDPA)", "Performer, 8 features"}
    for benchmark, (_, causal) in bench.BENCHMARKS.items():
        own = [row for row in rows if row["benchmark"] == benchmark]
        assert {row["implementation"] for row in own} == (names if causal else names | {"Linformer, 8 keys"})
        assert {(row["case"]["batch_size"], row["case"]["seq_len"]) for row in own} == {(2, 32), (1, 64)}
        assert all(row["relative_error"] < 0.01 and row["floor_milliseconds"] > 0 for row in own)
    assert "sumformer_layers_causal, 64" in capsys.readouterr().out


def test_wrong_mixers_end_the_benchmark(load):
    bench = load("benchmarks", "sumformer_mixers")
    right = bench.cores(32, bench.SMOKE, causal=True)[0]
    x = right.leaves[0]
    torch.testing.assert_close(
        right.function(x.double()), x.double().cumsum(1) / torch.arange(1, 33).double().unsqueeze(-1), rtol=1e-9, atol=1e-9
    )
    with pytest.raises(sys.modules["timing"].WrongResult, match="Sumformer: relative error"):
        bench.error_of(replace(right, function=lambda x: 1.1 * right.function(x)))
    assert bench.error_of(replace(right, leaves=[x[:, :1].expand(-1, 5000, -1)])) is None


def test_layers_have_equally_many_parameters(load):
    bench = load("benchmarks", "sumformer_mixers")
    sizes = {
        candidate.name: sum(p.numel() for n, p in candidate.function.named_parameters() if not n.endswith((".e", ".f")))
        for candidate in bench.layers(32, bench.SMOKE, causal=False)
    }
    assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes


def test_the_page_holds_what_the_script_prints(load):
    tables = load("scripts", "sumformer_tables")
    page = (ROOT / "docs" / "sumformer.md").read_text(encoding="utf-8")
    texts, _ = tables.sections()
    for marker, text in texts.items():
        assert f"<!-- {marker}:start -->\n{text}\n<!-- {marker}:end -->" in page, (
            f"run scripts/sumformer_tables.py --write ({marker})"
        )
    assert page.count(":start -->") == len(texts)


def test_each_number_of_the_results_has_its_place(load, tmp_path):
    tables = load("scripts", "sumformer_tables")
    texts, missing = tables.sections(tmp_path)
    assert len(missing) == 2 and all("|" not in text for text in texts.values())
    entries = [
        {
            **asdict(Architecture(family, 8, 2)),
            **{"target": "rank", "num_parameters": 20_033, "flops_per_point": 30_000, "tried": {"0.001": nmse, "0.003": nmse}},
            **{"nmse": [nmse, 2 * nmse, 3 * nmse], "sup_error": [0.5, 0.6, 0.7], "equivariance_error": [2e-7, 3e-7, 1e-7]},
            **{"plateau": [True, True, False], "seeds": [0, 1, 2], "nmse_by_length": {}},
        }
        for family, nmse in (("sumformer", 0.1), ("transformer_2", 4e-4))
    ]
    training = {"max_steps": 5000, "cooldown_steps": 1250, "points_per_step": 1024}
    report = {"device": "NVIDIA H200", "versions": VERSIONS, "date": "2026-01-01", "seconds": 360.0, "complete": False}
    report |= {"preset": "standard", "settings": {"training": training, "learning_rates": [0.001, 0.003]}, "entries": entries}
    times = [
        {"benchmark": "sumformer_cores", "case": {"seq_len": length}, "implementation": name, "milliseconds": 3.0 * factor}
        | {"floor_milliseconds": 1.5}
        for length in (1024, 2048)
        for name, factor in (("Sumformer", 1), ("softmax (SDPA)", 2))
    ]
    mixers = {
        "device": "NVIDIA H200",
        "versions": VERSIONS,
        "date": "2026-01-01",
        "rows": times,
        "absent": {"Linformer": "out of memory"},
    }
    for name, content in (("sumformer_experiment", report), ("sumformer_mixers", mixers)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    texts, missing = tables.sections(tmp_path)
    assert missing == []
    text = texts["sumformer_experiment"]
    assert "8 trainings on NVIDIA H200" in text and "At most 6,250 steps" in text and "Not all trainings are done" in text
    assert "| Sumformer, MLP φ | 0.2 |" in text and "| Transformer, two layers | **8.0e-04** |" in text
    assert "| Transformer, two layers | 20,033 | 30,000 | 3.0e-07 | 67 % |" in text
    assert "- Transformer, two layers errs less than Sumformer, MLP φ" in text and "**holds**. less: rank (250)." in text
    assert "| Sumformer | 3.00 (2.0) | 3.00 (2.0) |" in texts["sumformer_mixers"]
    assert texts["sumformer_mixers"].endswith("Not measured: Linformer (out of memory).")
