"""Local ascents: under DDP each rank ascends with its own gradients, and descends with their means over ranks.

That is m-sharpness (Foret et al. 2021, section 3) with a rank's minibatch for each of its parts. The gradient of
evaluation 0, with which nobody descends, is never sent. The last one of a step, with which nobody ascends, the module
averages within its backward pass, as for any optimizer. Of each between the mean is reduced while the next evaluation
runs, since no ascent depends on a descent, in the flat buffer of the mean, one for each bucket, in the dtype that is
computed in: one copy of the gradients for any k > 1. So a step sends k gradients, and waits for what a step of SGD
waits for. With microbatches all k means are reduced so: k copies, of which the last is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..agreement import Agreement
from ..arguments import Settings
from ..open_step import Part
from ..prepare import Prepared
from ..program import Evaluation, Program
from ..shards import is_sharded


class LocalAscents(Part):
    """The means over ranks.

    Args:
        model: the DistributedDataParallel module, or one that has such modules.

    Attributes:
        ranks: how many there are.

    Raises:
        ValueError: it has none, or they have different process groups.
    """

    def __init__(self, model: nn.Module | None) -> None:
        kind = getattr(sys.modules.get("torch.nn.parallel"), "DistributedDataParallel", ())
        self.modules: list[Any] = [m for m in ([] if model is None else model.modules()) if isinstance(m, kind)]
        if not self.modules:
            came = "None" if model is None else type(model).__name__
            raise ValueError(
                "model: expected the DistributedDataParallel module that has the parameters, since ascents is 'local', "
                f"got {came}; fully_shard (FSDP2) reduces gradients as it shards them: its ascents are 'synced'"
            )
        groups = {m.process_group for m in self.modules}
        if len(groups) > 1:
            raise ValueError(f"model: expected one process group, got DistributedDataParallel modules of {len(groups)}")
        self.group = groups.pop()
        self.ranks: int = self.group.size()
        self.agreement = Agreement(())
        self._prepared: Prepared | None = None
        self._followed: tuple[Any, ...] = ()
        self._before_last: int | None = None  # the evaluation before the one whose gradient the module averages
        self._before: list[tuple[Any, bool, bool]] = []  # modules, and what is to come back
        self._pending: dict[str, list[Any]] = {}  # by the name of a mean the all-reduces of it that are under way
        self._digest: tuple[Any, Tensor] | None = None

    def follow(self, prepared: Prepared, program: Program, settings: Settings) -> None:
        """What steps run on, or with, may have changed.

        Raises:
            ValueError: a parameter is not one whose gradients the module averages.
            RuntimeError: the module's gradients are communicated in another way than by their mean.
        """
        for m in self.modules:
            if program.means and getattr(m, "_comm_hooks", None):
                raise RuntimeError(
                    "ascents: expected 'synced' with a communication hook of DistributedDataParallel, through which "
                    "only the last of a step's means would go, got 'local'"
                )
        now = prepared.tensors, prepared.buckets, program, settings
        if len(now) == len(self._followed) and all(a is b for a, b in zip(now, self._followed, strict=True)):
            return
        own = {
            id(p) for m in self.modules for name, p in m.module.named_parameters() if name not in m.parameters_to_ignore
        }
        for p, name in zip(prepared.tensors, prepared.names, strict=True):
            if is_sharded(p):
                raise ValueError(f"ascents: expected 'synced' with a DTensor, {name}, got 'local'")
            if id(p) not in own:
                raise ValueError(
                    f"model: expected a DistributedDataParallel module that has every parameter of the optimizer, but "
                    f"{name} is none of its"
                )
        self.agreement = Agreement({prepared.buckets[0].device})
        self.agreement.say(
            {
                "settings": (settings, len(program.evaluations), program.descents),
                "param_groups": [len(group["params"]) for group in prepared.base.param_groups],
                "parameters": [[*zip(b.names, b.layouts, strict=True)] for b in prepared.buckets],
            }
        )
        self._prepared, self._followed = prepared, now
        last = len(program.evaluations) - 1
        self._before_last = last - 1 if program.evaluations[last].descends else None

    # ---- means ----

    def send(self, mean: str, buffers: Sequence[Tensor]) -> None:
        """Have a mean's part of this rank added to those of the others, in place, while other things happen."""
        works = self._pending.setdefault(mean, [])
        for buffer in buffers:
            works.append(torch.distributed.all_reduce(buffer, group=self.group, async_op=True))

    def receive(self, mean: str) -> None:
        """Wait for a mean."""
        for work in self._pending.get(mean, ()):
            work.wait()
        self._pending.pop(mean, None)

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Add up a few numbers over ranks, in place."""
        for x in sums:
            torch.distributed.all_reduce(x, group=self.group)

    # ---- in a step ----

    def begin(self) -> None:
        """The module synchronises nothing from now on, but its buffers before the first forward pass."""
        if self._before:  # it begins again
            return
        self.agreement.compare()
        numbers = next(iter(self.agreement.numbers.values())).clone()
        self._before = [(m, m.require_backward_grad_sync, m.require_forward_param_sync) for m in self.modules]
        for m in self.modules:
            m.require_backward_grad_sync = False
        self._digest = torch.distributed.all_reduce(numbers, group=self.group, async_op=True), numbers

    def use(self, evaluation: Evaluation) -> None:
        """Go on, if ranks agree.

        Raises:
            RuntimeError: they do not (``Agreement``).
        """
        if self._digest is not None:
            work, sums = self._digest
            work.wait()
            self._digest = None
            self.agreement.hear(self.ranks, sums)
            self.agreement.compare_if_due()
        if evaluation.index == self._before_last:
            for m in self.modules:
                m.require_backward_grad_sync = True

    def commit(self) -> None:
        """The module is as it was."""
        self._give_back()

    def rollback(self) -> None:
        """The module is as it was; what is under way ends in memory that nobody reads."""
        self._give_back()
        if self._pending and self._prepared is not None:
            self._prepared.forget(self._pending)
            self._pending = {}
        self._digest = None

    def _give_back(self) -> None:
        for m, gradients, buffers in self._before:
            m.require_backward_grad_sync, m.require_forward_param_sync = gradients, buffers
        self._before = []
