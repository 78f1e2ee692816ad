"""The native backend: csrc's compiled kernels for CPU tensors, as ops of ``torch.ops.lookbehind_fused``.

The ops are defined here from ``schema.SCHEMAS``; the library only holds implementations. It is built by ``setup.py``,
unless ``LOOKBEHIND_NATIVE=0`` asks for none: then ``unavailable`` says why there is nothing to call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import contract, ops
from .contract import Column
from .schema import completed

NAMESPACE = "lookbehind_fused"
LIBRARY = Path(__file__).parent.parent / "_native.abi3.so"
REMEDY = (
    "install a C++17 compiler (g++) and ninja, then install the package again with --no-build-isolation and without "
    "LOOKBEHIND_NATIVE=0"
)
DEVICES = "CPUs"
SCALARS_ON_DEVICE = False  # hyper, steps and done are in host memory

_definitions = ops.define(NAMESPACE)
_definitions.define("contract() -> str")
_definitions.define("locate(Tensor[] grads, ScalarType dtype, Tensor table, Tensor(a!) addresses) -> int")
_ops = ops.of(NAMESPACE)


def _load() -> str | None:
    """Load the library and return None, or why that is impossible.

    Raises:
        RuntimeError: its sources were others than this package's.
    """
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built when the package was installed"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}"
    different = _difference(torch.ops.lookbehind_fused.contract() if _has_contract() else "")
    if different:
        raise RuntimeError(f"{LIBRARY} was built from other sources than this package's: {different}; build it again")
    return None


def _has_contract() -> bool:
    op = torch.ops.lookbehind_fused.contract.default
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeExplicitAutograd)


def _difference(lines: str) -> str:
    """What of a library's contract, a line "name value" for each entry, is not Python's; nothing if they agree."""
    found = (line.rsplit(" ", 1) for line in lines.splitlines())
    return contract.difference({name: int(value) for name, value in found})


unavailable: str | None = _load()

locate = torch.ops.lookbehind_fused.locate.default
"""For backends of other devices: ``locate(grads, dtype, table, addresses)`` writes the gradients' addresses into
``addresses`` (int64 on the CPU) and returns how many of them have changed; -1, and nothing is written, if one has
another dtype, is not laid out as ``table`` says, or is a negated view.
"""


def why_not() -> str | None:
    """Why there is nothing to call; None if there is."""
    return unavailable


def serves(device: torch.device) -> bool:
    """Whether there are kernels for tensors on a device."""
    return device.type == "cpu"


def bind(name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any]) -> ops.Pass:
    """The pass ``name``, to be called with the gradients (``interpolate`` ignores them).

    Args:
        name: one of ``schema.SCHEMAS``.
        params, table: as there. Where ``table`` has addresses the op is not given the list of parameters: a list of
            tensors costs the dispatcher more than a pass over small ones.
        arguments: the others but ``grads``, by name.
    """
    op, params = _ops[name], list(params)
    if name == "interpolate":
        arguments = {"dtype": params[0].dtype if params else None, **arguments}
    by_address = table.size(1) > Column.ADDRESS
    return ops.bound(
        op, partial(op, [] if by_address else params), params, completed(name, {**arguments, "table": table})
    )


reduce_sq_norm = ops.by_keywords(bind, "reduce_sq_norm")
ascend = ops.by_keywords(bind, "ascend")
descend = ops.by_keywords(bind, "descend")
descend_ascend = ops.by_keywords(bind, "descend_ascend")
descend_interpolate = ops.by_keywords(bind, "descend_interpolate")
descend_align = ops.by_keywords(bind, "descend_align")
interpolate = ops.by_keywords(bind, "interpolate")
