"""Figures of a sweep over MQAR: accuracy against state size, and accuracy by length and number of pairs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geobased.whole_file import whole_file

from .pareto import (
    Entry,
    best_of_each_family,
    by_family,
    family_name,
    pareto_frontier,
    read_runs,
    readable_bytes,
    summarise,
)
from .pareto_paper import compare_with_figure

INK, FAINT = "#1f2328", "#d0d7de"
# colours of Okabe and Ito, which colour-blind readers can tell apart, darkened where they are pale on white; and markers
STYLES = {
    "based": ("#0072b2", "o"),
    "based_window": ("#3a9bd5", "D"),
    "attention": ("#1f2328", "s"),
    "sliding_window": ("#d55e00", "^"),
    "linear_attention": ("#a8558a", "v"),
    "window_alone": ("#e8896b", "d"),
    "convolution": ("#7a7a7a", "P"),
    "mamba2": ("#007a5a", "X"),
    "gated_deltanet": ("#b37a00", "p"),
    "performer": ("#8c510a", "<"),
    "sumformer": ("#5e4fa2", ">"),
}
OTHER_STYLE = ("#57606a", "h")


def plot_pareto(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws accuracy against log2 of the state's bytes (PNG).

    One line per family joins its own frontier; its other configurations are faint. Bars are one standard deviation over seeds.
    The overall frontier is the broad grey line, and its points are ringed. Crosses are read off the paper's figure.

    Raises:
        ValueError: no configuration with a state has a chosen learning rate.
    """
    entries = _finished(results)
    figure = _figure(8.4, 6.2)
    axes = figure.add_subplot()
    overall = pareto_frontier(entries)
    axes.plot(
        *([entry.log2_bytes for entry in overall], [entry.accuracy.mean for entry in overall]),
        **{"color": "#c4ccd4", "linewidth": 8, "solid_capstyle": "round", "solid_joinstyle": "round", "zorder": 1},
        label="overall frontier",
    )
    for family, own in by_family(entries).items():
        colour, marker = STYLES.get(family, OTHER_STYLE)
        frontier = pareto_frontier(own)
        dominated = [entry for entry in own if entry not in frontier]
        axes.plot(
            *([entry.log2_bytes for entry in dominated], [entry.accuracy.mean for entry in dominated]),
            **{"linestyle": "", "marker": marker, "color": colour, "alpha": 0.28, "markersize": 5, "zorder": 2},
        )
        axes.errorbar(
            *([entry.log2_bytes for entry in frontier], [entry.accuracy.mean for entry in frontier]),
            yerr=[entry.accuracy.std or 0.0 for entry in frontier],
            **{"color": colour, "marker": marker, "markersize": 6.5, "linewidth": 1.9, "capsize": 3, "elinewidth": 1.1},
            label=family_name(family),
            zorder=4 if family == "based" else 3,
        )
    axes.plot(
        *([entry.log2_bytes for entry in overall], [entry.accuracy.mean for entry in overall]),
        **{"linestyle": "", "marker": "o", "markersize": 13, "markerfacecolor": "none", "markeredgecolor": INK, "zorder": 5},
    )
    _draw_paper(axes, entries)
    _size_axis(axes)
    axes.set_ylim(-0.02, 1.04)
    axes.set_ylabel("accuracy on MQAR, mean of the test segments")
    axes.set_title(_title(results, "State size against recall"), loc="left", fontsize=11, fontweight="bold", color=INK)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, path)


def plot_by_test(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws accuracy by test segment (tokens/pairs), a panel for the best configuration of each family (PNG).

    The other families stand in each panel in grey.

    Raises:
        ValueError: no configuration with a state has a chosen learning rate.
    """
    best = best_of_each_family(_finished(results))
    columns = min(len(best), 4)
    rows = math.ceil(len(best) / columns)
    figure = _figure(max(3.0 * columns, 4.5), 2.5 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    tests = list(dict.fromkeys(test for entry in best.values() for test in entry.accuracy_by_test))
    for panel, (family, entry) in zip(panels, best.items(), strict=False):
        for other in best.values():
            panel.plot(*_by_test(other, tests), color=FAINT, linewidth=1, zorder=1)
        colour, marker = STYLES.get(family, OTHER_STYLE)
        spreads = [entry.accuracy_by_test[test] for test in tests if test in entry.accuracy_by_test]
        panel.errorbar(
            *_by_test(entry, tests),
            yerr=[spread.std or 0.0 for spread in spreads],
            **{"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.9, "capsize": 2.5, "zorder": 3},
        )
        panel.set_title(f"{family_name(family)}\n{entry.label}, {readable_bytes(entry.state_bytes)}", fontsize=9, color=INK)
        panel.set_xticks(range(len(tests)), tests, rotation=45, ha="right", fontsize=8)
        panel.tick_params(labelbottom=True)
        panel.set_ylim(-0.03, 1.05)
        _plain(panel)
    for panel in panels[len(best) :]:
        panel.set_axis_off()
    figure.supxlabel("test segment: tokens/pairs", fontsize=10)
    figure.supylabel("accuracy", fontsize=10)
    figure.suptitle(_title(results, "Recall by length"), x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    _save(figure, path)


def _finished(results: Mapping[str, Any]) -> list[Entry]:
    entries = [entry for entry in summarise(read_runs(results)) if entry.state_bytes]
    if not entries:
        raise ValueError("there is nothing to draw: no configuration has a chosen learning rate yet")
    return entries


def _title(results: Mapping[str, Any], text: str) -> str:
    return f"{text} ({results['preset']}, {results.get('device', 'unknown device')})"


def _by_test(entry: Entry, tests: list[str]) -> tuple[list[int], list[float]]:
    places = [i for i, test in enumerate(tests) if test in entry.accuracy_by_test]
    return places, [entry.accuracy_by_test[tests[i]].mean for i in places]


def _draw_paper(axes: Any, entries: list[Entry]) -> None:
    """The points of the figure, where the sweep has something to compare with them."""
    families, lines = {entry.family for entry in entries}, compare_with_figure(entries).lines
    points = [line.point for line in lines if line.point.log2_bytes is not None and line.point.family in families]
    for point in points:
        colour = STYLES[str(point.family)][0]
        axes.plot(
            [point.log2_bytes], [point.accuracy], linestyle="", marker="+", markersize=10, markeredgewidth=1.6, color=colour
        )
    if points:
        axes.plot([], [], linestyle="", marker="+", markersize=10, markeredgewidth=1.6, color=INK, label="read off the paper")


def _size_axis(axes: Any) -> None:
    """A tick at every power of two, or every second one, as KiB or MiB."""
    low, high = axes.get_xlim()
    exponents = range(math.ceil(low), math.floor(high) + 1)
    exponents = exponents[:: 1 if len(exponents) <= 10 else 2]
    axes.set_xticks(list(exponents), [f"{readable_bytes(2.0**n)}\n$2^{{{n}}}$" for n in exponents])
    axes.set_xlim(low, high)
    axes.set_xlabel("state of one sequence, bytes")
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.7, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> None:
    # no software version in the file: the same data give the same bytes
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110, facecolor="white", metadata={"Software": None})


__all__ = ["plot_by_test", "plot_pareto"]
