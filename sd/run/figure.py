"""Small charts as self-contained SVG, in the reader's light or dark scheme.

A chart is a list of marks, each a piece of SVG, and `document` puts them on a card. Marks are
placed in pixels, which count downwards; an axis is a function from values to pixels. `panels` does
that for charts of percent against something:

    panel = Panel("steps", 0, 60, (0, 30, 60), [("blue", [(0, 5.2), (60, 48.4)])])
    svg = panels("what the chart shows", {"its name": "blue"}, [[panel]], 500, 260)

`style` is one or several class names: blue, orange, green, purple or grey (otherwise a mark has the
text's colour); dashed for lines; bold, end and middle for texts, which are escaped.
"""
from collections.abc import Callable, Iterable
from html import escape
from math import copysign, log1p
from typing import NamedTuple

LINEAR = 0.1        # `symlog` is close to linear below, and to logarithmic above
ABOVE = (0.3, 1, 3, 10, 30, 100, 1000, 1e4, 1e5)
TICKS = (*(-tick for tick in reversed(ABOVE)), 0, *ABOVE)       # of a symlog axis
Axis = Callable[[float], float]
Point = tuple[float, float]
STYLE = """
.figure { --card: #ffffff; --text: #1f2328; --rule: #d1d9e0; --grey: #59636e;
          --blue: #2166ac; --orange: #c4570a; --green: #12876f; --purple: #8a1fb8;
          font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif;
          font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) {
  .figure { --card: #0d1117; --text: #e6edf3; --rule: #3d444d; --grey: #9198a1;
            --blue: #6cb0f5; --orange: #f0954a; --green: #5fd6b4; --purple: #c78bff; } }
.figure .blue { --mark: var(--blue); }
.figure .orange { --mark: var(--orange); }
.figure .green { --mark: var(--green); }
.figure .purple { --mark: var(--purple); }
.figure .grey { --mark: var(--grey); }
.figure .grid { --mark: var(--rule); }
.figure rect, .figure circle, .figure text { fill: var(--mark, var(--text)); }
.figure .card { fill: var(--card); }
.figure path { stroke: var(--mark, var(--text)); stroke-width: 1.4; fill: none; }
.figure .grid, .figure .zero { stroke-width: 1; }
.figure path.dashed { stroke-dasharray: 5 4; }
.figure text { stroke: var(--card); stroke-width: 3px; stroke-linejoin: round;
               paint-order: stroke; }
.figure .bold { font-weight: 600; font-size: 13px; }
.figure .end { text-anchor: end; }
.figure .middle { text-anchor: middle; }
"""


def symlog(value: float) -> float:
    """The scale for both signs and several magnitudes: logarithmic, but linear about 0."""
    return copysign(log1p(abs(value) / LINEAR), value)


def axis(low: float, high: float, start: float, end: float, scale: Axis = float) -> Axis:
    """Values to pixels: `low` to `start`, `high` to `end`; `scale`: float, math.log10 or symlog."""
    first, last = scale(low), scale(high)

    def place(value: float) -> float:
        return start + (end - start) * (scale(value) - first) / (last - first)

    return place


def text(x: float, y: float, content: str, style: str = "") -> str:
    """`y` is where its letters stand."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def line(points: Iterable[Point], style: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{style}" d="M{path}"/>'


def point(x: float, y: float, style: str) -> str:
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def bar(start: float, end: float, y: float, style: str) -> str:
    """A horizontal bar about `y`, in either direction."""
    return (f'<rect class="{style}" x="{min(start, end):.1f}" y="{y - 6.5:.1f}" '
            f'width="{abs(end - start):.1f}" height="13"/>')


def interval(start: float, end: float, y: float) -> str:
    """A horizontal error bar: a line with a cap across each end."""
    cap = "v3.5v-7v3.5"
    return f'<path class="" d="M{start:.1f} {y:.1f}{cap}L{end:.1f} {y:.1f}{cap}"/>'


def ticks(axis: Axis, values: Iterable[float], start: float, end: float,
          vertical: bool = False) -> list[str]:
    """Lines at `values`, with the numbers below or on the left; the line of 0 is stronger."""
    marks = []
    for value in values:
        at = axis(value)
        number = f"{value:g}".replace("-", "\u2212")
        style = "grid" if value else "zero grey"
        if vertical:
            marks += [line([(at, start), (at, end)], style),
                      text(at, end + 16, number, "middle grey")]
        else:
            marks += [line([(start, at), (end, at)], style),
                      text(start - 8, at + 4, number, "end grey")]
    return marks


def document(label: str, width: int, height: int, marks: list[str]) -> str:
    """The whole SVG; `label` is what a screen reader says of it."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" class="figure" role="img" aria-label="{escape(label)}">\n'
            f'<style>{STYLE}</style>\n'
            f'<rect class="card" width="{width}" height="{height}" rx="8"/>\n')
    return head + "\n".join(marks) + "\n</svg>\n"


class Panel(NamedTuple):
    """One chart among several: percent against `label`, which goes from `low` to `high`."""
    label: str
    low: float
    high: float
    ticks: Iterable[float]
    lines: list[tuple[str, Iterable[Point]]]        # a style, and values to join
    dots: Iterable[tuple[str, Point]] = ()
    title: str = ""
    scale: Axis = float


def panels(title: str, legend: dict[str, str], rows: list[list[Panel]], width: int, height: int,
           lowest: int = 0) -> str:
    """A figure of charts in rows, each `width` x `height`, from `lowest` to 100 percent.

    `legend` has the style of each name.
    """
    marks, at = [text(16, 24, title, "bold")], 16
    for name, style in legend.items():
        marks += [line([(at, 44), (at + 18, 44)], style), text(at + 23, 48, name, style)]
        at += 42 + 6 * len(name)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            left, top = 48 + (width + 40) * j, 84 + (height + 66) * i
            right, bottom, middle = left + width, top + height, left + width / 2
            x = axis(panel.low, panel.high, left, right, panel.scale)
            y = axis(lowest, 100, bottom, top)
            marks += ticks(x, panel.ticks, top, bottom, vertical=True)
            marks += ticks(y, range(0, 101, 25), left, right)
            marks += [text(middle, top - 10, panel.title, "middle"),
                      text(middle, bottom + 34, panel.label, "middle")]
            for style, values in panel.lines:
                marks.append(line([(x(a), y(b)) for a, b in values], style))
            marks += [point(x(a), y(b), style) for style, (a, b) in panel.dots]
    return document(title, right + 24, bottom + 48, marks)


def bars(title: str, groups: dict[str, dict[str, dict[str, float]]], form: str, note: str) -> str:
    """A figure of bars on a symlog axis: group -> name -> its "mean", "low" and "high".

    `form` is how their numbers are written beside them.
    """
    numbers = [m for group in groups.values() for m in group.values()]
    low = min(-10, *(m["low"] for m in numbers))
    high = max(1, *(m["high"] for m in numbers))
    low = max(tick for tick in TICKS if tick <= low)    # mostly the same, so that figures compare
    high = min(tick for tick in TICKS if tick >= high)
    x = axis(low, high, 84, 350, symlog)
    marks, y = [], 30
    for group, members in groups.items():
        marks.append(text(16, y, group, "bold"))
        for name, m in members.items():
            y += 18
            style = "blue" if m["mean"] > 0 else "orange"
            marks += [
                text(76, y, name, "end"),
                bar(x(0), x(m["mean"]), y - 4, style),
                interval(x(m["low"]), x(m["high"]), y - 4),
                text(496, y, form.format(**m).replace("-", "\u2212"), "end")]
        y += 34
    marks += [
        text(16, y + 12, note, "grey"),
        text(16, y + 27, "logarithmic scale, linear about 0", "grey")]
    shown = [tick for tick in TICKS if low <= tick <= high]
    marks = ticks(x, shown, 34, y - 26, vertical=True) + marks
    return document(title, 512, y + 40, marks)
