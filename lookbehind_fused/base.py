"""The base optimizer: which torch optimizers are rules of the kernels, and how any other runs on the fast weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .kernels import Flag

Group = Mapping[str, Any]

# What Lookbehind keeps in a parameter group beside the base optimizer's own settings.
GROUP_DEFAULTS = {"rho": 0.05, "adaptive": False, "eta": 0.01}


@dataclass(frozen=True)
class Rule:
    """How a parameter group of a torch optimizer is handed to the kernels.

    ``hyper`` gives the numbers behind the first four of ``hyper`` (``kernels.schema``), ``state`` the names in
    ``base.state[p]`` of the buffers with the parameter's shape, ``flags`` the sum of ``Flag``. ``derives`` says whether
    an update is a function of the weights and of the state that it leaves (``kernels.schema``, ``fast``), ``counted``
    whether ``base.state[p]`` has a 0-dim ``step`` as well.
    """

    name: str
    hyper: Callable[[Group], tuple[Any, ...]]
    state: Callable[[Group], tuple[str, ...]]
    flags: Callable[[Group], int]
    derives: Callable[[Group], bool]
    counted: bool


SGD_RULE = Rule(
    name="sgd",
    hyper=lambda group: (group["lr"], group["momentum"], group["dampening"], group["weight_decay"]),
    state=lambda group: ("momentum_buffer",) if group["momentum"] else (),
    flags=lambda group: Flag.MAXIMIZE * group["maximize"] + Flag.NESTEROV * group["nesterov"],
    derives=lambda group: bool(group["momentum"]) and not group["nesterov"],
    counted=False,
)
ADAM_RULE = Rule(
    name="adam",
    hyper=lambda group: (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
    state=lambda group: ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ())),
    flags=lambda group: Flag.MAXIMIZE * group["maximize"] + Flag.DECOUPLED * group["decoupled_weight_decay"],
    derives=lambda group: True,
    counted=True,
)
NO_RULE = Rule(
    name="none",
    hyper=lambda group: (),
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


class OwnStep:
    """An optimizer without a rule, run by its own ``step()`` on stand-ins whose memory is the fast weights.

    For the time of the call each parameter is replaced by its stand-in in ``param_groups`` and as a key of ``state``,
    so the parameters themselves, their gradients and whatever is registered on them are not touched.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self.needed = rule_of(base).name == "none"
        self._before: tuple[dict[Tensor, dict], list[dict]] | None = None

    def remember(self) -> None:
        """Keep a copy of the base's state and settings as they are now, for ``restore``."""
        state = {p: _with_copies(entry) for p, entry in self.base.state.items()}
        self._before = state, [_with_copies(group) for group in self.base.param_groups]

    def restore(self) -> None:
        """Give the base what it had at the last ``remember``, unless that step was completed."""
        if self._before is None:
            return
        state, groups = self._before
        self.base.state.clear()
        for p, entry in state.items():
            _put_back(self.base.state[p], entry)
        for group, entry in zip(self.base.param_groups, groups, strict=True):
            _put_back(group, entry)
        self._before = None

    def forget(self) -> None:
        """The step is complete: what was remembered is not needed any more."""
        self._before = None

    def step(self, stand_ins: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Run ``base.step()`` once on (parameter, stand-in) pairs, the stand-ins' ``.grad`` being set."""
        stand_in = dict(stand_ins)
        parameters = {new: old for old, new in stand_in.items()}
        for p, new in stand_in.items():
            for key, value in self.base.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dtype == p.dtype != new.dtype:  # made by the base's constructor
                    self.base.state[p][key] = value.to(new.dtype)
        try:
            self._exchange(stand_in)
            self.base.step()
        finally:
            self._exchange(parameters)

    def _exchange(self, other: Mapping[Tensor, Tensor]) -> None:
        state = self.base.state
        for group in self.base.param_groups:
            group["params"][:] = [other.get(p, p) for p in group["params"]]
        entries = [(other.get(p, p), entry) for p, entry in state.items()]  # a new order would show in state_dict()
        state.clear()
        state.update(entries)


def _with_copies(entry: Group) -> dict[str, tuple[Any, Any]]:
    """Each value beside a copy of it; the list of parameters is left out."""
    return {
        key: (value, value.detach().clone() if isinstance(value, Tensor) else deepcopy(value))
        for key, value in entry.items()
        if key != "params"
    }


def _put_back(entry: dict[str, Any], before: Mapping[str, tuple[Any, Any]]) -> None:
    """The inverse of ``_with_copies``: tensors are the same objects as before, with the values that they had."""
    for key in entry.keys() - before.keys() - {"params"}:
        del entry[key]
    for key, (value, copy) in before.items():
        entry[key] = value.copy_(copy) if isinstance(value, Tensor) else copy


# ---- loading ---------------------------------------------------------------------------------------------------------


def keep_when_loading(base: Optimizer) -> None:
    """Let ``base.load_state_dict`` keep three things that torch would not.

    The float32 state of bf16 and fp16 parameters, which torch casts to the parameter's dtype; rho, adaptive and eta of
    each group when the loaded groups, written by a plain torch optimizer, do not have them; and the dict that is given,
    whose tensors torch would take over, so that the next step would write into them.
    """
    base.register_load_state_dict_pre_hook(_before_loading)
    base.register_load_state_dict_post_hook(_after_loading)


def _before_loading(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = {**state_dict, "state": deepcopy(state_dict["state"])}
    base._lookbehind_loading = state_dict, [dict(group) for group in base.param_groups]  # type: ignore[attr-defined]
    return state_dict


def _after_loading(base: Optimizer) -> None:
    loading = base.__dict__.pop("_lookbehind_loading", None)
    if loading is None:
        return
    state_dict, groups = loading
    for group, before in zip(base.param_groups, groups, strict=True):
        for key in GROUP_DEFAULTS:
            if key in before:
                group.setdefault(key, before[key])
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in base.param_groups)
    for saved_id, p in zip(saved_ids, params, strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            was_cast = isinstance(value, Tensor) and value.dtype != base.state[p][key].dtype
            if was_cast and p.dtype in (torch.bfloat16, torch.float16):
                base.state[p][key] = value.detach().to(p.device)
