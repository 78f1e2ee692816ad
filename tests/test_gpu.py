"""`make gpu-check` without a GPU: what its checks notice, how they are run, and that their code runs at all."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lookbehind_fused.kernels import Flag, native
from tests.gpu import __main__ as gpu
from tests.gpu import flow, passes, rows, speed, steps
from tests.gpu.checks import OURS, built, checks
from tests.gpu.crew import Crew
from tests.gpu.machine import Absent, Machine, here
from tests.gpu.rows import Row
from tests.sampling import sample

ROOT = Path(__file__).parents[1]


@pytest.fixture
def on_native(monkeypatch: pytest.MonkeyPatch) -> str:
    """Checks run here on the backend that is returned, in the sizes of a dry run."""
    monkeypatch.setattr(here, "device", "cpu")
    monkeypatch.setattr(here, "dry", True)
    return "native"


def test_checks_have_names_of_their_own() -> None:
    names = [check.name for check in checks(OURS)]
    assert len({*names}) == len(names) > 60


def test_a_dry_run_runs_the_code_of_checks(tmp_path: Path) -> None:
    """A few of them, others each time; with nothing but PyTorch, in processes of its own."""
    for name in ("pytest", "numpy", "hypothesis", "triton", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('expected to be needless')\n")
    all_of_them = checks(OURS)
    alone = [check.name for check in all_of_them if check.measures]
    names = [*sample([check.name for check in all_of_them if not check.measures], 3), *sample(alone, 1)]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.gpu", "--dry-run", "--quick", "--table", str(tmp_path / "table.md"), *names]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    title, first, *found, last = done.stdout.splitlines()
    assert title.startswith(f"a dry run on the CPU, torch {torch.__version__}")
    assert first.startswith("ran"), first
    assert "native code is built and loads" in first
    quick = [name for name in names if name in done.stdout]
    assert len(found) == len(quick), done.stdout
    assert all(line.startswith("ran ") for line in found)
    assert last.endswith(f"s: {1 + len(found)} ran")
    written = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in written[5:]] == quick


def test_without_a_gpu_nothing_is_checked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "has no GPU" in capsys.readouterr().out


def test_native_code_that_was_not_built_is_a_failure_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", "_native.abi3.so was not built")
    first = rows.run(next(built(build_failed=False)))
    assert (first.name, first.verdict) == ("native code is built and loads", rows.FAILED)
    assert first.found == "RuntimeError: _native.abi3.so was not built"
    monkeypatch.undo()
    assert rows.run(next(built(build_failed=False))).verdict == rows.HOLDS
    assert "build has failed" in rows.run(next(built(build_failed=True))).found


def test_what_is_missing_is_neither_held_nor_failed() -> None:
    def missing() -> str:
        raise Absent("there is none")

    check = checks(OURS)[0]._replace(action=missing)
    assert rows.run(check)[1:2] == (rows.ABSENT,)


def test_a_row_goes_through_a_line(tmp_path: Path) -> None:
    row = Row("a: b", rows.FAILED, 1.25, "x | y\nz", "trace\n")
    assert Row(*json.loads(row.json())) == row
    assert "\n" not in row.json()
    assert rows.table("title", [row]).splitlines()[-1] == "| a: b | FAILED | 1.2 | x \\| y z |"


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    print(json.dumps([name, "FAILED" if name == "fails" else "holds", 0.0, str(os.getpid()), ""]), flush=True)
"""


def ran(names: list[str], count: int = 1, longest: float = 60.0, seconds: float = 600.0) -> dict[str, Row]:
    found: list[Row] = []
    Crew([sys.executable, "-c", WORKER], found.append, longest).run(names, count, time.monotonic() + seconds)
    assert sorted(row.name for row in found) == sorted(names)
    return {row.name: row for row in found}


def test_who_fails_dies_or_hangs_takes_nobody_along() -> None:
    """The next check has a new process."""
    found = ran(["first", "second", "fails", "third", "dies", "fourth"])
    assert found["first"].found == found["second"].found != found["third"].found
    assert found["dies"].verdict == rows.FAILED
    assert found["dies"].found == "its process has ended with code 3"
    assert {found[name].verdict for name in ("first", "second", "third", "fourth")} == {rows.HOLDS}
    found = ran(["hangs", "after"], longest=1.0)
    assert (found["hangs"].verdict, found["hangs"].found) == (rows.FAILED, "no end after 1 s")
    assert found["after"].verdict == rows.HOLDS


def test_what_has_not_ended_in_time_says_so() -> None:
    assert {row.verdict for row in ran(["a", "b"], count=2, seconds=-1.0).values()} == {rows.NO_TIME}
    found = ran(["hangs", "after"], seconds=2.0)
    assert {row.verdict for row in found.values()} == {rows.NO_TIME}
    assert found["hangs"].found == "no end after 2 s"


def test_sums_that_are_left_from_the_call_before_are_noticed(on_native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = native.bind

    def late(name: str, params: Any, table: Any, given: Any) -> Any:
        """Adds up what the blocks of the call before have handed over."""
        run, key, before = bind(name, params, table, given), "sums" if "sums" in given else "sq_norms", []

        def call(grads: Any) -> None:
            run(grads)
            before.append(given[key].clone())
            given[key].copy_(before[max(0, len(before) - 2)])

        return call

    for name, flags in (("reduce_sq_norm", 0), ("descend_align", 0), ("descend_align", Flag.PER_TENSOR)):
        assert "largest error" in passes.handed_over(on_native, name, flags)
        with monkeypatch.context() as patched:
            patched.setattr(native, "bind", late)
            with pytest.raises(AssertionError, match="1 tensors of .* elements"):
                passes.handed_over(on_native, name, flags)


@pytest.mark.parametrize("check", [steps.backward_passes, steps.moved, flow.side_streams])
def test_a_pass_that_does_a_little_more_is_noticed(check: Any, on_native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every sixteenth call, as where a kernel has read a gradient that was not there yet."""
    assert check(on_native)
    bind, calls = native.bind, []

    def more(name: str, params: Any, table: Any, given: Any) -> Any:
        run = bind(name, params, table, given)

        def call(grads: Any) -> None:
            calls.append(name)
            run([g * (1.001 if len(calls) % 16 == 0 else 1.0) for g in grads])

        return call

    monkeypatch.setattr(native, "bind", more)
    with pytest.raises(AssertionError):
        check(on_native)


def test_a_slow_step_is_below_the_bound(on_native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is of large steps on a GPU alone."""
    assert "a whole step" in speed.bandwidth(on_native, speed.LARGE)
    monkeypatch.setattr(here, "dry", False)
    monkeypatch.setattr(here, "size", lambda elements: 3000)
    monkeypatch.setattr(here, "seconds", lambda run, repeats: (run(), 1e-3)[1])
    monkeypatch.setattr(speed.predictions, "BYTES", 4)
    with pytest.raises(AssertionError, match=r"expected a whole step at 0\.9 or more"):
        speed.bandwidth(on_native, speed.LARGE)
    monkeypatch.setattr(speed.predictions, "BYTES", 68)
    assert "a whole step 5.67" in speed.bandwidth(on_native, speed.LARGE)


# ---- what a dry run does not reach: torch.cuda, by doubles that have its signatures ---------------------------------


STREAM, EVENT = torch.cuda.Stream, torch.cuda.Event


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Of ``torch.cuda``, in their order."""
    noted = mock.Mock()
    for name in ("synchronize", "set_sync_debug_mode", "current_stream", "_sleep", "Stream", "Event"):
        double = mock.create_autospec(getattr(torch.cuda, name))
        noted.attach_mock(double, name)
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(torch.cuda, "stream", mock.create_autospec(torch.cuda.stream, return_value=nullcontext()))
    return noted


def test_waits_are_refused_within_the_block_alone(calls: mock.Mock) -> None:
    def broken() -> None:
        with Machine().no_waits():
            raise KeyError("in the block")

    with pytest.raises(KeyError, match="in the block"):
        broken()
    assert calls.mock_calls == [mock.call.set_sync_debug_mode("error"), mock.call.set_sync_debug_mode("default")]


def test_streams_wait_for_each_other(calls: mock.Mock) -> None:
    """The new one for the one before, and then the other way round."""
    before, new = (mock.create_autospec(STREAM, instance=True) for _ in range(2))
    calls.current_stream.return_value, calls.Stream.return_value = before, new
    with Machine().side_stream():
        torch.cuda.stream.assert_called_once_with(new)
        new.wait_stream.assert_called_once_with(before)
        before.wait_stream.assert_not_called()
    before.wait_stream.assert_called_once_with(new)
    Machine().hold_up()
    assert calls._sleep.call_count == 1


def test_seconds_are_those_of_one_run_between_two_events(calls: mock.Mock) -> None:
    first, last = (mock.create_autospec(EVENT, instance=True) for _ in range(2))
    calls.Event.side_effect = [first, last]
    first.elapsed_time.return_value = 30.0  # milliseconds
    runs: list[bool] = []

    def run() -> None:
        runs.append(first.record.called and not last.record.called)

    assert Machine().seconds(run, 10) == pytest.approx(3e-3)
    assert runs == [True] * 10
    first.elapsed_time.assert_called_once_with(last)
    assert calls.synchronize.call_count == 2


def test_a_sanitizer_that_finds_something_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    code = 9

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, "a race", "")

    monkeypatch.setattr(passes.shutil, "which", lambda name: None)
    with pytest.raises(Absent, match="no compute-sanitizer"):
        passes.sanitized("racecheck")
    monkeypatch.setattr(passes.shutil, "which", lambda name: name)
    monkeypatch.setattr(passes.subprocess, "run", run)
    with pytest.raises(AssertionError, match="racecheck: a race"):
        passes.sanitized("racecheck")
    code = 0
    assert passes.sanitized("memcheck") == "nothing, in every 11th case"
    assert [command[:3] for command in commands] == [
        ["compute-sanitizer", "--tool", t] for t in ("racecheck", "memcheck")
    ]
