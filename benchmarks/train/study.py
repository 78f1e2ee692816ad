"""The main job's own comparison: what it runs, and which rho each method is shown with.

The setting was chosen with the tuning seeds alone; no run of the shown seeds was looked at before it was fixed.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import runs
from benchmarks.methods import METHODS
from benchmarks.runs import Done, Run, Setting, mean_accuracy
from benchmarks.store import Store
from benchmarks.workers import run_plan


@dataclass(frozen=True)
class Settings(Setting):
    """Everything that decides about the numbers. What is not here is the default of a single run."""

    methods: tuple[str, ...] = ("sgd", "sam", "sam-quarter", "multistep", "lookbehind")
    rhos: tuple[float, ...] = (0.05, 0.1, 0.2)
    """The same for every method that has one; for ascents on a part of the minibatch larger, see ``rhos_of``."""
    lr: float = 0.05
    k: int = 3
    alpha: float = 0.5


SHOWN = Settings(
    "digits", training=640, validation=703, epochs=16, label_noise=0.4, seeds=(0, 1, 2, 3, 4), tuning_seeds=(100, 101),
    sam_radii=(0.1,), asam_radii=(), noise_levels=(), looks=8,
)  # fmt: skip
QUICK = replace(SHOWN, training=128, validation=64, epochs=2, width=4, seeds=(0, 1), tuning_seeds=(100,), looks=2)


def rhos_of(settings: Settings, method: str) -> tuple[float, ...]:
    """The method's rhos: the settings', each times 1 / √fraction where ascents are on a fraction of the minibatch."""
    return tuple(rho * METHODS[method].rho_scale for rho in settings.rhos) if "rho" in METHODS[method].uses else ()


def candidates(settings: Settings, purpose: str, method: str) -> dict[float | None, list[Run]]:
    """The runs of a method, by rho; SGD has one entry, None."""
    uses = METHODS[method].uses
    seeds = settings.seeds if purpose == "final" else settings.tuning_seeds
    own = {name: getattr(settings, name) for name in ("k", "alpha") if name in uses}
    return {
        rho: [Run(purpose, method, seed, settings.lr, settings.epochs, rho=rho, **own) for seed in seeds]
        for rho in (rhos_of(settings, method) or (None,))
    }


def plan(settings: Settings) -> list[Run]:
    """Every run: those that choose rho, where there is a choice, then those that are shown, the longest first."""
    found: list[Run] = []
    for purpose in ("tune", "final"):
        of_purpose = [candidates(settings, purpose, method) for method in settings.methods]
        chosen = [by_rho for by_rho in of_purpose if purpose == "final" or len(by_rho) > 1]
        found += sorted(
            (run for by_rho in chosen for runs in by_rho.values() for run in runs), key=lambda run: -run.cost
        )
    return found


def best_rhos(settings: Settings, done: Done) -> dict[str, float | None]:
    """Of each method, that of the best mean validation accuracy over the tuning seeds, the first of equals."""
    best: dict[str, float | None] = {}
    for method in settings.methods:
        by_rho = candidates(settings, "tune", method)
        best[method] = max(by_rho, key=lambda rho: mean_accuracy(by_rho[rho], done)) if len(by_rho) > 1 else None
    return best


def run(settings: Settings, folder: Path, jobs: int) -> Store:
    """Performs every run that the folder has no result of. UserError for a folder of another comparison."""
    store = Store(folder, asdict(settings), runs.load(settings).fingerprint(), Run)
    everything, steps = plan(settings), settings.training // settings.batch_size
    run_plan(partial(runs.perform, settings), store, lambda: everything, lambda run: steps * run.cost, jobs, "main job")
    return store
