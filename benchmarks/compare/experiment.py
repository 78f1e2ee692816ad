"""The comparison's settings, the training runs that it consists of, and one such run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from benchmarks import data, methods, options
from benchmarks.checkpoint import Record
from benchmarks.data import Dataset
from benchmarks.job import Job
from benchmarks.methods import METHODS


@dataclass(frozen=True)
class Settings:
    """Everything that decides about the numbers. What is not here is the main job's default."""

    data: str
    """`fashion-mnist`, averaged over 2x2 pixels, or `digits`."""
    training: int
    """So many of the training images are trained on, the first ones."""
    validation: int
    """The next ones: they choose learning rate, rho, k and alpha, and nothing else is done with them."""
    epochs: int
    """Of every method; longer SGD runs apart."""
    label_noise: float = 0.2
    """Fraction of wrong labels among training and validation images."""
    width: int = 8
    batch_size: int = 64
    seeds: int = 3
    """Each one decides weights, order and label noise; they are 0, 1, ..."""
    learning_rates: tuple[float, ...] = (0.05, 0.1, 0.2)
    sam_rhos: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    asam_rhos: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 4.0)
    ks: tuple[int, ...] = (2, 5, 10)
    alphas: tuple[float, ...] = (0.2, 0.5, 0.8)
    multistep_ks: tuple[int, ...] = (2, 5)
    lookahead_ks: tuple[int, ...] = (5, 10)
    lookahead_alphas: tuple[float, ...] = (0.5, 0.8)
    sam_radii: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    """Where the final weights' sharpness is measured."""
    asam_radii: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    noise_levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    noise_samples: int = 10


FASHION_MNIST = Settings("fashion-mnist", training=2000, validation=2000, epochs=32)
DIGITS = Settings("digits", training=1000, validation=343, epochs=64)
QUICK = Settings(
    "digits", training=256, validation=128, epochs=2, width=4, seeds=1, learning_rates=(0.1, 0.2),
    sam_rhos=(0.05, 0.2), asam_rhos=(0.5, 2.0), ks=(2, 3), alphas=(0.5,), multistep_ks=(2,), lookahead_ks=(2, 5),
    lookahead_alphas=(0.5,), sam_radii=(0.1, 0.5), asam_radii=(1.0, 4.0), noise_levels=(0.0, 0.2), noise_samples=2,
)  # fmt: skip


def default_data() -> str:
    """Fashion-MNIST where it is installed."""
    return "fashion-mnist" if Path(data.FASHION_MNIST_DIR).is_dir() else "digits"


@dataclass(frozen=True)
class Run:
    """One training run. `purpose`: "tune" is judged on validation images, "final" on test images."""

    purpose: str
    method: str
    seed: int
    lr: float
    epochs: int
    asam: bool = False
    rho: float | None = None
    k: int | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        ball = "asam" if self.asam else "sam"
        parts = [self.purpose, self.method, *([ball] if self.rho is not None else [])]
        parts += [
            f"{name}{value:g}" for name in ("rho", "k", "alpha", "lr", "epochs", "seed")
            if (value := getattr(self, name)) is not None
        ]  # fmt: skip
        return "-".join(parts)

    @property
    def cost(self) -> float:
        """Gradient evaluations, in units of an epoch."""
        times_k, more = METHODS[self.method].gradients
        return self.epochs * (times_k * (self.k or 0) + more)


Result = Mapping[str, Any]
"""What `perform` returns."""
Done = Mapping[str, Result]
"""The results there are, by the name of the run."""
Options = dict[str, Any]
"""Some of lr, rho, k, alpha."""
Answers = dict[str, Options]
"""What was chosen, by what it was chosen for."""


@dataclass(frozen=True)
class Row:
    """A line of the final table: a method with its tuned options, a run for each seed."""

    key: str
    label: str
    method: str
    asam: bool
    runs: tuple[Run, ...]


# ---- what is to be run -----------------------------------------------------------------------------------------------


def questions(settings: Settings, answers: Answers) -> dict[str, list[tuple[Options, list[Run]]]]:
    """What has to be chosen and can be, given `answers`: for each question the candidates and their tuning runs.

    The learning rate and both rhos are chosen by all seeds, k and alpha by the first.
    """
    found = {"lr": _candidates(settings, "sgd", settings.seeds, [{"lr": lr} for lr in settings.learning_rates])}
    if "lr" in answers:
        found["lookahead"] = _candidates(settings, "lookahead", 1, _lookahead_grid(settings), **answers["lr"])
        for key, rhos in (("sam", settings.sam_rhos), ("asam", settings.asam_rhos)):
            grid = [{"rho": rho} for rho in rhos]
            found[key] = _candidates(settings, "sam", settings.seeds, grid, asam=key == "asam", **answers["lr"])
    if "sam" in answers:
        fixed = answers["lr"] | answers["sam"]
        multistep = [{"k": k} for k in settings.multistep_ks]
        lookbehind = [{"k": k, "alpha": alpha} for k in settings.ks for alpha in settings.alphas]
        grids = {
            "multistep": multistep,
            "multistep-average": multistep,
            "lookahead-sam": _lookahead_grid(settings),
            "lookbehind": lookbehind,
        }
        for method, grid in grids.items():
            found[method] = _candidates(settings, method, 1, grid, **fixed)
    return found


def answer(settings: Settings, done: Done) -> Answers:
    """The questions whose runs are all done, each with the candidate of the best mean accuracy, the first of equals."""
    answers: Answers = {}
    while True:
        new = {
            key: max(candidates, key=lambda candidate: mean_accuracy(candidate[1], done))[0]
            for key, candidates in questions(settings, answers).items()
            if key not in answers and all(run.name in done for _, runs in candidates for run in runs)
        }
        if not new:
            return answers
        answers |= new


def mean_accuracy(runs: list[Run], done: Done) -> float:
    """The mean over runs of their accuracy on held-out images."""
    return sum(done[run.name]["accuracy"] for run in runs) / len(runs)


def sensitivity(settings: Settings, answers: Answers) -> dict[str, dict[float, list[Run]]]:
    """SAM and Lookbehind, as it was tuned, for each rho: a tuning run for each seed."""
    fixed = {"sam": answers["lr"], "lookbehind": answers["lr"] | answers["lookbehind"]}
    return {
        method: {rho: _tuning(settings, method, settings.seeds, rho=rho, **more) for rho in settings.sam_rhos}
        for method, more in fixed.items()
    }


def rows(settings: Settings, answers: Answers) -> list[Row]:
    """The final table's lines. The methods over ASAM take k and alpha from those over SAM."""
    lr, lookbehind = answers["lr"], answers["lookbehind"]
    longer = lookbehind["k"] + 1
    found = [
        _row(settings, "sgd", "sgd", False, lr),
        _row(settings, "sgd-longer", "sgd", False, lr, f"SGD, {longer} times as long", longer),
        _row(settings, "lookahead", "lookahead", False, lr | answers["lookahead"]),
    ]
    of_method = {
        "sam": {},
        "multistep": answers["multistep"],
        "multistep-average": answers["multistep-average"],
        "lookahead-sam": answers["lookahead-sam"],
        "lookbehind": lookbehind,
        "lookbehind-adaptive": {"k": lookbehind["k"]},
        "sam-free": {},
        "lookbehind-free": lookbehind,
    }
    found += [_row(settings, key, key, False, lr | answers["sam"] | own) for key, own in of_method.items()]
    for method, own in of_method.items():
        if not method.endswith("-free"):
            key = method.replace("sam", "asam") if method.endswith("sam") else f"{method}-asam"
            found.append(_row(settings, key, method, True, lr | answers["asam"] | own))
    return found


def plan(settings: Settings, answers: Answers) -> list[Run]:
    """Every run that is known to be needed, given `answers`: tuning before the rest, and then the longest first."""
    found = [run for candidates in questions(settings, answers).values() for _, runs in candidates for run in runs]
    found.sort(key=lambda run: -run.cost)
    if questions(settings, answers).keys() == answers.keys():
        rest = [run for by_rho in sensitivity(settings, answers).values() for runs in by_rho.values() for run in runs]
        rest += [run for row in rows(settings, answers) for run in row.runs]
        found += sorted(rest, key=lambda run: -run.cost)
    return list(dict.fromkeys(found))


def guess(settings: Settings, answers: Answers) -> Answers:
    """`answers`, and for what is still open the candidate in the middle: to estimate how much there is to do."""
    guessed = dict(answers)
    while open_questions := questions(settings, guessed).keys() - guessed.keys():
        candidates = questions(settings, guessed)
        guessed |= {key: candidates[key][len(candidates[key]) // 2][0] for key in open_questions}
    return guessed


def _lookahead_grid(settings: Settings) -> list[Options]:
    return [{"k": k, "alpha": alpha} for k in settings.lookahead_ks for alpha in settings.lookahead_alphas]


def _candidates(
    settings: Settings, method: str, seeds: int, grid: list[Options], **fixed: Any
) -> list[tuple[Options, list[Run]]]:
    return [(own, _tuning(settings, method, seeds, **fixed, **own)) for own in grid]


def _tuning(settings: Settings, method: str, seeds: int, **fixed: Any) -> list[Run]:
    return [Run("tune", method, seed, epochs=settings.epochs, **fixed) for seed in range(seeds)]


def _row(
    settings: Settings, key: str, method: str, asam: bool, own: Options, label: str | None = None, longer: int = 1
) -> Row:
    epochs = longer * settings.epochs
    runs = tuple(Run("final", method, seed, epochs=epochs, asam=asam, **own) for seed in range(settings.seeds))
    return Row(key, label or methods.label(method, asam), method, asam, runs)


# ---- one run ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load(settings: Settings) -> Dataset:
    """The images, with their own labels, in the size that is trained on."""
    needed = settings.training + settings.validation
    if settings.data == "digits":
        images = data.load("digits")
        return replace(images, train_images=images.train_images[:needed], train_labels=images.train_labels[:needed])
    images = data.load(settings.data, limit=max(needed, 10_000))
    return replace(
        images,
        train_images=F.avg_pool2d(images.train_images[:needed], 2),
        train_labels=images.train_labels[:needed],
        test_images=F.avg_pool2d(images.test_images, 2),
    )


def images_of(settings: Settings, run: Run, images: Dataset) -> Dataset:
    """What a run is given: for tuning, validation images with their noisy labels take the place of the test images."""
    noisy = data.with_label_noise(images, settings.label_noise, run.seed)
    n = settings.training
    seen = replace(noisy, train_images=noisy.train_images[:n], train_labels=noisy.train_labels[:n])
    if run.purpose == "final":
        return seen
    return replace(seen, test_images=noisy.train_images[n:], test_labels=noisy.train_labels[n:])


def perform(settings: Settings, run: Run, images: Dataset | None = None) -> Result:
    """Trains and measures. `images`: instead of those that the settings name.

    BatchNorm's statistics are estimated anew before anything is measured: a sharpness-aware step updates the running
    averages at perturbed weights too, differently in each method.

    Returns plain values for JSON: None is a number that was not finite.
    """
    chosen, _ = options.parse(["--data", settings.data, "--threads", "1"])
    for name in ("width", "batch_size", "label_noise"):
        setattr(chosen, name, getattr(settings, name))
    for name, value in asdict(run).items():
        if value is not None and hasattr(chosen, name) and name != "method":
            setattr(chosen, name, value)
    job = Job(chosen, images_of(settings, run, images or load(settings)))
    job.reset()
    record = Record(job.steps_per_epoch)
    optimizer, scheduler = job.make_optimizer(run.method)
    job.train(run.method, optimizer, scheduler, record, job.total_steps, lambda: None)
    last = record.loss[-job.steps_per_epoch :]
    with methods.evaluated(optimizer):
        job.estimate_statistics()
        result = {
            "accuracy": job.test_accuracy(),
            "loss": sum(last) / len(last),
            "evaluations": record.evaluations,
            "seconds": record.seconds,
        }
        if run.purpose == "final":
            result |= {
                "training_accuracy": job.accuracy(job.data.train_images, job.data.train_labels),
                "sam_sharpness": job.sharpness(settings.sam_radii, adaptive=False),
                "asam_sharpness": job.sharpness(settings.asam_radii, adaptive=True),
                "noise": job.noise_robustness(settings.noise_levels, settings.noise_samples),
            }
    return _json_value({"run": asdict(run), **result})


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
