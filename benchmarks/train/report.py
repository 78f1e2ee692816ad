"""What the main job's comparison found: tables, Markdown, JSON, and the words of its last line."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from benchmarks import tables
from benchmarks.methods import METHODS
from benchmarks.paired import FAILS, HOLDS, Interval, differences
from benchmarks.runs import numbers
from benchmarks.store import Store
from benchmarks.train import study
from benchmarks.train.study import Settings


@dataclass(frozen=True)
class Shown:
    """A method at one rho; each tuple has an entry for every shown seed."""

    method: str
    rho: float | None
    evaluations: float
    """Gradients of a whole minibatch: one of a quarter counts as a quarter."""
    accuracy: tuple[float, ...]
    """On the test images, whose labels are right, after the last step."""
    sharpness: tuple[float, ...]
    """In nats, at the settings' radius."""
    seconds: tuple[float, ...]
    history: tuple[tuple[tuple[int, float], ...], ...]
    """Of each seed: gradient evaluations so far, and test accuracy."""


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    settings: Settings
    best: dict[str, Shown]
    """By method, at the rho that the tuning seeds chose."""
    over_rho: dict[str, dict[float, Shown]]
    """Of the methods that have a rho."""
    validation: dict[str, dict[float, tuple[float, ...]]]
    """What the choice was made by: accuracy of each tuning seed."""
    environment: Mapping[str, Any]
    data: str


def make(settings: Settings, store: Store, command: str) -> Report:
    """The report on the finished runs, all of which have to be there."""

    def shown(method: str, rho: float | None) -> Shown:
        results = [store.done[run.name] for run in study.candidates(settings, "final", method)[rho]]
        return Shown(
            method, rho, results[0]["evaluations"], numbers([x["accuracy"] for x in results]),
            numbers([x["sam_sharpness"][0] for x in results]), tuple(x["seconds"] for x in results),
            numbers([x["history"] for x in results]),
        )  # fmt: skip

    with_rho = [method for method in settings.methods if "rho" in METHODS[method].uses]
    return Report(
        settings,
        {method: shown(method, rho) for method, rho in study.best_rhos(settings, store.done).items()},
        {method: {rho: shown(method, rho) for rho in study.rhos_of(settings, method)} for method in with_rho},
        {
            method: {
                rho: tuple(store.done[run.name]["accuracy"] for run in runs)
                for rho, runs in study.candidates(settings, "tune", method).items()
            }
            for method in with_rho
        },
        {**store.environment, "command": command},
        store.data,
    )


def ranges(report: Report, method: str) -> tuple[float, ...]:
    """Of each seed: by how much the accuracy differs over the three rhos."""
    by_seed = zip(*(shown.accuracy for shown in report.over_rho[method].values()), strict=True)
    return tuple(max(of_seed) - min(of_seed) for of_seed in by_seed)


def label(report: Report, method: str) -> str:
    """The method with its k, where it has one."""
    k = f", k = {report.settings.k}" if "k" in METHODS[method].uses else ""
    return METHODS[method].label + k


def scaled(settings: Settings) -> list[str]:
    """Which methods have larger rhos than the settings', and by how much: in words, one entry for each."""
    return [
        f"for {METHODS[method].label} {METHODS[method].rho_scale:g} times as large"
        for method in settings.methods if METHODS[method].rho_scale != 1
    ]  # fmt: skip


# ---- tables ----------------------------------------------------------------------------------------------------------


def sections(report: Report) -> list[tuple[str, tables.Row, list[tables.Row]]]:
    """Heading, header and rows of each table."""
    methods = [
        (
            label(report, method), "" if x.rho is None else f"{x.rho:g}", f"{x.evaluations:,.0f}",
            Interval.of(x.accuracy).show(100, 1), Interval.of(x.sharpness).show(1, 3),
        )
        for method, x in report.best.items()
    ]  # fmt: skip
    pairs = []
    for b, a in combinations(report.best, 2):
        accuracy = Interval.of(differences(report.best[a].accuracy, report.best[b].accuracy))
        sharpness = Interval.of(differences(report.best[a].sharpness, report.best[b].sharpness))
        pairs.append(
            (
                f"{METHODS[a].label} minus {METHODS[b].label}", accuracy.show(100, 1, sign=True),
                _words(accuracy, "more accurate", "less accurate"), sharpness.show(1, 3, sign=True),
                _words(sharpness, "sharper", "flatter"),
            )
        )  # fmt: skip
    over_rho = [
        (
            label(report, method) + _at_rhos(method),
            *(Interval.of(x.accuracy).show(100, 1) for x in by_rho.values()),
            Interval.of(ranges(report, method)).show(100, 1),
        )
        for method, by_rho in report.over_rho.items()
    ]
    radius = report.settings.sam_radii[0]
    return [
        (
            "Each method at its best rho: mean of the seeds (95 % interval)",
            ("method", "rho", "evaluations", "accuracy, %", f"sharpness, nats at {radius:g}"),
            methods,
        ),
        (
            "Paired differences (95 % interval of their mean)",
            ("", "accuracy, points", "", "sharpness, nats", ""),
            pairs,
        ),
        (
            "Accuracy over rho, %, and its range, points (95 % interval)",
            ("method", *(f"rho {rho:g}" for rho in report.settings.rhos), "range over rho"),
            over_rho,
        ),
    ]


def _at_rhos(method: str) -> str:
    scale = METHODS[method].rho_scale
    return "" if scale == 1 else f", rhos {scale:g} times as large"


def _words(interval: Interval, above: str, below: str) -> str:
    return {HOLDS: above, FAILS: below}.get(interval.verdict, "not resolved")


def conclusion(report: Report) -> str:
    """One line: what was seen, whatever it is. Only what the intervals resolve is called a difference."""
    names = {method: METHODS[method].label for method in report.best}
    first, *others = report.best

    def accuracy(a: str, b: str) -> Interval:
        return Interval.of(differences(report.best[a].accuracy, report.best[b].accuracy))

    above = [names[m] for m in others if accuracy(m, first).verdict == HOLDS]
    parts = [
        f"{_list(above) if above else 'no other method'} {'are' if len(above) > 1 else 'is'} more accurate than "
        f"{names[first]}"
    ]
    target = "lookbehind"
    for other in (method for method in others if method not in (target, "sam-quarter")):
        parts.append(_against(report, target, other))
        spread = Interval.of(differences(ranges(report, other), ranges(report, target)))
        words = {HOLDS: "less", FAILS: "more"}.get(spread.verdict, "neither clearly less nor clearly more")
        mine, theirs = (100 * statistics.fmean(ranges(report, method)) for method in (target, other))
        rhos = _count(len(report.settings.rhos))
        parts.append(f"it depends {words} on rho ({mine:.1f} against {theirs:.1f} points over the {rhos})")
    if {"sam", "sam-quarter"} <= report.best.keys():
        parts.append(_against(report, "sam-quarter", "sam"))
    return "In words: " + "; ".join(parts) + "."


def _against(report: Report, a: str, b: str) -> str:
    gap = Interval.of(differences(report.best[a].accuracy, report.best[b].accuracy))
    words = {HOLDS: "is more accurate than", FAILS: "is less accurate than"}.get(
        gap.verdict, "is not told apart in accuracy from"
    )
    cost = report.best[a].evaluations / report.best[b].evaluations
    times = "with as many gradients" if cost == 1 else f"with {cost:.3g} times its gradients"
    return (
        f"{METHODS[a].label} {words} {METHODS[b].label}, both at their best rho ({gap.show(100, 1, True)} points, "
        f"{times})"
    )


def _count(number: int) -> str:
    return {2: "two", 3: "three"}.get(number, str(number))


def _list(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


# ---- what is written -------------------------------------------------------------------------------------------------


def describe(report: Report) -> str:
    """The setting, and how it and the rhos were chosen."""
    s = report.settings
    rhos, seeds, tuning_seeds = (_list([f"{x:g}" for x in values]) for values in (s.rhos, s.seeds, s.tuning_seeds))
    larger = "".join(f"; {words}, by the rule of benchmarks/results/fractions.md" for words in scaled(s))
    text = f"""
        Handwritten digits, 8x8: {s.training:,} training images, {s.label_noise:.0%} of their labels wrong; a residual
        network of width {s.width}; {s.epochs} epochs of {s.training // s.batch_size} steps with {s.batch_size} images;
        SGD with momentum 0.9, learning rate {s.lr:g} on a cosine, weight decay 5e-4; alpha {s.alpha:g}. Shown: seeds
        {seeds}. Rho: for each method the best of {rhos} by accuracy on {s.validation:,} further images with as many
        wrong labels and the seeds {tuning_seeds}{larger}. The setting itself was chosen with those seeds alone.
    """
    return " ".join(text.split())


def text(report: Report) -> str:
    """For a terminal; the last line says in words what was seen."""
    parts = [describe(report)]
    parts += [f"{heading}\n\n{tables.aligned(header, rows)}" for heading, header, rows in sections(report)]
    return "\n\n".join([*parts, conclusion(report)])


def markdown(report: Report) -> str:
    """train.md."""
    e = report.environment
    lines = ["# The main job", describe(report), conclusion(report), "![Accuracy and sharpness](train.png)"]
    for heading, header, rows in sections(report):
        lines += [f"## {heading}", "\n".join(tables.markdown(header, rows))]
    chosen = "; ".join(
        f"{METHODS[method].label} "
        + ", ".join(f"{100 * statistics.fmean(x):.1f} at {rho:g}" for rho, x in by_rho.items())
        for method, by_rho in report.validation.items()
    )
    lines += [
        "## How it was made",
        f"Rho was chosen by mean validation accuracy, % (some labels of which are wrong): {chosen}. Where the best "
        "is the least or the largest of the three, a better one may lie beyond.",
        " ".join(
            f"""
            Evaluations: gradients of a minibatch over a whole run, one of a part of it counted as that part. Accuracy:
            on the test images, whose labels are right, after the last step. Sharpness: by how many nats one ascent
            raises the loss of a minibatch of training images. BatchNorm's statistics are estimated anew before every
            measure. A difference is called one if the 95 % interval of its mean over the seeds (Student's t, paired)
            has no zero in it; the intervals are not corrected for their number. Made by `{e["command"]}` at commit
            {e["commit"]}: torch {e["torch"]}, Python {e["python"]}, {e["processor"]}; data (SHA-256)
            {report.data[:16]}...
            """.split()
        ),
    ]
    return "\n\n".join(lines) + "\n"


def plain(report: Report) -> dict[str, Any]:
    """train.json: all of it, as plain values."""
    return {
        "environment": dict(report.environment),
        "data": report.data,
        "settings": asdict(report.settings),
        "chosen": {method: x.rho for method, x in report.best.items()},
        "validation": {m: {f"{rho:g}": x for rho, x in by_rho.items()} for m, by_rho in report.validation.items()},
        "best": {method: asdict(x) for method, x in report.best.items()},
        "over_rho": {m: {f"{rho:g}": asdict(x) for rho, x in by_rho.items()} for m, by_rho in report.over_rho.items()},
        "conclusion": conclusion(report),
    }
