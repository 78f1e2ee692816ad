"""Buckets: the tensors of one (device, dtype, group), their flat buffers, and the passes over them.

A bucket owns one flat buffer per state; each tensor's slice starts on a 64-byte boundary and holds its elements in the
parameter's own memory order. Parameters and gradients stay where PyTorch put them.

Names of the flat buffers: ``slow``, ``fast``, ``first``, ``perturbed`` (DESIGN section 2) live for one outer step. The
base optimizer's state lives under its names in ``base.state[p]``; with k >= 2 the inner steps advance a working copy of
it, and only the last pass of the outer step writes the state itself. So a step that is abandoned leaves it untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base import Rule
from .kernels import Flag, reference

ALIGNMENT = 64  # bytes
STEP_BUFFERS = ("slow", "fast", "first", "perturbed")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Evaluation:
    """One gradient evaluation of an outer step.

    Attributes:
        index: 0, 1, ... in the order of evaluation.
        inner_step: 1 to k: the inner step whose minibatch is to be used, where the minibatch is switched.
        descends: the base optimizer uses this gradient.
        ascends: the next ascent uses this gradient.
    """

    index: int
    inner_step: int
    descends: bool
    ascends: bool

    @property
    def perturbed(self) -> bool:
        """Whether the model's weights are perturbed; at evaluation 0 they are the slow weights."""
        return self.index > 0


@dataclass(frozen=True)
class Settings:
    """What one outer step is run with; the arguments of ``Lookbehind``."""

    k: int
    alpha: float | str
    alpha_scope: str
    max_grad_norm: float | None

    @property
    def aligns(self) -> bool:
        """Whether alpha is found from fast_1 and fast_k. With k = 1 they are the same, so alpha* = 1."""
        return self.alpha == "adaptive" and self.k > 1

    @property
    def static_alpha(self) -> float:
        return 1.0 if isinstance(self.alpha, str) else float(self.alpha)


class Scalars:
    """What buckets tell one another, in device memory; row b of each tensor is written by bucket b.

    Attributes:
        sq_norms: per device, float64 of shape (evaluations, buckets, 2).
        sums: per device, float64 of shape (buckets, 3).
    """

    def __init__(self, buckets: Sequence[Bucket], evaluations: int) -> None:
        self.devices = [bucket.device for bucket in buckets]
        shape = (evaluations, len(buckets), 2)
        self.sq_norms = {d: torch.zeros(shape, dtype=torch.float64, device=d) for d in set(self.devices)}
        self.sums = {d: torch.zeros(shape[1], 3, dtype=torch.float64, device=d) for d in set(self.devices)}

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
    """The tensors of one parameter group that share device and dtype.

    Args:
        number: position among all buckets: the row of ``Scalars`` that this one writes.
        indices: each tensor's index in the optimizer, in the order of its groups.
        names: each tensor's name for messages.
        params: the tensors.
        group: their parameter group; read again at the start of every outer step.
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
        group: dict[str, Any],
        base: Optimizer,
        rule: Rule,
        kernels: ModuleType,
    ) -> None:
        self.number, self.indices, self.names, self.params = number, indices, names, params
        self.group, self.base, self.rule, self.kernels = group, base, rule, kernels
        self.device, self.dtype = params[0].device, params[0].dtype
        self.low_precision = self.dtype in (torch.bfloat16, torch.float16)
        self.buffer_dtype = torch.float32 if self.low_precision else self.dtype
        self.layouts = [_layout(p) for p in params]
        self.table, self.size = self._make_table()
        self.buffers: dict[str, Tensor] = {}
        self.steps = torch.zeros(len(params))
        self.working_steps = torch.zeros(len(params))
        self.sums = torch.zeros(len(params), 3, dtype=torch.float64, device=self.device)
        self.hyper = torch.zeros(4 + len(rule.hyper(group)), dtype=torch.float64)
        self.hyper_values: tuple = ()
        self.entries: list[dict[str, Tensor]] = [{} for _ in params]  # ours in base.state[p], by name
        self.untouched = [True] * len(params)  # the tensor's base state is all zeros and not published
        self.stand_ins: list[Tensor] = []  # views of ``fast`` for a base optimizer without a rule

    def _make_table(self) -> tuple[Tensor, int]:
        unit = ALIGNMENT // self.buffer_dtype.itemsize
        rows, start = [], 0
        for row, p in enumerate(self.params):
            rows.append((row, start, p.numel()))
            start += -(-p.numel() // unit) * unit
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3), start

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
            now = _layout(tensors[index])
            same = same and tensors[index] is self.params[row]
            if now != before:
                if now[:3] != before[:3]:
                    raise RuntimeError(
                        f"{self.names[row]} was replaced between two steps: expected {_describe(*before[:3])}, got "
                        f"{_describe(*now[:3])}; build a new optimizer for the changed model"
                    )
                same = False
        return same

    def open(self, settings: Settings) -> None:
        """Begin an outer step: take over the base's state and the group's settings as they are now. Weights are only
        read.

        Raises:
            ValueError: the group's rho, adaptive or eta is not acceptable, or a tensor in ``base.state[p]`` has not the
                parameter's shape.
        """
        self.settings = settings
        self._read_group()
        self._adopt_state()
        self._allocate()
        self.addresses = [p.data_ptr() for p in self.params]
        self.joined: set[int] = set()  # rows that had a gradient in this step
        self.updated: set[int] = set()  # rows that the base optimizer has updated in this step

    def _allocate(self) -> None:
        """Have exactly the buffers that a step with these settings needs."""
        k, own_step = self.settings.k, self.rule.name == "none"
        needed = {"slow"}
        if k > 1 or own_step:
            needed.add("fast")
        if self.settings.aligns and (k > 2 or own_step):  # for k = 2 a rule leaves fast_1 in ``fast``
            needed.add("first")
        if self.low_precision:
            needed.add("perturbed")
        if k > 1:
            needed.update(map(working, self.state_names))
        for name in self.buffers.keys() - needed - set(self.state_names):
            if name in STEP_BUFFERS or name.startswith(working("")):
                del self.buffers[name]
        for name in sorted(needed - self.buffers.keys()):
            self.buffers[name] = torch.empty(self.size, dtype=self.buffer_dtype, device=self.device)
            if name == "fast" and own_step:
                self.stand_ins = [self.view("fast", row) for row in range(len(self.params))]

    def _read_group(self) -> None:
        settings, group = self.settings, self.group
        clip = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        values = (group["rho"], group["eta"], settings.static_alpha, clip, *self.rule.hyper(group))
        if values != self.hyper_values:
            self.hyper.copy_(torch.tensor([float(value) for value in values], dtype=torch.float64))
            self.hyper_values = values if not any(isinstance(value, Tensor) for value in values) else ()
        per_tensor = Flag.PER_TENSOR * (settings.alpha_scope == "tensor")
        self.flags = int(self.rule.flags(group) + Flag.ADAPTIVE * group["adaptive"] + per_tensor)

    def _adopt_state(self) -> None:
        """Make the buffers what ``base.state`` says: copy in what was loaded or replaced, clear what was removed."""
        self.state_names = self.rule.state(self.group)
        for name in self.state_names:
            if name not in self.buffers:
                self.buffers[name] = torch.zeros(self.size, dtype=self.buffer_dtype, device=self.device)
        if not self.state_names:
            return
        if self.entries[0].keys() != {*self.state_names, *(("step",) if self.rule.counted else ())}:
            for row, entry in enumerate(self.entries):
                if self.rule.counted:
                    entry.setdefault("step", self.steps[row])
                for name in self.state_names:
                    entry.setdefault(name, self.view(name, row))
        for row, (p, mine) in enumerate(zip(self.params, self.entries, strict=True)):
            published = self.base.state.get(p)
            if not published or published.get(self.state_names[0]) is None:
                if not self.untouched[row]:
                    self._clear_state(row)
            elif any(published.get(name) is not view for name, view in mine.items()):
                self._copy_state(row, published)

    def _clear_state(self, row: int) -> None:
        for view in self.entries[row].values():
            view.zero_()
        self.steps[row] = 0
        self.untouched[row] = True

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
        self.untouched[row] = False

    def close(self) -> None:
        """The outer step is complete: the base's state of newly updated tensors becomes visible in ``base.state``."""
        if self.state_names:
            for row in self.updated:
                if self.untouched[row]:
                    self._publish(row)

    def restore(self) -> None:
        """Abandon the outer step: every tensor that took part gets its slow weights back, wherever it is now."""
        for row in self.joined:
            self.params[row].detach().copy_(self.view("slow", row))

    def release(self) -> None:
        """Let go of the gradients of the last evaluation."""
        self.rows, self.grads = [], []

    # ---- gradients ----

    def collect(self, evaluation: Evaluation) -> int:
        """Gather the gradients of one evaluation and return how many tensors have one.

        Raises:
            RuntimeError: a parameter was moved since the step began, or a gradient is sparse or of another dtype.
        """
        rows, grads = [], []
        for row, p in enumerate(self.params):
            grad = p.grad
            if p.data_ptr() != self.addresses[row]:
                raise RuntimeError(
                    f"{self.names[row]} was moved inside an open step: expected {_describe(*self.layouts[row][:3])} in "
                    f"its place, got {_describe(*_layout(p)[:3])} at another address; move the model between two steps"
                )
            if grad is not None:
                grads.append(self._checked_gradient(row, p, grad))
                rows.append(row)
        self.rows, self.grads = rows, grads
        if evaluation.index == 0:
            self.joined = set()
        else:
            for row in set(rows) - self.joined:
                self._join(row)
        if evaluation.descends:
            self.updated.update(rows)
        return len(rows)

    def _checked_gradient(self, row: int, p: Tensor, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided or grad.dtype != p.dtype:
            raise RuntimeError(
                f"the gradient of {self.names[row]}: expected a dense tensor of {p.dtype}, got {grad.layout} of "
                f"{grad.dtype}"
            )
        grad = grad.detach()
        if grad.stride() == p.stride() or _memory_order(grad) == _memory_order(p):
            return grad
        return torch.empty_strided(p.shape, p.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)

    def _join(self, row: int) -> None:
        """A tensor whose first gradient of the step comes after evaluation 0 is still at its slow weights."""
        for name in STEP_BUFFERS:
            if name in self.buffers:
                self.view(name, row).copy_(self.params[row])
        if self.settings.k > 1:
            for name in self.state_names:
                self.view(working(name), row).copy_(self.view(name, row))
            self.working_steps[row] = self.steps[row]
        self.joined.add(row)

    # ---- passes ----

    def reduce_sq_norm(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """This bucket's sums of squares of the gradient, into its row of ``scalars``."""
        sq_norm = scalars.sq_norms[self.device][evaluation.index, self.number]
        if not self.rows:
            sq_norm.zero_()
            return
        self.kernels.reduce_sq_norm(
            params=self._params(self.rows),
            grads=self.grads,
            perturbed=self.buffers.get("perturbed") if evaluation.perturbed else None,
            table=self._table(self.rows),
            hyper=self.hyper,
            flags=self.flags,
            sq_norm=sq_norm,
        )

    def ascend(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """Move the perturbed weights; the first ascent of a step keeps the slow weights first."""
        if self.rows:
            self.kernels.ascend(
                params=self._params(self.rows),
                grads=self.grads,
                perturbed=self.buffers.get("perturbed"),
                slow=None if evaluation.perturbed else self.buffers["slow"],
                table=self._table(self.rows),
                sq_norms=scalars.sq_norms[self.device][evaluation.index],
                hyper=self.hyper,
                flags=self.flags,
            )
        if not evaluation.perturbed:
            self.joined = set(self.rows)

    def descend(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """Move the fast weights (the 2k form; with the gradient reused see ``descend_ascend``)."""
        if self.rule.name == "none":
            return
        for kernels, _, grads, table in self._parts():
            kernels.descend(grads=grads, **self._fast(evaluation), **self._descent(evaluation, scalars, table))

    def descend_ascend(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """Move the fast weights, then the perturbed ones with the same gradient."""
        if self.rule.name == "none":
            self.ascend(evaluation, scalars)
            return
        for kernels, params, grads, table in self._parts():
            descent = self._descent(evaluation, scalars, table)
            descent["sq_norms"] = scalars.sq_norms[self.device][evaluation.index]
            perturbed = self.buffers.get("perturbed")
            kernels.descend_ascend(params=params, grads=grads, perturbed=perturbed, **self._fast(evaluation), **descent)

    def descend_interpolate(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """The last descent, and the new weights between slow and fast with a static alpha."""
        slow, fast = self.buffers["slow"], self.buffers[self._fast_names(evaluation)[0]]
        for kernels, params, grads, table in self._parts():
            descent = self._descent(evaluation, scalars, table)
            kernels.descend_interpolate(params=params, grads=grads, slow=slow, fast=fast, **descent)

    def descend_align(self, evaluation: Evaluation, scalars: Scalars) -> None:
        """The last descent, and the sums that alpha* is made of: this row of ``scalars``, or a row a tensor."""
        target = scalars.sums[self.device][self.number : self.number + 1]
        if self.flags & Flag.PER_TENSOR:
            target = self.sums
            if len(self.rows) < len(self.params):
                target.fill_(float("nan"))  # tensors that take no part have no alpha
        elif not self.joined:
            target.zero_()
        for number, (kernels, params, grads, table) in enumerate(self._parts()):
            adds_up = number > 0 and not self.flags & Flag.PER_TENSOR
            sums = torch.empty_like(target) if adds_up else target
            kernels.descend_align(
                params=params,
                grads=grads,
                perturbed=self.buffers.get("perturbed"),
                slow=self.buffers["slow"],
                fast=self.buffers[self._fast_names(evaluation)[0]],
                first=self.buffers.get("first", self.buffers["fast"]),
                **self._descent(evaluation, scalars, table),
                sums=sums,
            )
            if adds_up:
                target.add_(sums)

    def interpolate(self, scalars: Scalars) -> None:
        """The new weights between slow and fast with alpha*."""
        rows = sorted(self.joined)
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

    def stage(self, evaluation: Evaluation, scalars: Scalars) -> list[tuple[Tensor, Tensor]]:
        """(parameter, stand-in) for every tensor with a gradient: the stand-in's memory is the fast weights."""
        if evaluation.inner_step == 1:
            self.buffers["fast"].copy_(self.buffers["slow"])
        clip = None
        if self.settings.max_grad_norm is not None:
            sq_norms = scalars.sq_norms[self.device][evaluation.index]
            clip = reference.clip_coefficient(sq_norms, self.settings.max_grad_norm)
        for row, grad in zip(self.rows, self.grads, strict=True):
            grad = grad.to(self.buffer_dtype)
            self.stand_ins[row].grad = grad if clip is None else grad * clip.to(grad.dtype)
        return [(self.params[row], self.stand_ins[row]) for row in self.rows]

    def unstage(self, evaluation: Evaluation) -> None:
        """After the base's own ``step()``: drop the gradients lent to it, and keep fast_1 if it is needed."""
        for row in self.rows:
            self.stand_ins[row].grad = None
        if evaluation.inner_step == 1 and "first" in self.buffers:
            self.buffers["first"].copy_(self.buffers["fast"])

    # ---- what the passes are given ----

    def view(self, name: str, row: int) -> Tensor:
        """One tensor's slice of a flat buffer, in the tensor's shape and strides."""
        shape, _, _, strides = self.layouts[row]
        return self.buffers[name].as_strided(shape, strides, int(self.table[row, 1]))

    def _params(self, rows: Sequence[int]) -> list[Tensor]:
        return self.params if len(rows) == len(self.params) else [self.params[row] for row in rows]

    def _table(self, rows: Sequence[int]) -> Tensor:
        return self.table if len(rows) == len(self.params) else self.table[rows]

    def _parts(self) -> Iterator[tuple[ModuleType, list[Tensor], list[Tensor | None], Tensor]]:
        """The tensors with a gradient, for the backend; those that had one earlier, for the reference."""
        if self.rows:
            yield self.kernels, self._params(self.rows), self.grads, self._table(self.rows)
        carried = sorted(self.joined - set(self.rows))
        if carried:
            yield reference, self._params(carried), [None] * len(carried), self._table(carried)

    def _fast_names(self, evaluation: Evaluation) -> tuple[str, str]:
        """Where an inner step reads the fast weights, and where it writes them."""
        if self.rule.name == "none":
            return "fast", "fast"
        first = "first" if "first" in self.buffers else "fast"
        source = {1: "slow", 2: first}.get(evaluation.inner_step, "fast")
        return source, first if evaluation.inner_step == 1 else "fast"

    def _fast(self, evaluation: Evaluation) -> dict[str, Tensor | None]:
        source, target = self._fast_names(evaluation)
        return {"fast": self.buffers[target], "fast_from": None if source == target else self.buffers[source]}

    def _descent(self, evaluation: Evaluation, scalars: Scalars, table: Tensor) -> dict[str, Any]:
        """What every descending pass is given. The base's state is read at inner step 1 and written at inner step k."""
        names, k = self.state_names, self.settings.k
        own = [self.buffers[name] for name in names], self.steps
        between = ([self.buffers[working(name)] for name in names], self.working_steps) if k > 1 else own
        source = own if evaluation.inner_step == 1 else between
        target = own if evaluation.inner_step == k else between
        clips = self.settings.max_grad_norm is not None
        return {
            "state": target[0],
            "state_from": [] if source is target else source[0],
            "steps": target[1],
            "steps_from": None if source is target else source[1],
            "table": table,
            "sq_norms": scalars.sq_norms[self.device][evaluation.index] if clips else None,
            "hyper": self.hyper,
            "rule": self.rule.name,
            "flags": self.flags,
        }


# ---- tensors ---------------------------------------------------------------------------------------------------------


def working(name: str) -> str:
    """The buffer in which the inner steps advance the base's state ``name``."""
    return "working " + name


def check_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse what the kernels cannot take.

    Raises:
        ValueError: a parameter is lazy, complex, sparse, on the meta device, a wrapper subclass (such as DTensor), of a
            floating dtype other than float64, float32, bfloat16 and float16, not dense, or overlaps another one in
            memory.
    """
    for p, name in zip(params, names, strict=True):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"{name}: expected an initialized parameter, got {type(p).__name__}; run the model once first"
            )
        reason = _unsuitable(p)
        if reason:
            raise ValueError(f"{name}: expected {reason}, got {_describe(*_layout(p)[:3])}, strides {_strides(p)}")
    _check_overlap(params, names)


def _unsuitable(p: Tensor) -> str | None:
    """What was expected of a parameter that is not acceptable."""
    if is_traceable_wrapper_subclass(p):
        return f"a plain tensor, not a {type(p).__name__}"
    if p.layout != torch.strided:
        return f"a dense tensor, not one of layout {p.layout}"
    if p.is_meta:
        return "a tensor with memory, not on the meta device"
    if p.is_complex():
        return "a real tensor"
    if p.is_floating_point() and p.dtype not in DTYPES:
        return "dtype " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    if not _is_dense(p):
        return "a tensor whose elements fill its memory once, without gaps or overlap"
    return None


def _check_overlap(params: Sequence[Tensor], names: Sequence[str]) -> None:
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), i)
        for i, p in enumerate(params)
        if p.numel()
    )
    for (device, _, end, i), (next_device, start, _, j) in pairwise(spans):
        if device == next_device and start < end:
            first, second = sorted((i, j))
            same = "is the same tensor as" if params[i] is params[j] else "overlaps in memory with"
            raise ValueError(
                f"{names[second]} {same} {names[first]}: expected every parameter to have memory of its own"
            )


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The strides of all dimensions of more than one element; None if the elements do not fill the memory once."""
    sizes_and_strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(sizes_and_strides):
        if stride != expected and x.numel():
            return None
        expected *= size
    return tuple(stride for stride, _ in sizes_and_strides)


def _is_dense(x: Tensor) -> bool:
    return _memory_order(x) is not None


def _layout(p: Tensor) -> tuple:
    return p.shape, p.dtype, p.device, p.stride() if p.layout == torch.strided else ()


def _strides(p: Tensor) -> tuple[int, ...] | str:
    return p.stride() if p.layout == torch.strided else "none"


def _describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {tuple(shape)}, {str(dtype).removeprefix('torch.')}, {device}"


def name_of(index: int, name: str | None, p: Tensor) -> str:
    """What a tensor is called in messages: its index in the optimizer, its name if known, shape and dtype."""
    known = f" {name!r}" if name else ""
    if torch.nn.parameter.is_lazy(p):
        return f"parameter {index}{known}"
    return f"parameter {index}{known} (shape {tuple(p.shape)}, {str(p.dtype).removeprefix('torch.')})"
