"""One run: which minibatches it evaluates, the trajectory, and going on after a kill."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.files import UserError
from benchmarks.transformers.plan import Run, Settings
from benchmarks.transformers.training import train

SWITCHED = Settings(
    seeds=(0,), tuning_seeds=(1,), learning_rates=(0.1,), sam_rhos=(0.1,), asam_rhos=(0.5,), ks=(2,), alphas=(0.8,),
    switch=True, checkpoint_every=2,
)  # fmt: skip
KEPT = replace(SWITCHED, switch=False)
METHODS = {
    "base": Run("final", "base", 0, lr=0.1),
    "sam": Run("final", "sam", 0, lr=0.1, rho=0.1),
    "asam": Run("final", "sam", 0, lr=0.1, asam=True, rho=0.5),
    "lookbehind": Run("final", "lookbehind", 0, lr=0.1, rho=0.1, k=2, alpha=0.8),
    "lookbehind-3": Run("final", "lookbehind", 0, lr=0.1, rho=0.1, k=3, alpha=0.8),
    "adaptive": Run("final", "lookbehind-adaptive", 0, lr=0.1, asam=True, rho=0.5, k=2),
}


class Killed(Exception):
    """In the place of a kill."""


class Regression:
    """A small network with dropout on eight minibatches; notes which it was asked for."""

    minibatches = 8

    def __init__(self, base: type[Optimizer] = Adam, dropout: float = 0.2, killed_at: int | None = None) -> None:
        torch.manual_seed(3)
        self.inputs = torch.randn(self.minibatches, 6, 5, dtype=torch.float64)
        self.targets = torch.randn(self.minibatches, 6, 1, dtype=torch.float64)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.kind, self.killed_at = base, killed_at
        self.asked: list[int] = []
        self.rates: list[float] = []

    def loss(self, number: int) -> Tensor:
        if len(self.asked) == self.killed_at:
            raise Killed
        self.asked.append(number)
        self.rates.append(self.made.param_groups[0]["lr"])
        return (self.model(self.inputs[number]) - self.targets[number]).square().mean()

    def base(self, lr: float) -> Optimizer:
        self.made = self.kind(self.model.parameters(), lr=lr)
        return self.made

    def schedule(self, fraction: float) -> float:
        return 1 - fraction


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("base", SWITCHED, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("sam", SWITCHED, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        ("lookbehind", SWITCHED, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        ("adaptive", SWITCHED, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        ("lookbehind-3", SWITCHED, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        ("lookbehind", KEPT, [i for i in range(8) for _ in range(3)]),
        ("lookbehind-3", KEPT, [i for i in range(8) for _ in range(4)]),
    ],
)
def test_which_minibatches_are_evaluated(name, settings, expected):
    """Switched: 2k gradients for the k minibatches of a step, two of each. Kept: k + 1 gradients of one minibatch."""
    task, run = Regression(), METHODS[name]
    record = train(task, run, settings)
    assert task.asked == expected
    assert record.evaluations == len(expected)
    size = run.minibatches(settings)
    assert size == (run.k if settings.switch and run.k else 1)
    assert record.step == len(record.loss) == 8 // size
    assert len(expected) == run.gradients(settings) * size * record.step
    assert len(record.alpha) == (record.step if run.k else 0)


@pytest.mark.parametrize("name", ["lookbehind", "adaptive"])
def test_switched_steps_are_those_of_algorithm_1(name):
    """A literal loop over plain tensors, in float64, SGD without momentum."""
    run, task = METHODS[name], Regression(SGD, dropout=0.0)
    shadow = copy.deepcopy(task)
    shadow.base(0.1)
    weights = [p.detach().clone() for p in shadow.model.parameters()]

    def gradient(at: list[Tensor], number: int) -> list[Tensor]:
        for p, w in zip(shadow.model.parameters(), at, strict=True):
            p.data = w.clone()
        return list(torch.autograd.grad(shadow.loss(number), list(shadow.model.parameters())))

    alphas = []
    for step in range(4):
        lr = 0.1 * (1 - step / 4)
        slow, fast, perturbed, path = weights, weights, weights, []
        for i in range(2):
            g = gradient(perturbed, 2 * step + i)
            t = [w.abs() + 0.01 if run.asam else torch.ones_like(w) for w in perturbed]
            length = torch.stack([(a * b).square().sum() for a, b in zip(t, g, strict=True)]).sum().sqrt() + 1e-16
            perturbed = [w + run.rho * a * a * b / length for w, a, b in zip(perturbed, t, g, strict=True)]
            g = gradient(perturbed, 2 * step + i)
            fast = [w - lr * b for w, b in zip(fast, g, strict=True)]
            path.append(torch.cat([(f - s).flatten() for f, s in zip(fast, slow, strict=True)]))
        alpha = (torch.cosine_similarity(*path, dim=0).item() + 1) / 2 if run.alpha is None else run.alpha
        alphas.append(alpha)
        weights = [s + alpha * (f - s) for s, f in zip(slow, fast, strict=True)]

    record = train(task, run, SWITCHED)
    for ours, theirs in zip(task.model.parameters(), weights, strict=True):
        assert (ours - theirs).abs().max() < 1e-12  # sums in another order
    assert record.alpha == pytest.approx(alphas, abs=1e-6)  # diagnostics are float32
    assert shadow.asked == task.asked


@pytest.mark.parametrize(("name", "steps", "each"), [("base", 8, 1), ("sam", 8, 2), ("lookbehind", 4, 4)])
def test_the_learning_rate_follows_the_schedule_by_steps(name, steps, each):
    task = Regression()
    train(task, METHODS[name], SWITCHED)
    assert task.rates == [0.1 * (1 - step / steps) for step in range(steps) for _ in range(each)]


@pytest.mark.parametrize("settings", [SWITCHED, KEPT], ids=["switched", "kept"])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_goes_on_to_the_same_bits(name, settings, tmp_path):
    """Killed three times, in the middle of steps too; dropout draws on."""
    settings = replace(settings, checkpoint_every=1)
    whole = Regression()
    expected = train(whole, METHODS[name], settings)
    path, total = tmp_path / "run.pt", len(whole.asked)
    for killed_at in (total // 2 + 1, 1, total // 6):
        torch.manual_seed(99)  # what another process would begin with
        task = Regression(killed_at=killed_at)
        with pytest.raises(Killed):
            train(task, METHODS[name], settings, path)
    task = Regression()
    record = train(task, METHODS[name], settings, path)
    assert len(task.asked) <= total // 2, "it began again"
    for ours, theirs in zip(task.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert record.loss == expected.loss
    assert record.alpha == expected.alpha
    assert record.evaluations == expected.evaluations
    again = Regression(killed_at=0)
    assert train(again, METHODS[name], settings, path).loss == expected.loss, "a finished run trains no more"


@pytest.mark.parametrize("damage", ["another run", "cut", "another model"])
def test_a_checkpoint_that_does_not_fit_is_named(damage, tmp_path: Path):
    path = tmp_path / "run.pt"
    train(Regression(), METHODS["sam"], SWITCHED, path)
    run, task = METHODS["sam"], Regression()
    if damage == "another run":
        run = METHODS["asam"]
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        task.model[0] = nn.Linear(5, 3).double()
    with pytest.raises(UserError, match=r"run\.pt: not the checkpoint of this run, or damaged; remove it"):
        train(task, run, SWITCHED, path)
