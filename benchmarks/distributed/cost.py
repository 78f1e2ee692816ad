"""A model of what a step costs on n ranks, in seconds.

Assumptions:

- An evaluation is a forward pass of f and a backward pass of b seconds, alike on all ranks and for all layers; what an
  optimizer does between evaluations takes no time beside them.
- An all-reduce is a ring's: of its bytes a rank sends 2 (n - 1) / n over its link, and the latency is paid once for
  each all-reduce, whatever n is (a ring's own grows with n). All-reduces follow one another, one at a time; what is
  computed slows none of them, and none slows what is computed.
- DistributedDataParallel reduces m buckets of equal size, the first of which is full when 1 / m of backward has been
  done, the last when all of it has. So an evaluation that is synchronised ends when the last bucket has arrived: m
  all-reduces after the first was full, or one after backward, whichever is later.

From these a step of

- SGD is one synchronised evaluation, one of SAM two, and one of Lookbehind with gradient reuse k + 1;
- Lookbehind with local ascents is k evaluations that nothing is waited for in, and one that is synchronised, the last.
  The gradient of evaluation 0 is never sent, and the few numbers that ranks compare travel behind it. Of each other but
  the last a mean is sent whole, and waited for only as far as it outlasts the next evaluation; the buckets of the last
  one follow the mean before them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What a rank sends through.

    Args:
        latency: seconds an all-reduce. bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float

    def seconds(self, payload: float, ranks: int) -> float:
        """Of a ring all-reduce of so many bytes."""
        return self.latency + 2 * (ranks - 1) / ranks * payload / self.bandwidth


@dataclass(frozen=True)
class Job:
    """What is computed and what is sent.

    Args:
        forward, backward: seconds of an evaluation. payload: bytes of a gradient. buckets: of DistributedDataParallel.
    """

    forward: float
    backward: float
    payload: int
    buckets: int

    @property
    def evaluation(self) -> float:
        """Seconds of an evaluation of which nothing is sent."""
        return self.forward + self.backward

    def synced(self, evaluations: int, link: Link, ranks: int, buckets: int | None = None) -> float:
        """A step of so many evaluations, each of which DistributedDataParallel reduces in its buckets."""
        m = buckets or self.buckets
        bucket = link.seconds(self.payload / m, ranks)
        return evaluations * (self.forward + max(self.backward + bucket, self.backward / m + m * bucket))

    def local(self, k: int, link: Link, ranks: int) -> float:
        """A step with local ascents."""
        m, mean = self.buckets, link.seconds(self.payload, ranks)
        bucket = link.seconds(self.payload / m, ranks)
        before = self.evaluation if k == 1 else 2 * self.evaluation + (k - 2) * max(self.evaluation, mean)
        first_is_full = self.forward + self.backward / m
        first_is_sent = first_is_full if k == 1 else max(first_is_full, mean)
        return before + max(first_is_sent + m * bucket, self.evaluation + bucket)
