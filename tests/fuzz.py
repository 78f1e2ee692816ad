"""Random walks over the interface, beside the literal transcription of Algorithm 1 over a base that torch alone runs.

A walk is what one seed makes: a base, settings, tensors, then steps in every form with changes in between: groups added
and removed, parameters frozen, thawed and moved, given other dtypes and layouts, gradients missing, settings and state
changed, round trips, copies, autocast, exceptions and interrupts at any evaluation, gradients that are not finite or
somebody else's. After every step weights and state are compared (``tests.twin``), and a buffer that every evaluation
changes: to 1e-10 as long as all is float64; from then on the error to float64 is at most twice that of the reference
backend, on the same walk. `make fuzz` runs ten thousand seeds::

    python -m tests.fuzz --seeds 10000 --first 0 --processes 2
    python -m tests.fuzz --seeds 1 --first 4711 --verbose     # what it does, step by step
"""

import argparse
import copy
import io
import math
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

from lookbehind_fused.tensors import compute_dtype
from tests.compare import dense
from tests.conftest import assert_same_state, drive
from tests.twin import BASES, Twin, values

SHAPES = [(5,), (2, 3), (), (0,), (1, 1), (33,), (2, 3, 4, 5), (7, 1)]
WHOLE = 1e-10  # of float64
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the largest weight
LOW = (*FLOOR,)
EXAMPLES = 8  # of a minibatch
SMOOTH = ["SGD", "momentum"]  # a sign decides an update of the other bases, and rounding a sign


def silent(*_: Any) -> None:
    """Say nothing."""


class Interrupted(BaseException):
    """As a signal's handler raises it."""


class Running(nn.Module):
    """What a forward pass leaves in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: float) -> None:
        self.mean.mul_(0.5).add_(x)


class Walk(Twin):
    """One walk; what it does depends on the seed alone, and not on the backend. All on the other side is float64.

    Args:
        seed: of everything.
        backend: of our optimizer; None: one that the seed chooses, and that may change on the way.
        say: is told what is done.

    Attributes:
        exact: whether all is float64 on our side too, from the first step to the last.
        dtype: of parameters that are added. seen: the dtypes that there have been.
        worst: by the largest floor of these, the largest error.
    """

    def __init__(self, seed: int, backend: str | None = None, say: Callable[..., Any] = silent) -> None:
        self.random, self.say = random.Random(seed), say
        pick = self.random.choice
        self.dtype, self.changes_dtype = pick([torch.float64] * 8 + [*LOW]), pick([False] * 5 + [True])
        self.seen, self.worst = {self.dtype}, dict[float, float]()
        self.exact = self.dtype == torch.float64 and not self.changes_dtype
        self.base = pick([*BASES] if self.exact else SMOOTH)
        drawn = pick(["native", "reference"])
        self.changes_backend = backend is None
        self.running, self.their_running = Running(), Running()
        options = {
            "k": self.random.randint(1, 4),
            "alpha": pick([0.4, 1.0, "adaptive"]) if self.exact else pick([0.4, 1.0]),
            "alpha_scope": pick(["global", "tensor"]),
            "rho": pick([0.0, 0.05, 0.2]),
            "adaptive": pick([False, False, True]),
            "eta": pick([0.01, 0.2]),
            "max_grad_norm": pick([None, None, 1.5]),
            "nonfinite": pick(["propagate", "skip"]),
            "buffers_at_slow": pick([None, self.running]),
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
        """Weights, the buffer, and which state there is; in float64 the state's values too."""
        largest = max((float(q.detach().abs().max()) for q in self.theirs if q.numel()), default=1.0)
        floor = max(FLOOR.get(dtype, 0.0) for dtype in self.seen)
        for number, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            error = float((p.detach().double() - q.detach()).abs().max()) / max(largest, 1e-3) if p.numel() else 0.0
            assert error == error, f"step {self.steps}: weights of tensor {number}: not a number"
            self.worst[floor] = max(self.worst.get(floor, 0.0), error)
            assert floor or error <= WHOLE, f"step {self.steps}: tensor {number}: {error:.1e}"
        assert torch.equal(self.running.mean, self.their_running.mean), f"step {self.steps}: buffer"
        for number, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            found, expected = self.optimizer.state.get(p) or {}, self.other.state.get(q) or {}
            expected = {key: value for key, value in expected.items() if value is not None}
            assert set(found) == set(expected), f"step {self.steps}: state of tensor {number}"
            for key, value in expected.items() if not floor else ():
                a, b = torch.as_tensor(found[key]).double(), torch.as_tensor(value).double()
                error = float((a - b).abs().max()) if a.numel() else 0.0
                bound = WHOLE * max(1.0, float(b.abs().max()) if b.numel() else 1.0)
                assert error <= bound, f"step {self.steps}: {key} of tensor {number}: {error:.1e}"

    def trains(self) -> list[int]:
        """The tensors that the next step moves."""
        grouped = {id(q) for group in self.other.param_groups for q in group["params"]}
        return [n for n, q in enumerate(self.theirs) if q.requires_grad and id(q) in grouped]

    def ours(self) -> Any:
        """Weights, buffer and state of ours, to see whether something has moved. State follows its tensor into another
        dtype when the next step is prepared, whatever becomes of that.
        """
        dtypes, state = [compute_dtype(p.dtype) for p in self.params], self.optimizer.state
        entries = [
            {key: torch.as_tensor(value).to(dtype) for key, value in (state.get(p) or {}).items()}
            for p, dtype in zip(self.params, dtypes, strict=True)
        ]
        groups = self.optimizer.state_dict()["param_groups"]
        return copy.deepcopy([[p.detach() for p in self.params], self.running.mean, entries, groups])

    # ---- a step ----

    def one_step(self) -> None:
        """In some form, with some gradients missing, autocast here or there, perhaps after one that does not happen."""
        self.form = self.random.choice(["step", "evaluations", "pairs"])
        if self.form == "pairs" and self.fraction < 1:
            self.refused_pair()
            self.form = "step"
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
        if self.random.random() < 0.2:
            self.skipped_step()
        self.say("step", self.form, "around", self.around, "missing", self.missing, "toggled", toggled)
        for number in toggled:
            self.params[number].requires_grad_(False)
        self.toggled = toggled
        with self.casts("step"):
            drive(self.optimizer, self.form, self.evaluate, self.optimizer.k)
        for number in toggled:
            self.params[number].requires_grad_(True)
        self.toggled = []
        assert not self.optimizer.diagnostics["skipped"]
        self.paper()
        for index in range(self.optimizer.k + 1 if self.form != "pairs" else 0):
            if index == 0 or self.optimizer.buffers_at_slow is None:
                self.their_running(self.steps + 0.25 * index)
        self.steps += 1
        self.check()

    toggled: Sequence[int] = ()
    fraction = 1.0
    examples: int | None = None  # that an evaluation of ours sees
    around: str | None = None

    def casts(self, where: str) -> Any:
        return torch.autocast("cpu", torch.bfloat16) if self.around == where else nullcontext()

    def evaluate(self, index: int) -> Tensor:
        """Gradients by formula; tensors that are toggled require theirs here alone. In pairs the first forward pass
        comes before the step, and would have to be counted whatever becomes of it.
        """
        if self.form != "pairs":
            self.running(self.steps + 0.25 * index)
        with self.casts("closure"):
            for number in self.toggled:
                self.params[number].requires_grad_(True)
            evaluation = self.optimizer.evaluation
            self.examples = EXAMPLES if evaluation is None else len(evaluation.part(torch.arange(EXAMPLES)))
            result = super().evaluate(index)
            self.examples = None
            for number in self.toggled:
                self.params[number].requires_grad_(False)
            return result

    def gradient(self, number: int, w: Tensor, index: int) -> Tensor | None:
        """Another one where an evaluation has fewer examples; theirs has them at its first one."""
        g = super().gradient(number, w, index)
        there = round(self.fraction * EXAMPLES) if index == 0 and self.examples is None else EXAMPLES
        there = there if self.examples is None else self.examples
        return None if g is None else g + 0.1 * (EXAMPLES - there) * values(*w.shape, seed=200 + number).to(w.dtype)

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

    def refused_pair(self) -> None:
        """Of gradients that are there nobody knows whether they are of a part: nothing has happened."""
        self.optimizer.zero_grad()
        self.evaluate(0)
        before = self.ours()
        with pytest.raises(RuntimeError, match="ascent_fraction=1.0"):
            self.optimizer.ascent_step()
        self.assert_same(before)
        self.optimizer.zero_grad()

    def skipped_step(self) -> None:
        """A gradient is not finite at some evaluation: nothing has happened."""
        there = [n for n in self.trains() if self.params[n].numel() and (self.steps, n) not in self.missing]
        if self.options["nonfinite"] != "skip" or not there:
            return
        k = self.optimizer.k
        at = self.random.randint(0, k if self.form != "pairs" else 2 * k - 1)
        number, value = self.random.choice(there), self.random.choice([math.inf, -math.inf, math.nan])
        self.say("skipped at", at, "for", value, "in tensor", number, "in", self.form)
        before = self.ours()

        def breaks(index: int) -> Tensor:
            loss, p = self.evaluate(index), self.params[number]
            if index == at:
                p.grad[(-1,) * p.dim()] = value
            return loss

        with self.casts("step"):
            drive(self.optimizer, self.form, breaks, k)
        assert self.optimizer.diagnostics["skipped"]
        assert all(self.params[n].grad is None for n in self.trains())
        self.assert_same(before)

    def assert_same(self, before: Any) -> None:
        """All is what it was, to the last bit; buffers only where somebody puts them back."""
        if self.optimizer.buffers_at_slow is None:
            self.running.mean.copy_(before[1])
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

    def change_fraction(self) -> None:
        self.fraction = self.optimizer.ascent_fraction = self.random.choice([0.25, 0.5, 1.0])

    def round_trip(self) -> None:
        if self.base == "Lister":  # torch gives an optimizer that loads other groups than those that it keeps
            return
        saved = io.BytesIO()
        torch.save(self.optimizer.state_dict(), saved)
        self.optimizer.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=False))

    def copied(self) -> None:
        if self.base != "Lister":  # torch copies of an optimizer what it knows of
            self.optimizer, self.params, self.running = copy.deepcopy((self.optimizer, self.params, self.running))
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
        """Dimensions in another order in memory: somewhere in a larger one, or where the tensor is."""
        for p in self.params:
            other = dense(p.data, tuple(self.random.sample(range(p.dim()), p.dim())), self.random.randint(0, 3))
            where = self.random.choice(["stays", "elsewhere", "here"])
            if where == "elsewhere":
                p.data = other
            elif where == "here":
                p.data = p.data.as_strided(p.shape, other.stride()).copy_(other)

    def other_dtype(self) -> None:
        """Of all tensors, or of some, as a model does it. The other side goes on from the same weights, so that no more
        is compared than what the steps do from there.
        """
        if not self.changes_dtype:
            return
        dtype, some = self.random.choice([torch.float64, *LOW]), self.random.random() < 0.3
        chosen = [n for n in range(len(self.params)) if not some or self.random.random() < 0.5]
        self.say(dtype, chosen)
        nn.ParameterList(self.params[n] for n in chosen).to(dtype)
        if not some:
            self.dtype = dtype
        self.seen.add(dtype)
        with torch.no_grad():
            for p, q in zip(self.params, self.theirs, strict=True):
                q.copy_(p)

    def write_weights(self) -> None:
        number = self.random.randrange(len(self.params))
        for _, params in self.sides():
            with torch.no_grad():
                params[number].mul_(0.5)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.random.random() < 0.5)

    CHANGES = (
        add_group, remove_group, freeze_or_thaw, change_numbers, change_scaling, change_settings, change_fraction,
        round_trip, copied, clear_state, other_backend, move, other_format, other_dtype, write_weights, clear_gradients,
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
    if first.exact:
        first.run(steps)
        return
    found, expected = (Walk(seed, backend, say).run(steps) for backend in ("native", "reference"))
    for floor, error in found.worst.items():
        bound = 2 * expected.worst[floor] + floor
        assert floor == 0 or error <= bound, f"{found.seen}: error {error:.1e}, the bound is {bound:.1e}"


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
