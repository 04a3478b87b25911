"""What the site needs and the repository's pages do not.

The README is the first page, with its pictures; a link to what is in the repository
but not on the site becomes one to the repository. So the same files are pages on
both.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PICTURES = re.compile(r"!\[[^\]]*\]\((?!http)([^)]+)\)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?=[)#])")


def on_files(files, config):
  """Adds the README and its pictures."""
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  files.append(File.generated(config, "index.md", content=readme))
  for name in PICTURES.findall(readme):
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links round, and takes out a mark that only tests read."""
  folder = "" if page.file.src_uri == "index.md" else "docs"

  def turned(link):
    target = posixpath.normpath(posixpath.join(folder, link[1]))
    on_site = target.removeprefix("docs/")
    if files.get_file_from_path(on_site):
      return f"]({on_site}"
    if not (ROOT / target).exists():
      return link[0]  # for mkdocs to complain of
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"]({config.repo_url.rstrip('/')}/{kind}/main/{target}"

  return LINK.sub(turned, markdown).replace("```python notest", "```python")
