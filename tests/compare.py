"""What is compared with what, for tests and for checks that run where there is nothing but PyTorch."""

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def assert_equal(what: str, actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, same values to the last bit; NaN equals NaN."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {actual.numel()} differ\n{actual}\n{expected}"


def dense(values: Tensor, order: tuple[int, ...] | None = None, offset: int = 0) -> Tensor:
    """A copy of ``values`` with its dimensions in memory in the given order (outermost first), ``offset`` elements into
    a buffer that holds NaN elsewhere. ``order`` None: contiguous."""
    order = tuple(range(values.ndim)) if order is None else order
    strides, step = [0] * values.ndim, 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(values.shape[dim], 1)
    buffer = torch.full((offset + values.numel() + 3,), float("nan"), dtype=values.dtype)
    return buffer.as_strided(values.shape, strides, offset).copy_(values)


def scaled_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max(1, max |expected|); inf where it is not a number."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    found = (actual - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    return found if found < float("inf") else float("inf")
