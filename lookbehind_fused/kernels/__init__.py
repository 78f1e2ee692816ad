"""The kernels: one table of backends that compute the passes of ``kernels.schema``."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

from . import cuda, native, reference, triton
from .contract import Flag, RuleId
from .schema import SCHEMAS

__all__ = ["BACKENDS", "SCHEMAS", "Flag", "RuleId", "resolve"]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "native": native, "triton": triton, "cuda": cuda}

# What "auto" takes for tensors on a device, the fastest first; any device has the reference.
AUTO: dict[str, tuple[str, ...]] = {"cpu": ("native", "reference"), "cuda": ("cuda", "triton", "reference")}


def resolve(backend: str, device: torch.device | None = None) -> ModuleType:
    """The module whose functions are the passes for tensors on ``device``; None: on any that it may serve.

    ``"auto"`` is the fastest that there is, and warns once when that is the reference for want of a faster one, as on
    devices that there are no kernels for (XPU, MPS).

    Raises:
        ValueError: ``backend`` is neither ``"auto"`` nor a name in ``BACKENDS``, or has no kernels for the device.
        RuntimeError: the backend was asked for by name and is not available; the message says why and what helps.
    """
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    if backend == "auto":
        device = device or torch.device("cpu")
        chosen = fastest(device)
        if chosen is reference:
            _warn_once(f"backend 'auto' uses the slower 'reference': {_why_slower(device)}")
        return chosen
    module = BACKENDS[backend]
    if module.why_not():
        raise RuntimeError(f"backend: {backend!r} is not available: {module.why_not()}; {module.REMEDY}")
    if device is not None and not module.serves(device):
        raise ValueError(
            f"backend: expected one with kernels for tensors on {device}, got {backend!r}, which is for "
            f"{module.DEVICES}; 'auto' takes the fastest that there is for each device"
        )
    return module


def fastest(device: torch.device) -> ModuleType:
    """What ``"auto"`` takes for tensors on a device."""
    modules = (BACKENDS[name] for name in _for(device))
    return next(module for module in modules if not module.why_not() and module.serves(device))


def _for(device: torch.device) -> tuple[str, ...]:
    return AUTO.get(device.type, ("reference",))


def _why_slower(device: torch.device) -> str:
    """Why the reference is all that there is for tensors on a device."""
    if device.type not in AUTO:
        return f"there are no kernels for {device.type} devices"
    modules = [BACKENDS[name] for name in _for(device)[:-1]]
    return "; or ".join(f"{module.why_not() or f'it is for {module.DEVICES}'}; {module.REMEDY}" for module in modules)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
