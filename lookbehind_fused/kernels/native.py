"""The native backend: csrc's compiled kernels for CPU tensors, as ops of ``torch.ops.lookbehind_fused``.

The ops are defined here from ``schema.SCHEMAS``; the library only holds implementations. It is built by ``setup.py``;
without a C++ compiler the package installs all the same, and ``unavailable`` says why there is nothing to call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops
from .schema import ADDRESS, SCHEMAS

NAMESPACE = "lookbehind_fused"
LIBRARY = Path(__file__).parent.parent / "_native.abi3.so"
REMEDY = "install a C++17 compiler (g++) and ninja, then install the package again with --no-build-isolation"
DEVICES = "CPUs"
SCALARS_ON_DEVICE = False  # hyper and steps are read by the host

_definitions = ops.define(NAMESPACE)


def _load() -> str | None:
    """Load the library and return None, or why that is impossible."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built when the package was installed"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    return None


unavailable: str | None = _load()


def why_not() -> str | None:
    """Why there is nothing to call; None if there is."""
    return unavailable


def serves(device: torch.device) -> bool:
    """Whether there are kernels for tensors on a device."""
    return device.type == "cpu"


def _by_address(name: str) -> Callable[..., None]:
    """The op ``name`` without the list of parameters: a list of tensors costs the dispatcher more than a pass over
    small ones, and ``table`` has their addresses.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    position = [argument.name for argument in op._schema.arguments].index("table")

    def call(params: list[Tensor], grads: Any, *others: Any) -> None:
        table = others[position - 2]
        op([] if table.size(1) > ADDRESS else params, grads, *others)

    return call


def _pass(name: str) -> Callable[..., None]:
    return ops.as_pass(NAMESPACE, name, _by_address(name) if "Tensor[] grads" in SCHEMAS[name] else None)


reduce_sq_norm = _pass("reduce_sq_norm")
ascend = _pass("ascend")
descend = _pass("descend")
descend_ascend = _pass("descend_ascend")
descend_interpolate = _pass("descend_interpolate")
descend_align = _pass("descend_align")
interpolate = _pass("interpolate")
