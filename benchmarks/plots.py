"""Plots of the results: PNG beside the JSON, dark on white, so that they read well on a light and on a dark page.

    plot_lines(folder / "decode.png", {"geobased": [(1, 0.1), (128, 0.2)], "torch": [(1, 0.8), (128, 0.7)]},
               title="One token", xlabel="batch size", ylabel="milliseconds")
    plot_bars(folder / "generation.png", ["batch 1", "batch 128"], {"geobased": [700, 60000], "torch": [20, None]},
              title="Generation", ylabel="tokens per second")

Ours (`geobased`) is always the thick blue line or the blue bar; a peer keeps its colour in every plot of one run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_file import OURS

OURS_COLOUR, INK, GRID = "#1a56db", "#1f2328", "#d8dee4"
# colour-blind safe, and dark enough on white
PEER_COLOURS = ("#d9480f", "#0b7a55", "#7c3aed", "#b58105", "#c2255c", "#0c8599", "#6b7280")
_taken: dict[str, str] = {}


def _colour(name: str) -> str:
    """The same colour for the same name in every plot; "ours, without x" gets a lighter blue."""
    if name == OURS:
        return OURS_COLOUR
    if name.startswith(OURS):
        return "#7ea6f4"
    return _taken.setdefault(name, PEER_COLOURS[len(_taken) % len(PEER_COLOURS)])


def _axes(title: str, xlabel: str | None, ylabel: str, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_ylabel(ylabel, color=INK)
    if xlabel:
        axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(colors=INK, which="both", length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#8c959f")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    from matplotlib import pyplot

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no software version in the file: the same data give the same bytes
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    return path


def _legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, where it hides no data."""
    columns = min(len(labels), 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_lines(
    path: str | Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = True,
    log_y: bool = True,
    floor: Sequence[tuple[float, float]] | None = None,
    size: tuple[float, float] = (6.4, 4.0),
) -> Path:
    """One line per implementation; returns the path of the PNG.

    Args:
        series: name -> (x, y) points; a peer that lacks a point simply has a shorter line.
        log_x: axis in powers of two, with a tick at every x that occurs.
        floor: (x, y) points of the hardware's floor, drawn as a dotted grey line.
    """
    figure, axes = _axes(title, xlabel, ylabel, size)
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    names = sorted(series, key=lambda name: not name.startswith(OURS))
    colours = {name: _colour(name) for name in names}
    for name in reversed(names):  # ours last: on top
        x, y = zip(*sorted(series[name]), strict=True)
        ours = name == OURS
        axes.plot(x, y, marker="o", markersize=5 if ours else 4, linewidth=2.6 if ours else 1.5, color=colours[name], label=name)
    if floor:
        x, y = zip(*sorted(floor), strict=True)
        axes.plot(x, y, linestyle=":", color="#57606a", linewidth=1.5, label="floor of the hardware")
    ticks = sorted({x for points in series.values() for x, _ in points})
    if len(ticks) <= 12:
        axes.set_xticks(ticks, [_short(x) if x >= 1e6 else f"{x:,g}" for x in ticks])
        axes.minorticks_off()
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: names.index(labels[i]) if labels[i] in names else len(names))
    _legend(figure, [handles[i] for i in order], [labels[i] for i in order])
    return _save(figure, path)


def plot_bars(
    path: str | Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    ylabel: str,
    log_y: bool = False,
    size: tuple[float, float] | None = None,
) -> Path:
    """Groups of bars, each bar with its value on top; returns the path of the PNG.

    Args:
        groups: label under each group.
        series: name -> one value per group; None where it was not measured (the bar is left out).
    """
    for name, values in series.items():
        if len(values) != len(groups):
            raise ValueError(f"series {name!r} has {len(values)} values for {len(groups)} groups")
    names = sorted(series, key=lambda name: not name.startswith(OURS))
    figure, axes = _axes(title, None, ylabel, size or (max(4.8, 0.62 * len(groups) * len(names) + 1.6), 4.0))
    if log_y:
        axes.set_yscale("log")
    axes.margins(y=0.12)
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        shown = [(i, value) for i, value in enumerate(series[name]) if value is not None]
        places = [i + (number - (len(names) - 1) / 2) * width for i, _ in shown]
        bars = axes.bar(places, [value for _, value in shown], width=0.92 * width, color=_colour(name), label=name)
        axes.bar_label(bars, [_short(value) for _, value in shown], fontsize=8, color=INK, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    _legend(figure, *axes.get_legend_handles_labels())
    return _save(figure, path)
