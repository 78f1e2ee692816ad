"""The methods that are compared: their names and colours, and how the optimizer of each is made."""

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import SGD, Optimizer

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM

QUARTER = 0.25


@dataclass(frozen=True)
class Method:
    """One line of the table of methods."""

    label: str
    """As in the literature; with ASAM's scaling every "SAM" in it reads "ASAM"."""
    colour: str
    make: Callable[[SGD, argparse.Namespace], Optimizer]
    """From the base optimizer and the options of the run."""
    uses: tuple[str, ...]
    """Which of the options k, alpha and rho it has."""
    gradients: tuple[int, float]
    """Evaluations of a minibatch a step: so many times k, and so many more; one of a part counts as that part."""
    switches: bool = False
    """Each of the k inner steps has a minibatch of its own."""
    fraction: float = 1.0
    """Of the minibatch: what a gradient is of that is for an ascent alone."""

    @property
    def rho_scale(self) -> float:
        """How many times SAM's rho is worth trying: 1 / √fraction, as measured in benchmarks/results/fractions.md."""
        return 1 / math.sqrt(self.fraction)


def _lookahead(optimizer: Optimizer, options: argparse.Namespace) -> Lookahead:
    return Lookahead(optimizer, options.k, options.alpha, backend=options.backend)


def _ball(options: argparse.Namespace) -> dict[str, Any]:
    return {"rho": options.rho, "adaptive": options.asam, "eta": options.eta, "backend": options.backend}


def _sam(base: SGD, options: argparse.Namespace, **more: Any) -> SAM:
    return SAM(None, base, **_ball(options), **{"microbatches": options.microbatches, **more})


def _multistep(base: SGD, options: argparse.Namespace, average: bool) -> MultistepSAM:
    return MultistepSAM(None, base, k=options.k, average=average, **_ball(options))


def _lookbehind(base: SGD, options: argparse.Namespace, alpha: float | str, **more: Any) -> Lookbehind:
    more = {"reuse_gradient": not options.no_reuse, "microbatches": options.microbatches, **more}
    return Lookbehind(None, base, k=options.k, alpha=alpha, alpha_scope=options.alpha_scope, **_ball(options), **more)


def _lookbehind_within(base: SGD, options: argparse.Namespace) -> Lookbehind:
    return _lookbehind(base, options, 1.0, rho_scope="total")


def _sam_free(base: SGD, options: argparse.Namespace) -> SAM:
    return _sam(base, options, ascent_gradient="previous", microbatches=1)


def _lookbehind_free(base: SGD, options: argparse.Namespace) -> Lookbehind:
    free = {"ascent_gradient": "previous", "reuse_gradient": True, "microbatches": 1}
    return _lookbehind(base, options, options.alpha, **free)


def _sam_quarter(base: SGD, options: argparse.Namespace) -> SAM:
    return _sam(base, options, ascent_fraction=QUARTER, microbatches=1)


def _lookbehind_quarter(base: SGD, options: argparse.Namespace) -> Lookbehind:
    quarter = {"ascent_fraction": QUARTER, "reuse_gradient": True, "microbatches": 1}
    return _lookbehind(base, options, options.alpha, **quarter)


# Okabe and Ito's palette and six more, which colour-blind readers tell apart; one colour a method, in every picture.
METHODS = {
    "sgd": Method("SGD", "#7F7F7F", lambda base, o: base, (), (0, 1)),
    "lookahead": Method("Lookahead-SGD", "#262626", _lookahead, ("k", "alpha"), (0, 1)),
    "sam": Method("SAM", "#0072B2", _sam, ("rho",), (0, 2)),
    "multistep": Method("Multistep-SAM", "#E69F00", partial(_multistep, average=False), ("rho", "k"), (1, 1)),
    "multistep-average": Method(
        "Multistep-SAM, mean gradient", "#A6761D", partial(_multistep, average=True), ("rho", "k"), (1, 1)
    ),
    "lookahead-sam": Method(
        "Lookahead-SAM", "#56B4E9", lambda base, o: _lookahead(_sam(base, o), o), ("rho", "k", "alpha"), (0, 2)
    ),
    "lookbehind": Method(
        "Lookbehind-SAM", "#D55E00", lambda base, o: _lookbehind(base, o, o.alpha), ("rho", "k", "alpha"), (1, 1)
    ),
    "lookbehind-adaptive": Method(
        "Lookbehind-SAM, adaptive α", "#009E73", partial(_lookbehind, alpha="adaptive"), ("rho", "k"), (1, 1)
    ),
    "lookbehind-within": Method("Lookbehind-SAM within ρ", "#F0A58F", _lookbehind_within, ("rho", "k"), (1, 1)),
    "sam-free": Method("SAM, free ascent", "#CC79A7", _sam_free, ("rho",), (0, 1)),
    "lookbehind-free": Method(
        "Lookbehind-SAM, free ascent", "#882255", _lookbehind_free, ("rho", "k", "alpha"), (1, 0), switches=True
    ),
    "sam-quarter": Method(
        "SAM with ascents on a quarter", "#44AA99", _sam_quarter, ("rho",), (0, 1 + QUARTER), fraction=QUARTER
    ),
    "lookbehind-quarter": Method(
        "Lookbehind-SAM with ascents on a quarter",
        "#999933",
        _lookbehind_quarter,
        ("rho", "k", "alpha"),
        (1, QUARTER),
        fraction=QUARTER,
    ),
}
DEFAULT = ("sgd", "sam", "lookbehind", "lookbehind-adaptive")


def label(method: str, asam: bool) -> str:
    """What the method is called in tables and pictures."""
    return METHODS[method].label.replace("SAM", "ASAM" if asam else "SAM")


def evaluated(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Within the block the network has the weights that are evaluated and saved: Lookahead's slow ones."""
    return optimizer.slow_weights() if isinstance(optimizer, Lookahead) else nullcontext()
