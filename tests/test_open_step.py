"""What nobody foresaw, raised by one of the last passes of one bucket: the step has happened or it has not."""

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused.kernels import BACKENDS
from tests.conftest import assert_close, assert_same_state, drive
from tests.twin import BASES, Twin, scaled_apart, two_groups


class Failing:
    """Has passes of some backends raise an error, over tensors of the bucket that ``victim`` is in.

    Attributes:
        ops: which passes. left: how often. done: whether they do their work before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backends: Collection[str], error: type[BaseException]) -> None:
        self.error, self.left, self.done, self.raised = error, 0, False, 0
        self.ops: Collection[str] = ()
        self.victim: Tensor | None = None
        for backend in backends:
            monkeypatch.setattr(BACKENDS[backend], "bind", self.over(BACKENDS[backend].bind))

    def over(self, bind: Callable[..., Any]) -> Callable[..., Any]:
        def bind_failing(op: str, params: list[Tensor], *arguments: Any) -> Callable[[Any], None]:
            run = bind(op, params, *arguments)

            def fails(grads: Any) -> None:
                hit = self.left and op in self.ops and any(p is self.victim for p in params)
                if not hit or self.done:
                    run(grads)
                if hit:
                    self.left -= 1
                    self.raised += 1
                    raise self.error(op)

            return fails

        return bind_failing


def two_dtypes(start: Tensor, number: int) -> nn.Parameter:
    return nn.Parameter(start.float() if number == 2 else start)


# name: options of ``Case``, and a tensor of the bucket whose passes raise
APART: dict[str, tuple[dict[str, Any], int]] = {
    "one bucket": ({"groups": two_groups}, 0),
    "first of two": ({"groups": scaled_apart}, 0),
    "last of two": ({"groups": scaled_apart, "joins": True}, 2),
    "last of two dtypes": ({"parameter": two_dtypes}, 2),
}
# options, and the passes that are to raise: of an adaptive alpha, either of the two that follow each other
ONE, LAST = ("descend_interpolate", "descend_align"), ("interpolate",)
PROGRAMS = [({"k": 1}, ONE), ({"k": 2}, ONE)]
PROGRAMS += [({"k": k, "alpha": "adaptive"}, ops) for k in (2, 3) for ops in (ONE, LAST)]


class Case:
    """A step that fails, beside another optimizer of the same kind that nothing disturbs.

    Args:
        joins: a tensor of the first bucket has its first gradient of each step at evaluation 1.
    """

    def __init__(self, backend: str, base: str, form: str, joins: bool = False, **options: Any) -> None:
        self.joins = joins
        self.twin, self.other = (Twin(backend, base, form=form, **options) for _ in range(2))
        for _ in range(2):
            self.step(self.twin)
            self.step(self.other)
        self.before = self.of(self.twin)

    def step(self, twin: Twin) -> None:
        def evaluate(index: int) -> Tensor:
            loss = twin.evaluate(index)
            if self.joins and index == 0:
                twin.params[1].grad = None
            return loss

        drive(twin.optimizer, twin.form, evaluate, twin.optimizer.k)
        twin.steps += 1

    def of(self, twin: Twin) -> Any:
        return copy.deepcopy([[p.detach() for p in twin.params], twin.optimizer.state_dict()["state"]])

    def check(self, exactly: bool) -> None:
        """``exactly``: to the last bit; else to the rounding of the lowest dtype, for another backend has come in."""
        found, expected = self.of(self.twin), self.of(self.other)
        if exactly:
            assert_same_state(found, expected)
            return
        states = [[e for entry in state.values() for e in map(torch.as_tensor, entry.values())]
                  for _, state in (found, expected)]  # fmt: skip
        eps = max(torch.finfo(p.dtype).eps for p in expected[0])
        for a, b in zip([*found[0], *states[0]], [*expected[0], *states[1]], strict=True):
            assert_close("weights and state", a, b, 16 * eps)

    def settled(self, exactly: bool = True) -> bool:
        """Whether the step has happened: it has not, or as if undisturbed, and the next one goes on from there."""
        assert self.twin.optimizer.evaluation is None
        undone = True
        try:
            assert_same_state(self.of(self.twin), self.before)
        except AssertionError:
            undone = False
            self.twin.steps += 1
            self.step(self.other)
            self.check(exactly)
        self.twin.optimizer.zero_grad()
        self.step(self.twin)
        self.step(self.other)
        self.check(exactly)
        return not undone


@pytest.mark.sample(24)
@pytest.mark.parametrize(
    ("error", "done", "times"),
    [(RuntimeError, False, 1), (MemoryError, True, 2), (KeyboardInterrupt, False, 2), (KeyboardInterrupt, True, 1)],
)
@pytest.mark.parametrize(("options", "ops"), PROGRAMS, ids=str)
@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", [base for base in BASES if base != "AdamW"])
def test_a_last_pass_that_fails_once(
    backend: str, base: str, form: str, apart: str, options: dict[str, Any], ops: Collection[str],
    error: type[BaseException], done: bool, times: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Or twice in a row: the step is completed, to the last bit."""
    own, victim = APART[apart]
    failing = Failing(monkeypatch, [backend], error)
    case = Case(backend, base, form, **own, **options)
    failing.victim, failing.left, failing.done, failing.ops = case.twin.params[victim], times, done, ops
    with pytest.raises(error):
        case.step(case.twin)
    assert failing.raised == (1 if done and options["k"] == 1 else times)  # in place, it is not run twice
    failing.left = 0
    assert case.settled()


@pytest.mark.sample(24)
@pytest.mark.parametrize("where", ["backend", "everywhere"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("options", "ops"), PROGRAMS, ids=str)
@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", [base for base in BASES if base != "AdamW"])
def test_a_last_pass_that_always_fails(
    backend: str, base: str, form: str, apart: str, options: dict[str, Any], ops: Collection[str],
    error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The reference backend takes its place. Where that fails too, the step is undone as long as no state has been
    written; else it stays open, and is completed when the cause has gone.
    """
    if where == "backend" and backend == "reference":
        pytest.skip("nothing takes its place")
    own, victim = APART[apart]
    failing = Failing(monkeypatch, {backend, "reference"} if where == "everywhere" else {backend}, error)
    case = Case(backend, base, form, **own, **options)
    failing.victim, failing.left, failing.ops = case.twin.params[victim], 10**9, ops
    with pytest.raises(error):
        case.step(case.twin)
    failing.left, optimizer = 0, case.twin.optimizer
    if where == "backend" and issubclass(error, Exception):
        assert case.settled(exactly=False)
        return
    others_wrote = ops == LAST or apart.startswith("last")
    stays = error is KeyboardInterrupt or (others_wrote and base in ("momentum", "Adam", "AdamW"))
    assert (optimizer.evaluation is not None) == stays
    if stays:
        for refused in (optimizer.state_dict, lambda: case.step(case.twin)):
            with pytest.raises(RuntimeError, match="open step|no step is open|is running"):
                refused()
        optimizer.abort_step()
    assert case.settled() == stays
