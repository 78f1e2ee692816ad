"""skorch: ``class Net(WholeSteps, NeuralNetClassifier)``, for accumulated microbatches. Other nets need nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skorch.utils import TeeGenerator
from torch import Tensor

if TYPE_CHECKING:  # what it is mixed into
    from skorch import NeuralNet as Mixed
else:
    Mixed = object


class WholeSteps(Mixed):
    """A mix-in of ``skorch.NeuralNet`` whose steps take the mean over ``accumulation`` batches, with ``Lookbehind`` and
    its family as the net's one optimizer::

        class Net(WholeSteps, NeuralNetClassifier):
            pass


        net = Net(Module, accumulation=4, optimizer=Lookbehind, optimizer__base_optimizer=torch.optim.SGD, ...)

    The losses of the history, and what is predicted in training, are those of evaluation 0. ``on_grad_computed`` is
    notified once an evaluation, of the whole gradient, with the last batch. Batches that remain at the end of an epoch
    are of the same step as the first ones of the next; those at the end of training are lost. What skorch does every
    batch (``LRScheduler(step_every="batch")``), it does for each of them.
    """

    def __init__(self, *args: Any, accumulation: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accumulation = accumulation

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """No step is begun."""
        super().on_train_begin(*args, **kwargs)
        self._batches: list[Any] = []

    def get_loss(self, *args: Any, training: bool = False, **kwargs: Any) -> Tensor:
        """The net's own; in training its share of the mean over the batches of a step."""
        loss: Tensor = super().get_loss(*args, training=training, **kwargs)
        return loss / self.accumulation if training and self.accumulation > 1 else loss

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """Evaluation 0 of a batch, and with the last one of a step all other evaluations of the step."""
        if self.accumulation == 1:
            alone: dict[str, Any] = super().train_step(batch, **fit_params)
            return alone
        optimizer, batches = self.optimizer_, self._batches
        if not batches:
            optimizer.zero_grad()
        batches.append(batch)
        step = self.train_step_single(batch, **fit_params)
        if len(batches) == self.accumulation:
            self._batches = []

            def closure() -> None:
                for each in batches:
                    self.train_step_single(each, **fit_params)
                self._tell_of_gradients(batch)

            self._tell_of_gradients(batch)
            optimizer.closure = closure
            optimizer.step()
        return {**step, "loss": step["loss"] * self.accumulation}

    def _tell_of_gradients(self, batch: Any) -> None:
        parameters = TeeGenerator(self.get_all_learnable_params())
        self.notify("on_grad_computed", named_parameters=parameters, batch=batch, training=True)
