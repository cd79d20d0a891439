"""Drawing: scales, marks and text as SVG. Colours are classes; the page's style sheet has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to pixels from start..end, by their logarithm if asked."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    binary: bool = False
    """Ticks of a logarithmic scale at powers of two."""

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range."""
        if not self.log:
            return _ticks(self.low, self.high)
        return _log_ticks(self.low, self.high, self.binary)


def around(values: Iterable[float], log: bool, margin: float = 0.08) -> tuple[float, float]:
    """A range that holds the values, with some room."""
    found = list(values)
    low, high = min(found), max(found)
    if not log:
        return 0.0, high * (1 + margin)
    room = (high / low) ** margin if high > low else 2.0
    return low / room, high * room


def drawing(width: float, height: float, parts: Iterable[str], label: str) -> str:
    """A whole picture, which shrinks with the page."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:g}px">' + "".join(parts) + "</svg>"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text; `anchor` is start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def rectangle(x: float, y: float, width: float, height: float, kind: str, hint: str = "") -> str:
    """A rectangle, with a hint that shows under the pointer."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'class="{kind}">{_hint(hint)}</rect>'
    )


def path(points: Iterable[tuple[float, float]], kind: str) -> str:
    """Straight lines from point to point."""
    return f'<path d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>'


def mark(x: float, y: float, kind: str, hint: str = "", size: float = 5.0) -> str:
    """A point. Its shape says the same as its colour, for those who cannot tell colours apart."""
    r = size
    shapes = {
        "compile": f"M{x:.1f},{y - r:.1f}l{r:.1f},{r:.1f}l{-r:.1f},{r:.1f}l{-r:.1f},{-r:.1f}z",
        "peer": f"M{x - r * 0.8:.1f},{y - r * 0.8:.1f}h{r * 1.6:.1f}v{r * 1.6:.1f}h{-r * 1.6:.1f}z",
    }
    first = kind.split()[0]
    if first in shapes:
        return f'<path d="{shapes[first]}" class="mark {kind}">{_hint(hint)}</path>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" class="mark {kind}">{_hint(hint)}</circle>'


def short(value: float) -> str:
    """A number on an axis: 0.5, 2, 40, 32k."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _hint(content: str) -> str:
    return f"<title>{escape(content)}</title>" if content else ""


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, binary: bool) -> list[float]:
    """Powers of two where asked for, else 1, 2, 5, 10, ..., where those fit the range."""
    if binary and high / low < 2**10:
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
        return [2.0**power for power in powers]
    if high / low < 4:
        return _ticks(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 10**3.5 else (1,)
    return [s * 10.0**power for power in decades for s in steps if low <= s * 10.0**power <= high]
