"""What is run: ascents by the gradient of a part of the minibatch, other ways to save gradients, and controls."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, randn
from torch.optim import Optimizer

from benchmarks import data, runs
from benchmarks.data import Dataset
from benchmarks.job import Job
from benchmarks.runs import Done, Result, Setting, mean_accuracy
from benchmarks.spread import Spread, ratios
from benchmarks.store import Store
from benchmarks.workers import run_plan


@dataclass(frozen=True)
class Settings(Setting):
    """Everything that decides about the numbers. What is not here is the main job's default."""

    fractions: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 1 / 16)
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    """The same for every kind: the least and the largest are there to be too small and too large."""
    longer: tuple[float, ...] = (1.5, 2.0)
    """Epochs of those whose steps cost as much as SGD's, over those of everyone."""
    lr: float = 0.05
    k: int = 2
    alpha: float = 0.5


# The main job's setting, which was not chosen by these runs.
SHOWN = Settings(
    "digits", training=640, validation=703, epochs=16, label_noise=0.4, seeds=(0, 1, 2, 3, 4), tuning_seeds=(100, 101),
    sam_radii=(), asam_radii=(), noise_levels=(), looks=1,
)  # fmt: skip
QUICK = replace(
    SHOWN, training=128, validation=64, epochs=2, width=4, seeds=(0, 1), tuning_seeds=(100,), fractions=(1.0, 1 / 4),
    rhos=(0.1, 0.2), longer=(2.0,),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A way to train."""

    label: str
    """Formatted with the fraction of the minibatch and with k."""
    method: str
    """Of ``benchmarks.methods``: whose optimizer it is."""
    gradients: Callable[[float, int], float]
    """Of a whole minibatch, a step on average: from fraction and k."""
    sharp: Callable[[int, int], bool] = lambda step, steps: True
    """Whether a step, of so many, has an ascent; the others are the base optimizer's alone."""


def _first_half(step: int, steps: int) -> bool:
    return 2 * step < steps


KINDS = {
    "sgd": Kind("SGD", "sgd", lambda fraction, k: 1, lambda step, steps: False),
    "sam": Kind("ascent on the first {fraction} of the minibatch", "sam", lambda fraction, k: 1 + fraction),
    "free": Kind("free ascent, by the gradient of the step before", "sam-free", lambda fraction, k: 1),
    "second": Kind("SAM at every second step", "sam", lambda fraction, k: 1.5, lambda step, steps: step % 2 == 0),
    "early": Kind("SAM in the first half, then SGD", "sam", lambda fraction, k: 1.5, _first_half),
    "late": Kind(
        "SGD in the first half, then SAM", "sam", lambda fraction, k: 1.5,
        lambda step, steps: not _first_half(step, steps),
    ),
    "lookbehind": Kind("Lookbehind-SAM, k = {k}", "lookbehind", lambda fraction, k: k + 1),
    "lookbehind-early": Kind(
        "Lookbehind-SAM, k = {k}, in the first half, then SGD", "lookbehind", lambda fraction, k: (k + 2) / 2,
        _first_half,
    ),
    "other": Kind("ascent on {fraction} of another minibatch of the epoch", "sam", lambda fraction, k: 1 + fraction),
    "random": Kind("ascent in a random direction", "sam", lambda fraction, k: 1),
}  # fmt: skip
CONTROLS = {"other": 1 / 4, "random": 1.0}
HALF_OF = {"second": "sam", "early": "sam", "late": "sam", "lookbehind-early": "lookbehind"}
"""Whose steps half of a kind's are; the others are SGD's."""


@dataclass(frozen=True)
class Run:
    """One training run: of a key of ``KINDS``."""

    purpose: str
    """"tune" is judged on validation images, "final" on test images."""
    kind: str
    seed: int
    fraction: float = 1.0
    rho: float | None = None
    longer: float = 1.0

    @property
    def name(self) -> str:
        """Of its file."""
        rho = "" if self.rho is None else f"-rho{self.rho:g}"
        return f"{self.purpose}-{self.kind}-fraction{self.fraction:g}{rho}-longer{self.longer:g}-seed{self.seed}"

    def cost(self, settings: Settings) -> float:
        """Gradients of a whole minibatch, over those of SGD for the settings' epochs."""
        return self.longer * KINDS[self.kind].gradients(self.fraction, settings.k)


@dataclass(frozen=True)
class Way:
    """A line of the table: a kind of training, over rho."""

    kind: str
    fraction: float = 1.0
    longer: float = 1.0

    def label(self, settings: Settings) -> str:
        """In words."""
        text = "SAM" if (self.kind, self.fraction) == ("sam", 1) else KINDS[self.kind].label
        text = text.format(fraction=f"1/{1 / self.fraction:g}", k=settings.k)
        return text if self.longer == 1 else f"{text}, {self.longer:g} times the epochs"

    def runs(self, settings: Settings, purpose: str) -> dict[float | None, list[Run]]:
        """By rho; SGD has one entry, None."""
        seeds = settings.seeds if purpose == "final" else settings.tuning_seeds
        rhos = (None,) if self.kind == "sgd" else settings.rhos
        return {rho: [Run(purpose, self.kind, seed, self.fraction, rho, self.longer) for seed in seeds] for rho in rhos}

    def best_rho(self, settings: Settings, done: Done) -> float | None:
        """That of the best mean validation accuracy over the tuning seeds, the first of equals."""
        by_rho = self.runs(settings, "tune")
        return max(by_rho, key=lambda rho: mean_accuracy(by_rho[rho], done)) if len(by_rho) > 1 else None


def ways(settings: Settings) -> list[Way]:
    """In the order of the table."""
    plain = [kind for kind in KINDS if kind not in ("sgd", "sam", "free", *CONTROLS)]
    return [
        *(Way("sgd", longer=longer) for longer in (1.0, *settings.longer)),
        *(Way("sam", fraction) for fraction in settings.fractions),
        *(Way("free", longer=longer) for longer in (1.0, *settings.longer)),
        *(Way(kind) for kind in plain),
        *(Way(kind, fraction) for kind, fraction in CONTROLS.items()),
    ]


def plan(settings: Settings) -> list[Run]:
    """Every run: those that choose rho, where there is a choice, then those that are shown."""
    found: list[Run] = []
    for purpose in ("tune", "final"):
        by_way = [way.runs(settings, purpose) for way in ways(settings)]
        chosen = [by_rho for by_rho in by_way if purpose == "final" or len(by_rho) > 1]
        found += [run for by_rho in chosen for of_rho in by_rho.values() for run in of_rho]
    return found


def run(settings: Settings, folder: Path, jobs: int) -> Store:
    """Performs every run that the folder has no result of. UserError for a folder of another comparison."""
    store = Store(folder, asdict(settings), runs.load(settings).fingerprint(), Run)
    everything, steps = plan(settings), settings.epochs * (settings.training // settings.batch_size)
    run_plan(
        partial(perform, settings), store, lambda: everything, lambda run: steps * run.cost(settings), jobs, "fractions"
    )
    return store


# ---- one run ---------------------------------------------------------------------------------------------------------


def perform(settings: Settings, run: Run, images: Dataset | None = None) -> Result:
    """Trains and measures; BatchNorm's statistics are estimated anew before. Plain values for JSON."""
    job = job_of(settings, run, images)
    optimizer, scheduler = job.make_optimizer(KINDS[run.kind].method)
    one_step = stepper(run, job, optimizer)
    start = time.perf_counter()
    with warnings.catch_warnings():  # the optimizer's own step may come later than its base's
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for step in range(job.total_steps):
            one_step(step)
            scheduler.step()
    seconds = time.perf_counter() - start
    job.estimate_statistics()
    return {"run": asdict(run), "accuracy": job.test_accuracy(), "seconds": seconds}


def job_of(settings: Settings, run: Run, images: Dataset | None = None) -> Job:
    """The main job before a run."""
    own = {"epochs": round(run.longer * settings.epochs), "seed": run.seed, "rho": run.rho or 0.0}
    own |= {name: getattr(settings, name) for name in ("lr", "k", "alpha")}
    return runs.job_of(settings, own, runs.images_of(settings, run, images or runs.load(settings)))


def stepper(run: Run, job: Job, optimizer: Any) -> Callable[[int], object]:
    """A function that takes the step of a number."""
    sgd: Optimizer = optimizer if run.kind == "sgd" else optimizer.base_optimizer
    if run.kind in ("sam", "other"):
        optimizer.ascent_fraction = run.fraction
    generator = data.seeded_generator(job.options.seed, "direction", 0)
    sharp = KINDS[run.kind].sharp

    def gradient(batch: Tensor) -> None:
        optimizer.zero_grad()
        job.loss(batch).backward()

    def one_step(step: int) -> None:
        batch = job.batch(step)
        if not sharp(step, job.total_steps):
            gradient(batch)
            sgd.step()
            return
        for evaluation in optimizer.evaluations():
            if evaluation.index or run.kind not in CONTROLS:
                gradient(evaluation.part(batch))
            elif run.kind == "other":  # of the same epoch, so that no example is of both
                epoch, place = divmod(step, job.steps_per_epoch)
                other = epoch * job.steps_per_epoch + (place + job.steps_per_epoch // 2) % job.steps_per_epoch
                gradient(evaluation.part(job.batch(other)))
            else:
                for p in job.model.parameters():
                    p.grad = randn(p.shape, generator=generator).to(p.device)

    return one_step


# ---- time ------------------------------------------------------------------------------------------------------------


def times(settings: Settings, rounds: int, at_once: int = 3) -> Mapping[Way, Spread]:
    """CPU time of a step over that of SGD: over rounds in which everyone has a turn of some steps, one thread each.

    Of the ways all of whose steps are alike.
    """
    alike = [way for way in ways(settings) if way.longer == 1 and way.kind in ("sgd", "sam", "free", "lookbehind")]
    seed, steppers, spent = settings.seeds[0], [], [list[float]() for _ in alike]
    for way in alike:
        run = Run("final", way.kind, seed, way.fraction, None if way.kind == "sgd" else settings.rhos[0])
        job = job_of(settings, run)
        steppers.append(stepper(run, job, job.make_optimizer(KINDS[way.kind].method)[0]))
    for number in range(rounds + 1):
        for one_step, of_one in zip(steppers, spent, strict=True):
            start = time.process_time()
            for step in range(at_once):
                one_step(step)
            if number:  # the first round makes buffers
                of_one.append(time.process_time() - start)
    return {way: ratios(of_one, spent[0]) for way, of_one in zip(alike, spent, strict=True)}


def relative_time(settings: Settings, way: Way, measured: Mapping[Way, Spread]) -> float | None:
    """CPU time of a whole run over that of SGD for the settings' epochs; None where no such step was timed."""
    alike = replace(way, longer=1.0)
    if alike in measured:
        return way.longer * measured[alike].median
    if way.kind in HALF_OF:
        return way.longer * (measured[Way(HALF_OF[way.kind])].median + 1) / 2
    return None
