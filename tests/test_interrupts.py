"""An interrupt at any moment of a step: it has not happened or it has, and what follows is what follows from there.

KeyboardInterrupt is raised at opcodes of the package's own code, and of the base optimizer's, that are drawn anew in
every run; a failure names the seed. LOOKBEHIND_TEST_SEED draws the same again, LOOKBEHIND_TEST_INTERRUPTS says how many
moments of each configuration are drawn, or "all". Real signals come at random times in a process of their own.
"""

import copy
import dis
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lookbehind_fused
from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM
from tests.twin import Lister, values

SEED = os.environ.get("LOOKBEHIND_TEST_SEED") or str(random.SystemRandom().randrange(10**6))
COUNT = os.environ.get("LOOKBEHIND_TEST_INTERRUPTS", "12")
HERE = Path(__file__).resolve().parent
TRACED = tuple(map(str, (Path(lookbehind_fused.__file__).parent, Path(torch.optim.__file__).parent, HERE / "twin.py")))
WARM = 2

SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02})
ADAM = (torch.optim.Adam, {"lr": 0.02, "amsgrad": True})
RMSPROP = (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5})
ADAGRAD = (torch.optim.Adagrad, {"lr": 0.02})
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SEVERAL = (F32, F64)
# Beside options of the optimizer: method, base, dtypes, form; lookahead: another one around it, whose round is of two
# steps; stats: BatchNorm's statistics are those at the slow weights.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "k1": {"k": 1},
    "k1-adam-several": {"k": 1, "base": ADAM, "dtypes": SEVERAL},
    "k2": {},
    "k2-adaptive": {"alpha": "adaptive"},
    "k2-several": {"dtypes": SEVERAL, "alpha": "adaptive", "alpha_scope": "tensor"},
    "k2-bfloat16": {"dtypes": (BF16,)},
    "k2-not-reused": {"reuse_gradient": False, "base": ADAM},
    "k2-clips-skips": {"max_grad_norm": 0.5, "nonfinite": "skip", "dtypes": SEVERAL},
    "k3-adam": {"k": 3, "base": ADAM, "alpha": "adaptive"},
    "k3-several": {"k": 3, "dtypes": (F32, F64, BF16)},
    "own-k1": {"k": 1, "base": RMSPROP},
    "own-k2-several": {"base": RMSPROP, "dtypes": SEVERAL},
    "own-k3-adaptive": {"k": 3, "base": ADAGRAD, "alpha": "adaptive"},
    "own-bfloat16": {"base": RMSPROP, "dtypes": (BF16, F32)},
    "own-lists": {"base": (Lister, {})},
    "means": {"microbatches": 2},
    "means-own-several": {"microbatches": 2, "base": RMSPROP, "dtypes": SEVERAL},
    "previous": {"ascent_gradient": "previous"},
    "previous-k1-several": {"ascent_gradient": "previous", "k": 1, "base": ADAM, "dtypes": SEVERAL},
    "multistep": {"method": MultistepSAM, "k": 3},
    "multistep-mean": {"method": MultistepSAM, "average": True, "dtypes": SEVERAL},
    "evaluations": {"form": "evaluations", "dtypes": SEVERAL},
    "evaluations-own": {"form": "evaluations", "base": ADAGRAD},
    "pairs": {"form": "pairs"},
    "pairs-adam-several": {"form": "pairs", "base": ADAM, "dtypes": SEVERAL, "alpha": "adaptive"},
    "pairs-own": {"form": "pairs", "base": RMSPROP},
    "pairs-sam": {"form": "pairs", "method": SAM},
    "lookahead": {"lookahead": True},
    "lookahead-k1-adam-several": {"lookahead": True, "k": 1, "base": ADAM, "dtypes": SEVERAL},
    "lookahead-own": {"lookahead": True, "base": RMSPROP},
    "lookahead-pairs": {"lookahead": True, "form": "pairs", "dtypes": SEVERAL},
    "lookahead-bfloat16": {"lookahead": True, "k": 1, "dtypes": (BF16,)},
    "stats": {"stats": True},
    "stats-k1-lookahead": {"stats": True, "k": 1, "lookahead": True, "dtypes": SEVERAL},
    "stats-pairs": {"stats": True, "form": "pairs"},
}  # fmt: skip


class Subject:
    """An optimizer on a few tensors. Its gradients depend on the weights, the step and the evaluation alone."""

    def __init__(self, backend: str, name: str) -> None:
        options = {"method": Lookbehind, "base": SGD, "dtypes": (F32,), "form": "step", "rho": 0.1}
        options |= CONFIGURATIONS[name]
        method, (base, settings), dtypes = (options.pop(key) for key in ("method", "base", "dtypes"))
        self.form, lookahead, stats = options.pop("form"), options.pop("lookahead", False), options.pop("stats", False)
        shapes = list(itertools.product(dtypes, [(5,), (2, 3)]))
        self.params = [nn.Parameter(values(*s, seed=n).to(dtype, copy=True)) for n, (dtype, s) in enumerate(shapes)]
        self.norm = nn.BatchNorm1d(3) if stats else nn.Identity()
        if stats:
            options["buffers_at_slow"] = self.norm
        self.optimizer = method(None, base(self.params, **settings), backend=backend, **options)
        self.at_call: list[Tensor] = []
        self.outer: Any = Lookahead(self.optimizer, k=2, backend=backend) if lookahead else self.optimizer

    @torch.no_grad()
    def evaluate(self, t: int, index: int) -> Tensor:
        """Gradients of evaluation ``index`` of step ``t``, and what a forward pass does to BatchNorm's statistics."""
        self.norm(values(4, 3, seed=1000 + 10 * t + index, dtype=F32))
        for n, p in enumerate(self.params):
            p.grad = 0.2 * p + values(*p.shape, seed=100 * (t % 7) + 10 * index + n).to(p.dtype)
        return torch.zeros(())

    def step(self, t: int, evaluated: Callable[[], None] = lambda: None) -> None:
        """Step ``t``; ``evaluated`` is called at the end of each evaluation."""
        index = itertools.count()

        def evaluate(*_: Any) -> Tensor:
            loss = self.evaluate(t, next(index))
            evaluated()
            return loss

        if self.form == "step":
            self.outer.step(evaluate)
        elif self.form == "evaluations":
            for _ in self.outer.evaluations():
                evaluate()
        else:
            self.at_call = []
            for i in range(self.optimizer.k):
                evaluate()
                if i == 0:  # the optimizer does not know of a step yet
                    self.at_call = [b.clone() for b in self.norm.buffers()]
                self.outer.ascent_step()
                evaluate()
                self.outer.descent_step()

    def snapshot(self) -> dict[str, Any]:
        """Everything that a step may change. Empty entries of state are what torch makes of a look at them."""
        saved = copy.deepcopy(self.outer.state_dict())
        saved["state"] = {number: entry for number, entry in saved["state"].items() if entry}
        weights = [p.detach().clone() for p in self.params]
        return {"weights": weights, "buffers": [b.clone() for b in self.norm.buffers()], **saved}


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two nested containers of tensors differ in a bit, a key or a type."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            yield path
    elif isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        for key in expected:
            yield from differences(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(expected):
        for n, (f, e) in enumerate(zip(found, expected, strict=True)):
            yield from differences(f, e, f"{path}[{n}]")
    elif isinstance(expected, (Tensor, dict, list, tuple)) or found != expected:
        yield path


class Course:
    """The undisturbed course of a subject: what there is after each number of steps."""

    def __init__(self, backend: str, name: str) -> None:
        self.subject = Subject(backend, name)
        self.found = [self.subject.snapshot()]

    def after(self, steps: int) -> dict[str, Any]:
        while len(self.found) <= steps:
            self.subject.step(len(self.found) - 1)
            self.found.append(self.subject.snapshot())
        return self.found[steps]


# Opcodes that can raise. Elsewhere, as where an exception is handed on, an exception corrupts the interpreter.
CAN_RAISE = (
    "BINARY_",
    "CALL",
    "COMPARE_OP",
    "FOR_ITER",
    "LOAD_ATTR",
    "LOAD_GLOBAL",
    "LOAD_METHOD",
    "PRECALL",
    "RESUME",
)
CAN_RAISE += ("STORE_ATTR", "STORE_SUBSCR")


@cache
def moments_of(code: CodeType) -> frozenset[int]:
    """Offsets of the opcodes that can raise, and of those behind a call: there Python looks for signals."""
    found, before = set(), ""
    for offset in range(0, len(code.co_code), 2):
        name = dis.opname[code.co_code[offset]]
        if name != "CACHE":
            if name.startswith(CAN_RAISE) or before.startswith("CALL"):
                found.add(offset)
            before = name
    return frozenset(found)


@cache
def course_of(backend: str, name: str) -> Course:
    return Course(backend, name)


class Interrupt:
    """Raises KeyboardInterrupt at the ``at``-th moment, and once more ``again`` moments later."""

    def __init__(self, at: float = float("inf"), again: int = 0) -> None:
        self.at, self.again, self.count, self.where = at, again, 0, ""
        self.evaluated = 0  # the count at the end of the last evaluation

    def __enter__(self) -> "Interrupt":
        sys.settrace(self.enter)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.setprofile(None)
        sys.settrace(None)

    def note_evaluation(self) -> None:
        self.evaluated = self.count

    def enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(TRACED) or frame.f_code is values.__wrapped__.__code__:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.inside

    def inside(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and frame.f_lasti in moments_of(frame.f_code):
            self.count += 1
            if self.count == self.at:
                code = frame.f_code
                self.where += f" {Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name}, {frame.f_lasti})"
                if self.again:
                    self.at, self.again = self.count + self.again, 0
                    sys.setprofile(self.go_on)
                raise KeyboardInterrupt
        return self.inside

    def go_on(self, frame: FrameType, event: str, arg: Any) -> None:
        """Raising in a trace function ends the tracing: the next call or return takes it up again."""
        sys.setprofile(None)
        outer: FrameType | None = frame
        while outer is not None:
            if self.enter(outer, "call", None) is not None:
                outer.f_trace = self.inside
            outer = outer.f_back
        sys.settrace(self.enter)


class Run:
    """A subject that is interrupted again and again, beside its undisturbed course."""

    def __init__(self, backend: str, name: str, warm: int) -> None:
        self.what = f"LOOKBEHIND_TEST_SEED={SEED}: {backend} {name}"
        self.subject, self.course, self.t = Subject(backend, name), course_of(backend, name), 0
        self.left_open = 0
        for _ in range(warm):
            self.step()

    def step(self) -> None:
        self.subject.step(self.t)
        self.t += 1

    def interrupted(self, at: float, again: int = 0) -> None:
        """A step that is interrupted, and the next one."""
        with Interrupt(at, again) as interrupt, suppress(KeyboardInterrupt):
            self.subject.step(self.t)
        self.settled(f"{self.what}, step {self.t}, interrupted at moment {at}:{interrupt.where}", bool(interrupt.where))

    def settled(self, what: str, hit: bool = True) -> None:
        """The step has happened or it has not, and the next one goes on from there."""
        torch.set_grad_enabled(True)  # torch's own context managers do not hold through an interrupt
        try:
            self._settled(what, hit)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error

    def _settled(self, what: str, hit: bool) -> None:
        if self.subject.form == "pairs" and self.subject.optimizer.evaluation is not None:
            # as if it had come just before or just behind the call
            self.left_open += 1
            self.subject.optimizer.abort_step()
        before, after = self.course.after(self.t), self.course.after(self.t + 1)
        buffers = before["buffers"]
        found = self.subject.snapshot()
        if self.subject.form == "pairs":  # the first forward pass comes before the call that begins the step
            before = {**before, "buffers": self.subject.at_call or found["buffers"]}
        undone, done = list(differences(found, before)), list(differences(found, after))
        assert not undone or not done, f"{what}: unlike before the step: {undone}; unlike after it: {done}"
        assert hit or not done, f"{what}: not interrupted, but unlike after the step: {done}"
        self.t += not done
        for buffer, value in zip(self.subject.norm.buffers(), buffers, strict=True) if done else ():
            buffer.copy_(value)  # the step is begun again, with its first forward pass
        self.step()
        wrong = list(differences(self.subject.snapshot(), self.course.after(self.t)))
        assert not wrong, f"{what}, {'undone' if done else 'done'}: after the next step there differ {wrong}"


def moments(backend: str, name: str, warm: int, share: float, twice: bool = False) -> Iterator[tuple[int, int]]:
    """Moments at which to interrupt step ``warm``: half of them anywhere in it, half behind its last evaluation."""
    counted = Run(backend, name, warm)
    with Interrupt() as interrupt:
        counted.subject.step(warm, interrupt.note_evaluation)
    total, last = interrupt.count, interrupt.evaluated
    draw = random.Random(f"{SEED} {backend} {name} {warm} {twice}")
    if COUNT == "all":
        chosen = list(range(1, total + 1))
    else:
        half = max(1, round(int(COUNT) * share / 2))
        chosen = [draw.randint(1, total) for _ in range(half)] + [draw.randint(last + 1, total) for _ in range(half)]
    for at in chosen:
        yield at, draw.choice([draw.randint(1, 40), draw.randint(1, 400)]) if twice else 0


@pytest.mark.sample(24)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_interrupted_step_has_happened_or_not(backend: str, name: str) -> None:
    run = Run(backend, name, WARM)
    chosen = list(moments(backend, name, WARM, 1))
    for at, _ in chosen:
        run.interrupted(at)
    most = 3 + len(chosen) // 4  # of a few drawn at random, some more than their share may be
    assert run.left_open <= most, f"{run.what}: {run.left_open} of {len(chosen)} steps were left open"


@pytest.mark.sample(20)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_interrupted_first_step_has_happened_or_not(backend: str, name: str) -> None:
    for at, _ in moments(backend, name, 0, 0.4):
        Run(backend, name, 0).interrupted(at)


@pytest.mark.sample(20)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_second_interrupt_while_the_first_is_settled(backend: str, name: str) -> None:
    run = Run(backend, name, WARM)
    for at, again in moments(backend, name, WARM, 0.4, twice=True):
        run.interrupted(at, again)


# ---- real signals ----------------------------------------------------------------------------------------------------

SIGNALS = 200


def test_signals_at_random_moments() -> None:
    """SIGINT as Ctrl-C sends it, and a handler of SIGALRM that raises."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.test_interrupts"],
        cwd=HERE.parent,
        env={**os.environ, "LOOKBEHIND_TEST_SEED": SEED},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{ran.stdout[-3000:]}\n{ran.stderr[-6000:]}"
    assert f"{SIGNALS} signals" in ran.stdout


class Alarm(KeyboardInterrupt):
    """What the handler of SIGALRM raises."""


def on_alarm(number: int, frame: Any) -> None:
    raise Alarm


def interrupt_by_signal(run: Run, delay: float, alarm: bool) -> None:
    """One signal, ``delay`` seconds after the step has begun: in it, or just behind it."""
    sender = threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGINT)))
    try:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        else:
            sender.start()
        run.subject.step(run.t)
        while True:
            time.sleep(0.001)
    except KeyboardInterrupt:
        pass
    if not alarm:
        sender.join()


def signals() -> None:
    """``SIGNALS`` signals at random moments of the steps of all configurations."""
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    draw = random.Random(f"{SEED} signals")
    cases = list(itertools.product(["native", "reference"], CONFIGURATIONS))
    draw.shuffle(cases)
    each = -(-SIGNALS // len(cases))
    sent, failures = 0, []
    for backend, name in cases:
        try:
            run = Run(backend, name, WARM)
            run.course.after(WARM + 2 * each + 2)
            start = time.perf_counter()
            run.step()
            duration = time.perf_counter() - start
            for _ in range(min(each, SIGNALS - sent)):
                sent += 1
                interrupt_by_signal(run, draw.uniform(0, 1.1 * duration), alarm=draw.random() < 0.5)
                run.settled(f"{run.what}, signal {sent}")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    print(*failures, f"{sent} signals, {len(failures)} failures", sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    signals()
