"""The sharpness-aware family: settings of ``Lookbehind``, or a program of their own (``program``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .arguments import check_bool
from .optimizer import Lookbehind
from .program import Program, multistep
from .tensors import shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .signatures import OfASAM, OfMultistepSAM


class SAM(Lookbehind):
    """Sharpness-aware minimization (Foret et al. 2021, equations 2 and 3): one ascent, one descent with the gradient
    found there. ``Lookbehind`` with ``k=1, alpha=1``; its three forms of a step take two gradients.

    Beside them ``first_step`` and ``second_step``, the names by which ``ascent_step`` and ``descent_step`` are known
    elsewhere::

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)

    Args:
        params, base_optimizer, rho, **settings: those of ``Lookbehind``, but for what makes it SAM (``k``, ``alpha``,
            ``alpha_scope``, ``reuse_gradient``).
        adaptive: ASAM's scaling of the ascent (Kwon et al. 2021).
    """

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        rho: float | None = ...,
        adaptive: bool | None = ...,
        **settings: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: Optimizer,
        rho: float | None = ...,
        adaptive: bool | None = ...,
        **settings: Unpack[OfASAM],
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float | None = None,
        adaptive: bool | None = None,
        **settings: Any,
    ) -> None:
        refuse(self, settings, "k", "alpha", "alpha_scope", "reuse_gradient")
        base: Any = base_optimizer  # of either kind
        super().__init__(params, base, rho=rho, adaptive=adaptive, k=1, alpha=1.0, **settings)

    FIXED: ClassVar[tuple[str, ...]] = ("k", "alpha", "alpha_scope", "reuse_gradient")

    def first_step(self, zero_grad: bool = False) -> None:
        """``ascent_step()``, then clear the gradients if asked to."""
        self.ascent_step()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """``descent_step()``, then clear the gradients if asked to."""
        self.descent_step()
        if zero_grad:
            self.zero_grad()


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021, algorithm 1): ``SAM`` with the ascent scaled by T = |w| + eta, so that rho is in
    units of the scaled weights: 0.5 unless given. Every tensor is scaled; groups may have their own ``adaptive``
    (``weight_scaling``).
    """

    GROUP: ClassVar[dict[str, Any]] = {**Lookbehind.GROUP, "rho": 0.5}

    @overload
    def __init__(
        self, params: ParamsT, base_optimizer: type[Optimizer], rho: float | None = ..., **settings: Any
    ) -> None: ...

    @overload
    def __init__(
        self, params: ParamsT | None, base_optimizer: Optimizer, rho: float | None = ..., **settings: Unpack[OfASAM]
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float | None = None,
        **settings: Any,
    ) -> None:
        refuse(self, settings, "adaptive")
        base: Any = base_optimizer  # of either kind
        super().__init__(params, base, rho, True, **settings)


class MultistepSAM(Lookbehind):
    """Multistep-SAM: k ascents, each from where the last one led, then a single descent of the slow weights with the
    last gradient, or with the mean of the k gradients behind (Kim et al. 2023). k + 1 gradients a step.

    With ``k=1`` it is ``SAM``. ``ascent_step()`` k times and ``descent_step()`` once are the pair of its own.

    Args:
        params, base_optimizer, rho, k, **settings: those of ``Lookbehind``, but for ``alpha``, ``alpha_scope``,
            ``reuse_gradient``, ``microbatches`` and ``ascent_gradient``, which have no meaning here.
        average: descend with the mean, which takes one more copy of the model. A tensor that an evaluation does not
            reach counts with a gradient of 0 there; a gradient that is skipped (``nonfinite``) likewise.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (*Lookbehind.SETTINGS, "average")
    FIXED: ClassVar[tuple[str, ...]] = ("alpha", "alpha_scope", "reuse_gradient", "microbatches", "ascent_gradient")

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        *,
        rho: float | None = ...,
        k: int = ...,
        average: bool = ...,
        **settings: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: Optimizer,
        *,
        rho: float | None = ...,
        k: int = ...,
        average: bool = ...,
        **settings: Unpack[OfMultistepSAM],
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        *,
        rho: float | None = None,
        k: int = 2,
        average: bool = False,
        **settings: Any,
    ) -> None:
        refuse(self, settings, "alpha", "alpha_scope", "reuse_gradient", "microbatches", "ascent_gradient")
        self.average = average
        base: Any = base_optimizer  # of either kind
        super().__init__(params, base, rho=rho, k=k, alpha=1.0, **settings)

    def program(self, reuse_gradient: bool) -> Program:
        """k ascents and a descent."""
        return multistep(self.k, self.average)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """As for any other method, and ``average``."""
        super().check_settings(settings)
        check_bool("average", settings["average"])


def refuse(method: object, settings: dict[str, Any], *names: str) -> None:
    """Refuse settings of ``Lookbehind`` that a method has no use for.

    Raises:
        TypeError: naming the first of ``names`` that is there.
    """
    for name in names:
        if name in settings:
            raise TypeError(
                f"{name}: expected no such argument for {type(method).__name__}, got {shown(settings[name])}; "
                "Lookbehind has it"
            )
