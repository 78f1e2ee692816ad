"""The comparison's settings, what is tried for each method, and the training runs that it consists of."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import data, methods
from benchmarks.compare.search import Axis, Options, points
from benchmarks.methods import METHODS
from benchmarks.runs import Done, Run, Setting, mean_accuracy


@dataclass(frozen=True)
class Settings(Setting):
    """Everything that decides about the numbers. What is not here is the main job's default."""

    trials: int = 3
    """2 to this power points are tried for every method, with the first tuning seed."""
    finalists: int = 2
    """The best of them, which run with the other tuning seeds too; the best mean is chosen."""
    learning_rates: tuple[float, float] = (0.02, 0.5)
    sam_rhos: tuple[float, float] = (0.02, 0.5)
    asam_rhos: tuple[float, float] = (0.2, 4.0)
    ks: tuple[int, ...] = (2, 3, 5)
    alphas: tuple[float, float] = (0.2, 0.9)
    lookahead_ks: tuple[int, ...] = (5, 10)
    microbatches: tuple[int, ...] = (2, 4)
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Of the epochs that are SAM's where stages are switched."""
    sensitivity_rhos: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    sensitivity_alphas: tuple[float, ...] = (0.2, 0.5, 0.8)


FASHION_MNIST = Settings(
    "fashion-mnist", training=1000, validation=2000, epochs=20, label_noise=0.2, seeds=(0, 1, 2, 3, 4),
    tuning_seeds=(100, 101, 102),
)  # fmt: skip
DIGITS = replace(FASHION_MNIST, data="digits", training=640, validation=703)
QUICK = replace(
    DIGITS, training=128, validation=64, epochs=2, width=4, seeds=(0, 1), tuning_seeds=(100, 101), trials=1,
    finalists=1, ks=(2, 3), lookahead_ks=(2,), microbatches=(2,), shares=(0.5,), sensitivity_rhos=(0.05, 0.2),
    sensitivity_alphas=(0.5,), sam_radii=(0.1, 0.5), asam_radii=(1.0, 4.0), noise_levels=(0.0, 0.2), noise_samples=1,
    looks=2,
)  # fmt: skip

OVER_SAM = (
    *("sam", "multistep", "multistep-average", "lookahead-sam", "lookbehind", "lookbehind-adaptive"),
    "lookbehind-within",
)
"""Also tuned with ASAM's scaling."""
TUNED = (
    *((method, False) for method in ("sgd", "lookahead", "sam-free", "lookbehind-free")),
    *((method, False) for method in ("sam-quarter", "lookbehind-quarter")),
    *((method, asam) for asam in (False, True) for method in OVER_SAM),
)
CHEAPER = ("sgd", "lookahead", "sam", "lookahead-sam")
"""Trained a second time for as many gradients as Lookbehind takes."""


def default_data() -> str:
    """Fashion-MNIST where it is installed."""
    return "fashion-mnist" if Path(data.FASHION_MNIST_DIR).is_dir() else "digits"


def key_of(method: str, asam: bool) -> str:
    """Of a row: `lookbehind-asam`, `asam`, `lookahead-asam`."""
    if not asam:
        return method
    return method.replace("sam", "asam") if method.endswith("sam") else f"{method}-asam"


Answers = dict[str, Options]
"""What was chosen, by the key of the row that it was chosen for."""


@dataclass(frozen=True)
class Row:
    """A line of the final table: a method with its options, a run for each seed."""

    key: str
    label: str
    method: str
    asam: bool
    runs: tuple[Run, ...]


# ---- tuning ----------------------------------------------------------------------------------------------------------


def space(settings: Settings, method: str, asam: bool) -> dict[str, Axis]:
    """The options of a method, and what they may be; rho 1 / √fraction times as large where ascents are on a part."""
    rhos, scale = settings.asam_rhos if asam else settings.sam_rhos, METHODS[method].rho_scale
    ks = settings.lookahead_ks if method.startswith("lookahead") else settings.ks
    axes = {
        "lr": Axis(settings.learning_rates, logarithmic=True),
        "rho": Axis((scale * rhos[0], scale * rhos[1]), logarithmic=True),
        "k": Axis(ks),
        "alpha": Axis(settings.alphas),
    }
    return {name: axis for name, axis in axes.items() if name == "lr" or name in METHODS[method].uses}


def trials(settings: Settings, method: str, asam: bool, seed: int) -> list[tuple[Options, Run]]:
    """The points that are tried, and their runs with one tuning seed."""
    found = points(space(settings, method, asam), settings.trials)
    return [(own, Run("tune", method, seed, epochs=settings.epochs, asam=asam, **own)) for own in found]


def finalists(settings: Settings, method: str, asam: bool, done: Done) -> list[tuple[Options, list[Run]]]:
    """The best points of the first tuning seed, with their runs of all tuning seeds. Empty while trials are missing."""
    first, *others = settings.tuning_seeds
    tried = trials(settings, method, asam, first)
    if any(run.name not in done for _, run in tried):
        return []
    best = sorted(tried, key=lambda trial: -done[trial[1].name]["accuracy"])[: settings.finalists]
    return [(own, [run, *(replace(run, seed=seed) for seed in others)]) for own, run in best]


def answer(settings: Settings, done: Done) -> Answers:
    """What was chosen for the methods whose tuning is done: the finalist of the best mean, the first of equals."""
    answers: Answers = {}
    for method, asam in TUNED:
        found = finalists(settings, method, asam, done)
        if found and all(run.name in done for _, runs in found for run in runs):
            answers[key_of(method, asam)] = max(found, key=lambda entry: mean_accuracy(entry[1], done))[0]
    return answers


def guess(settings: Settings, answers: Answers) -> Answers:
    """`answers`, and for what is still open the first point that is tried: to estimate how much there is to do."""
    first = {
        key_of(method, asam): points(space(settings, method, asam), settings.trials)[0]
        for method, asam in TUNED if key_of(method, asam) not in answers
    }  # fmt: skip
    return first | answers


# ---- what is run with what was chosen --------------------------------------------------------------------------------


def rows(settings: Settings, answers: Answers) -> list[Row]:
    """The final tables' lines: all methods for equal epochs, some for equal evaluations, and the variants."""
    found = [_row(settings, key_of(method, asam), method, asam, answers) for method, asam in TUNED]
    for asam in (False, True):
        budget = settings.epochs * (answers[key_of("lookbehind", asam)]["k"] + 1)
        for method in CHEAPER[2 * asam :]:
            key = key_of(method, asam)
            epochs = round(budget / METHODS[method].gradients[1])
            label = f"{methods.label(method, asam)}, as many gradients"
            found.append(
                _row(settings, f"{key}-longer", method, asam, {f"{key}-longer": answers[key]}, label, epochs=epochs)
            )
    for method in ("sam", "lookbehind"):
        for m in settings.microbatches:
            key, label = f"{method}-m{m}", f"{METHODS[method].label}, {m} microbatches"
            found.append(_row(settings, key, method, False, {key: answers[method]}, label, microbatches=m))
    for share in settings.shares:
        epochs = round(share * settings.epochs)
        for key, label, sam_epochs in (
            (f"first-sam-{share:g}", f"SAM for {share:.0%}, then Lookbehind-SAM", epochs),
            (f"last-sam-{share:g}", f"Lookbehind-SAM, SAM for the last {share:.0%}", -epochs),
        ):
            own = {key: answers["lookbehind"]}
            found.append(_row(settings, key, "lookbehind", False, own, label, sam_epochs=sam_epochs))
    return found


def _row(
    settings: Settings, key: str, method: str, asam: bool, answers: Answers, label: str | None = None, **more: Any
) -> Row:
    own = {"epochs": settings.epochs, **answers[key], **more}
    runs = tuple(Run("final", method, seed, asam=asam, **own) for seed in settings.seeds)
    return Row(key, label or methods.label(method, asam), method, asam, runs)


def sensitivity(settings: Settings, answers: Answers) -> dict[str, dict[str, list[Run]]]:
    """What is varied around what was chosen; for each value the runs of all tuning seeds, by a name of the value.

    "rho METHOD": rho alone. "k, alpha METHOD": both, all others as chosen.
    """
    found: dict[str, dict[str, list[Run]]] = {}
    for method in ("sam", "multistep", "lookbehind"):
        found[f"rho {method}"] = {
            f"{rho:g}": _explore(settings, method, answers[method] | {"rho": rho}) for rho in settings.sensitivity_rhos
        }
    for method, ks in (("lookahead-sam", settings.lookahead_ks), ("lookbehind", settings.ks)):
        found[f"k, alpha {method}"] = {
            f"{k}, {alpha:g}": _explore(settings, method, answers[method] | {"k": k, "alpha": alpha})
            for k in ks for alpha in settings.sensitivity_alphas
        }  # fmt: skip
    return found


def _explore(settings: Settings, method: str, own: Options) -> list[Run]:
    return [Run("explore", method, seed, epochs=settings.epochs, **own) for seed in settings.tuning_seeds]


def plan(settings: Settings, done: Done, guessed: bool = False) -> list[Run]:
    """Every run that is known to be needed: tuning before the rest, and then the longest first.

    `guessed`: the rest by the best present guess too, to estimate how much there is to do.
    """
    answers = answer(settings, done)
    tuning: list[Run] = []
    for method, asam in TUNED:
        tried = [run for _, run in trials(settings, method, asam, settings.tuning_seeds[0])]
        again = [run for _, runs in finalists(settings, method, asam, done) for run in runs]
        if guessed and not again:
            again = [replace(run, seed=s) for run in tried[: settings.finalists] for s in settings.tuning_seeds[1:]]
        tuning += tried + again
    found = _longest_first(tuning)
    if len(answers) == len(TUNED) or guessed:
        answers = guess(settings, answers)
        found += _longest_first([run for row in rows(settings, answers) for run in row.runs])
        varied = sensitivity(settings, answers).values()
        found += _longest_first([run for by_value in varied for runs in by_value.values() for run in runs])
    return list({run.name: run for run in found}.values())


def _longest_first(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: -run.cost)
