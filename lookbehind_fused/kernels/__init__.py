"""The kernels: one table of backends that compute the passes of ``kernels.schema``."""

from __future__ import annotations

from types import ModuleType

import torch

from . import reference
from .schema import SCHEMAS, Flag

__all__ = ["BACKENDS", "SCHEMAS", "Flag", "resolve"]

BACKENDS: dict[str, ModuleType] = {"reference": reference}


def resolve(backend: str, device: torch.device) -> ModuleType:
    """The module whose functions are the passes for tensors on ``device``.

    Raises:
        ValueError: ``backend`` is neither ``"auto"`` nor a name in ``BACKENDS``.
    """
    if backend == "auto":
        return reference  # the only one there is
    if not isinstance(backend, str) or backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    return BACKENDS[backend]
