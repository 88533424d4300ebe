"""Plots of equal twins, from the rows of their results."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

NAMES = {
    "based": "BASED",
    "attention": "full attention",
    "sliding_window": "sliding windows",
    "llama": "full attention in every layer",
}
# dark enough on white, and told apart by those who do not see red and green
COLOURS = {"based": "#1a56db", "attention": "#d9480f", "sliding_window": "#0b7a55", "llama": "#7c3aed"}


def _by_length(results: dict[str, Any], name: str, value: str) -> dict[int, list[float]]:
    """Length -> the value of each seed's run; lengths without it are left out."""
    values: dict[int, list[float]] = {}
    for row in results["rows"]:
        if row["model"] == name and row[value] is not None:
            values.setdefault(row["length"], []).append(row[value])
    return dict(sorted(values.items()))


def _models(results: dict[str, Any]) -> list[str]:
    present = {row["model"] for row in results["rows"]}
    if not present:
        raise ValueError("the results hold no finished run yet")
    return [name for name in NAMES if name in present]


def spread_about_mean(values: list[float]) -> tuple[float, float]:
    """From the mean down to the lowest and up to the highest."""
    return mean(values) - min(values), max(values) - mean(values)


def side_by_side_axes(columns: int, width_ratios: Sequence[float] = (3, 2)) -> tuple[Any, Any]:
    """-> figure without a display, and its panels side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if columns == 1 else 10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False, width_ratios=width_ratios[:columns])[0]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value / 1e6:g} M"))
    axis.set_minor_formatter(NullFormatter())


def plot_twins(results: dict[str, Any], path: str | Path) -> None:
    """Draw recall over the length of the context, and perplexity of tokens that repeat a bigram and of others (PNG).

    Points are means over seeds, bars reach from the lowest to the highest.

    Raises:
        ValueError: no finished run.
    """
    models = _models(results)
    figure, (recall, perplexity) = side_by_side_axes(2)
    for name in models:
        values = _by_length(results, name, "accuracy")
        heights = [100 * mean(group) for group in values.values()]
        spread = [[100 * side for side in sides] for sides in zip(*map(spread_about_mean, values.values()), strict=True)]
        recall.errorbar(
            list(values), heights, spread, marker="o", linewidth=1.8, capsize=3, color=COLOURS[name], label=NAMES[name]
        )
    lengths = sorted({row["length"] for row in results["rows"]})
    recall.set_xscale("log", base=2)
    recall.set_xticks(lengths, [f"{length:,}" for length in lengths])
    recall.minorticks_off()
    recall.set_ylim(0, 101)
    recall.set_xlabel("tokens of the context")
    recall.set_ylabel("answers recalled exactly (%)")
    recall.legend(frameon=False)

    groups = {"repeated": "tokens that\nrepeat a bigram", "other": "all others"}
    for number, name in enumerate(models):
        runs = {row["seed"]: _split_perplexity(row) for row in results["rows"] if row["model"] == name}
        values_of = {key: [run[key] for run in runs.values()] for key in groups}
        places = [i + 0.16 * (number - (len(models) - 1) / 2) for i in range(len(groups))]
        heights = [mean(values_of[key]) for key in groups]
        spread = [list(side) for side in zip(*(spread_about_mean(values_of[key]) for key in groups), strict=True)]
        perplexity.errorbar(places, heights, spread, marker="o", linestyle="", capsize=3, color=COLOURS[name])
    perplexity.set_yscale("log")
    plain_numbers(perplexity.yaxis)
    perplexity.set_xticks(range(len(groups)), list(groups.values()))
    perplexity.set_xlim(-0.6, len(groups) - 0.4)
    source = "held-out text" if "held_out_text" in results["rows"][0]["perplexity"] else "held-out documents"
    perplexity.set_ylabel(f"perplexity, {source}")
    figure.savefig(path, dpi=150)


def _split_perplexity(row: dict[str, Any]) -> dict[str, float]:
    perplexity = row["perplexity"]
    split = perplexity["held_out_text" if "held_out_text" in perplexity else "held_out_documents"]
    return {key: split[key]["token_perplexity"] for key in ("repeated", "other")}


def plot_throughput_against_recall(results: dict[str, Any], path: str | Path) -> None:
    """Draw recall over the tokens per second of a batch that generates, a point for each model and length (PNG).

    The larger a point, the longer the context. Recall is the mean over seeds, bars reach from the lowest to the highest.

    Raises:
        ValueError: no finished run, or no length at which both were measured.
    """
    models = _models(results)
    figure, (axes,) = side_by_side_axes(1)
    lengths: set[int] = set()
    for name in models:
        recall, speed = _by_length(results, name, "accuracy"), _by_length(results, name, "tokens_per_second")
        both = [length for length in recall if length in speed]
        if not both:
            continue
        lengths.update(both)
        x, y = [speed[length][0] for length in both], [100 * mean(recall[length]) for length in both]
        spread = [
            [100 * side for side in sides] for sides in zip(*(spread_about_mean(recall[length]) for length in both), strict=True)
        ]
        axes.errorbar(x, y, spread, linewidth=1, capsize=3, color=COLOURS[name], alpha=0.6)
        axes.scatter(x, y, [_area(length) for length in both], color=COLOURS[name], label=NAMES[name], zorder=3)
    if not lengths:
        raise ValueError("no model was both evaluated and timed at one length yet")
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.margins(x=0.12)
    axes.set_ylim(-2, 103)
    entry = results["throughput"][0]
    axes.set_xlabel(f"tokens per second, batch {entry['batch_size']} ({results['device']})")
    axes.set_ylabel("answers recalled exactly (%)")
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right upper", title="model")
    sizes = [axes.scatter([], [], _area(length), color="#8c959f") for length in sorted(lengths)]
    names = [f"{length:,}" for length in sorted(lengths)]
    figure.legend(sizes, names, frameon=False, loc="outside right lower", title="tokens of context", labelspacing=0.8)
    figure.savefig(path, dpi=150)


def _area(length: int) -> float:
    """Of a point, in square points: four times the length, twice the area."""
    return 3.0 * length**0.5 / 2


__all__ = ["NAMES", "plot_throughput_against_recall", "plot_twins", "side_by_side_axes", "spread_about_mean"]
