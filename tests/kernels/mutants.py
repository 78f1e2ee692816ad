"""Mutants: a change in a copy of the package that the cases run on it have to notice."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("triton", "gpusim") if importlib.util.find_spec(name) is None]
"""Of what runs Triton's kernels without a GPU."""


def copied_to(folder: Path, *names: str) -> Path:
    """Copy these folders of the project; returns ``folder``."""
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def mutate(source: Path, before: str, after: str) -> None:
    """Replace what is there once."""
    text = source.read_text()
    assert text.count(before) == 1, before
    source.write_text(text.replace(before, after))


def cases_of(folder: Path, module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess:
    """What the copy in ``folder`` makes of the cases."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def assert_passed(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr[-2000:]}"


def assert_noticed(done: subprocess.CompletedProcess) -> None:
    """The cases have failed, and by what they look at: nothing that is missing counts."""
    printed = done.stdout + done.stderr[-2000:]
    assert done.returncode == 1, printed
    assert re.search(r"PTXError|AssertionError", done.stdout + done.stderr), printed
