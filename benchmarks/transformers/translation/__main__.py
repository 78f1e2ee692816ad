"""Translation: Adam, SAM, ASAM and Lookbehind over them, each tuned, on German and English sentences.

`python -m benchmarks.transformers.translation --help` explains the options.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.options import Parser
from benchmarks.transformers import command
from benchmarks.transformers.translation.job import DEFAULT, QUICK, Translation

NAME = "benchmarks.transformers.translation"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    parser = Parser(prog=NAME, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--data", choices=("messages", "iwslt14"), default="messages",
        help="messages: catalogues of Debian's libreoffice-l10n-de (default); iwslt14: train.de, train.en, valid.de, "
        "... test.en, a sentence a line, in --data-dir",
    )  # fmt: skip
    return command.main(NAME, parser, make, argv)


def make(chosen: argparse.Namespace) -> Translation:
    """The job that the options ask for."""
    return Translation(replace(QUICK if chosen.quick else DEFAULT, data=chosen.data), chosen.data_dir)


if __name__ == "__main__":
    sys.exit(main())
