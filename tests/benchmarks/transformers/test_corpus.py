"""Pairs of sentences: which are kept, how they are split, what the files may be."""

from pathlib import Path

import pytest

from benchmarks.files import UserError
from benchmarks.transformers.translation import corpus
from tests.benchmarks.transformers import catalogues

PAIRS = [
    (f"Wort {chr(97 + a)}{chr(97 + b)} hier", f"word {chr(97 + a)}{chr(97 + b)} here")
    for a in range(20)
    for b in range(20)
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("Tabelle löschen", "Delete Table"), ("Tabelle löschen", "Delete Table")),
        (("  Tabelle\n löschen\t", "Delete\n\nTable"), ("Tabelle löschen", "Delete Table")),
        (("_Tabelle löschen", "Delete Ta_ble"), ("Tabelle löschen", "Delete Table")),
        (("~Löschen sofort", "~Delete now"), ("Löschen sofort", "Delete now")),
        (("Ein _ allein", "A _ alone"), ("Ein _ allein", "A _ alone")),
        (("A_B_C ist ein Name", "A_B_C is a name"), None),
        (("Seite %1 von 2", "Page 1 of 2"), None),
        (("Seite $(ARG1)", "Page one two"), None),
        (("Seite eins", "<b>Page one</b>"), None),
        (("Keine Seite", "[No page]"), None),
        (("Eins &amp; zwei", "One and two"), None),
        (("Löschen", "Delete"), None),
        (("Löschen", "Delete 2"), None),
        (("123 …", "One two"), None),
        (("Das ist es", "Das ist es"), None),
        (("a " * 60, "b " * 60), (("a " * 60).strip(), ("b " * 60).strip())),
        (("a " * 61, "b " * 60), None),
        (("a " * 60, "b " * 61), None),
    ],
)
def test_messages_become_sentences(given, expected):
    assert list(corpus.cleaned([given])) == ([expected] if expected else [])


def test_every_pair_is_in_one_part_whatever_the_order():
    found = corpus.split(PAIRS)
    parts = [getattr(found, part) for part in corpus.PARTS]
    assert sorted(sum(parts, ())) == sorted(PAIRS)
    assert corpus.split(reversed(PAIRS)) == found
    for part in parts[1:]:  # 20 expected each, standard deviation 4.4
        assert 5 <= len(part) <= 40
    without = corpus.split(PAIRS[:-1])
    assert set(without.train) | {PAIRS[-1]} >= set(found.train), "a new pair moves no other"


def test_duplicates_are_on_one_side_only():
    """Also what shares nothing with a pair but the translation of a third."""
    chains = []
    for german, english in PAIRS:
        other = "Anders " + german
        chains += [
            (german, english),
            (german, english),
            (german.upper() + " 7!", english + "."),
            (german, "or " + english),
        ]
        chains += [(other, "or " + english), (other, "also " + english)]
    found = corpus.split(chains)
    parts = [getattr(found, part) for part in corpus.PARTS]
    assert all(parts)
    assert sum(map(len, parts)) == 5 * len(PAIRS)
    for side in (0, 1):
        letters = [{"".join(filter(str.isalpha, pair[side].lower())) for pair in part} for part in parts]
        assert not letters[0] & letters[1]
        assert not letters[0] & letters[2]
        assert not letters[1] & letters[2]
    assert all(len(part) % 5 == 0 for part in parts), "a group is not torn apart"


def test_fingerprint_shows_any_change():
    found = corpus.split(PAIRS)
    assert corpus.split(PAIRS).fingerprint() == found.fingerprint()
    moved = corpus.Corpus(found.train, found.test, found.valid)
    changed = corpus.Corpus(found.train, found.valid, (*found.test[:-1], ("x", "y")))
    assert len({found.fingerprint(), moved.fingerprint(), changed.fingerprint()}) == 3


# Catalogues


def test_catalogues_are_read(tmp_path):
    pytest.importorskip("polib", reason="polib is not installed: make translation-tests")
    found = corpus.load("messages", str(catalogues.write(tmp_path)))
    assert sorted(found.train + found.valid + found.test) == sorted(catalogues.SENTENCES)
    some = corpus.load("messages", str(tmp_path), limit=2)
    assert (some.train, some.valid, some.test) == (found.train[:2], found.valid[:2], found.test[:2])


def test_where_there_are_no_catalogues_it_says_what_to_install(tmp_path):
    pytest.importorskip("polib", reason="polib is not installed: make translation-tests")
    with pytest.raises(UserError, match="install Debian's libreoffice-l10n-de or name their folder with --data-dir"):
        corpus.load("messages", str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no catalogue at all", None], ids=["empty", "text", "cut"])
def test_damaged_catalogues_are_named(content, tmp_path):
    pytest.importorskip("polib", reason="polib is not installed: make translation-tests")
    path = catalogues.write(tmp_path) / "part1.mo"
    path.write_bytes(path.read_bytes()[:40] if content is None else content)
    with pytest.raises(UserError, match=r"part1\.mo: not a message catalogue"):
        corpus.load("messages", str(tmp_path))


def test_the_real_catalogues():
    pytest.importorskip("polib", reason="polib is not installed: make translation-tests")
    if not Path(corpus.CATALOGUES).is_dir():
        pytest.skip("Debian's package libreoffice-l10n-de is not installed")
    found = corpus.load("messages")
    assert len(found.train) > 10_000
    assert min(len(found.valid), len(found.test)) > 400


# IWSLT'14


def write_iwslt14(folder: Path) -> dict[str, list[tuple[str, str]]]:
    pairs = {
        part: [(f"{part} eins {i} ü", f"{part} one {i} …") for i in range(n)]
        for part, n in zip(corpus.PARTS, (5, 3, 2), strict=True)
    }
    for part, lines in pairs.items():
        (folder / f"{part}.de").write_text("".join(f"{german}\n" for german, _ in lines), encoding="utf-8")
        (folder / f"{part}.en").write_text("".join(f"{english}\n" for _, english in lines), encoding="utf-8")
    return pairs


def test_iwslt14_reads_a_sentence_a_line(tmp_path):
    pairs = write_iwslt14(tmp_path)
    found = corpus.load("iwslt14", str(tmp_path))
    assert {part: list(getattr(found, part)) for part in corpus.PARTS} == pairs
    assert len(corpus.load("iwslt14", str(tmp_path), limit=2).train) == 2
    path = tmp_path / "train.de"
    path.write_text("\u2028 eins \n\nzwei\ndrei\nvier\n", encoding="utf-8")  # that one separates no lines here
    assert len(corpus.load("iwslt14", str(tmp_path)).train) == 4, "a pair with an empty side is left out"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("valid.en", None, "valid.en: No such file"),
        ("test.de", b"eins\n", "test.en: 2 lines for the 1 of test.de"),
        ("train.en", b"\xff\xfe\n", "train.en: not UTF-8"),
        ("valid.de", b"\n\n\n", "no pairs are left to valid with"),
    ],
)
def test_wrong_iwslt14_files_are_named(name, content, message, tmp_path):
    write_iwslt14(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus.load("iwslt14", str(tmp_path))


def test_iwslt14_needs_a_folder():
    with pytest.raises(UserError, match="--data iwslt14 needs --data-dir"):
        corpus.load("iwslt14")
    with pytest.raises(UserError, match="expected messages or iwslt14, got 'wmt'"):
        corpus.load("wmt")
