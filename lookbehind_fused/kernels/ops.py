"""The passes as ops of the PyTorch dispatcher: what the compiled backends have in common.

Every backend's ops have the signatures of ``schema.SCHEMAS``, in a namespace of the backend's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .schema import SCHEMAS


def define(namespace: str) -> torch.library.Library:
    """Define the ops of a namespace. They write only what their schema says, and return nothing."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{namespace}::{name}", lambda *arguments: None, lib=library)
    return library


def as_pass(namespace: str, name: str, eagerly: Callable[..., None] | None = None) -> Callable[..., None]:
    """The op ``name``, called with keywords, telling autograd of what it has written.

    ``eagerly``, called with the op's arguments in its place where nobody looks at what an op is given: neither the
    compiler nor a dispatch mode.
    """
    op = getattr(getattr(torch.ops, namespace), name).default
    names = [arg.name for arg in op._schema.arguments]
    written = [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]
    eagerly = eagerly or op

    def call(**arguments: Any) -> None:
        values = [arguments[argument] for argument in names]
        if torch.compiler.is_compiling():
            op(*values)  # the compiler counts what a graph writes
            return
        (op if is_in_torch_dispatch_mode() else eagerly)(*values)
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
