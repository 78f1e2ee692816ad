"""Rejected input: the error names what is wrong, what was expected and what came, and nothing has been changed by it.

A rejection is followed by good steps, which must give to the last bit what they give without the bad input.
"""

import copy
import math
import pickle
import re
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lookbehind_fused import Lookbehind
from tests.conftest import assert_same_state, drive
from tests.test_optimizer import FORMS, Problem, freeze, outer_step, snapshot

WRONG = (ValueError, TypeError)


@contextmanager
def rejected(error, *words):
    """The block raises `error` with a message in which each of the regular expressions `words` is found."""
    with pytest.raises(error) as caught:
        yield caught
    for word in words:
        assert re.search(word, str(caught.value), re.IGNORECASE), f"{word!r} not in: {caught.value}"


@contextmanager
def no_change(opt):
    """Weights, base state and parameter groups are the same, bit for bit, after the block as before it."""
    before = snapshot(opt)
    yield
    assert_same_state(snapshot(opt), before)


def make(backend, base=torch.optim.SGD, dtype=torch.float32, steps=1, **options):
    """A problem and its optimizer after `steps` outer steps."""
    problem = Problem(dtype)
    options = {"lr": 0.05, "rho": 0.2, "k": 2} | ({"momentum": 0.9} if base is torch.optim.SGD else {}) | options
    opt = Lookbehind(problem.params, base, backend=backend, **options)
    for _ in range(steps):
        outer_step(opt, problem)
    return problem, opt


def assert_works_like_untroubled(opt, problem, backend, steps=1, **options):
    """The next two steps are those of an optimizer that made `steps` steps and met no bad input."""
    twin, other = make(backend, steps=steps, **options)
    opt.zero_grad()
    for _ in range(2):
        outer_step(opt, problem)
        outer_step(other, twin)
    for key in ("params", "state", "groups"):
        assert_same_state(snapshot(opt)[key], snapshot(other)[key], key)


# ----------------------------------------------------------------------------------------- arguments of the constructor

BAD_RHO = [-1, -1e-9, math.nan, math.inf, -math.inf, "a"]  # None: what the groups have
BAD_ETA = [-1, math.nan, math.inf, "a"]
BAD_FLAG = [2, "yes", 0.5]
BAD_ARGUMENTS = [
    *[("rho", value, r"0") for value in BAD_RHO],
    *[("eta", value, r"0") for value in BAD_ETA],
    *[("adaptive", value, "bool|True|False") for value in BAD_FLAG],
    *[("k", value, r"int|>= 1|at least 1") for value in (0, -1, 1.5, 2.0, True, "2", None, math.nan)],
    *[("alpha", value, "adaptive") for value in (0, -0.1, 1.1, math.nan, math.inf, "adaptve", "", None, True)],
    *[("alpha_scope", value, "global.*tensor") for value in ("layer", "", None, 1)],
    *[("backend", value, "reference") for value in ("fast", "Native", "metal", "CUDA", "", None, 1)],
    *[("nonfinite", value, r'"propagate" or "skip"') for value in ("ignore", None, True)],
    *[("loss_scale", value, "a finite number > 0") for value in (0, -2.0, math.nan, math.inf, "a", True, None)],
    *[("max_grad_norm", value, r"> 0|positive|above 0") for value in (0, -1, math.nan, math.inf, "a")],
    *[("reuse_gradient", value, "bool|True|False") for value in (2, "yes", None)],
]


def argument_id(value):
    return repr(value) if isinstance(value, str | int | float | None) else None


@pytest.mark.parametrize(("name", "value", "expectation"), BAD_ARGUMENTS, ids=argument_id)
def test_bad_argument(backend, name, value, expectation):
    """Named with the value and what was expected; an instance of the base keeps its groups as they were."""
    problem = Problem()
    before = problem.values()
    base = torch.optim.SGD(problem.params, lr=0.1, momentum=0.9)
    keys = [list(group) for group in base.param_groups]
    options = {"backend": backend} | {name: value}
    for params, optimizer, more in ((problem.params, torch.optim.SGD, {"lr": 0.1}), (None, base, {})):
        with rejected(WRONG, rf"\b{name}\b", re.escape(repr(value)), expectation):
            Lookbehind(params, optimizer, **options, **more)
    assert_same_state(problem.values(), before)
    assert [list(group) for group in base.param_groups] == keys
    assert len(base.state) == 0
    problem.closure()
    base.step()  # still a working torch optimizer


@pytest.mark.parametrize("value", [torch.ones(2), torch.tensor(3)], ids=str)
def test_a_loss_scale_of_another_kind(backend, value):
    """At construction, and at the step when it is set later: nothing has moved then."""
    problem = Problem()
    expected = r"loss_scale: expected .*tensor of one element, got shape .*" + str(value.dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=expected):
        Lookbehind(problem.params, torch.optim.SGD, lr=0.1, loss_scale=value, backend=backend)
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    before = problem.values()
    opt.loss_scale = value
    with pytest.raises(ValueError, match=expected):
        outer_step(opt, problem)
    assert_same_state(problem.values(), before)
    opt.loss_scale = 1.0
    outer_step(opt, problem)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("stale", [False, True], ids=["no gradients", "gradients of the last step"])
def test_a_grad_scaler_that_is_not_known_is_refused(backend, stale):
    """The gradients of the closure would be used as it scales them."""
    problem = Problem()
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    if stale:
        outer_step(opt, problem)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = problem.values()
    with pytest.raises(RuntimeError, match=r"^scaler: expected the GradScaler .*optimizer\.scaler = scaler"):
        scaler.step(opt, lambda: problem.closure())
    assert_same_state(problem.values(), before)
    assert not {"grad_scale", "found_inf"} & vars(opt).keys()
    outer_step(opt, problem)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.step(opt, problem.closure)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", -1), ("rho", math.nan), ("k", 0), ("alpha", 1.1), ("alpha", "adaptve"), ("max_grad_norm", 0), ("eta", -1)],
    ids=argument_id,
)
def test_a_bad_value_is_a_value_error(backend, name, value):
    with rejected(ValueError, name):
        Lookbehind(Problem().params, torch.optim.SGD, lr=0.1, **({"backend": backend} | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [("rho", "a"), ("k", "2"), ("k", 1.5), ("adaptive", "yes")], ids=argument_id
)
def test_a_wrong_type_is_a_type_error_or_value_error_and_says_so(backend, name, value):
    with rejected(WRONG, name, re.escape(repr(value))):
        Lookbehind(Problem().params, torch.optim.SGD, lr=0.1, **({"backend": backend} | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [*[("rho", value) for value in BAD_RHO], *[("eta", value) for value in BAD_ETA], ("adaptive", "yes")],
    ids=argument_id,
)
def test_bad_value_of_one_group(backend, name, value):
    """Given to the constructor, to `add_param_group`, and written into a group later: found before a weight moves."""
    problem = Problem()
    before = problem.values()
    groups = [{"params": problem.params[:2]}, {"params": problem.params[2:], name: value}]
    with rejected(WRONG, rf"\b{name}\b", re.escape(repr(value)), r"\b1\b"):
        Lookbehind(groups, torch.optim.SGD, lr=0.1, backend=backend)
    assert_same_state(problem.values(), before)

    problem, opt = make(backend)
    extra = nn.Parameter(torch.ones(3))
    with no_change(opt), rejected(WRONG, rf"\b{name}\b", re.escape(repr(value))):
        opt.add_param_group({"params": [extra], name: value})
    assert len(opt.param_groups) == 1
    assert_same_state(extra.detach(), torch.ones(3))

    good = opt.param_groups[0][name]
    before = snapshot(opt)
    for form in FORMS:
        opt.param_groups[0][name] = value
        with rejected(WRONG, rf"\b{name}\b", re.escape(repr(value)), r"\b0\b"):
            outer_step(opt, problem, form)
        opt.param_groups[0][name] = good
        assert_same_state(snapshot(opt), before, form)
    assert_works_like_untroubled(opt, problem, backend)


def test_a_bad_value_in_a_group_is_found_before_the_first_evaluation(backend):
    problem, opt = make(backend)
    opt.param_groups[0]["rho"] = math.nan
    forwards = problem.forwards
    with rejected(ValueError, "rho", "nan"):
        opt.step(problem.closure)
    with rejected(ValueError, "rho", "nan"):
        for _ in opt.evaluations():
            pytest.fail("no evaluation may be asked for")
    assert problem.forwards == forwards


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_what_the_base_rejects_is_rejected(backend, base):
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        Lookbehind(Problem().params, base, lr=-0.1, backend=backend)
    with pytest.raises(TypeError, match="unknown_option"):
        Lookbehind(Problem().params, base, unknown_option=1, backend=backend)


@pytest.mark.parametrize("base", ["SGD", None, 3, nn.Linear, "instance of nn.Linear"])
def test_base_that_is_no_optimizer(backend, base):
    base = nn.Linear(1, 1) if base == "instance of nn.Linear" else base
    problem = Problem()
    with rejected((TypeError, ValueError), "base_optimizer", "optimizer"):
        Lookbehind(problem.params, base, backend=backend)


@pytest.mark.parametrize("as_instance", [True, False])
def test_lbfgs_calls_its_own_closure_and_is_rejected(backend, as_instance):
    problem = Problem()
    base = torch.optim.LBFGS(problem.params) if as_instance else torch.optim.LBFGS
    with rejected(WRONG, "base_optimizer", "LBFGS", "closure"):
        Lookbehind(None if as_instance else problem.params, base, backend=backend)


def test_lookbehind_around_lookbehind_is_rejected(backend):
    problem, opt = make(backend)
    with no_change(opt), rejected(WRONG, "base_optimizer", "Lookbehind"):
        Lookbehind(None, opt, backend=backend)
    assert_works_like_untroubled(opt, problem, backend)


def test_options_of_the_base_together_with_an_instance(backend):
    """They could only be ignored, and an ignored lr is a silent mistake."""
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    groups = freeze({k: v for k, v in base.param_groups[0].items() if k != "params"})
    with rejected(WRONG, "lr", "base_optimizer|instance"):
        Lookbehind(problem.params, base, lr=0.5, backend=backend)
    assert_same_state({k: v for k, v in base.param_groups[0].items() if k != "params"}, groups)


@pytest.mark.parametrize("other", ["another model", "fewer", "more", "another order", "names without the base's"])
def test_other_parameters_than_those_of_the_instance(backend, other):
    problem = Problem()
    base = torch.optim.SGD(problem.params, lr=0.1)
    params = {
        "another model": Problem().params,
        "fewer": problem.params[:-1],
        "more": [*problem.params, nn.Parameter(torch.ones(2))],
        "another order": problem.params[::-1],
        "names without the base's": list(Problem().model.named_parameters()),
    }[other]
    with rejected(WRONG, "params", "base_optimizer"):
        Lookbehind(params, base, backend=backend)


def test_no_parameters(backend):
    with rejected(ValueError, "empty|param"):
        Lookbehind([], torch.optim.SGD, lr=0.1, backend=backend)
    with rejected(WRONG, "params"):
        Lookbehind(None, torch.optim.SGD, lr=0.1, backend=backend)
    with rejected(TypeError, "param", "Tensor"):
        Lookbehind(nn.Parameter(torch.ones(2)), torch.optim.SGD, lr=0.1, backend=backend)
    with rejected(TypeError, "Tensor", "str"):
        Lookbehind(["weight"], torch.optim.SGD, lr=0.1, backend=backend)


# --------------------------------------------------------------------------------------------- parameters not supported


def shared_memory():
    memory = torch.arange(10.0)
    return nn.Parameter(memory[:6]), nn.Parameter(memory[4:])


def same_memory():
    memory = torch.arange(6.0)
    return nn.Parameter(memory), nn.Parameter(memory.view(2, 3))


def views_of_two_dtypes():
    memory = torch.zeros(6, dtype=torch.float32)
    return nn.Parameter(memory), nn.Parameter(memory[2:4].view(torch.float64))


BAD_TENSORS = {
    # name: (makes one tensor, words of the message)
    "complex": (lambda: nn.Parameter(torch.ones(2, 3, dtype=torch.complex64)), ["complex", r"\(2, 3\)|\[2, 3\]"]),
    "sparse coo": (lambda: nn.Parameter(torch.eye(3).to_sparse()), ["sparse", r"\(3, 3\)|\[3, 3\]", "float32"]),
    "sparse csr": (lambda: nn.Parameter(torch.eye(3).to_sparse_csr()), ["sparse", r"\(3, 3\)|\[3, 3\]", "float32"]),
    "meta": (lambda: nn.Parameter(torch.ones(2, 3, device="meta")), ["meta", r"\(2, 3\)|\[2, 3\]", "float32"]),
    "float8": (lambda: nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)), ["float8_e4m3fn", r"\(3,?\)|\[3\]"]),
    "expanded": (lambda: nn.Parameter(torch.ones(1).expand(4)), [r"\(4,?\)|\[4\]", "float32", "overlap|dense|stride"]),
    "windows": (
        lambda: nn.Parameter(torch.arange(6.0).as_strided((4, 3), (1, 1))),
        [r"\(4, 3\)|\[4, 3\]", "float32", "overlap|dense|stride"],
    ),
    "every other column": (lambda: nn.Parameter(torch.ones(4, 6)[:, ::2]), [r"\(4, 3\)|\[4, 3\]", "dense|stride"]),
    "first columns": (lambda: nn.Parameter(torch.ones(4, 6)[:, :3]), [r"\(4, 3\)|\[4, 3\]", "dense|stride"]),
    "every other element": (lambda: nn.Parameter(torch.ones(6)[::2]), [r"\(3,?\)|\[3\]", "dense|stride"]),
    "lazy": (lambda: nn.LazyLinear(3).weight, ["lazy|uninitiali[sz]ed"]),
    "not a leaf": (lambda: nn.Parameter(torch.ones(3)) * 2, ["leaf"]),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse.*:UserWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("form", ["plain", "named", "instance", "group", "added"])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor(backend, name, form):
    """In the middle of good ones, found by its index (and its name): at construction and in `add_param_group`."""
    make_tensor, words = BAD_TENSORS[name]
    tensor = make_tensor()
    problem = Problem()
    good = problem.params
    before = problem.values()
    if name != "not a leaf":  # torch's own message, raised by the base: it names no index
        words = [*words, r"\b2\b"]
    if form == "plain":
        with rejected(ValueError, *words):
            Lookbehind([*good[:2], tensor, *good[2:]], torch.optim.SGD, lr=0.1, backend=backend)
    elif form == "named":
        named = [("one", good[0]), ("two", good[1]), ("the.culprit", tensor), ("three", good[2])]
        words = words if name == "not a leaf" else [*words, "the.culprit"]
        with rejected(ValueError, *words):
            Lookbehind(named, torch.optim.SGD, lr=0.1, backend=backend)
    elif form == "group":
        with rejected(ValueError, *words):
            Lookbehind([{"params": good[:2]}, {"params": [tensor]}], torch.optim.SGD, lr=0.1, backend=backend)
    elif form == "instance":
        if name == "not a leaf":
            pytest.skip("torch does not make this instance")
        base = torch.optim.SGD([*good[:2], tensor, *good[2:]], lr=0.1)
        keys = list(base.param_groups[0])
        with rejected(ValueError, *words):
            Lookbehind(None, base, backend=backend)
        assert list(base.param_groups[0]) == keys
        assert len(base.state) == 0
    else:
        problem = Problem()
        opt = Lookbehind(problem.params[:2], torch.optim.SGD, lr=0.05, rho=0.2, k=2, momentum=0.9, backend=backend)
        with no_change(opt), rejected(ValueError, *words):
            opt.add_param_group({"params": [tensor, problem.params[2]]})
        assert len(opt.param_groups) == 1
        opt.add_param_group({"params": problem.params[2:]})  # nothing of the refused group stayed behind
        opt.step(problem.closure)
        twin = Problem()
        groups = [{"params": twin.params[:2]}, {"params": twin.params[2:]}]
        other = Lookbehind(groups, torch.optim.SGD, lr=0.05, rho=0.2, k=2, momentum=0.9, backend=backend)
        other.step(twin.closure)
        assert_same_state(snapshot(opt)["params"], snapshot(other)["params"])
        return
    assert_same_state(problem.values(), before)


@pytest.mark.parametrize("make_pair", [shared_memory, same_memory, views_of_two_dtypes])
@pytest.mark.parametrize("form", ["one group", "two groups", "instance", "added"])
def test_two_parameters_in_the_same_memory(backend, make_pair, form):
    """Both are named: the step of the one would change the other."""
    first, second = make_pair()
    before = [first.detach().clone(), second.detach().clone()]
    other = nn.Parameter(torch.ones(5))
    words = ["overlap|share|same memory", r"\b0\b", r"\b2\b"]
    if form == "added":
        opt = Lookbehind([first, other], torch.optim.SGD, lr=0.1, backend=backend)
        with no_change(opt), rejected(ValueError, *words):
            opt.add_param_group({"params": [second]})
        (first.square().sum() + other.square().sum()).backward()
        opt.ascent_step()
        opt.abort_step()
    else:
        with rejected(ValueError, *words):
            if form == "one group":
                Lookbehind([first, other, second], torch.optim.SGD, lr=0.1, backend=backend)
            elif form == "two groups":
                groups = [{"params": [first, other]}, {"params": [second]}]
                Lookbehind(groups, torch.optim.SGD, lr=0.1, backend=backend)
            else:
                Lookbehind(None, torch.optim.SGD([first, other, second], lr=0.1), backend=backend)
    assert_same_state([first.detach(), second.detach()], before)


def test_neighbours_in_one_memory_are_accepted(backend):
    """Views of one flat buffer that touch but do not overlap; empty ones overlap with nothing."""
    memory = torch.arange(10.0)
    params = [nn.Parameter(memory[5:]), nn.Parameter(memory[:5]), nn.Parameter(memory[3:3]), nn.Parameter(memory[3:3])]
    opt = Lookbehind(params, torch.optim.SGD, lr=0.25, rho=0.0, k=1, alpha=1.0, backend=backend)
    opt.step(lambda: sum(p.sum() for p in params).backward() or 1.0)
    assert_same_state(memory, torch.arange(10.0) - 0.25)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
@pytest.mark.parametrize("form", ["one group", "two groups", "instance", "added"])
def test_a_parameter_given_twice(backend, form):
    problem = Problem()
    first, second, third = problem.params[:3]
    if form == "added":
        problem, opt = make(backend)
        with no_change(opt), rejected(ValueError, "duplicate|more than one|twice|same tensor"):
            opt.add_param_group({"params": [problem.params[1]]})
        extra = nn.Parameter(torch.ones(2))
        with no_change(opt), rejected(ValueError, "duplicate|more than one|twice|same tensor"):
            opt.add_param_group({"params": [extra, extra]})
        assert_works_like_untroubled(opt, problem, backend)
        return
    with rejected(ValueError, "duplicate|more than one|twice|same tensor"):
        if form == "one group":
            Lookbehind([first, second, third, second], torch.optim.SGD, lr=0.1, backend=backend)
        elif form == "two groups":
            groups = [{"params": [first, second]}, {"params": [second]}]
            Lookbehind(groups, torch.optim.SGD, lr=0.1, backend=backend)
        else:
            Lookbehind(None, torch.optim.SGD([first, second, second], lr=0.1), backend=backend)


def test_bad_groups_added(backend):
    problem, opt = make(backend)
    for group, error in (
        ([nn.Parameter(torch.ones(2))], TypeError),
        ({"params": {nn.Parameter(torch.ones(2))}}, TypeError),
        ({"params": ["weight"]}, TypeError),
        ({"params": [("name", nn.Parameter(torch.ones(2)))]}, ValueError),  # the others have no names
        ({"rho": 0.1}, (KeyError, ValueError, TypeError)),
    ):
        with no_change(opt), pytest.raises(error):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1
        assert opt.param_groups is opt.base_optimizer.param_groups
    assert_works_like_untroubled(opt, problem, backend)


# -------------------------------------------------------------------------------------- closures and sequences of calls

BASES = [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop]


@pytest.mark.parametrize("closure", ["missing", None, 3, "loss", torch.ones(())], ids=repr)
def test_step_without_a_closure(backend, closure):
    problem, opt = make(backend)
    with no_change(opt), rejected(TypeError, "closure"):
        opt.step() if closure == "missing" else opt.step(closure)
    assert_works_like_untroubled(opt, problem, backend)


@pytest.mark.parametrize("base", BASES)
def test_a_closure_may_return_nothing(backend, base):
    """Its gradients decide."""
    problem, opt = make(backend, base)
    twin, other = make(backend, base)
    assert opt.step(lambda: problem.loss().backward()) is None
    other.step(twin.closure)
    assert_same_state(problem.values(), twin.values())


@pytest.mark.sample(12)
@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("base", BASES)
def test_no_backward_at_one_evaluation(backend, base, at, form):
    """At the first the step is skipped, as where a trainer skips a minibatch; later it is an error."""
    problem, opt = make(backend, base)
    skipped = pytest.warns(UserWarning, match="evaluation 0 has left no gradients .*: the step was skipped")
    with no_change(opt), skipped if at == 0 else rejected(RuntimeError, "backward|gradient", rf"\b{at}\b"):
        if form == "step":
            calls = []

            def closure():
                calls.append(1)
                return problem.loss() if len(calls) == at + 1 else problem.closure()

            opt.step(closure)
        else:
            for evaluation in opt.evaluations():
                if evaluation.index != at:
                    problem.closure()
    assert_works_like_untroubled(opt, problem, backend, base=base)


@pytest.mark.parametrize("at", ["ascent", "descent"])
@pytest.mark.parametrize("base", BASES)
def test_pair_without_backward(backend, base, at):
    problem, opt = make(backend, base)
    with no_change(opt), rejected(RuntimeError, "backward|gradient"):
        opt.zero_grad()
        if at == "descent":
            problem.closure()
            opt.ascent_step()
            opt.zero_grad()
            try:
                opt.descent_step()
            finally:
                opt.abort_step()
        else:
            opt.ascent_step()
    assert_works_like_untroubled(opt, problem, backend, base=base)


def test_backward_that_reaches_only_some_parameters_is_fine(backend):
    problem, opt = make(backend)
    before = snapshot(opt)
    opt.step(lambda: problem.params[0].square().sum().backward() or 1.0)
    after = snapshot(opt)
    assert not torch.equal(after["params"][0], before["params"][0])
    for i in (1, 2, 3):
        assert_same_state(after["params"][i], before["params"][i])
        assert_same_state(after["state"][i], before["state"][i])


class Interrupted(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def run_and_fail(opt, problem, form, at, error, moment):
    """One outer step in which evaluation `at` raises `error`."""

    def evaluate(index):
        if index == at and moment == "half way":
            problem.params[0].sum().backward()
        elif index != at or moment == "after backward":
            problem.closure()
        if index == at:
            raise error("in the closure")
        return 1.0

    drive(opt, form, evaluate, opt.k)


@pytest.mark.sample(24)
@pytest.mark.parametrize("error", [ZeroDivisionError, Interrupted, StopIteration, GeneratorExit])
@pytest.mark.parametrize("moment", ["before backward", "after backward", "half way"])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("form", ["step", "evaluations"])
def test_exception_at_any_evaluation(backend, form, reuse, moment, error):
    """Restored: the weights and the state, which on the first step is none at all."""
    for steps in (0, 1):
        problem, opt = make(backend, steps=steps, k=3, reuse_gradient=reuse)
        for at in range(4 if reuse else 6):
            with no_change(opt), pytest.raises(error):
                run_and_fail(opt, problem, form, at, error, moment)
            opt.state_dict()  # no step is open
        assert_works_like_untroubled(opt, problem, backend, steps=steps, k=3, reuse_gradient=reuse)


@pytest.mark.sample(8)
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exception_with_other_bases_and_dtypes(backend, base, dtype):
    for steps in (0, 2):
        problem, opt = make(backend, base, dtype, steps=steps, k=3)
        for at in range(4):
            with no_change(opt), pytest.raises(ZeroDivisionError):
                run_and_fail(opt, problem, "step", at, ZeroDivisionError, "after backward")
        assert_works_like_untroubled(opt, problem, backend, base=base, dtype=dtype, steps=steps, k=3)


@pytest.mark.parametrize("base", BASES)
def test_exception_when_some_parameters_have_no_state_yet(backend, base):
    """A parameter without state before the abandoned step has none after it."""
    problem, opt = make(backend, base, steps=0)
    opt.step(lambda: problem.params[0].square().sum().backward() or 1.0)
    assert set(snapshot(opt)["state"]) == {0}
    with no_change(opt), pytest.raises(ZeroDivisionError):
        run_and_fail(opt, problem, "evaluations", 2, ZeroDivisionError, "before backward")


def never():
    pytest.fail("the inner step may not begin")


INNER = {
    "step": lambda opt: opt.step(never),
    "evaluations": lambda opt: [never() for _ in opt.evaluations()],
    "ascent_step": lambda opt: opt.ascent_step(),
    "descent_step": lambda opt: opt.descent_step(),
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", ["step", "evaluations"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("swallow", [True, False])
def test_a_step_inside_a_step(backend, outer, inner, at, swallow):
    """Refused; the outer step goes on undisturbed, or is restored if its caller lets the error through."""
    problem, opt = make(backend)

    def evaluate(index):
        loss = problem.closure()
        if index == at and swallow:
            with no_change(opt), rejected(RuntimeError, "open|inside|already|running"):
                INNER[inner](opt)
        elif index == at:
            INNER[inner](opt)
        return loss

    if swallow:
        drive(opt, outer, evaluate, opt.k)
        assert_works_like_untroubled(opt, problem, backend, steps=2)
    else:
        with no_change(opt), rejected(RuntimeError, "open|inside|already|running"):
            drive(opt, outer, evaluate, opt.k)
        assert_works_like_untroubled(opt, problem, backend)


@pytest.mark.parametrize("inner", ["step", "evaluations"])
@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_step_between_the_calls_of_a_pair(backend, inner, calls):
    """Refused, also between two pairs of one outer step; the pairs can be completed."""
    problem, opt = make(backend)
    for call in range(4):
        opt.zero_grad()
        problem.closure()
        opt.descent_step() if call % 2 else opt.ascent_step()
        if call + 1 == calls:
            with no_change(opt), rejected(RuntimeError, "open|inside|already|running"):
                INNER[inner](opt)
    assert_works_like_untroubled(opt, problem, backend, steps=2)


def test_ascent_twice_and_descent_first(backend):
    """Refused without effect: the pair that was begun can still be completed."""
    problem, opt = make(backend, k=2)
    problem.closure()
    with no_change(opt), rejected(RuntimeError, "descent_step", "ascent_step"):
        opt.descent_step()
    opt.zero_grad()
    for _ in range(2):
        problem.closure()
        opt.ascent_step()
        opt.zero_grad()
        problem.closure()
        with no_change(opt), rejected(RuntimeError, "ascent_step", "descent_step"):
            opt.ascent_step()
        opt.descent_step()
        with no_change(opt), rejected(RuntimeError, "descent_step", "ascent_step"):
            opt.descent_step()
        opt.zero_grad()
    twin, other = make(backend, k=2)
    outer_step(other, twin, "pairs")
    assert_same_state(snapshot(opt), snapshot(other) | {"identities": snapshot(opt)["identities"]})
    assert_works_like_untroubled(opt, problem, backend, steps=2, k=2)


CHECKPOINTING = {
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict(copy.deepcopy(SAVED)),
    "deepcopy": lambda opt: copy.deepcopy(opt),
    "pickle": lambda opt: pickle.dumps(opt),
    "add_param_group": lambda opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
}
SAVED = {"state": {}, "param_groups": []}  # refused because a step is open, before anything is looked at


@pytest.mark.sample(12)
@pytest.mark.parametrize("action", CHECKPOINTING)
@pytest.mark.parametrize("form", FORMS)
def test_no_checkpoint_of_an_open_step(backend, form, action):
    """At every evaluation, perturbed or not; the step goes on as if nobody had asked."""
    problem, opt = make(backend)

    def evaluate(index):
        loss = problem.closure()
        if form != "pairs" or index > 0:  # a step of pairs is opened by its first ascent
            with no_change(opt), rejected(RuntimeError, "open|inside|step"):
                CHECKPOINTING[action](opt)
        return loss

    drive(opt, form, evaluate, opt.k)
    opt.state_dict()
    assert_works_like_untroubled(opt, problem, backend, steps=2)


# ----------------------------------------------------------------------------------------------------- sparse gradients


class Sparse(Problem):
    """An embedding with sparse gradients before a dense layer."""

    def __init__(self, sparse=True):
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(6, 5, sparse=sparse), nn.Linear(5, 3))
        with torch.no_grad():
            for i, p in enumerate(self.params):
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) + i)
        self.inputs = torch.tensor([0, 2, 2, 5, 1, 0, 3, 3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_sparse_gradients(backend, base, form):
    problem = Sparse()
    opt = Lookbehind(problem.model.named_parameters(), base, lr=0.1, backend=backend)
    with no_change(opt), rejected((RuntimeError, ValueError), "sparse", r"0\.weight", r"\(6, 5\)|\[6, 5\]"):
        outer_step(opt, problem, form)
    opt.state_dict()
    problem.model[0].sparse = False
    dense = Sparse(sparse=False)
    other = Lookbehind(dense.model.named_parameters(), base, lr=0.1, backend=backend)
    opt.zero_grad()
    outer_step(opt, problem, form)
    outer_step(other, dense, form)
    assert_same_state(problem.values(), dense.values())


@pytest.mark.parametrize("at", [1, 2])
def test_sparse_gradient_at_a_later_evaluation(backend, at):
    problem = Sparse(sparse=False)
    opt = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    opt.step(problem.closure)
    with no_change(opt), rejected((RuntimeError, ValueError), "sparse", r"\b0\b"):
        for evaluation in opt.evaluations():
            problem.model[0].sparse = evaluation.index == at
            problem.closure()


def test_sparse_adam_moves_nothing(backend):
    """Its gradients are sparse, which the perturbation cannot take: refused when built or at the first step."""
    problem = Sparse()
    before = problem.values()
    with rejected((RuntimeError, ValueError), "sparse"):
        Lookbehind(problem.params[:1], torch.optim.SparseAdam, lr=0.1, backend=backend).step(problem.closure)
    assert_same_state(problem.values(), before)


# ---------------------------------------------------------------------------------------- parameters replaced and moved


def test_rows_cut_off_between_steps(backend):
    """The same memory with the same strides, so that only the gradients tell: named, and nothing has moved."""
    params = [
        torch.nn.Parameter(torch.ones(5)),
        torch.nn.Parameter(torch.randn(3, 7)),
        torch.nn.Parameter(torch.ones(2)),
    ]

    def closure():
        for p in params:  # autograd itself remembers the shape
            p.grad = p.detach().clone()
        return 0.0

    opt = Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    opt.step(closure)
    original = params[1].data
    params[1].data = original[:2]
    before = [p.detach().clone() for p in params]
    with rejected(RuntimeError, r"\b1\b", r"\(3, 7\)", r"\(2, 7\)"):
        opt.step(closure)
    for p, value in zip(params, before, strict=True):
        assert torch.equal(p.detach(), value)
    params[1].data = original
    opt.step(closure)


@pytest.mark.sample(12)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("change", ["shape", "same size"])
def test_data_replaced_between_steps(backend, change, base):
    """Found at the next step, with the tensor's index and both descriptions; put back, it all goes on."""
    problem, opt = make(backend, base)
    p = problem.params[2]
    original = p.data
    replacement, words = {
        "shape": (torch.ones(4, 7), [r"\(4, 7\)|\[4, 7\]", r"\(3, 7\)|\[3, 7\]"]),
        "same size": (torch.ones(7, 3), [r"\(7, 3\)|\[7, 3\]", r"\(3, 7\)|\[3, 7\]"]),
    }[change]
    forwards = problem.forwards
    for form in ("step", "evaluations"):
        p.data = replacement
        values = problem.values()
        state = snapshot(opt)["state"]
        with rejected(RuntimeError, r"\b2\b", *words):
            outer_step(opt, problem, form)
        assert_same_state(problem.values(), values)
        assert_same_state(snapshot(opt)["state"], state)
        p.data = original
        opt.state_dict()
    assert problem.forwards == forwards, "before the first evaluation"
    assert_works_like_untroubled(opt, problem, backend, base=base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameter_replaced_in_its_group_between_steps(backend, dtype):
    """By another one, whatever its shape: it is trained from then on, as torch does."""
    problem, opt = make(backend)
    group = opt.param_groups[0]
    group["params"][2] = new = nn.Parameter(torch.ones(4, 7, dtype=dtype))
    before = problem.values()

    def closure():
        (new.sum() ** 2).backward()
        return problem.closure()

    opt.step(closure)
    assert float(new.detach().max()) < 1
    assert_same_state(problem.values()[2], before[2])
    assert not torch.equal(problem.values()[0], before[0])


def test_parameter_replaced_by_one_without_memory(backend):
    problem, opt = make(backend)
    group = opt.param_groups[0]
    original = group["params"][2]
    group["params"][2] = nn.Parameter(torch.ones(3, 7, device="meta"))
    values = problem.values()
    with rejected((RuntimeError, ValueError), r"\b2\b"):
        opt.step(problem.closure)
    assert_same_state(problem.values(), values)
    group["params"][2] = original
    assert_works_like_untroubled(opt, problem, backend)


@pytest.mark.sample(12)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 2])
def test_model_converted_inside_an_open_step(backend, form, dtype, at):
    """Refused; converted back, the model has its slow weights (as `dtype` holds them) and the base its state."""
    problem, opt = make(backend, k=2)
    before = snapshot(opt)
    seen = []

    def evaluate(index):
        loss = problem.closure()
        if index == at:
            seen.append(index)
            problem.model.to(dtype)
        return loss

    with rejected(RuntimeError, r"float64|float16", "float32|moved|changed|replaced"):
        drive(opt, form, evaluate, opt.k)
    assert seen == [at]
    opt.abort_step()
    opt.zero_grad()
    problem.model.float()
    after = snapshot(opt)
    assert_same_state(after["state"], before["state"])
    if dtype is torch.float64:
        assert_same_state(after["params"], before["params"])
    else:
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
        for a, b in zip(after["params"], before["params"], strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    with torch.no_grad():
        for p, value in zip(problem.params, before["params"], strict=True):
            p.copy_(value)
    assert_works_like_untroubled(opt, problem, backend, k=2)


def test_moved_memory_inside_an_open_step_never_gives_a_wrong_answer(backend):
    """Same shape and dtype at a new address: an error with everything restored, or the right step."""
    for at in range(3):
        problem, opt = make(backend, k=2)
        before = snapshot(opt)
        try:
            for evaluation in opt.evaluations():
                problem.closure()
                if evaluation.index == at:
                    for p in problem.params:
                        p.data = p.data.clone()
        except RuntimeError:
            assert_same_state(snapshot(opt), before)
            steps = 1
        else:
            steps = 2
        assert_works_like_untroubled(opt, problem, backend, steps=steps, k=2)


@pytest.mark.parametrize("base", BASES)
def test_moved_memory_between_steps_keeps_working(backend, base):
    problem, opt = make(backend, base)
    for _ in range(2):
        for p in problem.params:
            p.data = p.data.clone()
        outer_step(opt, problem)
    assert_works_like_untroubled(opt, problem, backend, base=base, steps=3)


class Pulled:
    """Four-dimensional weights, each drawn towards its target: a loss whose gradient does not depend on the layout."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Sequential(nn.Conv2d(3, 4, (2, 3)), nn.Conv2d(4, 5, 2)).double()
        self.targets = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.model.parameters()]
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def closure(self):
        pairs = zip(self.model.parameters(), self.targets, strict=True)
        loss = sum(((p - t) ** 2 * (1 + t.abs())).sum() for p, t in pairs)
        loss.backward()
        return loss


@pytest.mark.parametrize("alpha", [0.5, "adaptive"])
@pytest.mark.parametrize("base", BASES)
def test_memory_format_changed_between_steps(backend, base, alpha):
    """To channels-last and back: the buffers of the state follow their elements."""
    results = []
    for converts in (False, True):
        problem = Pulled()
        options = {"momentum": 0.9} if base is torch.optim.SGD else {}
        params = list(problem.model.parameters())
        opt = Lookbehind(params, base, lr=0.02, rho=0.3, k=3, alpha=alpha, backend=backend, **options)
        for step in range(5):
            if converts and step in (1, 3):
                problem.model.to(memory_format=torch.channels_last if step == 1 else torch.contiguous_format)
                assert params[0].is_contiguous() == (step == 3)
                opt.zero_grad()
            outer_step(opt, problem)
        results.append(snapshot(opt))
    for a, b in zip(results[1]["params"], results[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for i, entry in results[0]["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(results[1]["state"][i][key], value, rtol=1e-12, atol=1e-13)


# -------------------------------------------------------------------------------------------------------- state to load


def saved(backend, problem=None, base=torch.optim.SGD, steps=2, **options):
    """The state_dict of an optimizer of this `problem`."""
    problem = problem or Problem()
    options = {"lr": 0.05, "rho": 0.2, "k": 2} | ({"momentum": 0.9} if base is torch.optim.SGD else {}) | options
    opt = Lookbehind(options.pop("params", problem.params), base, backend=backend, **options)
    for _ in range(steps):
        outer_step(opt, problem)
    return opt.state_dict()


class Other(Problem):
    """The same number of parameters, other shapes."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


class Larger(Problem):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3))


def two_groups(backend):
    problem = Problem()
    return saved(backend, problem, params=[{"params": problem.params[:2]}, {"params": problem.params[2:]}])


def edited(backend, edit):
    sd = copy.deepcopy(saved(backend))
    edit(sd)
    return sd


BAD_STATE = {
    "a bad k": (lambda b: edited(b, lambda sd: sd["param_groups"][0]["lookbehind"].update(k=0)), [r"\bk\b", ">= 1"]),
    "a bad alpha": (lambda b: edited(b, lambda sd: sd["param_groups"][0]["lookbehind"].update(alpha=2)), ["alpha"]),
    "other shapes": (lambda b: saved(b, Other()), [r"\b0\b", r"6, 5", r"7, 5"]),
    "more parameters": (lambda b: saved(b, Larger()), ["param|size|group"]),
    "two groups": (two_groups, ["group"]),
    "Adam": (lambda b: saved(b, base=torch.optim.Adam), ["Adam", "SGD"]),
    "Adam, no step made": (lambda b: saved(b, base=torch.optim.Adam, steps=0), ["Adam", "SGD"]),
    "RMSprop": (lambda b: saved(b, base=torch.optim.RMSprop), ["RMSprop", "SGD"]),
    "an empty dict": (lambda b: {}, ["param_groups|state"]),
    "no groups": (lambda b: edited(b, lambda sd: sd.pop("param_groups")), ["param_groups"]),
    "no state": (lambda b: edited(b, lambda sd: sd.pop("state")), ["state"]),
    "None": (lambda b: None, ["state_dict|dict"]),
    "a list": (lambda b: [1, 2], ["state_dict|dict"]),
    "state that is a number": (lambda b: edited(b, lambda sd: sd.update(state=3)), ["state"]),
    "groups that are a number": (lambda b: edited(b, lambda sd: sd.update(param_groups=3)), ["param_groups"]),
    "lookbehind that is a number": (lambda b: edited(b, lambda sd: sd.update(lookbehind=3)), ["lookbehind"]),
    "a buffer of another shape": (
        lambda b: edited(b, lambda sd: sd["state"][1].update(momentum_buffer=torch.ones(9))),
        [r"\b1\b", "momentum_buffer", r"\b9\b", r"\b7\b"],
    ),
    "a buffer that is a word": (
        lambda b: edited(b, lambda sd: sd["state"][1].update(momentum_buffer="abc")),
        ["momentum_buffer"],
    ),
    "negative rho": (lambda b: edited(b, lambda sd: sd["param_groups"][0].update(rho=-1.0)), ["rho", "-1"]),
    "rho nan": (lambda b: edited(b, lambda sd: sd["param_groups"][0].update(rho=math.nan)), ["rho", "nan"]),
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", BAD_STATE)
def test_bad_state_dict(backend, name, steps):
    make_state, words = BAD_STATE[name]
    state_dict = make_state(backend)
    problem, opt = make(backend, steps=steps)
    with no_change(opt), rejected(WRONG, *words):
        opt.load_state_dict(state_dict)
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    assert_works_like_untroubled(opt, problem, backend, steps=steps)


@pytest.mark.parametrize("name", ["a bad k", "other shapes", "Adam", "more parameters"])
def test_a_state_dict_of_something_else_is_a_value_error(backend, name):
    _, opt = make(backend)
    state_dict = BAD_STATE[name][0](backend)
    with rejected(ValueError):
        opt.load_state_dict(state_dict)


@pytest.mark.parametrize("wrapped", [True, False])
def test_plain_state_of_another_optimizer(backend, wrapped):
    """A torch state_dict has no name of its class; what it holds gives it away."""
    problem = Problem()
    plain = torch.optim.Adam(problem.params)
    for _ in range(2):
        problem.closure()
        plain.step()
    state_dict = plain.state_dict()
    if wrapped:
        state_dict = saved(backend, base=torch.optim.Adam)
        del state_dict["lookbehind"]
    problem, opt = make(backend)
    with no_change(opt), rejected(ValueError, "exp_avg|betas|momentum|SGD"):
        opt.load_state_dict(state_dict)
    assert_works_like_untroubled(opt, problem, backend)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_plain_state_of_another_model(backend, base):
    """As many parameters, other shapes: torch would only fail in the middle of the next step, or broadcast.

    Only where the state is known to have the parameter's shape: Adafactor's, say, has not.
    """
    state_dict = saved(backend, Other(), base=base)
    del state_dict["lookbehind"]
    problem, opt = make(backend, base)
    with no_change(opt), rejected(ValueError, r"\b0\b", r"6, 5", r"7, 5"):
        opt.load_state_dict(state_dict)
    assert_works_like_untroubled(opt, problem, backend, base=base)
