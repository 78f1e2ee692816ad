"""Buckets: the tensors of one (device, dtype, group, ``adaptive``), their flat buffers, and the passes over them.

A bucket owns one flat buffer per state; each tensor's slice starts on a 64-byte boundary and holds its elements in the
parameter's own memory order. Parameters and gradients stay where PyTorch put them.

Names of the flat buffers: ``slow``, ``fast``, ``first``, ``perturbed`` (DESIGN section 2) live for one outer step. The
base optimizer's state lives under its names in ``base.state[p]``; with k >= 2 the inner steps advance a working copy of
it, and only the last pass of the outer step writes the state itself. So a step that is abandoned leaves it untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import Settings, check_group, describe, layout
from .base import Rule
from .evaluations import MEAN, Evaluation
from .kernels import Flag, RuleId, reference
from .kernels.contract import BUFFERS, Column, Hyper
from .kernels.schema import tensor_table

ALIGNMENT = 64  # bytes
STEP_BUFFERS = ("slow", "fast", "first", "perturbed")
RULE_IDS = {({0: "none", 1: "sgd", 2: "sgd"}.get(rule, "adam"), count): rule for rule, count in BUFFERS.items()}


class Gathered(NamedTuple):
    """The gradients of one evaluation in one bucket.

    Attributes:
        rows: which of the bucket's tensors have one, in order.
        grads: theirs.
        carried: the rows that had one earlier in the step, but not now.
        late: at inner step 2, those of both that inner step 1 has not updated.
    """

    rows: Sequence[int]
    grads: Sequence[Tensor]
    carried: Sequence[int] = ()
    late: Sequence[int] = ()


class Part(NamedTuple):
    """Tensors of a bucket that a descending pass treats alike."""

    kernels: ModuleType
    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    table: Tensor
    flags: int


class Scalars:
    """What buckets tell one another, in device memory; row b of each tensor is written by bucket b.

    Attributes:
        sq_norms: per device, for each evaluation float64 of shape (buckets, 2).
        sums: per device, float64 of shape (buckets, 3).
    """

    def __init__(self, buckets: Sequence[Bucket], evaluations: int) -> None:
        self.evaluations = evaluations
        self.devices = [bucket.device for bucket in buckets]
        shape = (evaluations, len(buckets), 2)
        self.sq_norms = {d: torch.zeros(shape, dtype=torch.float64, device=d).unbind() for d in set(self.devices)}
        self.sums = {d: torch.zeros(shape[1], 3, dtype=torch.float64, device=d) for d in set(self.devices)}
        # A single bucket has its sums of squares added up by the pass that ascends with them.
        self.alone = len(buckets) == 1
        self.row_to_fill = 0 if self.alone else -1

    def share_sq_norms(self, index: int) -> None:
        """Give every device every bucket's sums of squares at evaluation ``index``."""
        self._share({device: rows[index] for device, rows in self.sq_norms.items()})

    def share_sums(self) -> None:
        """Give every device every bucket's alignment sums."""
        self._share(self.sums)

    def _share(self, rows: dict[torch.device, Tensor]) -> None:
        if len(rows) > 1:
            for number, owner in enumerate(self.devices):
                for device in rows.keys() - {owner}:
                    rows[device][number].copy_(rows[owner][number], non_blocking=True)


class Bucket:
    """The tensors of one parameter group that share device, dtype and whether their ascent is scaled.

    Args:
        number: position among all buckets: the row of ``Scalars`` that this one writes.
        indices: each tensor's index in the optimizer, in the order of its groups.
        names: each tensor's name for messages.
        params: the tensors.
        group_name: what the group is called in messages.
        group: their parameter group; read again at the start of every outer step.
        adaptive: whether their ascent is scaled; the group may have others.
        base: the optimizer in whose ``state`` the buffers of ``rule`` are published.
        rule: how the kernels update the fast weights.
        kernels: the backend.
    """

    def __init__(
        self,
        number: int,
        indices: list[int],
        names: list[str],
        params: list[Tensor],
        group_name: str,
        group: dict[str, Any],
        adaptive: bool,
        base: Optimizer,
        rule: Rule,
        kernels: ModuleType,
    ) -> None:
        self.number, self.indices, self.names, self.params = number, indices, names, params
        self.group_name, self.group, self.base, self.rule, self.kernels = group_name, group, base, rule, kernels
        self.adaptive = adaptive
        self.device, self.dtype = params[0].device, params[0].dtype
        self.low_precision = self.dtype in (torch.bfloat16, torch.float16)
        self.buffer_dtype = torch.float32 if self.low_precision else self.dtype
        self.layouts = [layout(p) for p in params]
        self.all_rows = range(len(params))
        self.everyone = frozenset(self.all_rows)
        self.table, self.size = flat_layout(params, self.buffer_dtype)
        self.buffers: dict[str, Tensor] = {}
        scalars = self.device if kernels.SCALARS_ON_DEVICE else torch.device("cpu")
        self.steps = torch.zeros(len(params), device=scalars)
        # Of even and of odd inner steps: kernels read one while they write the other.
        self.working_steps = [torch.zeros(len(params), device=scalars) for _ in range(2)]
        self.sums = torch.zeros(len(params), 3, dtype=torch.float64, device=self.device)
        self.hyper = torch.zeros(1, Hyper.OF_RULE + len(rule.hyper(group)), dtype=torch.float64, device=scalars)
        self.mean_hyper = torch.zeros(1, Hyper.OF_RULE + 4, dtype=torch.float64, device=scalars)
        self.group_values: tuple = ()
        self.settings: Settings | None = None
        self.state_names: tuple[str, ...] = ()
        self.derives = False  # inner step 1 leaves no fast weights: inner step 2 derives them
        self.entries: list[dict[str, Tensor]] = [{} for _ in params]  # ours in base.state[p], by name
        self.untouched = set(self.everyone)  # rows whose base state is all zeros and not published
        self.stand_ins: list[Tensor] = []  # views of ``fast`` for a base optimizer without a rule

    # ---- opening and closing a step ----

    def same_layout(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all tensors are the same, with the strides that the buffers were laid out for.

        Args:
            tensors: all parameters of the optimizer, as they are now.

        Raises:
            RuntimeError: a tensor has another shape, dtype or device than before.
        """
        same = True
        for row, (index, before) in enumerate(zip(self.indices, self.layouts, strict=True)):
            if index >= len(tensors):
                return False
            now = layout(tensors[index])
            same = same and tensors[index] is self.params[row]
            if now != before:
                if now[:3] != before[:3]:
                    self._report_replaced(row, now)
                same = False
        return same

    def _report_replaced(self, row: int, now: tuple) -> None:
        raise RuntimeError(
            f"{self.names[row]} was replaced between two steps: expected {describe(*self.layouts[row][:3])}, got "
            f"{describe(*now[:3])}; build a new optimizer for the changed model"
        )

    def open(self, settings: Settings, grad_scale: float | Tensor, state_changed: bool, moved: bool) -> None:
        """Begin an outer step: take over the base's state and the group's settings as they are now.

        Args:
            settings: those of the step.
            grad_scale: what the loss was multiplied by.
            state_changed: whether tensors of ``base.state`` may be others than at the last step.
            moved: whether parameters may be at other addresses than at the last step.

        Raises:
            ValueError: the group's rho or eta is not acceptable, or a tensor in ``base.state[p]`` has not the
                parameter's shape.
        """
        self._read_group(settings, grad_scale)
        names = self.rule.state(self.group)
        # fast_1 itself is needed once more for an adaptive alpha with k >= 3, and is slow where its update was skipped
        derives = settings.descents > 1 and not (settings.aligns and settings.descents > 2) and not settings.skips
        derives = derives and self.rule.derives(self.group)
        adopts = state_changed or names != self.state_names
        if adopts:
            self._adopt_state(names)
        if adopts or settings != self.settings or derives != self.derives:
            self.derives = derives
            self._allocate(settings)
        self.settings = settings
        for name in settings.means:
            self.buffers[name].zero_()
        if moved:
            self.addresses = [*map(Tensor.data_ptr, self.params)]
            self.table[:, Column.ADDRESS] = torch.tensor(self.addresses)
        self.joined: set[int] | frozenset[int] = set()  # rows that had a gradient in this step
        self.updated: set[int] | frozenset[int] = set()  # rows that the base optimizer has updated in this step

    def _allocate(self, settings: Settings) -> None:
        """Have exactly the buffers that a step with these settings needs."""
        k, own_step = settings.descents, self.rule.name == "none"
        needed = {"slow"}
        if k > 2 or own_step or (k == 2 and not self.derives):
            needed.add("fast")
        if settings.aligns and (k > 2 or own_step):  # for k = 2 fast_1 is what the last descent moves
            needed.add("first")
        needed.update(settings.means)
        if self.low_precision:
            needed.add("perturbed")
        if k > 1:
            needed.update(map(working, self.state_names))
        for name in self.buffers.keys() - needed - set(self.state_names):
            if name in STEP_BUFFERS or name.startswith((working(""), MEAN)):
                del self.buffers[name]
        for name in sorted(needed - self.buffers.keys()):
            self.buffers[name] = torch.empty(self.size, dtype=self.buffer_dtype, device=self.device)
            if name == "fast" and own_step:
                self.stand_ins = [self.view("fast", row) for row in range(len(self.params))]

    def _read_group(self, settings: Settings, grad_scale: float | Tensor) -> None:
        """Bring ``hyper`` and ``flags`` up to date."""
        scaled_on_device = isinstance(grad_scale, Tensor)
        self._read_numbers(settings, "on device" if scaled_on_device else grad_scale)
        self.unscale = self.hyper[0, Hyper.UNSCALE] if scaled_on_device or grad_scale != 1 else None
        if scaled_on_device:
            self.unscale.copy_(grad_scale.detach().reshape(()).double().reciprocal(), non_blocking=True)

    def _read_numbers(self, settings: Settings, grad_scale: float | str) -> None:
        group = self.group
        values = (
            *(group["rho"], settings.ascents_in_rho, group["eta"], settings.static_alpha, settings.max_grad_norm),
            *self.rule.hyper(group),
            *(
                settings.alpha_scope,
                self.rule.flags(group),
                settings.nonfinite,
                grad_scale,
                settings.means,
                settings.gathered,
            ),
        )
        if values == self.group_values:
            return
        check_group(group, self.group_name)
        clip = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        unscale = 1.0 if isinstance(grad_scale, str) else 1 / grad_scale
        rho = group["rho"] / settings.ascents_in_rho
        hyper = (rho, group["eta"], settings.static_alpha, clip, unscale, *self.rule.hyper(group))
        self._set(self.hyper, hyper)
        # The mean of n gradients is what SGD makes of weights at 0 with a learning rate of -1 / n.
        if settings.means:
            rate = -1 / settings.gathered
            self._set(self.mean_hyper, (rho, group["eta"], 1.0, float("inf"), 1.0, rate, 0.0, 0.0, 0.0))
        per_tensor = Flag.PER_TENSOR * (settings.alpha_scope == "tensor")
        switches = Flag.ADAPTIVE * self.adaptive + per_tensor + Flag.SKIPS * settings.skips
        self.flags = int(self.rule.flags(group) + switches)
        self.group_values = () if any(isinstance(value, Tensor) for value in hyper) else values  # they change in place

    def _set(self, to: Tensor, values: Sequence[Any]) -> None:
        now = torch.tensor([float(value) for value in values], dtype=torch.float64)
        to.copy_(now.pin_memory() if to.is_cuda else now, non_blocking=True)

    def _adopt_state(self, names: tuple[str, ...]) -> None:
        """Make the buffers what ``base.state`` says: copy in what was loaded or replaced, clear what was removed."""
        self.state_names = names
        for name in names:
            if name not in self.buffers:
                self.buffers[name] = torch.zeros(self.size, dtype=self.buffer_dtype, device=self.device)
        if not names:
            return
        for row, entry in enumerate(self.entries):
            if self.rule.counted:
                entry.setdefault("step", self.steps[row])
            for name in names:
                if name not in entry:
                    entry[name] = self.view(name, row)
        for row, (p, mine) in enumerate(zip(self.params, self.entries, strict=True)):
            published = self.base.state.get(p)
            if not published or published.get(names[0]) is None:
                self._clear_state(row)
            elif any(published.get(name) is not view for name, view in mine.items()):
                self._copy_state(row, published)

    def _clear_state(self, row: int) -> None:
        self.steps[row] = 0  # may have counted updates while there was no state
        if row not in self.untouched:
            for view in self.entries[row].values():
                view.zero_()
            self.untouched.add(row)

    def _copy_state(self, row: int, published: dict[str, Any]) -> None:
        for name, view in self.entries[row].items():
            value = published.get(name)
            if value is None:
                view.zero_()
            elif not isinstance(value, Tensor) or value.shape != view.shape:
                came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"the base optimizer's {name!r} of {self.names[row]}: expected a tensor of shape "
                    f"{tuple(view.shape)}, got {came}"
                )
            elif value is not view:
                view.copy_(value)
        if not self.rule.counted:
            self.steps[row] = 1
        self._publish(row)

    def _publish(self, row: int) -> None:
        self.base.state[self.params[row]].update(self.entries[row])
        self.untouched.discard(row)

    def close(self) -> None:
        """The outer step is complete: the base's state of newly updated tensors becomes visible in ``base.state``."""
        if self.state_names:
            for row in self.updated & self.untouched:
                self._publish(row)

    @torch.no_grad()
    def keep_slow(self) -> None:
        """Keep all slow weights before the first evaluation, where it is not known when they will be perturbed."""
        self._keep_slow(self.all_rows)
        self.joined = self.everyone

    def _keep_slow(self, rows: Sequence[int]) -> None:
        for name in {"slow", "perturbed"} & self.buffers.keys():
            torch._foreach_copy_([self.view(name, row) for row in rows], self._params(rows))

    def return_to_slow(self) -> None:
        """Give the parameters their slow weights, for the next microbatch to ascend from."""
        if self.low_precision:
            self.buffers["perturbed"].copy_(self.buffers["slow"])
        rows = self.all_rows if len(self.joined) == len(self.params) else sorted(self.joined)
        if rows:
            torch._foreach_copy_(self._params(rows), [self.view("slow", row) for row in rows])

    def restore(self) -> None:
        """Abandon the outer step: every tensor that took part gets its slow weights back, wherever it is now."""
        for row in self.joined:
            self.params[row].detach().copy_(self.view("slow", row))

    # ---- gradients ----

    def collect(self, evaluation: Evaluation) -> Gathered:
        """The gradients of an evaluation. Tensors that have their first of the step now are made to take part.

        Raises:
            RuntimeError: a parameter was moved since the step began.
        """
        self.require_unmoved()
        gathered = self.gather()
        rows = self.everyone if len(gathered.rows) == len(self.params) else set(gathered.rows)
        if evaluation.index > 0 and not rows <= self.joined:
            for row in rows - self.joined:
                self._join(row)
        carried = () if rows is self.everyone else sorted(self.joined - rows)
        late = ()
        if evaluation.second and self.updated is not self.everyone:
            late = sorted((self.joined | rows) - self.updated)
        return Gathered(gathered.rows, gathered.grads, carried, late) if carried or late else gathered

    def gather(self, previous: Mapping[Tensor, Tensor] | None = None) -> Gathered:
        """The gradients that are there now, or those in ``previous``. Only reads, so that it can be compiled."""
        grads = [p.grad for p in self.params] if previous is None else [previous.get(p) for p in self.params]
        present = [grad for grad in grads if grad is not None]
        if len(present) == len(grads):
            return Gathered(self.all_rows, present)
        return Gathered([row for row, grad in enumerate(grads) if grad is not None], present)

    def record(self, evaluation: Evaluation, gathered: Gathered) -> None:
        """Note which tensors an evaluation has moved, once its passes are done."""
        rows = self.everyone if len(gathered.rows) == len(self.params) else set(gathered.rows)
        if evaluation.index == 0:
            self.joined = self.joined or rows
        if evaluation.then:
            rows = self.joined
        if evaluation.descends or evaluation.then:
            self.updated = self.updated | rows if self.updated else rows

    def require_unmoved(self) -> None:
        """Backends may reach parameters by the addresses that they had when the step began.

        Raises:
            RuntimeError: a parameter was moved since then.
        """
        if [*map(Tensor.data_ptr, self.params)] == self.addresses:
            return
        for row, (p, address) in enumerate(zip(self.params, self.addresses, strict=True)):
            if p.data_ptr() != address:
                raise RuntimeError(
                    f"{self.names[row]} was moved inside an open step: expected {describe(*self.layouts[row][:3])} in "
                    f"its place, got {describe(*layout(p)[:3])} at another address; move the model between two steps"
                )

    def explain(self, gathered: Gathered) -> None:
        """After a pass has refused its arguments: name the tensor that is the cause, if one is.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype, or a parameter has another shape in the same memory.
        """
        for row, grad in zip(gathered.rows, gathered.grads, strict=True):
            p = self.params[row]
            if p.shape != self.layouts[row][0]:
                self._report_replaced(row, layout(p))
            if grad.layout != torch.strided or grad.dtype != p.dtype:
                raise RuntimeError(
                    f"the gradient of {self.names[row]}: expected a dense tensor of {p.dtype}, got {grad.layout} of "
                    f"{grad.dtype}"
                )

    def _join(self, row: int) -> None:
        """A tensor whose first gradient of the step comes after evaluation 0 is still at its slow weights."""
        for name in STEP_BUFFERS:
            if name in self.buffers:
                self.view(name, row).copy_(self.params[row])
        if self.settings.descents > 1:
            for name in self.state_names:
                self.view(working(name), row).copy_(self.view(name, row))
            for working_steps in self.working_steps:
                working_steps[row] = self.steps[row]
        self.joined = self.joined | {row}

    # ---- passes ----

    def reduce_sq_norm(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """This bucket's sums of squares of the gradient, into its row of ``scalars``."""
        sq_norms = scalars.sq_norms[self.device][evaluation.index]
        if not gathered.rows:
            sq_norms[self.number].zero_()
            return
        self.kernels.reduce_sq_norm(
            params=self._params(gathered.rows),
            grads=gathered.grads,
            perturbed=self.buffers.get("perturbed") if evaluation.perturbed else None,
            table=self._table(gathered.rows),
            hyper=self.hyper,
            flags=self.flags,
            sq_norms=sq_norms,
            row=self.number,
        )

    def ascend(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """Move the perturbed weights; the first ascent of a step keeps the slow weights first."""
        if gathered.rows:
            self.kernels.ascend(
                params=self._params(gathered.rows),
                grads=gathered.grads,
                perturbed=self.buffers.get("perturbed"),
                slow=None if evaluation.perturbed else self.buffers["slow"],
                table=self._table(gathered.rows),
                sq_norms=scalars.sq_norms[self.device][evaluation.index],
                row=scalars.row_to_fill,
                hyper=self.hyper,
                flags=self.flags,
            )

    def descend(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """Move the fast weights (the 2k form; with the gradient reused see ``descend_ascend``)."""
        if self.rule.name == "none":
            return
        for part in self._parts(evaluation, gathered):
            part.kernels.descend(**self._fast(evaluation), **self._descent(evaluation, scalars, part))

    def descend_ascend(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """Move the fast weights, then the perturbed ones with the same gradient."""
        if self.rule.name == "none":
            self.ascend(evaluation, scalars, gathered)
            return
        parts = self._parts(evaluation, gathered)
        row = scalars.row_to_fill
        if row >= 0 and parts[0].grads is not gathered.grads:  # no part has all gradients
            self.reduce_sq_norm(evaluation, scalars, gathered)
            row = -1
        for part in parts:
            descent = self._descent(evaluation, scalars, part)
            part.kernels.descend_ascend(
                perturbed=self.buffers.get("perturbed"),
                **self._fast(evaluation),
                **{**descent, "sq_norms": scalars.sq_norms[self.device][evaluation.index]},
                row=row if part.grads is gathered.grads else -1,
            )

    def accumulate(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """Add the gradient to the mean; ascend with it too where it is not the last."""
        if not gathered.rows:
            return
        if not evaluation.perturbed:  # the pass below does not
            self._keep_slow(gathered.rows)
        sq_norms = scalars.sq_norms[self.device][evaluation.index]
        arguments = {
            "params": self._params(gathered.rows),
            "grads": gathered.grads,
            "fast": self.buffers[evaluation.mean],
            "fast_from": None,
            **{"state": [], "state_from": [], "steps": self.working_steps[0], "steps_from": None},
            "table": self._table(gathered.rows),
            "hyper": self.mean_hyper,
            "rule": int(RuleId.SGD),
            "flags": self.flags & int(Flag.ADAPTIVE | Flag.SKIPS),
        }
        if evaluation.ascends:
            perturbed = self.buffers.get("perturbed")
            self.kernels.descend_ascend(perturbed=perturbed, sq_norms=sq_norms, row=scalars.row_to_fill, **arguments)
        else:
            self.kernels.descend(sq_norms=sq_norms if self.settings.skips else None, **arguments)

    def mean(self, name: str) -> Gathered:
        """A mean in the place of the gradient, of the tensors that had one in this step."""
        rows = self.all_rows if len(self.joined) == len(self.params) else sorted(self.joined)
        return Gathered(rows, [self.view(name, row).to(self.dtype) for row in rows])

    def descend_interpolate(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """The last descent, and the new weights between slow and fast with a static alpha."""
        slow, fast = self.buffers["slow"], self.buffers[self._fast_names(evaluation)[0]]
        for part in self._parts(evaluation, gathered):
            descent = self._descent(evaluation, scalars, part)
            part.kernels.descend_interpolate(slow=slow, fast=fast, **descent)

    def descend_align(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> None:
        """The last descent, and the sums that alpha* is made of: this row of ``scalars``, or a row a tensor."""
        target = scalars.sums[self.device][self.number : self.number + 1]
        if self.flags & Flag.PER_TENSOR:
            target = self.sums
            if len(gathered.rows) < len(self.params):
                target.fill_(float("nan"))  # tensors that take no part have no alpha
        elif not gathered.rows and not gathered.carried:
            target.zero_()
        for number, part in enumerate(self._parts(evaluation, gathered)):
            adds_up = number > 0 and not self.flags & Flag.PER_TENSOR
            sums = torch.empty_like(target) if adds_up else target
            part.kernels.descend_align(
                perturbed=self.buffers.get("perturbed"),
                slow=self.buffers["slow"],
                fast=self.buffers[self._fast_names(evaluation)[0]],
                first=self.buffers.get("first"),
                **self._descent(evaluation, scalars, part),
                sums=sums,
            )
            if adds_up:
                target.add_(sums)

    def interpolate(self, scalars: Scalars, gathered: Gathered) -> None:
        """The new weights between slow and fast with alpha*."""
        rows = gathered.rows if not gathered.carried else sorted((*gathered.rows, *gathered.carried))
        if rows:
            self.kernels.interpolate(
                params=self._params(rows),
                perturbed=self.buffers.get("perturbed"),
                slow=self.buffers["slow"],
                table=self._table(rows),
                sums=self.sums if self.flags & Flag.PER_TENSOR else scalars.sums[self.device],
                flags=self.flags,
            )

    # ---- a base optimizer without a rule ----

    def stage(self, evaluation: Evaluation, scalars: Scalars, gathered: Gathered) -> list[tuple[Tensor, Tensor]]:
        """(parameter, stand-in) for every tensor with a gradient: the stand-in's memory is the fast weights."""
        if evaluation.first:
            self.buffers["fast"].copy_(self.buffers["slow"])
        sq_norms = scalars.sq_norms[self.device][evaluation.index]
        scale = reference.gradient_scale(sq_norms, self.settings.max_grad_norm, self.unscale)
        for row, grad in zip(gathered.rows, gathered.grads, strict=True):
            grad = grad.to(self.buffer_dtype)
            self.stand_ins[row].grad = grad if scale is None else grad * scale.to(grad.device, grad.dtype)
        return [(self.params[row], self.stand_ins[row]) for row in gathered.rows]

    def unstage(self, evaluation: Evaluation, gathered: Gathered) -> None:
        """After the base's own ``step()``: drop the gradients lent to it, and keep fast_1 if it is needed."""
        for row in gathered.rows:
            self.stand_ins[row].grad = None
        if evaluation.first and "first" in self.buffers:
            self.buffers["first"].copy_(self.buffers["fast"])

    # ---- what the passes are given ----

    def view(self, name: str, row: int) -> Tensor:
        """One tensor's slice of a flat buffer, in the tensor's shape and strides."""
        shape, _, _, strides = self.layouts[row]
        return flat_view(self.buffers[name], self.table, row, shape, strides)

    def _params(self, rows: Sequence[int]) -> list[Tensor]:
        return self.params if len(rows) == len(self.params) else [self.params[row] for row in rows]

    def _table(self, rows: Sequence[int]) -> Tensor:
        return self.table if len(rows) == len(self.params) else self.table[list(rows)]

    def _parts(self, evaluation: Evaluation, gathered: Gathered) -> list[Part]:
        """The tensors with a gradient, for the backend; those that had one earlier, for the reference. Each in two if
        there are fast weights to derive, but not those of all.
        """
        flags = self.flags | Flag.DERIVES if self.derives and evaluation.second else self.flags
        late = gathered.late if flags != self.flags else ()
        parts = []
        for kernels, rows, grads in (
            (self.kernels, gathered.rows, gathered.grads),
            (reference, gathered.carried, [None] * len(gathered.carried)),
        ):
            if rows and not late:
                parts.append(Part(kernels, self._params(rows), grads, self._table(rows), flags))
            elif rows:
                parts += self._split(kernels, rows, grads, late, flags)
        return parts

    def _split(
        self, kernels: ModuleType, rows: Sequence[int], grads: Sequence[Tensor | None], late: Sequence[int], flags: int
    ) -> list[Part]:
        parts = []
        for own_flags, are_late in ((flags, False), (self.flags, True)):
            chosen = [n for n, row in enumerate(rows) if (row in late) == are_late]
            if chosen:
                own = [rows[n] for n in chosen]
                parts.append(Part(kernels, self._params(own), [grads[n] for n in chosen], self._table(own), own_flags))
        return parts

    def _fast_names(self, evaluation: Evaluation) -> tuple[str, str]:
        """Where an inner step reads the fast weights, and where it writes them."""
        if self.rule.name == "none":
            return "fast", "fast"
        if self.derives:
            return "slow" if evaluation.first or evaluation.second else "fast", "" if evaluation.first else "fast"
        first = "first" if "first" in self.buffers else "fast"
        source = "slow" if evaluation.first else first if evaluation.second else "fast"
        return source, first if evaluation.first else "fast"

    def _fast(self, evaluation: Evaluation) -> dict[str, Tensor | None]:
        source, target = self._fast_names(evaluation)
        return {"fast": self.buffers.get(target), "fast_from": None if source == target else self.buffers[source]}

    def _descent(self, evaluation: Evaluation, scalars: Scalars, part: Part) -> dict[str, Any]:
        """What every descending pass is given. The base's state is read at inner step 1 and written at inner step k."""
        names = self.state_names
        own = [self.buffers[name] for name in names]
        reads_own, writes_own = evaluation.first, evaluation.last
        in_place = reads_own == writes_own
        steps_from = self.steps if reads_own else self.working_steps[not evaluation.odd]
        if reads_own and writes_own:
            steps_from = None
        needs_norms = self.settings.descents_need_norms
        between = own if reads_own and writes_own else [self.buffers[working(name)] for name in names]
        return {
            "params": part.params,
            "grads": part.grads,
            "state": own if writes_own else between,
            "state_from": [] if in_place else own if reads_own else between,
            "steps": self.steps if writes_own else self.working_steps[evaluation.odd],
            "steps_from": steps_from,
            "table": part.table,
            "sq_norms": scalars.sq_norms[self.device][evaluation.index] if needs_norms else None,
            "hyper": self.hyper,
            "rule": int(RULE_IDS[self.rule.name, len(names)]),
            "flags": part.flags,
        }


# ---- flat buffers ----------------------------------------------------------------------------------------------------


def flat_layout(params: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, int]:
    """The table (``kernels.schema``) of tensors whose slices lie one after the other in flat buffers of a dtype, and
    the size of such a buffer in elements.
    """
    unit = ALIGNMENT // dtype.itemsize
    starts = [0, *accumulate(-(-p.numel() // unit) * unit for p in params)]
    size = starts.pop()
    return tensor_table(params, starts, [0] * len(params)), size


def flat_view(buffer: Tensor, table: Tensor, row: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """One tensor's slice of a flat buffer, in the tensor's shape and strides."""
    return buffer.as_strided(shape, strides, int(table[row, 1]))


def working(name: str) -> str:
    """The buffer in which the inner steps advance the base's state ``name``."""
    return "working " + name
