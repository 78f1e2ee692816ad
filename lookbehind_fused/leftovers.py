"""Gradients that are there when a step begins: what the last step has left may be cleared, all others are somebody's.

Whoever accumulates gradients, or leaves them from another backward, would lose them to a step that clears. Neither
identity nor version counters tell whether a closure clears gradients itself or adds to them; gradients of NaN in their
place do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .open_step import NOW
from .shards import any_of, any_sharded, shard
from .tensors import tensors_of

FEW, ELEMENTS = 16, 2**14  # so many tensors are looked at, and one more for each so many elements that there are


class Leftovers:
    """Marks the gradients that steps leave: with the version that they have, so that what is added to one shows.

    Of very many small tensors an even sample is looked at (``FEW``, ``ELEMENTS``): of a model whose tensors have
    16,384 elements on average, all.
    """

    def __init__(self) -> None:
        self._tensors: Sequence[Tensor] = ()
        self._sample: Sequence[Tensor] = ()
        self._sharded = False  # FSDP2 adds to the shards of gradients: only their versions count

    def note(self, tensors: Sequence[Tensor]) -> None:
        """The gradients that there are now are leftovers."""
        if tensors is not self._tensors:
            most = FEW + sum(map(Tensor.numel, tensors)) // ELEMENTS
            everywhere = (
                [*range(len(tensors))] if most >= len(tensors) else [i * len(tensors) // most for i in range(most)]
            )
            self._tensors, self._sample = tensors, [tensors[i] for i in everywhere]
            self._sharded = any_sharded(tensors)
        for p in self._sample:
            g = p.grad
            if g is not None:
                g = shard(g) if self._sharded else g
                g._lookbehind_left = g._version  # type: ignore[attr-defined]

    def are_all_there_is(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every gradient there is was left by the last step."""
        return all(p.grad is None or _is_leftover(p.grad) for p in tensors)

    def others(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that have gradients which are no leftovers: none, or all that may be.

        Gradients of 0 are nobody's. It waits for the device only where there are others than leftovers.
        """
        sample = self._sample
        if tensors is not self._tensors:
            known = {*map(id, self._tensors)}
            sample = [*sample, *(p for p in tensors if id(p) not in known)]
        for p in sample:
            g = p.grad
            if g is not None and self._sharded:
                g = shard(g)
            if g is not None and getattr(g, "_lookbehind_left", None) != g._version:
                there = [(p, p.grad) for p in tensors if p.grad is not None]
                others = [(p, g) for p, g in there if not _is_leftover(g)]
                return [p for p, _ in others] if any(any_of(_values(g)) for _, g in others) else []
        return []


def _is_leftover(g: Tensor) -> bool:
    g = shard(g)
    return getattr(g, "_lookbehind_left", None) == g._version


def _values(g: Tensor) -> Tensor:
    return g._values() if g.layout == torch.sparse_coo else g


class Lent:
    """Gradients of NaN in the place of those that are there: what adds to them is NaN, what clears them is not."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        with torch.no_grad():
            self._lent = [(p, p.grad, torch.full_like(p, torch.nan)) for p in params]
        self._refused: Sequence[Tensor] = ()

    def lend(self) -> None:
        """Put them there."""
        for p, _, lent in self._lent:
            p.grad = lent
        self._versions = [shard(lent)._version for _, _, lent in self._lent]

    def is_all_there_is(self, tensors: Sequence[Tensor]) -> bool:
        """Whether no backward has run: nothing was added to them, and no other tensor has a gradient."""
        untouched = {
            id(p)
            for (p, _, g), v in zip(self._lent, self._versions, strict=True)
            if p.grad is g and shard(g)._version == v
        }
        return bool(untouched) and all(p.grad is None or id(p) in untouched for p in tensors)

    def require_cleared(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Refuse to go on where they have been added to.

        Raises:
            RuntimeError: naming the first of the tensors, and the ways out.
        """
        kept = [p for p, _, _ in self._lent if p.grad is not None and not any_of(~_values(p.grad).isnan())]
        if not kept:
            self._lent = []
            return
        self._refused = tensors
        first = next(i for i, p in enumerate(tensors) if p is kept[0])
        more = f" and {len(kept) - 1} more have" if len(kept) > 1 else " has"
        raise RuntimeError(
            f"gradients: expected none, or the last step's, when a step begins, since each evaluation starts from "
            f"cleared ones, but {names[first]}{more} others, which are not cleared before evaluation 0 adds to "
            "them. If they are not wanted, call zero_grad() before the step or in the closure; if "
            "they are accumulated, let the closure run backward for all microbatches of the step, or use them as "
            "evaluation 0: optimizer.closure = the function that gives the other gradients, and step() without one"
        )

    def give_back(self) -> None:
        """Put back those that were there, unless they have been cleared; after a refusal, all. May be called again."""
        for p in self._refused:
            p.grad = None
        for p, grad, lent in self._lent:
            if p.grad is lent or self._refused:
                p.grad = grad


# ---- a base that is stepped by itself --------------------------------------------------------------------------------


def note_when_stepped(base: Optimizer) -> None:
    """What a base optimizer leaves that somebody steps by itself are leftovers too. While a step of ours is open nobody
    is to: it would move perturbed weights, which are not kept.
    """
    if not any(hook is _before_step for hook in base._optimizer_step_pre_hooks.values()):
        base.register_step_pre_hook(_before_step)
    if not any(hook is _after_step for hook in base._optimizer_step_post_hooks.values()):
        base.register_step_post_hook(_after_step)


def _before_step(base: Optimizer, *_: Any) -> None:
    now = NOW.get(id(next((p for group in base.param_groups for p in group["params"]), None)))
    if now is not None and now.open is not None and not now.open.runs_base:
        raise RuntimeError(
            f"{type(base).__name__}.step(): expected no open step, since Lookbehind moves the weights with each "
            "gradient itself; leave the call out"
        )


def _after_step(base: Optimizer, *_: Any) -> None:
    Leftovers().note(tensors_of(base.param_groups))
