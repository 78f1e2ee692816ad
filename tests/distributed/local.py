"""Local ascents under DDP: against one process with as many microbatches; what is sent, and what is waited for."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from lookbehind_fused import SAM, Lookbehind, MultistepSAM
from lookbehind_fused.parts.local_ascents import LocalAscents
from tests.conftest import BACKENDS, assert_close, assert_equal
from tests.distributed.table import BASES, METHODS, TOLERANCE, fsdp, make_model
from tests.twin import values

SGD = {"lr": 0.1, "momentum": 0.8}


class Branched(nn.Module):
    """The examples of rank 0 reach another layer than those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branches = make_model(), nn.ModuleList([nn.Linear(3, 1) for _ in range(2)])
        for number, branch in enumerate(self.branches):
            nn.init.constant_(branch.weight, 0.1 * (1 + number))
            nn.init.constant_(branch.bias, 0.3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x) + self.branches[int(x[0, 0] > 0)](x)


class Pair:
    """A model on each rank with local ascents, and the same one on one process with microbatches.

    Args:
        make: of the optimizer. microbatches: of each rank. spoil: is given the model, the number of the rank's
            microbatch and the evaluation at it, after backward.
    """

    def __init__(
        self, make: Callable[..., Any] = Lookbehind, base: str = "momentum", backend: str = "native",
        microbatches: int = 1, make_model: Callable[[], nn.Module] = make_model,
        dtype: torch.dtype = torch.float64, **settings: Any,
    ) -> None:  # fmt: skip
        base_class, of_base = BASES[base]
        self.ranks, self.rank, self.microbatches = dist.get_world_size(), dist.get_rank(), microbatches
        unused = make_model is Branched  # parameters that the last evaluation, which the module averages, may not reach
        self.model = DistributedDataParallel(make_model().to(dtype), find_unused_parameters=unused)
        self.alone = make_model().to(dtype)
        self.optimizer, self.other = (
            make(self.groups(model), base_class, backend=backend, **of_base, **settings, **own)
            for model, own in (
                (self.model, {"ascents": "local", "model": self.model, "microbatches": microbatches}),
                (self.alone, {"microbatches": microbatches * self.ranks}),
            )
        )
        self.steps, self.dtype = 0, dtype
        self.spoil: Callable[[nn.Module, int, int], None] = lambda model, part, index: None

    @staticmethod
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        params = list(model.parameters())
        return [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]

    def examples(self, part: int) -> Tensor:
        """Of part 0 to ranks * microbatches - 1; the first number has the sign of its rank."""
        x = values(4, 3, seed=100 * self.steps + part)
        return torch.cat([x[:, :1].abs() * (1 if part // self.microbatches else -1), x[:, 1:]], 1).to(self.dtype)

    def seen(self, part: int, evaluation: Any) -> Tensor:
        """What of its examples an evaluation is to see."""
        return self.examples(part)

    def evaluate(self, model: nn.Module, part: int, evaluation: Any) -> Tensor:
        x = self.seen(part, evaluation)
        loss = (model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
        loss.backward()
        of_each = getattr(self.optimizer, "k", 1) + 1  # evaluations of a microbatch, where gradients are reused
        self.spoil(model, part, evaluation.index % of_each)
        return loss.detach()

    def step(self) -> None:
        first = self.rank * self.microbatches

        def closure(*given: Any) -> Tensor:
            evaluation = self.optimizer.evaluation
            return self.evaluate(self.model, first + evaluation.microbatch, evaluation)

        self.optimizer.step(closure)

    def step_alone(self) -> None:
        self.other.step(lambda evaluation: self.evaluate(self.alone, evaluation.microbatch, evaluation))

    def both(self, steps: int = 1, tolerance: float = TOLERANCE) -> None:
        for _ in range(steps):
            self.step()
            self.step_alone()
            self.steps += 1
            self.compare(tolerance)

    def compare(self, tolerance: float = TOLERANCE) -> None:
        for (name, p), q in zip(self.model.module.named_parameters(), self.alone.parameters(), strict=True):
            assert_close(f"weights of {name} after step {self.steps}", p.detach(), q.detach(), tolerance)
            others = p.detach().clone()
            dist.broadcast(others, 0)
            assert_equal(f"weights of {name} on rank 0", p.detach(), others)
        assert self.model.require_backward_grad_sync


def weights(pair: Pair) -> list[Tensor]:
    return [p.detach().clone() for p in pair.model.parameters()]


# ---- as one process --------------------------------------------------------------------------------------------------

ROWS = {name: METHODS[name][0] for name in ("SAM", "ASAM", "k=1", "k=2", "k=3", "global", "tensor", "clipped", "2k")}
ROWS["lookahead"] = METHODS["lookahead"][0]


def as_one_process(method: str) -> None:
    """With each base, on each backend in turn; also where a rank has microbatches."""
    for number, base in enumerate(BASES):
        for microbatches in (1, 2):
            backend = BACKENDS[(number + len(method) + microbatches) % len(BACKENDS)]
            pair = Pair(ROWS[method], base, backend, microbatches)
            pair.both(5)
            last, other = pair.optimizer.diagnostics, pair.other.diagnostics
            assert_close("alpha", last["alpha"], other["alpha"], TOLERANCE)


def each_reaches_its_own(base: str) -> None:
    """A tensor that other ranks reach has a gradient of 0 here."""
    for k in (1, 2, 3):
        pair = Pair(base=base, make_model=Branched, k=k, alpha=0.4, rho=0.2, max_grad_norm=0.5)
        pair.both(4)


def multistep(average: bool) -> None:
    """Against a loop over ranks: ascents of each, one descent with the mean."""
    for k in (1, 3):
        torch.manual_seed(0)
        wrapped = DistributedDataParallel(make_model())
        alone = make_model()
        settings = {"ascents": "local", "model": wrapped, "average": average}
        optimizer = MultistepSAM(wrapped.parameters(), torch.optim.SGD, rho=0.2, k=k, **settings, **SGD)
        other = torch.optim.SGD(alone.parameters(), **SGD)
        for step in range(4):
            data = [values(4, 3, seed=10 * step + rank) for rank in range(dist.get_world_size())]

            def evaluate(model: nn.Module, x: Tensor) -> Tensor:
                loss = (model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
                loss.backward()
                return loss.detach()

            own = data[dist.get_rank()]
            optimizer.step(partial(evaluate, wrapped, own))
            params, start = list(alone.parameters()), [p.detach().clone() for p in alone.parameters()]
            means = [torch.zeros_like(p) for p in params]
            for x in data:
                for i in range(k + 1):
                    alone.zero_grad()
                    evaluate(alone, x)
                    norm = torch.cat([p.grad.flatten() for p in params]).norm()
                    for p, mean in zip(params, means, strict=True):
                        if i == k or (average and i):
                            mean += p.grad / len(data) / (k if average else 1)
                        if i < k:
                            p.data += 0.2 * p.grad / norm
                for p, w in zip(params, start, strict=True):
                    p.data.copy_(w)
            for p, mean in zip(params, means, strict=True):
                p.grad = mean
            other.step()
            for number, (p, q) in enumerate(zip(wrapped.parameters(), params, strict=True)):
                assert_close(f"k = {k}, step {step}: tensor {number}", p.detach(), q.detach(), TOLERANCE)


class OnHalves(Pair):
    """Ascents alone are on half of each rank's examples; on one process, which has microbatches, by hand."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.optimizer.ascent_fraction = 0.5

    def seen(self, part: int, evaluation: Any) -> Tensor:
        x = self.examples(part)
        if evaluation.microbatches == 1:
            return evaluation.part(x)
        return x if evaluation.perturbed else x[:2]


def on_halves() -> None:
    for k, alpha in ((1, 1.0), (2, 0.4), (3, "adaptive")):
        OnHalves(k=k, alpha=alpha, rho=0.2).both(3)


def low_precision() -> None:
    """bfloat16: ranks have the same bits, and those of one process to a unit in the last place."""
    for base in BASES:
        pair = Pair(base=base, dtype=torch.bfloat16, k=2, alpha=0.4, rho=0.2)
        pair.both(3, 2**-6)


# ---- what is sent ----------------------------------------------------------------------------------------------------


class Recorder:
    """In their order: evaluations, all-reduces, and what is waited for."""

    def __enter__(self) -> "Recorder":
        self.events: list[str] = []
        self._own = dist.all_reduce
        dist.all_reduce = self._sends
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self._own

    def _sends(self, tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        name = "mean" if tensor.numel() > 32 else "numbers"
        self.events.append(f"send {name}" + ("" if async_op else " and wait"))
        work = self._own(tensor, *args, async_op=async_op, **kwargs)
        if async_op:
            waiter = mock.Mock(wraps=work)
            waiter.wait.side_effect = lambda: (self.events.append(f"wait for {name}"), work.wait())
            return waiter
        return work


def order(k: int) -> None:
    """The gradient of evaluation 0 is never sent; of each but the last, which the module itself averages, the mean is
    sent before the next evaluation and waited for after it.
    """
    pair = Pair(k=k, rho=0.2)
    pair.both()
    with Recorder() as recorder:
        pair.spoil = lambda model, part, index: recorder.events.append(f"evaluation {index}")
        pair.step()
    expected = ["send numbers", "evaluation 0", "wait for numbers"]
    for i in range(1, k):
        expected += [f"evaluation {i}", *(["wait for mean"] if i > 1 else []), "send mean"]
    assert recorder.events == [*expected, f"evaluation {k}", *(["wait for mean"] if k > 1 else [])], recorder.events


def all_that_is_sent() -> None:
    """As the profiler counts it, with a single bucket of DDP's reducer: k gradients and a few numbers, and, where a
    step may be undone, a few more; with synced ascents k + 1 gradients.
    """

    def counted(pair: Pair) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            pair.step()
        return sum(event.name.startswith("gloo:all_reduce") for event in profiler.events())

    for k in (1, 2, 3):
        pair = Pair(k=k, rho=0.2)
        pair.both()
        assert counted(pair) == k + 1
        pair.optimizer.ascents = "synced"
        assert counted(pair) == k + 1
        pair.optimizer.nonfinite, pair.optimizer.ascents = "skip", "local"
        pair.step()
        assert counted(pair) == k + 2


def extra_memory() -> None:
    """One copy of the gradients for any k > 1, and k with microbatches."""
    for k, microbatches, copies in ((1, 1, 0), (2, 1, 1), (5, 1, 1), (1, 2, 1), (3, 2, 3)):
        pair = Pair(k=k, microbatches=microbatches)
        pair.both()
        (bucket,) = pair.optimizer._prepared.buckets
        assert sum(name in bucket.buffers for name in bucket.program.means) == copies
        assert len(bucket.program.means) == copies


def buffers_are_those_of_rank_0() -> None:
    """Of BatchNorm: broadcast before each step's first forward pass, and by the first one after it, as DDP does."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, ascents="local", model=model, **SGD)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        loss = model(values(8, 3, seed=dist.get_rank()).float()).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    mean = model.module[1].running_mean
    seen = [torch.empty_like(mean) for _ in range(dist.get_world_size())]
    dist.all_gather(seen, mean)
    assert not torch.equal(*seen)
    model.eval()
    with torch.no_grad():
        model(values(8, 3, seed=5).float())
    dist.all_gather(seen, mean)
    assert torch.equal(*seen)


# ---- steps that do not happen ----------------------------------------------------------------------------------------


def not_finite(evaluation: int, base: str) -> None:
    """On one rank, also at evaluation 0, whose gradient nobody sends."""
    for backend in BACKENDS:
        pair = Pair(base=base, backend=backend, k=2, rho=0.2, nonfinite="skip")
        pair.both()

        def spoil(model: nn.Module, part: int, index: int) -> None:
            if index == evaluation and part == 1:
                next(model.parameters()).grad[0] = torch.inf

        before, pair.spoil = weights(pair), spoil
        pair.step()
        for w, p in zip(before, pair.model.parameters(), strict=True):
            assert_equal("weights", p.detach(), w)
        assert pair.optimizer.diagnostics["skipped"].item() == 1
        pair.spoil = lambda model, part, index: None
        pair.both()


def overflow(evaluation: int) -> None:
    """A scaler's, in float16, on one rank: both undo the step and halve the scale."""
    for base in BASES:
        model = DistributedDataParallel(make_model().float())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        base_class, settings = BASES[base]
        optimizer = Lookbehind(
            model.parameters(), base_class, k=2, scaler=scaler, ascents="local", model=model, **settings
        )
        count = itertools.count()

        def closure(overflows: bool, model: nn.Module, scaler: Any, count: Iterator[int]) -> Tensor:
            with torch.autocast("cpu", torch.float16):
                loss = model(values(4, 3, seed=dist.get_rank()).float()).float().square().mean()
            scaler.scale(loss).backward()
            if overflows and next(count) == evaluation and dist.get_rank() == 1:
                next(model.parameters()).grad[0] = torch.inf
            return loss.detach()

        for overflows in (False, True):
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer, partial(closure, overflows, model, scaler, count))
            scaler.update()
            same = [torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True)]
            assert all(same) if overflows else not any(same)
            for p in model.parameters():
                others = p.detach().clone()
                dist.broadcast(others, 0)
                assert_equal("weights on rank 0", p.detach(), others)
        assert scaler.get_scale() == 32.0


class Failure(Exception):
    pass


@contextmanager
def failing(verb: str, time: int, after: bool) -> Iterator[None]:
    """On all ranks, before or after a verb of the part has been called for the given time."""
    own, count = getattr(LocalAscents, verb), itertools.count()

    def fails(self: LocalAscents, *args: Any) -> None:
        at = next(count) == time
        if at and not after:
            raise Failure
        own(self, *args)
        if at:
            raise Failure

    with mock.patch.object(LocalAscents, verb, fails):
        yield


def what_fails_is_undone(base: str) -> None:
    """In the closure, or in any verb: the step is undone or finished, and the next one is right."""
    pair = Pair(base=base, k=3, rho=0.2, alpha=0.4)
    pair.both()

    def fails(model: nn.Module, part: int, index: int) -> None:
        if index == 2 and model is pair.model:
            raise Failure

    before, pair.spoil = weights(pair), fails
    with pytest.raises(Failure):
        pair.step()
    for w, p in zip(before, pair.model.parameters(), strict=True):
        assert_equal("weights", p.detach(), w)
    pair.spoil = lambda model, part, index: None
    for verb, time, after in itertools.product(("begin", "use", "send", "receive", "commit"), (0, 1), (False, True)):
        if verb in ("begin", "commit") and time:
            continue
        pair.optimizer.zero_grad()
        before = weights(pair)
        with failing(verb, time, after), pytest.raises(Failure):
            pair.step()
        assert pair.model.require_backward_grad_sync
        assert pair.optimizer.evaluation is None
        same = [torch.equal(p, w) for p, w in zip(pair.model.parameters(), before, strict=True)]
        assert not any(same) if verb == "commit" else all(same), (verb, time, after)
        if verb == "commit":  # which is done again
            pair.step_alone()
            pair.steps += 1
        pair.compare()
        pair.both()


def left_early() -> None:
    """A ``break`` out of the loop undoes the step, a mean under way included."""
    pair = Pair(k=3, rho=0.2)
    pair.both()
    before = weights(pair)
    for evaluation in pair.optimizer.evaluations():
        pair.evaluate(pair.model, pair.rank, evaluation)
        if evaluation.index == 2:
            break
    for w, p in zip(before, pair.model.parameters(), strict=True):
        assert_equal("weights", p.detach(), w)
    pair.optimizer.zero_grad()
    pair.both(2)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="model: expected the DistributedDataParallel module .* got None"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, ascents="local")
    with pytest.raises(ValueError, match="model: expected the DistributedDataParallel module .* got Sequential"):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, ascents="local", model=model)
    with pytest.raises(ValueError, match='ascents: expected "synced" or "local", got \'own\''):
        SAM(model.parameters(), torch.optim.SGD, lr=0.1, ascents="own")
    previous = partial(Lookbehind, ascents="local", ascent_gradient="previous", lr=0.1)
    wrapped = DistributedDataParallel(make_model())
    with pytest.raises(ValueError, match="ascents: expected 'synced' with ascent_gradient='previous'"):
        previous(wrapped.parameters(), torch.optim.SGD, model=wrapped)
    sharded, *_ = fsdp(make_model())
    with pytest.raises(ValueError, match=r"model: expected the Distributed.*fully_shard \(FSDP2\) reduces gradients"):
        SAM(sharded.parameters(), torch.optim.SGD, lr=0.1, ascents="local", model=sharded)


def refused_at_the_step() -> None:
    """Weights stay what they were, and what was changed back works."""
    pair = Pair(k=2, rho=0.2)
    pair.both()
    before, stranger = weights(pair), nn.Parameter(torch.ones(2, dtype=torch.float64))

    def refuses(error: type[Exception], match: str, do: Callable[[], Any] = pair.step) -> None:
        with pytest.raises(error, match=match):
            do()
        for w, p in zip(before, pair.model.parameters(), strict=True):
            assert_equal("weights", p.detach(), w)
        assert pair.model.require_backward_grad_sync

    pair.optimizer.model = None
    refuses(ValueError, "model: expected the DistributedDataParallel module")
    pair.optimizer.model = pair.model
    pair.optimizer.add_param_group({"params": [stranger]})
    refuses(ValueError, r"model: .* every parameter of the optimizer, but parameter 6 .* is none of its")
    del pair.optimizer.param_groups[-1]
    pair.evaluate(pair.model, 0, mock.Mock(index=0))
    refuses(RuntimeError, r"ascent_step\(\): expected ascents='synced'", pair.optimizer.ascent_step)
    pair.optimizer.closure = lambda: None
    refuses(ValueError, r"ascents: expected 'synced' for a step\(\) without a closure", pair.optimizer.step)
    pair.optimizer.closure = None
    pair.optimizer.zero_grad()
    for evaluation in pair.optimizer.evaluations(apply=False):
        pair.evaluate(pair.model, 0, mock.Mock(index=0))
        with pytest.raises(RuntimeError, match=r"apply\(\): expected ascents='synced'"):
            pair.optimizer.apply(evaluation)
        break
    pair.optimizer.zero_grad()
    pair.both()
    pair.model.register_comm_hook(None, fp16_compress_hook)
    before = weights(pair)
    refuses(RuntimeError, "ascents: expected 'synced' with a communication hook")


def different(name: str, value: Any) -> None:
    """A rank that has another setting: all refuse the step, at once, and go on when it is mended."""
    pair = Pair(k=2, rho=0.2)
    for steps in (0, 1):
        pair.both(steps)
        before, usual = weights(pair), getattr(pair.optimizer, name)
        if pair.rank == 1:
            setattr(pair.optimizer, name, value)
        with pytest.raises(RuntimeError, match="settings: expected the same on all 2 ranks"):
            pair.step()
        for w, p in zip(before, pair.model.parameters(), strict=True):
            assert_equal("weights", p.detach(), w)
        setattr(pair.optimizer, name, usual)
        pair.optimizer.zero_grad()
        pair.both()


def compressed(ascents: str) -> None:
    """Each gradient that is averaged goes through a hook that compresses it, as in a loop by hand: all, or of SAM with
    local ascents that of the descent.
    """
    torch.manual_seed(0)
    model, other = (DistributedDataParallel(make_model().float()) for _ in range(2))
    for wrapped in (model, other):
        wrapped.register_comm_hook(None, fp16_compress_hook)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.2, ascents=ascents, model=model, **SGD)
    by_hand = torch.optim.SGD(other.parameters(), **SGD)

    def evaluate(model: nn.Module, step: int) -> Tensor:
        model.zero_grad()
        x = values(4, 3, seed=10 * step + dist.get_rank()).float()
        loss = (model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
        loss.backward()
        return loss.detach()

    for step in range(4):
        optimizer.step(partial(evaluate, model, step))
        with other.no_sync() if ascents == "local" else nullcontext():
            evaluate(other, step)
        params = list(other.parameters())
        start = [p.detach().clone() for p in params]
        norm = torch.cat([p.grad.flatten() for p in params]).norm()
        for p in params:
            p.data += 0.2 * p.grad / norm
        evaluate(other, step)
        for p, w in zip(params, start, strict=True):
            p.data.copy_(w)
        by_hand.step()
        for number, (p, q) in enumerate(zip(model.parameters(), params, strict=True)):
            assert_close(f"step {step}: tensor {number}", p.detach(), q.detach(), 1e-4)


DIFFERENT = (("k", 3), ("alpha", 0.7), ("max_grad_norm", 0.1), ("ascent_fraction", 0.5))
OF_ANY: dict[str, Callable[[], None]] = {
    **{f"local-{method}": partial(as_one_process, method) for method in ROWS},
    **{f"local-own-{base}": partial(each_reaches_its_own, base) for base in BASES},
    **{f"local-multistep-{average}": partial(multistep, average) for average in (False, True)},
    "local-halves": on_halves,
    "local-bfloat16": low_precision,
    **{f"local-order-{k}": partial(order, k) for k in (1, 2, 3)},
}
CASES: dict[str, Callable[[], None]] = {
    **OF_ANY,
    "local-sent": all_that_is_sent,
    "local-memory": extra_memory,
    "local-buffers": buffers_are_those_of_rank_0,
    **{f"local-not-finite-{e}-{b}": partial(not_finite, e, b) for e in (0, 1, 2) for b in ("momentum", "RMSprop")},
    **{f"local-overflow-{e}": partial(overflow, e) for e in (0, 2)},
    **{f"local-fails-{base}": partial(what_fails_is_undone, base) for base in BASES},
    "local-break": left_early,
    "local-refused": refused,
    "local-refused-later": refused_at_the_step,
    **{f"local-differ-{n}": partial(different, n, v) for n, v in DIFFERENT},
    **{f"compressed-{ascents}": partial(compressed, ascents) for ascents in ("synced", "local")},
}
