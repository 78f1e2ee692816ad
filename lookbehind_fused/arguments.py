"""What is accepted: settings, parameter groups, parameters. Errors name the thing, what was expected, and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Settings(NamedTuple):
    """What one outer step is run with: the arguments of ``Lookbehind``, and what is the same in all of its evaluations
    (``evaluations.StepPlan``).
    """

    k: int
    alpha: float | str
    alpha_scope: str
    rho_scope: str
    max_grad_norm: float | None
    nonfinite: str
    microbatches: int
    ascent_gradient: str
    reuse_gradient: bool
    descents: int
    means: tuple[str, ...]
    gathered: int

    @property
    def skips(self) -> bool:
        """Whether an evaluation with a non-finite gradient moves nothing."""
        return self.nonfinite == "skip"

    @property
    def descents_need_norms(self) -> bool:
        return self.max_grad_norm is not None or self.skips

    @property
    def aligns(self) -> bool:
        """Whether alpha is found from fast_1 and fast_k. With one descent they are the same, so alpha* = 1."""
        return self.alpha == "adaptive" and self.descents > 1

    @property
    def ascents_in_rho(self) -> int:
        """How many ascents share the radius rho."""
        return self.k if self.rho_scope == "total" else 1

    @property
    def static_alpha(self) -> float:
        return 1.0 if isinstance(self.alpha, str) else float(self.alpha)


GIVEN = Settings._fields[: Settings._fields.index("descents")]
"""Those of ``Settings`` that are arguments, and attributes that may be set between two steps."""
given_settings = attrgetter(*GIVEN)


def check_settings(
    k: int,
    alpha: float | str,
    alpha_scope: str,
    rho_scope: str,
    max_grad_norm: float | None,
    nonfinite: str,
    microbatches: int,
    ascent_gradient: str,
    reuse_gradient: bool,
) -> None:
    """Refuse what ``Settings`` cannot be made of.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_int("k", k, 1)
    if alpha != "adaptive" and not (is_number(alpha) and 0 < alpha <= 1):
        raise wrong("alpha", 'a number in (0, 1] or "adaptive"', alpha, (numbers.Real, str))
    _check_choice("alpha_scope", alpha_scope, "global", "tensor")
    _check_choice("rho_scope", rho_scope, "step", "total")
    if max_grad_norm is not None and not (is_number(max_grad_norm) and 0 < max_grad_norm < math.inf):
        raise wrong("max_grad_norm", "None or a finite number > 0", max_grad_norm, (numbers.Real,))
    _check_choice("nonfinite", nonfinite, "propagate", "skip")
    check_int("microbatches", microbatches, 1)
    _check_choice("ascent_gradient", ascent_gradient, "current", "previous")
    check_bool("reuse_gradient", reuse_gradient)
    if ascent_gradient == "previous" and (microbatches > 1 or not reuse_gradient):
        raise ValueError(
            "ascent_gradient: expected 'current' with microbatches or reuse_gradient=False, which evaluate gradients "
            "for the ascent, got 'previous'"
        )


def _check_choice(name: str, value: Any, *choices: str) -> None:
    if value not in choices:
        raise wrong(name, " or ".join(f'"{choice}"' for choice in choices), value, (str,))


def check_grad_scale(value: Any) -> None:
    """Refuse anything but a finite number > 0 and a floating tensor of one element, whose value is not read."""
    expected = "a finite number > 0 or a floating tensor of one element"
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"grad_scale: expected {expected}, got {describe(*layout(value)[:3])}")
    elif not (is_number(value) and 0 < value < math.inf):
        raise wrong("grad_scale", expected, value, (numbers.Real,))


def check_group(group: dict[str, Any], where: str = "") -> None:
    """Refuse a group's rho, eta or adaptive; ``where`` says whose, if not the constructor's.

    In a parameter group ``adaptive`` may also be a list of bools, one for each of its parameters.
    """
    for name in ("rho", "eta"):
        check_number(f"{where}[{name!r}]" if where else name, group[name])
    adaptive, name = group["adaptive"], f"{where}['adaptive']" if where else "adaptive"
    if not isinstance(adaptive, list) or "params" not in group:
        check_bool(name, adaptive)
        return
    if len(adaptive) != len(group["params"]):
        raise ValueError(
            f"{name}: expected True, False or a list of {len(group['params'])} bools, one for each parameter of the "
            f"group, got a list of {len(adaptive)}"
        )
    for index, value in enumerate(adaptive):
        check_bool(f"{name}[{index}]", value)


def adaptive_by_tensor(group: dict[str, Any]) -> list[bool]:
    """For each parameter of a group, whether its ascent is scaled."""
    adaptive = group["adaptive"]
    return adaptive if isinstance(adaptive, list) else [adaptive] * len(group["params"])


def check_fraction(name: str, value: Any) -> None:
    """Refuse anything but a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise wrong(name, "a number in (0, 1]", value, (numbers.Real,))


def check_bool(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_int(name: str, value: Any, least: int) -> None:
    """Refuse anything but an int >= ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise wrong(name, f"an int >= {least}", value, (int,))


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuse anything but a finite number >= 0, or > 0 where it has to be ``positive``."""
    if not (is_number(value) and 0 <= value < math.inf) or (positive and value == 0):
        raise wrong(name, f"a finite number {'>' if positive else '>='} 0", value, (numbers.Real,))


def check_numbers(name: str, values: Any, *, positive: bool = False) -> None:
    """Refuse anything but a non-empty sequence of what ``check_number`` accepts."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        sign = ">" if positive else ">="
        raise wrong(name, f"a non-empty sequence of finite numbers {sign} 0", values, (list, tuple))
    for i, value in enumerate(values):
        check_number(f"{name}[{i}]", value, positive=positive)


def is_number(value: Any) -> bool:
    """Whether it is a real number, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def wrong(name: str, expected: str, value: Any, types: tuple[type, ...]) -> Exception:
    """The error for an unacceptable value: ValueError where its type could have been right, else TypeError."""
    error = ValueError if isinstance(value, types) and not isinstance(value, bool) else TypeError
    return error(f"{name}: expected {expected}, got {value!r}")


# ---- parameter groups ------------------------------------------------------------------------------------------------


def weight_scaling(module: torch.nn.Module, **settings: Any) -> dict[str, Any]:
    """All parameters of a module as one parameter group, in which ASAM scales the tensors whose name contains "weight".

    So do the authors of Lookbehind-SAM: biases ascend without the scaling T. Example::

        optimizer = ASAM([weight_scaling(model)], torch.optim.SGD, lr=0.1)

    Args:
        module: its ``named_parameters()`` give tensors and names.
        **settings: further settings of the group, such as ``lr`` or ``rho``.

    Returns:
        ``{"params": [...], "adaptive": [...], **settings}``: one bool for each parameter.

    Raises:
        TypeError: it is not a module, or the settings hold ``params`` or ``adaptive``.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {module!r}")
    for name in ("params", "adaptive"):
        if name in settings:
            raise TypeError(
                f"{name}: expected no such setting, since it follows from the module, got {settings[name]!r}"
            )
    scaled = weights_of(module)
    params = list(module.parameters())
    return {"params": params, "adaptive": [p in scaled for p in params], **settings}


def weights_of(module: torch.nn.Module) -> set[Tensor]:
    """The parameters whose name in the module contains "weight"."""
    return {p for name, p in module.named_parameters() if "weight" in name}


# ---- parameters ------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"{name}: expected {reason}, got {describe(*layout(p)[:3])}, strides {_strides(p)}")
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


def memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The strides of all dimensions of more than one element; None if the elements do not fill the memory once."""
    sizes_and_strides = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(sizes_and_strides):
        if stride != expected and x.numel():
            return None
        expected *= size
    return tuple(stride for stride, _ in sizes_and_strides)


def _is_dense(x: Tensor) -> bool:
    return memory_order(x) is not None


def layout(p: Tensor) -> tuple:
    """Shape, dtype, device and strides of a tensor."""
    return p.shape, p.dtype, p.device, p.stride() if p.layout == torch.strided else ()


def _strides(p: Tensor) -> tuple[int, ...] | str:
    return p.stride() if p.layout == torch.strided else "none"


def describe(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    """A tensor in words."""
    return f"shape {tuple(shape)}, {str(dtype).removeprefix('torch.')}, {device}"


def name_of(index: int, name: str | None, p: Tensor) -> str:
    """What a tensor is called in messages: its index in the optimizer, its name if known, shape and dtype."""
    known = f" {name!r}" if name else ""
    if torch.nn.parameter.is_lazy(p):
        return f"parameter {index}{known}"
    return f"parameter {index}{known} (shape {tuple(p.shape)}, {str(p.dtype).removeprefix('torch.')})"
