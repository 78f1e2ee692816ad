"""The forms of ``compat``: scripts run with them and with ``public_forms``; what they have and what they refuse."""

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import compat
from lookbehind_fused.compat import ASAM, SAM, LookbehindASAM, LookbehindSAM, SingleFileSAM
from tests.conftest import assert_close, assert_equal, assert_same_state, scaled_error

OURS = "from lookbehind_fused.compat import"
THEIRS = "from tests.compat.public_forms import"

AUTHORS_SCRIPT = """
{import_line} ASAM, SAM, Lookbehind_ASAM, Lookbehind_SAM

model = make_model()
optimizer = make_base(model)
early = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2)
method = {{"SAM": SAM, "ASAM": ASAM, "Lookbehind_SAM": Lookbehind_SAM, "Lookbehind_ASAM": Lookbehind_ASAM}}[METHOD]
minimizer = method(optimizer, model, *POSITIONAL, **KEYWORDS)
minimizer.set_scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7))
looks_behind = METHOD.startswith("Lookbehind")
for epoch in range(3):
    model.train()
    for number in range(len(BATCHES)):
        for i in range(minimizer.k_steps if looks_behind else 1):
            inputs, targets = BATCHES[(number + i) % len(BATCHES)]
            loss_fn(model(inputs), targets).backward()
            minimizer.ascent_step()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            record("loss behind", loss)
            record("perturbed", *model.parameters())
            if looks_behind and number == 1 and i == 0:
                assert minimizer.k == minimizer.get_current_k() == 0
                minimizer._backup_and_load_slow_cache()
                record("slow inside a step", *model.parameters())
                minimizer._clear_and_load_backup()
            minimizer.descent_step()
        record("weights", *model.parameters())
        if looks_behind:
            record("alphas", *minimizer.tmp_alphas)
    early.step()
    minimizer.scheduler.step()
    model.eval()
    if looks_behind:
        minimizer._backup_and_load_slow_cache()
    with torch.no_grad():
        record("validation", loss_fn(model(HELD_OUT[0]), HELD_OUT[1]))
    if looks_behind:
        minimizer._clear_and_load_backup()
    record("buffers", *(b for b in model.buffers() if b.is_floating_point()))
    for p in model.parameters():
        record("state", *(optimizer.state[p][key] for key in sorted(optimizer.state[p])))
"""

SINGLE_FILE_SCRIPT = """
{import_line} SingleFileSAM as SAM

model = make_model()
optimizer = SAM(make_groups(model), BASE, **KEYWORDS)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 1, 0.7)
for epoch in range(3):
    model.train()
    for inputs, targets in BATCHES:
        def closure():
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss

        record("loss", closure())
        if FORM == "closure":
            record("loss behind", optimizer.step(closure))
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True)
            record("perturbed", *model.parameters())
            record("loss behind", closure())
            optimizer.second_step(zero_grad=True)
        record("weights", *model.parameters())
    scheduler.step()
    record("buffers", *(b for b in model.buffers() if b.is_floating_point()))
    for p in model.parameters():
        state = optimizer.base_optimizer.state[p]
        record("state", *(state[key] for key in sorted(state) if key != "old_p"))
"""

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 1e-3}),  # runs its own step()
}


def make_model() -> nn.Module:
    """Convolutions without biases: before BatchNorm their gradient is rounding alone, which Adam would magnify."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh()),
        *(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    ).double()


def make_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Pictures of 7 x 7 whose class is where they are bright, with noise."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        targets = torch.randint(3, (8,), generator=generator)
        inputs = torch.randn(8, 1, 7, 7, generator=generator, dtype=torch.float64)
        inputs[torch.arange(8), 0, 2 * targets] += 1.5
        batches.append((inputs, targets))
    return batches


def run_script(script: str, import_line: str, **names: Any) -> list[tuple[str, Tensor]]:
    """Everything that the script has recorded, in order."""
    found: list[tuple[str, Tensor]] = []

    def record(what: str, *tensors: Tensor) -> None:
        found.extend((what, torch.as_tensor(x).detach().clone()) for x in tensors)

    *batches, held_out = make_batches(4)
    given = {"BATCHES": batches, "HELD_OUT": held_out, "make_model": make_model, "record": record, "torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(script.format(import_line=import_line), {**given, "loss_fn": nn.functional.cross_entropy, **names})
    return found


def assert_same_run(ours: list[tuple[str, Tensor]], theirs: list[tuple[str, Tensor]]) -> None:
    assert len(ours) == len(theirs) > 100
    for number, ((what, actual), (what_too, expected)) in enumerate(zip(ours, theirs, strict=True)):
        assert what == what_too
        found = scaled_error(actual, expected)
        assert found <= 1e-10, f"{what}, record {number}: {found:.1e}\n{actual}\n{expected}"


METHODS = [
    *((method, (0.2, 0.05)) for method in ("SAM", "ASAM")),
    *(
        (method, (0.1, 0.05, k, alpha))
        for method in ("Lookbehind_SAM", "Lookbehind_ASAM")
        for k in (1, 2, 5)
        for alpha in (0.5, -1)
    ),
]


@pytest.mark.sample(20)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("method", "positional"), METHODS)
def test_a_script_of_the_authors_form(backend: str, method: str, positional: tuple, base: str) -> None:
    """Losses, weights, BatchNorm's statistics and the optimizer's state, from two import lines."""
    optimizer_class, hyper = BASES[base]

    def make_base(model: nn.Module) -> torch.optim.Optimizer:
        groups = [{"params": model[:-1].parameters()}, {"params": model[-1].parameters(), "lr": hyper["lr"] / 2}]
        return optimizer_class(groups, **hyper)

    names = {"METHOD": method, "POSITIONAL": positional, "make_base": make_base}
    ours = run_script(AUTHORS_SCRIPT, OURS, KEYWORDS={"backend": backend}, **names)
    assert_same_run(ours, run_script(AUTHORS_SCRIPT, THEIRS, KEYWORDS={}, **names))


@pytest.mark.sample(16)
@pytest.mark.parametrize("form", ["halves", "closure"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"rho": 0.3}, {"rho": 0.5, "adaptive": True}, {"rho": 0.3, "adaptive": True, "use_gc": True}],
    ids=str,
)
def test_a_script_of_the_single_file_form(
    backend: str, keywords: dict[str, Any], groups: int, base: str, form: str
) -> None:
    optimizer_class, hyper = BASES[base]

    def make_groups(model: nn.Module) -> Any:
        params = list(model.parameters())
        if groups == 1:
            return params
        return [{"params": params[:3]}, {"params": params[3:], "rho": 0.7, "adaptive": not keywords.get("adaptive")}]

    names = {"BASE": optimizer_class, "FORM": form, "make_groups": make_groups}
    keywords = {**keywords, **hyper, "foreach": False}
    ours = run_script(SINGLE_FILE_SCRIPT, OURS, KEYWORDS={**keywords, "backend": backend}, **names)
    assert_same_run(ours, run_script(SINGLE_FILE_SCRIPT, THEIRS, KEYWORDS=keywords, **names))


@pytest.mark.parametrize(("method", "positional"), [("Lookbehind_ASAM", (0.1, 0.05, 3, -1)), ("ASAM", (0.2, 0.05))])
def test_another_setting_is_seen(backend: str, method: str, positional: tuple) -> None:
    """The comparison of scripts notices what a hundredth of a setting changes."""
    optimizer_class, hyper = BASES["sgd"]
    names = {"METHOD": method, "make_base": lambda model: optimizer_class(model.parameters(), **hyper)}
    expected = run_script(AUTHORS_SCRIPT, THEIRS, POSITIONAL=positional, KEYWORDS={}, **names)
    for place in (0, 1):
        other = tuple(x * (1.01 if i == place else 1) for i, x in enumerate(positional))
        found = run_script(AUTHORS_SCRIPT, OURS, POSITIONAL=other, KEYWORDS={"backend": backend}, **names)
        with pytest.raises(AssertionError):
            assert_same_run(found, expected)


# ---- the authors' form by itself -------------------------------------------------------------------------------------

AUTHORS = {"SAM": SAM, "ASAM": ASAM, "LookbehindSAM": LookbehindSAM, "LookbehindASAM": LookbehindASAM}
LOOKBEHIND = {name: make for name, make in AUTHORS.items() if name.startswith("Lookbehind")}


class Run:
    """A model, a base optimizer and a minimizer over them."""

    def __init__(self, make: Any, backend: str, base: str = "sgd", **settings: Any) -> None:
        self.model, (self.inputs, self.targets) = make_model(), make_batches(1)[0]
        optimizer_class, hyper = BASES[base]
        self.optimizer = optimizer_class(self.model.parameters(), **hyper)
        self.minimizer = make(self.optimizer, self.model, backend=backend, **settings)

    def backward(self) -> None:
        nn.functional.cross_entropy(self.model(self.inputs), self.targets).backward()

    def inner_step(self) -> None:
        self.backward()
        self.minimizer.ascent_step()
        self.backward()
        self.minimizer.descent_step()

    def outer_step(self) -> None:
        for _ in range(getattr(self.minimizer, "k_steps", 1)):
            self.inner_step()

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def assert_same_weights(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_equal(f"tensor {i}", a, b)


def test_both_spellings_are_one_class() -> None:
    assert compat.Lookbehind_SAM is LookbehindSAM
    assert compat.Lookbehind_ASAM is LookbehindASAM


@pytest.mark.parametrize("name", AUTHORS)
def test_signatures_of_the_authors_form(name: str) -> None:
    """Names, order and defaults of what may be given by position."""
    parameters = inspect.signature(AUTHORS[name]).parameters.values()
    found = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [("optimizer", inspect.Parameter.empty), ("model", inspect.Parameter.empty), ("rho", 0.5), ("eta", 0.01)]
    assert found == expected + ([("k_steps", 5), ("alpha", 0.5)] if name in LOOKBEHIND else [])


def test_signatures_of_the_single_file_form() -> None:
    parameters = list(inspect.signature(SingleFileSAM).parameters.values())
    assert [(p.name, p.default) for p in parameters[:4]] == [
        ("params", inspect.Parameter.empty),
        ("base_optimizer", inspect.Parameter.empty),
        ("rho", 0.05),
        ("adaptive", False),
    ]
    for half in (SingleFileSAM.first_step, SingleFileSAM.second_step):
        assert inspect.signature(half).parameters["zero_grad"].default is False


@pytest.mark.parametrize("name", AUTHORS)
def test_attributes_of_the_authors_form(backend: str, name: str) -> None:
    run = Run(AUTHORS[name], backend, rho=0.25, eta=0.125)
    minimizer = run.minimizer
    assert not isinstance(minimizer, torch.optim.Optimizer)
    assert minimizer.optimizer is minimizer.base_optimizer is run.optimizer
    assert minimizer.model is run.model
    assert minimizer.param_groups is run.optimizer.param_groups
    assert len(minimizer.param_groups) == 1
    assert (minimizer.rho, minimizer.eta) == (0.25, 0.125)
    assert minimizer.defaults == {**run.optimizer.defaults, "rho": 0.25, "eta": 0.125}
    assert minimizer.scheduler is None
    assert repr(minimizer).startswith(f"{name}(rho=0.25, eta=0.125, optimizer=SGD")
    if name in LOOKBEHIND:
        assert (minimizer.k_steps, minimizer.alpha, minimizer.tmp_alphas) == (5, 0.5, [])
    for step in range(2 * getattr(minimizer, "k_steps", 1)):
        assert minimizer.k == minimizer.get_current_k() == step % getattr(minimizer, "k_steps", 1)
        run.backward()
        minimizer.ascent_step()
        assert all(p.grad is None for p in run.model.parameters())
        assert minimizer.k == step % getattr(minimizer, "k_steps", 1)
        run.backward()
        minimizer.descent_step()
        assert all(p.grad is None for p in run.model.parameters())
    assert minimizer.k == 0
    assert minimizer.diagnostics["grad_norm"] > 0


def test_attributes_of_the_single_file_form(backend: str) -> None:
    model = make_model()
    optimizer = SingleFileSAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend, model=model, num_data=8)
    assert optimizer.optimizer is optimizer.base_optimizer
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert (optimizer.model, optimizer.k) == (model, 1)
    assert {name: optimizer.defaults[name] for name in ("lr", "rho", "adaptive", "eta")} == {
        **{"lr": 0.1, "rho": 0.05},
        **{"adaptive": False, "eta": 0.0},
    }
    other = copy.deepcopy(SingleFileSAM(model.parameters(), torch.optim.SGD, lr=0.1, use_gc=True, backend=backend))
    assert (other.use_gc, other.model) == (True, None)


@pytest.mark.parametrize("name", AUTHORS)
def test_state_of_an_open_step(backend: str, name: str) -> None:
    run = Run(AUTHORS[name], backend, rho=0.25)
    run.outer_step()
    slow, params = run.weights(), list(run.model.parameters())
    for closed in (True, False):
        if not closed:
            run.backward()
            run.minimizer.ascent_step()
        state = run.minimizer.state
        assert list(state) == params
        for p, w in zip(params, slow, strict=True):
            assert list(state[p]) == ["cached_slow_params"] * (name in LOOKBEHIND) + ["eps"] * (not closed)
            if name in LOOKBEHIND:
                assert_equal("slow", state[p]["cached_slow_params"], w)
                state[p]["cached_slow_params"].zero_()
            if not closed:
                assert_equal("eps", state[p]["eps"], p.detach() - w)
                assert bool(state[p]["eps"].any())
    with pytest.raises(KeyError):
        run.minimizer.state[torch.ones(1)]
    run.minimizer.abort_step()
    assert_same_weights(run.weights(), slow)


def test_alphas_are_those_of_the_last_step(backend: str) -> None:
    """Of the tensors that took part; emptied when alpha is static again."""
    run = Run(LookbehindSAM, backend, k_steps=2, alpha=-1)
    run.model[-1].bias.requires_grad_(False)
    run.inner_step()
    assert run.minimizer.tmp_alphas == []
    run.inner_step()
    alphas = run.minimizer.tmp_alphas
    assert len(alphas) == len(list(run.model.parameters())) - 1
    assert all(0 <= alpha <= 1 for alpha in alphas)
    run.backward()
    run.minimizer.ascent_step()
    run.minimizer.alpha = 0.5  # waits for the next outer step
    run.backward()
    run.minimizer.descent_step()
    run.inner_step()
    assert len(run.minimizer.tmp_alphas) == len(alphas)
    run.outer_step()
    assert run.minimizer.tmp_alphas == []


@pytest.mark.parametrize("name", AUTHORS)
def test_the_slow_weights_for_an_evaluation(backend: str, name: str) -> None:
    run = Run(AUTHORS[name], backend, rho=0.25)
    minimizer, slow = run.minimizer, run.weights()
    run.backward()
    minimizer.ascent_step()
    perturbed = run.weights()
    minimizer._backup_and_load_slow_cache()
    assert_same_weights(run.weights(), slow)
    for call in ("_backup_and_load_slow_cache", "ascent_step", "descent_step", "abort_step", "state_dict"):
        with pytest.raises(RuntimeError, match=rf"^{call}\(\): expected after _clear_and_load_backup\(\)"):
            getattr(minimizer, call)()
    with pytest.raises(RuntimeError, match=r"^load_state_dict\(\): expected after _clear_and_load_backup\(\)"):
        minimizer.load_state_dict({})
    minimizer._clear_and_load_backup()
    assert_same_weights(run.weights(), perturbed)
    with pytest.raises(RuntimeError, match=r"^_clear_and_load_backup\(\): expected after _backup_and_load_slow_cache"):
        minimizer._clear_and_load_backup()
    run.backward()
    minimizer.descent_step()

    twin = Run(AUTHORS[name], backend, rho=0.25)
    twin.inner_step()
    assert_same_weights(run.weights(), twin.weights())


def test_only_weights_are_scaled_also_in_groups_that_come_later(backend: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model[:-1].parameters(), lr=0.1)
    minimizer = ASAM(optimizer, model, backend=backend)
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    run = Run(ASAM, backend)
    for one in (model, run.model):
        nn.functional.cross_entropy(one(run.inputs), run.targets).backward()
    minimizer.ascent_step()
    run.minimizer.ascent_step()
    assert [group["adaptive"] for group in optimizer.param_groups] == [
        [True, True, False, True, True, False],
        [True, False],
    ]
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        assert_close("perturbed", p.detach(), q.detach(), 1e-14)
    minimizer.abort_step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match=r"^optimizer: expected parameters of the model only, got parameter 8 \(shape"):
        minimizer.ascent_step()


def test_what_the_optimizer_does_not_have_is_left_alone(backend: str) -> None:
    """Neither moved nor counted, gradients or not."""
    run = Run(LookbehindASAM, backend, k_steps=2)
    without = Run(LookbehindASAM, backend, k_steps=2)
    run.model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    run.model.extra.grad = torch.full((3,), 100.0, dtype=torch.float64)
    run.outer_step()
    without.outer_step()
    assert_same_weights([p.detach() for p in run.optimizer.param_groups[0]["params"]], without.weights())
    assert run.model.extra.tolist() == [1.0, 1.0, 1.0]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_take_effect_at_the_next_outer_step(backend: str) -> None:
    """Assigned inside a step or between two, they are those of a minimizer that is built with them."""
    for inside in (True, False):
        run = Run(LookbehindASAM, backend, rho=0.1, k_steps=2, alpha=0.5)
        twin = Run(LookbehindASAM, backend, rho=0.1, k_steps=2, alpha=0.5)
        run.inner_step()
        if not inside:
            run.inner_step()
        minimizer, settings = run.minimizer, {"rho": 0.3, "eta": 0.2, "k_steps": 3, "alpha": -1}
        for name, value in settings.items():
            setattr(minimizer, name, value)
            assert getattr(minimizer, name) == value
        run.optimizer.param_groups[0]["lr"] = 0.05
        if inside:
            run.inner_step()
        twin.outer_step()
        assert_same_weights(run.weights(), twin.weights())
        twin.optimizer.param_groups[0]["lr"] = 0.05
        twin.minimizer = LookbehindASAM(twin.optimizer, twin.model, **settings, backend=backend)
        for _ in range(2):
            run.outer_step()
            twin.outer_step()
            assert_same_weights(run.weights(), twin.weights())
        run.optimizer.add_param_group({"params": []})
        run.outer_step()
        assert run.optimizer.param_groups[1]["rho"] == 0.3


BAD_SETTINGS = [
    ("rho", -0.1, ValueError, "a finite number >= 0"),
    ("rho", math.nan, ValueError, "a finite number >= 0"),
    ("rho", "0.1", TypeError, "a finite number >= 0"),
    ("eta", math.inf, ValueError, "a finite number >= 0"),
    ("k_steps", 0, ValueError, "an int >= 1"),
    ("k_steps", 2.0, TypeError, "an int >= 1"),
    ("alpha", 0.0, ValueError, r"a number in \(0, 1\], or -1 for an adaptive one"),
    ("alpha", math.nan, ValueError, r"a number in \(0, 1\], or -1 for an adaptive one"),
    ("alpha", "adaptive", TypeError, r"a number in \(0, 1\], or -1 for an adaptive one"),
]


@pytest.mark.parametrize(("name", "value", "error", "expected"), BAD_SETTINGS)
def test_a_bad_setting_changes_nothing(
    backend: str, name: str, value: Any, error: type[Exception], expected: str
) -> None:
    """To the constructor and by assignment."""
    run = Run(LookbehindSAM, backend)
    settings = ("rho", "eta", "k_steps", "alpha")
    before = [getattr(run.minimizer, setting) for setting in settings]
    with pytest.raises(error, match=f"^{name}: expected {expected}, got {value!r}"):
        setattr(run.minimizer, name, value)
    assert [getattr(run.minimizer, setting) for setting in settings] == before
    run.outer_step()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    keys = list(optimizer.param_groups[0])
    with pytest.raises(error, match=f"^{name}: expected {expected}, got {value!r}"):
        LookbehindSAM(optimizer, run.model, **{name: value})
    assert list(optimizer.param_groups[0]) == keys


def test_what_the_constructor_refuses() -> None:
    model, other = make_model(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = list(optimizer.param_groups[0])
    with pytest.raises(TypeError, match="^optimizer: expected an instance of a torch optimizer, got <class"):
        SAM(torch.optim.SGD, model)
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module, got <generator"):
        SAM(optimizer, model.parameters())
    with pytest.raises(ValueError, match=r"^optimizer: expected parameters of the model only, got parameter 0 \(shape"):
        SAM(optimizer, other)
    with pytest.raises(TypeError, match="adaptive"):
        SAM(optimizer, model, adaptive=True)
    with pytest.raises(TypeError, match="^nesterov: expected only with a class"):
        SAM(optimizer, model, nesterov=True)
    assert list(optimizer.param_groups[0]) == keys


@pytest.mark.parametrize("name", AUTHORS)
def test_halves_out_of_order(backend: str, name: str) -> None:
    run = Run(AUTHORS[name], backend)
    slow = run.weights()
    run.backward()
    with pytest.raises(RuntimeError, match=r"^descent_step\(\): expected after ascent_step\(\)"):
        run.minimizer.descent_step()
    run.minimizer.ascent_step()
    run.backward()
    with pytest.raises(RuntimeError, match=r"^ascent_step\(\): expected descent_step\(\) next"):
        run.minimizer.ascent_step()
    run.minimizer.abort_step()
    assert_same_weights(run.weights(), slow)
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="expected a backward"):
        run.minimizer.ascent_step()
    run.outer_step()


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(10)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["optimizer", "optimizer, first", "minimizer", "deepcopy", "pickle"])
def test_a_resumed_run_has_the_same_bits(backend: str, way: str, base: str) -> None:
    settings = {"rho": 0.2, "k_steps": 3, "alpha": -1}
    run = Run(LookbehindASAM, backend, base, **settings)
    for _ in range(2):
        run.outer_step()
    twin = Run(LookbehindASAM, backend, base, **settings)
    if way in ("deepcopy", "pickle"):
        twin.minimizer = (
            copy.deepcopy(run.minimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(run.minimizer))
        )
        twin.model, twin.optimizer = twin.minimizer.model, twin.minimizer.optimizer
    else:
        twin.model.load_state_dict(run.model.state_dict())
        one, other = (run.minimizer, twin.minimizer) if way == "minimizer" else (run.optimizer, twin.optimizer)
        if way == "optimizer, first":
            other = twin.optimizer = type(other)(twin.model.parameters(), lr=1.0)
        other.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
        if way == "optimizer, first":
            twin.minimizer = LookbehindASAM(other, twin.model, **settings, backend=backend)
    for _ in range(2):
        run.outer_step()
        twin.outer_step()
    assert_same_weights(run.weights(), twin.weights())
    assert_same_state(twin.optimizer.state_dict(), run.optimizer.state_dict())


def test_what_a_plain_optimizer_saved_can_be_loaded(backend: str) -> None:
    """The groups keep rho, eta and which tensors are scaled; k_steps comes with what another minimizer saved."""
    run = Run(ASAM, backend)
    plain = torch.optim.SGD(run.model.parameters(), lr=0.7, momentum=0.9)
    run.optimizer.load_state_dict(plain.state_dict())
    group = run.optimizer.param_groups[0]
    assert (group["lr"], group["rho"], group["eta"]) == (0.7, 0.5, 0.01)
    assert group["adaptive"] == [True, True, False, True, True, False, True, False]
    loaded = Run(LookbehindSAM, backend).minimizer
    loaded.load_state_dict(Run(LookbehindSAM, backend, k_steps=2).minimizer.state_dict())
    assert loaded.k_steps == 2
    run.backward()
    run.minimizer.ascent_step()
    with pytest.raises(RuntimeError, match=r"^state_dict\(\): expected no open step"):
        run.minimizer.state_dict()


# ---- the single-file form by itself ----------------------------------------------------------------------------------


def single(backend: str, **settings: Any) -> tuple[SingleFileSAM, nn.Module, Callable[[], Tensor]]:
    model, (inputs, targets) = make_model(), make_batches(1)[0]
    settings = {"lr": 0.1, "momentum": 0.9, **settings}
    optimizer = SingleFileSAM(model.parameters(), torch.optim.SGD, backend=backend, **settings)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    return optimizer, model, closure


def test_the_closure_is_called_once_and_gradients_stay(backend: str) -> None:
    optimizer, model, closure = single(backend)
    calls = []

    def counted() -> str:
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())
        closure()
        calls.append([p.grad.clone() for p in model.parameters()])
        return "what it returned"

    closure()
    with torch.no_grad():
        assert optimizer.step(counted) == "what it returned"
    (grads,) = calls
    assert_same_weights([p.grad for p in model.parameters()], grads)


def test_hooks_run_once_around_a_step(backend: str) -> None:
    optimizer, _, closure = single(backend)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    closure()
    optimizer.step(closure)
    assert calls == ["before", "after"]


def test_a_closure_that_fails_changes_nothing(backend: str) -> None:
    optimizer, model, closure = single(backend)
    closure()
    optimizer.step(closure)
    weights = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    for failing, error in ((lambda: 1 // 0, ZeroDivisionError), (lambda: None, RuntimeError)):
        optimizer.zero_grad()
        closure()
        with pytest.raises(error):
            optimizer.step(failing)
        assert_same_weights([p.detach() for p in model.parameters()], weights)
        assert_same_state(optimizer.state_dict(), state)
    closure()
    optimizer.step(closure)


def test_a_step_without_closure_or_gradients(backend: str) -> None:
    optimizer, model, closure = single(backend)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="^evaluation 0: expected a backward"):
        optimizer.step(closure)
    closure()
    with pytest.raises(TypeError, match="^closure: expected a function .* is missing; got None"):
        optimizer.step()
    assert_same_weights([p.detach() for p in model.parameters()], weights)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="^a new step: expected no open step"):
        optimizer.step(closure)


def test_a_grad_scaler_is_refused(backend: str) -> None:
    """A scaler leaves its scale and what it found as attributes, then calls step()."""
    optimizer, _, closure = single(backend)
    closure()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match=r"^scaler: expected the GradScaler"):
        optimizer.step(closure)
    optimizer.step(closure)


def test_centralised_gradients_are_other_tensors(backend: str) -> None:
    optimizer, model, closure = single(backend, use_gc=True)
    closure()
    given = [p.grad for p in model.parameters()]
    values = [g.clone() for g in given]
    optimizer.first_step()
    assert_same_weights(given, values)
    for p, g in zip(model.parameters(), values, strict=True):
        expected = g - g.flatten(1).mean(1).reshape(-1, *[1] * (g.ndim - 1)) if g.ndim > 1 else g
        assert_close("centralised", p.grad, expected, 1e-13)
    optimizer.zero_grad()
    closure()
    descent = [p.grad for p in model.parameters()]
    optimizer.second_step()
    assert all(p.grad is g for p, g in zip(model.parameters(), descent, strict=True))
    evaluations = optimizer.evaluations(apply=False)
    evaluation = next(evaluations)
    closure()
    with pytest.raises(RuntimeError, match=r"^apply\(\): expected use_gc=False"):
        optimizer.apply(evaluation)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [*(("rho", value, ValueError) for value in (-1.0, math.nan, math.inf)), ("adaptive", 1, TypeError),
     ("use_gc", None, TypeError), ("perturb_eps", -1e-12, ValueError), ("perturb_eps", 1e-3, ValueError),
     ("perturb_eps", math.nan, ValueError), ("perturb_eps", "no", TypeError), ("k", 2, TypeError)],
)  # fmt: skip
def test_what_the_single_file_form_refuses(backend: str, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*got {value!r}"):
        single(backend, **{name: value})


def test_settings_go_to_the_base_optimizer(backend: str) -> None:
    optimizer, _, _ = single(backend, foreach=True, weight_decay=0.25, perturb_eps=0.0)
    assert optimizer.param_groups[0]["foreach"] is True
    assert optimizer.base_optimizer.defaults["weight_decay"] == 0.25
