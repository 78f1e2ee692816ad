"""Accelerate: the closure runs the microbatches of ``accumulate``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("accelerate", reason="accelerate is not installed: make trainers")

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lookbehind_fused import SAM, LambdaSchedule, Lookahead
from lookbehind_fused.integrations.accelerate import connect
from tests.conftest import assert_close
from tests.integrations.plain import (
    SAMPLES,
    STEPS,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    data,
    make_optimizer,
    make_scheduler,
    microbatches,
)

pytestmark = [pytest.mark.filterwarnings("ignore:::accelerate"), pytest.mark.xdist_group("transformers")]


class Run:
    """Accelerate's loop."""

    def __init__(
        self, accumulation: int, schedule: bool = False, scaler: torch.amp.GradScaler | None = None, **settings: Any
    ) -> None:
        dtype = torch.float64 if scaler is None else torch.float32
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.accelerator.scaler = scaler
        model = Model(dtype)
        optimizer = make_optimizer(model, **settings)
        scheduler = make_scheduler(optimizer) if schedule else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        loader = DataLoader(TensorDataset(*data(accumulation, dtype)), batch_size=SAMPLES)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.optimizer = connect(self.optimizer)
        self.losses: list[float] = []
        self.skipped: list[bool] = []

    def evaluate(self, batch: list[torch.Tensor]) -> float:
        inputs, targets = batch
        with nullcontext() if self.accelerator.scaler is None else torch.autocast("cpu", torch.float16):
            loss = cross_entropy(self.model(inputs), targets)
        self.accelerator.backward(loss)
        return loss.item()

    def train(self, batches: Any, most: int = STEPS) -> None:
        """Over the batches of what is left of an epoch."""
        accelerator, optimizer = self.accelerator, self.optimizer
        microbatches: list[Any] = []

        def closure() -> None:
            for batch in microbatches:
                self.evaluate(batch)

        optimizer.closure = closure
        for batch in batches:
            with accelerator.accumulate(self.model):
                microbatches.append(batch)
                self.losses.append(self.evaluate(batch))
                optimizer.step()
                self.scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                microbatches.clear()
                self.skipped.append(optimizer.step_was_skipped)
                if len(self.skipped) == most:
                    break


@pytest.mark.parametrize(
    ("accumulation", "clip", "schedule"), [(1, None, False), (2, None, True), (4, 0.5, True), (1, 0.5, False)]
)
def test_accelerate(accumulation: int, clip: float | None, schedule: bool) -> None:
    """Equal to the plain loop, k + 1 evaluations a microbatch. Its scheduler steps with the optimizer."""
    plain = Plain(accumulation, clip, schedule)
    run = Run(accumulation, schedule, max_grad_norm=clip)
    for _ in range(2):
        run.train(run.loader)
    assert_same_weights(run.model, plain.model)
    assert_same_losses(run.losses, plain.losses)
    assert run.model.evaluations == STEPS * accumulation * 3


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    plain = Plain(accumulation, 0.5, schedule=True)
    run = Run(accumulation, schedule=True, max_grad_norm=0.5)
    run.train(run.loader, 7)
    run.accelerator.save_state(str(tmp_path))
    resumed = Run(accumulation, schedule=True, max_grad_norm=0.5)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(resumed.accelerator.skip_first_batches(resumed.loader, 7 * accumulation))
    resumed.train(resumed.loader)
    assert_same_weights(resumed.model, plain.model)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_gradient_scaler(accumulation: int) -> None:
    """Where a step is undone, at whichever evaluation, ``step_was_skipped`` says so and the scheduler stays."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(2)]
    plain = Plain(accumulation, scaler=scalers[0])
    run = Run(accumulation, scaler=scalers[1])
    for _ in range(2):
        run.train(run.loader)
    assert_same_weights(run.model, plain.model)
    assert_same_losses(run.losses, plain.losses)
    assert sum(run.skipped) == plain.overflows >= 3
    assert scalers[0].get_scale() == scalers[1].get_scale()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("evaluation", [0, 2])
def test_a_step_that_is_undone_says_so(evaluation: int, scaled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    run = Run(1, schedule=True, scaler=scaler, nonfinite="skip")
    plain_evaluate, count = run.evaluate, -1

    def evaluate(batch: Any) -> float:
        nonlocal count
        count += 1
        loss = plain_evaluate(batch)
        if count == 3 + evaluation:  # of the second step
            next(run.model.parameters()).grad[:] = torch.inf
        return loss

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.train(run.loader, 4)
    assert run.skipped == [False, True, False, False]
    assert run.scheduler.get_last_lr() == pytest.approx([0.05 * 0.9**3])


def test_settings_through_the_wrapper() -> None:
    run = Run(1)
    wrapper, inside = run.optimizer, run.optimizer.optimizer
    wrapper.k, wrapper.alpha = 5, 0.25
    assert (inside.k, inside.alpha, wrapper.k, wrapper.evaluation) == (5, 0.25, 5, None)
    LambdaSchedule(wrapper, alpha=lambda step: 0.75)
    assert inside.alpha == 0.75
    with pytest.raises(TypeError, match="^scaler: expected a torch.amp.GradScaler"):
        inside.scaler = 3
    run.evaluate([torch.ones(2, 6, dtype=torch.float64), torch.tensor([0, 1])])
    wrapper.ascent_step()
    with pytest.raises(RuntimeError, match="expected no open step"):
        wrapper.state_dict()
    wrapper.abort_step()
    assert connect(wrapper) is wrapper
    assert len(inside._optimizer_step_post_hooks) == 1
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018


def test_other_optimizers() -> None:
    """Lookahead over one of the family is connected, what has no closure is left alone."""
    accelerator, model = Accelerator(cpu=True), Model()
    optimizer = accelerator.prepare(Lookahead(SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)))
    assert connect(optimizer) is optimizer
    optimizer.nonfinite = "skip"
    assert optimizer.optimizer.optimizer.nonfinite == "skip"
    optimizer.step(lambda: (model(torch.ones(1, 6, dtype=torch.float64)) * torch.inf).sum().backward())
    assert optimizer.step_was_skipped
    other = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    kind = type(other)
    assert type(connect(other)) is kind


ON_GPUS = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU, and on CPUs Accelerate's FSDP2 does not shard"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPUS)])
def test_fsdp2(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank: the optimizer that was made before trains the shards. On a CPU Accelerate has to be told that it is
    to shard, for there it makes DistributedDataParallel of it, and says nothing.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
        accelerator = Accelerator(cpu=device == "cpu", fsdp_plugin=plugin)
        if device == "cpu":
            assert accelerator.distributed_type == DistributedType.MULTI_CPU
            assert not accelerator.is_fsdp2
            accelerator.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        assert accelerator.is_fsdp2
        plain, model = Plain(), Model()
        model, optimizer = accelerator.prepare(model, make_optimizer(model))
        optimizer = connect(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) and p is q for p, q in zip(params, model.parameters(), strict=True))
        for batch in 2 * microbatches(1):
            inputs, targets = (x.to(device) for x in batch)

            def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
                accelerator.backward(cross_entropy(model(inputs), targets))

            optimizer.closure = closure
            closure()
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(params, plain.model.parameters(), strict=True):
            assert_close("weights", p.detach().full_tensor().cpu(), q.detach(), 1e-6)
    finally:
        torch.distributed.destroy_process_group()
