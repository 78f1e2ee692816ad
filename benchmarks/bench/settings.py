"""What a measured step is run with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a step is run with. ``asam`` is T = |w| + eta; ``scope`` matters to an adaptive alpha alone."""

    k: int = 2
    asam: bool = False
    alpha: float | str = 0.5
    scope: str = "tensor"
    rho: float = 0.05
    eta: float = 0.01
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def adaptive(self) -> bool:
        """Whether alpha comes from the cosine of two displacements; with k = 1 there is only one, and alpha is 1."""
        return self.alpha == "adaptive" and self.k > 1

    @property
    def static_alpha(self) -> float:
        """The alpha that is used where it is not found from displacements."""
        return 1.0 if isinstance(self.alpha, str) else self.alpha
