"""Random walks over the interface, beside the literal transcription of Algorithm 1 over a base that torch alone runs.

A walk is what one seed makes: a base, settings, tensors, then steps in every form with changes in between: groups added
and removed, parameters frozen, thawed and moved, gradients missing, settings and state changed, round trips, copies,
autocast, exceptions and interrupts at any evaluation, gradients of somebody else's. After every step weights and state
are compared (``tests.twin``): to 1e-10 in float64; in other dtypes the error to float64 is at most twice that of the
reference backend, on the same walk. `make fuzz` runs ten thousand seeds::

    python -m tests.fuzz --seeds 10000 --first 0 --processes 2
    python -m tests.fuzz --seeds 1 --first 4711 --verbose     # what it does, step by step
"""

import argparse
import copy
import io
import multiprocessing
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import assert_same_state, drive
from tests.twin import BASES, Twin, values

SHAPES = [(5,), (2, 3), (), (0,), (1, 1), (33,), (2, 3, 4, 5), (7, 1)]
WHOLE = 1e-10  # of float64
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the largest weight
LOW = (*FLOOR,)


def silent(*_: Any) -> None:
    """Say nothing."""


class Interrupted(BaseException):
    """As a signal's handler raises it."""


class Walk(Twin):
    """One walk; what it does depends on the seed alone, and not on backend or dtype.

    Args:
        seed: of everything.
        backend: of our optimizer; None: one that the seed chooses, and that may change on the way.
        dtype: of our parameters; those of the other side are float64. None: what the seed chooses.
        say: is told what is done.
    """

    def __init__(
        self, seed: int, backend: str | None = None, dtype: torch.dtype | None = None, say: Callable[..., Any] = silent
    ) -> None:
        self.random, self.say = random.Random(seed), say
        pick = self.random.choice
        chosen = pick([torch.float64] * 8 + [*LOW])
        self.dtype = dtype or chosen
        smooth = ["SGD", "momentum"]  # a sign decides an update of the others, and rounding a sign
        self.base = pick([*BASES] if chosen == torch.float64 else smooth)
        drawn = pick(["native", "reference"])
        self.changes_backend, self.worst = backend is None, 0.0
        options = {
            "k": self.random.randint(1, 4),
            "alpha": pick([0.4, 1.0, "adaptive"]) if chosen == torch.float64 else pick([0.4, 1.0]),
            "alpha_scope": pick(["global", "tensor"]),
            "rho": pick([0.0, 0.05, 0.2]),
            "adaptive": pick([False, False, True]),
            "eta": pick([0.01, 0.2]),
            "max_grad_norm": pick([None, None, 1.5]),
        }
        self.say(seed, self.base, self.dtype, backend or drawn, options)
        shapes = [self.random.choice(SHAPES) for _ in range(self.random.randint(2, 6))]
        cut = self.random.randint(1, len(shapes) - 1)
        super().__init__(
            backend or drawn,
            self.base,
            groups=lambda params: [{"params": list(params[:cut])}, {"params": list(params[cut:])}],
            shapes=[(4,), *shapes],
            form="step",
            **options,
        )

    # ---- both sides ----

    def grow(self, *shape: int) -> int:
        """A new tensor, ours in the walk's dtype; one of four dimensions may lie channels last."""
        number = len(self.params)
        start = values(*shape, seed=number).to(self.dtype)
        last = {"memory_format": torch.channels_last} if len(shape) == 4 and self.random.random() < 0.5 else {}
        self.params.append(nn.Parameter(start.clone(**last)))
        self.theirs.append(nn.Parameter(start.double().clone()))
        return number

    def check(self) -> None:
        """Weights; in float64 the base's state too."""
        largest = max((float(q.detach().abs().max()) for q in self.theirs if q.numel()), default=1.0)
        for number, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            error = float((p.detach().double() - q.detach()).abs().max()) / max(largest, 1e-3) if p.numel() else 0.0
            assert error == error, f"step {self.steps}: weights of tensor {number}: not a number"
            self.worst = max(self.worst, error)
            assert self.dtype != torch.float64 or error <= WHOLE, f"step {self.steps}: tensor {number}: {error:.1e}"
        if self.dtype == torch.float64:
            for number, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
                found, expected = self.optimizer.state.get(p) or {}, self.other.state.get(q) or {}
                expected = {key: value for key, value in expected.items() if value is not None}
                assert set(found) == set(expected), f"step {self.steps}: state of tensor {number}"
                for key, value in expected.items():
                    a, b = torch.as_tensor(found[key]).double(), torch.as_tensor(value).double()
                    error = float((a - b).abs().max()) if a.numel() else 0.0
                    bound = WHOLE * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
                    assert error <= bound, f"step {self.steps}: {key} of tensor {number}: {error:.1e}"

    def trains(self) -> list[int]:
        """The tensors that the next step moves."""
        grouped = {id(q) for group in self.other.param_groups for q in group["params"]}
        return [n for n, q in enumerate(self.theirs) if q.requires_grad and id(q) in grouped]

    def ours(self) -> Any:
        """Weights and state of ours, to see whether something has moved."""
        state = self.optimizer.state_dict()
        return copy.deepcopy([[p.detach() for p in self.params], state["state"], state["param_groups"]])

    # ---- a step ----

    def one_step(self) -> None:
        """In some form, with some gradients missing, autocast here or there, perhaps after one that fails."""
        self.form = self.random.choice(["step", "evaluations", "pairs"])
        trained = self.trains()
        for number in trained[1:]:  # one has a gradient at every evaluation
            if self.random.random() < 0.1:
                self.missing.add((self.steps, number))
        self.around = self.random.choice([None, None, "step", "closure"])
        toggled = [n for n in trained[1:] if self.random.random() < 0.1] if self.form != "pairs" else []
        if self.random.random() < 0.25:
            self.failed_step()
        if self.random.random() < 0.1:
            self.refused_step()
        self.say("step", self.form, "around", self.around, "missing", self.missing, "toggled", toggled)
        for number in toggled:
            self.params[number].requires_grad_(False)
        self.toggled = toggled
        with self.casts("step"):
            drive(self.optimizer, self.form, self.evaluate, self.optimizer.k)
        for number in toggled:
            self.params[number].requires_grad_(True)
        self.toggled = []
        self.paper()
        self.steps += 1
        self.check()

    toggled: Sequence[int] = ()
    around: str | None = None

    def casts(self, where: str) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.around == where else nullcontext()

    def evaluate(self, index: int) -> Tensor:
        """Gradients by formula; tensors that are toggled require theirs here alone."""
        with self.casts("closure"):
            for number in self.toggled:
                self.params[number].requires_grad_(True)
            result = super().evaluate(index)
            for number in self.toggled:
                self.params[number].requires_grad_(False)
            return result

    def failed_step(self) -> None:
        """An exception or an interrupt at an evaluation, or the caller leaves: nothing has happened."""
        k = self.optimizer.k
        at, error = (
            self.random.randint(0, k if self.form != "pairs" else 2 * k - 1),
            self.random.choice([ValueError, Interrupted]),
        )
        self.say("fails at", at, "by", error.__name__, "in", self.form)
        before = self.ours()

        def fails(index: int) -> Tensor:
            if index == at:
                if self.random.random() < 0.5:
                    self.evaluate(index)
                raise error
            return self.evaluate(index)

        try:
            drive(self.optimizer, self.form, fails, k)
        except (ValueError, Interrupted):
            self.optimizer.abort_step()
        else:
            raise AssertionError("a step went on after an exception")
        self.assert_same(before)
        self.optimizer.zero_grad()

    def refused_step(self) -> None:
        """Gradients that are there already, which no evaluation clears: refused, and nothing has happened."""
        full = [n for n in self.trains() if self.params[n].numel()]
        if self.form == "pairs" or not full:
            return
        self.say("refused")
        self.optimizer.zero_grad()
        p = self.params[full[0]]
        p.grad = torch.ones_like(p)
        before = self.ours()

        def adds(index: int) -> Tensor:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1
            return torch.zeros(())

        with pytest.raises(RuntimeError, match="zero_grad"):
            drive(self.optimizer, self.form, adds, self.optimizer.k)
        self.assert_same(before)
        self.optimizer.zero_grad()

    def assert_same(self, before: Any) -> None:
        """Weights and state are what they were, to the last bit."""
        assert_same_state(self.ours(), before)

    # ---- what happens between two steps ----

    def add_group(self) -> None:
        number = self.grow(*self.random.choice(SHAPES))
        own = {"rho": self.random.choice([0.0, 0.1])} if self.random.random() < 0.5 else {}
        lr = self.random.choice([0.01, 0.05])
        for optimizer, params in self.sides():
            optimizer.add_param_group({"params": [params[number]], "lr": lr, **own})

    def remove_group(self) -> None:
        if self.base == "Lister" or len(self.other.param_groups) < 2:
            return
        index = self.random.randrange(len(self.other.param_groups))
        others = [q for n, group in enumerate(self.other.param_groups) if n != index for q in group["params"]]
        if sum(q.requires_grad and q.numel() > 0 for q in others):
            for optimizer, _ in self.sides():
                for p in optimizer.param_groups.pop(index)["params"]:
                    optimizer.state.pop(p, None)  # without which torch can save no state of it any more

    def freeze_or_thaw(self) -> None:
        for number in range(len(self.params)):
            on = self.theirs[number].requires_grad
            if (not on and self.random.random() < 0.5) or (
                on and self.random.random() < 0.3 and len(self.trains()) > 1
            ):
                for _, params in self.sides():
                    params[number].requires_grad_(not on)
                    params[number].grad = None

    def change_numbers(self) -> None:
        index = self.random.randrange(len(self.other.param_groups))
        changes = {"lr": self.random.choice([0.01, 0.05, 0.1]), "rho": self.random.choice([0.0, 0.03, 0.15])}
        if "weight_decay" in self.other.param_groups[0]:
            changes["weight_decay"] = self.random.choice([0.0, 0.05])
        for optimizer, _ in self.sides():
            optimizer.param_groups[index].update(changes)

    def change_scaling(self) -> None:
        index, on = self.random.randrange(len(self.other.param_groups)), self.random.random() < 0.5
        for optimizer, _ in self.sides():
            optimizer.param_groups[index]["adaptive"] = on

    def change_settings(self) -> None:
        self.optimizer.k = self.random.randint(1, 4)
        if self.optimizer.alpha != "adaptive":
            self.optimizer.alpha = self.random.choice([0.3, 0.7, 1.0])

    def round_trip(self) -> None:
        if self.base == "Lister":  # torch gives an optimizer that loads other groups than those that it keeps
            return
        saved = io.BytesIO()
        torch.save(self.optimizer.state_dict(), saved)
        self.optimizer.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=False))

    def copied(self) -> None:
        if self.base != "Lister":  # torch copies of an optimizer what it knows of
            self.optimizer, self.params = copy.deepcopy((self.optimizer, self.params))
            for p in self.params:
                p.grad = None

    def clear_state(self) -> None:
        number = self.random.randrange(len(self.params) + 1)
        for optimizer, params in self.sides():
            if number == len(params):
                optimizer.state.clear()
            elif params[number] in optimizer.state:
                del optimizer.state[params[number]]

    def other_backend(self) -> None:
        if self.changes_backend:
            self.optimizer.backend = self.random.choice(["native", "reference", "auto"])

    def move(self) -> None:
        """A parameter gets other memory, with the same values."""
        p = self.params[self.random.randrange(len(self.params))]
        p.data = p.data.clone()

    def other_format(self) -> None:
        """Channels last, or not."""
        for p in self.params:
            if p.dim() == 4:
                formats = [torch.contiguous_format, torch.channels_last]
                p.data = p.data.contiguous(memory_format=self.random.choice(formats))

    def write_weights(self) -> None:
        number = self.random.randrange(len(self.params))
        for _, params in self.sides():
            with torch.no_grad():
                params[number].mul_(0.5)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.random.random() < 0.5)

    CHANGES = (
        add_group, remove_group, freeze_or_thaw, change_numbers, change_scaling, change_settings, round_trip, copied,
        clear_state, other_backend, move, other_format, write_weights, clear_gradients,
    )  # fmt: skip

    def run(self, steps: int) -> "Walk":
        """So many steps, each after none to three changes."""
        for _ in range(steps):
            for _ in range(self.random.randint(0, 3)):
                change = self.random.choice(self.CHANGES)
                self.say(change.__name__)
                change(self)
            self.one_step()
        return self


def walk(seed: int, say: Callable[..., Any] = silent) -> None:
    """Walk a seed.

    Raises:
        AssertionError: there is a difference.
    """
    first = Walk(seed, say=say)
    steps = 4 + seed % 9
    if first.dtype == torch.float64:
        first.run(steps)
        return
    found, expected = (Walk(seed, backend, first.dtype, say).run(steps) for backend in ("native", "reference"))
    bound = 2 * expected.worst + FLOOR[first.dtype]
    assert found.worst <= bound, f"{first.dtype}: error {found.worst:.1e}, the reference's {expected.worst:.1e}"


def attempt(seed: int) -> tuple[int, str]:
    """The seed, and what went wrong."""
    try:
        walk(seed)
    except BaseException:
        return seed, traceback.format_exc()
    return seed, ""


def main() -> int:
    """1 if a seed fails, each of which is printed."""
    parser = argparse.ArgumentParser(description="Random walks over the interface, beside Algorithm 1.")
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="how many (default: 10000)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--verbose", action="store_true", help="say what is done; in one process")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    if chosen.verbose:
        for seed in seeds:
            walk(seed, partial(print, flush=True))
        return 0
    failed = []
    with multiprocessing.get_context("spawn").Pool(chosen.processes, torch.set_num_threads, (1,)) as pool:
        for number, (seed, wrong) in enumerate(pool.imap_unordered(attempt, seeds, chunksize=20), 1):
            if wrong:
                failed.append(seed)
                print(f"seed {seed}\n{wrong}", flush=True)
            if number % 1000 == 0:
                print(f"{number} seeds, {len(failed)} failed", flush=True)
    print(f"{len(seeds)} seeds, {len(failed)} failed: {failed}" if failed else f"{len(seeds)} seeds, none failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
