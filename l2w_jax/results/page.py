"""Pages from templates, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATES = "l2w_jax.results", "templates"


def render(template: str, figures: Mapping[str, Any], **context: Any) -> str:
  """A page as HTML, which is one file: figures are in it.

  Args:
    template: its name in the folder of templates.
    figures: {name: figure of Matplotlib}; the template has their SVG as
      `figures.NAME`.
    context: what the template asks for; strings are escaped.
  """
  from markupsafe import Markup

  from l2w_jax.results import drawing

  drawn = {
    name: Markup(drawing.svg(figure, name)) for name, figure in figures.items()
  }
  return _environment().get_template(template).render(figures=drawn, **context)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """The table of a page, as HTML; cells are escaped."""
  return str(_environment().get_template("macros.html").module.table((head, rows)))


def _environment():
  import jinja2

  return jinja2.Environment(
    loader=jinja2.PackageLoader(*TEMPLATES),
    autoescape=True,
    finalize=_printable,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def _printable(value: Any) -> Any:
  """A string without control characters, which no page may hold."""
  if type(value) is not str:
    return value
  return "".join(c if c.isprintable() or c == "\n" else "�" for c in value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown, in columns that are readable as they are."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  head, *rows = (
    f"| {' | '.join(map(str.ljust, row, widths))} |" for row in [head, *rows]
  )
  return "\n".join([head, f"|{'|'.join('-' * (w + 2) for w in widths)}|", *rows])


def percent(fraction: float | None, digits: int = 2) -> str:
  """As cells say it; None, an accuracy of no samples, is a dash."""
  return "–" if fraction is None else f"{100 * fraction:.{digits}f} %"
