"""HTML of a page, its tables and its pictures; tables in Markdown too."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #202124;
  max-width: 56rem; margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .4rem; }}
p, figcaption, summary, th {{ color: #5f6368; margin: .3rem 0 .8rem; }}
.cards {{ display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.4rem 0; }}
.cards div {{ flex: 1 1 8.5rem; background: #f6f7f9; border-radius: .6rem;
  padding: .8rem 1rem; font-size: .82rem; color: #5f6368; }}
.cards b {{ display: block; font-size: 1.4rem; color: #202124; }}
figure {{ margin: 1rem 0 0; }}
img {{ width: 100%; height: auto; }}
.scroll, pre {{ overflow-x: auto; font-size: .86rem; }}
table {{ border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .6rem; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid #e8eaed; }}
td {{ white-space: nowrap; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def render(title: str, body: str) -> str:
  """A whole page; the title is escaped, the body is HTML."""
  return PAGE.format(title=escape(title), body=body)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """An HTML table; cells are escaped."""
  lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
  lines += [
    "".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows
  ]
  body = "\n".join(f"<tr>{line}</tr>" for line in lines)
  return f'<div class="scroll"><table>\n{body}\n</table></div>'


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """The same in Markdown, in columns that are readable as they are."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  head, *rows = (
    f"| {' | '.join(map(str.ljust, row, widths))} |" for row in [head, *rows]
  )
  return "\n".join([head, f"|{'|'.join('-' * (w + 2) for w in widths)}|", *rows])


def picture(name: str, caption: str) -> str:
  """A picture beside the page, as HTML."""
  return (
    f'<figure><img src="{name}" alt="{escape(caption)}">'
    f"<figcaption>{escape(caption)}</figcaption></figure>"
  )


def percent(fraction: float | None, digits: int = 2) -> str:
  """As cells say it; None, an accuracy of no samples, is a dash."""
  return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"
