"""What an optimizer holds, what it allocates on the way, and what its passes read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "lookbehind_fused"


def held(owner: Any, without: Iterable[Tensor] = ()) -> int:
    """Bytes of all tensor storages that can be reached from ``owner``, each counted once, but those of ``without``."""
    known = {t.untyped_storage().data_ptr() for t in without}
    total, seen, queue = 0, set(), [owner]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (type, FunctionType, ModuleType, str, bytes)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total += storage.nbytes()
        elif isinstance(thing, dict):
            queue += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            queue += thing
        elif hasattr(thing, "__dict__"):
            queue.append(vars(thing))
    return total


def peak(action: Callable[[], Any]) -> int:
    """The most bytes that tensors allocated during ``action`` occupy at one time, by torch's own count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = action()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    del kept
    return highest


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
