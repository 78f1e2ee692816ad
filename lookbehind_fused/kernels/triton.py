"""The Triton backend: the kernels of ``triton_kernels``, launched once for all tensors of a call (``kernels.device``).

Triton comes with PyTorch's GPU builds and is imported when the backend is first asked for. The passes are ops of
``torch.ops.lookbehind_fused_triton`` too, so that ``torch.compile`` takes them as they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import device, ops
from .contract import Flag
from .schema import SCHEMAS

NAMESPACE = "lookbehind_fused_triton"
REMEDY = "install triton, or a PyTorch built for the GPU, which comes with it"
DEVICES = "GPUs"
SCALARS_ON_DEVICE = True  # hyper and steps are read by the kernels

_definitions = ops.define(NAMESPACE)
_ops = ops.of(NAMESPACE)


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
        active: torch.device = triton.runtime.driver.active.get_active_torch_device()
    except RuntimeError:  # there is no driver
        return False
    return active.type == device.type


def _prepare(name: str, plan: device.Plan, dtype: torch.dtype, arguments: dict[str, Any]) -> device.Launch:
    """A launch of a kernel of ``triton_kernels``, compiled for these dtypes and settings when it is first called."""
    import triton.language as tl

    from . import triton_kernels

    flags = arguments["flags"]
    values = {
        **arguments,
        "P": getattr(tl, str(dtype).removeprefix("torch.")),
        "T": tl.float64 if dtype == torch.float64 else tl.float32,
        "RULE": arguments.get("rule"),
        "ADAPTS": bool(flags & Flag.ADAPTIVE),
        "SKIPS": bool(flags & Flag.SKIPS),
        "DERIVES": bool(flags & Flag.DERIVES),
        "CLIPS": arguments.get("sq_norms") is not None,
        "PER_TENSOR": bool(flags & Flag.PER_TENSOR),
    }
    kernel = getattr(triton_kernels, name)
    own = {argument: values[argument] for argument in kernel.arg_names}
    run = partial(kernel[(len(arguments["chunks"]),)], **own, **triton_kernels.options(64 if torch.version.hip else 32))
    if plan.device.type != "cuda":
        return run

    def launch() -> None:
        with torch.cuda.device(plan.device):
            run()

    return launch


for _name in SCHEMAS:
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter
        _definitions.impl(_name, device.implementation(_prepare, _name), _key)


def bind(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    """The pass ``name``, to be called with the gradients (``interpolate`` ignores them).

    Args:
        name: one of ``schema.SCHEMAS``.
        params, table: as there.
        arguments: the others but ``grads``, by name.
    """
    return device.bind(_prepare, _ops[name], name, params, table, arguments)


def _bind_once(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    return device.bind(_prepare, _ops[name], name, params, table, arguments, once=True)


reduce_sq_norm = ops.by_keywords(_bind_once, "reduce_sq_norm")
ascend = ops.by_keywords(_bind_once, "ascend")
descend = ops.by_keywords(_bind_once, "descend")
descend_ascend = ops.by_keywords(_bind_once, "descend_ascend")
descend_interpolate = ops.by_keywords(_bind_once, "descend_interpolate")
descend_align = ops.by_keywords(_bind_once, "descend_align")
interpolate = ops.by_keywords(_bind_once, "interpolate")
