"""What the methods of one run share: device, data, network, first weights, training, measures."""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import data
from benchmarks.checkpoint import Record
from benchmarks.data import Dataset
from benchmarks.files import UserError
from benchmarks.methods import METHODS
from benchmarks.models import ResidualNetwork
from lookbehind_fused import analysis


class Job:
    """Everything of a run that stays the same from step to step; made from the options, it touches no file but data.

    Args:
        options: those of the main job.
        images: instead of those that the options name.

    Raises UserError for whatever the options ask that cannot be had.
    """

    def __init__(self, options: argparse.Namespace, images: Dataset | None = None) -> None:
        self.options = options
        if threads := options.threads or (1 if options.data == "digits" else None):
            torch.set_num_threads(threads)
        self.device = _open_device(options.device)

        if images is None:
            images = data.load(options.data, options.data_dir, options.limit)
            images = data.with_label_noise(images, options.label_noise, options.seed)
        self.fingerprint = images.fingerprint()
        self.data = images.to(self.device)
        self.batch_size = min(options.batch_size, len(images.train_labels))
        self.steps_per_epoch = len(images.train_labels) // self.batch_size
        self.total_steps = options.epochs * self.steps_per_epoch
        self._order: tuple[int, Sequence[Tensor]] = (-1, ())  # an epoch and its minibatches

        torch.manual_seed(options.seed)
        channels = images.train_images.shape[1]
        self.model = ResidualNetwork(channels, data.CLASSES, options.width, options.depth).to(self.device)
        self._first_weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for method in METHODS:  # what an optimizer rejects is found now, before anything is written
            self.make_optimizer(method)
        if self.batch_size % options.microbatches:
            raise UserError(
                f"--microbatches: expected a divisor of the batch size, {self.batch_size}, got {options.microbatches}"
            )
        self.forward = self._compile() if options.compile else self.model

    def reset(self) -> None:
        """Back to the first weights and the first random numbers, where every method starts."""
        torch.manual_seed(self.options.seed)
        self.model.load_state_dict(self._first_weights)
        self.model.zero_grad()

    def make_optimizer(self, method: str) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of `method` and its learning-rate schedule, stepped after every outer step."""
        chosen = self.options
        base = SGD(
            self.model.parameters(), lr=chosen.lr, momentum=chosen.momentum, weight_decay=chosen.weight_decay
        )  # fmt: skip
        try:
            optimizer = METHODS[method].make(base, chosen)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(f"{METHODS[method].label}: {first_line(error)}") from error
        if chosen.schedule == "constant":
            return optimizer, LambdaLR(optimizer, lambda step: 1.0)
        return optimizer, LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / self.total_steps)) / 2)

    def batch(self, number: int) -> Tensor:
        """Indices of the images of the minibatch of this number, counted over all epochs.

        They follow from seed and number alone, so nothing of it has to be saved.
        """
        epoch, place = divmod(number, self.steps_per_epoch)
        if epoch != self._order[0]:
            generator = data.seeded_generator(self.options.seed, "order", epoch)
            order = torch.randperm(len(self.data.train_labels), generator=generator).to(self.device)
            self._order = epoch, order.split(self.batch_size)
        return self._order[1][place]

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy, 0-dim, over the training images with these indices."""
        with self.autocast():
            return F.cross_entropy(self.forward(self.data.train_images[batch]), self.data.train_labels[batch])

    def autocast(self) -> AbstractContextManager[Any]:
        """Around the forward passes that train."""
        dtype = self.options.autocast
        return torch.autocast(self.device.type, getattr(torch, dtype)) if dtype else nullcontext()

    def train(
        self,
        method: str,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        record: Record,
        stop: int,
        advance: Callable[[], object],
    ) -> None:
        """Outer steps until `record.step` is `stop`, `advance` called after each.

        Nothing here waits for the device until the end.
        """
        minibatches = self.options.k if METHODS[method].switches else 1
        losses: list[Tensor] = []
        alphas: list[Tensor] = []
        start = time.perf_counter()
        while record.step < stop:
            calls = itertools.count()

            def closure(evaluation: Any = None, calls: Iterator[int] = calls) -> Tensor:
                optimizer.zero_grad()
                inner = min(next(calls), minibatches - 1)
                batch = self.batch(minibatches * record.step + inner)
                loss = self.loss(batch if evaluation is None else evaluation.part(batch))
                loss.backward()
                record.evaluations += 1 if evaluation is None else evaluation.fraction
                return loss

            losses.append(optimizer.step(closure).detach())
            scheduler.step()
            if diagnostics := getattr(optimizer, "diagnostics", None):
                alphas.append(diagnostics["alpha"].float().mean())
            record.step += 1
            advance()
        self.synchronize()
        record.seconds += time.perf_counter() - start
        record.loss += torch.stack(losses).tolist()
        if alphas:
            record.alpha += torch.stack(alphas).tolist()

    def estimate_statistics(self) -> None:
        """BatchNorm's running statistics anew, over an epoch's batches, under the weights as they are."""
        batches = (self.data.train_images[self.batch(number)] for number in range(self.steps_per_epoch))
        analysis.estimate_statistics(self.model, batches)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The fraction of these images that the network as it stands gets right."""
        with torch.no_grad():
            self.model.eval()
            pairs = zip(images.split(1000), labels.split(1000), strict=True)
            right = sum((self.model(x).argmax(1) == y).sum() for x, y in pairs)
            self.model.train()
        return int(right) / len(labels)

    def test_accuracy(self) -> float:
        """The fraction of the test images that the network as it stands gets right."""
        return self.accuracy(self.data.test_images, self.data.test_labels)

    def sharpness(self, radii: Sequence[float], adaptive: bool, limit: int = 512) -> list[float]:
        """m-sharpness at each radius, m being the batch size, over about the first `limit` training images."""
        size = self.batch_size
        count = min(max(1, limit // size), self.steps_per_epoch) * size
        batches = self._batches(self.data.train_images, self.data.train_labels, size, count)
        return analysis.sharpness(
            self.model, F.cross_entropy, batches, radii, adaptive=adaptive, eta=self.options.eta
        ).tolist()

    def noise_robustness(self, levels: Sequence[float], samples: int, limit: int = 1000) -> list[list[float]]:
        """Accuracy for each level of noise in the weights and each sample, over the first `limit` test images.

        BatchNorm's statistics are estimated anew on as many training images.
        """
        size = 250  # the larger the batch, the faster; statistics want not too few
        images = self._batches(self.data.test_images, self.data.test_labels, size, limit)
        statistics = self._batches(self.data.train_images, self.data.train_labels, size, limit)
        return analysis.noise_robustness(
            self.model, images, levels, samples=samples, statistics_loader=statistics
        ).tolist()

    def _batches(self, images: Tensor, labels: Tensor, size: int, limit: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(images[:limit].split(size), labels[:limit].split(size), strict=True))

    def synchronize(self) -> None:
        """Waits for the device, for a true time."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def describe(self) -> str:
        """The job in one line."""
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = "x".join(map(str, self.data.train_images.shape[1:]))
        return (
            f"{self.options.data}: {len(self.data.train_labels):,} training and {len(self.data.test_labels):,} test "
            f"images of {shape}; {parameters:,} parameters; {self.total_steps:,} steps a method"
        )

    def _compile(self) -> nn.Module:
        """The compiled network, after one trial so that a missing compiler shows now and no method pays for it."""
        compiled = torch.compile(self.model)
        batch = torch.arange(self.batch_size, device=self.device)
        try:
            with self.autocast():
                loss = F.cross_entropy(compiled(self.data.train_images[batch]), self.data.train_labels[batch])
            loss.backward()
        except Exception as error:  # torch.compile may fail with anything
            raise UserError(
                f"--compile: torch.compile failed (is there a C++ compiler?): {first_line(error)}"
            ) from error
        return compiled


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _open_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # nothing but use shows whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    if device.type == "cuda":  # the same seed is to give the same bits here too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device
