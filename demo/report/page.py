"""The report's page: its frame and style, and the pieces of HTML it is made of.

Every text that comes from data passes through `html.escape` here. The page refers to nothing
outside itself, and its policy forbids the browser to load or run anything.
"""

from collections.abc import Mapping, Sequence
from html import escape
from string import Template

_STYLE = """
:root { color-scheme: light dark; --page: #fefefe; --ink: #1f2328; --muted: #66707c;
  --grid: #dfe3e8; --panel: #f5f6f8; --blue: #0068a8; --orange: #c65100; --green: #00845f;
  --purple: #9c4f8c; --gold: #a87400; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e4e7eb; --muted: #98a2ae;
  --grid: #2c323a; --panel: #1d2127; --blue: #5db3ec; --orange: #f39143; --green: #3fc49a;
  --purple: #d892c9; --gold: #dcae3c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.05rem; color: var(--muted); font-weight: 600; margin: 0 0 .75rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .75rem; line-height: 1.25; }
h3 { font-size: 1rem; margin: 2.25rem 0 .5rem; }
.headline { font-size: 1.45rem; line-height: 1.35; margin: 0 0 1.25rem; text-wrap: pretty; }
.lead, figcaption, .small { color: var(--muted); }
figure { margin: 0 0 1rem; }
figcaption, .small { font-size: .92rem; max-width: 46rem; }
figcaption { margin-top: .6rem; }
.wide { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th { color: var(--muted); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met, .unmet, .open { white-space: nowrap; font-weight: 600; }
.met { color: var(--green); } .unmet { color: var(--orange); } .open { color: var(--muted); }
details { border-top: 1px solid var(--grid); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.user, .system { background: var(--panel); border-radius: .5rem; padding: .5rem .8rem;
  margin: .8rem 0 .4rem; }
.system { color: var(--muted); font-style: italic; }
.answers { display: grid; gap: .4rem 1rem; margin-bottom: .4rem;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.said { font-size: .92rem; padding: .1rem 0 .3rem; }
.who { display: block; font-size: .78rem; font-weight: 600; color: var(--muted); }
.user, .system, .said { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SFMono-Regular", Menlo, "DejaVu Sans Mono", monospace;
  font-size: .9rem; }
pre { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; }
@media (max-width: 40rem) { main { padding-top: 1.5rem; } .headline { font-size: 1.2rem; }
  .bars thead { display: none; } .bars tr { display: block; border-bottom: 1px solid var(--grid);
  padding: .5rem 0; } .bars td { display: block; border: 0; padding: 0; }
  .bars td:first-child { font-weight: 600; }
  .bars td:nth-child(2)::before { content: "bar: "; color: var(--muted); }
  .bars td:nth-child(3)::before { content: "measured: "; color: var(--muted); } }
@media print { main { max-width: none; } figure { break-inside: avoid; } }
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

MARKS = {True: ("met", "met"), False: ("unmet", "not met"), None: ("open", "not measured")}


def page(title: str, body: Sequence[str]) -> str:
    """The whole document; `body` holds pieces of HTML."""
    return _PAGE.substitute(title=escape(title), style=_STYLE, body="\n".join(body))


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of plain texts; the columns in `numbers` are set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if i in numbers else "" for i in range(len(row))]
        return "".join(
            f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{top}<tbody>\n{body}\n</tbody></table></div>'


def verdicts(rows: Sequence[tuple[str, str, str, bool | None]]) -> str:
    """The table of bars: what, target, measured, met or not."""
    lines = []
    for name, target, value, met in rows:
        kind, mark = MARKS[met]
        cells = "".join(f"<td>{escape(text)}</td>" for text in (name, target, value))
        lines.append(f'<tr>{cells}<td class="{kind}">{mark}</td></tr>')
    head = "<tr><th>What</th><th>Bar</th><th>Measured</th><th></th></tr>"
    body = "\n".join(lines)
    return f'<table class="bars"><thead>{head}</thead><tbody>\n{body}\n</tbody></table>'


def figure(svg: str, caption: str) -> str:
    """A drawing of our own (SVG, taken as it is) with its caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><div class="wide">{svg}</div>\n{below}</figure>'


def conversation(
    title: str, columns: Mapping[str, Sequence[Mapping[str, str]]], opened: bool
) -> str:
    """One dialogue, the columns' answers side by side; what all columns share stands once."""
    lines = [f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>"]
    for turn in range(max((len(c) for c in columns.values()), default=0)):
        said = {name: c[turn] for name, c in columns.items() if turn < len(c)}
        texts = {(m["role"], m["content"]) for m in said.values()}
        role, text = next(iter(texts))
        if len(texts) == 1 and role != "assistant":
            lines.append(f'<div class="{_kind(role)}">{escape(text)}</div>')
            continue
        cells = "".join(
            f'<div class="said"><span class="who">{escape(name)}</span>{escape(m["content"])}</div>'
            for name, m in said.items()
        )
        lines.append(f'<div class="answers">{cells}</div>')
    return "\n".join([*lines, "</details>"])


def _kind(role: str) -> str:
    return "system" if role == "system" else "user"


def code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"
