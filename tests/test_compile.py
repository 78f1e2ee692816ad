"""The native passes under ``torch.compile``: no graph break, few graphs, and the trajectory of eager mode."""

import copy

import pytest
import torch
import torch._dynamo
from torch import nn

from lookbehind_fused import Lookbehind, MultistepSAM
from lookbehind_fused.kernels import native

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"no native library: {native.unavailable}")

SGD, ADAMW = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}), (torch.optim.AdamW, {"lr": 0.01})
SETTINGS = {
    "sgd": (*SGD, {"k": 2}),
    "adamw": (*ADAMW, {"k": 2}),
    "k1": (*SGD, {"k": 1}),
    "asam": (*SGD, {"k": 3, "adaptive": True}),
    "adaptive": (*SGD, {"k": 2, "alpha": "adaptive"}),
    "adaptive-tensor": (*SGD, {"k": 3, "alpha": "adaptive", "alpha_scope": "tensor"}),
    "clipped": (*SGD, {"k": 2, "max_grad_norm": 0.1}),
    "skipping": (*SGD, {"k": 2, "nonfinite": "skip", "loss_scale": 8.0}),
    "2k": (*SGD, {"k": 2, "reuse_gradient": False}),
}


class Problem:
    """A small regression with a model that starts the same every time."""

    make = Lookbehind

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.inputs, self.targets = torch.randn(32, 6), torch.randn(32, 3)
        base, kwargs, settings = SETTINGS[name]
        self.lr = kwargs["lr"]
        self.optimizer = self.make(self.model.parameters(), base, rho=0.1, backend="native", **kwargs, **settings)

    def loss(self, model=None):
        return ((model or self.model)(self.inputs) - self.targets).square().mean()

    def schedule(self, step: int) -> None:
        """Twelve learning rates and rhos, one after the other."""
        group = self.optimizer.param_groups[0]
        group["lr"], group["rho"] = self.lr * (1 + step % 12) / 12, 0.1 + 0.01 * (step % 12)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


class Counter:
    """A compiler backend that runs the traced graph as it is and counts how many there were."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs += 1
        return graph.forward


# The same graphs: inductor makes C++ out of them, which takes its time to compile.
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager(name: str, steps: int) -> list[torch.Tensor]:
    problem = Problem(name)
    for step in range(steps):
        problem.schedule(step)
        for _ in problem.optimizer.evaluations():
            problem.loss().backward()
    return problem.weights()


def applied(problem: Problem, apply, steps: int) -> list[torch.Tensor]:
    for step in range(steps):
        problem.schedule(step)
        for evaluation in problem.optimizer.evaluations(apply=False):
            problem.loss().backward()
            apply(evaluation)
    return problem.weights()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SETTINGS)
def test_twenty_steps_with_twelve_learning_rates_make_one_graph_an_evaluation(name):
    problem, counter = Problem(name), Counter()
    compiled = torch.compile(problem.optimizer.apply, fullgraph=True, backend=counter)
    weights = applied(problem, compiled, steps=20)
    evaluations = problem.optimizer.k + 1 if problem.optimizer.reuse_gradient else 2 * problem.optimizer.k
    assert counter.graphs == evaluations <= 4
    assert all(map(torch.equal, weights, eager(name, steps=20)))


FAMILY = {
    "multistep": (MultistepSAM, {"k": 2}, 3),
    "average": (MultistepSAM, {"k": 3, "average": True}, 4),
    "microbatches": (Lookbehind, {"k": 2, "alpha": "adaptive", "microbatches": 2}, 6),
    "free": (Lookbehind, {"k": 3, "ascent_gradient": "previous"}, 3),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", FAMILY)
def test_methods_of_the_family_make_one_graph_an_evaluation(name, monkeypatch):
    make, settings, evaluations = FAMILY[name]
    monkeypatch.setitem(SETTINGS, name, (*SGD, settings))
    monkeypatch.setattr(Problem, "make", staticmethod(make))
    problem, counter = Problem(name), Counter()
    compiled = torch.compile(problem.optimizer.apply, fullgraph=True, backend=counter)
    weights = applied(problem, compiled, steps=20)
    assert counter.graphs == evaluations
    assert all(map(torch.equal, weights, eager(name, steps=20)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["sgd", "adamw", "adaptive-tensor"])
def test_inductor_gives_the_eager_bits(name):
    problem = Problem(name)
    weights = applied(problem, torch.compile(problem.optimizer.apply, fullgraph=True), steps=6)
    assert all(map(torch.equal, weights, eager(name, steps=6)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ["sgd", "adamw", "asam"])
def test_one_graph_holds_forward_backward_and_the_passes(name, compiler, monkeypatch):
    """In float64, where inductor's own arithmetic of the model is the only difference."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):  # torch 2.10
        pytest.skip("this torch cannot trace backward")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    weights = []
    for compiles in (False, True):
        problem = Problem(name)
        problem.model.double()
        problem.inputs, problem.targets = problem.inputs.double(), problem.targets.double()

        def evaluate(evaluation, problem=problem):
            loss = problem.loss()
            loss.backward()
            problem.optimizer.apply(evaluation)
            return loss.detach()

        run = torch.compile(evaluate, fullgraph=True, backend=compiler) if compiles else evaluate
        losses = []
        for step in range(5):
            problem.schedule(step)
            for evaluation in problem.optimizer.evaluations(apply=False):
                losses.append(run(evaluation))
        weights.append([*problem.weights(), torch.stack(losses)])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.sample(1)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", ["sgd", "adaptive"])
def test_a_compiled_model_under_a_closure(name, compiler):
    problem, twin = Problem(name), Problem(name)
    for one in (problem, twin):
        one.model.double()
        one.inputs, one.targets = one.inputs.double(), one.targets.double()
    model = torch.compile(problem.model, fullgraph=True, backend=compiler)

    def closure(one, forward):
        loss = one.loss(forward)
        loss.backward()
        return loss

    for _ in range(5):
        problem.optimizer.step(lambda: closure(problem, model))
        twin.optimizer.step(lambda: closure(twin, twin.model))
    for a, b in zip(problem.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_an_exception_around_apply_restores_everything(at, after):
    problem = Problem("sgd")
    applied(problem, problem.optimizer.apply, steps=2)
    before, state = problem.weights(), copy.deepcopy(problem.optimizer.state_dict()["state"])

    def step():
        for evaluation in problem.optimizer.evaluations(apply=False):
            problem.loss().backward()
            if evaluation.index == at and not after:
                raise ZeroDivisionError
            if evaluation.index < 2:  # the last one completes the step
                problem.optimizer.apply(evaluation)
            if evaluation.index == at:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert all(map(torch.equal, problem.weights(), before))
    for p, entry in state.items():
        assert torch.equal(problem.optimizer.state_dict()["state"][p]["momentum_buffer"], entry["momentum_buffer"])


def test_apply_needs_every_gradient():
    problem = Problem("sgd")
    before = problem.weights()

    def step():
        for evaluation in problem.optimizer.evaluations(apply=False):
            problem.loss().backward()
            list(problem.model.parameters())[1].grad = None
            problem.optimizer.apply(evaluation)

    with pytest.raises(RuntimeError, match=r"parameter 1.*expected a gradient at every evaluation"):
        step()
    assert all(map(torch.equal, problem.weights(), before))


def test_apply_to_a_parameter_that_was_moved():
    problem = Problem("sgd")
    before = problem.weights()
    p = next(iter(problem.model.parameters()))

    def step():
        for evaluation in problem.optimizer.evaluations(apply=False):
            problem.loss().backward()
            if evaluation.index == 1:
                p.data = p.data.clone()
            problem.optimizer.apply(evaluation)

    with pytest.raises(RuntimeError, match=r"parameter 0.*was moved inside an open step"):
        step()
    assert all(map(torch.equal, problem.weights(), before))


def test_apply_outside_of_a_step():
    problem = Problem("sgd")
    evaluation = next(iter(problem.optimizer.evaluations()))
    with pytest.raises(RuntimeError, match=r"apply\(\).*no step is open"):
        problem.optimizer.apply(evaluation)
