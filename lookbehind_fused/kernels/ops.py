"""The passes as ops of the PyTorch dispatcher: what the compiled backends have in common.

Every backend's ops have the signatures of ``schema.SCHEMAS``, in a namespace of the backend's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .schema import ARGUMENTS, SCHEMAS, WRITTEN

Pass = Callable[[Sequence[Tensor]], None]
"""A pass that is bound to all its arguments but the gradients."""

Bind = Callable[[str, Sequence[Tensor], Tensor, Mapping[str, Any]], Pass]


def define(namespace: str) -> torch.library.Library:
    """Define the ops of a namespace. They write only what their schema says, and return nothing."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{namespace}::{name}", lambda *arguments: None, lib=library)
    return library


def of(namespace: str) -> dict[str, Any]:
    """The ops of a namespace by name."""
    return {name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS}


def bound(op: Any, eagerly: Callable[..., None], params: list[Tensor], given: Mapping[str, Any]) -> Pass:
    """The op with all of its arguments but the gradients, telling autograd of what it has written.

    Args:
        op: of one of the schemas.
        eagerly: called with all of the op's arguments but ``params``, in its place where nobody looks at what an op is
            given: neither the compiler nor a dispatch mode.
        params: the parameters.
        given: the other arguments (``schema.completed``).
    """
    name = op._opname
    takes_grads, rest = "grads" in ARGUMENTS[name], tuple(given.values())
    written: list[Tensor] = []
    for argument in WRITTEN[name]:
        value = params if argument == "params" else given[argument]
        written.extend([] if value is None else [value] if isinstance(value, Tensor) else value)
    dtype = params[0].dtype if params else None

    def call(grads: Sequence[Tensor]) -> None:
        values = (grads, *rest) if takes_grads else rest
        if torch.compiler.is_compiling():
            op(params, *values)  # the compiler counts what a graph writes
            return
        if takes_grads and grads and grads[0].dtype != dtype:
            raise RuntimeError(f"grads: expected {dtype} as the parameters have, got {grads[0].dtype}")
        if is_in_torch_dispatch_mode():
            op(params, *values)
        else:
            eagerly(*values)
        increment_version(written)

    return call


def by_keywords(bind: Bind, name: str) -> Callable[..., None]:
    """The pass ``name`` of a backend as a function that is called once, with keywords."""

    def call(*, params: Sequence[Tensor], table: Tensor, grads: Sequence[Tensor] = (), **arguments: Any) -> None:
        bind(name, params, table, arguments)(grads)

    call.__name__ = call.__qualname__ = name
    return call
