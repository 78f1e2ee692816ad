"""Figures of a step, as tensors on the parameters' device; finding them waits for nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Settings
from .kernels.contract import Hyper
from .kernels.reference import adaptive_alpha, total_norm
from .open_step import OpenStep


def figures(step: OpenStep, tensors: int) -> dict[str, Tensor]:
    """``Lookbehind.diagnostics`` of a step that is complete.

    Args:
        tensors: how many parameters the optimizer has.
    """
    bucket, settings = step.buckets[0], step.settings
    squares = step.norms.squares[bucket.device]
    grad_norm = total_norm(squares[0], 1)
    if not step.given_unscaled and (isinstance(step.loss_scale, Tensor) or step.loss_scale != 1):
        grad_norm = grad_norm * bucket.hyper[0, Hyper.UNSCALE].to(bucket.device, non_blocking=True)
    skipped = torch.full((), int(step.broken), dtype=torch.int64, device=bucket.device)
    if step.skips and not step.judged_here:
        skipped = (~step.happens()).long()
    alpha = _alpha(step, settings, tensors)
    if step.skips and settings.alpha == "adaptive":
        alpha = torch.where(skipped == 0, alpha, torch.nan)
    return {"grad_norm": grad_norm, "alpha": alpha, "skipped": skipped}


def _alpha(step: OpenStep, settings: Settings, tensors: int) -> Tensor:
    device = step.buckets[0].device
    adaptive, aligns = settings.alpha == "adaptive", step.program.descents > 1
    if not adaptive or (settings.alpha_scope == "global" and not aligns):
        return torch.full((), settings.static_alpha, dtype=torch.float64, device=device)
    if settings.alpha_scope == "global":
        return adaptive_alpha(step.norms.sums[device].sum(0))
    alpha = torch.full((tensors,), torch.nan, dtype=torch.float64, device=device)
    for bucket in step.buckets:
        of_bucket = adaptive_alpha(bucket.sums) if aligns else torch.ones_like(bucket.sums[:, 0])
        alpha[bucket.indices] = of_bucket.to(device, non_blocking=True)
    return alpha
