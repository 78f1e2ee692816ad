"""Saving and resuming: state dicts that torch could have written, runs that go on to the last bit as if unbroken."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from lookbehind_fused import Lookbehind
from tests.conftest import assert_same_state, assert_torchs_weights, drive
from tests.test_optimizer import Problem, freeze, norm, outer_step, plain_step, snapshot

ROOT = Path(__file__).resolve().parent.parent


class Partial(Problem):
    """One parameter is frozen, one has a gradient in every other step only, one has its first in the fourth step."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__(dtype, seed)
        self.params[1].requires_grad_(False)
        self.steps = 0

    def loss(self):
        weight, bias, last_weight, last_bias = self.params
        last_weight = last_weight if self.steps % 2 == 0 else last_weight.detach()
        last_bias = last_bias if self.steps >= 3 else last_bias.detach()
        hidden = linear(self.inputs, weight, bias).tanh()
        return (linear(hidden, last_weight, last_bias) - self.targets).square().mean()


def train(opt, problem, steps):
    for _ in range(steps):
        outer_step(opt, problem)
        problem.steps += 1


# ---------------------------------------------------------------------------------------- what torch would have written

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.05}),
    "AdamW amsgrad": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
}


def assert_same_order(actual, expected):
    """The keys of nested dicts come in the same order too, as `torch.save` writes them."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same_order(actual[key], value)


@pytest.mark.sample(24)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", BASES)
def test_state_dict_is_what_torch_would_have_written(backend, name, steps, dtype):
    """With rho = 0, k = 1, alpha = 1: keys, order, types, shapes and every bit, plus three entries in each group."""
    base, options = BASES[name]
    problem, twin = Partial(dtype), Partial(dtype)
    opt = Lookbehind(
        [{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 0.025}],
        base,
        rho=0.0,
        k=1,
        alpha=1.0,
        backend=backend,
        foreach=False,
        **options,
    )
    plain = base([{"params": twin.params[:1]}, {"params": twin.params[1:], "lr": 0.025}], foreach=False, **options)
    for _ in range(steps):
        train(opt, problem, 1)
        before = plain_step(plain, twin)
        twin.steps += 1
        assert_torchs_weights(backend, base, problem.params, twin.params, before)
    for ours in (opt.state_dict(), opt.base_optimizer.state_dict()):
        theirs = plain.state_dict()
        assert_same_order(ours["state"], theirs["state"])
        assert_same_state(ours["state"], theirs["state"])
        for mine, group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert set(mine) - {"lookbehind"} == set(group) | {"rho", "adaptive", "eta"}
            assert_same_state({key: mine[key] for key in group}, group)
    assert set(opt.state_dict()) == {"state", "param_groups", "lookbehind"}
    assert set(opt.base_optimizer.state_dict()) == {"state", "param_groups"}


@pytest.mark.parametrize("name", BASES)
def test_state_dict_after_inner_steps_has_torchs_form(backend, name):
    """k = 3 and a perturbation: the values are others, the form is that of a torch optimizer after 3 steps each."""
    base, options = BASES[name]
    problem, twin = Problem(), Problem()
    opt = Lookbehind(problem.params, base, rho=0.1, k=3, alpha="adaptive", backend=backend, **options)
    plain = base(twin.params, **options)
    for _ in range(2):
        outer_step(opt, problem)
        plain_step(plain, twin, k=3)
    ours, theirs = opt.state_dict()["state"], plain.state_dict()["state"]
    assert_same_order(ours, theirs)
    for index, entry in theirs.items():
        for key, value in entry.items():
            assert (ours[index][key].dtype, ours[index][key].shape) == (value.dtype, value.shape)
            assert ours[index][key].stride() == value.stride()
        if "step" in entry:
            assert ours[index]["step"].item() == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW amsgrad", "RMSprop"])
def test_state_of_low_precision_parameters_is_float32(backend, name, dtype):
    base, options = BASES[name]
    problem = Problem(dtype)
    opt = Lookbehind(problem.params, base, k=2, backend=backend, **options)
    outer_step(opt, problem)
    dtypes = {value.dtype for entry in opt.state_dict()["state"].values() for value in entry.values()}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("part", ["lookbehind", "base"])
@pytest.mark.parametrize("name", BASES)
def test_a_plain_torch_optimizer_continues_from_our_state(backend, name, part):
    base, options = BASES[name]
    problem, twin = Problem(), Problem()
    opt = Lookbehind(problem.params, base, rho=0.0, k=2, alpha=1.0, backend=backend, **options)
    for _ in range(3):
        outer_step(opt, problem)
    twin.model.load_state_dict(problem.model.state_dict())
    plain = base(twin.params, lr=9.0, foreach=False)
    state_dict = copy.deepcopy((opt if part == "lookbehind" else opt.base_optimizer).state_dict())
    for group in state_dict["param_groups"]:
        group["foreach"] = False
    plain.load_state_dict(state_dict)
    for _ in range(3):
        outer_step(opt, problem)
        before = plain_step(plain, twin, k=2)
        assert_torchs_weights(backend, base, problem.params, twin.params, before, 2)
    assert_same_state(opt.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("through", ["lookbehind", "base"])
@pytest.mark.parametrize("name", BASES)
def test_we_continue_from_the_state_of_a_plain_torch_optimizer(backend, name, through):
    """Its groups have no rho, so the present one of each group stays."""
    base, options = BASES[name]
    problem, twin = Problem(), Problem()
    plain = base([{"params": twin.params[:1]}, {"params": twin.params[1:]}], foreach=False, **options)
    for _ in range(3):
        plain_step(plain, twin)
    problem.model.load_state_dict(twin.model.state_dict())
    groups = [{"params": problem.params[:1], "rho": 0.0}, {"params": problem.params[1:], "rho": 0.0, "eta": 0.5}]
    opt = Lookbehind(groups, base, rho=0.7, k=2, alpha=1.0, backend=backend, lr=9.0)
    target = opt if through == "lookbehind" else opt.base_optimizer
    target.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group["rho"] for group in opt.param_groups] == [0.0, 0.0]
    assert [group["eta"] for group in opt.param_groups] == [0.01, 0.5]
    assert [group["lr"] for group in opt.param_groups] == [options["lr"]] * 2
    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    for _ in range(3):
        outer_step(opt, problem)
        before = plain_step(plain, twin, k=2)
        assert_torchs_weights(backend, base, problem.params, twin.params, before, 2)
    assert_same_state(opt.state_dict()["state"], plain.state_dict()["state"])


def test_a_checkpoint_is_no_larger_than_torchs(backend):
    """The state's tensors are views; what is saved with them is the state and no working memory."""
    sizes = []
    for wrapped in (True, False):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (4096, 1, 3, 2048)]
        base = torch.optim.Adam(params)
        opt = Lookbehind(None, base, k=3, alpha="adaptive", backend=backend) if wrapped else base

        def closure(params=params):
            opt.zero_grad()  # noqa: B023
            loss = sum(p.square().sum() for p in params)
            loss.backward()
            return loss

        opt.step(closure)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] < sizes[1] + 2048  # alignment of eight slices, a few more entries


# ----------------------------------------------------------------------------------------------------- bit-exact resume

RUNS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": (name, dtype, settings)
    for name, dtype, settings in [
        *[(name, torch.float32, {"k": 2}) for name in BASES],
        *[(name, torch.bfloat16, {"k": 2}) for name in ("SGD momentum", "AdamW amsgrad", "RMSprop")],
        *[(name, torch.float16, {"k": 2}) for name in ("SGD momentum", "Adam", "RMSprop")],
        *[(name, torch.float64, {"k": 1, "alpha": 1.0}) for name in ("SGD nesterov", "Adam", "RMSprop")],
    ]
}
RUNS |= {
    "adaptive, k = 3, ASAM": ("SGD momentum", torch.float32, {"k": 3, "alpha": "adaptive", "adaptive": True}),
    "by tensor, clipped": (
        "Adam",
        torch.bfloat16,
        {"k": 4, "alpha": "adaptive", "alpha_scope": "tensor", "max_grad_norm": 0.1},
    ),
    "2k form": ("AdamW amsgrad", torch.float32, {"k": 2, "reuse_gradient": False}),
}
BEFORE, AFTER = 2, 3  # outer steps before and after the interruption; the last bias has its first gradient after it


def start(run, backend, seed=0):
    """The problem and the optimizer of a run."""
    name, dtype, settings = RUNS[run]
    base, options = BASES[name]
    problem = Partial(dtype, seed)
    return problem, Lookbehind(problem.params, base, rho=0.2, backend=backend, **settings, **options)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESTORES = {
    "state_dict": lambda old, new: new.load_state_dict(old.state_dict()),
    "a file": lambda old, new: new.load_state_dict(through_a_file(old.state_dict())),
    "the base's state_dict": lambda old, new: new.base_optimizer.load_state_dict(
        copy.deepcopy(old.base_optimizer.state_dict())
    ),
    "the base's in a file": lambda old, new: new.base_optimizer.load_state_dict(
        through_a_file(old.base_optimizer.state_dict())
    ),
    "the base's through ours": lambda old, new: new.load_state_dict(old.base_optimizer.state_dict()),
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("run", RUNS)
def test_resume_is_bit_exact(backend, run, restore):
    """The first run goes on before the second one does: what was loaded must not share memory with it."""
    problem, opt = start(run, backend)
    train(opt, problem, BEFORE)
    other, resumed = start(run, backend, seed=1)
    other.model.load_state_dict(problem.model.state_dict())
    other.steps = problem.steps
    RESTORES[restore](opt, resumed)
    assert_same_state(snapshot(resumed)["state"], snapshot(opt)["state"], "as loaded")
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    train(opt, problem, AFTER)
    train(resumed, other, AFTER)
    for key in ("params", "state", "groups"):
        assert_same_state(snapshot(resumed)[key], snapshot(opt)[key], key)
    assert_same_state(resumed.diagnostics, opt.diagnostics)
    started, _ = start(run, backend)
    assert not torch.equal(problem.params[0], started.params[0])


@pytest.mark.sample(24)
@pytest.mark.parametrize(
    "run", ["SGD momentum, float32", "AdamW amsgrad, bfloat16", "RMSprop, float32", "RMSprop, float16"]
)
@pytest.mark.parametrize("restore", RESTORES)
@pytest.mark.parametrize("twice", [False, True])
def test_load_into_an_optimizer_that_has_made_steps(backend, run, restore, twice):
    """What it had is gone: state, counters, also of parameters that the loaded state does not know."""
    problem, opt = start(run, backend)
    train(opt, problem, BEFORE)
    other, resumed = start(run, backend, seed=1)
    train(resumed, other, 5)
    for _ in range(1 + twice):
        RESTORES[restore](opt, resumed)
        other.model.load_state_dict(problem.model.state_dict())
        other.steps = problem.steps
    assert_same_state(snapshot(resumed)["state"], snapshot(opt)["state"])
    for steps in (1, 2):
        train(opt, problem, steps)
        train(resumed, other, steps)
        for key in ("params", "state", "groups"):
            assert_same_state(snapshot(resumed)[key], snapshot(opt)[key], key)


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    "run", ["SGD momentum, float32", "Adam, float32", "RMSprop, float32", "AdamW amsgrad, bfloat16"]
)
@pytest.mark.parametrize("restore", RESTORES)
def test_go_back_to_an_earlier_checkpoint(backend, run, restore):
    """A checkpoint of this very optimizer, also one with no state at all, loaded after it has gone on."""
    for steps in (0, 2):
        problem, opt = start(run, backend)
        train(opt, problem, steps)
        expected, saved = start(run, backend)
        train(saved, expected, steps)
        weights = copy.deepcopy(problem.model.state_dict())
        train(opt, problem, 4)
        RESTORES[restore](saved, opt)
        problem.model.load_state_dict(weights)
        problem.steps = steps
        train(opt, problem, 2)
        train(saved, expected, 2)
        for key in ("params", "state"):
            assert_same_state(snapshot(opt)[key], snapshot(saved)[key], f"{key} after going back to step {steps}")


def resume_in_this_process(folder, backend):
    """The other side of the next test: continue every run that lies in `folder` and write down where it ends."""
    torch.set_num_threads(1)
    for run, saved in torch.load(Path(folder) / "saved.pt", weights_only=True).items():
        for part in ("lookbehind", "base"):
            problem, opt = start(run, backend, seed=1)
            problem.model.load_state_dict(saved["model"])
            problem.steps = BEFORE
            (opt if part == "lookbehind" else opt.base_optimizer).load_state_dict(saved[part])
            train(opt, problem, AFTER)
            saved[f"{part} ends"] = {key: snapshot(opt)[key] for key in ("params", "state")}
        torch.save(saved, Path(folder) / f"{list(RUNS).index(run)}.pt")


@pytest.mark.sample(1)
def test_resume_in_a_new_process(backend, tmp_path):
    """All runs in one new process: from our state_dict and from the base's alone."""
    runs, saved = {}, {}
    for run in RUNS:
        problem, opt = runs[run] = start(run, backend)
        train(opt, problem, BEFORE)
        saved[run] = {
            "model": problem.model.state_dict(),
            "lookbehind": opt.state_dict(),
            "base": opt.base_optimizer.state_dict(),
        }
    torch.save(saved, tmp_path / "saved.pt")
    code = f"from tests.test_checkpoint import resume_in_this_process as go; go({str(tmp_path)!r}, {backend!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, (run, (problem, opt)) in enumerate(runs.items()):
        train(opt, problem, AFTER)
        ended = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        for part in ("lookbehind", "base"):
            for key in ("params", "state"):
                assert_same_state(ended[f"{part} ends"][key], snapshot(opt)[key], f"{run}, {part}: {key}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])
@pytest.mark.parametrize("through", ["lookbehind", "base"])
def test_loading_does_not_round_the_state_to_the_parameters_dtype(backend, name, dtype, through):
    """torch's own `load_state_dict` would: the loaded values must have bits that the low precision cannot hold."""
    base, options = BASES[name]
    problem, other = Problem(dtype), Problem(dtype)
    opt = Lookbehind(problem.params, base, backend=backend, **options)
    outer_step(opt, problem)
    resumed = Lookbehind(other.params, base, backend=backend, **options)
    target = resumed if through == "lookbehind" else resumed.base_optimizer
    target.load_state_dict(copy.deepcopy(opt.base_optimizer.state_dict()))
    rounded = 0
    for mine, theirs in zip(other.params, problem.params, strict=True):
        assert_same_state(dict(resumed.state[mine]), dict(opt.state[theirs]))
        for key, value in resumed.state[mine].items():
            assert value.dtype is torch.float32
            rounded += int((value.to(dtype).float() != value).sum()) if key != "step" else 0
    assert rounded > 50


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("part", ["lookbehind", "base"])
def test_loaded_state_and_the_given_dict_do_not_share_memory(backend, name, part):
    """Training does not write into the dict, and writing into the dict does not disturb training."""
    base, options = BASES[name]
    problem = Problem()
    opt = Lookbehind(problem.params, base, k=2, backend=backend, **options)
    for _ in range(2):
        outer_step(opt, problem)
    state_dict = copy.deepcopy((opt if part == "lookbehind" else opt.base_optimizer).state_dict())
    expected = freeze(state_dict)
    ends = []
    for spoil in (False, True):
        other = Problem(seed=1)
        resumed = Lookbehind(other.params, base, k=2, backend=backend, **options)
        resumed.load_state_dict(state_dict)
        if spoil:
            for entry in state_dict["state"].values():
                for value in entry.values():
                    value.fill_(1e6)
            for group in state_dict["param_groups"]:
                group.update(lr=1e6, rho=1e6)
                group["params"].clear()
        for _ in range(2):
            outer_step(resumed, other)
        if not spoil:
            assert_same_state(state_dict, expected)
        ends.append(snapshot(resumed))
    for key in ("params", "state", "groups"):
        assert_same_state(ends[1][key], ends[0][key], key)


def test_param_groups_are_restored_and_take_effect(backend):
    def build(seed):
        problem = Problem(torch.float64, seed)
        groups = [{"params": problem.params[:2]}, {"params": problem.params[2:]}]
        return problem, Lookbehind(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, k=1, backend=backend)

    problem, opt = build(0)
    opt.param_groups[0].update(rho=0.5, lr=0.03, weight_decay=0.1)
    opt.param_groups[1].update(rho=0.25, momentum=0.5, adaptive=True, eta=0.125)
    outer_step(opt, problem)
    other, resumed = build(1)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    assert_same_state(snapshot(resumed)["groups"], snapshot(opt)["groups"])
    slow, grads = other.values(), []
    for evaluation in resumed.evaluations():
        if evaluation.index == 1:
            scale = [torch.ones_like(w) for w in slow[:2]] + [w.abs() + 0.125 for w in slow[2:]]
            length = norm([t * g for t, g in zip(scale, grads, strict=True)])
            for p, w, t, g, rho in zip(other.params, slow, scale, grads, [0.5, 0.5, 0.25, 0.25], strict=True):
                torch.testing.assert_close(p.detach(), w + rho * t * t * g / length, rtol=1e-13, atol=1e-14)
        other.closure()
        grads = other.grads()


def test_a_scheduler_made_before_loading_goes_on_with_the_loaded_lr(backend):
    problem, opt = start("SGD momentum, float32", backend)
    opt.param_groups[0]["lr"] = 0.5
    train(opt, problem, 1)
    for on in ("lookbehind", "base"):
        other, resumed = start("SGD momentum, float32", backend)
        scheduled = resumed if on == "lookbehind" else resumed.base_optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 1, gamma=0.5)
        resumed.load_state_dict(opt.state_dict())
        train(resumed, other, 1)
        scheduler.step()
        assert resumed.param_groups[0]["lr"] == 0.25


# ------------------------------------------------------------------------------------------------- copying and pickling

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "a copy of a copy": lambda pair: copy.deepcopy(copy.deepcopy(pair)),
}


@pytest.mark.sample(24)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "run",
    ["SGD momentum, float32", "Adam, float32", "RMSprop, float32", "AdamW amsgrad, bfloat16", "adaptive, k = 3, ASAM"],
)
def test_a_copy_trains_on_identically_and_independently(backend, run, steps, how):
    problem, opt = start(run, backend)
    train(opt, problem, steps)
    other, copied = COPIES[how]((problem, opt))
    assert type(copied) is Lookbehind
    assert [id(p) for group in copied.param_groups for p in group["params"]] == [id(p) for p in other.params]
    assert not {id(p) for p in other.params} & {id(p) for p in problem.params}
    assert copied.param_groups is copied.base_optimizer.param_groups
    assert copied.state is copied.base_optimizer.state
    for name in (
        "k",
        "alpha",
        "alpha_scope",
        "reuse_gradient",
        "max_grad_norm",
        "nonfinite",
        "loss_scale",
        "backend",
        "defaults",
    ):
        assert getattr(copied, name) == getattr(opt, name), name
    before = snapshot(opt)
    train(copied, other, AFTER)
    assert_same_state(snapshot(opt), before, "the original")
    ended = snapshot(copied)
    train(opt, problem, AFTER)
    assert_same_state(snapshot(copied), ended, "the copy")
    for key in ("params", "state", "groups"):
        assert_same_state(snapshot(opt)[key], ended[key], key)


def test_a_copy_goes_on_with_everything_it_can_do(backend):
    """State dicts, groups, the other forms of a step, hooks; a scheduler on the original does not come along."""
    problem, opt = start("SGD momentum, float32", backend)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    train(opt, problem, 1)
    scheduler.step()
    other, copied = copy.deepcopy((problem, opt))
    assert copied.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.05
    fired = []
    copied.register_step_post_hook(lambda *_: fired.append(1))
    for form in ("step", "evaluations", "pairs"):
        outer_step(copied, other, form)
        other.steps += 1
    assert fired == [1, 1, 1]
    copied.load_state_dict(opt.state_dict())
    extra = torch.nn.Parameter(torch.ones(3))
    copied.add_param_group({"params": [extra]})
    drive(copied, "step", lambda index: other.closure() + (extra.square().sum().backward() or 0.0), copied.k)
    assert not torch.equal(extra, torch.ones(3))
    assert len(opt.param_groups) == 1


def test_fresh_copies_of_the_same_pickle_are_independent(backend):
    problem, opt = start("Adam, float32", backend)
    train(opt, problem, 2)
    stored = pickle.dumps((problem, opt))
    ends = []
    for _ in range(2):
        other, copied = pickle.loads(stored)
        train(copied, other, 2)
        ends.append({key: snapshot(copied)[key] for key in ("params", "state")})
    assert_same_state(ends[1], ends[0])


# ------------------------------------------------------------------------------------------------------- edited by hand


def fill(state, params, key, value):
    for p in params:
        state[p][key].fill_(value)


def replace(state, params, key, value):
    for p in params:
        state[p][key] = torch.full_like(state[p][key], value)


def remove(state, params, key):
    for p in params:
        del state[p][key]


EDITS = {
    "SGD momentum": {
        "zeroed in place": lambda s, p: fill(s, p, "momentum_buffer", 0.0),
        "written in place": lambda s, p: fill(s, p[2:], "momentum_buffer", 0.25),
        "replaced": lambda s, p: replace(s, p, "momentum_buffer", 0.25),
        "one replaced": lambda s, p: replace(s, p[1:2], "momentum_buffer", 0.25),
        "one entry removed": lambda s, p: remove(s, p[:1], "momentum_buffer"),
        "set to None": lambda s, p: s[p[0]].update(momentum_buffer=None),
        "one parameter removed": lambda s, p: s.pop(p[2]),
        "cleared": lambda s, p: s.clear(),
        "one parameter's dict replaced": lambda s, p: s.update({p[1]: {"momentum_buffer": p[1].detach().clone()}}),
    },
    "AdamW amsgrad": {
        "zeroed in place": lambda s, p: fill(s, p, "exp_avg", 0.0),
        "replaced": lambda s, p: replace(s, p, "exp_avg_sq", 0.25),
        "maximum replaced": lambda s, p: replace(s, p[1:], "max_exp_avg_sq", 2.0),
        "step written in place": lambda s, p: fill(s, p, "step", 50.0),
        "step replaced": lambda s, p: replace(s, p[:1], "step", 50.0),
        "one parameter removed": lambda s, p: s.pop(p[2]),
        "cleared": lambda s, p: s.clear(),
    },
    "RMSprop": {
        "zeroed in place": lambda s, p: fill(s, p, "momentum_buffer", 0.0),
        "replaced": lambda s, p: replace(s, p, "square_avg", 2.0),
        "cleared": lambda s, p: s.clear(),
    },
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("through", ["lookbehind", "base"])
@pytest.mark.parametrize(("name", "edit"), [(name, edit) for name, edits in EDITS.items() for edit in edits])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_state_edited_by_hand_takes_effect(backend, name, edit, through, k):
    """Held to a torch optimizer with the same edit, bit for bit."""
    base, options = BASES[name]
    problem, twin, unedited = Problem(), Problem(), Problem()
    settings = {"rho": 0.0, "k": k, "alpha": 1.0, "backend": backend}
    opt, other = (Lookbehind(p.params, base, **settings, **options) for p in (problem, unedited))
    plain = base(twin.params, foreach=False, **options)
    for _ in range(2):
        outer_step(opt, problem)
        outer_step(other, unedited)
        before = plain_step(plain, twin, k)
        assert_torchs_weights(backend, base, problem.params, twin.params, before, k)
    EDITS[name][edit]((opt if through == "lookbehind" else opt.base_optimizer).state, problem.params)
    EDITS[name][edit](plain.state, twin.params)
    for _ in range(2):
        outer_step(opt, problem)
        outer_step(other, unedited)
        before = plain_step(plain, twin, k)
        assert_torchs_weights(backend, base, problem.params, twin.params, before, k)
    assert_same_state(opt.state_dict()["state"], plain.state_dict()["state"])
    assert any(not torch.equal(a, b) for a, b in zip(problem.params, unedited.params, strict=True))


@pytest.mark.parametrize("name", ["SGD momentum", "Adam", "RMSprop"])
def test_state_given_by_hand_before_the_first_step(backend, name):
    base, options = BASES[name]
    problem, twin, donor = Problem(), Problem(), Problem(seed=3)
    opt = Lookbehind(problem.params, base, rho=0.0, k=2, alpha=1.0, backend=backend, **options)
    plain = base(twin.params, foreach=False, **options)
    given = base(donor.params, **options)
    for _ in range(4):
        plain_step(given, donor)
    for optimizer, params in ((opt.base_optimizer, problem.params), (plain, twin.params)):
        for p, source in zip(params[1:], donor.params[1:], strict=True):
            optimizer.state[p] = freeze(given.state[source])
    for _ in range(2):
        outer_step(opt, problem)
        before = plain_step(plain, twin, k=2)
        assert_torchs_weights(backend, base, problem.params, twin.params, before, 2)


def test_edits_survive_an_abandoned_step(backend):
    """The state that an abandoned step restores is the edited one."""
    problem, opt = start("SGD momentum, float32", backend)
    train(opt, problem, 1)
    p = problem.params[0]
    opt.state[p]["momentum_buffer"] = torch.full_like(p, 0.25)
    for evaluation in opt.evaluations():
        problem.closure()
        if evaluation.index == 2:
            break
    assert_same_state(opt.state[p]["momentum_buffer"], torch.full_like(p, 0.25).detach())


# ---------------------------------------------------------------------------------------------------------------- hooks


def test_state_dict_hooks(backend):
    problem, opt = start("SGD momentum, float32", backend)
    train(opt, problem, 1)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(("pre", o is opt)))
    opt.register_state_dict_post_hook(lambda o, sd: calls.append(("post", "state" in sd)))
    opt.register_state_dict_post_hook(lambda o, sd: {**sd, "mine": 7})
    state_dict = opt.state_dict()
    assert calls == [("pre", True), ("post", True)]
    assert state_dict["mine"] == 7
    assert {"state", "param_groups", "lookbehind"} < set(state_dict)


def test_load_state_dict_hooks(backend):
    problem, opt = start("SGD momentum, float32", backend)
    train(opt, problem, 1)
    state_dict = copy.deepcopy(opt.state_dict())
    kept = freeze(state_dict)
    other, resumed = start("SGD momentum, float32", backend)
    calls = []

    def change(optimizer, sd):
        calls.append(("pre", optimizer is resumed))
        sd = copy.deepcopy(sd)
        sd["param_groups"][0]["lr"] = 0.375
        return sd

    resumed.register_load_state_dict_pre_hook(change)
    resumed.register_load_state_dict_post_hook(lambda o: calls.append(("post", o.param_groups[0]["lr"])))
    resumed.load_state_dict(state_dict)
    assert calls == [("pre", True), ("post", 0.375)]
    assert_same_state(state_dict, kept)
    train(resumed, other, 1)


def test_hooks_of_the_base_still_run_when_we_load(backend):
    problem, opt = start("SGD momentum, float32", backend)
    train(opt, problem, 1)
    calls = []
    opt.base_optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o is opt.base_optimizer))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert calls == [True]
