"""Which claims hold: what was measured of each row, compared seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.compare.experiment import Row, Settings
from benchmarks.methods import METHODS
from benchmarks.paired import FAILS, HOLDS, OPEN, Interval, differences

CLOSE = 0.01
"""Two accuracies that are within a percentage point of each other are close."""


@dataclass(frozen=True)
class Measured:
    """A row with everything that was measured; each tuple has an entry for every seed, NaN where it was not finite."""

    row: Row
    evaluations: float
    """Gradients of a whole minibatch: one of a quarter counts as a quarter."""
    accuracy: tuple[float, ...]
    training_accuracy: tuple[float, ...]
    sam_sharpness: tuple[tuple[float, ...], ...]
    """Of each seed: at each radius."""
    asam_sharpness: tuple[tuple[float, ...], ...]
    noise: tuple[tuple[float, ...], ...]
    """Of each seed: accuracy at each level, the mean over samples."""
    history: tuple[tuple[tuple[int, float], ...], ...]
    """Of each seed: gradient evaluations so far and accuracy on the first 1,000 test images, in even distances."""
    alpha_history: tuple[tuple[float, ...], ...]
    """Of each seed: the slow step size, the mean over what lies between two entries of `history`; empty for SGD."""

    @property
    def under_noise(self) -> tuple[float, ...]:
        """Of each seed: accuracy, the mean over all levels above 0."""
        return tuple(statistics.fmean(levels[1:]) for levels in self.noise)

    @property
    def halfway(self) -> tuple[float, ...]:
        """Of each seed: accuracy after half of the epochs."""
        return tuple(of_seed[(len(of_seed) - 1) // 2][1] for of_seed in self.history)

    @property
    def best(self) -> tuple[float, ...]:
        """Of each seed: the share of training after which the accuracy was best, the first time."""
        accuracies = [[accuracy for _, accuracy in of_seed] for of_seed in self.history]
        return tuple((of_seed.index(max(of_seed)) + 1) / len(of_seed) for of_seed in accuracies)


@dataclass(frozen=True)
class Finding:
    """One comparison of two rows, and what the seeds say of it."""

    text: str
    differences: tuple[float, ...]
    """Of each seed, positive where it is as claimed."""
    unit: str = "points"
    close: bool = False
    """The claim is that they are within `CLOSE` of 0."""

    @property
    def interval(self) -> Interval:
        """Of the mean difference."""
        return Interval.of(self.differences)

    @property
    def verdict(self) -> str:
        """By the 95 % interval."""
        return self.interval.within(CLOSE) if self.close else self.interval.verdict


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a question of this project, and the comparisons that it consists of."""

    source: str
    """Where the paper has it; empty for questions of this project."""
    text: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """It holds if all of its comparisons do, and does not if one of them does not."""
        verdicts = {finding.verdict for finding in self.findings}
        return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def judge(
    settings: Settings, measured: Mapping[str, Measured], over_rho: Mapping[str, Sequence[Sequence[float]]]
) -> tuple[Claim, ...]:
    """Every claim, from the numbers. `over_rho`: validation accuracy of a method, for each rho that of each seed."""

    def compare(name: str, a: str, b: str, what: str = "above") -> Finding:
        a, b = measured[a], measured[b]
        text = f"{name.replace('_', ' ')}: {a.row.label} {what} {b.row.label}"
        return Finding(text, differences(getattr(a, name), getattr(b, name)), close=what == "close to")

    def above(a: str, *others: str) -> tuple[Finding, ...]:
        return tuple(compare("accuracy", a, b) for b in others)

    def flatter(a: str, b: str, ball: str, place: int) -> Finding:
        radius = (settings.sam_radii if ball == "sam" else settings.asam_radii)[place]
        of_a, of_b = ([of_seed[place] for of_seed in getattr(measured[x], f"{ball}_sharpness")] for x in (a, b))
        names = f"{measured[a].row.label} below {measured[b].row.label}"
        text = f"sharpness in {ball.upper()}'s ball of radius {radius:g}: {names}"
        return Finding(text, differences(of_b, of_a), "nats")

    def steadier(method: str, other: str) -> Finding:
        ranges = [[max(of_seed) - min(of_seed) for of_seed in zip(*over_rho[m], strict=True)] for m in (other, method)]
        text = f"range of validation accuracy over rho: {measured[method].row.label} below {measured[other].row.label}"
        return Finding(text, differences(*ranges))

    half = settings.shares[len(settings.shares) // 2]
    pairs = (("lookbehind", "sam"), ("lookbehind-asam", "asam"))
    cost = METHODS["sam-quarter"].gradients[1] / METHODS["sam"].gradients[1]
    return (
        Claim("Table 1", "Lookbehind-SAM has a higher accuracy than SGD and the other methods over SAM",
              above("lookbehind", "sgd", "sam", "multistep", "multistep-average", "lookahead-sam")),
        Claim("Table 1", "Lookbehind-ASAM has a higher accuracy than SGD and the other methods over ASAM",
              above("lookbehind-asam", "sgd", "asam", "multistep-asam", "multistep-average-asam", "lookahead-asam")),
        Claim("Table 3", f"The adaptive alpha comes close to the tuned one (within {100 * CLOSE:g} point)",
              (compare("accuracy", "lookbehind-adaptive", "lookbehind", "close to"),
               compare("accuracy", "lookbehind-adaptive-asam", "lookbehind-asam", "close to"))),
        Claim("sharpness figures", "Lookbehind finds flatter minima than the method that it is over, at large radii",
              tuple(flatter(a, b, ball, place) for (a, b), ball in zip(pairs, ("sam", "asam"), strict=True)
                    for place in (-2, -1))),
        Claim("noise figures", "Lookbehind is more robust to noise in the weights than the method that it is over",
              tuple(compare("under_noise", a, b) for a, b in pairs)),
        Claim("sensitivity figures", "Lookbehind-SAM is less sensitive to rho than SAM and Multistep-SAM",
              (steadier("lookbehind", "sam"), steadier("lookbehind", "multistep"))),
        Claim("equal evaluations", "More training does not explain it: against methods with as many gradients",
              above("lookbehind", *(f"{b}-longer" for b in ("sgd", "lookahead", "sam", "lookahead-sam")))
              + above("lookbehind-asam", "asam-longer", "lookahead-asam-longer")),
        Claim("convergence", "At half of the epochs Lookbehind is ahead of the method that it is over",
              tuple(compare("halfway", a, b) for a, b in pairs)),
        Claim("Figure 10", "Lookbehind early and SAM late keeps the gain, SAM early and Lookbehind late does not",
              above(f"last-sam-{half:g}", "sam", f"first-sam-{half:g}")),
        Claim("Figure 11", "Leaving the ball of rho helps: Lookbehind against its ascents kept within rho",
              (*above("lookbehind", "lookbehind-within"), *above("lookbehind-asam", "lookbehind-within-asam"))),
        Claim("A.8", "Lookbehind-SAM keeps its gain over SAM where both ascend by microbatches (m-SAM)",
              tuple(f for m in settings.microbatches for f in above(f"lookbehind-m{m}", f"sam-m{m}"))),
        Claim("", "Free ascent has a higher accuracy than SGD, which costs as much",
              above("sam-free", "sgd")),
        Claim("", "Free ascent comes close to the method whose ascent has a gradient of its own",
              (compare("accuracy", "sam-free", "sam", "close to"),
               compare("accuracy", "lookbehind-free", "lookbehind", "close to"))),
        Claim("", f"SAM with ascents on a quarter of the minibatch comes close to SAM at {cost:g} of its gradients",
              (compare("accuracy", "sam-quarter", "sam", "close to"),)),
        Claim("", "SAM with ascents on a quarter of the minibatch has a higher accuracy than SGD",
              above("sam-quarter", "sgd")),
        Claim("", "Lookbehind-SAM whose first ascent is on a quarter of the minibatch comes close to Lookbehind-SAM",
              (compare("accuracy", "lookbehind-quarter", "lookbehind", "close to"),)),
        Claim("", "What Lookbehind is over helps by itself: SAM and ASAM against SGD",
              (*above("sam", "sgd"), *above("asam", "sgd"), compare("under_noise", "sam", "sgd"),
               compare("under_noise", "asam", "sgd"))),
    )  # fmt: skip
