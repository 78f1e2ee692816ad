"""Which claims hold: what was measured of each row, compared seed by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.compare.experiment import Row, Settings

CLOSE = 0.01
"""Two accuracies that are within a percentage point of each other are close."""

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved"


@dataclass(frozen=True)
class Measured:
    """A row with everything that was measured; each tuple has an entry for every seed, NaN where it was not finite."""

    row: Row
    evaluations: int
    accuracy: tuple[float, ...]
    training_accuracy: tuple[float, ...]
    sam_sharpness: tuple[tuple[float, ...], ...]
    """Of each seed: at each radius."""
    asam_sharpness: tuple[tuple[float, ...], ...]
    noise: tuple[tuple[float, ...], ...]
    """Of each seed: accuracy at each level, the mean over samples."""

    @property
    def under_noise(self) -> tuple[float, ...]:
        """Of each seed: accuracy, the mean over all levels above 0."""
        return tuple(statistics.fmean(levels[1:]) for levels in self.noise)


@dataclass(frozen=True)
class Finding:
    """One comparison of two rows, and what the seeds say of it."""

    text: str
    verdict: str
    differences: tuple[float, ...]
    """Of each seed, positive where it is as claimed."""
    unit: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or a question of this project, and the comparisons that it consists of."""

    text: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """It holds if all of its comparisons do, and does not if one of them does not."""
        verdicts = {finding.verdict for finding in self.findings}
        return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def verdict(differences: Sequence[float]) -> str:
    """Of the seeds' paired differences: resolved if all have one sign and their mean exceeds their standard deviation.

    NaN, and a single seed, resolve nothing.
    """
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return OPEN
    mean = statistics.fmean(differences)
    if abs(mean) <= statistics.stdev(differences):
        return OPEN
    if all(difference > 0 for difference in differences):
        return HOLDS
    return FAILS if all(difference < 0 for difference in differences) else OPEN


def verdict_of_closeness(differences: Sequence[float], tolerance: float = CLOSE) -> str:
    """Close if every seed's difference is at most `tolerance`; not if all exceed it and `verdict` has resolved them."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return OPEN
    if all(abs(difference) <= tolerance for difference in differences):
        return HOLDS
    apart = all(abs(difference) > tolerance for difference in differences)
    return FAILS if apart and verdict(differences) != OPEN else OPEN


def judge(
    settings: Settings,
    measured: Mapping[str, Measured],
    sensitivity: Mapping[str, Mapping[float, Sequence[float]]],
) -> tuple[Claim, ...]:
    """Every claim, from the numbers."""

    def accuracy(a: str, b: str) -> Finding:
        a, b = measured[a], measured[b]
        return _finding(f"accuracy: {a.row.label} above {b.row.label}", a.accuracy, b.accuracy)

    def close(a: str, b: str) -> Finding:
        found = accuracy(a, b)
        text, verdict = found.text.replace(" above ", " close to "), verdict_of_closeness(found.differences)
        return replace(found, text=text, verdict=verdict)

    def flatter(a: str, b: str, ball: str, place: int) -> Finding:
        a, b = measured[a], measured[b]
        radius = (settings.sam_radii if ball == "sam" else settings.asam_radii)[place]
        of_a, of_b = ([of_seed[place] for of_seed in getattr(m, f"{ball}_sharpness")] for m in (a, b))
        text = f"sharpness in {ball.upper()}'s ball of radius {radius:g}: {a.row.label} below {b.row.label}"
        return _finding(text, of_b, of_a, "nats")

    def robust(a: str, b: str) -> Finding:
        a, b = measured[a], measured[b]
        return _finding(f"accuracy under noise: {a.row.label} above {b.row.label}", a.under_noise, b.under_noise)

    def ranges(method: str) -> list[float]:
        by_seed = zip(*sensitivity[method].values(), strict=True)
        return [max(of_seed) - min(of_seed) for of_seed in by_seed]

    of_rho = _finding(
        "range of validation accuracy over rho: Lookbehind-SAM below SAM", ranges("sam"), ranges("lookbehind")
    )
    pairs = (("lookbehind", "sam"), ("lookbehind-asam", "asam"))
    return (
        Claim(
            "Lookbehind-SAM has a higher accuracy than the other methods over SAM",
            tuple(accuracy("lookbehind", b) for b in ("sam", "multistep", "multistep-average", "lookahead-sam")),
        ),
        Claim(
            "Lookbehind-ASAM has a higher accuracy than the other methods over ASAM",
            tuple(
                accuracy("lookbehind-asam", b)
                for b in ("asam", "multistep-asam", "multistep-average-asam", "lookahead-asam")
            ),
        ),
        Claim(
            "Lookbehind finds flatter minima than the method that it is over (m-sharpness at large radii)",
            tuple(
                flatter(a, b, ball, place)
                for (a, b), ball in zip(pairs, ("sam", "asam"), strict=True)
                for place in (-2, -1)
            ),
        ),
        Claim(
            "Lookbehind is more robust to noise in the weights than the method that it is over",
            tuple(robust(a, b) for a, b in pairs),
        ),
        Claim(
            f"The adaptive alpha comes close to the tuned one (within {100 * CLOSE:g} point for every seed)",
            (close("lookbehind-adaptive", "lookbehind"), close("lookbehind-adaptive-asam", "lookbehind-asam")),
        ),
        Claim("Lookbehind-SAM is less sensitive to rho than SAM", (of_rho,)),
        Claim("More training does not explain it: Lookbehind-SAM against SGD with as many gradients",
              (accuracy("lookbehind", "sgd-longer"),)),
        Claim(
            "Free ascent has a higher accuracy than SGD with about as many gradients",
            (accuracy("sam-free", "sgd"), accuracy("lookbehind-free", "sgd-longer")),
        ),
        Claim(
            "Free ascent comes close to the method whose ascent has a gradient of its own",
            (close("sam-free", "sam"), close("lookbehind-free", "lookbehind")),
        ),
    )  # fmt: skip


def _finding(text: str, larger: Sequence[float], smaller: Sequence[float], unit: str = "points") -> Finding:
    differences = tuple(x - y for x, y in zip(larger, smaller, strict=True))
    return Finding(text, verdict(differences), differences, unit)
