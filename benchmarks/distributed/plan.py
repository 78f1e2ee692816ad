"""What is measured: who, over which links, how often."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.distributed.cost import Job, Link

LAYERS, WIDE, NARROW = 8, 256, 128
PAYLOAD = 4 * LAYERS * WIDE * NARROW
"""Bytes of a gradient in float32."""
BUCKETS = 4
"""Of DistributedDataParallel, as many as its 25 MB make of a network of 100 MB."""


@dataclass(frozen=True)
class Contender:
    """Who takes a step.

    Args:
        method: "SGD", "public SAM" or "Lookbehind".
        k: inner steps, each an evaluation beside the first; SGD has none.
        sends: "nothing", for the computation alone; "gradients", each in DistributedDataParallel's buckets, or each in
            "one bucket"; "means", of local ascents.
    """

    method: str
    k: int
    sends: str

    @property
    def title(self) -> str:
        """What it is called in tables."""
        if self.sends == "nothing":
            return f"computation, {self.evaluations} evaluations"
        if self.method != "Lookbehind":
            return self.method + (", one bucket" if self.sends == "one bucket" else "")
        form = "local" if self.sends == "means" else "synced"
        return f"{'SAM' if self.k == 1 else f'Lookbehind, k = {self.k}'}, {form}"

    @property
    def evaluations(self) -> int:
        """Gradients a step."""
        return self.k + 1

    def predicted(self, job: Job, link: Link, ranks: int) -> float:
        """Seconds that the model of the cost says."""
        if self.sends == "nothing":
            return self.evaluations * job.evaluation
        if self.sends == "means":
            return job.local(self.k, link, ranks)
        return job.synced(self.evaluations, link, ranks, 1 if self.sends == "one bucket" else None)


KS = (1, 2, 5)
COMPUTATION = {k: Contender("Lookbehind", k, "nothing") for k in KS}
SYNCED = {k: Contender("Lookbehind", k, "gradients") for k in KS}
LOCAL = {k: Contender("Lookbehind", k, "means") for k in KS}
PUBLIC = Contender("public SAM", 1, "gradients")
ONE_BUCKET = Contender("public SAM", 1, "one bucket")
SENDERS = (Contender("SGD", 0, "gradients"), PUBLIC, ONE_BUCKET, *SYNCED.values(), *LOCAL.values())
CONTENDERS = (*COMPUTATION.values(), *SENDERS)
ONE_ALL_REDUCE = "one all-reduce of a gradient"


@dataclass(frozen=True)
class Plan:
    """How a run is made.

    Args:
        job: what an evaluation takes. links: by what they are called. rounds: in each of which all have a turn.
        contenders: who has, beside one all-reduce.
    """

    job: Job
    links: dict[str, Link]
    rounds: int
    contenders: tuple[Contender, ...] = CONTENDERS

    @classmethod
    def of(cls, quick: bool, rounds: int | None = None) -> Plan:
        """A whole run, or one that shows no more than that everything works."""
        if quick:
            return cls(Job(0.004, 0.008, PAYLOAD, BUCKETS), {"200 MB/s": Link(0.001, 200e6)}, rounds or 2)
        links = {"14 MB/s": Link(0.001, 14e6), "3.5 MB/s": Link(0.001, 3.5e6)}
        return cls(Job(0.05, 0.1, PAYLOAD, BUCKETS), links, rounds or 9)


@dataclass(frozen=True)
class Measured:
    """Of one who takes part, over one link.

    Attributes:
        seconds: of a step, of each round: of the rank that took longest.
        collectives, payload: all-reduces a step, and bytes of their tensors: of each rank, and in each round.
    """

    seconds: list[float]
    collectives: int
    payload: int
