"""A small line chart as SVG, whose colours follow the page's light or dark mode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 60, 18, 10, 40
MOST_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, the CSS class that colours it, and its points (x, y)."""

    name: str
    css_class: str
    points: Sequence[tuple[float, float]]


def ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`, at most `MOST_TICKS` above 0."""
    if largest <= 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(largest / MOST_TICKS))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10, 20) if step * factor * MOST_TICKS >= largest)
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def y_axis(lowest: float, largest: float) -> list[float]:
    """Round numbers that hold all values and 0."""
    if lowest >= 0:
        return ticks(largest)
    below = [-tick for tick in reversed(ticks(-lowest))]
    return below if largest <= 0 else below + ticks(largest)[1:]


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, x_largest: float, y_text: Callable[[float], str], summary: str
) -> str:
    """An SVG element `WIDTH` by `HEIGHT` that scales with its container.

    Args:
        title: shown above it.
        lines: drawn in order; one without points is left out.
        x_label: of the horizontal axis, which goes from 0 to `x_largest`.
        y_text: writes a number of the vertical axis, which goes from 0, or from the lowest y below it, to the largest.
        summary: what the chart shows, for those who do not see it.
    """
    x_ticks = [tick for tick in ticks(x_largest) if tick <= x_largest * 1.001]
    values = [y for line in lines for _, y in line.points]
    y_ticks = y_axis(min(values, default=0), max(values, default=0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + (right - LEFT) * x / x_largest

    def y_of(y: float) -> float:
        return bottom - (bottom - TOP) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(y_text(tick))}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,.10g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        if line.points:
            points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line.points)
            last_x, last_y = line.points[-1]
            parts.append(f'<polyline class="{line.css_class}" points="{points}"/>')
            parts.append(f'<circle class="{line.css_class}" cx="{x_of(last_x):.1f}" cy="{y_of(last_y):.1f}" r="3.5"/>')
    keys = "".join(f'<span class="key {line.css_class}">{escape(line.name)}</span>' for line in lines)
    return (
        f'<figure><figcaption>{escape(title)}<br>{keys}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(summary)}">{"".join(parts)}</svg></figure>'
    )
