"""The vision transformer's job: halves of the classes, pre-training, fine-tuning."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from benchmarks import data
from benchmarks.data import Dataset, seeded_generator
from benchmarks.files import UserError, replacing
from benchmarks.transformers.plan import Run, Settings
from benchmarks.transformers.study import Study
from benchmarks.transformers.training import train
from benchmarks.transformers.vit.model import VisionTransformer

PRETRAINED = "pretrained.pt"
PRETRAINING = Run("pretrain", "base", 0, lr=1e-3)


@dataclass(frozen=True)
class VitSettings(Settings):
    """What is the vision transformer's own."""

    data: str = "fashion-mnist"
    """Or `digits`."""
    classes: tuple[int, ...] = (0, 2, 3, 4, 6)
    """Fine-tuned on: of Fashion-MNIST those that look alike; pre-trained on the others."""
    pretraining: int = 20_000
    """Images, the first ones of their classes."""
    pretraining_epochs: int = 10
    training: int = 1000
    """Images to fine-tune on, the first ones of their classes."""
    validation: int = 2000
    """The next ones."""
    epochs: int = 20
    batch_size: int = 64
    patch: int = 4
    width: int = 48
    depth: int = 4
    heads: int = 4


DEFAULT = VitSettings(
    seeds=(0, 1, 2, 3, 4),
    tuning_seeds=(100,),
    learning_rates=(0.003, 0.01, 0.03),
    sam_rhos=(0.005, 0.01, 0.02, 0.05),
    asam_rhos=(0.05, 0.1, 0.2, 0.5),
    ks=(2, 5),
    alphas=(0.5,),
    switch=False,
    checkpoint_every=50,
)
QUICK = VitSettings(
    seeds=(0, 1),
    tuning_seeds=(100,),
    learning_rates=(0.03, 0.1),
    sam_rhos=(0.05,),
    asam_rhos=(0.5,),
    ks=(2,),
    alphas=(0.5,),
    switch=False,
    checkpoint_every=2,
    data="digits",
    pretraining=128,
    pretraining_epochs=2,
    training=128,
    validation=64,
    epochs=2,
    patch=2,
    width=16,
    depth=1,
    heads=2,
)


class Vit(Study):
    """Fine-tuning by SGD, accuracy.

    Args:
        settings: of the job.
        folder: of the data, None for the default one.

    Raises UserError for data that are not there, and for settings that ask for more images than there are.
    """

    name = "vit"
    title = "Fine-tuning a vision transformer"
    base = "SGD"
    measure = "accuracy, %"
    unit = "points"
    scale = 100.0
    claim: ClassVar[str] = """
        where a pre-trained vision transformer is fine-tuned with SGD, Lookbehind on top of SAM and ASAM is more
        accurate than SAM and ASAM (Mordido et al. 2024, on transformers)."""

    def __init__(self, settings: VitSettings, folder: str | None = None) -> None:
        self.settings = settings
        self.folder = folder
        for part, images in zip(("pre-training", "fine-tuning"), self.halves(), strict=True):
            wanted = settings.pretraining if part == "pre-training" else settings.training + settings.validation
            if len(images.train_labels) < wanted:
                raise UserError(f"{part}: expected at least {wanted} images, got {len(images.train_labels)}")

    def halves(self) -> tuple[Dataset, Dataset]:
        """What is pre-trained on, and what is fine-tuned on."""
        return _halves(self.settings.data, self.folder, self.settings.classes)

    def fingerprint(self) -> str:
        """Of both halves."""
        return hashlib.sha256("".join(half.fingerprint() for half in self.halves()).encode()).hexdigest()

    def preparation(self, folder: Path) -> int:
        """See Study."""
        return 0 if (folder / PRETRAINED).exists() else PretrainingTask(self.settings, self.halves()[0]).minibatches

    def prepare(self, folder: Path) -> None:
        """The pre-trained weights, which all runs begin with."""
        path = folder / PRETRAINED
        if path.exists():
            return
        half, checkpoint = self.halves()[0], folder / f"{PRETRAINING.name}.pt"
        task = PretrainingTask(self.settings, half)
        with tqdm(total=task.minibatches, desc="pre-training", unit=" step", disable=None) as bar:
            train(task, PRETRAINING, self.settings, checkpoint, bar.update)
        with replacing(path) as file:
            weights = task.model.state_dict()
            torch.save({"weights": weights, "accuracy": accuracy(task.model, half.test_images, half.test_labels)}, file)
        checkpoint.unlink()

    def trial(self) -> "FineTuningTask":
        """See Study. The weights are untrained."""
        return FineTuningTask(self.settings, self.halves()[1], 0, 1, {})

    def task(self, run: Run, folder: Path) -> "FineTuningTask":
        """See Study."""
        weights = torch.load(folder / PRETRAINED, weights_only=True)["weights"]
        return FineTuningTask(self.settings, self.halves()[1], run.seed, run.times, weights)

    def score(self, task: "FineTuningTask", run: Run) -> float:
        """Accuracy, a fraction."""
        half, first = self.halves()[1], self.settings.training
        if run.purpose == "final":
            return accuracy(task.model, half.test_images, half.test_labels)
        until = first + self.settings.validation
        return accuracy(task.model, half.train_images[first:until], half.train_labels[first:until])

    def references(self) -> dict[str, float]:
        """What the commonest class is worth."""
        labels = self.halves()[1].test_labels
        return {"always the same class": torch.bincount(labels).max().item() / len(labels)}

    def setting(self) -> str:
        """See Study."""
        s, (before, after) = self.settings, self.halves()
        name = {"fashion-mnist": "Fashion-MNIST", "digits": "8x8 handwritten digits"}[s.data]
        task = PretrainingTask(s, before)
        parameters = sum(p.numel() for p in task.model.parameters())
        others = [label for label in range(data.CLASSES) if label not in s.classes]
        return f"""
            {name}: a vision transformer of width {s.width} with {s.depth} layers, patches of {s.patch}x{s.patch} pixels
            and {parameters:,} parameters, pre-trained once, by AdamW for {s.pretraining_epochs} epochs, on
            {s.pretraining:,} images of the classes {_list(others)}; then, with a new head, fine-tuned on {s.training:,}
            images of the classes {_list(s.classes)} for {s.epochs} epochs of minibatches of {s.batch_size} by SGD with
            momentum 0.9 and a cosine schedule. {s.validation:,} further images validate, {len(after.test_labels):,}
            test. The seed decides the new head and the order.
        """


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


@lru_cache(maxsize=1)
def _halves(name: str, folder: str | None, classes: tuple[int, ...]) -> tuple[Dataset, Dataset]:
    images = data.load(name, folder)
    others = tuple(label for label in range(data.CLASSES) if label not in classes)
    return _only(images, others), _only(images, classes)


def _only(images: Dataset, classes: tuple[int, ...]) -> Dataset:
    """The images of these classes, labelled 0, 1, ..."""
    new = torch.full((data.CLASSES,), -1)
    new[list(classes)] = torch.arange(len(classes))
    train_labels, test_labels = new[images.train_labels], new[images.test_labels]
    train_chosen, test_chosen = train_labels >= 0, test_labels >= 0
    return Dataset(
        images.train_images[train_chosen], train_labels[train_chosen],
        images.test_images[test_chosen], test_labels[test_chosen],
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction that the model gets right."""
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return sum((model(x).argmax(1) == y).sum().item() for x, y in pairs) / len(labels)


class ImageTask:
    """Minibatches of images in a new order each epoch, the last, partial one dropped. See Task."""

    def __init__(self, settings: VitSettings, images: Dataset, limit: int, seed: int, epochs: int) -> None:
        self._images, self._labels = images.train_images[:limit], images.train_labels[:limit]
        self._size, self._seed = settings.batch_size, seed
        self._order: tuple[int, Sequence[Tensor]] = (-1, ())  # an epoch and its minibatches
        self._each = len(self._labels) // self._size
        self.minibatches = self._each * epochs
        torch.manual_seed(seed)
        _, channels, size, _ = self._images.shape
        classes = int(images.test_labels.max()) + 1
        self.model = VisionTransformer(
            channels, size, settings.patch, classes, settings.width, settings.depth, settings.heads
        )

    def loss(self, number: int) -> Tensor:
        """See Task."""
        epoch, place = divmod(number, self._each)
        if epoch != self._order[0]:
            generator = seeded_generator(self._seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self._labels), generator=generator).split(self._size)
        batch = self._order[1][place]
        return F.cross_entropy(self.model(self._images[batch]), self._labels[batch])

    def schedule(self, fraction: float) -> float:
        """See Task."""
        return (1 + math.cos(math.pi * fraction)) / 2


class PretrainingTask(ImageTask):
    """See Task."""

    def __init__(self, settings: VitSettings, images: Dataset) -> None:
        super().__init__(settings, images, settings.pretraining, PRETRAINING.seed, settings.pretraining_epochs)

    def base(self, lr: float) -> Optimizer:
        """See Task."""
        return AdamW(self.model.parameters(), lr=lr, weight_decay=0.05)


class FineTuningTask(ImageTask):
    """See Task. The pre-trained `weights`, but for the head, which is new."""

    def __init__(
        self, settings: VitSettings, images: Dataset, seed: int, times: int, weights: dict[str, Tensor]
    ) -> None:  # fmt: skip
        super().__init__(settings, images, settings.training, seed, settings.epochs * times)
        body = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
        self.model.load_state_dict({**self.model.state_dict(), **body})

    def base(self, lr: float) -> Optimizer:
        """See Task."""
        return SGD(self.model.parameters(), lr=lr, momentum=0.9)
