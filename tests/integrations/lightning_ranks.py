"""Lightning's FSDP2 strategy, in one of two processes: ``torchrun -m tests.integrations.lightning_ranks FOLDER CASE``.

``FOLDER/CASE-RANK`` says what went wrong, or is empty.
"""

import contextlib
import io
import os
import re
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lookbehind_fused.integrations.lightning import WholeSteps
from tests.conftest import assert_close, assert_equal
from tests.integrations.plain import SAMPLES, SETTINGS, STEPS, Plain, data
from tests.integrations.test_lightning import Module

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_fsdp2.py"


class Sharded(Module):
    def configure_model(self) -> None:
        layers = self.model.layers
        for layer in (layers[0], layers[2], layers) if not isinstance(next(layers.parameters()), DTensor) else ():
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().full_tensor() for p in self.parameters()]


def train(
    accumulation: int, clip: float | None, schedule: bool, *callbacks: Callback, checkpoint: Path | None = None
) -> Sharded:
    """Two epochs; of each microbatch of the plain loop either rank has its half."""
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_epochs=2, accumulate_grad_batches=accumulation, gradient_clip_val=clip,
        callbacks=[WholeSteps(), *callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    module = Sharded(schedule)
    examples = TensorDataset(*data(accumulation))
    mine = DistributedSampler(examples, 2, int(os.environ["RANK"]), shuffle=False)
    loader = DataLoader(examples, batch_size=SAMPLES // 2, sampler=mine)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    assert trainer.global_step == STEPS
    return module


class Saves(Callback):
    """After the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def as_the_plain_loop(folder: Path) -> None:
    """Of one process, to 1e-6; and what goes on from a checkpoint is the same to the last bit."""
    for number in (0, 2):
        setting, path = SETTINGS[number], folder / f"checkpoint-{number}"
        plain = Plain(*setting)
        whole = train(*setting, Saves(path)).weights()
        for p, q in zip(whole, plain.model.parameters(), strict=True):
            assert_close(f"{setting}", p, q.detach(), 1e-6)
        resumed = train(*setting, checkpoint=path).weights()
        for p, q in zip(resumed, whole, strict=True):
            assert_equal(f"{setting}, resumed", p, q)


def example(_: Path) -> None:
    """As it stands there; each step takes two microbatches."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        script = runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert all(isinstance(p, DTensor) and len(p.to_local()) == len(p) // 2 for p in script["model"].parameters())
    assert script["trainer"].global_step == 5 * 30
    assert float(script["trainer"].callback_metrics["accuracy"]) > 0.85
    last = printed.getvalue().splitlines()[-1:]
    assert bool(last and re.fullmatch(r"accuracy 0\.\d+", last[0])) == (os.environ["RANK"] == "0"), last


CASES = {"example": example, "plain": as_the_plain_loop}

if __name__ == "__main__":
    folder, case, wrong = Path(sys.argv[1]), sys.argv[2], ""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        CASES[case](folder)
    except BaseException:
        wrong = traceback.format_exc()
    (folder / f"{case}-{os.environ['RANK']}").write_text(wrong)
    sys.exit(bool(wrong))
