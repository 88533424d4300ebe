"""The report as one HTML page that needs no network: plots, tables, examples; light or dark, on a desk or a phone."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from geobased.line_chart import Line, line_chart

from .report_pictures import shown_width

# colours of the style sheet
COLOURS = 6
BAR_WIDTH, BAR_HEIGHT, LABEL_HEIGHT, ROW_HEIGHT, MARGIN = 300, 14, 18, 40, 20
MOST_EXAMPLES = 8


def report_page(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page of a report's content; pictures are PNG files by their path."""
    return _template("report_page.html").render(
        report=content,
        question=content["question"],
        results=content["results"],
        rates=rate_plot([level for level in content["results"]["levels"] if level["techniques"]]),
        solved=solved_plot(content["results"]),
        losses=loss_plot(content["results"]),
        examples=_examples(content),
        pictures=[
            {
                **shown,
                "source": "data:image/png;base64," + base64.b64encode(pictures[shown["file"]]).decode(),
                "width": shown_width(pictures[shown["file"]]),
            }
            for shown in content["pictures"]
        ],
    )


def comparison_page(comparison: Mapping[str, Any]) -> str:
    """The page of a comparison, see `geobased.auditing.comparison.compare`."""
    return _template("comparison_page.html").render(comparison=comparison, rates=rate_plot(comparison["levels"]))


def _template(name: str) -> jinja2.Template:
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    settings = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = jinja2.Environment(loader=here, **settings)  # type: ignore[arg-type]
    templates.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    templates.filters["shown"] = shown
    return templates.get_template(name)


def shown(value: Any) -> str:
    """Text as it is, numbers short, all else as JSON."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def rate_plot(levels: Sequence[Mapping[str, Any]]) -> str:
    """Success rate of each level with its interval, as SVG."""
    bottom = ROW_HEIGHT * len(levels)
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = MARGIN + BAR_WIDTH * share
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{share:.0%}</text>')
    told = []
    for place, level in enumerate(levels):
        top = ROW_HEIGHT * place + LABEL_HEIGHT
        middle = top + BAR_HEIGHT / 2
        rate, low, high = (MARGIN + BAR_WIDTH * level[name] for name in ("rate", "low", "high"))
        parts.append(f'<text x="{MARGIN + 4}" y="{top - 5}">{escape(level["access"])}</text>')
        parts.append(f'<rect class="bar" x="{MARGIN}" y="{top}" width="{rate - MARGIN:.1f}" height="{BAR_HEIGHT}"/>')
        ends = [(low, high, middle, middle), *((x, x, middle - 5, middle + 5) for x in (low, high))]
        parts += [f'<line class="interval" x1="{a:.1f}" x2="{b:.1f}" y1="{c}" y2="{d}"/>' for a, b, c, d in ends]
        told.append(f"{level['access']} {level['rate']:.1%} ({level['low']:.1%} to {level['high']:.1%})")
    summary = "Share of items with a failure found, with 95 % intervals: " + "; ".join(told)
    size = f"0 0 {BAR_WIDTH + 2 * MARGIN} {bottom + 24}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(summary)}">{"".join(parts)}</svg>'


def solved_plot(results: Mapping[str, Any]) -> str:
    """Share of items with a success within a budget, a line for each level."""
    measured = [level for level in results["levels"] if level["techniques"]]
    lines = [
        Line(level["access"], f"line-{place % COLOURS}", list(zip(results["budgets"], level["solved_curve"], strict=True)))
        for place, level in enumerate(measured)
    ]
    told = "; ".join(f"{level['access']} {level['solved_curve'][-1]:.0%} with all" for level in measured)
    return line_chart(
        "Items with a failure found, by the budget of each technique",
        lines,
        "forward-equivalents",
        results["budgets"][-1],
        lambda share: f"{share:.0%}",
        f"Share of items with a failure found within the budget: {told}",
    )


def loss_plot(results: Mapping[str, Any]) -> str:
    """Mean lowest loss within a budget, a line for each technique."""
    lines, told = [], []
    for place, technique in enumerate(results["techniques"]):
        points = [(x, y) for x, y in zip(results["budgets"], technique["loss_curve"], strict=True) if y is not None]
        lines.append(Line(technique["name"], f"line-{place % COLOURS}", points))
        told.append(f"{technique['name']} ends at {points[-1][1]:.3g}" if points else f"{technique['name']} has none")
    return line_chart(
        "Loss by budget, mean over the items",
        lines,
        "forward-equivalents",
        results["budgets"][-1],
        lambda loss: f"{loss:.3g}",
        "Mean lowest loss within the budget: " + "; ".join(told),
    )


def _examples(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each technique, as many items as there is room for, successes first."""
    items = {item["id"]: item for item in content["question"]["items"]}
    found = []
    for technique in content["results"]["techniques"]:
        shown_items = []
        for item in sorted(technique["items"], key=lambda item: not item["success"])[:MOST_EXAMPLES]:
            asked = {name: value for name, value in items[item["id"]].items() if name not in ("id", "image_sha256")}
            shown_items.append({"technique": technique["name"], "unit": technique["perturbation_unit"], "asked": asked, **item})
        found.append({"name": technique["name"], "examples": shown_items})
    return found


__all__ = ["comparison_page", "loss_plot", "rate_plot", "report_page", "shown", "solved_plot"]
