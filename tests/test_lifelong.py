"""Lifelong learning: C-MAML under Lookahead and Lookbehind against their transcriptions, the memory, the measures."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.optim import SGD

from lookbehind_fused import SAM, Lookahead, Lookbehind
from lookbehind_fused.lifelong import CMAML, Examples, Reservoir, average_accuracy, forgetting, of_task

TASKS, CLASSES, INPUTS, BATCH = 2, 3, 5, 4


class MultiHead(nn.Module):
    """A layer that all tasks share and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(INPUTS, 6)
        self.head = nn.Linear(6, TASKS * CLASSES)

    def forward(self, inputs: Tensor, tasks: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.trunk(inputs))).view(-1, TASKS, CLASSES)
        return logits[torch.arange(len(tasks)), tasks]


@pytest.fixture
def model() -> MultiHead:
    torch.manual_seed(1)
    return MultiHead().double()


def two_tasks(batches: int = 4) -> list[tuple[Tensor, Tensor, int]]:
    """Minibatches of two tasks, one after the other; the last of each is smaller."""
    generator = torch.Generator().manual_seed(2)
    sizes = [BATCH] * (batches - 1) + [2]
    return [
        (
            torch.randn(size, INPUTS, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=generator),
            task,
        )
        for task in range(TASKS)
        for size in sizes
    ]


# Transcriptions: plain loops over lists of tensors, a list for the memory, nothing of the package.


class Transcription:
    """C-MAML's gradient and a reservoir, as Gupta et al. write them down (algorithm 1, constant learning rates)."""

    def __init__(self, inner_lr: float, capacity: int, replay: int, seed: int, second_order: bool) -> None:
        self.inner_lr, self.capacity, self.replay, self.second_order = inner_lr, capacity, replay, second_order
        self.memory: list[tuple[Tensor, Tensor, int]] = []
        self.seen = 0
        self.numbers = torch.Generator().manual_seed(seed)

    def loss(self, w: list[Tensor], examples: list[tuple[Tensor, Tensor, int]]) -> Tensor:
        """Mean cross entropy, each example with its own head, written out."""
        total = torch.zeros((), dtype=torch.float64)
        for x, y, task in examples:
            hidden = torch.tanh(w[0] @ x + w[1])
            rows = slice(task * CLASSES, (task + 1) * CLASSES)
            logits = w[2][rows] @ hidden + w[3][rows]
            total = total + torch.logsumexp(logits, 0) - logits[y]
        return total / len(examples)

    def meta_gradient(self, w: list[Tensor], b: list, both: list) -> list[Tensor]:
        first = [x.detach().requires_grad_() for x in w]
        inner = first
        for example in b:
            g = torch.autograd.grad(self.loss(inner, [example]), inner, create_graph=True)
            if not self.second_order:
                g = [x.detach() for x in g]
            inner = [x - self.inner_lr * y for x, y in zip(inner, g, strict=True)]
        return list(torch.autograd.grad(self.loss(inner, both), first))

    def sample(self) -> list:
        if not self.memory:
            return []
        return [self.memory[i] for i in torch.randperm(len(self.memory), generator=self.numbers)[: self.replay]]

    def push(self, example: tuple[Tensor, Tensor, int]) -> None:
        self.seen += 1
        if len(self.memory) < self.capacity:
            self.memory.append(example)
        else:
            j = int(torch.randint(self.seen, (), generator=self.numbers))
            if j < self.capacity:
                self.memory[j] = example


def lookahead_c_maml(t: Transcription, w: list[Tensor], stream: list, *, lr: float, k: int, alpha: float) -> list:
    """Algorithm 3: slow weights, and fast ones that C-MAML moves; every k steps they meet. Returns the slow ones."""
    slow, fast = w, w
    for step, (inputs, targets, task) in enumerate(stream, 1):
        b = [(x, y, task) for x, y in zip(inputs, targets, strict=True)]
        both = t.sample() + b
        g = t.meta_gradient(fast, b, both)
        fast = [x - lr * y for x, y in zip(fast, g, strict=True)]
        for example in b:
            t.push(example)
        if step % k == 0:
            slow = [s + alpha * (f - s) for s, f in zip(slow, fast, strict=True)]
            fast = slow
    return slow


def lookbehind_c_maml(
    t: Transcription, w: list[Tensor], stream: list, *, lr: float, rho: float, k: int, alpha: float | str
) -> list:
    """Algorithm 4: every gradient of Lookbehind is C-MAML's, 2k of them a step."""
    for inputs, targets, task in stream:
        b = [(x, y, task) for x, y in zip(inputs, targets, strict=True)]
        both = t.sample() + b
        slow, fast, perturbed, first = w, w, w, w
        for i in range(k):
            g = t.meta_gradient(perturbed, b, both)
            length = sum((x**2).sum() for x in g) ** 0.5
            perturbed = [x + rho * y / (length + 1e-16) for x, y in zip(perturbed, g, strict=True)]
            g = t.meta_gradient(perturbed, b, both)
            fast = [x - lr * y for x, y in zip(fast, g, strict=True)]
            first = fast if i == 0 else first
        a = torch.cat([(x - s).flatten() for x, s in zip(first, slow, strict=True)])
        z = torch.cat([(x - s).flatten() for x, s in zip(fast, slow, strict=True)])
        step = (a @ z / (a.norm() * z.norm()) + 1) / 2 if alpha == "adaptive" else alpha
        w = [s + step * (f - s) for s, f in zip(slow, fast, strict=True)]
        for example in b:
            t.push(example)
    return w


def agree(model: nn.Module, expected: list[Tensor]) -> None:
    for (name, p), e in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
def test_lookahead_c_maml_is_its_transcription(model: MultiHead, second_order: bool) -> None:
    """Algorithm 3 in float64 over two tasks, with a memory that overflows in the first."""
    start = [p.detach().clone() for p in model.parameters()]
    t = Transcription(0.07, 6, 3, seed=5, second_order=second_order)
    expected = lookahead_c_maml(t, start, two_tasks(), lr=0.2, k=3, alpha=0.4)
    learner = CMAML(
        model, F.cross_entropy, Reservoir(6, seed=5), inner_lr=0.07, replay=3, second_order=second_order
    )  # fmt: skip
    optimizer = Lookahead(SGD(model.parameters(), lr=0.2), k=3, alpha=0.4)
    for inputs, targets, task in two_tasks():
        learner.step(optimizer, inputs, targets, task)
    with optimizer.slow_weights():
        agree(model, expected)
        assert max((p - s).abs().max() for p, s in zip(model.parameters(), start, strict=True)) > 0.05


@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize(("k", "alpha"), [(2, 0.4), (3, 0.8), (3, "adaptive"), (1, 1.0)])
def test_lookbehind_c_maml_is_its_transcription(
    backend: str, model: MultiHead, k: int, alpha: float | str, second_order: bool
) -> None:
    """Algorithm 4 in float64 over two tasks; with k = 1 and alpha = 1 it is a SAM meta step."""
    start = [p.detach().clone() for p in model.parameters()]
    t = Transcription(0.07, 6, 3, seed=5, second_order=second_order)
    expected = lookbehind_c_maml(t, start, two_tasks(), lr=0.2, rho=0.1, k=k, alpha=alpha)
    learner = CMAML(
        model, F.cross_entropy, Reservoir(6, seed=5), inner_lr=0.07, replay=3, second_order=second_order
    )  # fmt: skip
    settings = {"rho": 0.1, "backend": backend}
    if k == 1:
        optimizer: Lookbehind = SAM(model.parameters(), SGD, lr=0.2, **settings)
    else:
        optimizer = Lookbehind(model.parameters(), SGD, lr=0.2, k=k, alpha=alpha, **settings)
    for inputs, targets, task in two_tasks():
        learner.step(optimizer, inputs, targets, task)
    agree(model, expected)
    assert max((p - s).abs().max() for p, s in zip(model.parameters(), start, strict=True)) > 0.05


def test_orders_differ_and_the_memory_matters(model: MultiHead) -> None:
    """What the transcriptions are compared in moves the weights by far more than they agree in."""
    ends = []
    for settings in ({}, {"second_order": True}, {"replay": 0}, {"inner_lr": 0.08}):
        own = copy.deepcopy(model)
        learner = CMAML(own, F.cross_entropy, Reservoir(6), **{"inner_lr": 0.07, "replay": 3, **settings})
        optimizer = SGD(own.parameters(), lr=0.2)
        for inputs, targets, task in two_tasks():
            learner.step(optimizer, inputs, targets, task)
        ends.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
    assert all((end - ends[0]).abs().max() > 1e-4 for end in ends[1:])


# The memory


def stream_of(count: int) -> Examples:
    return Examples(torch.arange(count), torch.arange(count), torch.zeros(count, dtype=torch.int64))


def held_by(memories: int) -> Tensor:
    """How often each of 30 examples is in a memory of 8, over so many memories."""
    counts = torch.zeros(30)
    for seed in range(memories):
        memory = Reservoir(8, seed=seed)
        memory.push(stream_of(30))
        held = memory.state_dict()["examples"][0]
        assert len(held.unique()) == 8
        counts[held] += 1
    return counts


def test_reservoir_sampling_is_uniform() -> None:
    """The eight examples of a memory differ, so that counts vary less than the test expects of independent draws."""
    assert chisquare(held_by(600)).pvalue > 0.05


@pytest.mark.parametrize("off", [-2, 2])
def test_the_chi_square_test_notices_a_memory_that_is_not_uniform(monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    """One that draws as though it had seen two examples less, or two more."""
    draw = torch.randint
    monkeypatch.setattr(torch, "randint", lambda high, *args, **more: draw(high + off, *args, **more))
    assert chisquare(held_by(600)).pvalue < 1e-3


def test_sampling_is_uniform_and_without_repetition() -> None:
    memory = Reservoir(20, seed=3)
    memory.push(stream_of(12))
    counts = torch.zeros(12)
    for _ in range(3000):
        drawn = memory.sample(5)
        assert drawn is not None
        assert len(drawn.inputs.unique()) == 5
        counts[drawn.inputs] += 1
    assert chisquare(counts).pvalue > 0.01
    assert len(memory.sample(50).inputs) == 12
    assert memory.sample(0) is None
    assert Reservoir(3).sample(2) is None


def test_a_memory_goes_on_from_its_state() -> None:
    whole, first, second = Reservoir(5, seed=1), Reservoir(5, seed=1), Reservoir(5, seed=9)
    for memory in (whole, first):
        memory.push(stream_of(3))
    second.load_state_dict(first.state_dict())
    for memory in (whole, second):
        memory.push(stream_of(30))
    assert len(second) == 5
    assert second.seen == 33
    for a, b in zip(whole.sample(4), second.sample(4), strict=True):
        assert torch.equal(a, b)
    assert first.seen == 3, "a state is a copy"
    second.load_state_dict(Reservoir(5).state_dict())
    assert len(second) == 0


def test_state_of_a_memory_can_be_saved_with_weights_only(tmp_path) -> None:
    memory = Reservoir(5)
    memory.push(stream_of(9))
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt", weights_only=True)
    other = Reservoir(5)
    other.load_state_dict(state)
    assert torch.equal(other.sample(5).inputs, memory.sample(5).inputs)


def test_random_numbers_of_others_stay_as_they_are() -> None:
    before = torch.get_rng_state(), random.getstate()
    memory = Reservoir(3)
    memory.push(stream_of(20))
    memory.sample(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_neither_default_device_nor_dtype_matters() -> None:
    drawn = []
    inputs, targets = torch.arange(20), torch.arange(20)
    for surroundings in (nullcontext(), torch.device("meta")):
        with surroundings:
            memory = Reservoir(6, seed=4)
            memory.push(of_task(inputs, targets, 1))
            drawn.append(memory.sample(4))
    for a, b in zip(*drawn, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


# What the class leaves alone


def test_remember_false_offers_nothing(model: MultiHead) -> None:
    learner = CMAML(model, F.cross_entropy, Reservoir(6), inner_lr=0.1)
    optimizer = SGD(model.parameters(), lr=0.1)
    inputs, targets, task = two_tasks()[0]
    learner.step(optimizer, inputs, targets, task, remember=False)
    assert learner.memory.seen == 0
    learner.step(optimizer, inputs, targets, task)
    assert learner.memory.seen == BATCH


def test_frozen_and_unreached_parameters(model: MultiHead) -> None:
    """The head of the other task gets a gradient of 0, a frozen parameter none."""
    model.trunk.bias.requires_grad_(False)
    learner = CMAML(model, F.cross_entropy, Reservoir(6), inner_lr=0.1)
    before = copy.deepcopy(model.state_dict())
    learner.step(SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), *two_tasks()[0])
    assert torch.equal(model.trunk.bias, before["trunk.bias"])
    assert torch.equal(model.head.weight[CLASSES:], before["head.weight"][CLASSES:])
    assert not torch.equal(model.head.weight[:CLASSES], before["head.weight"][:CLASSES])


@pytest.mark.parametrize("broken", ["a loss that raises", "inputs of another shape", "targets of another dtype"])
def test_a_step_that_raises_changes_nothing(model: MultiHead, broken: str) -> None:
    memory = Reservoir(6)
    learner = CMAML(model, F.cross_entropy, memory, inner_lr=0.1, replay=3)
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    batches = two_tasks()
    for inputs, targets, task in batches[:3]:
        learner.step(optimizer, inputs, targets, task)
    weights, before = copy.deepcopy(model.state_dict()), memory.state_dict()
    inputs, targets, task = batches[3]
    calls = 0

    def raising(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second evaluation: each has two inner steps and the meta loss
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    if broken == "a loss that raises":
        learner.loss_fn, error = raising, KeyboardInterrupt
    else:
        error = ValueError
        inputs, targets = (inputs[:, :4], targets) if "shape" in broken else (inputs, targets.float())
    with pytest.raises(error):
        learner.step(optimizer, inputs, targets, task)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    after = memory.state_dict()
    assert torch.equal(before["random"], after["random"])
    assert before["seen"] == after["seen"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: Reservoir(0), ValueError, "capacity: expected an int >= 1, got 0"),
        (lambda m: CMAML(m, F.cross_entropy, [], inner_lr=0.1), TypeError, "memory: expected a Reservoir, got"),
        (lambda m: CMAML(m, F.cross_entropy, Reservoir(1), inner_lr=0.0), ValueError, "inner_lr: expected a finite"),
        (lambda m: CMAML(m, F.cross_entropy, Reservoir(1), inner_lr=0.1, replay=-1), ValueError, "replay: expected an"),
        (lambda m: of_task(torch.zeros(3, 2), torch.zeros(2), 0), ValueError, "targets: expected one for each"),
        (lambda m: of_task(torch.zeros(0, 2), torch.zeros(0), 0), ValueError, "targets: expected one for each"),
        (lambda m: of_task(torch.zeros(3, 2), torch.zeros(3), -1), ValueError, "task: expected an int >= 0, got -1"),
        (lambda m: Reservoir(3).load_state_dict(Reservoir(4).state_dict()), ValueError, "capacity: expected 3, got 4"),
        (lambda m: average_accuracy([]), ValueError, "table: expected a row for each task"),
        (lambda m: forgetting([[0.5], [0.5]]), ValueError, r"table\[1\]: expected at least 2 entries"),
    ],
)
def test_mistakes(model: MultiHead, make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(model)


# Measures


def test_accuracy_and_forgetting_by_hand() -> None:
    """Best accuracies before the end 0.9, 0.8; at the end 0.6, 0.85, 0.7: lost are 0.3 and -0.05."""
    table = [[0.8], [0.9, 0.8], [0.6, 0.85, 0.7]]
    assert average_accuracy(table) == pytest.approx(2.15 / 3, abs=1e-15)
    assert forgetting(table) == pytest.approx(0.125, abs=1e-15)
    assert average_accuracy([[0.25]]) == 0.25
    assert forgetting([[0.25]]) == 0
    further = [[0.8, 0.1, 0.3], [0.9, 0.8, 0.2], [0.6, 0.85, 0.7]]  # accuracy on tasks that are still to come
    assert average_accuracy(further) == average_accuracy(table)
    assert forgetting(further) == forgetting(table)
