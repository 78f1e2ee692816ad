"""Pairs of sentences, German and English: from the message catalogues of a program, or from files of IWSLT'14."""

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.files import UserError

CATALOGUES = "/usr/lib/libreoffice/program/resource/de/LC_MESSAGES"  # where Debian's libreoffice-l10n-de puts them
PARTS = ("train", "valid", "test")
SHARES = 20
"""One of so many groups of pairs is tested on, one validates, the others are trained on."""
MOST_WORDS = 60
PLACEHOLDER = re.compile(r"[%$#^{}<>|\\]|\[[^\]]*\]|&\w+;")
ACCELERATOR = re.compile(r"[_~](?=\w)")

Pair = tuple[str, str]
"""German and English."""


@dataclass(frozen=True)
class Corpus:
    """Each part is a tuple of pairs, German and English."""

    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def fingerprint(self) -> str:
        """SHA-256 of every pair, in hex: equal only for the same pairs in the same order."""
        digest = hashlib.sha256()
        for part in PARTS:
            for pair in getattr(self, part):
                digest.update(f"{part}\t{pair[0]}\t{pair[1]}\n".encode())
        return digest.hexdigest()


def load(name: str, folder: str | None = None, limit: int | None = None) -> Corpus:
    """Reads `messages` (catalogues *.mo) or `iwslt14` (train.de, train.en, valid.de, ..., a sentence a line).

    `limit` keeps the first pairs of each part. Raises UserError for what is missing or damaged, naming it.
    """
    if name == "messages":
        corpus = split(cleaned(_messages(Path(folder or CATALOGUES))))
    elif name == "iwslt14":
        if folder is None:
            raise UserError("--data iwslt14 needs --data-dir: the folder of train.de, train.en, valid.de, ... test.en")
        corpus = Corpus(*(_aligned(Path(folder), part) for part in PARTS))
    else:
        raise UserError(f"--data: expected messages or iwslt14, got {name!r}")
    for part in PARTS:
        if not getattr(corpus, part):
            raise UserError(f"{folder or CATALOGUES}: no pairs are left to {part} with")
    return Corpus(*(getattr(corpus, part)[:limit] for part in PARTS))


def cleaned(pairs: Iterable[Pair]) -> Iterator[Pair]:
    r"""Messages as sentences, in this order:

    1. White space, line breaks too, becomes single spaces.
    2. A pair is left out if either side has a placeholder or markup: one of ``% $ # ^ { } < > | \``, an entity
       (``&amp;``) or something in square brackets.
    3. The mark of an accelerator, ``_`` or ``~`` before a letter or digit, is taken out; where a side has more than one
       these are names of something, and the pair is left out.
    4. A pair is left out if the English side has fewer than two words with a letter (names of functions and colours,
       which nothing in other messages tells), the German side has none, either has more than 60 words, or both are
       the same.
    """
    for pair in pairs:
        german, english = (" ".join(side.split()) for side in pair)
        if any(PLACEHOLDER.search(side) or len(ACCELERATOR.findall(side)) > 1 for side in (german, english)):
            continue
        german, english = (ACCELERATOR.sub("", side) for side in (german, english))
        fits = len(_words(english)) > 1 and _words(german) and german != english
        if fits and max(len(german.split()), len(english.split())) <= MOST_WORDS:
            yield german, english


def _words(side: str) -> list[str]:
    return [word for word in side.split() if any(map(str.isalpha, word))]


def split(pairs: Iterable[Pair]) -> Corpus:
    """Into parts, by a hash of the pairs themselves: neither order nor a seed decides, and a new pair moves few others.

    Pairs whose German or whose English differs in nothing but case, digits and punctuation are one group, also over
    others, and a group goes into one part as a whole: what is tested on has not been trained on. Of pairs that are
    equal there is one.
    """
    found = list(dict.fromkeys(pairs))
    group = list(range(len(found)))  # a forest: of each pair another one of its group, the root itself

    def root(place: int) -> int:
        while group[place] != place:
            group[place] = group[group[place]]
            place = group[place]
        return place

    first: dict[tuple[int, str], int] = {}
    for place, pair in enumerate(found):
        for side, text in enumerate(pair):
            group[root(place)] = root(first.setdefault((side, _letters(text)), place))
    keys: dict[int, str] = {}
    for place, (german, _) in enumerate(found):
        key = _letters(german)
        keys[root(place)] = min(keys.get(root(place), key), key)

    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for place in sorted(range(len(found)), key=lambda place: found[place]):
        share = int.from_bytes(hashlib.sha256(keys[root(place)].encode()).digest()[:8], "big") % SHARES
        parts[("test", "valid")[share] if share < 2 else "train"].append(found[place])
    return Corpus(*map(tuple, parts.values()))


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def _messages(folder: Path) -> Iterator[Pair]:
    """The messages of every catalogue in the folder that are translated, without those that have a plural."""
    import polib  # of the extra `translation`

    paths = sorted(folder.glob("*.mo"))
    if not paths:
        raise UserError(
            f"{folder}: no catalogues (*.mo) there; install Debian's libreoffice-l10n-de or name their folder with "
            "--data-dir"
        )
    for path in paths:
        try:
            messages = polib.mofile(str(path))
        except (OSError, ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{path}: not a message catalogue, or a damaged one ({error})") from error
        for message in messages:
            if message.msgid and message.msgstr and not message.msgid_plural:
                yield message.msgstr, message.msgid


def _aligned(folder: Path, part: str) -> tuple[Pair, ...]:
    """The lines of PART.de and PART.en, pairs with an empty side left out."""
    sides = []
    for language in ("de", "en"):
        path = folder / f"{part}.{language}"
        try:
            sides.append(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error})") from error
    german, english = sides
    if len(german) != len(english):
        raise UserError(
            f"{folder / part}.en: {len(english)} lines for the {len(german)} of {part}.de: not one translation a line"
        )
    pairs = zip((side.strip() for side in german), (side.strip() for side in english), strict=True)
    return tuple(pair for pair in pairs if all(pair))
