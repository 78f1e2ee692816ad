"""Lightning, with automatic and with manual optimization."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

pytest.importorskip("lightning", reason="lightning is not installed: make trainers")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision

from lookbehind_fused import LambdaSchedule, Lookahead, Lookbehind
from lookbehind_fused.integrations.lightning import WholeSteps
from tests.integrations.plain import (
    GAMMA,
    STEPS,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    make_optimizer,
    make_scheduler,
    microbatches,
)

pytestmark = [pytest.mark.filterwarnings("ignore:::lightning"), pytest.mark.xdist_group("lightning")]


class Loader:
    """Batches in order, which go on in mid-epoch from a checkpoint of the trainer."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.position = self.position % len(self), 0
        for position in range(start, len(self)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Losses(Logger):
    """Keeps what is logged."""

    name, version = "losses", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.epochs: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps += [value for name, value in metrics.items() if name == "loss_step"]
        self.epochs += [value for name, value in metrics.items() if name == "loss_epoch"]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Module(LightningModule):
    def __init__(self, schedule: bool = False, dtype: torch.dtype = torch.float64, **settings: Any) -> None:
        super().__init__()
        self.model, self.schedule, self.settings = Model(dtype), schedule, settings

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs), targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        self.optimizer = make_optimizer(self.model, **self.settings)
        if not self.schedule:
            return self.optimizer
        return [self.optimizer], [{"scheduler": make_scheduler(self.optimizer), "interval": "step"}]


class Manual(Module):
    """As ``Module``, accumulating by itself."""

    def __init__(self, accumulation: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.accumulation, self.batches = accumulation, []
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.batches.append(batch)
        if len(self.batches) < self.accumulation:
            return
        optimizer, batches = self.optimizers(), self.batches
        self.batches = []

        def closure() -> None:
            optimizer.zero_grad()
            for inputs, targets in batches:
                loss = cross_entropy(self.model(inputs), targets)
                if optimizer.evaluation is None or optimizer.evaluation.index == 0:
                    self.log("loss", loss, on_step=True, on_epoch=True)
                self.manual_backward(loss / self.accumulation)

        if optimizer.scaler is not None:
            optimizer.closure = closure  # Lightning runs the first evaluation itself
        optimizer.step(closure)
        if self.schedule:
            self.lr_schedulers().step()


def train(
    module: LightningModule, accumulation: int = 1, *callbacks: Callback, checkpoint: Any = None, **settings: Any
) -> Losses:
    """Two epochs, 20 steps."""
    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, log_every_n_steps=1, logger=losses, callbacks=[*callbacks],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    dtype = next(module.parameters()).dtype
    loader = Loader(microbatches(settings.get("accumulate_grad_batches", accumulation), dtype))
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return losses


@pytest.mark.parametrize(
    ("accumulation", "clip", "schedule"), [(1, None, False), (2, None, True), (4, 0.5, True), (1, 0.5, False)]
)
@pytest.mark.parametrize("precision", ["32", "16"])
def test_automatic_optimization(accumulation: int, clip: float | None, schedule: bool, precision: str) -> None:
    """Equal to the plain loop; losses that are logged are those of evaluation 0; k + 1 evaluations a microbatch."""
    ours, plains, plugins = None, None, []
    if precision == "16":
        ours, plains = (torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(2))
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=ours)]
    plain = Plain(accumulation, clip, schedule, plains)
    module = Module(schedule, torch.float64 if plains is None else torch.float32)
    losses = train(
        module, 1, WholeSteps(), accumulate_grad_batches=accumulation, gradient_clip_val=clip, plugins=plugins
    )
    assert_same_weights(module.model, plain.model)
    assert_same_losses(losses.steps, plain.losses[accumulation - 1 :: accumulation])
    half = len(plain.losses) // 2
    assert_same_losses(losses.epochs, [sum(plain.losses[:half]) / half, sum(plain.losses[half:]) / half])
    assert module.model.evaluations == plain.model.evaluations
    if plains is None:
        assert module.model.evaluations == STEPS * accumulation * 3
    else:
        assert plain.overflows >= 3
        assert ours.get_scale() == plains.get_scale()
    assert module.optimizer.closure is None
    assert not module.optimizer._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:Detected call of")  # a scheduler's, where the first step overflows
@pytest.mark.parametrize(("accumulation", "schedule"), [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize("precision", ["32", "16"])
def test_manual_optimization(accumulation: int, schedule: bool, precision: str) -> None:
    """Without the callback, but for the scaler: the closure is the user's."""
    scalers, plugins, callbacks = None, [], []
    if precision == "16":
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(2)]
        plugins, callbacks = [MixedPrecision("16-mixed", "cpu", scaler=scalers[0])], [WholeSteps()]
    plain = Plain(accumulation, schedule=schedule, scaler=scalers and scalers[1])
    module = Manual(accumulation, schedule=schedule, dtype=torch.float32 if scalers else torch.float64)
    losses = train(module, accumulation, *callbacks, plugins=plugins)
    assert_same_weights(module.model, plain.model)
    logged = list(dict.fromkeys(losses.steps))  # Lightning logs the last one again until there is a new one
    assert_same_losses(logged, plain.losses[accumulation - 1 :: accumulation])
    assert module.model.evaluations == plain.model.evaluations
    assert scalers is None or plain.overflows >= 3


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("precision", ["32", "16"])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, precision: str, tmp_path: Path) -> None:
    """Lightning loads it with ``weights_only=True``."""

    def setting() -> tuple[Module, dict[str, Any]]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if precision == "16" else []
        dtype = torch.float32 if plugins else torch.float64
        return Module(schedule=True, dtype=dtype), {
            "accumulate_grad_batches": accumulation, "gradient_clip_val": 0.5, "plugins": plugins
        }  # fmt: skip

    whole, settings = setting()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    losses = train(whole, 1, WholeSteps(), saving, **settings)
    resumed, settings = setting()
    rest = train(resumed, 1, WholeSteps(), checkpoint=tmp_path / "step=7.ckpt", **settings)
    assert_same_weights(resumed.model, whole.model)
    assert_same_losses(rest.steps, losses.steps[7:])
    assert resumed.lr_schedulers().get_last_lr() == pytest.approx([0.05 * GAMMA**STEPS])


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_manual_optimization_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    plain = Plain(accumulation, schedule=True)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    train(Manual(accumulation, schedule=True), accumulation, saving)
    resumed = Manual(accumulation, schedule=True)
    train(resumed, accumulation, checkpoint=tmp_path / "step=7.ckpt")
    assert resumed.model.evaluations < plain.model.evaluations
    assert_same_weights(resumed.model, plain.model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ddp(accumulation: int) -> None:
    """In one process: what is not reduced before the last microbatch is reduced with it."""
    plain, module = Plain(accumulation, 0.5), Module()
    train(module, 1, WholeSteps(), accumulate_grad_batches=accumulation, gradient_clip_val=0.5, strategy="ddp")
    assert_same_weights(module.model, plain.model)
    assert module.model.evaluations == plain.model.evaluations


@pytest.mark.parametrize("precision", ["32", "16"])
def test_lookahead_around_it(precision: str) -> None:
    """Against its own loop, for which microbatches of a step are one batch."""

    class Around(Module):
        def configure_optimizers(self) -> Any:
            self.optimizer = Lookahead(make_optimizer(self.model), k=3)
            return self.optimizer

    scaler, plugins = None, []
    if precision == "16":
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**19))]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19)
    dtype = torch.float32 if scaler else torch.float64
    module, plain = Around(dtype=dtype), Model(dtype)
    train(module, 1, WholeSteps(), accumulate_grad_batches=2, plugins=plugins)
    optimizer = Lookahead(make_optimizer(plain, scaler=scaler), k=3)
    batches = microbatches(2, dtype) * 2
    for i in range(0, len(batches), 2):

        def closure(i: int = i) -> None:
            for inputs, targets in batches[i : i + 2]:
                with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                    loss = cross_entropy(plain(inputs), targets) / 2
                (loss if scaler is None else scaler.scale(loss)).backward()

        optimizer.step(closure)
        if scaler is not None:
            scaler.update()
    assert_same_weights(module.model, plain)
    assert module.optimizer.inner_step == optimizer.inner_step


@pytest.mark.filterwarnings("ignore:.training_step. returned")
@pytest.mark.parametrize("callbacks", [[WholeSteps()], []])
def test_a_training_step_that_returns_none_skips_the_step(callbacks: list[Callback]) -> None:
    class Skipping(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            return None if batch_idx in (2, 3, 4) else super().training_step(batch, batch_idx)

    class Weights(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            every.append(pl_module.model.layers[0].weight.detach().clone())

    every: list[Tensor] = []
    with pytest.warns(UserWarning, match="^evaluation 0 has left no gradients .*: the step was skipped"):
        train(Skipping(), 1, *callbacks, Weights())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(every)]
    assert moved[:6] == [True, False, False, False, True, True]


@pytest.mark.filterwarnings("ignore:.training_step. returned")
def test_only_one_of_the_microbatches_returns_none() -> None:
    """That loss counts as 0."""

    class Skipping(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "more": 1} if batch_idx % 2 == 0 else None

    module, plain = Skipping(), Model()
    train(module, 1, WholeSteps(), accumulate_grad_batches=2)
    optimizer = make_optimizer(plain)
    for inputs, targets in microbatches(2)[::2] * 2:
        optimizer.step(lambda x=inputs, y=targets: (cross_entropy(plain(x), y) / 2).backward())
    assert_same_weights(module.model, plain)


def test_what_is_refused() -> None:
    with pytest.raises(RuntimeError, match="^gradients: expected none, or the last step's"):
        train(Module(), 1, accumulate_grad_batches=2)  # without the callback half of the batch would be lost
    with pytest.raises(ValueError, match="^same_randomness: expected False with accumulated microbatches"):
        train(Module(same_randomness=True), 1, WholeSteps(), accumulate_grad_batches=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="^gradient_clip_algorithm: expected 'norm'"):
        train(
            Module(dtype=torch.float32), 1, WholeSteps(),
            plugins=[plugin], gradient_clip_val=1.0, gradient_clip_algorithm="value",
        )  # fmt: skip
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="^scaler: expected the GradScaler whose step"):
        train(Module(dtype=torch.float32), plugins=[plugin])


def test_clipping_by_value_is_lightnings_own() -> None:
    module, plain = Module(), Model()
    train(module, 1, WholeSteps(), gradient_clip_val=0.05, gradient_clip_algorithm="value")
    optimizer = make_optimizer(plain)
    for inputs, targets in microbatches(1) * 2:

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> None:
            cross_entropy(plain(inputs), targets).backward()
            torch.nn.utils.clip_grad_value_(plain.parameters(), 0.05)

        optimizer.step(closure)
    assert_same_weights(module.model, plain)


def test_an_exception_leaves_the_last_whole_step() -> None:
    class Failing(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
            evaluation = self.optimizers().evaluation
            if batch_idx == 5 and evaluation is not None and evaluation.index == 2:
                raise ArithmeticError("no loss")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ArithmeticError, match="^no loss"):
        train(module, 1, WholeSteps(), accumulate_grad_batches=2)
    assert_same_weights(module.model, Plain(2, steps=2).model)
    assert module.optimizer.closure is None
    assert "log" not in vars(module)


def test_schedules_of_rho_are_lightnings_schedulers() -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            self.optimizer = make_optimizer(self.model)
            schedule = LambdaSchedule(self.optimizer, rho=lambda step: 1 / (1 + step))
            return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]

    module = Scheduled()
    train(module, 1, WholeSteps())
    assert module.optimizer.param_groups[0]["rho"] == pytest.approx(0.1 / (1 + STEPS))


def test_lightnings_wrapper_is_the_optimizer() -> None:
    """Settings, the forms of a step and what they refuse."""

    class Wrapping(Module):
        def on_train_start(self) -> None:
            wrapper, inside = self.optimizers(), self.optimizer
            assert wrapper is not inside
            wrapper.k = 5
            wrapper.alpha, wrapper.closure = 0.25, len
            assert (inside.k, inside.alpha, inside.closure) == (5, 0.25, len)
            wrapper.closure = None
            with pytest.raises(TypeError, match="^closure: expected a function"):
                wrapper.closure = 3
            LambdaSchedule(wrapper, alpha=lambda step: 0.75)
            assert inside.alpha == 0.75
            before = copy.deepcopy(self.model.state_dict())
            self.model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
            wrapper.ascent_step()
            with pytest.raises(RuntimeError, match="expected no open step"):
                wrapper.state_dict()
            wrapper.abort_step()
            assert all(torch.equal(p, before[name]) for name, p in self.model.state_dict().items())
            wrapper.zero_grad()

    module = Wrapping()
    train(module)
    assert module.model.evaluations == 1 + STEPS * 6


def test_copies_and_checkpoints_with_everything_set() -> None:
    module, plugin = Module(dtype=torch.float32), MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))

    class Copying(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = module.optimizer
            optimizer.register_step_post_hook(lambda *_: None)
            assert isinstance(copy.deepcopy(optimizer), Lookbehind)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            make_optimizer(Model(torch.float32)).load_state_dict(torch.load(file, weights_only=True))

    train(module, 1, WholeSteps(), Copying(), plugins=[plugin])
