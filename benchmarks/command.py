"""What the commands of these folders have in common: how they end, and where they say so."""

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.files import UserError


def ended(name: str, work: Callable[[], object], interrupted: str) -> int:
    """Does the work and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C.

    Args:
        name: of the module that was called: mistakes begin with it.
        work: raises UserError, or OSError, for what the caller has to mend.
        interrupted: what goes on how, said after Ctrl-C.
    """
    try:
        work()
    except UserError as error:
        say(f"{name}: {error}")
        return 2
    except OSError as error:
        say(f"{name}: {error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {interrupted}")
        return 130
    return 0


def check_folders(output: Path, results: Path) -> None:
    """Before anything is done: UserError, naming the option, where a folder of runs or of the report is none."""
    for option, path in (("--output", output), ("--results", results)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{option} {path}: not a folder")


def say(line: str) -> None:
    """Progress and mistakes go to stderr; stdout is for the tables."""
    print(line, file=sys.stderr, flush=True)
