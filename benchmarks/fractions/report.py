"""What was found: accuracy over rho, against cost and time; the rule for rho; Markdown, JSON."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import tables
from benchmarks.fractions.study import CONTROLS, Settings, Way, relative_time, ways
from benchmarks.paired import FAILS, HOLDS, Interval, differences
from benchmarks.spread import Spread
from benchmarks.store import Store

SGD, SAM = Way("sgd"), Way("sam")


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    settings: Settings
    best: Mapping[Way, float | None]
    """The rho that the tuning seeds chose."""
    accuracy: Mapping[Way, Mapping[float | None, tuple[float, ...]]]
    """By rho: on the test images, after the last step, of each shown seed."""
    times: Mapping[Way, Spread]
    """CPU time of a step over SGD's."""
    environment: Mapping[str, Any]
    data: str

    def at_best(self, way: Way) -> tuple[float, ...]:
        """Of each seed."""
        return self.accuracy[way][self.best[way]]

    def gap(self, a: Way, b: Way) -> Interval:
        """Of the paired differences, each way at its best rho."""
        return Interval.of(differences(self.at_best(a), self.at_best(b)))

    def cost(self, way: Way) -> float:
        """Gradients over SGD's."""
        return way.runs(self.settings, "final")[self.best[way]][0].cost(self.settings)


def make(settings: Settings, store: Store, times: Mapping[Way, Spread], command: str) -> Report:
    """The report on the finished runs, all of which have to be there."""
    return Report(
        settings,
        {way: way.best_rho(settings, store.done) for way in ways(settings)},
        {
            way: {
                rho: tuple(store.done[run.name]["accuracy"] for run in of_rho)
                for rho, of_rho in way.runs(settings, "final").items()
            }
            for way in ways(settings)
        },
        times,
        {**store.environment, "command": command},
        store.data,
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def at_best_rows(report: Report) -> list[tables.Row]:
    """Each way at its best rho: cost, time, accuracy, and what it gains over SGD and over SAM."""
    found = []
    for way in report.best:
        rho, time = report.best[way], relative_time(report.settings, way, report.times)
        found.append(
            (
                way.label(report.settings), f"{report.cost(way):g}", "" if time is None else f"{time:.2f}",
                "" if rho is None else f"{rho:g}", Interval.of(report.at_best(way)).show(100, 1),
                "" if way == SGD else report.gap(way, SGD).show(100, 1, True),
                "" if way == SAM else report.gap(way, SAM).show(100, 1, True),
            )
        )  # fmt: skip
    return found


AT_BEST = ("", "gradients", "CPU time", "rho", "accuracy, %", "minus SGD, points", "minus SAM, points")


def over_rho_rows(report: Report) -> list[tables.Row]:
    """Mean accuracy and its standard deviation over the seeds, each way at each rho."""

    def cell(values: tuple[float, ...]) -> str:
        percent = [100 * x for x in values]
        return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent) if len(percent) > 1 else 0:.1f}"

    return [
        (way.label(report.settings), *(cell(by_rho[rho]) for rho in report.settings.rhos))
        for way, by_rho in report.accuracy.items()
        if None not in by_rho
    ]


def rule_rows(report: Report) -> list[tables.Row]:
    """Ascents on a fraction at rho / √fraction minus SAM at rho, wherever both were tried."""
    rhos, found = report.settings.rhos, []
    for way in (way for way in report.accuracy if way.kind == "sam" and way != SAM):
        cells = []
        for rho in rhos:
            larger = min(rhos, key=lambda x, rho=rho, way=way: abs(x - rho / way.fraction**0.5))
            fits = abs(larger * way.fraction**0.5 / rho - 1) < 1e-6
            gap = Interval.of(differences(report.accuracy[way][larger], report.accuracy[SAM][rho]))
            cells.append(gap.show(100, 1, True) if fits else "")
        if any(cells):
            found.append((f"1/{1 / way.fraction:g} at {way.fraction**-0.5:g} rho", *cells))
    return found


# ---- words -----------------------------------------------------------------------------------------------------------


def conclusion(report: Report) -> list[str]:
    """A sentence for each question. Only what an interval resolves is called a difference."""
    quarter, s = Way("sam", 1 / 4), report.settings
    pairs = [
        *((way, SGD) for way in report.best if way.kind == "sam"),
        (quarter, SAM),
        *((Way("free", longer=longer), Way("sgd", longer=longer)) for longer in (1.0, *s.longer)),
        (Way("free", longer=s.longer[-1]), SAM),
        (Way("early"), Way("late")),
        (Way("early"), Way("second")),
        (Way("early"), SAM),
        (Way("lookbehind-early"), SAM),
        (Way("lookbehind-early"), Way("lookbehind")),
        *((Way(kind, fraction), SGD) for kind, fraction in CONTROLS.items()),
        (quarter, Way("other", 1 / 4)),
    ]
    return [_sentence(report, a, b) for a, b in pairs]


def _sentence(report: Report, a: Way, b: Way) -> str:
    gap = report.gap(a, b)
    words = {HOLDS: "is more accurate than", FAILS: "is less accurate than"}.get(gap.verdict, "is not told apart from")
    cost = report.cost(a) / report.cost(b)
    times = "as many gradients" if cost == 1 else f"{cost:.3g} times its gradients"
    names = [way.label(report.settings) for way in (a, b)]
    return f"{names[0][:1].upper()}{names[0][1:]} {words} {names[1]}: {gap.show(100, 1, True)} points, with {times}."


def describe(report: Report) -> str:
    """The setting, and how the rhos were chosen."""
    s = report.settings
    rhos, seeds, tuning = (", ".join(f"{x:g}" for x in values) for values in (s.rhos, s.seeds, s.tuning_seeds))
    text = f"""
        Handwritten digits, 8x8: {s.training:,} training images, {s.label_noise:.0%} of their labels wrong; a residual
        network of width {s.width}; {s.epochs} epochs of {s.training // s.batch_size} steps with {s.batch_size} images;
        SGD with momentum 0.9, learning rate {s.lr:g} on a cosine, weight decay 5e-4; Lookbehind-SAM's alpha
        {s.alpha:g}. Shown: seeds {seeds}. Rho: for each line the best of {rhos} by accuracy on {s.validation:,}
        further images with as many wrong labels and the seeds {tuning}. Intervals are 95 %, of the mean over the
        seeds (Student's t, paired where it is a difference), and not corrected for their number.
    """
    return " ".join(text.split())


def text(report: Report) -> str:
    """For a terminal."""
    header = ("", *(f"rho {rho:g}" for rho in report.settings.rhos))
    return "\n\n".join(
        [
            describe(report),
            tables.aligned(AT_BEST, at_best_rows(report)),
            "Accuracy over rho, %\n\n" + tables.aligned(header, over_rho_rows(report)),
            "Minus SAM at rho, points\n\n" + tables.aligned(header, rule_rows(report)),
            "\n".join(conclusion(report)),
        ]
    )


def markdown(report: Report) -> str:
    """fractions.md."""
    e, header = report.environment, ("", *(f"rho {rho:g}" for rho in report.settings.rhos))
    chosen = [(way.fraction, rho) for way, rho in report.best.items() if way.kind == "sam"]
    times = ", ".join(
        f"{way.label(report.settings)} {spread.show()}" for way, spread in report.times.items() if way != SGD
    )
    return "\n\n".join(
        [
            "# Ascents on a part of the minibatch, and other ways to save gradients",
            describe(report),
            "![Accuracy against gradients and time](fractions.png)",
            "## What was seen",
            "\n".join(f"- {sentence}" for sentence in conclusion(report)),
            "## Each at its best rho: mean of the seeds (95 % interval)",
            "Gradients and CPU time are those of a whole run over SGD's.",
            "\n".join(tables.markdown(AT_BEST, at_best_rows(report))),
            "## Accuracy over rho, %, mean ± standard deviation",
            "\n".join(tables.markdown(header, over_rho_rows(report))),
            "## The rule for rho",
            " ".join(
                f"""
                rho grows as 1 / √fraction. It would follow where noise dominates a gradient: that of fewer examples
                has a noise that is larger by 1 / √fraction, and all of it is scaled to the length rho. If it holds,
                these differences from SAM at rho are around 0, points; and rho √fraction is the same for the best
                rhos, which here are {"; ".join(f"{rho:g} for {f:g} ({rho * f**0.5:.2g})" for f, rho in chosen)}.
                """.split()
            ),
            "\n".join(tables.markdown(header, rule_rows(report))),
            "## Time",
            " ".join(
                f"""
                CPU time of a step over SGD's, one thread, medians of rounds in turn and quartiles in brackets: {times}.
                Those half of whose steps are SGD's are reckoned from these. A small batch costs more than its share,
                and with so small a network the passes between the gradients show.
                """.split()
            ),
            "## How it was made",
            " ".join(
                f"""
                "Another minibatch" has no example of the descent's. Free ascent is the one of AsyncSAM (Jo, Lim, Lee
                2025), one step stale. Ascents on a part: Bahri, Mobahi, Tay 2021 (a quarter); K-SAM (Ni et al. 2022);
                ESAM (Du et al. 2022). Accuracy: on the test images, whose labels are right, after the last step,
                BatchNorm's statistics estimated anew. Made by `{e["command"]}` at commit {e["commit"]}: torch
                {e["torch"]}, Python {e["python"]}, {e["processor"]}; data (SHA-256) {report.data[:16]}...
                """.split()
            ),
            "Not shown: larger models and other data; ASAM over fractions; Lookbehind over fractions is in compare.md.",
        ]
    ) + "\n"  # fmt: skip


def plain(report: Report) -> dict[str, Any]:
    """fractions.json: all of it, as plain values."""
    s = report.settings
    return {
        "environment": dict(report.environment),
        "data": report.data,
        "settings": asdict(s),
        "rows": [
            {
                **asdict(way), "label": way.label(s), "gradients": report.cost(way), "chosen": report.best[way],
                "accuracy": {"" if rho is None else f"{rho:g}": x for rho, x in report.accuracy[way].items()},
                "time_of_step": asdict(report.times[way]) if way in report.times else None,
            }
            for way in report.best
        ],
        "conclusion": conclusion(report),
    }  # fmt: skip
