"""What a warm step costs beside the kernels' own work: calls of this package's Python functions, ops, fresh memory."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lookbehind_fused
from lookbehind_fused import Lookbehind
from tests.conftest import drive
from tests.twin import BASES, scaled_apart, values

PACKAGE = str(Path(lookbehind_fused.__file__).parent)
RULES = [base for base in BASES if base in ("SGD", "momentum", "Adam", "AdamW")]
WARM = 3  # steps after which nothing is made any more


class Run:
    """An optimizer with k = 2 that has made some steps, over tensors whose gradients are there already."""

    def __init__(
        self,
        backend: str,
        base: str,
        tensors: int,
        groups: Callable[[list[nn.Parameter]], list[dict[str, Any]]],
        missing: int | None = None,
        form: str = "step",
        **options: Any,
    ) -> None:
        make, settings = BASES[base]
        params = [nn.Parameter(values(5, seed=number).clone()) for number in range(tensors)]
        self.optimizer = Lookbehind(groups(params), make, k=2, rho=0.1, backend=backend, **options, **settings)
        self.form = form
        self.grads = [(p, values(5, seed=100 + number)) for number, p in enumerate(params) if number != missing]
        self.loss = torch.zeros(())
        for _ in range(WARM):
            self.step()

    def evaluate(self, index: int = 0) -> Tensor:
        for p, grad in self.grads:
            p.grad = grad
        return self.loss

    def step(self) -> None:
        drive(self.optimizer, self.form, self.evaluate, 2)


def all_together(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params}]


def each_its_own_lr(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": 0.01 + 0.001 * number} for number, p in enumerate(params)]


def calls_of(run: Run) -> list[str]:
    """The package's functions that one ``step(closure)`` calls."""
    calls: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(f"{frame.f_code.co_filename}: {frame.f_code.co_name}")

    step, evaluate = run.optimizer.step, run.evaluate
    sys.setprofile(note)
    try:
        step(evaluate)
    finally:
        sys.setprofile(None)
    return calls


class Ops(TorchDispatchMode):
    """Notes every op by name, and of each how many tensors it returns whose memory is none of its arguments'."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, returned = (
            {x.untyped_storage().data_ptr() for x in tree_leaves(of_one) if isinstance(x, Tensor)}
            for of_one in ((args, kwargs), result)
        )
        self.ops.append((str(func), len(returned - given)))
        return result

    @property
    def launches(self) -> list[str]:
        return [name for name, _ in self.ops if name.startswith("lookbehind_fused")]

    @property
    def fresh(self) -> int:
        return sum(fresh for _, fresh in self.ops)


def ops_of(run: Run) -> Ops:
    with Ops() as ops:
        run.step()
    return ops


@pytest.mark.parametrize("options", [{}, {"alpha": "adaptive"}, {"max_grad_norm": 0.1, "adaptive": True}], ids=str)
@pytest.mark.parametrize("base", RULES)
def test_python_calls_of_a_warm_step(base: str, options: dict[str, Any]) -> None:
    """However many tensors; fifty groups with learning rates of their own may take a few more."""
    for tensors in (1, 30):
        calls = calls_of(Run("native", base, tensors, all_together, **options))
        assert len(calls) <= 40, "\n".join(calls)
    calls = calls_of(Run("native", base, 50, each_its_own_lr, **options))
    assert len(calls) <= 60, "\n".join(calls)
    calls = calls_of(Run("native", base, 30, all_together, missing=17, **options))
    assert len(calls) <= 45, "\n".join(calls)


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", BASES)
def test_fifty_groups_take_the_launches_of_one(base: str, form: str) -> None:
    """As few as evaluations where one pass descends and ascends, and none else of any kind."""
    one, fifty = (ops_of(Run("native", base, 50, groups, form=form)) for groups in (all_together, each_its_own_lr))
    assert one.launches
    assert fifty.launches == one.launches
    if base in RULES:
        assert len(one.launches) == (4 if form == "pairs" else 3)
        assert fifty.ops == one.ops


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", RULES)
@pytest.mark.parametrize("apart", [False, True], ids=["one bucket", "several"])
def test_a_tensor_without_a_gradient_costs_no_memory(base: str, form: str, apart: bool) -> None:
    """The same ops, of which no more return fresh memory, whichever tensor it is."""
    groups = scaled_apart if apart else each_its_own_lr
    whole = ops_of(Run("native", base, 100, groups, form=form))
    for missing in (0, 50, 99):
        run = Run("native", base, 100, groups, missing=missing, form=form)
        before = run.optimizer._prepared.buckets
        ops = ops_of(run)
        assert ops.launches == whole.launches
        assert ops.fresh <= whole.fresh
        assert [name for name, _ in ops.ops] == [name for name, _ in whole.ops]
        assert run.optimizer._prepared.buckets is before
