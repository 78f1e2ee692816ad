"""Saving and loading: ``state_dict``, ``load_state_dict``, copies and pickles.

Settings stand in the parameter groups of a state dict, since that is what distributed checkpoints keep of it; tensors
of this library's own in an entry of their own, never in the base optimizer's state.
"""

from __future__ import annotations

from copy import copy, deepcopy
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .arguments import Keys, Settings, check_group, check_settings
from .rules import NO_RULE, rule_of
from .shards import is_sharded, placed_like
from .tensors import ROUNDED, params_and_names, shown, tensors_of
from .wrappers import Wrappable

OWN = "lookbehind"
"""Under which a state dict, and each of its groups, has what the base optimizer does not know."""


class Saved(Wrappable):
    """What ``Lookbehind`` is as something to be saved.

    Attributes:
        SETTINGS: the names of the settings that a program is made of; a method of the family may have more.
        FIXED: of these, what makes the method what it is.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = Settings._fields
    FIXED: ClassVar[tuple[str, ...]] = ()
    base_optimizer: Optimizer
    k: int
    alpha: float | str
    alpha_scope: str
    rho_scope: str
    max_grad_norm: float | None
    nonfinite: str
    microbatches: int
    ascent_gradient: str
    reuse_gradient: bool
    same_randomness: bool
    ascents: str
    ascent_fraction: float
    loss_scale: float | Tensor
    buffers_at_slow: nn.Module | None
    model: nn.Module | None
    backend: str
    _scaler: GradScaler | None
    _previous: Any

    def require_closed(self, what: str) -> None:
        """Refuse to do ``what`` while a step is open."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The settings as they are now, by name."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse what a program cannot be made of.

        Raises:
            TypeError, ValueError: naming the setting, what was expected and what came.
        """
        check_settings(**{name: settings[name] for name in Settings._fields})

    def state_dict(self) -> dict[str, Any]:
        """What the base optimizer's ``state_dict()`` is; under ``"lookbehind"`` what it belongs to, and in every group
        the settings.

        Raises:
            RuntimeError: an outer step is open, so that the weights are perturbed.
        """
        self.require_closed("state_dict()")
        state_dict, keys = super().state_dict(), Keys.of(self.base_optimizer)
        for group in state_dict["param_groups"]:
            group[keys.adaptive] = copy(group[keys.adaptive])  # a list may be changed in place
            group[OWN] = self.settings()
        params = tensors_of(self.param_groups)
        own: dict[str, Any] = {
            "base_optimizer": type(self.base_optimizer).__name__,
            "shapes": [list(p.shape) for p in params],
        }
        if self._previous.kept:
            kept = [self._previous.kept.get(p) for p in params]
            own["previous"] = [None if g is None else g.clone() for g in kept]
        return {**state_dict, OWN: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, settings included, or a state dict of the base optimizer alone: then the
        settings, rho, adaptive and eta stay as they are.

        Raises:
            RuntimeError: an outer step is open.
            TypeError, ValueError: it is of another model or base optimizer, or a setting is not acceptable; nothing is
                changed.
        """
        self.require_closed("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise ValueError(
                f"state_dict: expected a dict as state_dict() returns, got {shown(state_dict)}; torch.load gives what "
                "a file has"
            )
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        settings = self._check_loadable(state_dict)
        groups = [{k: v for k, v in group.items() if k != OWN} for group in state_dict["param_groups"]]
        self.base_optimizer.load_state_dict({"state": state_dict["state"], "param_groups": groups})
        for name, value in settings.items():
            setattr(self, name, value)
        params = tensors_of(self.param_groups)
        previous = state_dict.get(OWN, {}).get("previous", [None] * len(params))
        pairs = [(p, g) for p, g in zip(params, previous, strict=True) if g is not None]
        self._previous.kept = {p: placed_like(g.detach().to(p.device, p.dtype, copy=True), p) for p, g in pairs}
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_loadable(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Refuse what cannot be loaded; the settings that it brings."""
        for key, kind in (("state", dict), ("param_groups", list), (OWN, dict)):
            value = state_dict.get(key, {} if key == OWN else None)
            if not isinstance(value, kind):
                raise ValueError(f"state_dict: expected a {kind.__name__} under {key!r}, got {shown(value)}")
        params, names = params_and_names(self.param_groups)
        saved, groups = state_dict.get(OWN, {}), state_dict["param_groups"]
        base = type(self.base_optimizer).__name__
        if saved.get("base_optimizer", base) != base:
            raise ValueError(f"state_dict: expected base_optimizer {base!r}, got {saved['base_optimizer']!r}")
        sizes, saved_sizes = ([len(group["params"]) for group in of_one] for of_one in (self.param_groups, groups))
        if saved_sizes != sizes:
            raise ValueError(f"state_dict: expected groups of {sizes} parameters, got {saved_sizes}")
        for name, p, shape in zip(names, params, saved.get("shapes", [p.shape for p in params]), strict=True):
            if tuple(shape) != tuple(p.shape):
                raise ValueError(f"state_dict: {name}: expected shape {tuple(p.shape)}, got {tuple(shape)}")
        previous = saved.get("previous", [None] * len(params))
        found, shapes = [None if g is None else tuple(g.shape) for g in previous], [tuple(p.shape) for p in params]
        if len(found) != len(shapes) or any(f not in (None, s) for f, s in zip(found, shapes, strict=True)):
            raise ValueError(f"state_dict: expected previous gradients of shapes {shapes}, got {found}")
        for number, group in enumerate(groups):
            where = f"state_dict: param_groups[{number}]"
            check_group({**self.param_groups[number], **group}, where, Keys.of(self.base_optimizer))
        self._check_loadable_state(state_dict, params, names)
        brought = next((group[OWN] for group in groups if OWN in group), {k: saved[k] for k in ("k",) if k in saved})
        settings = {name: value for name, value in brought.items() if name in self.SETTINGS}
        for name in self.FIXED:
            if settings.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(
                    f"state_dict: expected {name} {getattr(self, name)!r} for {type(self).__name__}, got "
                    f"{settings[name]!r}"
                )
        self.check_settings({**self.settings(), **settings})
        return settings

    def _check_loadable_state(self, state_dict: dict[str, Any], params: list[Tensor], names: list[str]) -> None:
        rule = rule_of(self.base_optimizer)
        if rule is NO_RULE:
            return
        ids = [(group, saved_id) for group in state_dict["param_groups"] for saved_id in group["params"]]
        for (group, saved_id), p, name in zip(ids, params, names, strict=True):
            try:
                rule.numbers(group)
                wanted = rule.state(group)
            except KeyError as missing:
                base = type(self.base_optimizer).__name__
                raise ValueError(
                    f"state_dict: expected param_groups of {base} with {missing}, got {sorted(group)}"
                ) from None
            entry = state_dict["state"].get(saved_id) or {}
            for key in wanted if entry else ():
                shape = tuple(entry[key].shape) if isinstance(entry.get(key), Tensor) else None
                if shape != tuple(p.shape) and not (key in entry and entry[key] is None):
                    came = f"shape {shape}" if shape is not None else f"the entries {sorted(entry)}"
                    raise ValueError(f"state_dict: {name}: expected {key!r} of shape {tuple(p.shape)}, got {came}")

    # ---- copies and pickles ----

    def __getstate__(self) -> dict[str, Any]:
        self.require_closed("copying or pickling the optimizer")
        kept = (
            "base_optimizer",
            "defaults",
            *self.SETTINGS,
            "loss_scale",
            "_scaler",
            "buffers_at_slow",
            "model",
            "backend",
        )
        return {**{name: getattr(self, name) for name in kept}, "previous": self._previous.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" not in state:  # as torch's load_state_dict gives it to an optimizer: state, param_groups
            self.require_closed("__setstate__()")
            self.base_optimizer.__setstate__(state)
            return
        elsewhere = ("previous", "model")  # of parts of the optimizer
        super().__setstate__({name: value for name, value in state.items() if name not in elsewhere})
        keep_when_loading(self.base_optimizer)


# ---- what ``base.load_state_dict`` is to keep ------------------------------------------------------------------------


def keep_when_loading(base: Optimizer) -> None:
    """Let ``base.load_state_dict`` keep three things that torch would not, and place state as sharded parameters are.

    The float32 state of bf16 and fp16 parameters, which torch casts to the parameter's dtype; rho, adaptive and eta of
    each group when the loaded groups, written by a plain torch optimizer, do not have them; and the dict that is given,
    whose tensors torch would take over, so that the next step would write into them.
    """
    if not any(hook is _before_loading for hook in base._optimizer_load_state_dict_pre_hooks.values()):
        base.register_load_state_dict_pre_hook(_before_loading)
        base.register_load_state_dict_post_hook(_after_loading)


def _before_loading(base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state_dict = {**state_dict, "state": deepcopy(state_dict["state"])}
    base._lookbehind_loading = state_dict, [dict(group) for group in base.param_groups]  # type: ignore[attr-defined]
    return state_dict


def _after_loading(base: Optimizer) -> None:
    loading = base.__dict__.pop("_lookbehind_loading", None)
    if loading is None:
        return
    state_dict, groups = loading
    for group, before in zip(base.param_groups, groups, strict=True):
        for key in Keys.of(base):
            if key in before:
                group.setdefault(key, before[key])
    saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for saved_id, p in zip(saved_ids, tensors_of(base.param_groups), strict=True):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            was_cast = isinstance(value, Tensor) and value.dtype != base.state[p][key].dtype
            if was_cast and p.dtype in ROUNDED:
                base.state[p][key] = value.detach().to(p.device)
            if is_sharded(p) and isinstance(value, Tensor) and value.dim() and value.shape == p.shape:
                base.state[p][key] = placed_like(base.state[p][key], p)
