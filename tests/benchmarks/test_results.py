"""The benchmarks' common parts: result files, comparison with the truth, plots, and the tables made of the results."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("cpu (x86_64)", "cpu"),
    ],
)
def test_folder_of_a_device(load, device, folder):
    assert load("benchmarks", "results_file").results_folder(device).name == folder


def test_rows_are_written_as_agreed(load, tmp_path, capsys):
    results = load("benchmarks", "results_file")
    case = {"batch_size": 2}
    rows = [
        results.row("generation", case, "geobased", milliseconds=2.0, tokens=4, floor_milliseconds=1.0, peak_memory_bytes=10**9),
        results.row("generation", case, "peer", milliseconds=3.0, tokens=4, parameters=5),
    ]
    path = results.write_results("generation", rows, tmp_path, absent={"other": "not installed"})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "versions", "date", "rows", "absent"} == set(written)
    assert {"python", "torch", "triton", "transformers", "geobased", "flash-linear-attention", "fla-core"} <= set(
        written["versions"]
    )
    ours, peer = written["rows"]
    keys = {"benchmark", "case", "implementation", "milliseconds", "tokens_per_second", "floor_milliseconds", "relative_error"}
    assert keys | {"share_of_floor", "peak_memory_bytes"} == set(ours)
    assert keys | {"parameters"} == set(peer)
    assert (ours["tokens_per_second"], ours["share_of_floor"], peer["floor_milliseconds"]) == (2000.0, 0.5, None)
    results.print_table(rows)
    shown = capsys.readouterr().out.splitlines()
    assert "1.00x" in shown[0] and "50% of floor" in shown[0] and "1.00 GB" in shown[0]
    assert "1.50x" in shown[1]


def test_shipped_results_have_the_agreed_keys():
    paths = list((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert paths
    for path in paths:
        written = json.loads(path.read_text(encoding="utf-8"))
        assert {"device", "versions", "date"} <= set(written), path.name
        for row in written.get("rows", []):
            assert row["milliseconds"] > 0 and row["tokens_per_second"] > 0
            assert isinstance(row["case"], dict) and row["benchmark"] and row["implementation"]


def test_comparison_finds_wrong_outputs_and_wrong_gradients(load):
    pytest.importorskip("triton")
    bench = load("benchmarks", "attention_kernels")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 3, n) for n in (8, 8, 16))

    def right(q, k, v):
        return bench.taylor_truth(q, k, v)

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    error, gradient_error = bench.compare(right, [q, k, v], bench.taylor_truth)
    assert error < 1e-5 and gradient_error < 1e-4
    error, _ = bench.compare(lambda q, k, v: 1.1 * right(q, k, v), [q, k, v], bench.taylor_truth)
    assert error == pytest.approx(0.1, rel=1e-3)
    error, gradient_error = bench.compare(lambda *x: WrongGradient.apply(right(*x)), [q, k, v], bench.taylor_truth)
    assert error < 1e-5 and gradient_error == pytest.approx(1.0, rel=1e-3)
    wrong_result = sys.modules["timing"].WrongResult
    with pytest.raises(wrong_result, match="relative error 1.00e"):
        bench.checked(gradient_error, bench.MAX_GRADIENT_ERROR, "geobased", "op", {})
    assert bench.checked(gradient_error, bench.MAX_GRADIENT_ERROR, "peer", "op", {}) == gradient_error
    with pytest.raises(wrong_result):
        bench.checked(float("nan"), bench.MAX_ERROR, "geobased", "op", {})


def test_heads_first_tensors_are_compared_alike(load):
    pytest.importorskip("triton")
    bench = load("benchmarks", "attention_kernels")
    q, k, v = torch.randn(3, 1, 3, 30, 8)  # [batch, heads, seq_len, dim]

    def causal(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    error, gradient_error = bench.compare(causal, [q, k, v], bench.causal_truth, heads_dim=1)
    assert error < 1e-5 and gradient_error < 1e-4


def test_softmax_of_the_log_is_taylor_attention(load):
    """What flex_attention is made to compute as a peer."""
    pytest.importorskip("triton")
    bench = load("benchmarks", "attention_kernels")
    q, k, v = (torch.randn(1, 20, 2, n, dtype=torch.float64) for n in (4, 4, 6))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * 4**-0.5
    weights = torch.log(1 + s + 0.5 * s * s).masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf")).softmax(-1)
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, v), bench.taylor_truth(q, k, v))


def test_absent_peers_are_reported(load, capsys):
    pytest.importorskip("triton")
    peers = load("benchmarks", "timing").Peers()
    assert peers.get("json", "json", "dumps") is json.dumps
    assert peers.get("no such peer", "no_such_module_at_all", "f") is None
    peers.report()
    assert "absent: no such peer (ModuleNotFoundError" in capsys.readouterr().out


def test_plots_are_written(load, tmp_path):
    pytest.importorskip("matplotlib")
    plots = load("benchmarks", "plots")
    lines = {"geobased": [(1, 1.0), (2, 1.5)], "peer": [(1, 3.0)]}
    line_plot = plots.plot_lines(
        tmp_path / "a" / "lines.png", lines, title="t", xlabel="x", ylabel="y", floor=[(1, 0.5), (2, 0.5)]
    )
    bars = plots.plot_bars(tmp_path / "bars.png", ["a", "b"], {"geobased": [1, 2], "peer": [None, 3]}, title="t", ylabel="y")
    for path in (line_plot, bars):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="1 values for 2 groups"):
        plots.plot_bars(tmp_path / "bad.png", ["a", "b"], {"geobased": [1]}, title="t", ylabel="y")


def test_tables_give_ratios_and_losses(load, tmp_path):
    results, tables = load("benchmarks", "results_file"), load("scripts", "performance_tables")
    rows = []
    for batch, ours, peer in ((1, 2.0, 1.0), (128, 2.0, 50.0)):
        case = {"batch_size": batch, "model": "1.3b", "new_tokens": 64}
        rows.append(results.row("generation", case, "geobased", milliseconds=ours, tokens=batch, floor_milliseconds=1.0))
        rows.append(results.row("generation", case | {"new_tokens": 8}, "Llama", milliseconds=peer, tokens=batch))
    kernel = {"seq_len": 4096, "head_dim": 64, "batch_size": 16}
    for name, milliseconds in (("geobased", 0.5), ("fla", 1.25)):
        rows.append(
            results.row(
                "taylor_linear_attention_forward", kernel, name, milliseconds=milliseconds, tokens=65536, relative_error=1e-3
            )
        )
    results.write_results("generation", rows, tmp_path)
    page = tables.page(tmp_path)
    assert "| 1 | **500** | 50 % | 1,000 (2.00×) |" in page
    assert "| 128 | **64,000** | 50 % | 2,560 (0.04×) |" in page
    assert "| **0.500** | 1.0e-03 | 1.250 (2.50×) |" in page
    assert "- Generation (batch_size 1, model 1.3b): Llama takes 0.50 of our time" in page
    assert "batch_size 128, model" not in page.partition("## Where a peer is faster")[2]
    short = tables.headlines(tmp_path)
    assert "| Generation; model 1.3b, batch 128 | **64,000 tokens/s** | Llama 2,560 tokens/s (0.04×) |" in short
    assert "length 4,096, head_dim 64 | **0.500 ms** | fla 1.250 ms (2.50×) |" in short


def test_markers_must_occur_once(load, tmp_path):
    tables = load("scripts", "performance_tables")
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- t -->\nold\n<!-- end -->\nb\n")
    tables.between(document, "<!-- t -->", "<!-- end -->", "new \\1")
    assert document.read_text() == "a\n<!-- t -->\nnew \\1\n<!-- end -->\nb\n"
    with pytest.raises(SystemExit, match="must occur once"):
        tables.between(document, "<!-- no -->", "<!-- end -->", "new")
