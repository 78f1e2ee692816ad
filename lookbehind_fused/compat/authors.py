"""The form of the authors of Lookbehind-SAM: around a torch optimizer and a model."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import Keys, check_group, check_int, is_number, refuse_unknown, weights_of, wrong
from ..family import refuse
from ..optimizer import Lookbehind
from ..tensors import name_of, shown, tensors_of


class AuthorsForm:
    """What the four classes of the authors' form share. Not an optimizer itself; make one of the four.

    Each inner step is two backward passes of the caller's, and may use a minibatch of its own::

        minimizer = LookbehindSAM(optimizer, model, rho=0.05, k_steps=2, alpha=0.5)
        for i in range(minimizer.k_steps):                  # SAM, ASAM: once
            loss_fn(model(inputs), targets).backward()
            minimizer.ascent_step()
            loss_fn(model(inputs), targets).backward()
            minimizer.descent_step()

    The settings ``rho``, ``eta`` (and ``k_steps``, ``alpha``) may be assigned at any time, and the optimizer's groups
    changed (lr, ...), also by LR schedulers over the optimizer, made before or after. Within an outer step both wait
    for the next one; only a base optimizer without a rule of the kernels sees changes of its groups at once.

    Args:
        optimizer: the base optimizer, an instance. Its groups are not split; each gets the entries ``rho``, ``eta`` and
            ``adaptive``, so its ``state_dict()`` between two outer steps is all that a resumed run needs.
        model: holds all parameters of the optimizer. Others that it has are left alone and take no part in the norm,
            also if they have gradients (the authors' code perturbs them too).
        rho: radius of one ascent step, >= 0.
        eta: ASAM's stabilizer, >= 0; SAM has no use for it.
        backend, **settings: ``backend``, ``max_grad_norm``, ``nonfinite``, ``scaler`` and ``loss_scale`` of
            ``Lookbehind``.

    Attributes:
        optimizer, base_optimizer: the base optimizer.
        model: the model.
        scheduler: what ``set_scheduler`` was given; kept for the caller.

    Raises:
        TypeError, ValueError: an argument is not acceptable, or the optimizer has a parameter that the model has not;
            the message names it, and the optimizer is as it was.
    """

    FIXED: ClassVar = (
        *("microbatches", "ascent_gradient", "ascent_fraction"),
        *("reuse_gradient", "alpha_scope", "adaptive"),
    )
    INSIDE: ClassVar = Lookbehind
    scales_weights: ClassVar[bool]
    """Whether ascents are scaled by |w| + eta, in tensors whose name in the model contains "weight"."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rho: float = 0.5,
        eta: float = 0.01,
        *,
        backend: str = "auto",
        **settings: Any,
    ) -> None:
        self._build(optimizer, model, rho, eta, k=1, alpha=1.0, backend=backend, **settings)

    def _build(self, optimizer: Optimizer, model: nn.Module, rho: float, eta: float, **settings: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected an instance of a torch optimizer, got {shown(optimizer)}")
        refuse(self, settings, *self.FIXED)
        refuse_unknown(settings, self, optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {shown(model)}")
        self.optimizer, self.model = optimizer, model
        self.scheduler: Any = None
        self._weights = weights_of(model)
        self._backup: dict[Tensor, Tensor] | None = None
        self._require_of_model()
        keys = self._keys = Keys.of(optimizer)
        self._lookbehind = Lookbehind(
            None,
            optimizer,
            alpha_scope="tensor",
            reuse_gradient=False,
            **keys.named({"rho": rho, "eta": eta, "adaptive": False}),  # of its groups; their own lists follow
            **settings,
        )
        for group in optimizer.param_groups:
            del group[keys.adaptive]
        self._complete_groups()

    def _require_of_model(self) -> None:
        of_model = set(self.model.parameters())
        for index, p in enumerate(tensors_of(self.param_groups)):
            if p not in of_model:
                raise ValueError(f"optimizer: expected parameters of the model only, got {name_of(index, None, p)}")

    def _complete_groups(self) -> None:
        """Groups that are new say which of their tensors are scaled."""
        new = [group for group in self.param_groups if self._keys.adaptive not in group]
        if new:
            self._require_of_model()
        for group in new:
            group[self._keys.adaptive] = [self.scales_weights and p in self._weights for p in group["params"]]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho}, eta={self.eta}, optimizer={self.optimizer!r})"

    # ---- a step ----

    def ascent_step(self) -> None:
        """Perturb the weights by the gradients that are there, then clear these.

        Raises:
            RuntimeError: ``descent_step()`` is due, there is no gradient, or the slow weights are loaded.
        """
        self._require_no_backup("ascent_step()")
        self._complete_groups()
        self._lookbehind.ascent_step()
        self.optimizer.zero_grad()

    def descent_step(self) -> None:
        """One step of the base optimizer on the weights without perturbation, with the gradients that are there, which
        are cleared then. In Lookbehind these are the fast weights: the model keeps its perturbed ones up to the k-th,
        which interpolates.

        Raises:
            RuntimeError: ``ascent_step()`` is due, there is no gradient, or the slow weights are loaded.
        """
        self._require_no_backup("descent_step()")
        self._lookbehind.descent_step()
        self.optimizer.zero_grad()

    def abort_step(self) -> None:
        """Abandon an open outer step: weights and the optimizer's state become what they were before it."""
        self._require_no_backup("abort_step()")
        self._lookbehind.abort_step()

    def get_current_k(self) -> int:
        """The current inner step: 0 to k_steps - 1, 0 between two outer steps."""
        evaluation = self._lookbehind.evaluation
        return 0 if evaluation is None else evaluation.inner_step - 1

    # ---- evaluation and saving ----

    @torch.no_grad()
    def _backup_and_load_slow_cache(self) -> None:
        """Load the slow weights into the model, for an evaluation, also inside an outer step.

        Raises:
            RuntimeError: they are loaded already.
        """
        self._require_no_backup("_backup_and_load_slow_cache()")
        slow = self._lookbehind.slow_weights()
        self._backup = {p: p.detach().clone() for p in slow}
        for p, weights in slow.items():
            p.copy_(weights)
        self._lookbehind._elsewhere.written()

    @torch.no_grad()
    def _clear_and_load_backup(self) -> None:
        """Put back the weights that ``_backup_and_load_slow_cache()`` found.

        Raises:
            RuntimeError: it was not called before.
        """
        if self._backup is None:
            raise RuntimeError(
                "_clear_and_load_backup(): expected after _backup_and_load_slow_cache(), but nothing is kept"
            )
        for p, weights in self._backup.items():
            p.copy_(weights)
        self._lookbehind._elsewhere.written()
        self._backup = None

    def _require_no_backup(self, what: str) -> None:
        if self._backup is not None:
            raise RuntimeError(f"{what}: expected after _clear_and_load_backup(), but the slow weights are loaded")

    def state_dict(self) -> dict[str, Any]:
        """That of ``Lookbehind``; ``optimizer.state_dict()`` is as good. ``alpha`` is the constructor's.

        Raises:
            RuntimeError: an outer step is open, so that the weights are perturbed, or the slow weights are loaded.
        """
        self._require_no_backup("state_dict()")
        return self._lookbehind.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` or ``optimizer.state_dict()`` returned; ``rho`` and ``eta`` come from there too.

        Raises:
            RuntimeError: an outer step is open, or the slow weights are loaded.
            ValueError: it is of another k_steps, model or base optimizer; nothing is changed.
        """
        self._require_no_backup("load_state_dict()")
        self._complete_groups()
        self._lookbehind.load_state_dict(state_dict)

    # ---- what user code reads and assigns ----

    def set_scheduler(self, scheduler: Any) -> None:
        """Keep an LR scheduler as ``scheduler``."""
        self.scheduler = scheduler

    @property
    def base_optimizer(self) -> Optimizer:
        """The base optimizer."""
        return self.optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own parameter groups."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of a parameter group: the base optimizer's, and ``rho`` and ``eta``."""
        return {**self.optimizer.defaults, **self._keys.named({"rho": self.rho, "eta": self.eta})}

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Those of ``Lookbehind``."""
        return self._lookbehind.diagnostics

    @property
    def state(self) -> StepState:
        """What the open outer step keeps for each parameter, as copies made now (``StepState``)."""
        return StepState(self)

    @property
    def k(self) -> int:
        """``get_current_k()``."""
        return self.get_current_k()

    @property
    def rho(self) -> float:
        """Radius of one ascent step."""
        rho: float = self.param_groups[0][self._keys.rho]
        return rho

    @rho.setter
    def rho(self, value: float) -> None:
        self._assign(rho=value)

    @property
    def eta(self) -> float:
        """ASAM's stabilizer."""
        eta: float = self.param_groups[0][self._keys.eta]
        return eta

    @eta.setter
    def eta(self, value: float) -> None:
        self._assign(eta=value)

    def _assign(self, **setting: float) -> None:
        check_group({"rho": self.rho, "eta": self.eta, "adaptive": False, **setting})
        self._lookbehind.defaults.update(self._keys.named(setting))
        for group in self.param_groups:
            group.update(self._keys.named(setting))


class StepState(Mapping[Tensor, dict[str, Tensor]]):
    """For each parameter of the optimizer a dict of copies, made when it is read; writing to them changes nothing.

    ``eps``: the perturbation, current weights minus slow ones, while there is one. ``cached_slow_params`` (Lookbehind
    alone): the slow weights; between two outer steps the weights themselves. Both have the parameter's shape and dtype.
    """

    def __init__(self, minimizer: AuthorsForm) -> None:
        self._slow = minimizer._lookbehind.slow_weights()
        self._params = dict.fromkeys(tensors_of(minimizer.param_groups))
        self._keeps_slow = isinstance(minimizer, LookbehindForm)

    def __getitem__(self, p: Tensor) -> dict[str, Tensor]:
        """The entries of one parameter."""
        if p not in self._params:
            raise KeyError(p)
        entry = {}
        if self._keeps_slow:
            entry["cached_slow_params"] = self._slow.get(p, p.detach()).to(p.dtype, copy=True)
        if p in self._slow:
            entry["eps"] = (p.detach() - self._slow[p]).to(p.dtype)
        return entry

    def __iter__(self) -> Iterator[Tensor]:
        """The parameters, in the order of the groups."""
        return iter(self._params)

    def __len__(self) -> int:
        """How many parameters there are."""
        return len(self._params)


class SAM(AuthorsForm):
    """SAM (Foret et al. 2021) in the authors' form: ``SAM(optimizer, model, rho=0.5, eta=0.01)``."""

    scales_weights = False


class ASAM(AuthorsForm):
    """ASAM (Kwon et al. 2021) in the authors' form: ``ASAM(optimizer, model, rho=0.5, eta=0.01)``. Tensors whose name
    in the model contains "weight" are scaled.
    """

    scales_weights = True


class LookbehindForm(AuthorsForm):
    """What ``LookbehindSAM`` and ``LookbehindASAM`` share.

    Args:
        optimizer, model, rho, eta, backend, **settings: see ``AuthorsForm``.
        k_steps: inner steps of an outer step, >= 1.
        alpha: slow step size in (0, 1], or -1: for each tensor (cos(fast_1 - slow, fast_k - slow) + 1) / 2.

    Attributes:
        tmp_alphas: with ``alpha=-1`` the slow step sizes of the outer step just done, 0-dim float64, one for each
            tensor that took part, in the order of the groups; empty before, and with another alpha.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rho: float = 0.5,
        eta: float = 0.01,
        k_steps: int = 5,
        alpha: float = 0.5,
        *,
        backend: str = "auto",
        **settings: Any,
    ) -> None:
        check_int("k_steps", k_steps, 1)
        self.tmp_alphas: list[Tensor] = []
        self._build(optimizer, model, rho, eta, k=k_steps, alpha=_library_alpha(alpha), backend=backend, **settings)

    def descent_step(self) -> None:
        """One step of the base optimizer on the fast weights; the k-th interpolates between slow and fast ones."""
        moved = {p: p.grad is not None for p in tensors_of(self.param_groups)}
        moved.update(dict.fromkeys(self._lookbehind.slow_weights(), True))
        super().descent_step()
        if self._lookbehind.evaluation is None:
            alphas = self.diagnostics["alpha"]
            self.tmp_alphas = [a for a, took in zip(alphas, moved.values(), strict=True) if took] if alphas.ndim else []

    @property
    def k_steps(self) -> int:
        """Inner steps of an outer step."""
        return self._lookbehind.k

    @k_steps.setter
    def k_steps(self, value: int) -> None:
        check_int("k_steps", value, 1)
        self._lookbehind.k = value

    @property
    def alpha(self) -> float:
        """Slow step size; -1 for an adaptive one."""
        alpha = self._lookbehind.alpha
        return -1 if isinstance(alpha, str) else alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._lookbehind.alpha = _library_alpha(value)


class LookbehindSAM(LookbehindForm):
    """Lookbehind-SAM (Mordido et al. 2024, algorithm 1) in the authors' form:
    ``LookbehindSAM(optimizer, model, rho=0.5, eta=0.01, k_steps=5, alpha=0.5)``.
    """

    scales_weights = False


class LookbehindASAM(LookbehindForm):
    """Lookbehind-ASAM (Mordido et al. 2024, algorithm 1) in the authors' form:
    ``LookbehindASAM(optimizer, model, rho=0.5, eta=0.01, k_steps=5, alpha=0.5)``. Tensors whose name in the model
    contains "weight" are scaled.
    """

    scales_weights = True


Lookbehind_SAM = LookbehindSAM
Lookbehind_ASAM = LookbehindASAM


def _library_alpha(alpha: float) -> float | str:
    """``Lookbehind``'s word for an alpha of the authors' form."""
    if not (is_number(alpha) and (alpha == -1 or 0 < alpha <= 1)):
        raise wrong("alpha", "a number in (0, 1], or -1 for an adaptive one", alpha, (numbers.Real,))
    return "adaptive" if alpha == -1 else alpha
