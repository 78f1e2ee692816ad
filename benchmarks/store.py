"""The folder of a job: its settings, and a file for each finished run, so that a kill costs those under way."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.files import UserError, replacing
from benchmarks.machine import processor

SETTINGS = "settings.json"


class Named(Protocol):
    """A run."""

    @property
    def name(self) -> str:
        """Of its file."""


class Store:
    """The finished runs of one job.

    Args:
        folder: made if it is not there.
        settings: as plain values; a folder that was begun with others is refused.
        data: the fingerprint of all that is trained and tested on; likewise.
        run: the job's kind of run, made of a result's "run".
        judged: the number that every result has.

    Raises UserError, naming the file, for a folder that does not fit.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], data: str, run: Callable[..., Named], judged: str = "accuracy"
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: not a folder")
        self.folder = folder
        self.environment = _open(folder, json.loads(json.dumps(settings)), data)
        self.data = data
        self.done: dict[str, Any] = _finished(folder, run, judged)

    def checkpoint(self, name: str) -> Path:
        """Where a run under way saves, if it does."""
        return self.folder / f"{name}.pt"

    def keep(self, run: Named, result: Mapping[str, Any]) -> None:
        """Remembers the result, on the disk too, after which the run's checkpoint has no use."""
        write_json(self.folder / f"{run.name}.json", result)
        self.checkpoint(run.name).unlink(missing_ok=True)
        self.done[run.name] = result


def environment() -> dict[str, Any]:
    """What the last bits of a result may depend on, beside the settings."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the source, with a plus where files differ from it; "unknown" outside a clone."""
    here = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def _open(folder: Path, settings: dict[str, Any], data: str) -> dict[str, Any]:
    """Makes the folder, or checks that the one that is there fits. Returns the environment that it was begun in."""
    wanted = {"settings": settings, "data": data, "environment": environment()}
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and any(folder.glob("*.json")):
            raise UserError(f"{folder}: holds JSON files, but no {SETTINGS}; name another --output")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return wanted["environment"]
    there = _read_json(path)
    if there.keys() != wanted.keys() or there["settings"].keys() != settings.keys():
        raise UserError(f"{path}: written by another version of this program; name another --output")
    for name, value in settings.items():
        if there["settings"][name] != value:
            raise UserError(f"{path}: begun with {name} {there['settings'][name]}, not {value}; name another --output")
    if there["data"] != data:
        raise UserError(f"{path}: begun on other data than there is now; name another --output")
    for name, now in wanted["environment"].items():
        if (then := there["environment"].get(name)) != now:
            print(f"note: {name} was {then} and is {now}: the rest may differ", file=sys.stderr, flush=True)
    return there["environment"]


def _finished(folder: Path, run: Callable[..., Named], judged: str) -> dict[str, Any]:
    """The results in the folder, by the name of the run."""
    found = {path.stem: _read_json(path) for path in sorted(folder.glob("*-*.json"))}
    for name, result in found.items():
        try:
            fits = run(**result["run"]).name == name and isinstance(result[judged], float)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError(f"{folder / name}.json: not the result of this run; remove it to run it again")
    return found


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{path}: not a file of this program, or a damaged one") from error
    return content


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Replaces the file. JSON has no NaN: one in it raises ValueError."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=indent)
    with replacing(path) as file:
        file.write((text + "\n").encode())
