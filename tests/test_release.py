"""What a release says of itself in several files is the same in all of them."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
(VERSION,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    entries = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert re.fullmatch(rf"\[{re.escape(VERSION)}\] - (unreleased|\d{{4}}-\d\d-\d\d)", entries[0]), entries[0]
    assert len(entries) == len({*entries})


def test_the_changelog_has_no_other_kinds_of_change_than_the_format() -> None:
    kinds = {*re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= {*CITATION}
    assert str(CITATION["version"]) == VERSION
    assert CITATION["license"] == "Apache-2.0"
    (paper,) = CITATION["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Mordido", "Malviya", "Baratin", "Chandar"]
    assert paper["url"] in (ROOT / "README.md").read_text()
    assert paper["year"] == 2024
