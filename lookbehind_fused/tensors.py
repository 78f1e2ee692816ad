"""The gate where parameters and gradients become plain memory: what is accepted, its layout, its name in messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import ismethod
from itertools import chain, pairwise
from operator import gt, itemgetter, mul
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import shards
from .shards import shard

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LONGEST = 200  # characters of a value in a message
ROUNDED = (torch.bfloat16, torch.float16)
"""Dtypes of parameters that are the rounded image of what is computed in float32."""


Layout = tuple[torch.Size, torch.dtype, torch.device, tuple[int, ...]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which parameters of a dtype are computed, and their buffers are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weights_written() -> None:
    """To be called by whoever has written plain parameters and has no ``Elsewhere``, so that nobody sees those of
    before: autocast keeps its casts of them while it is open.
    """
    torch.clear_autocast_cache()


def trained(p: Tensor) -> bool:
    """Whether a step may move a tensor."""
    return p.requires_grad or p.grad is not None


def tensors_of(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """All parameters of an optimizer in the order of its groups."""
    return [*chain.from_iterable(map(itemgetter("params"), groups))]


def params_and_names(groups: Iterable[dict[str, Any]], before: int = 0) -> tuple[list[Tensor], list[str]]:
    """All parameters of groups in their order, and what each is called in messages; ``before``: how many parameters the
    optimizer has before these groups.
    """
    params: list[Tensor] = []
    names: list[str] = []
    for group in groups:
        known = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], known, strict=True):
            names.append(name_of(before + len(params), name, p))
            params.append(p)
    return params, names


def parameters_of(model: torch.nn.Module) -> list[Tensor]:
    """All parameters of a model on one process, each of a kind that the kernels can take.

    Raises:
        TypeError, ValueError: it is not a module, has no parameter, or one that ``check_parameters`` refuses, or a
            DTensor.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {shown(model)}")
    named = list(model.named_parameters())
    if not named:
        raise ValueError("model: expected a module with parameters, got one with none")
    params: list[Tensor] = [p for _, p in named]
    names = [name_of(i, name, p) for i, (name, p) in enumerate(named)]
    check_parameters(params, names)
    for p, name in zip(params, names, strict=True):
        if shards.is_sharded(p):
            raise ValueError(f"{name}: expected a plain tensor, got a DTensor; analyse the model on one process")
    return params


def check_parameters(params: Sequence[Tensor], names: Sequence[str]) -> None:
    """Refuse what the kernels cannot take.

    Raises:
        ValueError: a parameter is lazy, complex, sparse, on the meta device, a wrapper subclass other than DTensor, a
            DTensor that this rank has no defined part of, of a floating dtype other than float64, float32, bfloat16 and
            float16, not dense, or overlaps another one in memory.
    """
    for p, name in zip(params, names, strict=True):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"{name}: expected an initialized parameter, got {type(p).__name__}; run the model once first"
            )
        reason = _unsuitable(p)
        if reason:
            p = shard(p)
            raise ValueError(f"{name}: expected {reason}, got {describe(*layout(p)[:3])}, strides {_strides(p)}")
    _check_overlap(params, names)


def check_added(groups: Sequence[dict[str, Any]]) -> None:
    """As ``check_parameters``, for those of the last group, where those of the others have been accepted: Python goes
    through these only where there is an overlap, so that thousands of groups may be added one by one.
    """
    params = tensors_of(groups)
    check_parameters(*params_and_names(groups[-1:], len(params) - len(groups[-1]["params"])))
    params = shards.shards(params)
    sizes = map(mul, map(Tensor.numel, params), map(Tensor.element_size, params))
    spans = sorted(zip(map(Tensor.data_ptr, params), sizes, strict=True))
    if any(map(gt, map(sum, spans), map(itemgetter(0), spans[1:]))):  # or they are of two devices
        _check_overlap(*params_and_names(groups))


def _unsuitable(p: Tensor) -> str | None:
    """What was expected of a parameter that is not acceptable."""
    if p.is_meta:
        return "a tensor with memory, not on the meta device"
    reason = shards.unsuitable(p)
    if reason:
        return reason
    p = shard(p)
    if is_traceable_wrapper_subclass(p):
        return f"a plain tensor, not a {type(p).__name__}"
    if p.layout != torch.strided:
        return f"a dense tensor, not one of layout {p.layout}"
    if p.is_complex():
        return "a real tensor (torch.view_as_real makes one)"
    if p.is_floating_point() and p.dtype not in DTYPES:
        return "dtype " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    if memory_order(p) is None:
        return "a tensor whose elements fill its memory once, without gaps or overlap"
    return None


def _check_overlap(params: Sequence[Tensor], names: Sequence[str]) -> None:
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), i)
        for i, p in enumerate(shards.shards(params))
        if p.numel()
    )
    for (device, _, end, i), (next_device, start, _, j) in pairwise(spans):
        if device == next_device and start < end:
            first, second = sorted((i, j))
            same = "is the same tensor as" if params[i] is params[j] else "overlaps in memory with"
            raise ValueError(
                f"{names[second]} {same} {names[first]}: expected every parameter to have memory of its own"
                + ("; give each once" if params[i] is params[j] else "")
            )


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The strides of all dimensions of more than one element; None if the elements do not fill the memory once."""
    sizes_and_strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(sizes_and_strides):
        if stride != expected and x.numel():
            return None
        expected *= size
    return tuple(stride for stride, _ in sizes_and_strides)


def layout(p: Tensor) -> Layout:
    """Shape, dtype, device and strides of a tensor."""
    return p.shape, p.dtype, p.device, p.stride() if p.layout == torch.strided else ()


def _strides(p: Tensor) -> tuple[int, ...] | str:
    return p.stride() if p.layout == torch.strided else "none"


def shown(value: Any) -> str:
    """What came, in a message: on a line, however large it is."""
    if isinstance(value, Tensor):
        return f"a tensor of {describe(*layout(value)[:3])}"
    if isinstance(value, (torch.nn.Module, Optimizer)):
        return f"an instance of {type(value).__name__}"
    if ismethod(value):  # whose repr has that of its object
        return f"the method {value.__name__}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    """A tensor in words."""
    return f"shape {tuple(shape)}, {str(dtype).removeprefix('torch.')}, {device}"


def name_of(index: int, name: str | None, p: Tensor) -> str:
    """What a tensor is called in messages: its index in the optimizer, its name if known, shape and dtype."""
    known = f" {name!r}" if name else ""
    if torch.nn.parameter.is_lazy(p):
        return f"parameter {index}{known}"
    return f"parameter {index}{known} (shape {tuple(p.shape)}, {str(p.dtype).removeprefix('torch.')})"
