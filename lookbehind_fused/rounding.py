"""How much of an ascent is left where the forward pass reads the weights in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import GROUP_DEFAULTS, check_choice, check_group, check_int, check_number, wrong
from .kernels.reference import NORM_EPSILON, alignment, ordered_sum
from .tensors import DTYPES, describe, layout, parameters_of, shown


class EffectivePerturbation(NamedTuple):
    """What ``effective_perturbation`` finds, over all perturbed weights together."""

    share_changed: float
    """Of the weights, those that are read as another number than before: 0 to 1."""
    cosine: float
    """Between the perturbation that is seen and the one that is meant."""
    length_ratio: float
    """Length of the perturbation that is seen, over that of the one that is meant."""


@torch.no_grad()
def effective_perturbation(
    model: nn.Module,
    *,
    rho: float,
    adaptive: bool = False,
    eta: float = GROUP_DEFAULTS["eta"],
    dtype: torch.dtype = torch.bfloat16,
    cast: Iterable[Tensor] | None = None,
    direction: str = "gradient",
    seed: int = 0,
) -> EffectivePerturbation:
    """What a forward pass that casts the weights to ``dtype`` sees of one ascent from them.

    Meant is ``eps = rho * T^2 g / (||T g||_2 + 1e-16)``, T = 1 (Foret et al. 2021, equation 2) or |w| + eta (Kwon et
    al. 2021, equation 8), the norm running over all perturbed weights together; seen is ``cast(w + eps) - cast(w)``.
    Where |eps| is less than the distance of w to its neighbours in ``dtype``, most weights stay what they are and some
    move by that distance: what is seen has all of eps in it, and noise that makes it longer. For a random eps, and
    weights that are normally distributed, the cosine is 0.9 at rho = 0.005 ||w|| in bfloat16 and 0.0006 ||w|| in
    float16; far below, it falls with the root of rho.

    Call it between the backward pass and the optimizer's step::

        loss.backward()
        share_changed, cosine, length_ratio = analysis.effective_perturbation(model, rho=0.05)

    No forward pass is run, and nothing of the model is written. eps and all sums are float64; w + eps is rounded to its
    parameter's dtype, and then cast. Takes some float64 copies of the largest parameter, and for a random direction a
    float32 copy of all.

    Args:
        model: its parameters that have a gradient are the weights that are perturbed.
        rho: radius of the ascent, a finite number > 0, in units of the weights (adaptive: of the scaled weights).
        adaptive: ASAM's scaling T.
        eta: ASAM's stabilizer, >= 0.
        dtype: bfloat16, float16, float32 or float64.
        cast: the parameters that are cast; the others are read as they are. None: all, as FSDP's mixed precision has
            it. ``torch.autocast`` casts those of linear and convolutional layers (but no float64 ones), and not those
            of normalizations and embeddings.
        direction: "gradient", the ``.grad`` that are there, at any scale; or "random", g ~ N(0, 1) for each parameter
            that requires a gradient.
        seed: of the random direction, which is drawn on the CPU; an int >= 0.

    Returns:
        Three floats, without unit. All are 0 if g is 0, and nan if it is not finite; cosine and length are nan if a
        weight overflows where it is cast.

    Raises:
        TypeError, ValueError: an argument or a parameter is not acceptable, or there is no gradient.
    """
    check_number("rho", rho, positive=True)
    check_group({"rho": rho, "eta": eta, "adaptive": adaptive})
    if dtype not in DTYPES:
        raise wrong("dtype", "torch.bfloat16, float16, float32 or float64", dtype, (torch.dtype,))
    check_choice("direction", direction, "gradient", "random")
    check_int("seed", seed, 0)
    params = parameters_of(model)
    is_cast = _members(params, cast)
    moved = _directions(params, direction, seed)

    def vectors() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | float]]:
        """Each parameter, and as float64 vectors its w, g and T."""
        for p, g in moved:
            w = p.detach().flatten().double()
            yield p, w, g.to_dense().flatten().to(w), w.abs() + eta if adaptive else 1.0

    norm = math.sqrt(sum(ordered_sum((T * g).square()).item() for _, _, g, T in vectors()))
    if not math.isfinite(norm):
        return EffectivePerturbation(math.nan, math.nan, math.nan)
    sums, changed = torch.zeros(3, dtype=torch.float64, device="cpu"), 0
    for p, w, g, T in vectors():
        eps = rho * T**2 * g / (norm + NORM_EPSILON)
        read_in = dtype if p in is_cast else p.dtype
        before, after = (x.to(p.dtype).to(read_in).double() for x in (w, w + eps))
        changed += int((after != before).sum())
        sums += alignment(after - before, eps).cpu()
    product, seen, meant = sums.tolist()
    if meant == 0:
        return EffectivePerturbation(0.0, 0.0, 0.0)
    cosine = min(product / math.sqrt(seen * meant), 1.0) if seen else 0.0
    return EffectivePerturbation(changed / sum(p.numel() for p, _ in moved), cosine, math.sqrt(seen / meant))


def _members(params: list[Tensor], cast: Iterable[Tensor] | None) -> set[Tensor]:
    if cast is None:
        return set(params)
    if not isinstance(cast, Iterable):
        raise TypeError(f"cast: expected None or parameters of the model, got {shown(cast)}")
    members = list(cast)
    for i, x in enumerate(members):
        if not any(x is p for p in params):
            got = describe(*layout(x)[:3]) if isinstance(x, Tensor) else repr(x)
            raise ValueError(f"cast[{i}]: expected a parameter of the model, got {got}")
    return set(members)


def _directions(params: list[Tensor], direction: str, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The parameters that are perturbed, each with its g."""
    if direction == "random":
        # not what torch.manual_seed(seed) draws, for weights that were drawn so would be the direction themselves
        generator = torch.Generator().manual_seed(seed ^ 0x72686F)
        drawn = [p for p in params if p.requires_grad]
        moved = [(p, torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")) for p in drawn]
    else:
        moved = [(p, p.grad) for p in params if p.grad is not None]
    if not moved:
        needed = "that requires a gradient" if direction == "random" else "with a gradient, from loss.backward()"
        raise ValueError(f"model: expected a parameter {needed}, got none")
    return moved
