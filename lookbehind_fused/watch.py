"""What has changed since the last step."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor

from .arguments import Keys
from .kernels.contract import RuleId
from .rules import Rule
from .shards import any_sharded, shards
from .tensors import tensors_of, trained

_members, _kind = itemgetter("params"), attrgetter("dtype", "device")


def _switches(group: Mapping[str, Any], rule: Rule) -> tuple[RuleId, int, bool]:
    """What another kind of bucket is for."""
    return rule.id(group), rule.flags(group), rule.derives(group)


class Watch:
    """What the groups and their tensors were when a step began, by identity and by address.

    Everything is held, so that an identity is not used again.

    Args:
        groups, rule, keys: of the base optimizer. untrained: tensors that no bucket has.

    Attributes:
        tensors: all parameters, in the order of the groups.
        values: of each group the settings that the kernels are given numbers of.
    """

    def __init__(self, groups: list[dict[str, Any]], rule: Rule, keys: Keys, untrained: list[Tensor]) -> None:
        self.rule, self.groups, self._others = rule, [*groups], untrained
        self._read, self._adaptive = itemgetter(keys.rho, keys.eta, *rule.reads), itemgetter(keys.adaptive)
        self.tensors = tensors_of(groups)
        self._shards = shards(self.tensors) if any_sharded(self.tensors) else None
        here = self._shards or self.tensors
        self.addresses = [*map(Tensor.data_ptr, here)]
        # Of one dimension, another stride at the same address would leave gaps, or show in the shape of the gradient.
        self._strided = [p for p in here if p.dim() > 1]
        self._strides = [*map(Tensor.stride, self._strided)]
        # Of no elements, all are at the same address.
        self._empty = [p for p in here if not p.numel()]
        self._kinds_of_empty = [*map(_kind, self._empty)]
        self._scaled = deepcopy([*map(self._adaptive, groups)])  # a list may be changed in place
        self._kinds = [_switches(group, rule) for group in groups]
        self.values = [*map(self._read, groups)]
        self._state: list[Any] = []

    def same_tensors(self, groups: list[dict[str, Any]]) -> bool:
        """Whether all tensors are where they were, in their groups, and no setting has come that another kind of bucket
        is for. Brings ``values`` up to date on the way.
        """
        try:
            values, scaled = [*map(self._read, groups)], [*map(self._adaptive, groups)]
        except KeyError:  # a group was replaced by one without this library's settings
            return False
        tensors = [*chain.from_iterable(map(_members, groups))]
        if not (
            len(groups) == len(self.groups)
            and all(map(is_, groups, self.groups))
            and len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and scaled == self._scaled
            and (self._shards is None or all(map(is_, shards(tensors), self._shards)))
            and [*map(Tensor.data_ptr, self._shards or tensors)] == self.addresses
            and [*map(Tensor.stride, self._strided)] == self._strides
            and [*map(_kind, self._empty)] == self._kinds_of_empty
            and not (self._others and any(map(trained, self._others)))
        ):
            return False
        if values == self.values:
            return True
        self.values = values
        return [_switches(group, self.rule) for group in groups] == self._kinds

    def same_state(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the base's state consists of the same objects as at the last ``see_state``: what was replaced,
        loaded, added or removed shows here.
        """
        values = chain(chain.from_iterable(map(dict.values, state.values())), (None,))
        return bool(self._state) and all(map(is_, self._state, values)) and next(values, self) is self

    def see_state(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """The state has been adopted."""
        self._state = [*chain.from_iterable(map(dict.values, state.values())), None]

    def forget_state(self) -> None:
        """None has been adopted."""
        self._state = []
