"""What is tried for each method: points of its own space, as many for every method."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import qmc

Options = dict[str, Any]
"""Some of lr, rho, k, alpha."""


@dataclass(frozen=True)
class Axis:
    """The values of one option.

    `logarithmic`: the two are ends of a range, even in the logarithm. Else, floats are the ends of an even range, and
    whole numbers are all the values there are.
    """

    values: tuple[float, ...] | tuple[int, ...]
    logarithmic: bool = False

    def at(self, place: float) -> float | int:
        """The value at a place in [0, 1), to two digits where it is not one of a few."""
        if all(isinstance(value, int) for value in self.values):
            return self.values[int(place * len(self.values))]
        low, high = self.values
        value = low * (high / low) ** place if self.logarithmic else low + (high - low) * place
        return float(f"{value:.2g}")


NAMES = ("lr", "rho", "k", "alpha")


def points(space: Mapping[str, Axis], exponent: int) -> list[Options]:
    """The first 2^`exponent` points of a scrambled Sobol sequence (Owen 1998) in the space, always the same ones.

    Each option has a coordinate of its own, whichever others a method has: over the points it is spread evenly, one in
    every 2^-`exponent`-th of its range, and two methods that share an option and its range try the same values of it.
    """
    places = qmc.Sobol(len(NAMES), scramble=True, rng=0).random_base2(exponent)
    return [{name: axis.at(of[NAMES.index(name)]) for name, axis in space.items()} for of in places]
