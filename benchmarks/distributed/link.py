"""A process group on a slow link: what is sent is sent, but no faster than the link would; and all of it is counted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from benchmarks.distributed.cost import Link


@dataclass
class Sent:
    """What this rank has handed over since it was last cleared.

    Attributes:
        collectives: all-reduces, of any size.
        payload: bytes of their tensors.
        others: collectives that are no all-reduce.
    """

    collectives: int = 0
    payload: int = 0
    others: int = 0


class SlowGroup(dist.ProcessGroup):
    """Hands collectives on to an inner group, from one thread, one at a time as on one wire, and lets each all-reduce
    take as long as it would on a link. Its thread sleeps meanwhile, so the waiting takes no CPU time.

    An all-reduce begins when it is handed over, or when the one before it has ended. What the inner group does with it
    happens within its time; where that takes longer, on a machine that is too busy for the link that it stands for,
    the all-reduce does. Other collectives (a module's first broadcast) are handed on without a delay.

    Only the methods that are here work: what DistributedDataParallel and ``torch.distributed.all_reduce`` call.

    Args:
        inner: the group that communicates.
        link: how long an all-reduce takes.

    Attributes:
        sent: counts since it was last set.
        error: what the inner group failed with. The reducer raises it, but nobody who waits for a work that is made
            from a future does.
    """

    def __init__(self, inner: dist.ProcessGroup, link: Link) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner, self.link, self.sent = inner, link, Sent()
        self.error: Exception | None = None
        self._waiting: queue.SimpleQueue[_Transfer] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="wire", daemon=True).start()

    def allreduce(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        """Reduce in place, over the link."""
        payload = sum(t.nbytes for t in tensors)
        self.sent.collectives += 1
        self.sent.payload += payload
        seconds = self.link.seconds(payload, self.size())
        return self._send(lambda: self.inner.allreduce(tensors, *options), seconds, tensors)

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *options: Any) -> dist.Work:
        """Without a delay."""
        self.sent.others += 1
        return self._send(lambda: self.inner.allgather(outputs, inputs, *options), 0.0, outputs)

    def broadcast(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        """Without a delay."""
        self.sent.others += 1
        return self._send(lambda: self.inner.broadcast(tensors, *options), 0.0, tensors)

    def getBackendName(self) -> str:
        """For DistributedDataParallel's log."""
        return "slow"

    def check(self) -> None:
        """Raise what the inner group failed with."""
        if self.error is not None:
            raise self.error

    def _send(self, start: Callable[[], Any], seconds: float, result: Any) -> dist.Work:
        transfer = _Transfer(start, seconds, result, handed_over=time.perf_counter())
        self._waiting.put(transfer)
        # An exception that a future is given reaches Python alone; what a callback raises reaches the reducer too.
        return _create_work_from_future(transfer.done.then(transfer.outcome))

    def _work(self) -> None:
        free = 0.0  # when the wire is
        while True:
            transfer = self._waiting.get()
            free = max(free, transfer.handed_over) + transfer.seconds
            try:
                transfer.start().wait()
                now = time.perf_counter()
                free = max(free, now)
                time.sleep(free - now)  # who wakes late does not keep the next one waiting: no real wire sleeps
            except Exception as error:
                self.error = transfer.error = error
            transfer.done.set_result(None)


@dataclass
class _Transfer:
    """A collective that is under way or waits for the wire."""

    start: Callable[[], Any]
    seconds: float
    result: Any
    handed_over: float
    error: Exception | None = None
    done: Future[None] = field(default_factory=Future)

    def outcome(self, _: Any) -> Any:
        """What was reduced, or the error."""
        if self.error is not None:
            raise self.error
        return self.result
