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
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .schema import ADDRESS, SCHEMAS

NAMESPACE = "lookbehind_fused"
LIBRARY = Path(__file__).parent.parent / "_native.abi3.so"
REMEDY = "install a C++17 compiler (g++) and ninja, then install the package again with --no-build-isolation"

_definitions = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _definitions.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", lambda *arguments: None, lib=_definitions)


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


def _pass(name: str) -> Callable[..., None]:
    """The op ``name``, telling autograd of what it has written, which a C++ implementation does not do by itself.

    A list of tensors costs the dispatcher more than a pass over small ones. Where nobody looks at what an op is given,
    neither the compiler nor a dispatch mode, the addresses in ``table`` take the place of ``params``.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    names = [arg.name for arg in op._schema.arguments]
    written = [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]
    by_address = "grads" in names

    def call(**arguments: Any) -> None:
        values = [arguments[argument] for argument in names]
        if torch.compiler.is_compiling():
            op(*values)  # the compiler counts what a graph writes
            return
        if by_address and arguments["table"].size(1) > ADDRESS and not is_in_torch_dispatch_mode():
            values[0] = []
        op(*values)
        changed: list[Tensor] = []
        for argument in written:
            value = arguments[argument]
            if isinstance(value, Tensor):
                changed.append(value)
            elif value:
                changed.extend(value)
        increment_version(changed)

    call.__name__ = call.__qualname__ = name
    return call


reduce_sq_norm = _pass("reduce_sq_norm")
ascend = _pass("ascend")
descend = _pass("descend")
descend_ascend = _pass("descend_ascend")
descend_interpolate = _pass("descend_interpolate")
descend_align = _pass("descend_align")
interpolate = _pass("interpolate")
