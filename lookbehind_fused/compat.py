"""The constructor forms that people already use, over this library's passes: a script changes its import line alone.

The form of the authors of Lookbehind-SAM, around a torch optimizer and a model (the two spellings are one class)::

    from lookbehind_fused.compat import ASAM, SAM, Lookbehind_ASAM, Lookbehind_SAM, LookbehindASAM, LookbehindSAM

The form of the popular single-file port of SAM and of the optimizer collections, a torch optimizer::

    from lookbehind_fused.compat import SingleFileSAM as SAM
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import family
from .arguments import check_bool, check_group, check_int, is_number, name_of, weights_of, wrong
from .evaluations import Evaluation
from .optimizer import Lookbehind

# ---- the authors' form -----------------------------------------------------------------------------------------------


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
        backend, **settings: ``backend``, ``max_grad_norm``, ``nonfinite`` and ``grad_scale`` of ``Lookbehind``.

    Attributes:
        optimizer, base_optimizer: the base optimizer.
        model: the model.
        scheduler: what ``set_scheduler`` was given; kept for the caller.

    Raises:
        TypeError, ValueError: an argument is not acceptable, or the optimizer has a parameter that the model has not;
            the message names it, and the optimizer is as it was.
    """

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
            raise TypeError(f"optimizer: expected an instance of a torch optimizer, got {optimizer!r}")
        family.refuse(self, settings, "microbatches", "ascent_gradient", "reuse_gradient", "alpha_scope", "adaptive")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {model!r}")
        self.optimizer, self.model = optimizer, model
        self.scheduler: Any = None
        self._weights = weights_of(model)
        self._backup: dict[Tensor, Tensor] | None = None
        self._require_of_model()
        self._lookbehind = Lookbehind(
            None,
            optimizer,
            rho=rho,
            eta=eta,
            adaptive=False,  # of its groups; their own lists follow
            alpha_scope="tensor",
            reuse_gradient=False,
            **settings,
        )
        for group in optimizer.param_groups:
            group.update(rho=rho, eta=eta)
            del group["adaptive"]
        self._complete_groups()

    def _require_of_model(self) -> None:
        of_model = set(self.model.parameters())
        for index, p in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            if p not in of_model:
                raise ValueError(f"optimizer: expected parameters of the model only, got {name_of(index, None, p)}")

    def _complete_groups(self) -> None:
        """Groups that are new say which of their tensors are scaled."""
        new = [group for group in self.param_groups if "adaptive" not in group]
        if new:
            self._require_of_model()
        for group in new:
            group["adaptive"] = [self.scales_weights and p in self._weights for p in group["params"]]

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
        remaining = self._lookbehind._remaining
        return remaining[0].inner_step - 1 if remaining else 0

    # ---- evaluation and saving ----

    @torch.no_grad()
    def _backup_and_load_slow_cache(self) -> None:
        """Load the slow weights into the model, for an evaluation, also inside an outer step.

        Raises:
            RuntimeError: they are loaded already.
        """
        self._require_no_backup("_backup_and_load_slow_cache()")
        slow = self._slow_weights()
        self._backup = {p: p.detach().clone() for p in slow}
        for p, weights in slow.items():
            p.copy_(weights)

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
        self._backup = None

    def _require_no_backup(self, what: str) -> None:
        if self._backup is not None:
            raise RuntimeError(f"{what}: expected after _clear_and_load_backup(), but the slow weights are loaded")

    def _slow_weights(self) -> dict[Tensor, Tensor]:
        """The slow weights of every tensor that an open step has perturbed: views of the library's buffers."""
        if self._lookbehind._remaining is None:
            return {}
        return {b.params[row]: b.view("slow", row) for b in self._lookbehind._buckets for row in b.joined}

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
        return {**self.optimizer.defaults, "rho": self.rho, "eta": self.eta}

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
        return self.param_groups[0]["rho"]

    @rho.setter
    def rho(self, value: float) -> None:
        self._assign(rho=value)

    @property
    def eta(self) -> float:
        """ASAM's stabilizer."""
        return self.param_groups[0]["eta"]

    @eta.setter
    def eta(self, value: float) -> None:
        self._assign(eta=value)

    def _assign(self, **setting: float) -> None:
        check_group({"rho": self.rho, "eta": self.eta, "adaptive": False, **setting})
        self._lookbehind.defaults.update(setting)
        for group in self.param_groups:
            group.update(setting)


class StepState(Mapping):
    """For each parameter of the optimizer a dict of copies, made when it is read; writing to them changes nothing.

    ``eps``: the perturbation, current weights minus slow ones, while there is one. ``cached_slow_params`` (Lookbehind
    alone): the slow weights; between two outer steps the weights themselves. Both have the parameter's shape and dtype.
    """

    def __init__(self, minimizer: AuthorsForm) -> None:
        self._slow = minimizer._slow_weights()
        self._params = dict.fromkeys(chain.from_iterable(group["params"] for group in minimizer.param_groups))
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
        super().descent_step()
        if self._lookbehind._remaining is None:
            self.tmp_alphas = self._alphas() if self._lookbehind._settings.alpha == "adaptive" else []

    def _alphas(self) -> list[Tensor]:
        alphas = self.diagnostics["alpha"].unbind()
        return [alphas[i] for i in sorted(b.indices[row] for b in self._lookbehind._buckets for row in b.joined)]

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
        return -1 if self._lookbehind.alpha == "adaptive" else self._lookbehind.alpha

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


# ---- the single-file form --------------------------------------------------------------------------------------------


class SingleFileSAM(family.SAM):
    """SAM (Foret et al. 2021) in the form of the popular single-file port and of the optimizer collections::

        optimizer = SingleFileSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)

    It differs from ``lookbehind_fused.SAM`` by ``step`` and by ``eta``: ASAM's scaling is T = |w| there.

    Args:
        params, base_optimizer, rho: those of ``Lookbehind``; groups may have their own ``rho`` and ``adaptive``.
        adaptive: ASAM's scaling of the ascent (Kwon et al. 2021).
        eta: ASAM's stabilizer.
        use_gc: centralise the gradient of each ascent (Yong et al. 2020): of tensors with two or more dimensions the
            mean over all dimensions but the first is taken away. ``.grad`` is then another tensor; the one that was
            there is not written to. The norm is that of the centralised gradients, so that the perturbation has length
            rho; where it is taken before they are centralised, as in one collection, the perturbation is shorter.
        perturb_eps: what is added to the norm elsewhere, in [0, 1e-8]. The kernels add 1e-16 whatever is given, which
            at a norm of one changes the ascent by 1e-8 of itself at most; more is refused.
        model, num_data: for callers that give them to every optimizer of a collection; without meaning here.
        **settings: ``backend``, ``max_grad_norm``, ``nonfinite`` and ``grad_scale`` of ``Lookbehind``, and arguments of
            the class ``base_optimizer`` (``lr``, ``foreach``, ...).

    Raises:
        TypeError, ValueError: as ``Lookbehind``.
    """

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        use_gc: bool = False,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        num_data: int | None = None,
        **settings: Any,
    ) -> None:
        check_bool("use_gc", use_gc)
        if not (is_number(perturb_eps) and 0 <= perturb_eps <= 1e-8):
            raise wrong("perturb_eps", "a number in [0, 1e-8]", perturb_eps, (numbers.Real,))
        family.refuse(self, settings, "microbatches", "ascent_gradient")
        self.use_gc, self.model = use_gc, model
        super().__init__(params, base_optimizer, rho, adaptive, eta=eta, **settings)

    @property
    def optimizer(self) -> Optimizer:
        """The base optimizer."""
        return self.base_optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Ascend with the gradients that are there, clear them, call ``closure`` at the perturbed weights, and descend.

        Args:
            closure: runs forward and backward; called once. The gradients that it leaves are not cleared.

        Returns:
            What the closure returned.

        Raises:
            TypeError: there is no closure.
            RuntimeError: there are no gradients before or after it, or a step is open already.

        Whatever is raised, the weights and the base optimizer's state are as they were before.
        """
        self._refuse_grad_scaler()
        if not callable(closure):
            raise TypeError(
                "closure: expected a function that runs forward and backward, since the gradient at the perturbed "
                f"weights is missing; got {closure!r} (without one: first_step() and second_step())"
            )
        self._begin(list(self._plan(reuse_gradient=False).evaluations))
        try:
            self._half_step("ascent_step()", "descent_step()", ascends=True)
            self.zero_grad()
            with torch.enable_grad():
                value = closure()
            self._half_step("descent_step()", "ascent_step()", ascends=False)
        except BaseException:
            self.abort_step()
            raise
        return value

    def apply(self, evaluation: Evaluation) -> None:
        """As ``Lookbehind.apply``; not with ``use_gc``, which replaces gradients."""
        if self.use_gc:
            raise RuntimeError("apply(): expected use_gc=False, got True; use evaluations() without apply=False")
        super().apply(evaluation)

    @torch.no_grad()
    def _use_gradients(self, evaluation: Evaluation) -> None:
        if self.use_gc and evaluation.ascends:
            for p in self._tensors.tensors:
                if p.grad is not None and p.grad.ndim > 1 and p.grad.layout == torch.strided:
                    p.grad = p.grad - p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True)
        super()._use_gradients(evaluation)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "use_gc": self.use_gc, "model": self.model}
