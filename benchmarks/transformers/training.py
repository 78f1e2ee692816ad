"""One training run, which goes on where it was killed."""

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.checkpoint import random_state, set_random_state
from benchmarks.files import UserError, replacing
from benchmarks.transformers.plan import Run, Settings
from lookbehind_fused import SAM, Lookbehind

CPU = torch.device("cpu")


class Task(Protocol):
    """What is trained, on what, with which base optimizer."""

    model: nn.Module
    minibatches: int
    """Of the whole training."""

    def loss(self, number: int) -> Tensor:
        """Of the minibatch of this number, which follows from the number and the run's seed alone; 0-dim, nats."""

    def base(self, lr: float) -> Optimizer:
        """The base optimizer over the model's parameters."""

    def schedule(self, fraction: float) -> float:
        """What the learning rate is multiplied by after this fraction of the training, in [0, 1)."""


@dataclass
class Record:
    """What a run has done so far."""

    step: int = 0
    evaluations: int = 0
    """Gradients that were computed, counted where they are."""
    seconds: float = 0.0
    """Spent in training steps."""
    loss: list[float] = field(default_factory=list)
    """Of each step, at the weights it began with."""
    alpha: list[float] = field(default_factory=list)
    """Of each step, of Lookbehind alone."""


def make_optimizer(run: Run, settings: Settings, base: Optimizer) -> Optimizer:
    """The run's optimizer around `base`."""
    if run.method == "base":
        return base
    if run.method == "sam":
        return SAM(None, base, rho=run.rho, adaptive=run.asam)
    alpha = "adaptive" if run.method == "lookbehind-adaptive" else run.alpha
    ball = {"rho": run.rho, "adaptive": run.asam}
    return Lookbehind(None, base, k=run.k, alpha=alpha, reuse_gradient=not settings.switch, **ball)


def train(
    task: Task,
    run: Run,
    settings: Settings,
    path: Path | None = None,
    advance: Callable[[int], object] = lambda steps: None,
) -> Record:
    """Trains from the beginning, or from where the checkpoint in `path` stands, and saves there as it goes.

    `advance` hears of the steps that are done, first of those that were. A resumed run ends with the same bits as one
    that was not interrupted.
    """
    optimizer = make_optimizer(run, settings, task.base(run.lr))
    record = Record()
    if path is not None and path.exists():
        record = _restore(path, run, task.model, optimizer)
    size = run.minibatches(settings)
    steps = task.minibatches // size
    advance(record.step)
    begun = time.perf_counter()
    while record.step < steps:
        for group in optimizer.param_groups:
            group["lr"] = run.lr * task.schedule(record.step / steps)
        record.loss.append(_step(task, optimizer, record, size))
        if run.method.startswith("lookbehind"):
            record.alpha.append(optimizer.diagnostics["alpha"].item())
        record.step += 1
        advance(1)
        if path is not None and (record.step % settings.checkpoint_every == 0 or record.step == steps):
            now = time.perf_counter()
            record.seconds, begun = record.seconds + now - begun, now
            _save(path, run, task.model, optimizer, record)
    record.seconds += time.perf_counter() - begun
    return record


def _step(task: Task, optimizer: Optimizer, record: Record, size: int) -> float:
    """One outer step over `size` minibatches. Returns the loss at the weights that it began with."""
    first = record.step * size
    if not isinstance(optimizer, Lookbehind):
        optimizer.zero_grad()
        loss = task.loss(first)
        loss.backward()
        record.evaluations += 1
        optimizer.step()
        return loss.item()
    losses = []
    for evaluation in optimizer.evaluations():
        loss = task.loss(first + (evaluation.inner_step - 1 if size > 1 else 0))
        loss.backward()
        record.evaluations += 1
        losses.append(loss.detach())
    return losses[0].item()


def _save(path: Path, run: Run, model: nn.Module, optimizer: Optimizer, record: Record) -> None:
    with replacing(path) as file:
        content = {
            "run": asdict(run),
            "record": vars(record),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_state(CPU),
        }
        torch.save(content, file)


def _restore(path: Path, run: Run, model: nn.Module, optimizer: Optimizer) -> Record:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["run"] != asdict(run):
            raise ValueError
        record = Record(**content["record"])
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        set_random_state(content["random"], CPU)
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not the checkpoint of this run, or damaged; remove it to begin again") from error
    return record
