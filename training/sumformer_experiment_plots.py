"""Figures of the approximation experiment, from its results."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from geobased.recall.twin_plots import plain_numbers

from .artifacts import save_figure
from .sumformer_experiment_findings import Entry, ladder_entries, measured, targets_of, title
from .sumformer_experiment_models import FAMILIES
from .sumformer_experiment_settings import COMPARED

# colours of Okabe and Ito, which colour-blind readers can tell apart, darkened where they are pale on white; and markers
STYLES = {
    "sumformer": ("#0072b2", "o"),
    "sumformer_polynomial": ("#0072b2", "P"),
    "sumformer_fourier": ("#0072b2", "*"),
    "sumformer_bilinear": ("#3a9bd5", "D"),
    "sumformer_fourier_bilinear": ("#3a9bd5", "s"),
    "sumformer_stacked": ("#5e4fa2", ">"),
    "deep_sets": ("#7a7a7a", "v"),
    "set_transformer": ("#007a5a", "X"),
    "transformer_1": ("#1f2328", "d"),
    "transformer_2": ("#1f2328", "s"),
    "linformer": ("#d55e00", "^"),
    "performer_16": ("#b37a00", "<"),
    "performer_64": ("#8c510a", "<"),
    "performer_256": ("#5c3a05", "<"),
}
COLUMNS = 4
TARGET_COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a8558a", "#b37a00", "#1f2328", "#7a7a7a")

# a line of a panel: its label, colour, marker, and points: x -> values of the seeds
Series = list[tuple[str, str, str, dict[int, list[float]]]]


def plot_experiment(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw what the results hold: errors of all models, against d', n and d, on other lengths, and times (PNG).

    Points are medians over seeds, bars reach from the lowest to the highest.

    Returns:
        the files.

    Raises:
        ValueError: no finished run.
    """
    folder = Path(folder)
    models = ladder_entries(results, "models")
    if not models:
        raise ValueError("the results hold no finished run of the first ladder yet")
    drawn = [_plot_models(models, folder / "models.png")]
    latent = {
        name: entries
        for name in ("latent, equal parameters", "latent, equal psi", "latent, numbers")
        if (entries := ladder_entries(results, name))
    }
    if latent:
        drawn.append(_plot_latent(latent, folder / "latent.png"))
    for name, axis, label in (
        ("set size", "num_elements", "points in a set, n"),
        ("dimension", "num_coordinates", "dimensions of a point, d"),
    ):
        entries = ladder_entries(results, name)
        families = {entry["family"] for entry in entries}
        if entries:
            # the size between those of the ladder is that of the first one
            entries = [*entries, *(e for e in models if e["family"] in families and e["target"] in targets_of(entries))]
            drawn.append(_plot_targets(entries, _against(axis), label, folder / f"{name.replace(' ', '_')}.png"))
    compared = [entry for entry in models if entry["family"] in COMPARED and entry["nmse_by_length"]]
    if compared:
        drawn.append(_plot_targets(compared, _by_length, "points in a set, n", folder / "lengths.png"))
    if results["times"]:
        drawn.append(_plot_times(results, folder / "times.png"))
    return drawn


def _panels(count: int, height: float = 2.9) -> tuple[Any, list[Any]]:
    """-> figure without a display, and `count` panels in rows of four."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.2 * columns, 6.4), height * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _lines(axes: Any, series: Series) -> None:
    """Both axes logarithmic, a tick at each x."""
    for label, colour, marker, points in series:
        middles = [median(values) for values in points.values()]
        lows = [middle - min(values) for middle, values in zip(middles, points.values(), strict=True)]
        highs = [max(values) - middle for middle, values in zip(middles, points.values(), strict=True)]
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.8}
        axes.errorbar(list(points), middles, [lows, highs], label=label, **style)
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    ticks = sorted({x for *_, points in series for x in points})
    axes.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 and x % 1024 == 0 else str(x) for x in ticks], fontsize=8)
    axes.minorticks_off()


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = COLUMNS if figure.get_figwidth() > 9 else 2
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _plot_models(entries: Sequence[Entry], path: Path) -> Path:
    """A dot for every seed and a bar at the median, a panel for each target."""
    targets = targets_of(entries)
    families = [family for family in FAMILIES if any(entry["family"] == family for entry in entries)]
    figure, panels = _panels(len(targets), 0.19 * len(families) + 0.9)
    for number, (axes, target) in enumerate(zip(panels, targets, strict=True)):
        for entry in entries:
            if entry["target"] == target:
                values, row = measured(entry), families.index(entry["family"])
                colour = STYLES[entry["family"]][0]
                axes.plot(values, [row] * len(values), linestyle="", marker="o", markersize=4, alpha=0.5, color=colour)
                axes.plot([median(values)], [row], linestyle="", marker="|", markersize=11, markeredgewidth=2, color=colour)
        axes.set_xscale("log")
        axes.set_yticks(range(len(families)), [FAMILIES[family].title for family in families], fontsize=8)
        axes.tick_params(labelleft=number % COLUMNS == 0)
        axes.set_ylim(len(families) - 0.4, -0.6)
        axes.set_title(title(target), fontsize=10)
    figure.supxlabel("normalised mean squared error", fontsize=10)
    save_figure(figure, path)
    return path


def _plot_latent(latent: Mapping[str, Sequence[Entry]], path: Path) -> Path:
    """A panel for each ladder over d', a line for each target; the bound where there is one."""
    figure, panels = _panels(len(latent), 3.6)
    colours = dict(
        zip(dict.fromkeys(t for entries in latent.values() for t in targets_of(entries)), TARGET_COLOURS, strict=False)
    )
    for axes, (name, entries) in zip(panels, latent.items(), strict=True):
        series: Series = []
        for target in targets_of(entries):
            points = {entry["latent_size"]: measured(entry) for entry in entries if entry["target"] == target}
            series.append((title(target), colours[target], "o", points))
        _lines(axes, series)
        n, d = entries[0]["num_elements"], entries[0]["num_coordinates"]
        if d == 1:
            axes.axvline(n - 1, color="#57606a", linestyle=":", label="d' = n - 1")
        axes.set_title(f"{name.removeprefix('latent, ')} (n = {n}, d = {d})", fontsize=10)
        axes.set_xlabel("width of the sum, d'")
    panels[0].set_ylabel("normalised mean squared error")
    _legend(figure, panels)
    save_figure(figure, path)
    return path


def _against(axis: str) -> Callable[[Sequence[Entry]], dict[int, list[float]]]:
    return lambda own: {entry[axis]: measured(entry) for entry in sorted(own, key=lambda entry: entry[axis])}


def _by_length(own: Sequence[Entry]) -> dict[int, list[float]]:
    """Errors of one entry by the length of the sets, that of its training included."""
    (entry,) = own
    found = {int(length): [v for v in values if v is not None] for length, values in entry["nmse_by_length"].items()}
    found[entry["num_elements"]] = measured(entry)
    return {length: found[length] for length in sorted(found) if found[length]}


def _plot_targets(
    entries: Sequence[Entry], points_of: Callable[[Sequence[Entry]], dict[int, list[float]]], xlabel: str, path: Path
) -> Path:
    """A panel for each target, a line for each family."""
    targets = targets_of(entries)
    figure, panels = _panels(len(targets))
    for axes, target in zip(panels, targets, strict=True):
        own = [entry for entry in entries if entry["target"] == target]
        families = [family for family in FAMILIES if any(entry["family"] == family for entry in own)]
        series: Series = [
            (FAMILIES[family].title, *STYLES[family], points_of([entry for entry in own if entry["family"] == family]))
            for family in families
        ]
        _lines(axes, series)
        axes.set_title(title(target), fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
    figure.supylabel("normalised mean squared error", fontsize=10)
    _legend(figure, panels)
    save_figure(figure, path)
    return path


def _plot_times(results: Mapping[str, Any], path: Path) -> Path:
    """Microseconds per point against n."""
    figure, panels = _panels(1, 4.2)
    series: Series = []
    for family in dict.fromkeys(row["family"] for row in results["times"] if row["family"] in COMPARED):
        points = {
            row["num_elements"]: [1e3 * row["milliseconds"] / (row["num_elements"] * row["num_sets"])]
            for row in results["times"]
            if row["family"] == family
        }
        series.append((FAMILIES[family].title, *STYLES[family], points))
    _lines(panels[0], series)
    plain_numbers(panels[0].yaxis)
    panels[0].set_xlabel("points in a set, n")
    panels[0].set_ylabel("forward and backward, µs per point")
    _legend(figure, panels)
    save_figure(figure, path)
    return path


__all__ = ["plot_experiment"]
