"""skorch: a net's own training steps are closures; accumulated ones need the mix-in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("skorch", reason="skorch is not installed: make trainers")

from skorch import NeuralNet
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler

from lookbehind_fused import Lookbehind
from lookbehind_fused.integrations.skorch import WholeSteps
from tests.integrations.plain import (
    GAMMA,
    SAMPLES,
    STEPS,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    data,
)

pytestmark = [pytest.mark.filterwarnings("ignore:::skorch"), pytest.mark.xdist_group("skorch")]


class Net(WholeSteps, NeuralNet):
    pass


class StopsAt(Callback):
    """Ends training after so many batches, as Ctrl-C does."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_batch_end(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        self.batches -= training
        if self.batches == 0:
            raise KeyboardInterrupt


def make_net(kind: type[NeuralNet], clip: float | None = None, schedule: bool = False, **settings: Any) -> NeuralNet:
    callbacks: list[Any] = [] if clip is None else [("clip", GradientNormClipping(clip))]
    if schedule:
        callbacks.append(("schedule", LRScheduler("StepLR", step_size=1, gamma=GAMMA, step_every="batch")))
    return kind(
        Model, torch.nn.CrossEntropyLoss, batch_size=SAMPLES, max_epochs=2, lr=0.05, train_split=None, verbose=0,
        optimizer=Lookbehind, optimizer__base_optimizer=torch.optim.SGD, optimizer__momentum=0.9, optimizer__rho=0.1,
        optimizer__k=2, optimizer__alpha=0.6, callbacks=[*callbacks, *settings.pop("callbacks", [])], **settings,
    )  # fmt: skip


def losses(net: NeuralNet) -> list[float]:
    return [batch["train_loss"] for epoch in net.history for batch in epoch["batches"] if "train_loss" in batch]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("kind", "accumulation"), [(NeuralNet, 1), (Net, 1), (Net, 2), (Net, 4)])
def test_skorch(kind: type[NeuralNet], accumulation: int, clip: float | None) -> None:
    """Equal to the plain loop; losses in the history are those of evaluation 0; k + 1 evaluations a microbatch."""
    plain = Plain(accumulation, clip)
    net = make_net(kind, clip, **({} if kind is NeuralNet else {"accumulation": accumulation})).fit(*data(accumulation))
    assert_same_weights(net.module_, plain.model)
    assert_same_losses(losses(net), plain.losses)
    assert net.module_.evaluations == STEPS * accumulation * 3


def test_a_scheduler() -> None:
    plain = Plain(schedule=True)
    net = make_net(NeuralNet, schedule=True).fit(*data(1))
    assert_same_weights(net.module_, plain.model)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    """skorch saves and loads parameters and optimizer; which batches remain is the caller's."""
    files = {"f_params": tmp_path / "params", "f_optimizer": tmp_path / "optimizer"}
    inputs, targets = data(accumulation)
    stopped = make_net(Net, accumulation=accumulation, callbacks=[StopsAt(7 * accumulation)]).fit(inputs, targets)
    stopped.save_params(**files)
    resumed = make_net(Net, accumulation=accumulation).initialize()
    resumed.load_params(**files)
    rest = 7 * accumulation * SAMPLES
    resumed.partial_fit(torch.cat([inputs[rest:], inputs]), torch.cat([targets[rest:], targets]), epochs=1)
    plain = Plain(accumulation)
    assert len(losses(resumed)) == 13 * accumulation
    assert_same_losses(losses(stopped) + losses(resumed), plain.losses)
    assert_same_weights(resumed.module_, plain.model)


def test_gradients_are_told_of_once_an_evaluation() -> None:
    told: list[float] = []

    class Listens(Callback):
        def on_grad_computed(self, net: Any, named_parameters: Any, **kwargs: Any) -> None:
            told.append(next(iter(named_parameters))[1].grad.norm().item())

    make_net(Net, accumulation=2, callbacks=[Listens()]).fit(*data(2))
    assert len(told) == STEPS * 3
    assert len(set(told)) == len(told)


def test_training_that_begins_anew_begins_a_step() -> None:
    """What was interrupted within one is forgotten."""
    net = make_net(Net, accumulation=2, callbacks=[StopsAt(3)]).fit(*data(2))
    net.fit(*data(2))
    assert_same_weights(net.module_, Plain(2).model)


def test_a_net_can_be_copied() -> None:
    net = make_net(Net, accumulation=2).fit(*data(2))
    assert callable(net.optimizer_.closure)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other.partial_fit(*data(2), epochs=1)
        assert other.module_.evaluations == 1.5 * net.module_.evaluations
