"""The workflows run what is there, and no more than they need: a verb that is renamed would fail only after a push."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import wheel
from tests.matrix import PYTHONS, TORCHES

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
VERBS = {*re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)}
JOBS = {f"{name}/{job}": said for name, workflow in WORKFLOWS.items() for job, said in workflow["jobs"].items()}
COMMANDS = {name: [shlex.split(step["run"]) for step in job["steps"] if "run" in step] for name, job in JOBS.items()}


def verbs(workflow: str) -> set[str]:
    return {
        command[1] for name, said in COMMANDS.items() for command in said
        if name.startswith(f"{workflow}/") and command[0] == "make"
    }  # fmt: skip


def test_what_is_run_on_every_change_and_at_night() -> None:
    assert {*WORKFLOWS} == {"ci", "nightly"}
    assert verbs("ci") == {"check", "test", "docs", "wheel"}
    assert verbs("nightly") == {"test-all", "fuzz"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_there(name: str) -> None:
    for command in COMMANDS[name]:
        if command[0] == "make":
            assert command[1] in VERBS, command
        else:
            assert command[:2] == ["python", "-m"], command
            assert find_spec(command[2]), command
        if command[1] == "wheel":
            wheel.parsed(shlex.split(command[2].removeprefix("ARGS=")))
        if command[2:3] == ["tests.wheel"]:
            wheel.parsed(command[3:])


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_and_takes_nothing_that_may_change(name: str) -> None:
    job = JOBS[name]
    assert job["timeout-minutes"] <= 180
    actions = [step for step in job["steps"] if "uses" in step]
    assert actions[0]["uses"].startswith("actions/checkout@")
    for action in actions:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action["uses"]), action
    assert actions[0]["with"] == {"persist-credentials": False}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_and_no_more(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert "concurrency" in WORKFLOWS[name]
    assert not [job for job in WORKFLOWS[name]["jobs"].values() if "permissions" in job]


def matrix(name: str) -> dict[str, Any]:
    return JOBS[name]["strategy"]["matrix"]


def test_every_python_and_both_ends_of_torch_are_tried() -> None:
    assert matrix("ci/test") == {"python": [*PYTHONS]}
    assert matrix("ci/install") == {"python": [*PYTHONS], "torch": [TORCHES[0], TORCHES[-1]]}
