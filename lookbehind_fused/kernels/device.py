"""What the backends for GPUs have in common: the passes as launches of kernels that find tensors by address.

A kernel is launched once for all tensors of a call: a program (a block of threads) computes one chunk of one tensor.
Parameters and gradients are reached through tables of addresses in device memory. They are kept as long as the bound
pass that uses them: what has not changed since its last call is not uploaded again. Uploads come from pinned memory and
nothing waits for them. Where a backend says so, the addresses of few gradients go with each launch instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import native, ops
from .contract import BUFFERS, NUMBERS, Column, Flag, Hyper, RuleId
from .schema import ARGUMENTS, completed

CHUNK = 4096  # elements of a program,
SPAN = 8 * CHUNK  # and of one that writes none: it has as much to do
COLUMNS = Column.ADDRESS + 1  # of ``table``, that kernels are given

# prepare(kernel, plan, dtype, arguments): a launch, to be called again and again. A kernel takes of the arguments those
# that it has. ``dtype`` is the parameters'.
Launch = Callable[[], Any]
Prepare = Callable[[str, "Plan", torch.dtype, dict[str, Any]], Launch]


class Plan:
    """The device's side of a ``table``: who computes what, where the tensors are, and room for sums.

    Attributes:
        rows: int64 (tensors, COLUMNS): the columns of ``table`` up to the address.
        chunks, spans: int32 (programs, 2): each program's tensor and its number within that tensor, for programs of
            ``CHUNK`` and of ``SPAN`` elements.
        addresses: int64 (tensors,) in host memory: the gradients' addresses.
        grads: the same, where kernels are given them: in device memory, or ``addresses`` itself.
        elements, row_count, group_count: what flat buffers, what has a row for each tensor, and ``hyper`` have at the
            least.
        partials, tensor_sums, counters: float64 for up to 3 sums a program and a tensor; int32, zero between launches.
    """

    def __init__(self, table: Tensor, params: Sequence[Tensor], inlined: int = 0) -> None:
        self.device, count = params[0].device, len(params)
        sizes = table[:, Column.SIZE]
        self.chunks, self.spans = _programs(sizes, CHUNK).to(self.device), _programs(sizes, SPAN).to(self.device)
        self.rows = torch.empty(count, COLUMNS, dtype=torch.int64, device=self.device)
        self.addresses = torch.zeros(count, dtype=torch.int64, device="cpu")
        self.inlined, self.follows = inlined, count <= inlined
        self.grads = self.addresses if self.follows else torch.empty_like(self.addresses, device=self.device)
        self.partials = torch.empty(3 * len(self.chunks), dtype=torch.float64, device=self.device)
        self.tensor_sums = torch.empty(3 * count, dtype=torch.float64, device=self.device)
        self.counters = torch.zeros(1 + count, dtype=torch.int32, device=self.device)
        self.sizes = sizes.tolist()
        self.elements = int((table[:, Column.START] + sizes).max())
        self.row_count, self.group_count = (int(table[:, column].max()) + 1 for column in (Column.ROW, Column.GROUP))
        self.steps: Tensor | None = None
        self.captured: list[Tensor] = []
        self.version: int | None = None

    def refresh(self, table: Tensor, params: Sequence[Tensor]) -> None:
        """Follow parameters that have moved: whoever moves them writes their addresses into ``table``."""
        if self.version == table._version:
            return
        if any(p.numel() != size for p, size in zip(params, self.sizes, strict=True)):
            found = [p.numel() for p in params]
            raise RuntimeError(f"params: expected {self.sizes} elements as table has, got {found}")
        addresses = torch.tensor([p.data_ptr() for p in params], dtype=torch.int64, device="cpu")
        self._upload(torch.cat([table[:, : Column.ADDRESS], addresses[:, None]], 1), self.rows)
        self.has_layouts = native.why_not() is None and table.size(1) >= Column.SIZES
        self.version = table._version

    def point_at(self, table: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Have ``self.grads`` hold the gradients' addresses. Returns the gradients, as they are or laid out as their
        parameters: to be kept until the launch.
        """
        grads = list(grads)
        if len(grads) != len(params):
            raise RuntimeError(f"grads: expected {len(params)}, one for each of params, got {len(grads)}")
        changed = native.locate(grads, params[0].dtype, table, self.addresses) if self.has_layouts else -1
        if changed < 0:  # rare, or there is no library
            grads = laid_out(params, grads)
            addresses = torch.tensor([*map(Tensor.data_ptr, grads)], dtype=torch.int64, device="cpu")
            changed = not torch.equal(addresses, self.addresses)
            self.addresses.copy_(addresses)
        if self.grads is not self.addresses and (changed or not self.follows):
            self.follows = False  # until they do
            self._upload(self.addresses.clone(), self.grads)
            self.follows = True
        return grads

    def room_for(self, steps: Tensor) -> Tensor:
        """Memory of the plan's own for a copy of ``steps``, which a captured graph finds again."""
        if self.steps is None or self.steps.shape != steps.shape:
            self.steps = torch.empty_like(steps)
        return self.steps

    def _upload(self, values: Tensor, to: Tensor) -> None:
        if Uploads.later is not None:
            Uploads.later.append((values, to))
            return
        # A pinned block of its own each time: the allocator does not hand it out again before the copy is done.
        values = values.pin_memory() if to.is_cuda else values
        to.copy_(values, non_blocking=True)
        if to.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.append(values)  # every replay of the graph reads it again


class Uploads:
    """While a step is captured that is to upload nothing when it is replayed: what is to be uploaded once, afterwards.

    Attributes:
        later: values and where they go; None where uploads take place at once.
    """

    later: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    @contextmanager
    def put_off(cls) -> Iterator[None]:
        """Within the block nothing is uploaded; after it all is, if it was left by no exception."""
        before, cls.later = cls.later, []
        try:
            yield
            later = cls.later
        finally:
            cls.later = before
        for values, to in later:
            to.copy_(values)


def _programs(sizes: Tensor, length: int) -> Tensor:
    """Of programs that each take so many elements of one tensor: the tensor and the number within it."""
    of_tensor = torch.clamp((sizes + length - 1) // length, min=1)
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), of_tensor)
    number = torch.arange(len(tensor), device="cpu") - (torch.cumsum(of_tensor, 0) - of_tensor)[tensor]
    return torch.stack([tensor, number], 1).to(torch.int32)


def laid_out(params: Sequence[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients, copied where they are laid out in another way than their parameters."""
    found = []
    for i, (g, p) in enumerate(zip(map(Tensor.resolve_neg, grads), params, strict=True)):  # no negated views
        if g.dtype != p.dtype:
            raise RuntimeError(f"grads: tensor {i}: expected {p.dtype}, got {g.dtype}")
        if g.shape != p.shape:
            raise RuntimeError(f"grads: tensor {i}: expected shape {tuple(p.shape)}, got {tuple(g.shape)}")
        if any(n != 1 and a != b for n, a, b in zip(g.shape, g.stride(), p.stride(), strict=True)):
            g = torch.empty_like(p, memory_format=torch.preserve_format).copy_(g)
        found.append(g)
    return found


PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of passes that are not bound, by ``table``


class Call:
    """A pass with all of its arguments but the gradients.

    Args:
        prepare: of the backend.
        name: of the pass.
        params: the parameters; where there are none, nothing is launched.
        given: the arguments but ``params`` and ``grads`` (``schema.completed``).
        plan: that of the call's table; None makes one.
        inlined: of so many tensors kernels are given the gradients' addresses in host memory.

    Attributes:
        kept: the gradients of the last call, as they are or laid out as their parameters.
    """

    def __init__(
        self, prepare: Prepare, name: str, params: list[Tensor], given: Mapping[str, Any], plan: Plan | None = None,
        inlined: int = 0,
    ) -> None:  # fmt: skip
        self.params, self.given, self.takes_grads = params, given, "grads" in ARGUMENTS[name]
        self.launches: list[Launch] = []
        self.kept: list[Tensor] = []
        if not params:
            self.launches = [*_without_tensors(name, given)]
            return
        self.plan = plan or Plan(given["table"], params, inlined)
        if "steps" in given and given["steps_from"] is None:  # all programs of a tensor read what one of them writes
            room = self.plan.room_for(given["steps"])
            self.launches.append(partial(room.copy_, given["steps"]))
            given = {**given, "steps_from": room}
        for kernel, arguments in _kernels(name, given, self.plan):
            self.launches.append(prepare(kernel, self.plan, params[0].dtype, arguments))

    def __call__(self, *values: Any) -> None:
        """Run it. The first of the values are the gradients, if it takes any; all others it has already."""
        if self.params:
            self.plan.refresh(self.given["table"], self.params)
            if self.takes_grads:
                self.kept = self.plan.point_at(self.given["table"], self.params, values[0])
        self.launch()

    def launch(self) -> None:
        """Launch the kernels: everything is where they look for it."""
        for run in self.launches:
            run()


def bind(
    prepare: Prepare, op: Any, name: str, params: Sequence[Tensor], table: Tensor, arguments: Mapping[str, Any],
    once: bool = False, inlined: int = 0,
) -> ops.Pass:  # fmt: skip
    """``bind`` of a backend, whose op of the pass is ``op``. ``once``: the result will not be called again."""
    params, given = list(params), completed(name, {**arguments, "table": table})
    if torch.compiler.is_compiling():
        return ops.bound(op, op, params, given)
    plan = _plan_of(table, params, inlined) if once else None
    return ops.bound(op, Call(prepare, name, params, given, plan, inlined), params, given)


def _plan_of(table: Tensor, params: Sequence[Tensor], inlined: int) -> Plan | None:
    """That of the last call with this table, or a new one; None where there are no parameters."""
    plan: Plan | None = PLANS.get(table)
    of_this = plan and (len(plan.sizes), plan.inlined, plan.device)
    if params and of_this != (len(params), inlined, params[0].device):
        plan = PLANS[table] = Plan(table, params, inlined)
    return plan


def implementation(prepare: Prepare, name: str, inlined: int = 0) -> Callable[..., None]:
    """The pass ``name`` with the arguments of its schema, by position: the implementation of an op."""
    names = ARGUMENTS[name]

    def run(*values: Any) -> None:
        given = dict(zip(names, values, strict=True))
        params, grads = given.pop("params"), given.pop("grads", ())
        Call(prepare, name, params, given, _plan_of(given["table"], params, inlined), inlined)(grads)

    return run


def _without_tensors(name: str, given: Mapping[str, Any]) -> Iterator[Launch]:
    """What a pass over nothing writes."""
    if name == "reduce_sq_norm" or given.get("row", -1) >= 0:
        yield given["sq_norms"][given["row"]].zero_
    if "sums" in given and name != "interpolate" and not given["flags"] & Flag.PER_TENSOR:
        yield given["sums"].zero_
    if given.get("done") is not None:
        yield partial(given["done"].fill_, 1)


def _kernels(name: str, given: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kernels of a pass, and what each of them is given."""
    sq_norms, hyper, flags = given.get("sq_norms"), given.get("hyper"), given["flags"]
    common = {
        **given,
        **{"rows": plan.rows, "chunks": plan.chunks, "grads": plan.grads, "tensors": len(plan.sizes)},
        **{"partials": plan.partials, "tensor_sums": plan.tensor_sums, "counters": plan.counters},
        "flags": int(flags),
        "buckets": 0 if sq_norms is None else sq_norms.size(0),
    }
    if flags & Flag.SKIPS and "sq_norms" in given and sq_norms is None:
        raise RuntimeError("sq_norms: expected a tensor where non-finite gradients are skipped, got None")
    if hyper is not None:
        numbers = Hyper.OF_RULE + len(NUMBERS[RuleId(given.get("rule", RuleId.NONE))])
        if hyper.dim() != 2 or hyper.size(0) < plan.group_count or hyper.size(1) < numbers:
            raise RuntimeError(
                f"hyper: expected at least {plan.group_count} rows of {numbers} numbers, got shape {tuple(hyper.shape)}"
            )
        common["numbers"] = hyper.size(1)
    if name == "reduce_sq_norm" or given.get("row", -1) >= 0:
        at_slow = name == "ascend" and given["slow"] is not None
        out = {"out": given["sq_norms"][given["row"]], "perturbed": None if at_slow else given["perturbed"]}
        yield "reduce_sq_norm", {**common, **out, "chunks": plan.spans}
    if name.startswith("descend"):
        yield name, {**common, **_descent(name, given)}
    elif name == "interpolate":
        yield name, {**common, "buckets": given["sums"].size(0)}
    elif name == "ascend":
        yield name, common


def _descent(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a kernel that descends is given in another form than its pass."""
    rule, state, state_from = RuleId(given["rule"]), given["state"], given["state_from"] or given["state"]
    for argument, buffers in (("state", state), ("state_from", state_from)):
        if len(buffers) != BUFFERS[rule]:
            raise RuntimeError(f"{argument}: expected {BUFFERS[rule]} buffers for {rule.name}, got {len(buffers)}")
    places = {f"s{i}": buffer for i, buffer in enumerate(state)} | {f"f{i}": b for i, b in enumerate(state_from)}
    own = {**dict.fromkeys(("s0", "s1", "s2", "f0", "f1", "f2")), **places, "rule": int(rule)}
    fast = given["fast"]
    if "fast_from" in given:
        return {**own, "fast_from": fast if given["fast_from"] is None else given["fast_from"]}
    same = given["flags"] & Flag.DERIVES or fast.data_ptr() == given["slow"].data_ptr()  # is not read twice
    return {**own, "fast": None, "fast_from": fast, "slow": None if same else given["slow"], "out": given.get("sums")}
