"""What two processes do together, for ``test_own_step``: ``python -m tests.ranks FOLDER RANK 2``."""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lookbehind_fused import Lookbehind
from tests.conftest import BACKENDS, assert_close, assert_equal, drive
from tests.distributed.launch import run_cases
from tests.twin import Lister, Twin, values

SGD = {"lr": 0.1, "momentum": 0.8}
RMSPROP = partial(torch.optim.RMSprop, lr=0.01, momentum=0.5)


def reduces_as_often_as_it_evaluates(dtype: torch.dtype, base: Callable[..., Any], backend: str, rank: int) -> None:
    """DDP on data of its own for each rank: k + 1 reductions a step, and everybody has the same weights and
    gradients."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(dtype)
    wrapped = DistributedDataParallel(model)
    reductions = 0

    def count(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal reductions
        reductions += 1
        mean = bucket.buffer().float() / 2
        dist.all_reduce(mean)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(mean.to(dtype))
        return future

    wrapped.register_comm_hook(None, count)
    optimizer = Lookbehind(None, base(model.parameters()), k=2, rho=0.1, backend=backend)
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            loss = wrapped(values(4, 3, seed=10 * rank + step).to(dtype)).float().square().mean()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        assert reductions == 3 * (step + 1), f"{reductions} reductions after step {step}"
        for name, p in model.named_parameters():
            assert p.dtype == dtype
            for what, mine in (("weights", p.detach()), ("gradient", p.grad)):
                other = mine.float().clone()
                dist.broadcast(other, 0)
                assert_equal(f"step {step}: {what} of {name}", mine.float(), other)


def zero(groups: Any, **settings: Any) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.SGD, **SGD, **settings)


def one(groups: Any, **_: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, **SGD)


def one_group(params: Any) -> Any:
    return [{"params": list(params)}]


def trains_as_one_process(backend: str, rank: int) -> None:
    """ZeRO with the same gradients on each rank, against one process and Algorithm 1: weights, and the momentum that
    this rank keeps."""
    for k, alpha, form in ((1, 1.0, "step"), (2, 0.4, "pairs"), (3, "adaptive", "evaluations")):
        twin = Twin(backend, (zero, {}), other=one, groups=one_group, form=form, k=k, alpha=alpha, keeps_state=False)
        for _ in range(4):
            twin.step()
        kept = twin.optimizer.base_optimizer.optim.state
        assert 0 < len(kept) < len(twin.params), "each rank keeps its share"
        for p, entry in kept.items():
            q = next(q for q, own in zip(twin.theirs, twin.params, strict=True) if own is p)
            difference = (entry["momentum_buffer"] - twin.other.state[q]["momentum_buffer"]).abs().max()
            assert difference < 1e-12, f"k = {k}: momentum"


def trains_through_ddp(backend: str, rank: int) -> None:
    """ZeRO under DistributedDataParallel, whose backward averages: against one process with all the examples, or, where
    ascents are local, with a microbatch for each rank. Clipped, or not.
    """
    for ascents, clip in itertools.product(("synced", "local"), (None, 0.5)):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
        wrapped, alone = DistributedDataParallel(models[0]), models[1]
        settings = {"k": 2, "alpha": 0.4, "rho": 0.2, "max_grad_norm": clip, "backend": backend}
        given = {"ascents": "local", "model": wrapped} if ascents == "local" else {}
        optimizer = Lookbehind(None, zero(wrapped.parameters()), **settings, **given)
        parts = 2 if ascents == "local" else 1
        other = Lookbehind(alone.parameters(), torch.optim.SGD, microbatches=parts, **SGD, **settings)

        def evaluate(model: nn.Module, x: Tensor) -> Tensor:
            loss = (model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
            loss.backward()
            return loss.detach()

        for step in range(4):
            x = values(8, 3, seed=step)
            optimizer.step(partial(evaluate, wrapped, x.chunk(2)[rank]))
            if parts == 1:
                other.step(partial(evaluate, alone, x))
            else:
                other.step(lambda evaluation, x=x, alone=alone: evaluate(alone, evaluation.part(x)))
            for (name, p), q in zip(models[0].named_parameters(), alone.parameters(), strict=True):
                assert_close(f"{ascents}, {clip}, step {step}: {name}", p.detach(), q.detach(), 1e-12)
        norms = [found.diagnostics["grad_norm"].item() for found in (optimizer, other)]
        assert clip is None or norms[1] > clip
        kept = optimizer.base_optimizer.optim.state
        assert 0 < len(kept) < len(models[0].state_dict()), "each rank keeps its share"


class Failure(Exception):
    pass


def what_fails_is_undone(backend: str, rank: int) -> None:
    """The state inside of ZeRO too: what follows is what one process gives that has not seen it."""
    for k in (2, 3):
        for warm in (0, 2):
            twin = Twin(backend, (zero, {}), other=one, groups=one_group, k=k, keeps_state=False)
            for _ in range(warm):
                twin.step()
            before = [p.detach().clone() for p in twin.params]

            def fails(index: int, twin: Twin = twin, k: int = k) -> Tensor:
                if index == k:
                    raise Failure
                return twin.evaluate(index)

            with pytest.raises(Failure):
                drive(twin.optimizer, "step", fails, k)
            for number, (p, w) in enumerate(zip(twin.params, before, strict=True)):
                assert_equal(f"weights of tensor {number}", p.detach(), w)
            for _ in range(2):
                twin.step()


def memory_of_its_own_is_refused(backend: str, rank: int) -> None:
    """Views of buckets that ZeRO has made, which the fast weights cannot take the place of."""
    params = [nn.Parameter(values(*shape, seed=number).clone()) for number, shape in enumerate([(5,), (2, 3)])]
    base = zero(params, parameters_as_bucket_view=True)
    before = [p.detach().clone() for p in params]

    def closure() -> Tensor:
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.zeros(())

    with pytest.raises((ValueError, RuntimeError, TypeError), match="parameters_as_bucket_view"):
        Lookbehind(None, base, k=2, backend=backend).step(closure)
    for number, (p, w) in enumerate(zip(params, before, strict=True)):
        assert_equal(f"weights of tensor {number}", p.detach(), w)


CASES: dict[str, Callable[[str, int], None]] = {
    "ddp-bfloat16-RMSprop": partial(reduces_as_often_as_it_evaluates, torch.bfloat16, RMSPROP),
    "ddp-bfloat16-Lister": partial(reduces_as_often_as_it_evaluates, torch.bfloat16, Lister),
    "ddp-float32-Lister": partial(reduces_as_often_as_it_evaluates, torch.float32, Lister),
    "zero-trains": trains_as_one_process,
    "zero-ddp": trains_through_ddp,
    "zero-undone": what_fails_is_undone,
    "zero-refused": memory_of_its_own_is_refused,
}


def on_each_backend(case: Callable[[str, int], None]) -> None:
    for backend in BACKENDS:
        case(backend, dist.get_rank())


if __name__ == "__main__":
    on_all = {name: partial(on_each_backend, case) for name, case in CASES.items()}
    run_cases(on_all, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
