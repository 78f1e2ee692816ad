"""A small program's messages, translated, as catalogues that the tests write."""

from pathlib import Path

VERBS = {
    "Insert": "einfügen", "Delete": "löschen", "Format": "formatieren", "Protect": "schützen", "Merge": "verbinden",
    "Show": "anzeigen", "Hide": "ausblenden", "Select": "auswählen", "Sort": "sortieren", "Copy": "kopieren",
}  # fmt: skip
NOUNS = {
    "Table": "Tabelle", "Column": "Spalte", "Row": "Zeile", "Cell": "Zelle", "Page": "Seite", "Border": "Umrandung",
    "Footnote": "Fußnote", "Image": "Bild", "Frame": "Rahmen", "Header": "Kopfzeile", "Chart": "Diagramm",
    "Bookmark": "Lesezeichen",
}  # fmt: skip
SENTENCES = [
    (f"{noun} an dieser Stelle {verb}", f"{v} the {n} at this place")
    for v, verb in VERBS.items()
    for n, noun in NOUNS.items()
]
"""German and English: 120 of them."""


def write(folder: Path) -> Path:
    """Two catalogues: the sentences, a third of them with accelerators, and what is to be left out."""
    import polib

    folder.mkdir(parents=True, exist_ok=True)
    for part in (0, 1):
        catalogue = polib.POFile()
        catalogue.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
        for place, (german, english) in enumerate(SENTENCES[part::2]):
            if place % 3 == 0:
                german, english = "~" + german, english[:2] + "_" + english[2:]
            catalogue.append(polib.POEntry(msgctxt=f"label{place}", msgid=english, msgstr=german))
        catalogue.append(polib.POEntry(msgctxt="a", msgid="Page %1 of %2", msgstr="Seite %1 von %2"))
        catalogue.append(polib.POEntry(msgctxt="b", msgid="Not translated", msgstr=""))
        catalogue.append(
            polib.POEntry(
                msgctxt="c", msgid="One page only", msgid_plural="All the pages",
                msgstr_plural={0: "Nur eine Seite", 1: "Alle die Seiten"},
            )
        )  # fmt: skip
        catalogue.save_as_mofile(str(folder / f"part{part}.mo"))
    return folder
