"""A hook of mkdocs: files outside docs/ that its pages link to become part of the site, in the folder repository/.

So one link works both where the files of the repository are read and on the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TARGET = re.compile(r"(?<=\]\()[^)\s#:]+(?=[)#\s])")


def linked(text: str, folder: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Links of a page in this folder to files of the repository."""
    for match in TARGET.finditer(text):
        path = (folder / match[0]).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield match, path


def place(path: Path) -> str:
    """Where a file of the repository lies among the sources of the site."""
    docs = ROOT / "docs"
    return str(path.relative_to(docs) if path.is_relative_to(docs) else "repository" / path.relative_to(ROOT))


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what pages that are added so link to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for _, path in linked(page.read_text(), page.parent):
            if files.get_file_from_path(place(path)) is None:
                files.append(File.generated(config, place(path), abs_src_path=str(path)))
                pages += [path] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Have links point to where the files lie on the site."""
    changes = list(linked(markdown, Path(page.file.abs_src_path).parent))
    for match, path in reversed(changes):
        target = posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri))
        markdown = markdown[: match.start()] + target + markdown[match.end() :]
    return markdown
