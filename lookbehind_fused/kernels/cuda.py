"""The CUDA backend: csrc's kernels for CUDA GPUs, launched once for all tensors of a call (``kernels.device``).

They are in the library of the native backend where it was built with a CUDA toolkit, one kernel an op of
``torch.ops.lookbehind_fused_cuda``. The passes are then the CUDA implementations of ``torch.ops.lookbehind_fused``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import device, native, ops
from .contract import INLINED
from .schema import SCHEMAS

NAMESPACE = "lookbehind_fused_cuda"
REMEDY = (
    "install the CUDA toolkit (nvcc) of the CUDA that this PyTorch is for and a C++17 compiler (g++), then install the "
    "package again with --no-build-isolation"
)
DEVICES = "CUDA GPUs of the compute capabilities that its library was compiled for"
SCALARS_ON_DEVICE = True  # hyper and steps are read by the kernels

# What a kernel is given: tables and what they ask for of ``device.Plan``, the parameters' dtype, the rest as in
# ``schema``. The buffers s0 to s2 are ``state``, f0 to f2 ``state_from``.
_PLACE = "Tensor rows, Tensor chunks, ScalarType dtype, int elements, int row_count, int group_count"
_DESCENT = (
    f"({_PLACE}, Tensor grads, Tensor(a!)? perturbed, Tensor? slow, Tensor(b!)? fast, Tensor fast_from, Tensor? first, "
    "Tensor(c!)? s0, Tensor(d!)? s1, Tensor(e!)? s2, Tensor? f0, Tensor? f1, Tensor? f2, Tensor(f!) steps, "
    "Tensor steps_from, Tensor? sq_norms, Tensor hyper, int rule, int flags, "
    "Tensor(g!)? partials, Tensor(h!)? tensor_sums, Tensor(i!)? counters, Tensor(j!)? out, Tensor(k!)? done) -> ()"
)
KERNELS = {
    "reduce_sq_norm": f"({_PLACE}, Tensor grads, Tensor? perturbed, Tensor hyper, int flags, "
    "Tensor(a!) partials, Tensor(b!) tensor_sums, Tensor(c!) counters, Tensor(d!) out) -> ()",
    "ascend": f"({_PLACE}, Tensor grads, Tensor(a!)? perturbed, Tensor(b!)? slow, Tensor sq_norms, Tensor hyper, "
    "int flags, Tensor(c!)? done) -> ()",
    "descend": _DESCENT,
    "descend_ascend": _DESCENT,
    "descend_interpolate": _DESCENT,
    "descend_align": _DESCENT,
    "interpolate": f"({_PLACE}, Tensor? perturbed, Tensor slow, Tensor sums, int flags) -> ()",
}

_definitions = torch.library.Library(NAMESPACE, "DEF")
_definitions.define("serves(int device) -> bool")
for _name, _schema in KERNELS.items():
    _definitions.define(_name + _schema)
_kernels = {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in KERNELS}
_arguments = {name: [argument.name for argument in op._schema.arguments] for name, op in _kernels.items()}

unavailable: str | None = native.why_not()
if unavailable is None and not _kernels["ascend"].has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA):
    unavailable = f"{native.LIBRARY.name} was built without CUDA"


def why_not() -> str | None:
    """Why there is nothing to call; None if there is."""
    return unavailable


def serves(device: torch.device) -> bool:
    """Whether there are kernels for tensors on a device."""
    if device.type != "cuda":
        return False
    return _has_code(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _has_code(number: int) -> bool:
    found: bool = torch.ops.lookbehind_fused_cuda.serves(number)
    return found


def _prepare(name: str, plan: device.Plan, dtype: torch.dtype, arguments: dict[str, Any]) -> device.Launch:
    """A launch of a kernel with those of the arguments that it has."""
    sizes = {"elements": plan.elements, "row_count": plan.row_count, "group_count": plan.group_count}
    values = {**arguments, **sizes, "dtype": dtype}
    return partial(_kernels[name], *[values.get(argument) for argument in _arguments[name]])


if unavailable is None:
    for _name in SCHEMAS:
        native._definitions.impl(_name, device.implementation(_prepare, _name, INLINED), "CUDA")


def bind(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    """The pass ``name``, to be called with the gradients (``interpolate`` ignores them).

    Args:
        name: one of ``schema.SCHEMAS``.
        params, table: as there.
        arguments: the others but ``grads``, by name.
    """
    return device.bind(_prepare, native._ops[name], name, params, table, arguments, inlined=INLINED)


def _bind_once(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    return device.bind(_prepare, native._ops[name], name, params, table, arguments, once=True, inlined=INLINED)


reduce_sq_norm = ops.by_keywords(_bind_once, "reduce_sq_norm")
ascend = ops.by_keywords(_bind_once, "ascend")
descend = ops.by_keywords(_bind_once, "descend")
descend_ascend = ops.by_keywords(_bind_once, "descend_ascend")
descend_interpolate = ops.by_keywords(_bind_once, "descend_interpolate")
descend_align = ops.by_keywords(_bind_once, "descend_align")
interpolate = ops.by_keywords(_bind_once, "interpolate")
