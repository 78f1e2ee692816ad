"""Lookahead (Zhang et al. 2019) over any torch optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from . import kernels
from .arguments import check_fraction, check_int, refuse_unknown
from .elsewhere import Elsewhere
from .open_step import Part
from .optimizer import Lookbehind
from .parts.slow_copies import SlowCopies, copies_of, copy_all, moves
from .report import size_of
from .shards import placed_like, shards, whole
from .tensors import (
    ROUNDED,
    check_parameters,
    params_and_names,
    shown,
    tensors_of,
)
from .wrappers import Wrappable

OWN = ("optimizer", "k", "alpha", "backend")
"""Settings of ``Lookahead``, which the optimizer inside may have too."""


class Lookahead(Wrappable):
    """Lookahead (Zhang et al. 2019, algorithm 1) over any torch optimizer: ``SGD``, ``SAM``, ``ASAM``, ...

    Every step is a step of that optimizer, on a new minibatch, which moves the fast weights: the parameters. Each k-th
    one is followed by ``slow = params = slow + alpha * (params - slow)``. What is to be evaluated and saved are the
    slow weights::

        optimizer = Lookahead(SAM(model.parameters(), torch.optim.SGD, lr=0.1), k=5, alpha=0.5)
        ...
        optimizer.step(closure)                  # whatever the optimizer's own step takes
        with optimizer.slow_weights():
            evaluate(model)

    A step that moves nothing since its gradients are not finite does not count. On GPUs with ``nonfinite="skip"`` of
    ``Lookbehind``, or a ``scaler``, steps are then counted on the device, without a wait, and every step reads and
    writes the slow weights; under a ``GradScaler`` with torch's ``fused`` optimizers each step waits for the device.

    Every other form of a step that ``Lookbehind`` and the methods of its family have (``evaluations()``,
    ``first_step()``, ...) is there too and counts. Other optimizers are to be stepped through this one. Attributes of
    a method of the family (``closure``, ``scaler``, ...) are read and set through it. A second ``Lookahead`` around the
    same optimizer takes the place of the first.

    Args:
        optimizer: a torch optimizer, or the class of one, which is built with ``params`` and ``kwargs``.
        k: inner steps, >= 1: how many steps of the optimizer between two of the slow weights.
        alpha: slow step size in (0, 1]. With ``k=1, alpha=1`` it is the optimizer itself.
        params: parameters for a class as ``optimizer``, else None.
        backend: of ``Lookbehind``; it computes the interpolation.
        **kwargs: arguments of a class as ``optimizer``.

    Extra memory: one copy of the parameters (float32 for those of 16 bits, and another one at each k-th step).

    Raises:
        TypeError: an argument has a type that cannot mean anything here.
        ValueError: an argument or a parameter is not acceptable; the message names it, what was expected and what came.
    """

    optimizer: Optimizer
    k: int
    alpha: float
    backend: str
    _tensors: list[Tensor]
    _copies: list[SlowCopies]
    _count: int | Tensor
    _backup: list[Tensor] | None

    @overload
    def __init__(
        self, optimizer: type[Optimizer], k: int = ..., alpha: float = ..., *,
        params: ParamsT, backend: str = ..., **kwargs: Any,
    ) -> None: ...  # fmt: skip

    @overload
    def __init__(
        self, optimizer: Optimizer, k: int = ..., alpha: float = ..., *, params: None = ..., backend: str = ...
    ) -> None: ...

    def __init__(
        self, optimizer: Optimizer | type[Optimizer], k: int = 5, alpha: float = 0.5, *,
        params: Any = None, backend: str = "auto", **kwargs: Any,
    ) -> None:  # fmt: skip
        check_int("k", k, 1)
        check_fraction("alpha", alpha)
        kernels.resolve(backend)
        refuse_unknown(kwargs, Lookahead, optimizer, kwargs.get("base_optimizer"))
        if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
            own: dict[str, Any] = {"backend": backend} if issubclass(optimizer, Lookbehind) else {}
            optimizer = optimizer(params, **own, **kwargs)
        elif params is not None or kwargs:
            name = next(iter(kwargs), "params")
            raise TypeError(f"{name}: expected only with a class as optimizer, got {shown(optimizer)}")
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Lookahead):
            raise TypeError(f"optimizer: expected a torch optimizer other than Lookahead, got {shown(optimizer)}")
        check_parameters(*params_and_names(optimizer.param_groups))
        self.__setstate__(
            {"optimizer": optimizer, "k": k, "alpha": alpha, "backend": backend, "inner_step": 0, "slow": None}
        )

    # ---- one optimizer with the one inside ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The optimizer's own state."""
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def __getattr__(self, name: str) -> Any:
        """What is not here, the optimizer may have."""
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inside = self.__dict__.get("optimizer")
        own = name in OWN or name[0] == "_" or hasattr(type(self), name)
        if isinstance(inside, Lookbehind) and not own and hasattr(inside, name):
            setattr(inside, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"Lookahead(k={self.k}, alpha={self.alpha}, {self.optimizer!r})"

    def memory(self) -> dict[str, int]:
        """Bytes of the slow weights, beside those of ``Lookbehind.memory()`` where that is inside."""
        inside = self.optimizer.memory() if isinstance(self.optimizer, Lookbehind) else {}
        own = sum(size_of(copies.slow) for copies in self._copies)
        return {**inside, "slow weights": own} if own else inside

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the slow weights are those of the parameters that there were.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "add_param_group(): expected the parameters that Lookahead was built with, got more; add them to the "
            "optimizer before, or build a new Lookahead"
        )

    # ---- steps ----

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the optimizer with its own arguments and result; the k-th moves the slow weights too.

        Raises:
            RuntimeError: parameters were added, removed or replaced since, or the slow weights are in their place.
        """
        if isinstance(self.optimizer, Lookbehind):  # every form of its steps has ``part()`` take part
            if "found_inf" in self.__dict__:
                self.optimizer.require_scaler(self)
            return self.optimizer.step(*args, **kwargs)
        # GradScaler leaves them on the optimizer that it is given.
        scaling: dict[str, Any] = {
            name: self.__dict__[name] for name in ("grad_scale", "found_inf") if name in self.__dict__
        }
        vars(self.optimizer).update(scaling)
        part = self.part()
        part.begin()
        try:
            result = self.optimizer.step(*args, **kwargs)
        finally:
            for name in scaling:
                vars(self.optimizer).pop(name, None)
        if not scaling.get("found_inf"):  # else it was skipped
            part.commit()
        return result

    @property
    def inner_step(self) -> int:
        """How many steps the slow weights have stayed where they are. Waits where they are counted on the device."""
        return int(self._count)

    def part(self) -> LookaheadPart:
        """What takes part in a step of the optimizer."""
        return LookaheadPart(self)

    def begin_step(self) -> None:
        """What precedes a step of the optimizer: the first of a round keeps the slow weights.

        Raises:
            RuntimeError: parameters were added, removed or replaced since, or given another layout within a round, or
                the slow weights are in their place.
            TypeError, ValueError: ``k`` or ``alpha`` has become what it cannot be.
        """
        check_int("k", self.k, 1)
        check_fraction("alpha", self.alpha)
        self._require_fast_weights("step()")
        self._require_same_parameters()
        unchanged = all([copies.are_of_now() for copies in self._copies])
        held = {id(p) for copies in self._copies for p in copies.params}
        held_all = unchanged and held.issuperset(id(p) for p in self._tensors if moves(p))
        if isinstance(self._count, Tensor) and held_all:
            for copies in self._copies:
                copies.keep(self._count == 0)
        elif self.inner_step == 0:
            if not held_all:
                self._copies = copies_of(self._tensors)
            for copies in self._copies:
                copies.keep()
        elif not unchanged:
            raise RuntimeError(
                f"a parameter was given another dtype, device or memory layout after {self.inner_step} of {self.k} "
                "inner steps: expected none, since the slow weights have those of before; change the model where "
                "inner_step is 0"
            )
        for copies in self._copies:
            copies.done.zero_()

    def end_step(self, count: int | Tensor, again: bool = False) -> None:
        """What follows a step of the optimizer, after which ``count`` steps of its round have happened: the k-th moves
        the slow weights. Where only the device knows how many, it decides. ``again``: an interrupt came in between.
        """
        pulls = count >= self.k
        if isinstance(count, Tensor) or pulls:
            for copies in self._copies:
                if not (again and copies.done[0]):
                    copies.interpolate(self.alpha, pulls)
            self._elsewhere.written()
        self._count = torch.where(pulls, 0, count) if isinstance(pulls, Tensor) else 0 if pulls else count
        self._opt_called = True  # LR schedulers look for it

    def _require_fast_weights(self, what: str) -> None:
        if self._backup is not None:
            raise RuntimeError(f"{what}: expected outside of slow_weights(), whose weights are not those being trained")

    def _require_same_parameters(self) -> None:
        now = tensors_of(self.param_groups)
        if [*map(id, now)] != [*map(id, self._tensors)]:
            raise RuntimeError(
                f"param_groups: expected the {len(self._tensors)} parameters that Lookahead was built with, got "
                f"{len(now)}, not all the same; build a new Lookahead"
            )

    def register_weights_hook(self, hook: Callable[[], Any]) -> RemovableHandle:
        """As that of ``Lookbehind``; of another optimizer inside only for what this one writes."""
        return self._elsewhere.register(hook)

    # ---- the slow weights ----

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Within the block the parameters are the slow weights, to be evaluated or saved; then what they were before,
        whatever happens.

        Raises:
            RuntimeError: it is entered a second time, a step is open, or parameters were added, removed or replaced.
        """
        self._require_fast_weights("slow_weights()")
        if isinstance(self.optimizer, Lookbehind):
            self.optimizer.require_closed("slow_weights()")
        self._require_same_parameters()
        self._backup = [p.detach().clone() for p in self._tensors]
        try:
            copy_all(shards(self._slow()), shards(self._tensors))
            self._elsewhere.written()
            yield
        finally:
            copy_all(shards(self._backup), shards(self._tensors))
            self._elsewhere.written()
            self._backup = None

    def _slow(self) -> list[Tensor]:
        """The slow weights of every parameter, in the shapes of the parameters: between two rounds of k steps the
        parameters themselves, but those of 16 bits, which are the rounded image of their slow weights.
        """
        slow = {id(p): p.detach().float() if p.dtype in ROUNDED else p.detach() for p in self._tensors}
        for copies in self._copies:
            if copies.rounds and not self.inner_step:
                copies.keep()
            if copies.rounds or self.inner_step:
                kept = zip(copies.params, copies.views, strict=True)
                slow.update((id(p), whole(w, p)) for p, w in kept if moves(p))
        return [slow[id(p)] for p in self._tensors]

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's ``state_dict()``, and under ``"lookahead"`` the slow weights, a tensor for each parameter,
        with the number of steps since they moved.

        Raises:
            RuntimeError: within ``slow_weights()``, or as the optimizer's own.
        """
        self._require_fast_weights("state_dict()")
        own = {"k": self.k, "inner_step": self.inner_step, "slow": [w.clone() for w in self._slow()]}
        return {**self.optimizer.state_dict(), "lookahead": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, or a state dict of the optimizer alone: then the parameters as they are
        are the slow weights.

        Raises:
            RuntimeError: within ``slow_weights()``, or as the optimizer's own.
            ValueError: it is of another k or model, or as the optimizer's own; nothing is changed.
        """
        self._require_fast_weights("load_state_dict()")
        own = state_dict.get("lookahead", {}) if isinstance(state_dict, dict) else {}
        inner_step, slow = own.get("inner_step", 0), own.get("slow", [])
        if own.get("k", self.k) != self.k:
            raise ValueError(f"state_dict: expected k {self.k!r} of Lookahead, got {own['k']!r}")
        if not isinstance(inner_step, int) or inner_step < 0:
            raise ValueError(f"state_dict: expected inner_step of at least 0, got {inner_step!r}")
        shapes = [tuple(p.shape) for p in self._tensors]
        if own and [tuple(w.shape) for w in slow] != shapes:
            raise ValueError(
                f"state_dict: expected slow weights of shapes {shapes}, got {[tuple(w.shape) for w in slow]}"
            )
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "lookahead"})
        self._take_over(inner_step, slow)

    def _take_over(self, inner_step: int, slow: Sequence[Tensor] | None) -> None:
        self._count = inner_step
        self._copies = copies_of(self._tensors) if slow else []
        given = {id(p): w for p, w in zip(self._tensors, slow or [], strict=False)}
        for copies in self._copies:
            copy_all(shards(placed_like(given[id(p)], p) for p in copies.params), copies.views)

    def __getstate__(self) -> dict[str, Any]:
        self._require_fast_weights("copying or pickling the optimizer")
        kept = {name: getattr(self, name) for name in ("optimizer", "k", "alpha", "backend", "inner_step")}
        needed = self.inner_step or any(copies.rounds for copies in self._copies)
        return {**kept, "slow": [w.clone() for w in self._slow()] if needed else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "optimizer" not in state:  # as torch's load_state_dict gives it to an optimizer: state, param_groups
            self.optimizer.__setstate__(state)
            return
        own = dict(state)
        inner_step, slow = own.pop("inner_step"), own.pop("slow")
        super().__setstate__({**own, "_backup": None})
        self._tensors, names = params_and_names(self.param_groups)
        self._take_over(inner_step, slow)
        inside = self.optimizer
        if isinstance(inside, Lookbehind):
            inside._around = ref(self)
        self._elsewhere = inside._elsewhere if isinstance(inside, Lookbehind) else Elsewhere()
        self._elsewhere.follow(self._tensors, names)


class LookaheadPart(Part):
    """``Lookahead`` in a step of the optimizer inside."""

    def __init__(self, lookahead: Lookahead) -> None:
        self.lookahead = lookahead
        self.before = lookahead._count
        self.commits = 0

    def begin(self) -> None:
        """The first step of a round keeps the slow weights."""
        self.lookahead.begin_step()

    def commit(self) -> None:
        """The k-th step moves the slow weights; one that does not happen does not count."""
        self.commits += 1
        happens = self.happens
        count = self.before + happens.long() if isinstance(happens, Tensor) else int(self.before) + 1
        self.lookahead.end_step(count, again=self.commits > 1)
