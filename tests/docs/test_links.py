"""No link of README, CONTRIBUTING or docs/ leads nowhere, nor one of the site, where it can be built."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.links import anchors, dead_links, dead_links_of_site
from tests.docs.pages import PAGES, ROOT


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"])
def test_a_page(page: str) -> None:
    assert list(dead_links(ROOT, ROOT / page)) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_site(tmp_path: Path) -> None:
    """``make docs`` builds it and looks for dead links too."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(dead_links_of_site(tmp_path)) == []


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("[a](other.md), [b](other.md#two-words), [c](#here), ![d](x.png), [e](https://example.org/none)", []),
        ("`[a](none.md)`, ``[a](none.md) ` ``\n\n```python\ntable[0](none.md)\n```\n", []),
        ("[a](none.md)", ["page.md: no file none.md"]),
        ("![a](none.png)", ["page.md: no file none.png"]),
        ("[a](other.md#three)", ["page.md: no heading other.md#three"]),
        ("[a](#there)", ["page.md: no heading #there"]),
        ("[a](other.md#no-heading)", ["page.md: no heading other.md#no-heading"]),
        ("[a](other.md#a--b)", ["page.md: no heading other.md#a--b"]),  # the one reader's, and the other's
        ("[a](other.md#a-b)", ["page.md: no heading other.md#a-b"]),
        ("[a](../other.md)", ["page.md: no file ../other.md"]),
        ("[a](docs/api/x.md#lookbehind_fused.X)", []),
    ],
)  # fmt: skip
def test_dead_links_are_found(link: str, wrong: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"# Here\n\n{link}\n")
    (tmp_path / "other.md").write_text("# One\n\n## Two `words`\n\n## A & b\n\n```\n# no heading\n```\n")
    (tmp_path / "x.png").touch()
    (tmp_path / "docs" / "api").mkdir(parents=True)
    (tmp_path / "docs" / "api" / "x.md").touch()
    assert list(dead_links(tmp_path, tmp_path / "page.md")) == wrong


def test_anchors_are_those_of_both_readers() -> None:
    assert anchors("# What SAM sees in 16 bits\n\n## `step()` and [a link](x.md)\n\n## a_b\n") == {
        "what-sam-sees-in-16-bits",
        "step-and-a-link",
        "a_b",
    }


@pytest.mark.parametrize(
    ("tag", "wrong"),
    [
        ('<a href="sub/other.html#there">', []),
        ('<a href="https://example.org">', []),
        ('<a href="sub/">', ["index.html: no file sub/"]),
        ('<a href="none.html">', ["index.html: no file none.html"]),
        ('<a href="sub/other.html#nowhere">', ["index.html: no anchor sub/other.html#nowhere"]),
        ('<a href="#here">', ["index.html: no anchor #here"]),
        ('<img src="none.png">', ["index.html: no file none.png"]),
        ('<script src="https://example.org/x.js">', ["index.html: loads https://example.org/x.js"]),
        ('<link rel="stylesheet" href="//example.org/x.css">', ["index.html: loads //example.org/x.css"]),
    ],
)
def test_dead_links_of_a_site_are_found(tag: str, wrong: list[str], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.html").write_text('<h2 id="there">There</h2><a href="../index.html">back</a>')
    (tmp_path / "index.html").write_text(tag)
    assert list(dead_links_of_site(tmp_path)) == wrong


def test_a_folder_without_pages_is_no_site(tmp_path: Path) -> None:
    assert list(dead_links_of_site(tmp_path)) == [f"{tmp_path}: no pages"]
