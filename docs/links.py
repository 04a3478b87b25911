"""Links of docs/ that lead out of it, for the site: to the repository.

A repository page follows `../experiments/findings.md`; the site has no such page.
"""


def on_page_markdown(markdown, page, config, files):
  """A page whose links out of docs/ lead to the repository."""
  return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
