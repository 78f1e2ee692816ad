"""A call bound to a bucket's memory: all that a pass is given but the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.contract import Flag, RuleId
from .kernels.schema import ARGUMENTS
from .lowering import BETWEEN, Call

if TYPE_CHECKING:
    from .buckets import Bucket

SHARED, PIECE = 2**19, 2**14  # elements: fewer stay on one thread; torch's own ops share out from 2^15 on

BoundCall = Callable[[Sequence[Any]], Any]
"""To be called with the gradients of the tensors that it was bound for; the reference backend takes None for one."""


def bind_call(bucket: Bucket, call: Call, rows: tuple[int, ...], kernels: ModuleType) -> BoundCall:
    """Bind a call for the bucket's tensors ``rows`` to a backend; nothing is done for what happens between buckets."""
    if call.op in BETWEEN:
        return _nothing([], None)
    buffers = {role: bucket.memory_of(name) for role, name in call.buffers.items()}
    if call.op == "copy":
        return lambda grads: torch._foreach_copy_(pieces(buffers["target"]), pieces(buffers["source"]))
    if call.op == "clear":
        return lambda grads: torch._foreach_zero_(pieces(buffers["target"]))
    whole = len(rows) == len(bucket.shards)
    params = bucket.shards if whole else [bucket.shards[row] for row in rows]
    cell = bucket.done[call.cell : call.cell + 1] if call.cell >= 0 else None
    if call.op == "load":
        return _load(params, bucket.views("slow", rows), buffers)
    if call.op == "keep":
        return _keep(params, [bucket.views(role, rows) for role in buffers], cell)
    squares = bucket.norms.squares[bucket.device][call.slot]
    finds = call.fills or call.op == "reduce_sq_norm"
    sums = _sums(bucket, call)
    if not rows:
        written = squares[bucket.number] if finds else sums if call.op == "descend_align" else None
        return _nothing([x for x in (written, cell) if x is not None], cell)
    flags = bucket.flags | call.flags
    arguments = {
        **buffers,
        "hyper": bucket.mean_hyper if call.gathers else bucket.hyper,
        "rule": int(RuleId.SGD if call.gathers else bucket.rule_id),
        "flags": int(flags & (Flag.ADAPTIVE | Flag.SKIPS) if call.gathers else flags),
        "sq_norms": squares if finds or _needs_norm(bucket, call) else None,
        "row": bucket.number if finds else -1,
        "sums": sums,
        "done": cell,
    }
    own = {name: value for name, value in arguments.items() if name in ARGUMENTS[call.op]}
    run: BoundCall = kernels.bind(call.op, params, bucket.table if whole else bucket.table[[*rows]], own)
    if sums is not None and call.op == "descend_align" and not whole and flags & Flag.PER_TENSOR:
        run = _with_nan(run, sums)
    return _with_mean(run, bucket.views(call.mean, rows), bucket.dtype) if call.mean else run


def pieces(buffer: Tensor) -> list[Tensor]:
    """A flat buffer for ops of torch that go over all of it: whole, or in pieces so small that torch works on them with
    one thread, where its size is one at which the native kernels do (``Threads`` in ``csrc/ops.cpp`` says why).
    """
    small = buffer.device.type == "cpu" and buffer.numel() < SHARED
    return [*buffer.split(PIECE)] if small else [buffer]


def _needs_norm(bucket: Bucket, call: Call) -> bool:
    if call.op in ("ascend", "descend_ascend") or bucket.flags & Flag.SKIPS:
        return True
    return bucket.traits.needs_norms and not call.gathers


def _sums(bucket: Bucket, call: Call) -> Tensor | None:
    """A row for each tensor; or of those of all buckets the own one, which is written, or all, which are read."""
    if "sums" not in call.buffers:
        return None
    if bucket.flags & Flag.PER_TENSOR:
        return bucket.sums
    sums = bucket.norms.sums[bucket.device]
    return sums[bucket.number : bucket.number + 1] if call.op == "descend_align" else sums


def _keep(params: list[Tensor], views: list[list[Tensor]], cell: Tensor | None) -> BoundCall:
    """slow = perturbed = params."""

    def keep(grads: Sequence[Tensor]) -> None:
        for of_buffer in views if params else ():
            torch._foreach_copy_(of_buffer, params)
        if cell is not None:
            cell.fill_(1)

    return keep


def _load(params: list[Tensor], slow: list[Tensor], buffers: dict[str, Tensor]) -> BoundCall:
    """params = perturbed = slow."""

    def load(grads: Sequence[Tensor]) -> None:
        if "perturbed" in buffers:
            torch._foreach_copy_(pieces(buffers["perturbed"]), pieces(buffers["slow"]))
        if params:
            torch._foreach_copy_(params, slow)

    return load


def _nothing(written: list[Tensor], cell: Tensor | None) -> BoundCall:
    """A pass over no tensors: its sums, which are added to others, are 0, and it has run."""

    def run(grads: Sequence[Tensor]) -> None:
        for x in written:
            x.fill_(x is cell)

    return run


def _with_nan(run: BoundCall, sums: Tensor) -> BoundCall:
    """Tensors that take no part have no alpha."""

    def run_with_nan(grads: Sequence[Tensor]) -> None:
        sums.fill_(torch.nan)
        run(grads)

    return run_with_nan


def _with_mean(run: BoundCall, mean: list[Tensor], dtype: torch.dtype) -> BoundCall:
    """The mean takes the gradients' place."""
    if all(x.dtype == dtype for x in mean):
        return lambda grads: run(mean)
    return lambda grads: run([x.to(dtype) for x in mean])
