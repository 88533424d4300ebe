"""Plots of the comparison of SuperHF, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from geobased.recall.twin_plots import side_by_side_axes, spread_about_mean
from geobased.training.artifacts import save_figure
from geobased.training.superhf_experiment_settings import BASED, NAMES, POLICIES
from geobased.training.superhf_experiment_verdicts import runs_of

# colours of Okabe and Ito, which colour-blind readers can tell apart, darkened where they are pale on white; and markers
STYLES = {
    "superhf": ("#0072b2", "o"),
    "rloo": ("#d55e00", "^"),
    "dpo": ("#007a5a", "s"),
    "sft": ("#a8558a", "D"),
    "best_of_n": ("#1f2328", ""),
    "base": ("#7a7a7a", ""),
}
# from no prior to a strong one
SHADES = ("#440154", "#3b528b", "#21918c", "#3f9e4d", "#b37a00", "#8c510a")
PANELS = {"reward": "reward (what arms see)", "held_out_reward": "held-out reward", "rule_reward": "reward of the rules"}

Rows = Sequence[Mapping[str, Any]]


def plot_experiment(results: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw what the results hold: `rewards-<policy>.png`, and `kl_sweep.png` where there is a sweep.

    Points are means over seeds, bars reach from the lowest to the highest.

    Returns:
        the files.

    Raises:
        ValueError: no run of chosen settings is finished yet.
    """
    drawn = []
    for policy in POLICIES:
        own = {arm: runs_of(results["rows"], policy, arm) for arm in STYLES}
        if any(own.values()):
            drawn.append(Path(folder, f"rewards-{policy}.png"))
            _plot_rewards(results, {arm: rows for arm, rows in own.items() if rows}, drawn[-1])
    sweep = _by_weight(results)
    if len(sweep) > 1:
        drawn.append(Path(folder, "kl_sweep.png"))
        _plot_sweep(results, sweep, drawn[-1])
    if not drawn:
        raise ValueError("the results hold no finished run of chosen settings yet")
    return drawn


def _by_weight(results: Mapping[str, Any]) -> dict[float, Rows]:
    """KL weight -> runs of SuperHF with it."""
    rows = [*runs_of(results["rows"], BASED, "superhf"), *runs_of(results["rows"], BASED, "kl_sweep")]
    weights = sorted({row["options"]["beta"] for row in rows})
    return {weight: [row for row in rows if row["options"]["beta"] == weight] for weight in weights}


def _points(rows: Rows, measure: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and for each the values of all runs."""
    steps = [point["step"] for point in rows[0]["curve"]]
    return steps, [[row["curve"][i][measure] for row in rows] for i in range(len(steps))]


def _line(axes: Any, x: Sequence[float], values: list[list[float]], **style: Any) -> None:
    bars = [list(side) for side in zip(*map(spread_about_mean, values), strict=True)]
    axes.errorbar(x, [mean(group) for group in values], bars, **{"linewidth": 1.8, "capsize": 3, "markersize": 5, **style})


def _plot_rewards(results: Mapping[str, Any], own: Mapping[str, Rows], path: Path) -> None:
    settings = results["settings"]
    per_step = settings["prompts_per_step"] * settings["num_generations"]
    figure, panels = side_by_side_axes(3, (1, 1, 1))
    for axes, (measure, label) in zip(panels, PANELS.items(), strict=True):
        for arm, rows in own.items():
            colour, marker = STYLES[arm]
            steps, values = _points(rows, measure)
            if len(steps) == 1:  # nothing was trained
                axes.axhline(
                    mean(values[0]), color=colour, linewidth=1.4, linestyle="--" if arm == "best_of_n" else ":", label=NAMES[arm]
                )
                continue
            dashes = {"linestyle": (0, (4, 1.5))} if arm == "sft" else {}
            name = f"{NAMES[arm]} (samples nothing)" if arm == "sft" else NAMES[arm]
            _line(axes, [step * per_step for step in steps], values, color=colour, marker=marker, label=name, **dashes)
        axes.set_xlabel(f"sampled completions, {per_step} a step")
        axes.set_title(label, fontsize=10)
        axes.xaxis.set_major_locator(_few_ticks())
    panels[0].set_ylabel("mean over held-out prompts")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6, fontsize=9)
    save_figure(figure, path)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, integer=True)


def _plot_sweep(results: Mapping[str, Any], sweep: Mapping[float, Rows], path: Path) -> None:
    figure, panels = side_by_side_axes(3, (1, 1, 1))
    others = {arm: runs_of(results["rows"], BASED, arm) for arm in ("rloo", "base")}
    for number, (weight, rows) in enumerate(sweep.items()):
        colour = SHADES[number * (len(SHADES) - 1) // max(len(sweep) - 1, 1)]
        steps, values = _points(rows, "held_out_reward")
        _line(panels[0], steps, values, color=colour, marker="o", label=f"β = {weight:g}")
        for axes, measure in zip(panels[1:], ("reward", "rule_reward"), strict=True):
            axes.scatter(*_ends(rows, measure), color=colour, s=30, zorder=3)
    for arm, rows in others.items():
        if rows:
            colour, marker = STYLES[arm]
            for axes, measure in zip(panels[1:], ("reward", "rule_reward"), strict=True):
                axes.scatter(*_ends(rows, measure), color=colour, marker=marker or "x", s=30, label=NAMES[arm])
    for axes, measure in zip(panels[1:], ("reward", "rule_reward"), strict=True):
        axes.set_xlabel("METEOR similarity of completions")
        axes.set_title(PANELS[measure], fontsize=10)
    panels[0].set_xlabel("steps")
    panels[0].set_title(PANELS["held_out_reward"], fontsize=10)
    labels = [axes.get_legend_handles_labels() for axes in panels[:2]]
    handles, names = ([item for pair in labels for item in pair[i]] for i in (0, 1))
    figure.legend(handles, names, frameon=False, loc="outside lower center", ncols=8, fontsize=9)
    save_figure(figure, path)


def _ends(rows: Rows, measure: str) -> tuple[list[float], list[float]]:
    """Similarity and another measure of each run after training."""
    ends = [row["curve"][-1] for row in rows]
    return [end["similarity"] for end in ends], [end[measure] for end in ends]


__all__ = ["plot_experiment"]
