"""What steps run on, brought up to date with everything that may have been changed between two of them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .arguments import Keys, Settings, adaptive_by_tensor, check_group
from .buckets import Bucket, Member
from .elsewhere import Elsewhere
from .kernels.contract import Hyper
from .norms import Norms
from .parts.own_step import require_no_other_hold
from .program import Program
from .rules import NO_RULE, rule_of
from .shards import Ranks, placement, shard, spread_of
from .tensors import check_parameters, describe, layout, params_and_names, tensors_of, trained
from .watch import Watch

Members = dict[tuple[Any, ...], list[tuple[Member, int]]]
"""By what is the same in a bucket, its tensors, each with the number of its group."""
Numbers = tuple[list[tuple[Any, ...]], Settings, int, Any]
"""What ``hyper`` is made of: the groups' values, settings, how many gradients a mean is of, and the loss's scale."""


class Prepared:
    """The buckets and norms of an optimizer.

    Args:
        base: the base optimizer, whose groups and state are the optimizer's.
        defaults: what a group gets where it has no such setting.
        elsewhere: who keeps weights of the parameters.

    Attributes:
        tensors, names: all parameters, in the order of the groups, and what they are called in messages.
        untrained: of these, those that no bucket has: they have had no gradient and require none.
        late: the identities of those that were untrained once and then had a gradient in a step.
    """

    def __init__(self, base: Optimizer, defaults: dict[str, Any], elsewhere: Elsewhere) -> None:
        self.base, self.rule, self.keys, self.defaults = base, rule_of(base), Keys.of(base), defaults
        self.elsewhere = elsewhere
        self.buckets: list[Bucket] = []
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.untrained: list[Tensor] = []
        self.late: set[int] = set()
        self._watch: Watch | None = None
        self._backend = ""
        self._found: list[tuple[Any, ...]] = []  # tensors and what decides in which bucket they are
        self._groups: list[dict[str, Any]] = []
        self._bound: tuple[Program, Settings] | None = None  # what the calls have been bound for
        self._numbers: Numbers | None = None  # what ``hyper`` has been made of

    def for_step(self, program: Program, settings: Settings, loss_scale: float | Tensor, backend: str) -> None:
        """Bring everything up to date.

        Raises:
            RuntimeError: a parameter was given another shape, or none is trained.
            TypeError, ValueError: a group's settings, a parameter, the base's state or the backend is not acceptable.
        """
        hooks = self.base._optimizer_step_pre_hooks, self.base._optimizer_step_post_hooks
        if (
            self.rule is not NO_RULE and max(len(hooks[0]), len(hooks[1])) > 1
        ):  # one is ours: leftovers.note_when_stepped
            raise RuntimeError(
                f"base_optimizer: its step() is never called, since {type(self.base).__name__} is fused, so its step "
                "hooks would not run; expected none, register them on Lookbehind"
            )
        watch = self._watch
        if watch is None or backend != self._backend or not watch.same_tensors(self.base.param_groups):
            watch = self._follow(backend)
        if (program, settings) != self._bound:
            self._bind(program, settings)
        if self.norms.ranks is not None:
            self.norms.ranks.open()
        scaled_on_device = isinstance(loss_scale, Tensor)
        numbers = watch.values, settings, program.gathered, None if scaled_on_device else loss_scale
        if scaled_on_device or numbers != self._numbers:
            self._read_numbers(numbers, loss_scale)
        if not watch.same_state(self.base.state):
            for bucket in self.buckets:
                bucket.adopt_state()
            watch.see_state(self.base.state)

    def look_again(self) -> None:
        """Something has changed that ``Watch`` does not see."""
        self._watch = None

    def forget(self, names: Iterable[str]) -> None:
        """Have other memory for buffers, since somebody still writes to that which they have."""
        for bucket in self.buckets:
            for name in names:
                bucket.buffers.pop(name, None)
            bucket.key = None
        self._bound = None

    def see_state(self) -> None:
        """State of the buckets' own has appeared in the base's."""
        if self._watch is not None:
            self._watch.see_state(self.base.state)

    def read_again(self) -> None:
        """Whatever the buckets have of the base's state and settings, they are to take from there."""
        self._numbers = None
        if self._watch is not None:
            self._watch.forget_state()

    def notes_trained(self) -> bool:
        """Whether some of ``untrained`` have a gradient now: these are no longer untrained, whatever they require."""
        late = {id(p) for p in self.untrained if p.grad is not None}
        self.late |= late
        return bool(late)

    def _trains(self, p: Tensor) -> bool:
        return trained(p) or id(p) in self.late

    def _follow(self, backend: str) -> Watch:
        """Tensors, groups, or what decides which bucket a tensor is in, may have changed."""
        groups = self.base.param_groups
        self._watch = None
        for number, group in enumerate(groups):
            for name in (*self.keys, *self.rule.reads):
                group.setdefault(name, self.defaults[name])
            check_group(group, f"param_groups[{number}]", self.keys)
        self._require_same_shapes()
        params, names = params_and_names(groups)
        check_parameters(params, names)
        members = self._members(names)
        found = [(kind, m.tensor, layout(shard(m.tensor)), number) for kind, ms in members.items() for m, number in ms]
        if backend == self._backend and _same(found, self._found) and _same(groups, self._groups):
            for bucket in self.buckets:
                bucket.point()
        else:
            self._build(members, backend)
        self._found, self._groups, self._backend = found, [*groups], backend
        self.tensors, self.names = params, names
        self.elsewhere.follow(params, names)
        self.untrained = [p for p in params if not self._trains(p)]
        # Last: what an interrupt leaves half done is done again.
        self._watch = watch = Watch(groups, self.rule, self.keys, self.untrained)
        return watch

    def _require_same_shapes(self) -> None:
        """What was given another dtype or device goes on there, with the state that it has, as with torch.optim."""
        of_now = {*map(id, tensors_of(self.base.param_groups))}
        for bucket in self.buckets:
            known = zip(bucket.params, bucket.names, bucket.layouts, bucket.placements, strict=True)
            for p, name, before, placed in known:
                if id(p) in of_now and (shard(p).shape != before[0] or placement(p) != placed):
                    now = describe(*layout(shard(p))[:3])
                    was = describe(*before[:3])
                    if placement(p) != placed:
                        was, now = f"{was} of {placed}", f"{now} of {placement(p)}"
                    raise RuntimeError(
                        f"{name} was replaced between two steps: expected {was}, got {now}; build a new optimizer for "
                        "the changed model"
                    )

    def _members(self, names: list[str]) -> Members:
        """By what is the same in a bucket, its tensors, each with the number of its group."""
        members: Members = {}
        index = count()
        for number, group in enumerate(self.base.param_groups):
            switches = self.rule.id(group), self.rule.flags(group), self.rule.derives(group)
            for p, adaptive in zip(group["params"], adaptive_by_tensor(group, self.keys), strict=True):
                i = next(index)
                if self._trains(p):
                    of_kind = members.setdefault((p.device, p.dtype, adaptive, spread_of(p), *switches), [])
                    row = of_kind[-1][0].group + (of_kind[-1][1] != number) if of_kind else 0
                    of_kind.append((Member(i, names[i], p, row), number))
        if not members:
            raise RuntimeError(
                f"params: expected at least one that requires a gradient, got {len(names)} of which none does; "
                "requires_grad_() on those that are to be trained"
            )
        return members

    def _build(self, members: Members, backend: str) -> None:
        if self.rule is NO_RULE:
            require_no_other_hold(self.base, tensors_of(self.base.param_groups))
        groups = self.base.param_groups
        built: list[Bucket] = []
        for (device, _, adaptive, *_), of_kind in members.items():
            own = {f"param_groups[{number}]": groups[number] for _, number in of_kind}
            backend_of_device = kernels.resolve(backend, device)
            built.append(
                Bucket(len(built), [m for m, _ in of_kind], own, adaptive, self.base, self.rule, backend_of_device)
            )
        ranks = Ranks.of([bucket.params[0] for bucket in built])
        self.buckets, self.norms = built, Norms([bucket.device for bucket in built], 0, ranks)
        self._numbers = self._bound = None

    def _bind(self, program: Program, settings: Settings) -> None:
        """Have norms for the program, and its calls bound."""
        self._bound = None
        ranks = self.norms.ranks
        if program.slots > self.norms.slots:
            self.norms = Norms(self.norms.devices, program.slots, ranks)
        for bucket in self.buckets:
            bucket.bind(program, settings, self.norms, len(self.buckets) == 1 and ranks is None)
        if ranks is not None:
            ranks.agreement.say(
                {
                    "settings": (settings, len(program.evaluations), program.descents),
                    "param_groups": [len(group["params"]) for group in self.base.param_groups],
                    "parameters": [[*zip(b.names, b.placements, strict=True)] for b in self.buckets],
                }
            )
        self._bound = program, settings

    def _read_numbers(self, now: Numbers, loss_scale: float | Tensor) -> None:
        """Bring the buckets' numbers up to date with the groups, the settings and what else they are made of."""
        if now != self._numbers:
            values, settings, gathered, _ = now
            for bucket in self.buckets:
                bucket.read_numbers(settings, gathered, loss_scale)
            unseen = self.rule is NO_RULE or any(isinstance(value, Tensor) for of_group in values for value in of_group)
            self._numbers = None if unseen else now
        if isinstance(loss_scale, Tensor):
            for bucket in self.buckets:
                bucket.hyper[:, Hyper.UNSCALE] = loss_scale.detach().reshape(()).double().reciprocal()


def _same(a: Any, b: Any) -> bool:
    """Whether two lists hold the same: tensors and groups by identity, all else by value."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b if isinstance(a, (Tensor, dict)) else a == b
