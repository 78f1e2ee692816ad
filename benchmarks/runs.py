"""Single training runs of a comparison: what they share, what each one is, and performing one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch.nn.functional as F
from torch.optim import Optimizer

from benchmarks import data, methods, options
from benchmarks.checkpoint import Record
from benchmarks.data import Dataset
from benchmarks.job import Job
from benchmarks.methods import METHODS


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share. What is not here is the main job's default."""

    data: str
    """`fashion-mnist`, averaged over 2x2 pixels, or `digits`."""
    training: int
    """So many of the training images are trained on, the first ones."""
    validation: int
    """The next ones: they choose learning rate, rho, k and alpha, and nothing else is done with them."""
    epochs: int
    """Of every method, where nothing else is said."""
    label_noise: float
    """Fraction of wrong labels among training and validation images."""
    seeds: tuple[int, ...]
    """Of the final runs. Each one decides weights, order and label noise."""
    tuning_seeds: tuple[int, ...]
    """Of the runs that choose: others."""
    width: int = 8
    batch_size: int = 64
    sam_radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    """Where the final weights' sharpness is measured."""
    asam_radii: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    noise_samples: int = 5
    looks: int = 10
    """How often a final run's test accuracy is measured on its way, in even distances."""


class Seeded(Protocol):
    """What a run of any comparison has."""

    purpose: str
    seed: int


@dataclass(frozen=True)
class Run:
    """One training run.

    `purpose`: "tune" is judged on validation images; "explore" too, and its sharpness is measured; "final" is judged
    on test images.
    """

    purpose: str
    method: str
    seed: int
    lr: float
    epochs: int
    asam: bool = False
    rho: float | None = None
    k: int | None = None
    alpha: float | None = None
    microbatches: int | None = None
    sam_epochs: int | None = None
    """Of Lookbehind: so many epochs at the beginning are SAM's (k = 1, alpha = 1); a negative number: at the end."""

    @property
    def name(self) -> str:
        """Of its file."""
        ball = "asam" if self.asam else "sam"
        parts = [self.purpose, self.method, *([ball] if self.rho is not None else [])]
        parts += [
            f"{name}{value:g}" for name in ("rho", "k", "alpha", "microbatches", "sam_epochs", "lr", "epochs", "seed")
            if (value := getattr(self, name)) is not None
        ]  # fmt: skip
        return "-".join(parts)

    @property
    def cost(self) -> float:
        """Gradient evaluations, in units of an epoch's minibatches. Those of microbatches count as they are."""
        times_k, more = METHODS[self.method].gradients
        a_step = times_k * (self.k or 0) + more
        sam = abs(self.sam_epochs or 0)
        return (self.microbatches or 1) * (2 * sam + (self.epochs - sam) * a_step)


Result = Mapping[str, Any]
"""What `perform` returns."""
Done = Mapping[str, Result]
"""The results there are, by the name of the run."""


@lru_cache(maxsize=1)
def load(setting: Setting) -> Dataset:
    """The images, with their own labels, in the size that is trained on."""
    needed = setting.training + setting.validation
    if setting.data == "digits":
        images = data.load("digits")
        return replace(images, train_images=images.train_images[:needed], train_labels=images.train_labels[:needed])
    images = data.load(setting.data, limit=max(needed, 10_000))
    return replace(
        images,
        train_images=F.avg_pool2d(images.train_images[:needed], 2),
        train_labels=images.train_labels[:needed],
        test_images=F.avg_pool2d(images.test_images, 2),
    )


def images_of(setting: Setting, run: Seeded, images: Dataset) -> Dataset:
    """What a run is given: but for final runs, validation images with noisy labels take the test images' place."""
    noisy = data.with_label_noise(images, setting.label_noise, run.seed)
    n = setting.training
    seen = replace(noisy, train_images=noisy.train_images[:n], train_labels=noisy.train_labels[:n])
    if run.purpose == "final":
        return seen
    return replace(seen, test_images=noisy.train_images[n:], test_labels=noisy.train_labels[n:])


def job_of(setting: Setting, own: Mapping[str, Any], images: Dataset) -> Job:
    """The main job before a run; `own` are its options, and what is no option has no effect."""
    chosen, _ = options.parse(["--data", setting.data, "--threads", "1"])
    shared = {name: getattr(setting, name) for name in ("width", "batch_size", "label_noise")}
    for name, value in {**shared, **own}.items():
        if hasattr(chosen, name):
            setattr(chosen, name, value)
    job = Job(chosen, images)
    job.reset()
    return job


def perform(setting: Setting, run: Run, images: Dataset | None = None) -> Result:
    """Trains and measures. `images`: instead of those that the setting names.

    BatchNorm's statistics are estimated anew before anything is measured: a sharpness-aware step updates the running
    averages at perturbed weights too, differently in each method. (Training itself does not use them.)

    Returns plain values for JSON: None is a number that was not finite.
    """
    own = {name: value for name, value in asdict(run).items() if value is not None and name != "method"}
    job = job_of(setting, own, images_of(setting, run, images or load(setting)))
    record = Record(job.steps_per_epoch)
    optimizer, scheduler = job.make_optimizer(run.method)
    history = []
    for stop in _stops(setting, run, job):
        if run.sam_epochs is not None:
            _choose_stage(optimizer, run, record.step // job.steps_per_epoch)
        job.train(run.method, optimizer, scheduler, record, stop, lambda: None)
        with methods.evaluated(optimizer):
            if run.purpose == "final" or stop == job.total_steps:
                job.estimate_statistics()
            if run.purpose == "final":
                history.append((record.evaluations, job.accuracy(*_some(job.data.test_images, job.data.test_labels))))
    last = record.loss[-job.steps_per_epoch :]
    with methods.evaluated(optimizer):
        result = {
            "accuracy": job.test_accuracy(),
            "loss": sum(last) / len(last),
            "evaluations": record.evaluations,
            "seconds": record.seconds,
        }
        if run.purpose == "explore":
            result |= {"sam_sharpness": job.sharpness(setting.sam_radii, adaptive=False)}
        if run.purpose == "final":
            result |= {
                "training_accuracy": job.accuracy(job.data.train_images, job.data.train_labels),
                "sam_sharpness": job.sharpness(setting.sam_radii, adaptive=False) if setting.sam_radii else [],
                "asam_sharpness": job.sharpness(setting.asam_radii, adaptive=True) if setting.asam_radii else [],
                "noise": job.noise_robustness(setting.noise_levels, setting.noise_samples)
                if setting.noise_levels
                else [],
                "history": history,
                "alpha": _means(record.alpha, len(history)),
            }
    return _json_value({"run": asdict(run), **result})


def _stops(setting: Setting, run: Run, job: Job) -> list[int]:
    """Steps after which training pauses: to be looked at, or to go over to another stage."""
    looks = min(setting.looks, run.epochs) if run.purpose == "final" else 1
    epochs = {round((look + 1) * run.epochs / looks) for look in range(looks)}
    if run.sam_epochs is not None:
        epochs.add(run.sam_epochs % run.epochs)
    return [epoch * job.steps_per_epoch for epoch in sorted(epochs)]


def _choose_stage(optimizer: Optimizer, run: Run, epoch: int) -> None:
    """k and alpha of the stage that begins with `epoch`. The base optimizer's state goes on."""
    border = run.sam_epochs % run.epochs
    is_sam = epoch < border if run.sam_epochs > 0 else epoch >= border
    optimizer.k, optimizer.alpha = (1, 1.0) if is_sam else (run.k, run.alpha)


def _some(images: Any, labels: Any, limit: int = 1000) -> tuple[Any, Any]:
    return images[:limit], labels[:limit]


def _means(values: list[float], parts: int) -> list[float]:
    """Of `parts` consecutive parts, as equal as can be; none of no values."""
    if not values:
        return []
    edges = [round(part * len(values) / parts) for part in range(parts + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value: Any) -> Any:
    """Of a result: JSON's null back to NaN, and its lists to tuples."""
    if isinstance(value, list):
        return tuple(numbers(entry) for entry in value)
    return math.nan if value is None else value


def mean_accuracy(runs: list[Run], done: Done) -> float:
    """The mean over runs of their accuracy on held-out images."""
    return sum(done[run.name]["accuracy"] for run in runs) / len(runs)
