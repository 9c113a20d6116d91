"""MkDocs hooks: files of the repository that the documentation links to become pages of the site.

A link such as `../prefsel/metrics/less.py` works where the repository is browsed; here the file it names is added to
the site as a page of its own, so that the site is complete without a network. A link to nothing fails the build.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
IN_NAV = {
    "README.md": "index.md",
    "DECISIONS.md": "decisions.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/notebook.ipynb": "notebook.md",
}
"""Files of the repository that have a place in the navigation, and the pages they become."""
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
"""The target of a Markdown link, where it is a relative path."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for every file of the repository that is linked to, directly or from such a page."""
    repository: dict[str, str] = {}
    for path, page in IN_NAV.items():
        repository[path] = page
        files.append(File.generated(config, page, content=content(path)))
    queue = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_uri not in IN_NAV.values()]
    queue += [path for path in IN_NAV if path.endswith(".md")]
    while queue:
        source = queue.pop()
        for _, target, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            if path in repository or path.startswith("docs/"):
                continue
            if not (ROOT / path).is_file():
                raise PluginError(f"{source}: the link to {target} leads to no file of the repository")
            repository[path] = "source/" + path.removesuffix(".md") + ".md"
            inclusion = InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, repository[path], content=content(path), inclusion=inclusion))
            queue += [path] if path.endswith(".md") else []
    config.extra["repository"] = repository
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files of the repository to the pages they became."""
    repository: dict[str, str] = config.extra["repository"]
    here = page.file.src_uri
    source = next((path for path, added in repository.items() if added == here), f"docs/{here}")
    if not source.endswith(".md"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = repository.get(path) or path.removeprefix("docs/")
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".") + match[3]

    return LINK.sub(rewritten, markdown)


def content(path: str) -> str:
    """A file as Markdown: as it is, a notebook's cells, or the text of a source file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(filter(None, map(cell_text, json.loads(text)["cells"])))
    language = {"yaml": "yaml", "py": "python", "toml": "toml"}.get(path.rpartition(".")[2], "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{text}````\n"


def cell_text(cell: dict[str, Any]) -> str:
    """One cell of a notebook with what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f"![figure](data:image/png;base64,{''.join(data['image/png']).strip()})")
        elif text := "".join(output.get("text") or data.get("text/plain", [])):
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)
