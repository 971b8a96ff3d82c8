"""Two drawings as SVG, in the page's own colours: shares in bars, and shares with intervals."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from puna.trainers.rl.accuracy import Share

WIDTH, LINE, LEFT = 420, 26, 90  # of the drawing, of a row, of its label
COLOURS = "abcd"  # classes of the style sheet


def stacked(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> Markup:
    """A bar for each row, divided into its shares (of one); `names` say what they are."""
    if not rows:
        return Markup("")
    room, parts = WIDTH - LEFT - 8, []
    for number, (label, shares) in enumerate(rows):
        y, x = number * LINE, float(LEFT)
        parts.append(text(0, y + 16, label))
        for share, colour in zip(shares, COLOURS, strict=True):
            parts.append(
                f'<rect class="{colour}" x="{x:.1f}" y="{y + 3}" width="{share * room:.1f}" '
                f'height="{LINE - 6}"/>'
            )
            x += share * room
    top = len(rows) * LINE
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
        x, y = LEFT * (number % 2) * 2.3, top + 10 + 20 * (number // 2)
        parts.append(f'<rect class="{colour}" x="{x:.0f}" y="{y}" width="12" height="12"/>')
        parts.append(text(x + 18, y + 11, name))
    said = "; ".join(
        f"{label}: " + ", ".join(f"{n} {s:.0%}" for n, s in zip(names, shares, strict=True))
        for label, shares in rows
    )
    return drawing(parts, top + 54, said)


def intervals(rows: Sequence[tuple[str, Share]]) -> Markup:
    """A dot with its interval for each row, on a line from 0 to 1 with one half marked."""
    if not rows:
        return Markup("")
    room, parts = WIDTH - 16, []
    for number, (label, share) in enumerate(rows):
        y = number * LINE * 2
        parts.append(text(0, y + 14, f"{label}: {share.share:.0%}, of {share.pairs}"))
        low, middle, high = (8 + room * each for each in (share.low, share.share, share.high))
        parts.append(
            f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y + 30}" y2="{y + 30}"/>'
            f'<circle class="a" cx="{middle:.1f}" cy="{y + 30}" r="6"/>'
        )
    height, half = len(rows) * LINE * 2, 8 + room / 2
    parts.append(f'<line class="axis" x1="{half}" x2="{half}" y1="0" y2="{height}"/>')
    parts.append(text(half - 12, height + 14, "50%"))
    said = "; ".join(
        f"{label}: {s.share:.0%}, interval {s.low:.0%} to {s.high:.0%}" for label, s in rows
    )
    return drawing(parts, height + 20, said)


def text(x: float, y: float, content: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{escape(content)}</text>'


def drawing(parts: Sequence[str], height: float, said: str) -> Markup:
    """The whole, with what it shows in words for who does not see it."""
    return Markup(  # every text in it has been escaped
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(said)}">'
        f"{''.join(parts)}</svg>"
    )
