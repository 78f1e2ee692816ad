"""What parameters and gradients may be: absent, frozen, tied, empty, of any layout and precision. And what must not
happen to them: no write to ``.grad``, no new memory, no perturbed weights left behind by a step that failed."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import Lookbehind
from tests.algorithm1 import Formulas, Gradients, TorchBase, adam, adamw, algorithm1, sgd
from tests.compare import LOW_PRECISION, assert_equal, dense
from tests.conftest import Duel, assert_close, assert_same_state, drive
from tests.twin import BASES

TOLERANCE = 1e-12

SGD = (torch.optim.SGD, sgd)
ADAM = (torch.optim.Adam, adam)
ADAMW = (torch.optim.AdamW, adamw)
SGD_SETTINGS = {"lr": 0.06, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.04}
ADAM_SETTINGS = {"lr": 0.03, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.04, "amsgrad": True}
RULES = {"sgd": (SGD, SGD_SETTINGS), "adam": (ADAM, ADAM_SETTINGS), "adamw": (ADAMW, ADAM_SETTINGS)}
OPTIONS = {"k": 3, "alpha": "adaptive", "rho": 0.3, "eta": 0.05, "max_grad_norm": 5.0}


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


# ---- gradients that are not there ------------------------------------------------------------------------------------

# k = 3, tensors 0 to 3: (step, evaluation, tensor). Tensor 0 always has a gradient.
MISSING = {
    "never-there": {(t, e, 1) for t in range(4) for e in range(6)},
    "one-evaluation": {(0, 1, 1), (1, 2, 2), (2, 0, 1)},
    "first-evaluation": {(t, 0, 1) for t in range(4)},
    "joins-late": {(t, e, 2) for t in range(4) for e in range(2)},
    "only-the-last": {(t, e, 3) for t in range(4) for e in range(3)},
    "only-the-first": {(t, e, 3) for t in range(4) for e in range(1, 6)},
    "every-other-step": {(t, e, i) for t in (0, 2) for e in range(6) for i in (1, 3)},
    "mixed": {(t, e, i) for t in range(4) for e in range(6) for i in (1, 2, 3) if (5 * t + 3 * e + i) % 4 < 2},
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("form", ["step", "pairs"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("base", RULES)
@pytest.mark.parametrize("missing", MISSING)
def test_gradients_come_and_go(backend: str, missing: str, base: str, scope: str, form: str) -> None:
    params = parameters((5,), (3, 4), (), (7,))
    start = [p.detach().clone() for p in params]
    groups = [{"params": params[:2]}, {"params": params[2:], "adaptive": True, "rho": 0.2, "lr": 0.05}]
    options = {**OPTIONS, "alpha_scope": scope, "reuse_gradient": form == "step"}
    rule, settings = RULES[base]
    duel = Duel(backend, groups, rule, settings, options, form=form, missing=MISSING[missing])
    for t in range(4):
        before = [p.detach().clone() for p in params]
        duel.step()
        duel.check(TOLERANCE)
        descending = (1, 2, 3) if form == "step" else (1, 3, 5)
        for i, p in enumerate(params):
            if all((t, e, i) in MISSING[missing] for e in descending):
                assert_equal("a tensor without a descent", p.detach(), before[i])
            else:
                assert not torch.equal(p, before[i]), i
    assert not torch.equal(params[0], start[0])


@pytest.mark.sample(8)
@pytest.mark.parametrize("base", ["RMSprop", "NAdam"])
@pytest.mark.parametrize("missing", MISSING)
def test_gradients_come_and_go_for_any_base(backend: str, missing: str, base: str) -> None:
    params = parameters((5,), (3, 4), (), (7,))
    base_optimizer = getattr(torch.optim, base)
    torchs = TorchBase(base_optimizer, params, lr=0.02, weight_decay=0.1)
    duel = Duel(
        backend, [{"params": params}], (base_optimizer, sgd), {"lr": 0.02, "weight_decay": 0.1}, OPTIONS,
        missing=MISSING[missing],
    )  # fmt: skip
    duel.base = torchs
    for _ in range(4):
        duel.step()
        duel.check(TOLERANCE)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_frozen_and_unfrozen_parameters(backend: str, base: type[torch.optim.Optimizer]) -> None:
    """Frozen in step 2 and 3, with the gradient of step 1 still in ``.grad``; momentum goes on in step 4."""
    layer = nn.Linear(4, 3).double()
    settings = {"lr": 0.05, "weight_decay": 0.1}
    torchs = TorchBase(base, [layer.weight, layer.bias], **settings)
    options = {"k": 2, "alpha": 0.6, "rho": 0.2}
    optimizer = Lookbehind(layer.parameters(), base, backend=backend, **options, **settings)
    expected = [p.detach().clone() for p in layer.parameters()]
    x, y = randn(6, 4, seed=1), randn(6, 3, seed=2)
    for t in range(5):
        frozen = t in (1, 2)
        layer.weight.requires_grad_(not frozen)

        def closure() -> Tensor:
            loss = (layer(x).tanh() - y).square().mean()
            loss.backward()
            return loss

        def gradient(points: list[Tensor], _: int, frozen: bool = frozen) -> Gradients:
            leaves = [p.clone().requires_grad_() for p in points]
            loss = (nn.functional.linear(x, *leaves).tanh() - y).square().mean()
            weight, bias = torch.autograd.grad(loss, leaves)
            return [None if frozen else weight, bias]

        before = layer.weight.detach().clone()
        optimizer.step(closure)
        expected = algorithm1(expected, gradient, torchs, **options).params
        assert torch.equal(layer.weight, before) == frozen
        for p, q in zip(layer.parameters(), expected, strict=True):
            assert_close(f"step {t}", p, q, TOLERANCE)


def test_a_tensor_that_joins_late_has_half_alpha(backend: str) -> None:
    """By hand: its first gradient is at evaluation 2, so fast_1 = slow, the cosine is 0 and alpha 1/2."""
    early, late = parameters((1,), (1,))
    start = late.item()
    optimizer = Lookbehind(
        [early, late], torch.optim.SGD, lr=0.5, rho=0.1, k=2, alpha="adaptive", alpha_scope="tensor", backend=backend
    )

    def evaluate(index: int) -> Tensor:
        early.grad = torch.ones(1, dtype=torch.float64)
        late.grad = torch.full((1,), 3.0, dtype=torch.float64) if index == 2 else None
        return torch.zeros(())

    drive(optimizer, "step", evaluate, 2)
    assert optimizer.diagnostics["alpha"].tolist() == pytest.approx([1.0, 0.5], abs=1e-15)
    assert late.item() == pytest.approx(start - 0.5 * 0.5 * 3.0, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3])
def test_tied_weights_are_one_tensor(backend: str, k: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 3, bias=False).double()
            self.decoder = nn.Linear(3, 4, bias=False).double()
            self.decoder.weight = nn.Parameter(self.encoder.weight.detach().T.clone())
            self.again = nn.Linear(4, 3, bias=False).double()
            self.again.weight = self.encoder.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.decoder(self.encoder(x).tanh()).tanh())

    model = Tied()
    assert len(list(model.parameters())) == 2
    x = randn(6, 4, seed=1)
    options = {"k": k, "alpha": "adaptive", "rho": 0.2}
    optimizer = Lookbehind(model.parameters(), torch.optim.SGD, backend=backend, **options, **SGD_SETTINGS)
    expected = [p.detach().clone() for p in model.parameters()]
    formulas = Formulas(sgd, SGD_SETTINGS, 2)

    def closure() -> Tensor:
        loss = (model(x) - 0.3).square().mean()
        loss.backward()
        return loss

    def gradient(points: list[Tensor], _: int) -> Gradients:
        encoder, decoder = leaves = [p.clone().requires_grad_() for p in points]
        out = ((x @ encoder.T).tanh() @ decoder.T).tanh() @ encoder.T
        return list(torch.autograd.grad((out - 0.3).square().mean(), leaves))

    for _ in range(4):
        optimizer.step(closure)
        expected = algorithm1(expected, gradient, formulas, **options).params
        for p, q in zip(model.parameters(), expected, strict=True):
            assert_close("weights", p, q, TOLERANCE)


# ---- layouts ---------------------------------------------------------------------------------------------------------

# shape, order of the dimensions in memory, offset in elements
LAYOUTS = {
    "contiguous": ((4, 3, 5, 2), None, 0),
    "channels-last": ((4, 3, 5, 2), (0, 2, 3, 1), 0),
    "channels-last-3d": ((2, 3, 4, 2, 3), (0, 2, 3, 4, 1), 0),
    "transposed": ((6, 6), (1, 0), 0),
    "permuted": ((3, 3, 3), (1, 2, 0), 0),
    "offset": ((3, 7), None, 1),
    "permuted-offset": ((3, 4, 2), (2, 0, 1), 3),
    "size-1-dims": ((5, 1, 3, 1), (1, 3, 2, 0), 0),
    "channels-last-one-channel": ((5, 1, 3, 3), (0, 2, 3, 1), 0),
    "channels-last-one-pixel": ((5, 3, 1, 1), (0, 2, 3, 1), 0),
    "scalar": ((), None, 1),
    "one": ((1,), None, 1),
    "empty": ((0,), None, 0),
    "empty-2d": ((3, 0, 2), (2, 1, 0), 0),
}


def strange_gradient(kind: str, g: Tensor) -> Tensor:
    """The same values in another memory layout."""
    if kind == "contiguous":
        return g.contiguous().clone()
    if kind == "reversed":
        return dense(g, tuple(reversed(range(g.ndim))), offset=1)
    if kind == "channels-last":
        return dense(g, (0, *range(2, g.ndim), 1) if g.ndim > 1 else None, offset=0)
    if kind == "every-other":  # not dense
        return torch.full((*g.shape, 2), float("nan"), dtype=g.dtype)[..., 0].copy_(g)
    if kind == "odd-strides":  # strides of dimensions of size 1 mean nothing
        strides = [977 if size == 1 else stride for size, stride in zip(g.shape, g.contiguous().stride(), strict=True)]
        return g.contiguous().clone().as_strided(g.shape, strides)
    raise ValueError(kind)


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", ["contiguous", "reversed", "channels-last", "every-other", "odd-strides"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_layouts_of_parameters_and_gradients(backend: str, base: str, kind: str) -> None:
    params = [
        nn.Parameter(dense(randn(*shape, seed=i), order, offset))
        for i, (shape, order, offset) in enumerate(LAYOUTS.values())
    ]
    strides = [p.stride() for p in params]
    groups = [{"params": params[::2], "adaptive": True}, {"params": params[1::2], "lr": 0.02}]
    rule, settings = RULES[base]
    duel = Duel(backend, groups, rule, settings, OPTIONS, gradient_layout=lambda i, g: strange_gradient(kind, g))
    for _ in range(3):
        duel.step()
        duel.check(TOLERANCE)
    assert [p.stride() for p in params] == strides
    # in the layout of the parameter, as torch's own optimizers make it
    for p in params:
        for value in duel.optimizer.base_optimizer.state[p].values():
            assert value.ndim == 0 or value.shape == p.shape


@pytest.mark.parametrize("kind", ["contiguous", "reversed", "every-other"])
@pytest.mark.parametrize("base", ["RMSprop", "Adagrad"])
def test_layouts_with_any_base(backend: str, base: str, kind: str) -> None:
    params = [
        nn.Parameter(dense(randn(*shape, seed=i), order, offset))
        for i, (shape, order, offset) in enumerate(LAYOUTS.values())
    ]
    base_optimizer = getattr(torch.optim, base)
    duel = Duel(
        backend, [{"params": params}], (base_optimizer, sgd), {"lr": 0.02}, OPTIONS,
        gradient_layout=lambda i, g: strange_gradient(kind, g),
    )  # fmt: skip
    duel.base = TorchBase(base_optimizer, params, lr=0.02)
    for _ in range(3):
        duel.step()
        duel.check(TOLERANCE)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_expanded_and_shared_gradients(backend: str, base: str) -> None:
    """Stride 0 (what ``sum().backward()`` may leave), and one tensor that is the gradient of two parameters."""
    params = parameters((4, 5), (4, 5), (6,), (4, 5))
    start = [p.detach().clone() for p in params]
    rule, settings = RULES[base]
    optimizer = Lookbehind(params, rule[0], backend=backend, **OPTIONS, **settings)
    row = randn(5, seed=8)
    shared = randn(4, 5, seed=9)
    gradients = [row.expand(4, 5), shared, torch.tensor(0.7, dtype=torch.float64).expand(6), shared]
    copies = [g.clone() for g in gradients]

    def evaluate(index: int) -> Tensor:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        return torch.zeros(())

    formulas = Formulas(rule[1], settings, 4)
    expected = start
    for _ in range(3):
        drive(optimizer, "step", evaluate, 3)
        expected = algorithm1(expected, lambda *_: list(copies), formulas, **OPTIONS).params
        for p, q in zip(params, expected, strict=True):
            assert_close("weights", p, q, TOLERANCE)
    for g, c in zip(gradients, copies, strict=True):
        assert_equal("gradient", g, c)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_views_into_a_bigger_buffer(backend: str, dtype: torch.dtype) -> None:
    """Parameters side by side in one buffer, at odd offsets; nothing outside them is written."""
    buffer = randn(64, seed=3).to(dtype)
    slices = [(3, 10, (7,)), (10, 22, (3, 4)), (23, 24, ()), (24, 24, (0,)), (31, 63, (2, 4, 2, 2))]
    params = [nn.Parameter(buffer[a:b].view(shape)) for a, b, shape in slices]
    outside = torch.ones(64, dtype=torch.bool)
    for a, b, _ in slices:
        outside[a:b] = False
    before = buffer.clone()
    duel = Duel(backend, [{"params": params}], *RULES["adamw"], OPTIONS, curvature=0.0)
    tolerance = {torch.float64: TOLERANCE, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for _ in range(3):
        duel.step()
        duel.check(tolerance)
        duel.synchronise()
        assert_equal("outside", buffer[outside], before[outside])
    assert not torch.equal(buffer[3:10], before[3:10])
    assert params[0].untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_memory_format_may_change_between_steps(backend: str, base: str) -> None:
    """``model.to(memory_format=torch.channels_last)`` gives every parameter new memory and strides."""
    params = parameters((4, 3, 2, 5), (3, 2, 4, 4), (6,))
    duel = Duel(backend, [{"params": params}], *RULES[base], OPTIONS)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last, torch.contiguous_format):
        for p in params[:2]:
            p.data = p.detach().clone(memory_format=memory_format)
        duel.step()
        duel.check(TOLERANCE)
        assert all(p.is_contiguous(memory_format=memory_format) for p in params[:2])


def test_only_empty_and_single_elements(backend: str) -> None:
    for scope in ("global", "tensor"):
        params = [nn.Parameter(torch.tensor(1.5, dtype=torch.float64)), *parameters((0,), (2, 0), (1, 1), ())]
        duel = Duel(backend, [{"params": params}], *RULES["sgd"], {**OPTIONS, "alpha_scope": scope})
        for _ in range(3):
            duel.step()
            duel.check(TOLERANCE)


# ---- what must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", ["sgd", "adam", "RMSprop"])
def test_grad_is_never_written(backend: str, base: str, form: str, dtype: torch.dtype) -> None:
    """With clipping, decay and maximize, which all change the gradient that the base optimizer sees."""
    params = [
        nn.Parameter(dense(randn(4, 3, 2, 2), (0, 2, 3, 1)).to(dtype)),
        *parameters((7,), (), (3, 3), dtype=dtype),
    ]
    base_optimizer = RULES[base][0][0] if base in RULES else getattr(torch.optim, base)
    optimizer = Lookbehind(
        params, base_optimizer, lr=0.02, weight_decay=0.1, maximize=True, k=2, alpha="adaptive", adaptive=True,
        max_grad_norm=0.1, reuse_gradient=form == "step", backend=backend,
    )  # fmt: skip
    written: list[tuple[nn.Parameter, Tensor, Tensor, tuple]] = []

    def evaluate(index: int) -> Tensor:
        for p, g, _, _ in written[-len(params) :]:
            assert p.grad is None or (form == "pairs" and p.grad is g)
        for i, p in enumerate(params):
            g = dense(randn(*p.shape, seed=10 * index + i).to(dtype), offset=1)
            p.grad = g
            written.append((p, g, g.clone(), (g.stride(), g.data_ptr(), g._version)))
        return torch.zeros(())

    for _ in range(2):
        drive(optimizer, form, evaluate, 2)
        for p, g, _, _ in written[-len(params) :]:
            assert p.grad is g, "the gradient of the last evaluation stays, as after any torch optimizer"
        for _, g, values, where in written:
            assert_equal("gradient", g, values)
            assert (g.stride(), g.data_ptr(), g._version) == where


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_parameters_keep_identity_and_memory(
    backend: str, base: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    params = list(model.parameters())
    addresses = [p.data_ptr() for p in params]
    optimizer = Lookbehind(params, base, lr=0.01, k=2, alpha="adaptive", backend=backend)
    x = randn(5, 3).to(dtype)

    def closure() -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    state_addresses = None
    for _ in range(3):
        optimizer.step(closure)
        assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
        assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
        assert [p.data_ptr() for p in params] == addresses
        now = [v.data_ptr() for p in params for v in optimizer.base_optimizer.state.get(p, {}).values()]
        assert now == (state_addresses or now)
        state_addresses = now


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("k", [1, 2])
def test_backward_through_weights_of_before_raises(
    backend: str, k: int, base: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    """The version counters know of every write: an ascent, the restored slow weights, the update."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = Lookbehind(params, base, lr=0.1, k=k, alpha=0.5, backend=backend)
    graphs = [params[0].square().sum()]
    for evaluation in optimizer.evaluations():
        if evaluation.index > 0:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graphs[-1].backward()
        graphs.append(params[0].square().sum())
        graphs[-1].backward(retain_graph=True)
    for graph in graphs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            graph.backward()

    perturbed = None
    for evaluation in optimizer.evaluations():
        loss = params[0].square().sum()
        loss.backward(retain_graph=True)
        if evaluation.index == 1:
            perturbed = loss
            break
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        perturbed.backward()


class Failure(Exception):
    pass


FAILING_BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1}),
    "sgd-plain": (torch.optim.SGD, {"lr": 0.05}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "lr_decay": 0.1}),
}


class Run:
    """An optimizer on a few tensors of several dtypes, with gradients that depend on nothing but weights and step."""

    def __init__(self, backend: str, base: str, options: dict[str, Any], form: str) -> None:
        base_optimizer, settings = FAILING_BASES[base]
        self.params = [*parameters((5,), (3, 3)), *parameters((4,), ())]
        if base in ("sgd", "sgd-plain", "adam", "adamw"):
            self.params += [*parameters((6,), dtype=torch.bfloat16), *parameters((2, 3), dtype=torch.float32)]
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2], "adaptive": True, "lr": 0.02}]
        self.optimizer = Lookbehind(groups, base_optimizer, backend=backend, **options, **settings)
        self.form = form
        self.t = 0

    def backward(self, index: int) -> Tensor:
        """Tensor 1 has its first gradient at evaluation 1, tensor 3 none at the last."""
        for i, p in enumerate(self.params):
            there = not (i == 1 and index == 0) and not (i == 3 and index > 1)
            p.grad = (0.5 * p.detach() + randn(*p.shape, seed=20 * self.t + i).to(p.dtype)) if there else None
        return torch.zeros(())

    def step(self) -> None:
        drive(self.optimizer, self.form, self.backward, self.optimizer.k)
        self.t += 1

    def failing_step(self, at: int, how: str) -> None:
        """A step that ends at evaluation ``at``: before its backward pass or, for ``how`` with "late", after it."""
        self.t += 100  # other gradients than the good step has

        def evaluate(index: int) -> Tensor:
            if index == at and not how.startswith("late"):
                raise Failure
            loss = self.backward(index)
            if index == at:
                raise Failure
            return loss

        if how.endswith("break"):
            for evaluation in self.optimizer.evaluations():
                if evaluation.index == at and how == "break":
                    break
                self.backward(evaluation.index)
                if evaluation.index == at:
                    break
        else:
            with pytest.raises(Failure):
                drive(self.optimizer, self.form, evaluate, self.optimizer.k)
            if self.form == "pairs":
                self.optimizer.abort_step()
        self.t -= 100

    def snapshot(self) -> dict[str, Any]:
        return {
            "weights": [p.detach().clone() for p in self.params],
            "base": copy.deepcopy(self.optimizer.base_optimizer.state_dict()),
            "whole": copy.deepcopy(self.optimizer.state_dict()),
        }


@pytest.mark.sample(24)
@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("step", "raise"),
        ("step", "late raise"),
        ("evaluations", "raise"),
        ("evaluations", "late raise"),
        ("evaluations", "break"),
        ("evaluations", "late break"),
        ("pairs", "raise"),
        ("pairs", "late raise"),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", FAILING_BASES)
def test_a_step_that_fails_leaves_no_trace(backend: str, base: str, k: int, form: str, how: str) -> None:
    """At every evaluation, in the first step (no state yet) and in a later one: weights and state are as before, and
    what follows is bit for bit what follows without the failure."""
    for reuse in (True, False) if form != "pairs" else (False,):
        # adaptive alpha has the most that a failed step could leave half written
        options = {"k": k, "alpha": "adaptive", "alpha_scope": "tensor" if reuse else "global"}
        options |= {"rho": 0.3, "max_grad_norm": 2.0, "reuse_gradient": reuse}
        for warm_up in (0, 1):
            undisturbed = Run(backend, base, options, form)
            for _ in range(warm_up):
                undisturbed.step()
            before = undisturbed.snapshot()
            for _ in range(2):
                undisturbed.step()
            after = undisturbed.snapshot()
            assert not torch.equal(after["weights"][0], before["weights"][0])
            for at in range(k + 1 if reuse else 2 * k):
                run = Run(backend, base, options, form)
                for _ in range(warm_up):
                    run.step()
                run.failing_step(at, how)
                assert_same_state(run.snapshot(), before, f"after a failure at evaluation {at}")
                for _ in range(2):
                    run.step()
                assert_same_state(run.snapshot(), after, f"two steps after a failure at evaluation {at}")


def test_a_step_with_static_alpha_that_fails_leaves_no_trace(backend: str) -> None:
    """Here the last descent writes the weights and the state in one pass, and only then."""
    for base in ("sgd", "adam", "RMSprop"):
        for k in (1, 2):
            for at in range(k + 1):
                run = Run(backend, base, {"k": k, "alpha": 0.4}, "step")
                run.step()
                before = run.snapshot()
                run.failing_step(at, "late raise")
                assert_same_state(run.snapshot(), before, f"{base}, k = {k}, evaluation {at}")


@pytest.mark.parametrize("base", ["adam", "RMSprop"])
def test_keyboard_interrupt_restores_too(backend: str, base: str) -> None:
    run = Run(backend, base, {"k": 2, "alpha": "adaptive"}, "step")
    run.step()
    before = run.snapshot()

    def interrupted(index: int) -> Tensor:
        if index == 2:
            raise KeyboardInterrupt
        return run.backward(index)

    with pytest.raises(KeyboardInterrupt):
        drive(run.optimizer, "step", interrupted, 2)
    assert_same_state(run.snapshot(), before)


def test_abandoned_generator_restores(backend: str) -> None:
    """The loop is left with the iterator still referenced; closing it, or ``abort_step``, restores."""
    run = Run(backend, "adam", {"k": 2, "alpha": 0.5}, "evaluations")
    before = run.snapshot()
    for close in (lambda iterator: iterator.close(), lambda iterator: run.optimizer.abort_step()):
        iterator: Iterator[Any] = iter(run.optimizer.evaluations())
        next(iterator)
        run.backward(0)
        next(iterator)
        assert not torch.equal(run.params[0], before["weights"][0])
        close(iterator)
        assert_same_state(run.snapshot(), before)
    run.optimizer.abort_step()  # none is open: nothing happens
    assert_same_state(run.snapshot(), before)


# ---- precision -------------------------------------------------------------------------------------------------------


def share_beyond(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Share of the elements that differ by more than ``tolerance``."""
    return ((actual.detach().double() - expected.double()).abs() > tolerance).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "2k"])
@pytest.mark.parametrize("base", RULES)
def test_error_to_float64(backend: str, base: str, reuse: bool, dtype: torch.dtype) -> None:
    """Against float64. A float32 step rounds some ten times at 6e-8 each; Adam divides by no less than eps = 1e-3."""
    params = parameters((1000,), (33, 7), dtype=dtype)
    options = {**OPTIONS, "reuse_gradient": reuse}
    duel = Duel(backend, [{"params": params, "adaptive": True}], *RULES[base], options, oracle_dtype=torch.float64)
    for _ in range(4):
        duel.step()
        duel.check(TOLERANCE if dtype == torch.float64 else 2e-6)


@pytest.mark.sample(24)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("alpha", [0.3, 1.0, "adaptive"])
@pytest.mark.parametrize("base", RULES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_computes_in_float32(
    backend: str, dtype: torch.dtype, base: str, alpha: float | str, adaptive: bool
) -> None:
    """Against the transcription in float64 that rounds the live weights (and nothing else) to 16 bits.

    The gradient does not depend on the weights, so all but the rounded weights themselves is as exact as float32.
    Live weights next to a rounding boundary may land on either side, which is one unit in the last place.
    """
    params = parameters((1000,), (33, 7), (), dtype=dtype)
    duel = Duel(
        backend, [{"params": params, "adaptive": adaptive}], *RULES[base], {**OPTIONS, "alpha": alpha},
        arithmetic=torch.float64, curvature=0.0,
    )  # fmt: skip
    for _ in range(4):
        duel.step()
        duel.check(2e-6)
        for p, q in zip(duel.params, duel.expected, strict=True):
            assert share_beyond(p, q, 0.0) <= 0.005, "weights on the other side of a rounding boundary"
        for points, expected_points in zip(duel.points, duel.expected_points, strict=True):
            for p, q in zip(points, expected_points, strict=True):
                assert share_beyond(p, q, 0.0) <= 0.005
        for p in params:
            state = duel.optimizer.base_optimizer.state[p]
            assert state
            assert all(value.dtype == torch.float32 for value in state.values())
        duel.synchronise()  # otherwise the next step would start a rounding apart


@pytest.mark.parametrize("base", RULES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_takes_gradients_at_the_rounded_weights(backend: str, dtype: torch.dtype, base: str) -> None:
    """Where the gradient depends on the weights, all elements but the few next to a rounding boundary are as exact."""
    params = parameters((2000,), (33, 7), dtype=dtype)
    duel = Duel(
        backend, [{"params": params}], *RULES[base], {**OPTIONS, "max_grad_norm": None}, arithmetic=torch.float64
    )
    for _ in range(3):
        duel.step()
        for p, entries in zip(params, duel.base.state, strict=True):
            for key, value in entries.items():
                if key != "step":
                    found = duel.optimizer.base_optimizer.state[p][key]
                    assert share_beyond(found, value, 2e-5) <= 0.005, key
        for p, q in zip(params, duel.expected, strict=True):
            assert share_beyond(p, q, 0.0) <= 0.005
        duel.synchronise()


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_small_perturbations_survive_in_bf16(backend: str, adaptive: bool) -> None:
    """At 2^-7 the spacing of bf16 is 2^-14 = 6.1e-5: one ascent of 1e-5 rounds to nothing, four of them to one spacing.

    A chain of bf16 weights would never move.
    """
    w = 2.0**-7
    p = nn.Parameter(torch.tensor([w], dtype=torch.bfloat16))
    rho = 1e-5
    settings = {"adaptive": True, "eta": 1.0 - w} if adaptive else {}  # T = 1 at the start, nearly so later
    optimizer = Lookbehind([p], torch.optim.SGD, lr=0.0, rho=rho, k=8, alpha=1.0, backend=backend, **settings)
    seen = []

    def evaluate(_: int) -> Tensor:
        seen.append(p.item())
        p.grad = torch.tensor([3.0], dtype=torch.bfloat16)
        return torch.zeros(())

    drive(optimizer, "step", evaluate, 8)
    expected = [torch.tensor(w + i * rho, dtype=torch.float64).to(torch.bfloat16).item() for i in range(9)]
    assert expected[3] == w < expected[4]
    assert seen == expected
    assert p.item() == w


def test_small_updates_survive_inside_a_bf16_step(backend: str) -> None:
    """Eight updates of 1e-5 are one spacing of 6.1e-5 where ``fast`` keeps them, and nothing where it is rounded."""
    p = nn.Parameter(torch.tensor([2.0**-7], dtype=torch.bfloat16))
    optimizer = Lookbehind([p], torch.optim.SGD, lr=1e-5, rho=0.0, k=8, alpha=1.0, backend=backend)

    def evaluate(_: int) -> Tensor:
        p.grad = torch.tensor([-1.0], dtype=torch.bfloat16)
        return torch.zeros(())

    drive(optimizer, "step", evaluate, 8)
    assert p.item() == 2.0**-7 + 2.0**-14


@pytest.mark.parametrize("base", ["RMSprop", "Adagrad"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision_with_any_base(backend: str, dtype: torch.dtype, base: str) -> None:
    """The base's own ``step()`` runs on the fast weights, which are float32."""
    params = parameters((200,), (3, 4), dtype=dtype)
    base_optimizer = getattr(torch.optim, base)
    duel = Duel(backend, [{"params": params}], (base_optimizer, sgd), {"lr": 0.02, "eps": 1e-3}, OPTIONS, curvature=0.0)
    duel.base = TorchBase(base_optimizer, [p.detach().float() for p in params], lr=0.02, eps=1e-3)
    for _ in range(3):
        duel.step()
        duel.check(5e-6)
        duel.synchronise()


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("base", RULES)
def test_several_dtypes_in_one_model(backend: str, base: str, scope: str) -> None:
    """One norm, one clipping factor and one alpha over all of them."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    params = [nn.Parameter(randn(9 + i, seed=i).to(dtype)) for i, dtype in enumerate(dtypes)]
    groups = [{"params": params[:3]}, {"params": params[3:], "adaptive": True}]
    options = {**OPTIONS, "alpha_scope": scope}
    duel = Duel(backend, groups, *RULES[base], options, arithmetic=torch.float64, curvature=0.0)
    for _ in range(3):
        duel.step()
        duel.check(2e-6)
        assert [p.dtype for p in params] == dtypes
        duel.synchronise()


def test_a_wrong_precision_is_seen(backend: str) -> None:
    """The bounds above would not let 16-bit arithmetic pass."""
    params = parameters((1000,), dtype=torch.bfloat16)
    duel = Duel(backend, [{"params": params}], *RULES["sgd"], OPTIONS, arithmetic=torch.bfloat16, curvature=0.0)
    duel.step()
    with pytest.raises(AssertionError, match="> "):
        duel.check(2e-6)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_model_in_low_precision_follows_float64(backend: str, dtype: torch.dtype) -> None:
    """Ten steps on a real loss end within the rounding of the weights and gradients of the float64 run."""
    torch.manual_seed(4)
    exact = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2)).double()
    rounded = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        for p, q in zip(exact.parameters(), rounded.parameters(), strict=True):
            p.copy_(q)
    x, y = randn(16, 6, seed=1).to(dtype), randn(16, 2, seed=2).to(dtype)
    losses = []
    for network, kind in ((exact, torch.float64), (rounded, dtype)):
        optimizer = Lookbehind(network.parameters(), torch.optim.SGD, lr=0.1, momentum=0.5, rho=0.05, backend=backend)

        def closure(network: nn.Module = network, kind: torch.dtype = kind) -> Tensor:
            loss = (network(x.to(kind)) - y.to(kind)).square().mean()
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(10)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("base", BASES)
def test_a_processor_that_takes_denormals_for_zero(backend: str, base: str) -> None:
    """float16's subnormal numbers, as weights and as gradients, count for what they are: in float32, in which is
    computed, they are normal. (Denormals of float32 and bfloat16 are then 0, as for torch.)
    """
    numbers, (make, settings) = torch.arange(-1024, 1025).double() * 2.0**-24, BASES[base]
    results = []
    for flushes in (False, True):
        weights, others = nn.Parameter(numbers.half()), nn.Parameter(torch.zeros(len(numbers), dtype=torch.float16))
        optimizer = Lookbehind([weights, others], make, k=2, alpha=1.0, rho=1e-3, backend=backend, **settings)
        assert torch.set_flush_denormal(flushes)
        try:
            for _ in optimizer.evaluations():
                weights.grad, others.grad = torch.zeros_like(weights), weights.detach().clone()
        finally:
            torch.set_flush_denormal(False)
        results.append([weights.detach(), others.detach()])
    assert float(results[0][1].abs().max()) > 2.0**-17
    if base in ("SGD", "momentum"):
        assert float(results[0][0].abs().max()) > 2.0**-17
    assert_same_state(*results)
