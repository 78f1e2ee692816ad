"""Fine-tuning a vision transformer: SGD, SAM, ASAM and Lookbehind over them, each tuned.

`python -m benchmarks.transformers.vit --help` explains the options.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.options import Parser
from benchmarks.transformers import command
from benchmarks.transformers.vit.job import DEFAULT, QUICK, Vit

NAME = "benchmarks.transformers.vit"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    parser = Parser(prog=NAME, description=__doc__.splitlines()[0], allow_abbrev=False)
    return command.main(NAME, parser, make, argv)


def make(chosen: argparse.Namespace) -> Vit:
    """The job that the options ask for."""
    return Vit(QUICK if chosen.quick else DEFAULT, chosen.data_dir)


if __name__ == "__main__":
    sys.exit(main())
