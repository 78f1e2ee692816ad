"""Buckets: the tensors of one (device, dtype, flags), whatever their groups; their flat buffers; calls bound to both.

A bucket owns one flat buffer for each name; each tensor's slice starts on a 64-byte boundary and holds its elements in
the parameter's own memory order. Parameters and gradients stay where PyTorch put them. Which buffers there are is the
union of the names in the calls of the program: ``slow``, ``fast``, ``first``, ``perturbed``, means and the working copy
of the base's state live for one outer step; the state itself for as long as the bucket, in ``base.state[p]`` as views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import Keys, Settings, check_group
from .binding import BoundCall, bind_call, pieces
from .kernels import reference
from .kernels.contract import Column, Flag, Hyper, RuleId
from .kernels.schema import tensor_table
from .lowering import KEPT, Call, Calls, Traits, buffers_of, lower, working
from .norms import Norms
from .program import Program
from .rules import Rule
from .shards import is_sharded, placed_like, placement, shard, shards, shards_like, whole
from .tensors import ROUNDED, compute_dtype, describe, layout

ALIGNMENT = 64  # bytes
SUBSETS = 8  # how many sets of tensors with a gradient are remembered
STEPS = ("steps", "working steps 0", "working steps 1", "no steps")  # one number a tensor
IRREGULAR = (-1,)  # equals no set of rows

Bound = list[list[BoundCall]]  # for each evaluation, for each call
Gathered = tuple[list[BoundCall], Sequence[Any]]  # calls, and the gradients to call them with


class Member(NamedTuple):
    """A tensor of a bucket: its number in the optimizer, its name in messages, and the bucket's number of its group."""

    number: int
    name: str
    tensor: Tensor
    group: int


class Bucket:
    """The tensors that share device, dtype, flags, and the kind of state that the base keeps for them.

    Args:
        number: position among all buckets: the row of ``Norms`` that this one writes.
        members: in the order of the optimizer's groups.
        groups: the parameter groups that they are of, by the name in messages: the rows of ``hyper``.
        adaptive: whether their ascent is scaled.
        base: the optimizer in whose ``state`` the buffers of ``rule`` are published.
        kernels: the backend.

    Attributes:
        params: the tensors. shards: what of them is here, plain memory: the tensors themselves, unless they are sharded
            over ranks (``shards``).
    """

    def __init__(
        self, number: int, members: Sequence[Member], groups: Mapping[str, dict[str, Any]], adaptive: bool,
        base: Optimizer, rule: Rule, kernels: ModuleType,
    ) -> None:  # fmt: skip
        self.number, self.groups, self.adaptive = number, groups, adaptive
        self.base, self.rule, self.keys, self.kernels = base, rule, Keys.of(base), kernels
        self.indices, self.names, self.params = ([*column] for column in list(zip(*members, strict=True))[:3])
        self.sharded = is_sharded(self.params[0])
        self.shards = shards(self.params) if self.sharded else self.params
        self.placements = [*map(placement, self.params)]
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.buffer_dtype = compute_dtype(self.dtype)
        self.layouts = [layout(p) for p in self.shards]
        self.all_rows = tuple(range(len(members)))
        self.table, self.size = flat_layout(self.shards, self.buffer_dtype, [member.group for member in members])
        group = next(iter(groups.values()))
        self.rule_id, self.state_names, self.can_derive = rule.id(group), rule.state(group), rule.derives(group)
        self.own_flags = int(rule.flags(group) + Flag.ADAPTIVE * adaptive)
        place = self.device if kernels.SCALARS_ON_DEVICE else torch.device("cpu")
        self.done = torch.zeros(2, dtype=torch.int32, device=place)
        self.buffers: dict[str, Tensor] = {}
        self.counts = {name: torch.zeros(len(members), dtype=torch.float32, device=place) for name in STEPS}
        self.sums = torch.zeros(len(members), 3, dtype=torch.float64, device=self.device)
        width = Hyper.OF_RULE + len(rule.numbers(group))
        self.hyper = torch.zeros(len(groups), width, dtype=torch.float64, device=place)
        # The mean of n gradients is what SGD makes of weights at 0 with a learning rate of -1 / n.
        self.mean_hyper = torch.zeros(len(groups), Hyper.OF_RULE + 4, dtype=torch.float64, device=place)
        self.entries: list[dict[str, Tensor]] = []  # ours in base.state[p], by name
        self.untouched = set(self.all_rows)  # rows whose base state is all zeros and not published
        self.bound_for: dict[tuple[int, ...], Bound]
        self.key: tuple[Program, Traits, int, Norms] | None = None  # what the calls are bound for
        self.point()

    def point(self) -> None:
        """Note where the parameters are, and keep that memory: passes reach it by address until the next step."""
        if self.sharded:
            self.shards = shards(self.params)
        self.memory = [p.detach() for p in self.shards]
        self.addresses = [*map(Tensor.data_ptr, self.shards)]
        self.table[:, Column.ADDRESS] = torch.tensor(self.addresses, dtype=torch.int64, device="cpu")
        self.bound_for = {}

    # ---- opening a step ----

    def read_numbers(self, settings: Settings, gathered: int, loss_scale: float | Tensor) -> None:
        """Bring ``hyper`` up to date with the groups.

        Raises:
            TypeError, ValueError: a group's rho or eta is not acceptable.
        """
        clip = torch.inf if settings.max_grad_norm is None else settings.max_grad_norm
        unscale = 1.0 if isinstance(loss_scale, Tensor) else 1 / loss_scale
        rows: list[list[float]] = []
        mean_rows: list[list[float]] = []
        on_device: list[tuple[int, int, Tensor]] = []
        for where, group in self.groups.items():
            check_group(group, where, self.keys)
            rho, eta = group[self.keys.rho] / settings.ascents_in_rho, group[self.keys.eta]
            if group.get("maximize"):  # of f is minimizing -f, whose ascent goes the other way
                rho = -rho
            numbers = [rho, eta, settings.static_alpha, clip, unscale, *self.rule.numbers(group)]
            for column, x in enumerate(numbers):  # what is on the device stays there
                if isinstance(x, Tensor) and x.device.type != "cpu":
                    on_device.append((len(rows), column, x))
                    numbers[column] = 0.0
            rows.append([*map(float, numbers)])
            mean_rows.append([rho, float(eta), 1.0, torch.inf, 1.0, -1 / gathered, 0.0, 0.0, 0.0])
        for hyper, values in ((self.hyper, rows), (self.mean_hyper, mean_rows)):
            now = torch.tensor(values, dtype=torch.float64, device="cpu")
            hyper.copy_(now.pin_memory() if hyper.is_cuda else now, non_blocking=True)
        for row, column, x in on_device:
            self.hyper[row, column].copy_(x.detach().reshape(()), non_blocking=True)

    def bind(self, program: Program, settings: Settings, norms: Norms, alone: bool) -> None:
        """Have the calls of a program bound to this bucket's memory. ``alone``: nobody else has a part in the norms."""
        per_tensor = Flag.PER_TENSOR * (settings.alpha_scope == "tensor")
        flags = int(self.own_flags + per_tensor + Flag.SKIPS * settings.skips)
        traits = Traits(
            states=self.state_names,
            derives=self.can_derive and not settings.skips,
            own_step=self.rule_id == RuleId.NONE,
            rounded=self.dtype in ROUNDED,
            adaptive=settings.alpha == "adaptive",
            needs_norms=settings.descents_need_norms,
            skips=settings.skips,
            alone=alone,
        )
        key = program, traits, flags, norms  # norms are compared by identity
        if key == self.key:
            return
        self.key = None
        self.program, self.traits, self.flags, self.norms = key
        self.calls = lower(program, traits)
        self._allocate(buffers_of(self.calls) | {*self.state_names}, drops=True)
        self.bound_for = {}
        self.key = key  # last: what an interrupt leaves half done is done again

    def open(self) -> None:
        """Begin an outer step."""
        self.done.zero_()
        for name in self.program.means:
            torch._foreach_zero_(pieces(self.buffers[name]))
        self.rows: tuple[int, ...] | None = None  # those with a gradient, while they are the same in the whole step
        self.joined: tuple[int, ...] = ()  # those that have had a gradient in this step
        self.updated: set[int] | None = None  # those that the base has updated, if not the joined ones
        self.irregular = False
        self.reached = False  # whether the last evaluation has given any of them a gradient

    def _allocate(self, names: set[str], drops: bool = False) -> None:
        names = names - {*STEPS, "sums"}
        for name in self.buffers.keys() - names if drops else ():
            del self.buffers[name]
        for name in sorted(names - self.buffers.keys()):
            make = torch.zeros if name in self.state_names else torch.empty
            self.buffers[name] = make(self.size, dtype=self.buffer_dtype, device=self.device)

    # ---- the base's state ----

    def adopt_state(self) -> None:
        """Make the buffers what ``base.state`` says: copy in what was loaded or replaced, clear what was removed.

        Raises:
            ValueError: a tensor there has not the parameter's shape.
        """
        if not self.state_names:
            return
        if not self.entries:
            self._allocate({*self.state_names})
            steps = self.counts["steps"].unbind() if self.rule.counted else ()
            own = [
                {name: whole(self.view(name, row), self.params[row]) for name in self.state_names}
                for row in self.all_rows
            ]
            self.entries = [{"step": steps[row], **own[row]} if steps else own[row] for row in self.all_rows]
        for row, (p, mine) in enumerate(zip(self.params, self.entries, strict=True)):
            published = self.base.state.get(p)
            if not published or published.get(self.state_names[0]) is None:
                self._clear_state(row)
            elif any(published.get(name) is not view for name, view in mine.items()):
                self._copy_state(row, published)

    def _clear_state(self, row: int) -> None:
        self.counts["steps"][row] = 0  # may have counted updates while there was no state
        if row not in self.untouched:
            for view in self.entries[row].values():
                shard(view).zero_()
            self.untouched.add(row)

    def _copy_state(self, row: int, published: dict[str, Any]) -> None:
        for name, view in self.entries[row].items():
            value = published.get(name)
            if value is None:
                shard(view).zero_()
            elif not isinstance(value, Tensor) or value.shape != view.shape:
                came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"the base optimizer's {name!r} of {self.names[row]}: expected a tensor of shape "
                    f"{tuple(view.shape)}, got {came}"
                )
            elif value is not view:
                shard(view).copy_(shard(placed_like(value, view)))
        if not self.rule.counted:
            self.counts["steps"][row] = 1
        self._publish(row)

    def _publish(self, row: int) -> None:
        self.base.state[self.params[row]].update(self.entries[row])
        self.untouched.discard(row)

    # ---- closing a step: each may be called again after an interrupt ----

    def commit(self) -> bool:
        """Publish the state of tensors that have it for the first time; whether there were any."""
        if not (self.untouched and self.state_names):
            return False
        updated = self.joined if self.updated is None or self.program.means else self.updated
        rows = self.untouched.intersection(updated)
        for row in sorted(rows):
            self._publish(row)
        return bool(rows)

    def rollback(self) -> None:
        """Every tensor that took part gets its slow weights back, wherever it is now."""
        if self.done[KEPT]:
            for row in self.joined:
                self.shards[row].detach().copy_(self.view("slow", row))

    # ---- gradients ----

    def gather(self, index: int, given: Mapping[Tensor, Tensor] | None = None) -> Gathered:
        """The bound calls that follow evaluation ``index``, and the gradients to call them with: those that are there,
        or those ``given``.
        """
        if self.shards[0].data_ptr() != self.addresses[0]:  # where a model was moved, and not a tensor
            self.require_unmoved()
        rows = self.all_rows
        if given is None:
            grads: list[Any] = [grad for p in self.params if (grad := p.grad) is not None]
            if len(grads) < len(rows):
                rows = tuple([row for row, p in enumerate(self.params) if p.grad is not None])
                if rows and self.program.over_ranks:  # other ranks may have reached more
                    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
                    rows = self.all_rows
        else:
            rows = tuple([row for row, p in enumerate(self.params) if p in given])
            grads = [given[self.params[row]] for row in rows]
        if self.sharded:
            grads = shards_like(grads, [self.params[row] for row in rows])
        self.reached = bool(rows)
        if rows is not self.rows and rows != self.rows:
            if self.rows is not None:
                return self._gather_irregular(index, rows, grads)
            self.bound = self.bound_for.get(rows) or self._bound_for(rows)
            self.rows = self.joined = rows
            if self.program.evaluations[index].perturbed:  # without an evaluation before that keeps the slow weights
                self._join(rows)
        return self.bound[index], grads

    def _bound_for(self, rows: tuple[int, ...]) -> Bound:
        if rows not in self.bound_for:
            if len(self.bound_for) >= SUBSETS:
                self.bound_for.clear()
            self.bound_for[rows] = self._bind(rows, self.kernels, self.calls)
        return self.bound_for[rows]

    def _gather_irregular(self, index: int, rows: tuple[int, ...], grads: list[Tensor]) -> Gathered:
        """Other tensors than before have gradients: the rest of the step runs on the reference backend, which takes
        None for a gradient, by calls that derive nothing.
        """
        calls = lower(self.program, self.traits._replace(derives=False))
        uses = self.program.uses
        if not self.irregular:
            self._allocate(buffers_of(calls))
            done = sum(use.verb == "descend" for of_one in uses[:index] for use in of_one)
            if done == 1 and calls != self.calls:
                self._derive_fast()
            self.updated = set(self.joined) if done else set()
            self.rows, self.irregular = IRREGULAR, True
        self._join(tuple(sorted({*rows} - {*self.joined})))
        if any(use.verb == "descend" and not use.mean for use in uses[index]):
            self.updated = {*(self.updated or ()), *rows}
        by_row = dict(zip(rows, grads, strict=True))
        bound = self._bind(self.joined, reference, calls[index : index + 1])
        return bound[0], [by_row.get(row) for row in self.joined]

    def by_reference(self, place: int) -> BoundCall:
        """A call after the last evaluation, on the reference backend, for the gradients that were gathered."""
        calls = lower(self.program, self.traits._replace(derives=False)) if self.irregular else self.calls
        return bind_call(self, calls[-1][place], self.joined, reference)

    def _derive_fast(self) -> None:
        """Write the fast weights of inner step 1, which the calls meant to derive at inner step 2."""
        if not self.joined:
            return
        own = tuple(map(working, self.state_names))
        buffers: dict[str, str | tuple[str, ...]] = {
            "fast": "fast",
            "fast_from": "slow",
            "state": own,
            "steps": "working steps 1",
        }
        call = Call("descend", buffers=buffers, flags=int(Flag.DERIVES))
        bind_call(self, call, self.joined, reference)([None] * len(self.joined))

    def _join(self, rows: tuple[int, ...]) -> None:
        """Tensors whose first gradient of the step comes after evaluation 0 are still at their slow weights."""
        if rows:
            params = [self.shards[row] for row in rows]
            for name in sorted({"slow", "fast", "first", "perturbed"} & self.buffers.keys()):
                torch._foreach_copy_(self.views(name, rows), params)
            for name in self.state_names if self.program.descents > 1 else ():
                torch._foreach_copy_(self.views(working(name), rows), self.views(name, rows))
            for name in STEPS[1:3]:
                self.counts[name][[*rows]] = self.counts["steps"][[*rows]]
            self.joined = tuple(sorted({*self.joined, *rows}))
            self.done[KEPT] = 1

    def keep_slow(self) -> None:
        """Keep all slow weights before the first evaluation, where it is not known when they will be perturbed."""
        self.bound = self._bound_for(self.all_rows)
        self.rows = self.all_rows
        self._join(self.all_rows)

    def require_unmoved(self) -> None:
        """Passes reach parameters by the addresses that they had when the step began.

        Raises:
            RuntimeError: a parameter was moved since then.
        """
        now = shards(self.params) if self.sharded else self.params
        if [*map(Tensor.data_ptr, now)] == self.addresses:
            return
        for row, (p, address) in enumerate(zip(now, self.addresses, strict=True)):
            if p.data_ptr() != address:
                raise RuntimeError(
                    f"{self.names[row]} was moved inside an open step: expected {describe(*self.layouts[row][:3])} in "
                    f"its place, got {describe(*layout(p)[:3])} at another address; move the model between two steps"
                )

    def check(self, grads: Sequence[Tensor | None]) -> None:
        """Name the tensor that a pass cannot take, if there is one.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype, or a parameter has another shape in the same memory.
        """
        for row, grad in zip(self.joined, grads, strict=True):
            p = self.shards[row]
            if p.shape != self.layouts[row][0]:
                raise RuntimeError(
                    f"{self.names[row]} was replaced between two steps: expected {describe(*self.layouts[row][:3])}, "
                    f"got {describe(*layout(p)[:3])}; build a new optimizer for the changed model"
                )
            if grad is not None and (grad.layout != torch.strided or grad.dtype != p.dtype or grad.shape != p.shape):
                sparse = "; build the layer with sparse=False" if grad.layout == torch.sparse_coo else ""
                raise RuntimeError(
                    f"the gradient of {self.names[row]}: expected a dense tensor of {p.dtype}, got {grad.layout} of "
                    f"{grad.dtype}{sparse}"
                )

    # ---- memory ----

    def _bind(self, rows: tuple[int, ...], kernels: ModuleType, calls: Calls) -> Bound:
        return [[bind_call(self, call, rows, kernels) for call in of_one] for of_one in calls]

    def memory_of(self, name: str | tuple[str, ...]) -> Any:
        """What a call names: a flat buffer, a list of them, or a number or a row of sums for each tensor."""
        if isinstance(name, tuple):
            return [self.buffers[one] for one in name]
        return self.sums if name == "sums" else self.counts[name] if name in STEPS else self.buffers[name]

    def views(self, name: str, rows: Sequence[int]) -> list[Tensor]:
        """Tensors' slices of a flat buffer, in their shapes and strides."""
        return [self.view(name, row) for row in rows]

    def view(self, name: str, row: int) -> Tensor:
        """One tensor's slice of a flat buffer, in the tensor's shape and strides."""
        shape, _, _, strides = self.layouts[row]
        return flat_view(self.buffers[name], self.table, row, shape, strides)


# ---- flat buffers ----------------------------------------------------------------------------------------------------


def flat_layout(params: Sequence[Tensor], dtype: torch.dtype, groups: Sequence[int]) -> tuple[Tensor, int]:
    """The table (``kernels.schema``) of tensors whose slices lie one after the other in flat buffers of a dtype, and
    the size of such a buffer in elements. ``groups``: of each tensor, its row of ``hyper``.
    """
    unit = ALIGNMENT // dtype.itemsize
    starts = [0, *accumulate(-(-p.numel() // unit) * unit for p in params)]
    size = starts.pop()
    return tensor_table(params, starts, groups), size


def flat_view(buffer: Tensor, table: Tensor, row: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """One tensor's slice of a flat buffer, in the tensor's shape and strides."""
    return buffer.as_strided(shape, strides, int(table[row, Column.START]))
