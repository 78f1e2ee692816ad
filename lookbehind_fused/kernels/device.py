"""What the backends for GPUs have in common: the passes as launches of kernels that find tensors by address.

A kernel is launched once for all tensors of a call: a program (a block of threads) computes one chunk of one tensor.
Parameters and gradients are reached through tables of addresses in device memory. They belong to the call's ``table``
and are kept as long as it: what has not changed since the last call is not uploaded again. Uploads come from pinned
memory and nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .contract import BUFFERS, Column, Flag, RuleId

CHUNK = 4096  # elements of a program

# launch(kernel, plan, dtype, arguments): a kernel takes of the arguments those that it has. ``dtype`` is the
# parameters'.
Launch = Callable[[str, "Plan", torch.dtype, dict[str, Any]], None]


class Plan:
    """The device's side of a ``table``: who computes what, where the tensors are, and room for sums.

    Attributes:
        rows: int64 (tensors, 4): a tensor's row in ``steps`` and ``sums``, the start and size of its slice of the flat
            buffers, its address.
        chunks: int32 (programs, 2): each program's tensor and its number within that tensor.
        grads: int64 (tensors,): the gradients' addresses.
        elements, row_count: what flat buffers, and what has a row for each tensor, have at the least.
        partials, tensor_sums, counters: float64 for up to 3 sums a program and a tensor; int32, zero between launches.
    """

    def __init__(self, table: Tensor, params: Sequence[Tensor]) -> None:
        self.device, count = params[0].device, len(params)
        chunks_of = torch.clamp((table[:, 2] + CHUNK - 1) // CHUNK, min=1)
        tensor = torch.repeat_interleave(torch.arange(count), chunks_of)
        number = torch.arange(len(tensor)) - (torch.cumsum(chunks_of, 0) - chunks_of)[tensor]
        self.programs = len(tensor)
        self.chunks = torch.stack([tensor, number], 1).to(torch.int32).to(self.device)
        self.rows = torch.empty(count, Column.ADDRESS + 1, dtype=torch.int64, device=self.device)
        self.grads = torch.empty(count, dtype=torch.int64, device=self.device)
        self.partials = torch.empty(3 * self.programs, dtype=torch.float64, device=self.device)
        self.tensor_sums = torch.empty(3 * count, dtype=torch.float64, device=self.device)
        self.counters = torch.zeros(1 + count, dtype=torch.int32, device=self.device)
        self.sizes = table[:, 2].tolist()
        self.steps: Tensor | None = None
        self.captured: list[Tensor] = []
        self.version: int | None = None
        self.addresses: list[int] = []

    def refresh(self, table: Tensor, params: Sequence[Tensor]) -> None:
        """Follow parameters that have moved: whoever moves them writes their addresses into ``table``."""
        if self.version == table._version:
            return
        if any(p.numel() != size for p, size in zip(params, self.sizes, strict=True)):
            found = [p.numel() for p in params]
            raise RuntimeError(f"params: expected {self.sizes} elements as table has, got {found}")
        addresses = torch.tensor([p.data_ptr() for p in params], dtype=torch.int64)
        self._upload(torch.cat([table[:, : Column.ADDRESS], addresses[:, None]], 1), self.rows)
        self.strides = [p.stride() for p in params]
        self.elements, self.row_count = int((table[:, 1] + table[:, 2]).max()), int(table[:, 0].max()) + 1
        self.version = table._version

    def point_at(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Have ``self.grads`` hold the gradients' addresses. Returns the gradients, as they are or laid out as their
        parameters: to be kept until the launch.
        """
        grads = list(grads)
        if len(grads) != len(params):
            raise RuntimeError(f"grads: expected {len(params)}, one for each of params, got {len(grads)}")
        if [*map(Tensor.stride, grads)] != self.strides:
            for i, (g, p) in enumerate(zip(grads, params, strict=True)):
                if g.shape != p.shape:
                    raise RuntimeError(f"grads: tensor {i}: expected shape {tuple(p.shape)}, got {tuple(g.shape)}")
                if any(n != 1 and a != b for n, a, b in zip(g.shape, g.stride(), p.stride(), strict=True)):
                    grads[i] = torch.empty_like(p, memory_format=torch.preserve_format).copy_(g)
        for i, g in enumerate(grads):
            if g.dtype != params[0].dtype:
                raise RuntimeError(f"grads: tensor {i}: expected {params[0].dtype}, got {g.dtype}")
        addresses = [*map(Tensor.data_ptr, grads)]
        if addresses != self.addresses:
            self._upload(torch.tensor(addresses, dtype=torch.int64), self.grads)
            self.addresses = addresses
        return grads

    def copy_of(self, steps: Tensor) -> Tensor:
        """The same numbers in memory of the plan's own, which a captured graph finds again."""
        if self.steps is None or self.steps.shape != steps.shape:
            self.steps = torch.empty_like(steps)
        return self.steps.copy_(steps)

    def _upload(self, values: Tensor, to: Tensor) -> None:
        # A pinned block of its own each time: the allocator does not hand it out again before the copy is done.
        values = values.pin_memory() if to.is_cuda else values
        to.copy_(values, non_blocking=True)
        if to.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.append(values)  # every replay of the graph reads it again


PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by ``table``


class Call:
    """One call of a pass: its plan, and what all of its launches are given."""

    def __init__(self, launch: Launch, params: Sequence[Tensor], grads: Sequence[Tensor] | None, table: Tensor) -> None:
        self._launch, self.params = launch, params
        plan = PLANS.get(table)
        if plan is None or len(plan.sizes) != len(params) or plan.device != params[0].device:
            plan = PLANS[table] = Plan(table, params)
        plan.refresh(table, params)
        self.plan = plan
        self.given = {"rows": plan.rows, "chunks": plan.chunks, "tensors": len(plan.sizes)}
        if grads is not None:
            self.kept = plan.point_at(params, grads)
            self.given["grads"] = plan.grads

    def launch(self, name: str, total: Tensor | None = None, **arguments: Any) -> None:
        """Launch a kernel; one that adds up writes its sums to ``total``."""
        if total is not None:
            plan = self.plan
            arguments.update(partials=plan.partials, tensor_sums=plan.tensor_sums, counters=plan.counters, out=total)
        self._launch(name, self.plan, self.params[0].dtype, {**self.given, **arguments})


class Passes:
    """The passes: methods of the names and with the arguments of ``schema.SCHEMAS``, by position."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def _call(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None, table: Tensor) -> Call:
        return Call(self._launch, params, grads, table)

    def reduce_sq_norm(self, params, grads, perturbed, table, hyper, flags, sq_norms, row) -> None:
        if not params:
            sq_norms[row].zero_()
            return
        _reduce(self._call(params, grads, table), perturbed, hyper, flags, sq_norms, row)

    def ascend(self, params, grads, perturbed, slow, table, sq_norms, row, hyper, flags, done) -> None:
        if not params:
            return
        call = self._call(params, grads, table)
        if row >= 0:
            _reduce(call, None if slow is not None else perturbed, hyper, flags, sq_norms, row)
        call.launch("ascend", perturbed=perturbed, slow=slow, **_norms(sq_norms), hyper=hyper, flags=int(flags))

    def descend(
        self, params, grads, fast, fast_from, state, state_from, steps, steps_from, table, sq_norms, hyper, rule, flags
    ) -> None:
        if params:
            call = self._call(params, grads, table)
            descent = _descent(call.plan, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
            call.launch("descend", fast=fast, fast_from=_from(fast_from, fast), **descent)

    def descend_ascend(
        self, params, grads, perturbed, fast, fast_from, state, state_from, steps, steps_from, table, sq_norms, row,
        hyper, rule, flags,
    ) -> None:  # fmt: skip
        if not params:
            return
        call = self._call(params, grads, table)
        if row >= 0:
            _reduce(call, perturbed, hyper, flags, sq_norms, row)
        descent = _descent(call.plan, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
        call.launch("descend_ascend", perturbed=perturbed, fast=fast, fast_from=_from(fast_from, fast), **descent)

    def descend_interpolate(
        self, params, grads, slow, fast, state, state_from, steps, steps_from, table, sq_norms, hyper, rule, flags,
        done,
    ) -> None:  # fmt: skip
        if params:
            call = self._call(params, grads, table)
            descent = _descent(call.plan, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
            call.launch("descend_interpolate", **_origin(slow, fast, flags), **descent)

    def descend_align(
        self, params, grads, perturbed, slow, fast, first, state, state_from, steps, steps_from, table, sq_norms,
        hyper, rule, flags, sums, done,
    ) -> None:  # fmt: skip
        if not params:
            if not flags & Flag.PER_TENSOR:
                sums.zero_()
            return
        call = self._call(params, grads, table)
        descent = _descent(call.plan, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
        call.launch("descend_align", sums, perturbed=perturbed, **_origin(slow, fast, flags), first=first, **descent)

    def interpolate(self, params, perturbed, slow, table, sums, flags, dtype) -> None:
        if params:
            given = {"sums": sums, "buckets": sums.size(0), "flags": int(flags)}
            self._call(params, None, table).launch("interpolate", perturbed=perturbed, slow=slow, **given)


def _reduce(call: Call, perturbed: Tensor | None, hyper: Tensor, flags: int, sq_norms: Tensor, row: int) -> None:
    call.launch("reduce_sq_norm", sq_norms[row], perturbed=perturbed, hyper=hyper, flags=int(flags))


def _from(source: Tensor | None, target: Tensor | None) -> Tensor | None:
    return target if source is None else source


def _origin(slow: Tensor, fast: Tensor, flags: int) -> dict[str, Tensor | None]:
    """Slow weights are not read twice."""
    same = bool(flags & Flag.DERIVES) or fast.data_ptr() == slow.data_ptr()
    return {"slow": None if same else slow, "fast_from": fast}


def _norms(sq_norms: Tensor | None) -> dict[str, Any]:
    return {"sq_norms": sq_norms, "buckets": 0 if sq_norms is None else sq_norms.size(0)}


def _descent(plan, state, state_from, steps, steps_from, sq_norms, hyper, rule, flags) -> dict[str, Any]:
    """What every kernel that descends is given."""
    if len(state) != BUFFERS[RuleId(rule)]:
        raise RuntimeError(f"state: expected {BUFFERS[RuleId(rule)]} buffers for {RuleId(rule).name}, got {len(state)}")
    if flags & Flag.SKIPS and sq_norms is None:
        raise RuntimeError("sq_norms: expected a tensor where non-finite gradients are skipped, got None")
    if steps_from is None:  # all programs of a tensor read what one of them writes
        steps_from = plan.copy_of(steps)
    state_from = state_from or state
    return {
        **{f"s{i}": state[i] if i < len(state) else None for i in range(3)},
        **{f"f{i}": state_from[i] if i < len(state) else None for i in range(3)},
        "steps": steps,
        "steps_from": steps_from,
        **_norms(sq_norms),
        "hyper": hyper,
        "flags": int(flags),
        "rule": int(rule),
    }
