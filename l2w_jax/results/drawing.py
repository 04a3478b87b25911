"""What all pictures share: style, colours, scales, and SVG for a page.

Matplotlib is imported only to draw, and figures belong to no window. Every figure
is `WIDTH` inches wide, so that its text can be read on a phone, beside another one
on a page, and in a column of a paper.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from l2w_jax.run import files

WIDTH = 4.8  # inches
STYLE: dict[str, Any] = {
  "font.size": 9,
  "axes.titlesize": 9.5,
  "axes.titlelocation": "left",
  "axes.labelsize": 9,
  "legend.fontsize": 8,
  "xtick.labelsize": 8.5,
  "ytick.labelsize": 8.5,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.edgecolor": "#8a8f98",
  "grid.color": "#e8eaed",
  "grid.linewidth": 0.8,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "lines.markersize": 4,
  "text.color": "#202124",
  "axes.labelcolor": "#3c4043",
  "xtick.color": "#5f6368",
  "ytick.color": "#5f6368",
  "savefig.dpi": 200,
  "text.parse_math": False,  # a $ in the name of a class is a $
  "svg.fonttype": "none",  # text stays text, in the page's own font
  "svg.hashsalt": "l2w_jax",  # one figure, one file
  "pdf.fonttype": 42,
}
INK, ACCENT, STAR, WRONG, GREY = (
  "#202124",
  "#c2410c",
  "#1d4ed8",
  "#b3261e",
  "#9aa0a6",
)
# The reference of a comparison is grey; the others differ in hue and lightness.
METHOD_COLORS = (
  "#5f6368 #c2410c #1d4ed8 #15803d #7e22ce #a16207 #0e7490 #be185d".split()
)
FORMATS = ("pdf", "png", "svg")
DECADES = 30  # times the smallest: values that span more have a log axis


def check() -> None:
  """Raises ValueError unless pictures can be drawn here."""
  try:
    import matplotlib.figure  # noqa: F401
  except ImportError as error:
    raise ValueError(
      f"the report needs matplotlib ({error}): pip install matplotlib, or train "
      "and evaluate without a report, with --mode=train and then --mode=evaluate"
    ) from error
  except ValueError as error:
    raise ValueError(
      f"matplotlib does not know MPLBACKEND={os.environ.get('MPLBACKEND')}; unset "
      "it: pictures are written to files, whatever it is"
    ) from error


@contextlib.contextmanager
def _style():
  """Ours instead of the user's; nothing is said of letters a font lacks."""
  import matplotlib

  with matplotlib.rc_context(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)  # ty: ignore[no-matching-overload]
    yield


def styled(draw: Callable) -> Callable:
  """A function that draws a figure, in the style of all of them."""

  @functools.wraps(draw)
  def drawn(*args, **kwargs):
    with _style():
      return draw(*args, **kwargs)

  return drawn


def svg(figure, name: str) -> str:
  """A figure as an SVG element for the body of a page.

  Args:
    figure: of Matplotlib.
    name: that no other figure of the page has; begins the ids in it.
  """
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  with _style():
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
  text = file.getvalue()
  text = text[text.index("<svg") :]
  for mark in (' id="', 'href="#', "url(#"):
    text = text.replace(mark, f"{mark}{name}-")
  # The page's font, and its width instead of one in points.
  text = re.sub(r"font: (.*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
  text = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", text)
  width, height = (round(72 * x, 1) for x in figure.get_size_inches())
  return re.sub(
    r"<svg [^>]*>",
    f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
    f'aria-label="{name}" viewBox="0 0 {width} {height}" '
    'xmlns="http://www.w3.org/2000/svg">',
    text,
    count=1,
  )


def save(folder: files.Path, figures: Mapping[str, Any], format: str) -> None:
  """Writes NAME.FORMAT of each figure into a folder, made where it is missing.

  Args:
    folder: where they go.
    figures: {name: figure of Matplotlib}.
    format: one of `FORMATS`.
  """
  files.make_folder(folder)
  nothing = {"CreationDate": None} if format == "pdf" else None
  with _style():
    for name, figure in figures.items():
      file = io.BytesIO()
      figure.savefig(file, format=format, metadata=nothing)
      files.write(folder / f"{name}.{format}", file.getvalue())


def clean(name: Any, most: int = 24) -> str:
  """A name without what no font draws and no page may hold, and not too long."""
  text = "".join(c if c.isprintable() else "�" for c in str(name))
  return text if len(text) <= most else text[: most - 1] + "…"


def cost_scale(macs: Sequence[float] | np.ndarray) -> tuple[float, str]:
  """(divisor, unit) in which the largest of some costs reads well."""
  for scale, word in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")):
    if max(macs) >= scale:
      return scale, f"{word}MACs"
  return 1.0, "MACs"


def point_of(entry: dict) -> tuple[str, float]:
  """("q", its value) of a row of "budgeted", or ("patience", the level)."""
  name = "q" if "q" in entry else "patience"
  return name, entry[name]


def exit_colors(num_exits: int) -> np.ndarray:
  """[K 4] colours of the exits, first to last."""
  import matplotlib

  return matplotlib.colormaps["viridis"](np.linspace(0.05, 0.86, num_exits))


def new_figure(height: float):
  """An empty figure of `WIDTH` by that many inches, of no window."""
  from matplotlib.figure import Figure

  return Figure(figsize=(WIDTH, height), layout="constrained")


def panels(count: int, columns: int, height: float, **kwargs) -> tuple[Any, list]:
  """(figure, `count` panels): `columns` beside one another, of `height` inches."""
  columns = min(columns, count)
  rows = -(-count // columns)
  figure = new_figure(rows * height)
  found = figure.subplots(rows, columns, squeeze=False, **kwargs).ravel()
  for axes in found[count:]:
    axes.remove()
  for i, axes in enumerate(found[:count]):
    # A panel with none below it shows the ticks it shares.
    axes.tick_params(labelbottom=i + columns >= count or not kwargs.get("sharex"))
  return figure, list(found[:count])


def exit_legend(axes, num_exits: int) -> None:
  """Colours of the exits beside a panel, the last on top as they are stacked."""
  from matplotlib.patches import Patch

  patches = [
    Patch(color=color, label=f"exit {k}")
    for k, color in enumerate(exit_colors(num_exits), 1)
  ]
  axes.legend(
    handles=patches[::-1],
    loc="upper left",
    bbox_to_anchor=(1.0, 1.0),
    handlelength=0.9,
    labelspacing=0.3,
  )


def band(axes, x, low, high, color) -> None:
  """What lies between two lines, shaded."""
  axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def log_if_wide(axis, values: Iterable[float]) -> None:
  """A logarithmic axis with plain numbers, where values span decades."""
  values = np.array(list(values), float)
  values = values[np.isfinite(values) & (values > 0)]
  if not len(values) or values.max() / values.min() < DECADES:
    return
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  axis.axes.set(**{f"{axis.axis_name}scale": "log"})
  wide = values.max() / values.min() > 1e3
  axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
  axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
  axis.set_minor_formatter(NullFormatter())


def middles(edges: Sequence[float]) -> np.ndarray:
  """[M] middles of the bins between M + 1 edges."""
  return (array(edges)[:-1] + array(edges)[1:]) / 2


def array(values: Any) -> np.ndarray:
  """JSON's null becomes NaN, which no line is drawn through."""
  return np.array(values, dtype=float)
