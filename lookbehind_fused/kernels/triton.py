"""The Triton backend: the kernels of ``triton_kernels``, launched once for all tensors of a call.

Triton comes with PyTorch's GPU builds and is imported when the backend is first asked for. The passes are ops of
``torch.ops.lookbehind_fused_triton`` too, so that ``torch.compile`` takes them as they are.

A call finds its parameters and gradients through tables of addresses in device memory. They belong to the call's
``table`` and are kept as long as it: what has not changed since the last call is not uploaded again. Uploads come from
pinned memory and nothing waits for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import ops
from .schema import ADDRESS, SCHEMAS, Flag

NAMESPACE = "lookbehind_fused_triton"
REMEDY = "install triton, or a PyTorch built for the GPU, which comes with it"
DEVICES = "GPUs"
SCALARS_ON_DEVICE = True  # hyper and steps are read by the kernels

_definitions = ops.define(NAMESPACE)


def why_not() -> str | None:
    """Why there is nothing to call; None if there is."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def serves(device: torch.device) -> bool:
    """Whether there are kernels for tensors on a device: that of Triton's driver, or any in its interpreter."""
    if device.type == "cuda":
        return True
    import triton

    if triton.knobs.runtime.interpret:
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # there is no driver
        return False


# ---- what a call has on the device -----------------------------------------------------------------------------------


class Plan:
    """The device's side of a ``table``: who computes what, where the tensors are, and room for sums.

    Attributes:
        rows: int64 (tensors, 4), chunks: int32 (programs, 2), grads: int64 (tensors,): see ``triton_kernels``.
        partials, tensor_sums, counters: float64 for up to 3 sums a program and a tensor; int32, zero between launches.
    """

    def __init__(self, table: Tensor, params: Sequence[Tensor], chunk: int) -> None:
        self.device, count = params[0].device, len(params)
        chunks_of = torch.clamp((table[:, 2] + chunk - 1) // chunk, min=1)
        tensor = torch.repeat_interleave(torch.arange(count), chunks_of)
        number = torch.arange(len(tensor)) - (torch.cumsum(chunks_of, 0) - chunks_of)[tensor]
        self.programs = len(tensor)
        self.chunks = torch.stack([tensor, number], 1).to(torch.int32).to(self.device)
        self.rows = torch.empty(count, ADDRESS + 1, dtype=torch.int64, device=self.device)
        self.grads = torch.empty(count, dtype=torch.int64, device=self.device)
        self.partials = torch.empty(3 * self.programs, dtype=torch.float64, device=self.device)
        self.tensor_sums = torch.empty(3 * count, dtype=torch.float64, device=self.device)
        self.counters = torch.zeros(1 + count, dtype=torch.int32, device=self.device)
        self.sizes = table[:, 2].tolist()
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
        self._upload(torch.cat([table[:, :ADDRESS], addresses[:, None]], 1), self.rows)
        self.strides = [p.stride() for p in params]
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

    def _upload(self, values: Tensor, to: Tensor) -> None:
        # A pinned block of its own each time: the allocator does not hand it out again before the copy is done.
        to.copy_(values.pin_memory() if to.is_cuda else values, non_blocking=True)


PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by ``table``


class Call:
    """One call of a pass: its plan, and what all of its launches are given."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None, table: Tensor) -> None:
        from . import triton_kernels

        self.kernels, self.params = triton_kernels, params
        self.options = triton_kernels.options(64 if torch.version.hip else 32)
        plan = PLANS.get(table)
        if plan is None or len(plan.sizes) != len(params) or plan.device != params[0].device:
            plan = PLANS[table] = Plan(table, params, triton_kernels.CHUNK.value)
        plan.refresh(table, params)
        self.plan = plan
        self.given = {"rows": plan.rows, "chunks": plan.chunks}
        if grads is not None:
            self.kept = plan.point_at(params, grads)
            self.given["grads"] = plan.grads

    def launch(self, name: str, total: Tensor | None = None, **arguments: Any) -> None:
        """Launch a kernel; one that adds up writes its sums to ``total``."""
        import triton.language as tl

        dtype = self.params[0].dtype
        types = {"P": getattr(tl, str(dtype).removeprefix("torch.")), "T": tl.float32}
        if dtype == torch.float64:
            types["T"] = tl.float64
        if total is not None:
            plan = self.plan
            arguments.update(partials=plan.partials, tensor_sums=plan.tensor_sums, counters=plan.counters)
            arguments.update(tensors=len(plan.sizes), out=total)
        on_device = torch.cuda.device(self.plan.device) if self.plan.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            getattr(self.kernels, name)[(self.plan.programs,)](**self.given, **arguments, **types, **self.options)


# ---- the passes ------------------------------------------------------------------------------------------------------


def _reduce(call: Call, perturbed: Tensor | None, hyper: Tensor, flags: int, sq_norms: Tensor, row: int) -> None:
    adapts = bool(flags & Flag.ADAPTIVE)
    call.launch("reduce_sq_norm", sq_norms[row], perturbed=perturbed, hyper=hyper, ADAPTS=adapts)


def _reduce_sq_norm(params, grads, perturbed, table, hyper, flags, sq_norms, row) -> None:
    if not params:
        sq_norms[row].zero_()
        return
    _reduce(Call(params, grads, table), perturbed, hyper, flags, sq_norms, row)


def _ascend(params, grads, perturbed, slow, table, sq_norms, row, hyper, flags) -> None:
    if not params:
        return
    call = Call(params, grads, table)
    if row >= 0:
        _reduce(call, None if slow is not None else perturbed, hyper, flags, sq_norms, row)
    call.launch(
        "ascend", perturbed=perturbed, slow=slow, **_norms(sq_norms), hyper=hyper, ADAPTS=bool(flags & Flag.ADAPTIVE)
    )  # fmt: skip


def _descend(
    params, grads, fast, fast_from, state, state_from, steps, steps_from, table, sq_norms, hyper, rule, flags
) -> None:
    if params:
        call = Call(params, grads, table)
        descent = _descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
        call.launch("descend", fast=fast, fast_from=_from(fast_from, fast), **descent, CLIPS=sq_norms is not None)


def _descend_ascend(
    params, grads, perturbed, fast, fast_from, state, state_from, steps, steps_from, table, sq_norms, row, hyper, rule,
    flags,
) -> None:  # fmt: skip
    if not params:
        return
    call = Call(params, grads, table)
    if row >= 0:
        _reduce(call, perturbed, hyper, flags, sq_norms, row)
    descent = _descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    adapts = bool(flags & Flag.ADAPTIVE)
    call.launch(
        "descend_ascend", perturbed=perturbed, fast=fast, fast_from=_from(fast_from, fast), **descent, ADAPTS=adapts
    )


def _descend_interpolate(
    params, grads, slow, fast, state, state_from, steps, steps_from, table, sq_norms, hyper, rule, flags
) -> None:
    if params:
        call = Call(params, grads, table)
        descent = _descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
        call.launch("descend_interpolate", **_origin(slow, fast, flags), **descent, CLIPS=sq_norms is not None)


def _descend_align(
    params, grads, perturbed, slow, fast, first, state, state_from, steps, steps_from, table, sq_norms, hyper, rule,
    flags, sums,
) -> None:  # fmt: skip
    per_tensor = bool(flags & Flag.PER_TENSOR)
    if not params:
        if not per_tensor:
            sums.zero_()
        return
    call = Call(params, grads, table)
    descent = _descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags)
    call.launch(
        "descend_align", sums, perturbed=perturbed, **_origin(slow, fast, flags), first=first, **descent,
        CLIPS=sq_norms is not None, PER_TENSOR=per_tensor,
    )  # fmt: skip


def _interpolate(params, perturbed, slow, table, sums, flags) -> None:
    if params:
        per_tensor = bool(flags & Flag.PER_TENSOR)
        call = Call(params, None, table)
        call.launch(
            "interpolate", perturbed=perturbed, slow=slow, sums=sums, buckets=sums.size(0), PER_TENSOR=per_tensor
        )


def _from(source: Tensor | None, target: Tensor | None) -> Tensor | None:
    return target if source is None else source


def _origin(slow: Tensor, fast: Tensor, flags: int) -> dict[str, Tensor | None]:
    """Slow weights are not read twice."""
    same = bool(flags & Flag.DERIVES) or fast.data_ptr() == slow.data_ptr()
    return {"slow": None if same else slow, "fast_from": fast}


def _norms(sq_norms: Tensor | None) -> dict[str, Any]:
    return {"sq_norms": sq_norms, "buckets": 0 if sq_norms is None else sq_norms.size(0)}


RULES = {("none", 0): 0, ("sgd", 0): 1, ("sgd", 1): 2, ("adam", 2): 3, ("adam", 3): 4}  # as in triton_kernels


def _descent(state, state_from, steps, steps_from, sq_norms, hyper, rule, flags) -> dict[str, Any]:
    """What every kernel that descends is given."""
    if (rule, len(state)) not in RULES:
        raise RuntimeError(f"rule, state: expected one of {[*RULES]}, got {rule!r} with {len(state)} buffers")
    if steps_from is None:  # all programs of a tensor read what one of them writes
        steps_from = steps.clone()
    state_from = state_from or state
    return {
        **{f"s{i}": state[i] if i < len(state) else None for i in range(3)},
        **{f"f{i}": state_from[i] if i < len(state) else None for i in range(3)},
        "steps": steps,
        "steps_from": steps_from,
        **_norms(sq_norms),
        "hyper": hyper,
        "flags": int(flags),
        "RULE": RULES[rule, len(state)],
        "DERIVES": bool(flags & Flag.DERIVES),
    }


_EAGER = {
    "reduce_sq_norm": _reduce_sq_norm,
    "ascend": _ascend,
    "descend": _descend,
    "descend_ascend": _descend_ascend,
    "descend_interpolate": _descend_interpolate,
    "descend_align": _descend_align,
    "interpolate": _interpolate,
}
for _name in SCHEMAS:
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter
        _definitions.impl(_name, _EAGER[_name], _key)

reduce_sq_norm = ops.as_pass(NAMESPACE, "reduce_sq_norm", _reduce_sq_norm)
ascend = ops.as_pass(NAMESPACE, "ascend", _ascend)
descend = ops.as_pass(NAMESPACE, "descend", _descend)
descend_ascend = ops.as_pass(NAMESPACE, "descend_ascend", _descend_ascend)
descend_interpolate = ops.as_pass(NAMESPACE, "descend_interpolate", _descend_interpolate)
descend_align = ops.as_pass(NAMESPACE, "descend_align", _descend_align)
interpolate = ops.as_pass(NAMESPACE, "interpolate", _interpolate)
