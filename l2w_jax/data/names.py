"""Class names that can be printed, drawn and compared, whatever they came as."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable


def readable(name: object) -> str:
  """A name in composed letters, with escapes for what is no text in it."""
  if isinstance(name, bytes):
    name = name.decode("utf-8", "backslashreplace")
  return "".join(
    # Control characters, and halves that stand for bytes that are not UTF-8.
    letter.encode("unicode_escape").decode()
    if unicodedata.category(letter) in ("Cc", "Cs")
    else letter
    for letter in unicodedata.normalize("NFC", str(name))
  )


def check(names: Iterable[str], where: str) -> None:
  """Raises ValueError if a name is empty, or two are the same."""
  first = {}
  for label, name in enumerate(names):
    if not name.strip():
      raise ValueError(
        f"the name of class {label} in {where} is empty; give it one"
      )
    if first.setdefault(name, label) != label:
      raise ValueError(
        f"classes {first[name]} and {label} in {where} have the same name, "
        f"{name!r}; tell them apart, such as by a number behind it"
      )
