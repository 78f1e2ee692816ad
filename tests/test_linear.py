"""Work is linear in the number of tensors, also where they join late: opcodes of the package's own code, and ops."""

import sys
from collections.abc import Callable
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lookbehind_fused import Lookbehind
from tests.conftest import drive
from tests.test_calls import PACKAGE
from tests.twin import BASES, values

K = 3


class Work(TorchDispatchMode):
    """Counts what is done within it."""

    def __init__(self) -> None:
        super().__init__()
        self.opcodes = self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Work":
        sys.settrace(self.enter)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        sys.settrace(None)
        super().__exit__(*exception)

    def enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.inside

    def inside(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.opcodes += event == "opcode"
        return self.inside


class Run:
    """An optimizer over n tensors, the second half of which joins late."""

    def __init__(self, backend: str, base: str, form: str, n: int) -> None:
        make, settings = BASES[base]
        self.params = [nn.Parameter(values(2, seed=number).clone()) for number in range(n)]
        self.early, self.late = self.params[: n // 2], self.params[n // 2 :]
        self.optimizer = Lookbehind(self.early, make, k=K, alpha="adaptive", rho=0.1, backend=backend, **settings)
        self.form = form

    def step(self, missing: Callable[[int, int], bool] = lambda number, index: False, toggles: bool = False) -> None:
        """``missing(number, index)``: whether a tensor has no gradient at an evaluation."""

        def evaluate(index: int) -> Tensor:
            for number, p in enumerate(self.params):
                if p.requires_grad or toggles:
                    p.grad = None if missing(number, index) else values(2, seed=number)
            return torch.zeros(())

        drive(self.optimizer, self.form, evaluate, K)


def in_one_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": run.late})
    run.step()


def in_groups_of_their_own(run: Run) -> None:
    for p in run.late:
        run.optimizer.add_param_group({"params": [p]})
    run.step()


def at_later_evaluations(run: Run) -> None:
    run.optimizer.add_param_group({"params": run.late})
    for _ in range(2):
        run.step(lambda number, index: index < number % (K + 1))


def others_in_each_step(run: Run) -> None:
    run.optimizer.add_param_group({"params": run.late})
    for step in range(3):
        run.step(lambda number, index, step=step: (number + step) % 3 == 0)


def frozen_until_now(run: Run) -> None:
    run.optimizer.add_param_group({"params": [p.requires_grad_(False) for p in run.late]})
    run.step()
    for p in run.late:
        p.requires_grad_(True)
    run.step()


def on_in_the_closure(run: Run) -> None:
    run.optimizer.add_param_group({"params": [p.requires_grad_(False) for p in run.late]})
    for _ in range(2):
        run.step(toggles=True)


def with_others_removed(run: Run) -> None:
    in_groups_of_their_own(run)
    for group in run.optimizer.param_groups[1::2]:
        run.optimizer.state.pop(group["params"][0], None)
    del run.optimizer.param_groups[1::2]
    run.step()


JOIN = [in_one_group, in_groups_of_their_own, at_later_evaluations, others_in_each_step, frozen_until_now,
        on_in_the_closure, with_others_removed]  # fmt: skip


@pytest.mark.sample(14)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("join", JOIN)
def test_tensors_that_join_late(backend: str, base: str, join: Callable[[Run], None], form: str) -> None:
    """So many more tensors cost so much more, however many there are. With the first run everything is warm."""
    if base == "Lister" and join is with_others_removed:
        pytest.skip("it keeps tensors that it no longer has")
    found = []
    for n in (6, 12, 24, 36):
        run = Run(backend, base, form, n)
        with Work() as work:
            join(run)
        found.append((work.opcodes, work.ops))
    for counts in zip(*found[1:], strict=True):
        one, two = (b - a for a, b in pairwise(counts))
        assert two <= 1.01 * one, f"{counts}"
