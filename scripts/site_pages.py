"""Pages of the site that stand outside of docs: README as its index, and files that pages link to (a MkDocs hook)."""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
"""The target of a link to a file, without its anchor."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add README, and every file outside of docs that a page links to, at its place in the repository."""
    waiting = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in waiting:
        for target in LINK.findall(page.read_text(encoding="utf-8")) if page.suffix == ".md" else ():
            linked = (page.parent / target).resolve()
            if linked.is_file() and linked not in waiting and linked.parent != ROOT / "docs":
                waiting.append(linked)
    for path in waiting:
        if ROOT / "docs" not in path.parents:
            place = _place(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with links that lead to the same files in the site as in the repository."""
    source = page.file.abs_src_path or ""
    folder = posixpath.dirname(os.path.relpath(source, ROOT))
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _place(posixpath.normpath(posixpath.join(folder, link[1])))
        return posixpath.relpath(target, here or ".")

    # A value and its spread stay on one line of a table.
    return LINK.sub(moved, markdown).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _place(path: str) -> str:
    """Return where a file of the repository is in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
