"""What may change between two steps does what it does with torch.optim: state, groups, settings, what is trained.

Every change is made to our optimizer and to one of torch's (``twin``), and their trajectories stay the same.
"""

import copy
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lookbehind_fused import Lookahead
from tests.conftest import assert_equal, assert_same_state, drive
from tests.twin import BASES, Twin, scaled_apart, two_groups

BUCKETS = {"one bucket": two_groups, "several": scaled_apart}
# Every form of a step, one bucket and several, each k and alpha. The cases of a table are spread over them.
WAYS: list[dict[str, Any]] = [
    {"form": "step", "groups": two_groups, "k": 1, "alpha": 0.4},
    {"form": "evaluations", "groups": scaled_apart, "k": 2, "alpha": "adaptive"},
    {"form": "pairs", "groups": two_groups, "k": 3, "alpha": 0.4},
    {"form": "step", "groups": scaled_apart, "k": 2, "alpha": 0.4},
    {"form": "evaluations", "groups": two_groups, "k": 3, "alpha": "adaptive"},
]


def way(*case: Any) -> dict[str, Any]:
    """One of ``WAYS``, always the same for the same case."""
    return WAYS[zlib.crc32(repr(case).encode()) % len(WAYS)]


# ---- state -----------------------------------------------------------------------------------------------------------


def clear(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def clear_each(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    for entry in optimizer.state.values():
        entry.clear()


def delete_one(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    if params[1] in optimizer.state:
        del optimizer.state[params[1]]


def delete_and_put_back(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    kept = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.state.update(reversed(kept.items()))


def exchange(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """Other tensors, with what the old ones hold times a half."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and key != "step":
                entry[key] = value * 0.5


def assign(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state = defaultdict(dict)


def assign_copies(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """But for the first tensor's state."""
    entries = {p: copy.deepcopy(dict(entry)) for p, entry in optimizer.state.items() if p is not params[0]}
    optimizer.state = defaultdict(dict, entries)


def set_state(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.__setstate__({"state": defaultdict(dict)})


def set_state_and_groups(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """As ``Optimizer.load_state_dict`` does at its end."""
    entries = {p: copy.deepcopy(dict(entry)) for p, entry in optimizer.state.items()}
    groups = [{**group, "lr": 0.5 * group["lr"]} for group in optimizer.param_groups]
    optimizer.__setstate__({"state": defaultdict(dict, entries), "param_groups": groups})


STATE_CHANGES = [
    *(clear, clear_each, delete_one, delete_and_put_back, exchange, assign, assign_copies, set_state),
    set_state_and_groups,
]


@pytest.mark.sample(36)
@pytest.mark.parametrize("change", STATE_CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("base", BASES)
def test_state_changed_between_steps(backend: str, base: str, change: Callable) -> None:
    """After the first step, when state is new, after a step with no change before it, and twice without one between;
    through our optimizer, or through its base."""
    twin = Twin(backend, base, **way(backend, base, change.__name__))
    through_base = zlib.crc32(f"{base} {change.__name__} {backend}".encode()) % 2 == 0
    for changes in (0, 1, 1, 0, 2, 0):
        for _ in range(changes):
            change(twin.optimizer.base_optimizer if through_base else twin.optimizer, twin.params)
            change(twin.other, twin.theirs)
        twin.step()
        assert twin.optimizer.state is twin.optimizer.base_optimizer.state
        assert twin.optimizer.param_groups is twin.optimizer.base_optimizer.param_groups


@pytest.mark.parametrize("change", [clear, delete_one, assign, set_state], ids=lambda change: change.__name__)
def test_state_changed_under_lookahead(backend: str, change: Callable) -> None:
    """Lookahead's ``state`` is the optimizer's."""
    twin = Twin(backend, "Adam", k=1, alpha=1.0)
    lookahead = Lookahead(twin.optimizer, k=50)
    for changes in (0, 1, 1, 0):
        for _ in range(changes):
            change(lookahead, twin.params)
            change(twin.other, twin.theirs)
        drive(lookahead, "step", twin.evaluate, 1)
        twin.paper()
        twin.steps += 1
        twin.check()


# ---- groups ----------------------------------------------------------------------------------------------------------


def pop_first(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.pop(0)


def pop_last(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.pop()


def pop_and_return(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.append(optimizer.param_groups.pop(0))


def replace(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3 * optimizer.param_groups[0]["lr"]}


def replace_with_torchs_own(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """A group that says nothing of rho, adaptive and eta has the defaults."""
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("rho", "adaptive", "eta")}
    optimizer.param_groups[0] = group


def assign_groups(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups = optimizer.param_groups[1:]


def merge(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    """One group takes the tensors of the other."""
    second = optimizer.param_groups.pop(1)
    optimizer.param_groups[0]["params"] += second["params"]


def take_one_out(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def split(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    group = optimizer.param_groups[1]
    first, *rest = group["params"]
    group["params"] = rest
    optimizer.param_groups.insert(0, {**group, "params": [first], "lr": 2 * group["lr"]})


GROUP_CHANGES = [pop_first, pop_last, pop_and_return, replace, replace_with_torchs_own, assign_groups, merge]
GROUP_CHANGES += [take_one_out, split]


@pytest.mark.sample(36)
@pytest.mark.parametrize("change", GROUP_CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("base", [base for base in BASES if base != "Lister"])
def test_groups_changed_between_steps(backend: str, base: str, change: Callable) -> None:
    """Before the first step, after it, and after another."""
    for steps in (0, 1, 2):
        twin = Twin(backend, base, **way(backend, base, change.__name__, steps))
        for _ in range(steps):
            twin.step()
        for optimizer, params in twin.sides():
            change(optimizer, params)
        twin.step()
        twin.step()


@pytest.mark.parametrize("base", [base for base in BASES if base != "Lister"])
def test_a_group_taken_away_and_brought_back(backend: str, base: str) -> None:
    """Its tensors stay where they are meanwhile; then it goes on with the state that it had."""
    for groups in BUCKETS.values():
        twin = Twin(backend, base, groups=groups)
        twin.step()
        kept = [optimizer.param_groups.pop(0) for optimizer, _ in twin.sides()]
        before = [p.detach().clone() for p in twin.params[:2]]
        twin.step()
        for p, value in zip(twin.params, before, strict=False):
            assert_equal("a tensor of no group", p.detach(), value)
        for (optimizer, _), group in zip(twin.sides(), kept, strict=True):
            optimizer.param_groups.insert(1, group)
        twin.step()
        twin.step()


@pytest.mark.parametrize("through", ["optimizer", "base", "list"])
@pytest.mark.parametrize("base", BASES)
def test_groups_added_between_steps(backend: str, base: str, through: str) -> None:
    if base == "Lister" and through == "list":
        pytest.skip("it would not know of the group by itself either")
    for groups in BUCKETS.values():
        twin = Twin(backend, base, groups=groups)
        twin.step()
        number = twin.grow(3)
        for optimizer, params in twin.sides():
            inner = optimizer.base_optimizer if through == "base" and optimizer is twin.optimizer else optimizer
            if through == "list":
                inner.param_groups.append({**inner.param_groups[0], "params": [params[number]]})
            else:
                inner.add_param_group({"params": [params[number]], "lr": 0.05})
        start = twin.params[number].detach().clone()
        twin.step()
        assert not torch.equal(twin.params[number], start)
        twin.step()


# ---- refused, and undone ---------------------------------------------------------------------------------------------


# name: makes the change and returns what undoes it; what the message says of it
REFUSED: dict[str, tuple[Callable[[Twin], Callable[[], Any]], str]] = {}


def refused(name: str, says: str) -> Callable[[Callable], Callable]:
    def register(change: Callable[[Twin], Callable[[], Any]]) -> Callable:
        REFUSED[name] = change, says
        return change

    return register


def of_group(key: str, value: Any) -> Callable[[Twin], Callable[[], Any]]:
    def change(twin: Twin) -> Callable[[], Any]:
        group = twin.optimizer.param_groups[1]
        before, group[key] = group[key], value
        return lambda: group.update({key: before})

    return change


def of_optimizer(name: str, value: Any) -> Callable[[Twin], Callable[[], Any]]:
    def change(twin: Twin) -> Callable[[], Any]:
        before = getattr(twin.optimizer, name)
        setattr(twin.optimizer, name, value)
        return lambda: setattr(twin.optimizer, name, before)

    return change


for key, value in (("rho", -1.0), ("eta", float("nan")), ("adaptive", "yes"), ("adaptive", [True, False, True])):
    refused(f"{key}={value}", key)(of_group(key, value))
for name, value in (("k", 0), ("alpha", 1.5), ("nonfinite", "stop"), ("microbatches", 0), ("max_grad_norm", -1.0)):
    refused(f"{name}={value}", name)(of_optimizer(name, value))
refused("backend", "nonsense")(of_optimizer("backend", "nonsense"))


@refused("shape", "parameter 1")
def other_shape(twin: Twin) -> Callable[[], Any]:
    before = twin.params[1].data
    twin.params[1].data = before[:1].clone()
    return lambda: setattr(twin.params[1], "data", before)


@refused("dtype", "parameter 1")
def other_dtype(twin: Twin) -> Callable[[], Any]:
    before = twin.params[1].data
    twin.params[1].data = before.to(torch.complex128)
    return lambda: setattr(twin.params[1], "data", before)


@refused("state", "parameter 1")
def state_of_another_shape(twin: Twin) -> Callable[[], Any]:
    entry = twin.optimizer.state[twin.params[1]]
    key = next((key for key, value in entry.items() if value.ndim > 0), None)
    if key is None:
        pytest.skip("this base has no state to spoil before the first step, or at all")
    before, entry[key] = entry[key], torch.zeros(7, dtype=torch.float64)
    return lambda: entry.update({key: before})


@pytest.mark.sample(26)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("base", ["momentum", "Adam", "RMSprop"])
def test_a_refused_change_that_is_undone_is_forgotten(backend: str, base: str, name: str) -> None:
    """Refused as often as it is tried, with the weights as they were; then training goes on as if it had not been."""
    change, says = REFUSED[name]
    if name == "state" and base == "RMSprop":
        pytest.skip("its own step says what it makes of it")
    for steps in (0, 1):
        if name in ("state", "shape") and steps == 0:
            continue  # nothing is known of it before the first step
        twin = Twin(backend, base, **way(backend, base, name, steps))
        for _ in range(steps):
            twin.step()
        undo = change(twin)
        before = [p.detach().clone() for p in twin.params]
        for _ in range(2):
            with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
                drive(twin.optimizer, twin.form, partial(gradients_of_one, twin), 2)
            twin.optimizer.abort_step()
            for number, (p, value) in enumerate(zip(twin.params, before, strict=True)):
                assert_same_state(p.detach(), value, f"tensor {number}")
        undo()
        twin.optimizer.zero_grad()
        for _ in range(2):
            twin.step()


def gradients_of_one(twin: Twin, _: int) -> Tensor:
    for p in twin.params:
        p.grad = torch.ones_like(p)
    return torch.zeros(())


@pytest.mark.parametrize("base", BASES)
def test_another_backend_takes_over(base: str) -> None:
    """The kernels of the backend that is set now run, and state goes on."""
    twin = Twin("native", base, k=3, alpha="adaptive")
    for backend, runs in (("native", True), ("reference", False), ("native", True), ("reference", False)):
        twin.optimizer.backend = backend
        with Launches() as launches:
            twin.step()
        assert (launches.count > 0) == runs, backend


class Launches(TorchDispatchMode):
    """Counts calls of the compiled kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "lookbehind_fused"
        return func(*args, **(kwargs or {}))
