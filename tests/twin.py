"""The library over a torch optimizer, beside Algorithm 1 over another optimizer of the same class.

Whatever a test changes about ``optimizer`` between two steps, it changes about ``other``, which torch alone runs. So
what the change has to mean is what it means with torch.
"""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM
from tests.algorithm1 import Gradients, algorithm1
from tests.conftest import assert_close, drive

TOLERANCE = 1e-12  # of float64: some hundred roundings of numbers of the size of one


class Lister(Optimizer):
    """SGD with momentum as a base that the kernels have no rule for, and that keeps tensors in a list of its own."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.listed = [(group, p) for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "listed"):
            self.listed += [(self.param_groups[-1], p) for p in self.param_groups[-1]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, p in self.listed:
            if p.grad is not None:
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                p.sub_(group["lr"] * state["momentum_buffer"])


# name: class, settings: rules of the kernels, and bases that run their own step
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02}),
    "Adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.7, 0.8), "eps": 1e-5, "weight_decay": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "betas": (0.7, 0.8), "eps": 1e-5, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True, "eps": 1e-5}),
    "Lister": (Lister, {}),
}
# name: what makes an optimizer out of parameters, a base optimizer's class and settings
METHODS: dict[str, Callable[..., Any]] = {
    "lookbehind": lambda p, b, **o: Lookbehind(p, b, k=3, alpha="adaptive", **o),
    "sam": lambda p, b, **o: SAM(p, b, **o),
    "multistep": lambda p, b, **o: MultistepSAM(p, b, average=True, **o),
    "2k": lambda p, b, **o: Lookbehind(p, b, reuse_gradient=False, **o),
    "free": lambda p, b, **o: Lookbehind(p, b, ascent_gradient="previous", **o),
    "lookahead": lambda p, b, **o: Lookahead(SAM(p, b, **o), k=2),
}
WITHOUT_PAIRS = ("multistep", "free")
SHAPES = [(5,), (2, 3), ()]
Groups = list[dict[str, Any]]


@lru_cache
def values(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers of the size of one, the same for the same seed; not to be written."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def two_groups(params: Sequence[Tensor]) -> Groups:
    """The first two in a group of their own."""
    return [{"params": list(params[:2])}, {"params": list(params[2:])}]


def scaled_apart(params: Sequence[Tensor]) -> Groups:
    """Two groups that no bucket can hold together: the ascent of one is scaled."""
    groups = two_groups(params)
    return [groups[0], {**groups[1], "adaptive": True}]


class Twin:
    """The two of them, on tensors of their own, with gradients that are a formula of the weights.

    Args:
        base: a name in ``BASES``, or a class with its settings.
        groups: makes parameter groups out of tensors.
        missing: (step, tensor) for each tensor that has no gradient in a step.
        parameter: makes a parameter out of its values and its number.
        other: makes the other side's optimizer, if that is another one.
        keeps_state: whether state is to be found in ``state`` of our optimizer.
        options: of ``method``.
    """

    def __init__(
        self,
        backend: str,
        base: str | tuple[Callable[..., Optimizer], dict[str, Any]],
        *,
        groups: Callable[[Sequence[Tensor]], Groups] = two_groups,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        form: str = "step",
        missing: Collection[tuple[int, int]] = (),
        method: Callable[..., Any] = Lookbehind,
        parameter: Callable[[Tensor, int], nn.Parameter] = lambda start, number: nn.Parameter(start),
        other: Callable[..., Optimizer] | None = None,
        keeps_state: bool = True,
        **options: Any,
    ) -> None:
        make, settings = BASES[base] if isinstance(base, str) else base
        self.params: list[nn.Parameter] = []
        self.theirs: list[nn.Parameter] = []
        self.parameter, self.keeps_state = parameter, keeps_state
        for shape in shapes:
            self.grow(*shape)
        self.options = {"k": 2, "alpha": 0.4, "rho": 0.2, "adaptive": False, "eta": 0.05, **options}
        given = {name: value for name, value in self.options.items() if name != "adaptive" or name in options}
        self.optimizer = method(None, make(groups(self.params), **settings), backend=backend, **given)
        self.other = (other or make)(groups(self.theirs), **settings)
        self.form, self.missing, self.steps = form, set(missing), 0

    def grow(self, *shape: int) -> int:
        """A new tensor on both sides; its number."""
        number = len(self.params)
        for side in (self.params, self.theirs):
            side.append(self.parameter(values(*shape, seed=number).clone(), number))
        return number

    def sides(self) -> list[tuple[Any, list[nn.Parameter]]]:
        """Each optimizer with its tensors, for a change of both."""
        return [(self.optimizer, self.params), (self.other, self.theirs)]

    def gradient(self, number: int, w: Tensor, index: int) -> Tensor | None:
        """Linear in the weights, another one at each evaluation of each step."""
        if (self.steps, number) in self.missing:
            return None
        phase = 1 + 0.25 * ((3 * self.steps + 2 * index + number) % 5)
        return (0.3 + 0.1 * number) * w + phase * values(*w.shape, seed=100 + number).to(w.dtype)

    def evaluate(self, index: int) -> Tensor:
        """Leaves gradients in the tensors of our optimizer."""
        for number, p in enumerate(self.params):
            if p.requires_grad and any(p is q for group in self.optimizer.param_groups for q in group["params"]):
                p.grad = self.gradient(number, p.detach(), index)
        return torch.zeros(())

    def step(self) -> None:
        """One outer step on both sides, compared."""
        drive(self.optimizer, self.form, self.evaluate, self.optimizer.k)
        self.paper()
        self.steps += 1
        self.check()

    def paper(self) -> None:
        """One outer step of Algorithm 1, over ``other`` and what its groups say now."""
        trained = [(group, q) for group in self.other.param_groups for q in group["params"] if q.requires_grad]
        numbers = [next(n for n, own in enumerate(self.theirs) if own is q) for _, q in trained]
        tensors = [q for _, q in trained]

        def gradient(points: list[Tensor], index: int) -> Gradients:
            return [self.gradient(n, w, index) for n, w in zip(numbers, points, strict=True)]

        def base(fast: list[Tensor], g: Gradients) -> list[Tensor]:
            with torch.no_grad():
                for q, w, x in zip(tensors, fast, g, strict=True):
                    q.copy_(w)
                    q.grad = None if x is None else x.clone()
            self.other.step()
            return [q.detach().clone() for q in tensors]

        own = {name: [g.get(name, self.options[name]) for g, _ in trained] for name in ("rho", "adaptive", "eta")}
        outcome = algorithm1(
            tensors,
            gradient,
            base,
            k=self.optimizer.k,
            alpha=self.optimizer.alpha,
            scope=self.options.get("alpha_scope", "global"),
            reuse=self.form != "pairs" and self.options.get("reuse_gradient", True),
            max_grad_norm=self.options.get("max_grad_norm"),
            **own,
        )
        with torch.no_grad():
            for q, w in zip(tensors, outcome.params, strict=True):
                q.copy_(w)

    def check(self) -> None:
        """Weights and the base's state of every tensor, also of those that no group holds any more."""
        for number, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            assert_close(f"step {self.steps}: weights of tensor {number}", p, q, TOLERANCE)
            if not self.keeps_state:
                continue
            found, expected = self.optimizer.state.get(p) or {}, self.other.state.get(q) or {}
            # torch's SGD leaves the entry None where there is no momentum
            expected = {key: value for key, value in expected.items() if value is not None}
            assert set(found) == set(expected), f"step {self.steps}: state of tensor {number}"
            for key, value in expected.items():
                what = f"step {self.steps}: {key} of tensor {number}"
                assert_close(what, torch.as_tensor(found[key]), torch.as_tensor(value), TOLERANCE)
        if hasattr(self.optimizer, "base_optimizer"):
            assert self.optimizer.state is self.optimizer.base_optimizer.state
            assert self.optimizer.param_groups is self.optimizer.base_optimizer.param_groups
