"""Which torch optimizers are rules of the kernels: their numbers, their state, their flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD, Adam, AdamW, Optimizer

from .kernels.contract import Flag, RuleId

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """How a parameter group of a torch optimizer is handed to the kernels.

    Attributes:
        reads: the settings of a group that the other attributes look at.
        id: which rule of the kernels it is (``kernels.contract``).
        numbers: those of the rule in ``hyper``, in the order of the contract.
        state: names in ``base.state[p]`` of the buffers with the parameter's shape, in the order of the kernels.
        flags: a sum of ``Flag``.
        derives: whether an update is a function of the weights and of the state that it leaves (``kernels.schema``).
        counted: whether ``base.state[p]`` has a 0-dim ``step`` as well.
    """

    reads: tuple[str, ...]
    id: Callable[[Group], RuleId]
    numbers: Callable[[Group], tuple[Any, ...]]
    state: Callable[[Group], tuple[str, ...]]
    flags: Callable[[Group], int]
    derives: Callable[[Group], bool]
    counted: bool


SGD_RULE = Rule(
    reads=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    id=lambda group: RuleId.MOMENTUM if group["momentum"] else RuleId.SGD,
    numbers=lambda group: (group["lr"], group["momentum"], group["dampening"], group["weight_decay"]),
    state=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    flags=lambda group: Flag.MAXIMIZE * group["maximize"] + Flag.NESTEROV * group["nesterov"],
    derives=lambda group: bool(group["momentum"]) and not group["nesterov"],
    counted=False,
)
ADAM_RULE = Rule(
    reads=("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    id=lambda group: RuleId.AMSGRAD if group["amsgrad"] else RuleId.ADAM,
    numbers=lambda group: (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
    state=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
    flags=lambda group: Flag.MAXIMIZE * group["maximize"] + Flag.DECOUPLED * group["decoupled_weight_decay"],
    derives=lambda group: True,
    counted=True,
)
NO_RULE = Rule(
    reads=(),
    id=lambda group: RuleId.NONE,
    numbers=lambda group: (),
    state=lambda group: (),
    flags=lambda group: 0,
    derives=lambda group: False,
    counted=False,
)

# Exact types: a subclass may compute something else.
FUSED: dict[type[Optimizer], Rule] = {SGD: SGD_RULE, Adam: ADAM_RULE, AdamW: ADAM_RULE}


def rule_of(base: Optimizer) -> Rule:
    """The rule of the kernels that ``base`` is, or ``NO_RULE``: its own ``step()`` has to run."""
    return FUSED.get(type(base), NO_RULE)
