"""Hugging Face's Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers", reason="transformers is not installed: make trainers")
pytest.importorskip("accelerate", reason="accelerate is not installed: make trainers")

from transformers import Trainer, TrainingArguments

from lookbehind_fused.integrations.transformers import WholeSteps
from tests.integrations.plain import (
    GAMMA,
    SAMPLES,
    STEPS,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    data,
    make_optimizer,
    make_scheduler,
)

pytestmark = [pytest.mark.filterwarnings("ignore:::(transformers|accelerate)"), pytest.mark.xdist_group("transformers")]


class Classifier(Model):
    """As Trainer wants it: with the loss in front, a mean over its microbatch."""

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(inputs)
        return cross_entropy(logits, labels), logits


class Summed(Classifier):
    """With a loss that is normalised by the number of items in the whole batch, as those of language models are."""

    def forward(self, inputs: Tensor, labels: Tensor, num_items_in_batch: int, **kwargs: Any) -> Any:  # type: ignore[override]
        loss, logits = super().forward(inputs, labels)
        return loss * len(labels) / num_items_in_batch, logits


class WholeTrainer(WholeSteps, Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_trainer(
    folder: Path, accumulation: int, clip: float | None = None, schedule: bool = False,
    model: type[Classifier] = Classifier, trainer: type[Trainer] = WholeTrainer, dtype: torch.dtype = torch.float64,
    optimizer: Any = None, **settings: Any,
) -> Trainer:  # fmt: skip
    network = model(dtype)
    optimizer = make_optimizer(network) if optimizer is None else optimizer(network)
    scheduler = make_scheduler(optimizer) if schedule else torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    inputs, targets = data(accumulation, dtype)
    args = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=SAMPLES, use_cpu=True, disable_tqdm=True,
        gradient_accumulation_steps=accumulation, max_grad_norm=clip or 0.0, logging_steps=1, report_to=[],
        **{"save_strategy": "no", **settings},
    )  # fmt: skip
    samples = [{"inputs": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]
    return trainer(network, args, train_dataset=samples, optimizers=(optimizer, scheduler))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def means(of: list[float], accumulation: int) -> list[float]:
    """Of each step's microbatches."""
    return [sum(of[i : i + accumulation]) / accumulation for i in range(0, len(of), accumulation)]


@pytest.mark.parametrize(
    ("accumulation", "clip", "schedule"), [(1, None, False), (2, None, True), (4, 0.5, True), (1, 0.5, False)]
)
@pytest.mark.parametrize("model", [Classifier, Summed])
def test_trainer(accumulation: int, clip: float | None, schedule: bool, model: type, tmp_path: Path) -> None:
    """Equal to the plain loop; losses that are logged are those of evaluation 0; k + 1 evaluations a microbatch."""
    plain = Plain(accumulation, clip, schedule)
    trainer = make_trainer(tmp_path, accumulation, clip, schedule, model)
    trainer.train()
    assert_same_weights(trainer.model, plain.model)
    assert_same_losses(losses(trainer), means(plain.losses, accumulation))
    assert trainer.model.evaluations == plain.model.evaluations == STEPS * accumulation * 3


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 7}
    whole = make_trainer(tmp_path, accumulation, 0.5, True, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, accumulation, 0.5, True, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same_weights(resumed.model, whole.model)
    assert_same_losses(losses(resumed), losses(whole))
    assert resumed.lr_scheduler.get_last_lr() == pytest.approx([0.05 * GAMMA**STEPS])
    assert resumed.model.evaluations == (STEPS - 7) * accumulation * 3


def test_a_last_batch_of_fewer_microbatches(tmp_path: Path) -> None:
    """It is divided by as many as there are."""
    trainer = make_trainer(tmp_path, 4)
    trainer.train_dataset = trainer.train_dataset[: 6 * SAMPLES]
    trainer.train()
    plain = Classifier()
    optimizer = make_optimizer(plain)
    inputs, targets = (tensor.split(SAMPLES) for tensor in data(4))
    for _ in range(2):
        for microbatches in ([0, 1, 2, 3], [4, 5]):

            def closure(microbatches: list[int] = microbatches) -> None:
                for i in microbatches:
                    (plain(inputs[i], targets[i])[0] / len(microbatches)).backward()

            optimizer.step(closure)
    assert_same_weights(trainer.model, plain)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_scaler(accumulation: int, tmp_path: Path) -> None:
    """As ``fp16=True`` would set it, which needs a GPU."""

    class Scaled(WholeTrainer):
        def compute_loss_context_manager(self) -> Any:
            return torch.autocast("cpu", torch.float16)

    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(2)]
    plain = Plain(accumulation, 0.5, scaler=scalers[0])
    trainer = make_trainer(tmp_path, accumulation, trainer=Scaled, dtype=torch.float32)
    trainer.args.max_grad_norm = 0.5
    trainer.accelerator.scaler = scalers[1]
    trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert plain.overflows >= 3
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert_same_weights(trainer.model, plain.model)


def test_without_the_mix_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="^closure: expected a function that runs forward and backward"):
        make_trainer(tmp_path, 1, trainer=Trainer).train()


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train()
    assert trainer.model.evaluations == STEPS * 2


def test_the_optimizer_can_be_copied_and_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer.closure.__self__, WholeSteps)
    assert copy.deepcopy(optimizer).closure is None
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    make_optimizer(Model()).load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
