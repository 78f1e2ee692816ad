"""Streams of tasks: transformed images of one data set, or its classes a few at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import data
from benchmarks.data import Dataset, seeded_generator
from benchmarks.files import UserError
from benchmarks.lifelong import files


@dataclass(frozen=True)
class Stream:
    """One row of the table of streams."""

    label: str
    source: str
    """Where its images come from: fashion-mnist, digits, cifar100 or tiny-imagenet."""
    tasks: int
    classes: int
    """Of each task."""
    transform: str | None = None
    """`rotation` or `permutation` of all images of a task; None: each task has classes of its own."""


SMALL = "Fashion-MNIST averaged over 2x2 pixels"
STREAMS = {
    "rotations": Stream(f"{SMALL}, rotated by 9° a task", "fashion-mnist", 20, 10, "rotation"),
    "permutations": Stream(f"{SMALL}, pixels permuted anew in each task", "fashion-mnist", 20, 10, "permutation"),
    "pairs": Stream(f"{SMALL}, two classes a task", "fashion-mnist", 5, 2),
    "cifar100": Stream("Split-CIFAR100", "cifar100", 20, 5),
    "tiny-imagenet": Stream("Split-TinyImageNet", "tiny-imagenet", 20, 10),
    "digits": Stream("8x8 handwritten digits, rotated by 9° a task", "digits", 3, 10, "rotation"),
}  # fmt: skip
DEGREES = 9.0
"""From one rotated task to the next: 20 tasks make half a turn."""


@dataclass(frozen=True)
class Sizes:
    """How many images a task has."""

    training: int
    validation: int
    test: int


def make(name: str, folder: str | None, sizes: Sizes, seed: int, tasks: int, validate: bool) -> list[Dataset]:
    """The first `tasks` tasks of a stream, images standardised as in `benchmarks.data`, labels from 0 in each task.

    `seed` decides which images each task has, and the permutations. No image is in two tasks. `validate`: validation
    images, which are training images that are not trained on, take the place of the test images, of which none is
    looked at then.

    Raises UserError for files that are missing or wrong, and for more images than there are.
    """
    stream = STREAMS[name]
    images = load(stream.source, folder)
    held_out = images.train_labels if validate else images.test_labels
    drawn: list[Dataset] = []
    for task, (train, validation, test) in enumerate(_chosen(stream, images, sizes, seed)[:tasks]):
        others = validation if validate else test
        pixels = images.train_images if validate else images.test_images
        first = 0 if stream.transform else task * stream.classes
        drawn.append(
            Dataset(
                _transformed(stream, images.train_images[train], task, seed),
                images.train_labels[train] - first,
                _transformed(stream, pixels[others], task, seed),
                held_out[others] - first,
            )
        )
    return drawn


def fingerprint(tasks: Sequence[Dataset]) -> str:
    """SHA-256 over the fingerprints of the tasks, in hex."""
    return hashlib.sha256("".join(task.fingerprint() for task in tasks).encode()).hexdigest()


@lru_cache(maxsize=1)
def load(source: str, folder: str | None) -> Dataset:
    """All images of a source in the size that is trained on, each channel of mean 0 and variance 1 over the training
    images; Fashion-MNIST is averaged over 2x2 pixels.
    """
    if source in ("fashion-mnist", "digits"):
        images = data.load(source, folder)
        if source == "digits":
            return images
        return Dataset(
            F.avg_pool2d(images.train_images, 2), images.train_labels,
            F.avg_pool2d(images.test_images, 2), images.test_labels,
        )  # fmt: skip
    if folder is None:
        raise UserError(f"--stream {source} needs --data-dir: the folder that its archive was unpacked into")
    train, test = files.cifar100(Path(folder)) if source == "cifar100" else files.tiny_imagenet(Path(folder))
    count = train.images.size / train.images.shape[1]
    mean = train.images.sum((0, 2, 3), dtype=np.float64, keepdims=True) / count
    squares = sum(np.square(images, dtype=np.float64).sum((1, 2), keepdims=True) for images in train.images)[None]
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    scaled = []
    for part in (train, test):
        pixels = part.images.astype(np.float32)
        pixels -= mean.astype(np.float32)  # in place: Tiny ImageNet is 5 GB
        pixels /= std.astype(np.float32)
        scaled += [torch.from_numpy(pixels), torch.from_numpy(part.labels)]
    return Dataset(*scaled)


def _chosen(stream: Stream, images: Dataset, sizes: Sizes, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each task the indices of its training, validation and test images."""
    found = []
    for task in range(stream.tasks):
        pools = []
        for part, labels in (("train", images.train_labels), ("test", images.test_labels)):
            order = torch.randperm(len(labels), generator=seeded_generator(seed, "images", part))
            if stream.transform:
                pools.append(order[task :: stream.tasks])
            else:
                first = task * stream.classes
                own = (labels[order] >= first) & (labels[order] < first + stream.classes)
                pools.append(order[own])
        train, test = pools
        for name, wanted, there in (
            ("training and validation", sizes.training + sizes.validation, len(train)),
            ("test", sizes.test, len(test)),
        ):
            if wanted > there:
                raise UserError(f"{stream.label}: task {task} has {there} {name} images, {wanted} are asked for")
        found.append((train[: sizes.training], train[sizes.training :][: sizes.validation], test[: sizes.test]))
    return found


def _transformed(stream: Stream, images: Tensor, task: int, seed: int) -> Tensor:
    if stream.transform == "permutation":
        pixels = images[0, 0].numel()
        order = torch.randperm(pixels, generator=seeded_generator(seed, "permutation", task))
        return images.flatten(2)[:, :, order].view_as(images)
    if stream.transform == "rotation":
        return rotated(images, DEGREES * task)
    return images


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images (N, channels, side, side) turned about their middle, bilinear; what comes in is as the edge."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
