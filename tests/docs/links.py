"""Links that lead nowhere, in the repository's pages and on a built site: ``python -m tests.docs.links FOLDER``.

A link within the repository needs a file, and a heading where it has an anchor. A page of the site needs, beside that,
everything that it loads from the site itself.
"""

from __future__ import annotations

import posixpath
import re
import sys
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

CODE = re.compile(r"^( *)(```+).*?^\1\2 *$|(`+)(?!`).+?(?<!`)\3(?!`)", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"\]\(\s*([^)\s]+)[^)]*\)")
OUTSIDE = ("http", "https", "mailto")


def _github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _markdown(heading: str) -> str:
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(text: str) -> set[str]:
    """Of the headings of a page in Markdown: those that are the same where the repository is read and on the site."""
    fenced = re.sub(r"^( *)(```+).*?^\1\2 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(r"[`*]|\[|\]\([^)]*\)", "", h) for h in re.findall(r"^#+ +(.+?)#*$", fenced, re.MULTILINE)]
    return {_github(heading) for heading in headings} & {_markdown(heading) for heading in headings}


def dead_links(root: Path, page: Path) -> Iterator[str]:
    """Of one page in Markdown; what is code, or begins with a scheme, is no link of the repository."""
    for target in INLINE.findall(CODE.sub("", page.read_text())):
        url = urlsplit(target)
        if url.scheme in OUTSIDE:
            continue
        path = (page.parent / unquote(url.path)).resolve() if url.path else page
        if not path.is_relative_to(root) or not path.is_file():
            yield f"{page.relative_to(root)}: no file {target}"
        elif url.fragment and path.suffix == ".md" and not _is_there(root, path, url.fragment):
            yield f"{page.relative_to(root)}: no heading {target}"


def _is_there(root: Path, path: Path, anchor: str) -> bool:
    """A heading, or what mkdocstrings makes one of, which is looked for on the site."""
    made = path.is_relative_to(root / "docs" / "api") and anchor.startswith("lookbehind_fused.")
    return made or anchor in anchors(path.read_text())


class Page(HTMLParser):
    """What a page of the site refers to, what it loads, and what can be referred to on it."""

    LOADS = ("img", "script", "link", "iframe", "source")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for value in (given.get("id"), given.get("name")) if value}
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        for name in ("href", "src"):
            if given.get(name):
                (self.loads if tag in self.LOADS else self.links).append(given[name] or "")


def dead_links_of_site(site: Path) -> Iterator[str]:
    """Of all pages of a folder, as they are opened from there."""
    pages = {path: Page(path) for path in sorted(site.glob("**/*.html"))}
    if not pages:
        yield f"{site}: no pages"
    for path, page in pages.items():
        where = path.relative_to(site)
        if where.name == "404.html":  # whose links begin at a host
            continue
        for target in page.links + page.loads:
            url = urlsplit(target)
            if url.scheme in OUTSIDE or url.netloc:
                if target in page.loads:
                    yield f"{where}: loads {target}"
                continue
            if url.scheme in ("data", "javascript"):
                continue
            to = Path(posixpath.normpath(path.parent / unquote(url.path))) if url.path else path
            to = to / "index.html" if to.is_dir() else to
            if not to.is_relative_to(site) or not to.is_file():
                yield f"{where}: no file {target}"
            elif url.fragment and to in pages and unquote(url.fragment) not in pages[to].anchors:
                yield f"{where}: no anchor {target}"


if __name__ == "__main__":
    dead = list(dead_links_of_site(Path(sys.argv[1]).resolve()))
    print("\n".join(dead) or "no dead link")
    sys.exit(bool(dead))
