"""What was measured beside what the model says, the bound with its verdicts, and predictions for more ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.distributed.plan import (
    COMPUTATION,
    KS,
    LOCAL,
    ONE_ALL_REDUCE,
    ONE_BUCKET,
    PUBLIC,
    SENDERS,
    SYNCED,
    Measured,
    Plan,
)
from benchmarks.spread import Spread, ratios
from benchmarks.tables import Row, aligned, markdown

MOST = 1.1
"""Times the computation and one all-reduce that a step with local ascents may take."""
PREDICTED = (8, 64)
"""Ranks."""
Found = Mapping[str, Mapping[str, Measured]]
"""By link, and by name, of one number of ranks."""


@dataclass(frozen=True)
class Table:
    """One of the report's.

    Args:
        title: and what it is about. header, rows: cells.
    """

    title: str
    header: Row
    rows: list[Row]


def tables(plan: Plan, found: Mapping[int, Found]) -> list[Table]:
    """All of them.

    Args:
        plan: of the run. found: by the number of ranks.
    """
    by_link = [(ranks, link, measured) for ranks, links in found.items() for link, measured in links.items()]
    made = [_steps(plan, *each) for each in by_link]
    header = ("bound", "wanted", "measured: median (quartiles)", "verdict")
    rows = [row for each in by_link for row in _bounds(plan, *each)]
    made.append(Table("The bound of local ascents", header, rows))
    made.append(_compared(by_link))
    header = ("step", *(f"{ranks} ranks, {link}" for ranks in PREDICTED for link in plan.links))
    rows = [
        (c.title, *(_ms(c.predicted(plan.job, link, ranks)) for ranks in PREDICTED for link in plan.links.values()))
        for c in SENDERS
    ]
    title = "Predictions of the model, not measured: milliseconds a step of the same job on more ranks"
    made.append(Table(title, header, rows))
    return made


def _steps(plan: Plan, ranks: int, link: str, measured: Mapping[str, Measured]) -> Table:
    """A row for each contender, and for one all-reduce by itself."""
    one = plan.links[link].seconds(plan.job.payload, ranks)
    rows = []
    for c in (*SENDERS, *COMPUTATION.values(), None):
        name = ONE_ALL_REDUCE if c is None else c.title
        m, predicted = measured[name], one if c is None else c.predicted(plan.job, plan.links[link], ranks)
        seconds = Spread.of(m.seconds)
        evaluations = "" if c is None else str(c.evaluations)
        spread = Spread.of([1e3 * s for s in m.seconds]).show(digits=0)
        sent = f"{m.payload:,}"
        rows.append(
            (name, evaluations, str(m.collectives), sent, spread, _ms(predicted), f"{seconds.median / predicted:.3f}")
        )
    title = (
        f"{ranks} processes, {link}: one all-reduce of a gradient {_ms(one)} ms beside an evaluation of "
        f"{_ms(plan.job.evaluation)} ms"
    )
    header = ("step", "gradients", "all-reduces", "bytes", "milliseconds", "model", "measured / model")
    return Table(title, header, rows)


def _bounds(plan: Plan, ranks: int, link: str, measured: Mapping[str, Measured]) -> Iterator[Row]:
    """Where all-reduces outlast the evaluations that are to hide them, more than one of them has to be waited for."""
    one = plan.links[link].seconds(plan.job.payload, ranks)
    for k, c in LOCAL.items():
        spread = ratios(measured[c.title].seconds, _computation_and(measured, k, 1))
        wanted = f"at most {MOST}"
        if k > 1 and one > plan.job.evaluation:
            model = c.predicted(plan.job, plan.links[link], ranks) / (c.evaluations * plan.job.evaluation + one)
            wanted += f", but all-reduces outlast evaluations: model {model:.2f}"
        what = f"{c.title} / (computation and one all-reduce): {ranks} processes, {link}"
        yield what, wanted, spread.show(), "holds" if spread.median <= MOST else "FAILS"


def _compared(by_link: Sequence[tuple[int, str, Mapping[str, Measured]]]) -> Table:
    """What has no bound: public code, and synced ascents against local ones."""
    rows: list[list[str]] = []
    for c in (PUBLIC, ONE_BUCKET):
        found = [ratios(m[c.title].seconds, _computation_and(m, 1, 2)) for *_, m in by_link]
        rows.append([f"{c.title} / (computation and both all-reduces)", *(f.show() for f in found)])
    for c, k in ((PUBLIC, 1), (ONE_BUCKET, 1), *((SYNCED[k], k) for k in KS)):
        found = [ratios(m[c.title].seconds, m[LOCAL[k].title].seconds) for *_, m in by_link]
        rows.append([f"{c.title} / {LOCAL[k].title}", *(f.show() for f in found)])
    header = ("times", *(f"{ranks} processes, {link}" for ranks, link, _ in by_link))
    return Table("Beside it: times of a step over others', medians and quartiles", header, rows)


def _computation_and(measured: Mapping[str, Measured], k: int, all_reduces: int) -> list[float]:
    """Seconds of each round: k + 1 evaluations with the optimizer's own work, and so many all-reduces."""
    computation, one = measured[COMPUTATION[k].title].seconds, measured[ONE_ALL_REDUCE].seconds
    return [c + all_reduces * r for c, r in zip(computation, one, strict=True)]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def describe(plan: Plan) -> str:
    """What is computed and sent, in a few sentences."""
    job = plan.job
    links = "; ".join(f"{name}, {1e3 * link.latency:g} ms" for name, link in plan.links.items())
    return (
        f"What computes is a sleep: an evaluation takes {_ms(job.evaluation)} ms, {_ms(job.forward)} of it forward, "
        "the rest backward, spread evenly over the layers, as on an accelerator that leaves the cores alone. A "
        f"gradient has {job.payload:,} bytes, which DistributedDataParallel reduces in {job.buckets} buckets. The "
        "slowed link lets an all-reduce take its latency and 2 (n - 1) / n of its bytes over its bandwidth, one at a "
        f"time ({links}). All-reduces and bytes are those that a rank hands over in a step, counted; times are of the "
        f"rank that took longest, all contenders in turn in one process group, {plan.rounds} rounds: medians, and in "
        "brackets the quartiles."
    )


def as_text(made: list[Table]) -> str:
    """For a terminal."""
    return "\n\n".join(f"{t.title}\n\n{aligned(t.header, t.rows)}" for t in made)


def as_markdown(made: list[Table], plan: Plan, environment: Mapping[str, Any]) -> bytes:
    """The file."""
    e = environment
    lines = [
        "# Steps over several processes",
        "",
        f"{e['processor']}, {e['cores']} cores, load average {e['load_before']} before the run and {e['load_after']} "
        f"after it, torch {e['torch']}, Python {e['python']}, {e['system']}. Made by `{e['command']}` in "
        f"{e['minutes']} minutes. {describe(plan)} The model and its assumptions: `benchmarks/distributed/cost.py`.",
    ]
    for t in made:
        lines += ["", f"## {t.title}", "", *markdown(t.header, t.rows)]
    return "\n".join([*lines, ""]).encode()
