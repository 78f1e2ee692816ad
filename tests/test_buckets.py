"""``adaptive`` of a parameter group as a list with a bool for each tensor, and ``weight_scaling``, which makes one."""

import copy
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, SAM, Lookbehind, MultistepSAM, weight_scaling
from tests.algorithm1 import Formulas, algorithm1
from tests.conftest import assert_close, assert_equal, assert_same_state, drive
from tests.test_family import Problem
from tests.test_tensors import RULES
from tests.twin import BASES, Twin, scaled_apart, two_groups

MIXED = [True, False, True]


class Oracle:
    """Algorithm 1 on tensors of its own, beside an optimizer over those of ``problem``."""

    def __init__(self, problem: Problem, rule: str, **settings: Any) -> None:
        (_, formula), hyper = RULES[rule]
        self.weights = [p.detach().clone() for p in problem.params]
        self.gradient, self.settings = problem.gradient, settings
        self.base = Formulas(formula, hyper, len(self.weights))

    def step(self, adaptive: bool | list[bool]) -> None:
        gradient = self.gradient
        outcome = algorithm1(self.weights, lambda w, index: gradient(w), self.base, adaptive=adaptive, **self.settings)
        self.weights = outcome.params

    def check(self, params: list[Tensor]) -> None:
        for i, (p, w) in enumerate(zip(params, self.weights, strict=True)):
            assert_close(f"tensor {i}", p.detach(), w, 1e-12)


def optimizer_of(problem: Problem, rule: str, backend: str, **settings: Any) -> Lookbehind:
    (optimizer_class, _), hyper = RULES[rule]
    group = {"params": problem.params, "adaptive": list(MIXED)}
    return Lookbehind([group], optimizer_class, backend=backend, **settings, **hyper)


@pytest.mark.sample(18)
@pytest.mark.parametrize(("alpha", "scope"), [(0.3, "global"), ("adaptive", "global"), ("adaptive", "tensor")])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_mixed_list_is_algorithm_1(backend: str, rule: str, k: int, alpha: float | str, scope: str) -> None:
    problem, settings = Problem(), {"rho": 0.4, "eta": 0.05, "k": k, "alpha": alpha}
    optimizer = optimizer_of(problem, rule, backend, alpha_scope=scope, **settings)
    oracle = Oracle(problem, rule, scope=scope, **settings)
    for _ in range(3):
        optimizer.step(problem.evaluate)
        oracle.step(MIXED)
        oracle.check(problem.params)
    assert len(optimizer._prepared.buckets) == 2
    assert len(optimizer.param_groups) == 1


def test_changes_of_the_list_take_effect_at_the_next_step(backend: str) -> None:
    """In place, by another list, to a plain bool and back; the base's state is carried along."""
    problem, settings = Problem(), {"rho": 0.4, "eta": 0.05, "k": 2, "alpha": 0.5}
    optimizer, oracle = optimizer_of(problem, "adam", backend, **settings), Oracle(problem, "adam", **settings)
    group = optimizer.param_groups[0]

    def set_one() -> None:
        group["adaptive"][1] = True

    def set_all(value: bool | list[bool]) -> None:
        group["adaptive"] = value

    changes = [
        (lambda: None, MIXED, 2),
        (set_one, [True, True, True], 1),
        (lambda: set_all([False, False, True]), [False, False, True], 2),
        (lambda: set_all(False), False, 1),
        (lambda: set_all(True), True, 1),
        (lambda: set_all([False, True, False]), [False, True, False], 2),
        (lambda: None, [False, True, False], 2),
    ]
    for change, adaptive, buckets in changes:
        change()
        optimizer.step(problem.evaluate)
        oracle.step(adaptive)
        oracle.check(problem.params)
        assert len(optimizer._prepared.buckets) == buckets


def test_an_unchanged_list_keeps_the_buckets(backend: str) -> None:
    problem = Problem()
    optimizer = optimizer_of(problem, "sgd", backend)
    optimizer.step(problem.evaluate)
    before = optimizer._prepared.buckets
    optimizer.param_groups[0]["adaptive"] = list(MIXED)
    optimizer.step(problem.evaluate)
    assert optimizer._prepared.buckets is before


BAD = [
    ([True], ValueError, ": expected True, False or a list of 3 bools, one for each parameter of the group, got a list "
     "of 1"),
    ([True, False, 2], TypeError, "[2]: expected True or False, got 2"),
    ((True, False, True), TypeError, ": expected True or False, got (True, False, True)"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "error", "message"), BAD)
def test_bad_lists(backend: str, value: Any, error: type[Exception], message: str) -> None:
    """In every place where a group comes from; nothing is changed, and the next good step goes on."""
    problem = Problem()
    message = "^" + re.escape("param_groups[0]['adaptive']" + message)
    with pytest.raises(error, match=message):
        SAM([{"params": problem.params, "adaptive": value}], torch.optim.SGD, lr=0.1, backend=backend)
    optimizer = optimizer_of(problem, "sgd", backend)
    optimizer.step(problem.evaluate)
    weights = [p.detach().clone() for p in problem.params]
    optimizer.param_groups[0]["adaptive"] = value
    with pytest.raises(error, match=message):
        optimizer.step(problem.evaluate)
    optimizer.param_groups[0]["adaptive"] = list(MIXED)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["adaptive"] = value
    with pytest.raises(error, match="^state_dict: " + message[1:]):
        optimizer.load_state_dict(state_dict)
    others = Problem().params
    with pytest.raises(error, match=message.replace("0", "1", 1)):
        optimizer.add_param_group({"params": iter(others), "adaptive": value})
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["adaptive"] == MIXED
    for p, w in zip(problem.params, weights, strict=True):
        assert_equal("weights", p.detach(), w)
    optimizer.step(problem.evaluate)


def test_the_constructor_takes_a_plain_bool() -> None:
    problem = Problem()
    with pytest.raises(TypeError, match=r"^adaptive: expected True or False, got \[True, False, True\]"):
        Lookbehind(problem.params, torch.optim.SGD, lr=0.1, adaptive=list(MIXED))


def test_a_group_that_is_added_has_its_list(backend: str) -> None:
    """All in one group, or the last tensor's group added: the norm runs over all, so the results are the same."""
    results = []
    for split in (False, True):
        problem = Problem()
        first, rest = (problem.params[:2], problem.params[2:]) if split else (problem.params, [])
        group = {"params": first, "adaptive": MIXED[: len(first)]}
        optimizer = Lookbehind([group], torch.optim.SGD, lr=0.1, rho=0.4, backend=backend)
        if rest:
            optimizer.add_param_group({"params": iter(rest), "adaptive": MIXED[2:]})
        optimizer.step(problem.evaluate)
        results.append(problem.params)
    for a, b in zip(*results, strict=True):
        assert_close("weights", a.detach(), b.detach(), 1e-14)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_resumed_run_has_the_same_bits(backend: str, way: str) -> None:
    problem = Problem()
    optimizer = optimizer_of(problem, "adam", backend, rho=0.4, k=3)
    optimizer.param_groups[0]["adaptive"][0] = False
    for _ in range(2):
        optimizer.step(problem.evaluate)
    twin = Problem()
    if way == "state_dict":
        other = optimizer_of(twin, "adam", backend, rho=0.4, k=3)
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        with torch.no_grad():
            for p, q in zip(twin.params, problem.params, strict=True):
                p.copy_(q)
    else:
        other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        twin.params = other.param_groups[0]["params"]
    assert other.param_groups[0]["adaptive"] == [False, False, True]
    for _ in range(2):
        optimizer.step(problem.evaluate)
        other.step(twin.evaluate)
    for p, q in zip(problem.params, twin.params, strict=True):
        assert_equal("weights", p.detach(), q.detach())
    assert_same_state(other.state_dict(), optimizer.state_dict())


# ---- weight_scaling --------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Names with and without "weight", one of them frozen, one tied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 4)
        self.head.weight = nn.Parameter(torch.full((4, 4), 0.5))
        self.head.bias.requires_grad_(False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.head.weight
        self.double()


NAMES = ["scale", "linear.weight", "linear.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_weight_scaling_goes_by_the_name() -> None:
    model = Model()
    group = weight_scaling(model, lr=0.5, rho=0.25)
    assert set(group) == {"params", "adaptive", "lr", "rho"}
    assert (group["lr"], group["rho"]) == (0.5, 0.25)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in group["params"]] == NAMES
    assert group["adaptive"] == [False, True, False, True, False, True, False]


@pytest.mark.parametrize("method", [ASAM, Lookbehind, MultistepSAM])
def test_the_groups_own_list_wins(backend: str, method: Any) -> None:
    """Of the constructor's ``adaptive``, in every method of the family."""
    optimizer = method([weight_scaling(Model())], torch.optim.SGD, lr=0.1, backend=backend)
    assert optimizer.param_groups[0]["adaptive"] == [False, True, False, True, False, True, False]
    for p in optimizer.param_groups[0]["params"]:
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.ascent_step()
    scaling = [w.abs() + 0.01 if "weight" in name else torch.ones_like(w) for name, w in zip(NAMES, slow, strict=True)]
    scaling[-1] = torch.zeros_like(scaling[-1])  # frozen
    length = torch.stack([t.square().sum() for t in scaling]).sum().sqrt()
    rho = optimizer.param_groups[0]["rho"]
    for p, w, t in zip(optimizer.param_groups[0]["params"], slow, scaling, strict=True):
        assert_close("perturbed", p.detach(), w + rho * t**2 / length, 1e-14)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [([torch.ones(2)], {}, "^module: expected a torch.nn.Module, got"),
     (nn.Linear(2, 2), {"adaptive": True}, "^adaptive: expected no such setting, since it .*, got True"),
     (nn.Linear(2, 2), {"params": []}, "^params: expected no such setting, since it .*, got \\[\\]")],
)  # fmt: skip
def test_what_weight_scaling_does_not_take(module: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        weight_scaling(module, **settings)


# ---- groups are rows of numbers, not buckets -------------------------------------------------------------------------

HYPER: dict[str, dict[str, Any]] = {  # what every group of a base has, and of the n-th what only it has
    "SGD": {"weight_decay": lambda n: 0.002 * (n % 7)},
    "momentum": {"momentum": lambda n: 0.5 + 0.009 * n, "dampening": lambda n: 0.01 * (n % 3)},
    "Adam": {"betas": lambda n: (0.5 + 0.008 * n, 0.9 - 0.005 * n), "eps": lambda n: 1e-3 * (1 + n % 4)},
    "AdamW": {"betas": lambda n: (0.9 - 0.01 * n, 0.6 + 0.007 * n), "weight_decay": lambda n: 0.01 * (n % 5)},
    "RMSprop": {"alpha": lambda n: 0.8 + 0.003 * n, "momentum": lambda n: 0.01 * (n % 9)},
}


def fifty_groups(base: str, apart: bool) -> Callable[[Sequence[Tensor]], list[dict[str, Any]]]:
    """Groups of one tensor each, all with other numbers; ``apart``: the ascent of each third is scaled."""

    def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
        made = []
        for n, p in enumerate(params):
            own = {key: value(n) for key, value in HYPER[base].items()}
            scaled = {"adaptive": n % 3 == 0} if apart else {}
            made.append({"params": [p], "lr": 0.01 + 0.001 * n, **scaled, **own})
        return made

    return groups


@pytest.mark.sample(30)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("apart", [False, True], ids=["one bucket", "several"])
@pytest.mark.parametrize(("alpha", "scope"), [(0.3, "global"), ("adaptive", "global"), ("adaptive", "tensor")])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("base", HYPER)
def test_fifty_groups_are_algorithm_1(
    backend: str, base: str, k: int, alpha: float | str, scope: str, apart: bool, form: str
) -> None:
    """Each with numbers of its own, which change between two steps; some have no gradient."""
    missing = {(step, 7 * step + 1) for step in range(3)}
    options: dict[str, Any] = {"k": k, "alpha": alpha, "alpha_scope": scope}
    shapes = [(3,), (2, 2)] * 25
    twin = Twin(backend, base, groups=fifty_groups(base, apart), shapes=shapes, form=form, missing=missing, **options)
    for optimizer, _ in twin.sides():
        for n, group in enumerate(optimizer.param_groups):
            group.update({"rho": 0.02 + 0.01 * n, "eta": 0.01 + 0.002 * n})
    for step in range(3):
        twin.step()
        for optimizer, _ in twin.sides():
            for group in optimizer.param_groups[step::3]:
                group["lr"] *= 0.5
                group["rho"] *= 1.5
    assert len(twin.optimizer._prepared.buckets) == 1 + apart


# ---- refused at the last evaluation ----------------------------------------------------------------------------------


def of_another_dtype(p: Tensor) -> None:
    """A gradient of the dtype that the parameter has for a while."""
    memory, p.grad = p.data, None
    p.data = memory.float()
    p.grad = torch.ones_like(p)
    p.data = memory


def of_another_shape(p: Tensor) -> None:
    memory, p.grad = p.data, None
    p.data = memory.new_ones(*p.shape, 2)
    p.grad = torch.ones_like(p)
    p.data = memory


def sparse(p: Tensor) -> None:
    p.grad = torch.ones_like(p).to_sparse()


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("spoil", [sparse, of_another_dtype, of_another_shape], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("groups", [two_groups, scaled_apart], ids=["one bucket", "several"])
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_refused_at_the_last_evaluation(
    backend: str, base: str, groups: Callable, spoil: Callable, form: str
) -> None:
    """Of whichever tensor: weights and the base's state are those before the step, which then may be made again."""
    for number, k, alpha in ((0, 1, 0.4), (1, 2, 0.4), (2, 3, "adaptive")):
        twin = Twin(backend, base, groups=groups, form=form, k=k, alpha=alpha)
        for steps in (0, 1):
            weights = [p.detach().clone() for p in twin.params]
            state = copy.deepcopy(twin.optimizer.state_dict())
            last = 2 * k - 1 if form == "pairs" else k

            def evaluate(index: int, twin: Twin = twin, number: int = number, last: int = last) -> Tensor:
                loss = twin.evaluate(index)
                if index == last:
                    spoil(twin.params[number])
                return loss

            with pytest.raises(RuntimeError, match=f"gradient of parameter {number}"):
                drive(twin.optimizer, form, evaluate, k)
            assert twin.optimizer.evaluation is None
            assert_same_state([p.detach() for p in twin.params], weights)
            assert_same_state(twin.optimizer.state_dict(), state)
            twin.optimizer.zero_grad()
            twin.step()
            assert twin.steps == steps + 1
