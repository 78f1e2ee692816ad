"""What an optimizer holds, what it allocates on the way, and what its passes read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "lookbehind_fused"


def published(state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Bytes of the tensors in an optimizer's ``state``: the memory that they are views of, each counted once."""
    tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Allocated(NamedTuple):
    """What tensors occupy, in bytes.

    Attributes:
        kept: what was allocated within an action and is there at its end, with what the action returned.
        peak: the most at one time within it.
    """

    kept: int
    peak: int


def allocated(action: Callable[[], Any]) -> Allocated:
    """The memory of all tensors that ``action`` makes, whoever holds them, by torch's own count of its allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    del result
    return Allocated(current, highest)


class Passes(TorchDispatchMode):
    """Inside it every pass of the native backend is noted with the bytes that it reads and writes.

    Each array of the model's size is filled with NaN in a trial run of the pass: if a NaN comes out anywhere, the pass
    reads the array. What it writes is what the trial runs change.

    Attributes:
        found: (name, bytes read, bytes written) of each pass.
    """

    def __init__(self, size: int | None = None) -> None:
        """``size``: elements of the one tensor there is; None only notes the names."""
        super().__init__()
        self.size = size
        self.found: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the pass, then run it."""
        kwargs = kwargs or {}
        if func.namespace == NAMESPACE:
            with torch._C._DisableTorchDispatch():
                counted = (0, 0) if self.size is None else self._traffic(func, args, kwargs)
            self.found.append((func._opname, *counted))
        return func(*args, **kwargs)

    def _traffic(self, func: Any, args: Any, kwargs: Any) -> tuple[int, int]:
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        arrays = {
            t.data_ptr(): t
            for value in given.values()
            for t in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(t, Tensor) and t.numel() == self.size
        }
        unpoisoned = self._trial(func, given, None)
        written = {pointer for pointer, before, after in unpoisoned if pointer and not _same(before, after)}
        read = set()
        for pointer in arrays:
            outcome = self._trial(func, given, pointer)
            if any(_has_nan(after) for other, _, after in outcome if other in written or other is None):
                read.add(pointer)
        of = lambda chosen: sum(arrays[pointer].nbytes for pointer in chosen)  # noqa: E731
        return of(read), of(written)

    def _trial(self, func: Any, given: dict[str, Any], poisoned: int | None) -> list[tuple[Any, Tensor, Tensor]]:
        """Run the pass on copies: (address or None for a small tensor, before, after) of each tensor."""
        copies: dict[int, Tensor] = {}

        def copy(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [copy(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            pointer = value.data_ptr()
            if pointer not in copies:
                copies[pointer] = value.detach().clone()
                if pointer == poisoned:
                    copies[pointer].fill_(float("nan"))
            return copies[pointer]

        func(**{name: copy(value) for name, value in given.items()})
        originals = {
            t.data_ptr(): t
            for value in given.values()
            for t in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(t, Tensor)
        }
        return [
            (p if originals[p].numel() == self.size else None, originals[p].detach(), after)
            for p, after in copies.items()
        ]


def _same(before: Tensor, after: Tensor) -> bool:
    return torch.equal(before.nan_to_num(), after.nan_to_num())


def _has_nan(values: Tensor) -> bool:
    return values.is_floating_point() and bool(values.isnan().any())
