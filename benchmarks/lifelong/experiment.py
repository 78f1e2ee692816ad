"""The settings, the training runs that the job consists of, and which of them choose for which."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.lifelong.streams import STREAMS, Sizes
from benchmarks.methods import METHODS

TUNING_SEED = 1000
"""Tuning runs have other weights, images and orders than the final ones, whose seeds are 0, 1, ..."""

WAYS = {"plain": "", "replay": " with replay", "cmaml": " over C-MAML"}
"""How a gradient is found: on the minibatch alone; on it and examples of the memory; by C-MAML."""

ROWS = (
    *(("plain", method) for method in ("sgd", "sam", "multistep", "lookbehind")),
    *(("replay", method) for method in ("sgd", "sam", "multistep", "lookbehind")),
    *(("cmaml", method) for method in ("sgd", "lookahead", "sam", "lookbehind")),
)
"""Way and method of each line of the table."""
CMAML_LABELS = {
    "sgd": "C-MAML",
    "lookahead": "Lookahead-C-MAML",
    "sam": "SAM-C-MAML",
    "lookbehind": "Lookbehind-C-MAML",
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides about the numbers but the number of seeds, to which more can be added."""

    stream: str
    training: int
    """Images of a task."""
    validation: int
    test: int
    epochs: int = 10
    """Of each task."""
    batch_size: int = 10
    memory: int = 200
    """Examples in the reservoir."""
    replay: int = 10
    """Examples drawn from it for a step."""
    width: int = 100
    """Of the two hidden layers; channels of the convolutions."""
    tuning_tasks: int = 8
    """So many of the first tasks are trained on in a tuning run."""
    trials: int = 12
    """Tuning runs of every row."""
    lrs: tuple[float, ...] = (0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08, 0.11, 0.16, 0.22, 0.3, 0.4)
    rhos: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    ks: tuple[int, ...] = (2, 5)
    alphas: tuple[float, ...] = (0.2, 0.5, 0.8)
    lookahead_ks: tuple[int, ...] = (5, 10)
    inner_lrs: tuple[float, ...] = (0.01, 0.03, 0.1)

    @property
    def sizes(self) -> Sizes:
        """Images of a task."""
        return Sizes(self.training, self.validation, self.test)


SETTINGS = {
    "rotations": Settings("rotations", training=200, validation=200, test=500),
    "permutations": Settings("permutations", training=200, validation=200, test=500),
    "pairs": Settings("pairs", training=1000, validation=500, test=1000, tuning_tasks=5),
    "cifar100": Settings("cifar100", training=2250, validation=250, test=500, width=32),
    "tiny-imagenet": Settings("tiny-imagenet", training=4500, validation=500, test=500, width=32),
}
QUICK = Settings(
    "digits", training=40, validation=20, test=20, epochs=2, memory=20, width=8, tuning_tasks=2, trials=2,
    lrs=(0.05, 0.2), rhos=(0.05,), ks=(2,), alphas=(0.5,), lookahead_ks=(3,), inner_lrs=(0.05,),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run. `purpose`: "tune" is judged on validation images, "final" on test images."""

    purpose: str
    way: str
    method: str
    seed: int
    lr: float
    rho: float | None = None
    k: int | None = None
    alpha: float | None = None
    inner_lr: float | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        parts = [self.purpose, self.way, self.method]
        parts += [
            f"{name}{value:g}" for name in ("rho", "k", "alpha", "inner_lr", "lr", "seed")
            if (value := getattr(self, name)) is not None
        ]  # fmt: skip
        return "-".join(parts)


Options = dict[str, Any]
"""Some of lr, rho, k, alpha, inner_lr."""
Done = Mapping[str, Mapping[str, Any]]
"""The results there are, by the name of the run."""


def label(way: str, method: str) -> str:
    """What a row is called."""
    return CMAML_LABELS[method] if way == "cmaml" else METHODS[method].label + WAYS[way]


def passes(settings: Settings, run: Run) -> int:
    """Forward and backward passes of a run: its cost."""
    times_k, more = METHODS[run.method].gradients
    each = (times_k * (run.k or 0) + more) * (settings.batch_size + 1 if run.way == "cmaml" else 1)
    return each * settings.epochs * -(-settings.training // settings.batch_size) * tasks_of(settings, run)


def tasks_of(settings: Settings, run: Run) -> int:
    """How many tasks a run learns."""
    whole = STREAMS[settings.stream].tasks
    return min(settings.tuning_tasks, whole) if run.purpose == "tune" else whole


def candidates(settings: Settings, way: str, method: str) -> list[Options]:
    """`trials` of a row: every learning rate equally often, each further value dealt from a shuffled deck of its own.

    The full grid of Lookbehind-C-MAML has 864 entries. So each row has as many trials as any other, and SGD, which has
    nothing but a learning rate, has no finer grid of it.
    """
    decks: dict[str, tuple[float, ...]] = {"lr": settings.lrs}
    uses = METHODS[method].uses
    if "rho" in uses:
        decks["rho"] = settings.rhos
    if "k" in uses:
        decks["k"] = settings.lookahead_ks if method == "lookahead" else settings.ks
    if "alpha" in uses:
        decks["alpha"] = settings.alphas
    if way == "cmaml":
        decks["inner_lr"] = settings.inner_lrs
    dealt = {}
    for name, values in decks.items():
        deck = [values[i % len(values)] for i in range(settings.trials)]
        if name != "lr":
            random.Random(f"{way}/{method}/{name}").shuffle(deck)
        dealt[name] = deck
    return [dict(zip(dealt, cards, strict=True)) for cards in zip(*dealt.values(), strict=True)]


def tuning(settings: Settings, way: str, method: str) -> list[tuple[Options, Run]]:
    """The trials of a row and their runs."""
    return [(own, Run("tune", way, method, TUNING_SEED, **own)) for own in candidates(settings, way, method)]


def answers(settings: Settings, done: Done) -> dict[tuple[str, str], Options]:
    """What was chosen for the rows whose trials are all done: the best average accuracy, the first of equals."""
    found = {}
    for way, method in ROWS:
        trials = tuning(settings, way, method)
        if all(run.name in done for _, run in trials):
            found[way, method] = max(trials, key=lambda trial: done[trial[1].name]["accuracy"])[0]
    return found


def finals(seeds: int, way: str, method: str, own: Options) -> list[Run]:
    """The final runs of a row."""
    return [Run("final", way, method, seed, **own) for seed in range(seeds)]


def plan(settings: Settings, seeds: int, done: Done, guess: bool = False) -> list[Run]:
    """Every run that is known to be needed: tuning first, then the final runs seed by seed.

    `guess`: of rows that are not tuned yet the trial in the middle, to estimate how much there is to do.
    """
    found = [run for way, method in ROWS for _, run in tuning(settings, way, method)]
    chosen = answers(settings, done)
    if guess:
        for way, method in ROWS:
            trials = candidates(settings, way, method)
            chosen.setdefault((way, method), trials[len(trials) // 2])
    by_row = [finals(seeds, *row, chosen[row]) for row in ROWS if row in chosen]
    found += [runs[seed] for seed in range(seeds) for runs in by_row]
    return list(dict.fromkeys(found))
