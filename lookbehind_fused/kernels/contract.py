"""The contract: the numbers that mean the same thing in Python, Triton, CUDA and C++.

This is the one table of them. Python and the Triton kernels take theirs from here; ``csrc/contract.h`` has C++'s and
CUDA's, and ``native`` compares the two when the library is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag


class Flag(IntFlag):
    """The yes-or-no settings of a pass, added up in its argument ``flags``."""

    ADAPTIVE = 1  # ASAM: T = |perturbed| + eta; otherwise T = 1
    PER_TENSOR = 2  # adaptive alpha for each tensor by itself
    MAXIMIZE = 4
    NESTEROV = 8
    DECOUPLED = 16  # weight decay as in AdamW
    DERIVES = 32  # inner step 2: the fast weights are not read but derived from the slow ones and the state
    SKIPS = (
        64  # where ``sq_norms`` are not finite, nothing moves; the last pass then leaves slow weights and the old state
    )


class RuleId(IntEnum):
    """The update rules: the argument ``rule``."""

    NONE = 0  # the base optimizer has moved the fast weights by itself
    SGD = 1
    MOMENTUM = 2  # SGD with a momentum buffer
    ADAM = 3  # Adam and AdamW
    AMSGRAD = 4  # either with the largest second moment so far


class Hyper(IntEnum):
    """The columns of ``hyper``: those of every pass, and from ``OF_RULE`` on the rule's own."""

    RHO = 0  # negative where the base maximizes
    ETA = 1
    ALPHA = 2
    MAX_GRAD_NORM = 3
    UNSCALE = 4
    OF_RULE = 5


class Column(IntEnum):
    """The columns of ``table``; ``SIZES`` is the first of the sizes, and as many strides follow them."""

    ROW = 0
    START = 1
    SIZE = 2
    GROUP = 3
    ADDRESS = 4
    SIZES = 5


INLINED = 440
"""Of so many tensors the gradients' addresses go with a launch of the CUDA backend."""

BUFFERS = {RuleId.NONE: 0, RuleId.SGD: 0, RuleId.MOMENTUM: 1, RuleId.ADAM: 2, RuleId.AMSGRAD: 3}
"""How many buffers a rule's state has."""

_SGD, _ADAM = ("lr", "momentum", "dampening", "weight_decay"), ("lr", "beta1", "beta2", "eps", "weight_decay")
NUMBERS = {RuleId.NONE: (), RuleId.SGD: _SGD, RuleId.MOMENTUM: _SGD, RuleId.ADAM: _ADAM, RuleId.AMSGRAD: _ADAM}
"""A rule's own numbers in ``hyper``, in their order from ``Hyper.OF_RULE`` on."""


def entries() -> dict[str, int]:
    """Every number of the contract by its name."""
    named = {f"{table.__name__}.{entry.name}": int(entry) for table in (Flag, RuleId, Hyper, Column) for entry in table}
    named["INLINED"] = INLINED
    for rule, names in NUMBERS.items():
        named |= {f"{rule.name}.{name}": Hyper.OF_RULE + place for place, name in enumerate(names)}
        named[f"{rule.name}: numbers"], named[f"{rule.name}: buffers"] = len(names), BUFFERS[rule]
    return named


def difference(found: Mapping[str, int]) -> str:
    """What a library's entries have that is not the contract's: the first of them, or nothing."""
    expected = entries()
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            return f"{name}: expected {expected.get(name)}, got {found.get(name)}"
    return ""
