"""Which runs there are: each method tunes its own numbers, then trains with every seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import methods


@dataclass(frozen=True)
class Settings:
    """Everything that decides about the numbers; a job adds what is its own."""

    seeds: tuple[int, ...]
    """Of the final runs: weights, order and dropout."""
    tuning_seeds: tuple[int, ...]
    """Of the runs that choose: others."""
    learning_rates: tuple[float, ...]
    """The base alone chooses among them; every method takes what it chose."""
    sam_rhos: tuple[float, ...]
    asam_rhos: tuple[float, ...]
    ks: tuple[int, ...]
    """Lookbehind chooses k and alpha together with rho, over SAM and over ASAM by itself; with the adaptive alpha it
    takes the rho and the k that it has chosen without.
    """
    alphas: tuple[float, ...]
    switch: bool
    """Each inner step of Lookbehind has a minibatch of its own: 2k gradients for k minibatches."""
    checkpoint_every: int
    """Steps between two checkpoints of a run."""


@dataclass(frozen=True)
class Run:
    """One training run. `purpose`: "tune" is judged on validation data, "final" on test data."""

    purpose: str
    method: str
    """`base`, `sam`, `lookbehind` or `lookbehind-adaptive`."""
    seed: int
    lr: float
    asam: bool = False
    rho: float | None = None
    k: int | None = None
    alpha: float | None = None
    times: int = 1
    """So many times the epochs."""

    @property
    def name(self) -> str:
        """Of its files."""
        ball = "asam" if self.asam else "sam"
        parts = [self.purpose, self.method, *([ball] if self.rho is not None else [])]
        parts += [
            f"{name}{value:g}" for name in ("rho", "k", "alpha", "lr", "times", "seed")
            if (value := getattr(self, name)) is not None
        ]  # fmt: skip
        return "-".join(parts)

    def minibatches(self, settings: Settings) -> int:
        """Minibatches of an outer step."""
        return self.k if settings.switch and self.method.startswith("lookbehind") else 1

    def gradients(self, settings: Settings) -> int:
        """Gradient evaluations for each minibatch."""
        if self.method.startswith("lookbehind"):
            return 2 if settings.switch else self.k + 1
        return 2 if self.method == "sam" else 1

    def cost(self, settings: Settings) -> int:
        """Gradient evaluations, in units of the base's epochs."""
        return self.times * self.gradients(settings)


Result = Mapping[str, Any]
Done = Mapping[str, Result]
"""The results there are, by the name of the run."""
Options = dict[str, Any]
"""Some of lr, rho, k, alpha."""
Answers = dict[str, Options]
"""What was chosen, by what it was chosen for."""


@dataclass(frozen=True)
class Row:
    """A line of the final table: a method as it was tuned, a run for each seed."""

    key: str
    label: str
    runs: tuple[Run, ...]


def questions(settings: Settings, answers: Answers) -> dict[str, list[tuple[Options, list[Run]]]]:
    """What has to be chosen and can be, given `answers`: for each question its candidates and their tuning runs."""

    def candidates(method: str, grid: list[Options], **fixed: Any) -> list[tuple[Options, list[Run]]]:
        return [
            (own, [Run("tune", method, seed, **fixed, **own) for seed in settings.tuning_seeds]) for own in grid
        ]  # fmt: skip

    found = {"base": candidates("base", [{"lr": lr} for lr in settings.learning_rates])}
    if "base" in answers:
        for ball, rhos in (("sam", settings.sam_rhos), ("asam", settings.asam_rhos)):
            fixed = {"asam": ball == "asam", **answers["base"]}
            found[ball] = candidates("sam", [{"rho": rho} for rho in rhos], **fixed)
            grid = [
                {"rho": rho, "k": k, "alpha": alpha} for rho in rhos for k in settings.ks for alpha in settings.alphas
            ]
            found[f"lookbehind-{ball}"] = candidates("lookbehind", grid, **fixed)
    return found


def answer(settings: Settings, done: Done) -> Answers:
    """The questions whose runs are all done, each with the candidate of the best mean score, the first of equals."""
    answers: Answers = {}
    while True:
        new = {
            key: max(candidates, key=lambda candidate: mean_score(candidate[1], done))[0]
            for key, candidates in questions(settings, answers).items()
            if key not in answers and all(run.name in done for _, runs in candidates for run in runs)
        }
        if not new:
            return answers
        answers |= new


def mean_score(runs: list[Run], done: Done) -> float:
    """The mean over runs of their score on held-out data."""
    return sum(done[run.name]["score"] for run in runs) / len(runs)


def rows(settings: Settings, answers: Answers, base: str) -> list[Row]:
    """The final table's lines. `base`: what the base optimizer is called.

    The base also runs as many times longer as the dearest Lookbehind takes gradients.
    """
    lr = answers["base"]

    def row(key: str, label: str, method: str, **own: Any) -> Row:
        return Row(key, label, tuple(Run("final", method, seed, **{**lr, **own}) for seed in settings.seeds))

    of_lookbehind = []
    for ball in ("sam", "asam"):
        chosen = {"asam": ball == "asam", **answers[f"lookbehind-{ball}"]}
        adaptive = {name: value for name, value in chosen.items() if name != "alpha"}
        of_lookbehind += [
            row(f"lookbehind-{ball}", methods.label("lookbehind", ball == "asam"), "lookbehind", **chosen),
            row(
                f"adaptive-{ball}", methods.label("lookbehind-adaptive", ball == "asam"), "lookbehind-adaptive",
                **adaptive,
            ),
        ]  # fmt: skip
    longer = max(line.runs[0].gradients(settings) for line in of_lookbehind)
    return [
        row("base", base, "base"),
        row("longer", f"{base}, {longer} times as long", "base", times=longer),
        row("sam", "SAM", "sam", asam=False, **answers["sam"]),
        row("asam", "ASAM", "sam", asam=True, **answers["asam"]),
        *of_lookbehind,
    ]


def plan(settings: Settings, answers: Answers) -> list[Run]:
    """Every run that is known to be needed, given `answers`: tuning before the rest, and the longest first."""
    asked = questions(settings, answers)
    found = sorted(
        (run for candidates in asked.values() for _, runs in candidates for run in runs),
        key=lambda run: -run.cost(settings),
    )
    if asked.keys() == answers.keys():
        rest = [run for row in rows(settings, answers, "") for run in row.runs]
        found += sorted(rest, key=lambda run: -run.cost(settings))
    return found


def guess(settings: Settings, answers: Answers) -> Answers:
    """`answers`, and for what is still open the candidate in the middle: to estimate how much there is to do."""
    guessed = dict(answers)
    while open_questions := (asked := questions(settings, guessed)).keys() - guessed.keys():
        guessed |= {key: asked[key][len(asked[key]) // 2][0] for key in open_questions}
    return guessed
