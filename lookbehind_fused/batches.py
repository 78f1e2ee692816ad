"""Minibatches as loaders give them: tensors, and tuples, lists and mappings of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy
from typing import Any, TypeVar

from torch.nn.utils.rnn import PackedSequence

from .tensors import shown

Batch = TypeVar("Batch")
PLAIN = (str, bytes, int, float, complex, type(None))


def examples_in(batch: Any) -> int:
    """How many examples a minibatch has: the length of its tensors along their first dimension.

    Raises:
        TypeError: something in it is neither a tensor nor a collection nor a plain value.
        ValueError: it has no tensor, or not all of one length.
    """
    lengths = sorted({*_lengths(batch)})
    if not lengths:
        raise ValueError(f"batch: expected a tensor with the examples along its first dimension, got {shown(batch)}")
    if len(lengths) > 1:
        raise ValueError(
            "batch: expected as many examples along the first dimension of everything in it, got "
            f"{' and '.join(map(str, lengths))}; give evaluation.part() what has an entry for each example alone"
        )
    return lengths[0]


def examples_from(batch: Batch, which: slice) -> Batch:
    """Some of its examples, in collections of the same kinds."""
    found: Any = batch
    if _is_array(batch) or _is_column(batch):
        found = batch[which]  # type: ignore[index]
    elif isinstance(batch, Mapping):
        found = copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for name, entry in batch.items():
            found[name] = examples_from(entry, which)
    elif isinstance(batch, (tuple, list)):
        entries = [examples_from(entry, which) for entry in batch]
        named = hasattr(batch, "_fields")
        found = type(batch)(*entries) if named else type(batch)(entries)
    return found  # type: ignore[no-any-return]


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, PackedSequence):
        raise TypeError("batch: expected tensors with the examples along the first dimension, got a PackedSequence")
    if _is_array(batch) or _is_column(batch):
        yield len(batch)
    elif isinstance(batch, Mapping):
        for entry in batch.values():
            yield from _lengths(entry)
    elif isinstance(batch, (tuple, list)):
        for entry in batch:
            yield from _lengths(entry)
    elif not isinstance(batch, PLAIN) and not hasattr(batch, "shape"):
        raise TypeError(f"batch: expected tensors, and tuples, lists or mappings of them, got {shown(batch)}")


def _is_array(batch: Any) -> bool:
    """A tensor or what is like one; those without a dimension are the same for all examples."""
    return len(getattr(batch, "shape", ())) > 0


def _is_column(batch: Any) -> bool:
    """A plain value for each example, as texts are given."""
    return isinstance(batch, (tuple, list)) and bool(batch) and all(isinstance(entry, PLAIN) for entry in batch)
