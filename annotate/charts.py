"""Small drawings as SVG for a table's cells, in the page's own colours: shares, and intervals.

Places are in per cent of a cell that is as wide as it likes; what is read stands beside it as text.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from puna.trainers.rl.accuracy import Share

COLOURS = "abcd"  # classes of the style sheet


class Row(NamedTuple):
    """A row of a plot."""

    label: str
    drawing: Markup
    value: str


def stacked(shares: Sequence[float], said: str) -> Markup:
    """A bar that is divided into its shares (of one)."""
    parts, x = [], 0.0
    for share, colour in zip(shares, COLOURS, strict=True):
        parts.append(
            f'<rect class="{colour}" x="{100 * x:.2f}%" y="15%" width="{100 * share:.2f}%" '
            'height="70%"/>'
        )
        x += share
    return drawing(parts, said)


def interval(
    low: float, middle: float, high: float, said: str, mark: float | None = None
) -> Markup:
    """A dot with its interval on a line from 0 to 1, with `mark` marked."""
    low, middle, high = (100 * (0.03 + 0.94 * min(1.0, each)) for each in (low, middle, high))
    parts = ['<line class="track" x1="3%" x2="97%" y1="50%" y2="50%"/>']
    if mark is not None:
        at = 100 * (0.03 + 0.94 * mark)
        parts.append(f'<line class="axis" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>')
    parts.append(
        f'<line class="range" x1="{low:.2f}%" x2="{high:.2f}%" y1="50%" y2="50%"/>'
        f'<circle class="a" cx="{middle:.2f}%" cy="50%" r="6"/>'
    )
    return drawing(parts, said)


def of_share(label: str, share: Share) -> Row:
    """A share of pairs with its interval, against one half."""
    value = f"{share.share:.0%} of {share.pairs}"
    said = f"{label}: {value}, interval {share.low:.0%} to {share.high:.0%}"
    return Row(label, interval(share.low, share.share, share.high, said, mark=0.5), value)


def drawing(parts: Iterable[str], said: str) -> Markup:
    """The whole, with what it shows in words for who does not see it."""
    return Markup(  # every text in it has been escaped
        f'<svg role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )
