"""What the constructors take beside a base optimizer that is an instance, for type checkers.

An instance has its own settings, so that nothing but these arguments has a meaning with it. With a class there may be
others, which are the class's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler


class Everywhere(TypedDict, total=False):
    """What every method takes."""

    rho_scope: str
    max_grad_norm: float | None
    nonfinite: str
    scaler: GradScaler | None
    loss_scale: float | Tensor
    closure: Callable[..., Any] | None
    same_randomness: bool
    ascents: str
    buffers_at_slow: nn.Module | None
    model: nn.Module | None
    backend: str
    ascent_rho: float
    ascent_adaptive: bool
    ascent_eta: float


class OfMultistepSAM(Everywhere, total=False):
    """What ``MultistepSAM`` takes beside its own arguments."""

    adaptive: bool | None
    eta: float | None
    ascent_fraction: float


class OfASAM(Everywhere, total=False):
    """What ``ASAM`` and ``SAM`` take beside their own arguments."""

    eta: float | None
    microbatches: int
    ascent_gradient: str
    ascent_fraction: float


class OfLookbehind(OfASAM, total=False):
    """What ``Lookbehind`` takes."""

    rho: float | None
    adaptive: bool | None
    k: int
    alpha: float | str
    alpha_scope: str
    reuse_gradient: bool
