"""What is accepted: settings and parameter groups. Errors name the thing, what was expected, and what came."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .tensors import describe, layout, shown

GROUP_DEFAULTS = {"rho": 0.05, "adaptive": False, "eta": 0.01}
"""What a parameter group has beside the base optimizer's own settings."""


class Keys(NamedTuple):
    """Under which keys a parameter group has its rho, adaptive and eta: ``ascent_rho`` and so on, where the base
    optimizer has a setting of that name itself (rho of Adadelta, eta of LARS).
    """

    rho: str = "rho"
    adaptive: str = "adaptive"
    eta: str = "eta"

    @classmethod
    def of(cls, base: Optimizer) -> Keys:
        """Those of the groups of a base optimizer."""
        return cls(*(key if name in base.defaults else name for name, key in zip(cls._fields, ASCENT, strict=True)))

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What is given by the names of the fields, by these keys."""
        return {getattr(self, name): value for name, value in values.items()}


ASCENT = Keys("ascent_rho", "ascent_adaptive", "ascent_eta")
OLD_NAMES = ("grad_scale", "running_stats_at_slow")
"""Of arguments that are still taken."""


class Settings(NamedTuple):
    """What one outer step is run with: arguments of ``Lookbehind``, which may be set between two steps."""

    k: int
    alpha: float | str
    alpha_scope: str
    rho_scope: str
    max_grad_norm: float | None
    nonfinite: str
    microbatches: int
    ascent_gradient: str
    reuse_gradient: bool
    same_randomness: bool = False
    ascents: str = "synced"
    ascent_fraction: float = 1.0

    @property
    def skips(self) -> bool:
        """Whether an evaluation with a non-finite gradient moves nothing."""
        return self.nonfinite == "skip"

    @property
    def descents_need_norms(self) -> bool:
        """Whether a descent clips or skips."""
        return self.max_grad_norm is not None or self.skips

    @property
    def ascents_in_rho(self) -> int:
        """How many ascents share the radius rho."""
        return self.k if self.rho_scope == "total" else 1

    @property
    def static_alpha(self) -> float:
        """The slow step size where it is not adaptive."""
        return 1.0 if isinstance(self.alpha, str) else float(self.alpha)


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
    same_randomness: bool,
    ascents: str,
    ascent_fraction: float,
) -> None:
    """Refuse what ``Settings`` cannot be made of.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_int("k", k, 1)
    if alpha != "adaptive" and (isinstance(alpha, str) or not (is_number(alpha) and 0 < alpha <= 1)):
        raise wrong("alpha", 'a number in (0, 1] or "adaptive"', alpha, (numbers.Real, str))
    check_choice("alpha_scope", alpha_scope, "global", "tensor")
    check_choice("rho_scope", rho_scope, "step", "total")
    if max_grad_norm is not None and not (is_number(max_grad_norm) and 0 < max_grad_norm < math.inf):
        raise wrong("max_grad_norm", "None or a finite number > 0", max_grad_norm, (numbers.Real,))
    check_choice("nonfinite", nonfinite, "propagate", "skip")
    check_int("microbatches", microbatches, 1)
    check_choice("ascent_gradient", ascent_gradient, "current", "previous")
    check_bool("reuse_gradient", reuse_gradient)
    check_bool("same_randomness", same_randomness)
    check_choice("ascents", ascents, "synced", "local")
    if (ascents, ascent_gradient) == ("local", "previous"):
        raise ValueError("ascents: expected 'synced' with ascent_gradient='previous', got 'local'")
    check_fraction("ascent_fraction", ascent_fraction)
    if ascent_fraction != 1:
        for name, value, usual in (("microbatches", microbatches, 1), ("ascent_gradient", ascent_gradient, "current")):
            if value != usual:
                raise ValueError(
                    f"ascent_fraction: expected 1.0 with {name}={value!r}, which says itself what ascents follow, got "
                    f"{ascent_fraction!r}"
                )
    if ascent_gradient == "previous" and (microbatches > 1 or not reuse_gradient):
        raise ValueError(
            "ascent_gradient: expected 'current' with microbatches or reuse_gradient=False, which evaluate gradients "
            "for the ascent, got 'previous'"
        )


def check_loss_scale(value: Any) -> None:
    """Refuse anything but a finite number > 0 and a floating tensor of one element, whose value is not read."""
    expected = "a finite number > 0 or a floating tensor of one element"
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"loss_scale: expected {expected}, got {describe(*layout(value)[:3])}")
    elif not (is_number(value) and 0 < value < math.inf):
        raise wrong("loss_scale", expected, value, (numbers.Real,))


def check_group(group: Mapping[str, Any], where: str = "", keys: Keys = Keys()) -> None:  # noqa: B008  immutable
    """Refuse a group's rho, eta or adaptive; ``where`` says whose, if not the constructor's.

    In a parameter group ``adaptive`` may also be a list of bools, one for each of its parameters.
    """
    for name in (keys.rho, keys.eta):
        check_number(f"{where}[{name!r}]" if where else name, group[name])
    adaptive, name = group[keys.adaptive], f"{where}[{keys.adaptive!r}]" if where else keys.adaptive
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


def adaptive_by_tensor(group: dict[str, Any], keys: Keys) -> list[bool]:
    """For each parameter of a group, whether its ascent is scaled."""
    adaptive = group[keys.adaptive]
    return adaptive if isinstance(adaptive, list) else [adaptive] * len(group["params"])


def check_fraction(name: str, value: Any) -> None:
    """Refuse anything but a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise wrong(name, "a number in (0, 1]", value, (numbers.Real,))


def check_bool(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Refuse anything but one of the choices."""
    if value not in choices:
        raise wrong(name, " or ".join(f'"{choice}"' for choice in choices), value, (str,))


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
    return error(f"{name}: expected {expected}, got {shown(value)}")


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
        raise TypeError(f"module: expected a torch.nn.Module, got {shown(module)}")
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


# ---- what an optimizer is made of ------------------------------------------------------------------------------------


def check_closure(closure: Any) -> None:
    """Refuse anything but a function and None.

    Raises:
        TypeError: naming the argument.
    """
    if closure is not None and not callable(closure):
        raise TypeError(f"closure: expected a function that runs forward and backward, or None, got {shown(closure)}")


def check_takes_evaluation(closure: Callable[..., Any], microbatches: int, ascent_fraction: float) -> None:
    """Refuse a closure that cannot be told which part of the minibatch it is to see.

    Raises:
        TypeError: it takes no argument.
    """
    try:
        inspect.signature(closure).bind(None)
    except TypeError:
        name, value = ("microbatches", microbatches) if microbatches != 1 else ("ascent_fraction", ascent_fraction)
        raise TypeError(
            f"closure: expected a function of the Evaluation, since {name} is {value!r}: "
            f"evaluation.part(batch) is what it is to see; got {shown(closure)}, which does not take it"
        ) from None
    except ValueError:  # a builtin, of which nothing is known
        return


def check_stats(model: nn.Module | None, ascent_gradient: str) -> None:
    """Refuse to keep buffers at the slow weights where nothing is evaluated there.

    Raises:
        ValueError: naming the argument.
    """
    if model is not None and ascent_gradient == "previous":
        raise ValueError(
            "buffers_at_slow: expected None with ascent_gradient='previous', which evaluates nothing at the slow "
            f"weights, got {type(model).__name__}"
        )


def build_base(
    method: type[Optimizer], params: ParamsT | None, base_optimizer: Any, base_kwargs: dict[str, Any]
) -> Optimizer:
    """The base optimizer of a method: an instance as it is, or one of the class.

    Raises:
        TypeError, ValueError: naming the argument that is not acceptable.
    """
    if isinstance(base_optimizer, Optimizer):
        refuse_unknown(base_kwargs, method, base_optimizer)
        base = _given_base(params, base_optimizer, base_kwargs)
    elif isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer) and base_optimizer is not Optimizer:
        refuse_unknown(base_kwargs, method, base_optimizer)
        base = base_optimizer(_some(params), **base_kwargs)
    else:
        raise TypeError(
            f"base_optimizer: expected a torch optimizer class or instance, such as {_likely(base_optimizer)}, got "
            f"{shown(base_optimizer)}"
        )
    name = type(base).__name__
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if hasattr(base, "base_optimizer") or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ValueError(
            f"base_optimizer: expected one whose step() needs no closure, such as torch.optim.SGD, got {name}"
        )
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(f"base_optimizer: expected differentiable=False, got {name} with differentiable=True")
    return base


def own_by_key(keys: Keys, given: dict[str, Any], by_key: dict[str, Any], base: str) -> dict[str, Any]:
    """What was given of rho, adaptive and eta, by its key in groups.

    Args:
        given: by name. by_key: by a key that begins with ``ascent_``. base: the name of the base's class.

    Raises:
        TypeError: one is given by a name that means something else for this base, or nothing.
    """
    for name, value in given.items():
        key = getattr(keys, name)
        if key != name:
            raise TypeError(
                f"{name}: expected {key} for what Lookbehind calls {name}, since {base} has a setting {name} of its "
                f"own, got {value!r}; that one is given to {base} itself: Lookbehind(None, {base}(params, {name}=...), "
                f"{key}=...)"
            )
    for key, value in by_key.items():
        if key not in keys:
            name = key.removeprefix("ascent_")
            raise TypeError(f"{key}: expected {name}, since {base} has no setting {name} of its own, got {value!r}")
    return {**given, **by_key}


def _given_base(params: ParamsT | None, base: Optimizer, base_kwargs: dict[str, Any]) -> Optimizer:
    if base_kwargs:
        (name, value), kind = next(iter(base_kwargs.items())), type(base).__name__
        raise TypeError(
            f"{name}: expected only with a class as base_optimizer, got {shown(value)} with an instance of {kind}; "
            f"give it to {kind} itself"
        )
    if params is not None:
        given = [p for group in Optimizer(params, {}).param_groups for p in group["params"]]
        held = [p for group in base.param_groups for p in group["params"]]
        if [id(p) for p in given] != [id(p) for p in held]:
            raise ValueError(
                f"params: expected None or the {len(held)} parameters of the given base_optimizer, got {len(given)} "
                "others"
            )
    return base


def _some(params: Any) -> Any:
    """Parameters to build an optimizer of."""
    expected = "params: expected parameters, such as model.parameters(), got"
    if isinstance(params, Tensor):
        raise TypeError(f"{expected} {shown(params)}; put it into a list")
    if not isinstance(params, Iterable) or isinstance(params, nn.Module):  # Sequential can be gone through
        raise TypeError(f"{expected} {shown(params)}" + ("; call it" if inspect.ismethod(params) else ""))
    if isinstance(params, Iterator):
        params = list(params)
        if not params:
            raise ValueError(
                "params: expected at least one parameter, got an iterator without any; model.parameters() can be gone "
                "through once, so call it for each optimizer"
            )
    return params


def _likely(base_optimizer: Any) -> str:
    """The class that was meant by its name, or any."""
    found: list[str] = []
    if isinstance(base_optimizer, str):
        classes = {name.lower(): name for name, x in vars(torch.optim).items() if isinstance(x, type)}
        found = [classes[name] for name in difflib.get_close_matches(base_optimizer.lower(), classes, 1)]
    return f"torch.optim.{found[0] if found else 'SGD'}"


def refuse_unknown(given: Mapping[str, Any], *takers: Any) -> None:
    """Refuse arguments that none of some classes takes, given by themselves or by an instance; None is left out.

    Raises:
        TypeError: naming the first of them, and what may have been meant.
    """
    kinds = [taker if isinstance(taker, type) else type(taker) for taker in takers if taker is not None]
    of_each = [arguments_of(kind) for kind in kinds]
    if None in of_each:  # it takes anything
        return
    names = sorted({name for of_one in of_each for name in of_one or ()})
    for name, value in given.items():
        if name not in names:
            meant = difflib.get_close_matches(name, names, 1)
            raise TypeError(
                f"{name}: neither {' nor '.join(kind.__name__ for kind in kinds)} takes such an argument, got "
                f"{shown(value)}" + (f"; did you mean {meant[0]!r}?" if meant else "")
            )


def arguments_of(taker: type) -> set[str] | None:
    """The names of what the constructor of a class takes by keyword; None for a class of somebody else's that takes
    whatever it is given. Classes of ours hand on what they do not take to the class above, or to what they have
    ``INSIDE``; not what they have ``FIXED``.
    """
    ours = any(one.__module__.startswith(f"{__package__}.") for one in taker.__mro__)
    names = {*ASCENT, *OLD_NAMES} if ours else set[str]()
    for one in (*taker.__mro__, *getattr(taker, "INSIDE", object).__mro__):
        if one in (object, Optimizer) or "__init__" not in vars(one):
            continue
        parameters = inspect.signature(vars(one)["__init__"]).parameters.values()
        names.update(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
        if not ours:
            return None
    return names - {"self", *getattr(taker, "FIXED", ())}
