"""One run: a network with a head for each task, learning one task after the other, to be interrupted at any moment."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import methods, options
from benchmarks.data import Dataset, seeded_generator
from benchmarks.files import UserError, replacing
from benchmarks.lifelong.experiment import Run, Settings
from benchmarks.lifelong.streams import STREAMS
from benchmarks.methods import METHODS
from lookbehind_fused.lifelong import CMAML, Reservoir, average_accuracy, forgetting, of_task


class MultiHead(nn.Module):
    """A trunk that all tasks share, and a linear head for each of them, whose number comes with every image.

    Grey images go through two hidden layers, coloured ones through four convolutions that halve them and a hidden
    layer. There is no BatchNorm: C-MAML's inner steps see one image.
    """

    def __init__(self, shape: Sequence[int], tasks: int, classes: int, width: int) -> None:
        super().__init__()
        channels, height, wide = shape
        if channels == 1:
            self.trunk = nn.Sequential(
                nn.Flatten(), nn.Linear(height * wide, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            )  # fmt: skip
        else:
            layers: list[nn.Module] = []
            for inputs, outputs in zip((channels, width, width, width), (width, width, width, width), strict=True):
                layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
            left = width * math.ceil(height / 16) * math.ceil(wide / 16)
            self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(left, 10 * width), nn.ReLU())
            width = 10 * width
        self.head = nn.Linear(width, tasks * classes)
        self.tasks, self.classes = tasks, classes
        self.examples = 0
        """Images whose gradient was computed, counted where they pass."""

    def forward(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Images (N, channels, height, width) and tasks, int64 (N,), to logits (N, classes) of each one's head."""
        if torch.is_grad_enabled():
            self.examples += len(images)
        logits = self.head(self.trunk(images)).view(-1, self.tasks, self.classes)
        return logits[torch.arange(len(tasks)), tasks]


class Learning:
    """A run under way. What follows from the settings is made anew; the rest is `state()`.

    Raises UserError for values that an optimizer does not take.
    """

    def __init__(self, settings: Settings, run: Run, tasks: Sequence[Dataset]) -> None:
        self.settings, self.run, self.tasks = settings, run, tasks
        stream = STREAMS[settings.stream]
        torch.manual_seed(run.seed)
        self.model = MultiHead(tasks[0].train_images.shape[1:], stream.tasks, stream.classes, settings.width)
        chosen, _ = options.parse([])
        for name, value in asdict(run).items():
            if value is not None and hasattr(chosen, name) and name != "method":
                setattr(chosen, name, value)
        try:
            self.optimizer = METHODS[run.method].make(SGD(self.model.parameters(), lr=run.lr), chosen)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{run.name}: {error}") from error
        self.memory = Reservoir(settings.memory, seed=run.seed)
        self.learner = None
        if run.way == "cmaml":
            assert run.inner_lr is not None
            self.learner = CMAML(
                self.model, F.cross_entropy, self.memory, inner_lr=run.inner_lr, replay=settings.replay
            )  # fmt: skip
        self.epochs = 0
        """That are done, over all tasks."""
        self.table: list[list[float]] = []
        """After each task the accuracy on all tasks so far, fractions."""
        self.seconds = 0.0
        """Of the processor, spent in steps."""

    @property
    def finished(self) -> bool:
        """Whether all tasks were learnt."""
        return len(self.table) == len(self.tasks)

    def epoch(self) -> None:
        """One epoch of the task whose turn it is; after its last one the accuracies."""
        task, epoch = divmod(self.epochs, self.settings.epochs)
        images, labels = self.tasks[task].train_images, self.tasks[task].train_labels
        generator = seeded_generator(self.run.seed, "order", task, epoch)
        start = time.process_time()
        for batch in torch.randperm(len(labels), generator=generator).split(self.settings.batch_size):
            self.step(images[batch], labels[batch], task, first=epoch == 0)
        self.seconds += time.process_time() - start
        self.epochs += 1
        if epoch == self.settings.epochs - 1:
            with methods.evaluated(self.optimizer), torch.no_grad():
                self.table.append([self.accuracy(j) for j in range(task + 1)])

    def step(self, images: Tensor, labels: Tensor, task: int, first: bool) -> None:
        """One step on a minibatch, which the memory is offered in the `first` epoch, when it is new."""
        if self.learner is not None:
            self.learner.step(self.optimizer, images, labels, task, remember=first)
            return
        batch = of_task(images, labels, task)
        replayed = self.memory.sample(self.settings.replay) if self.run.way == "replay" else None
        both = batch if replayed is None else replayed.joined(batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(both.inputs, both.tasks), both.targets)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        if first and self.run.way == "replay":
            self.memory.push(batch)

    def accuracy(self, task: int) -> float:
        """The fraction of the held-out images of a task that the network gets right with the head of that task."""
        images, labels = self.tasks[task].test_images, self.tasks[task].test_labels
        right = 0
        for x, y in zip(images.split(1000), labels.split(1000), strict=True):
            right += int((self.model(x, torch.full((len(x),), task)).argmax(1) == y).sum())
        return right / len(labels)

    def result(self) -> dict[str, Any]:
        """Of a finished run, as plain values for JSON."""
        return {
            "run": asdict(self.run),
            "accuracy": average_accuracy(self.table),
            "forgetting": forgetting(self.table),
            "table": self.table,
            "examples": self.model.examples,
            "seconds": self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on as though it had not stopped."""
        return {
            "run": asdict(self.run), "epochs": self.epochs, "table": self.table, "seconds": self.seconds,
            "examples": self.model.examples, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "memory": self.memory.state_dict(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state()` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"])
        self.epochs, self.table, self.seconds = state["epochs"], state["table"], state["seconds"]
        self.model.examples = state["examples"]


def perform(learning: Learning, path: Path, every: float, advance: Callable[[], object]) -> dict[str, Any]:
    """Goes on with a run to its end and returns its result; `advance` is called after each epoch.

    The state is written to `path` after an epoch if `every` seconds have passed since the last time, and what is there
    of the same run is where this begins. The file is removed by whoever has written down the result.
    """
    state = _read(path)
    if state is not None and state["run"] == asdict(learning.run):
        learning.load(state)
    saved = time.monotonic()
    while not learning.finished:
        learning.epoch()
        advance()
        if time.monotonic() - saved >= every:
            with replacing(path) as file:
                torch.save(learning.state(), file)
            saved = time.monotonic()
    return learning.result()


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint, or None where there is none. UserError for a damaged one."""
    with suppress(FileNotFoundError):
        try:
            state = torch.load(path, weights_only=True)
            if not isinstance(state, dict) or "run" not in state:
                raise ValueError
        except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path}: not a checkpoint, or a damaged one; remove it to begin that run anew") from error
        return state
    return None
