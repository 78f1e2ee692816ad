"""Hugging Face: ``class MyTrainer(WholeSteps, Trainer)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .accelerate import connect

if TYPE_CHECKING:  # what it is mixed into
    from transformers import Trainer as Mixed
else:
    Mixed = object


class WholeSteps(Mixed):
    """A mix-in of ``transformers.Trainer`` that has ``Lookbehind`` and its family take all gradients of a step::

        class SharpnessAwareTrainer(WholeSteps, Trainer):
            pass


        trainer = SharpnessAwareTrainer(model, args, optimizers=(optimizer, scheduler), ...)

    What the trainer runs itself is evaluation 0. For the others its ``training_step`` runs on all microbatches of the
    step once more, with their loss normalised as it was; what it returns then is logged by nobody. The optimizer's
    ``max_grad_norm`` is the trainer's where that is > 0, and its ``scaler`` the accelerator's where there is one. With
    any other optimizer it does nothing.
    """

    _samples_and_items: tuple[list[Any], Any]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The microbatches of the next step and the number of items in them, as the trainer's own."""
        self._samples_and_items = super().get_batch_samples(*args, **kwargs)
        optimizer = connect(self.optimizer)
        if hasattr(optimizer, "closure"):
            optimizer.closure = self._evaluate_again
            if self.args.max_grad_norm > 0:
                optimizer.max_grad_norm = self.args.max_grad_norm
        return self._samples_and_items

    def _evaluate_again(self) -> None:
        """Forward and backward of all microbatches of the step, at the weights as they are now."""
        samples, items = self._samples_and_items
        for inputs in samples:
            self.training_step(self.model_wrapped, inputs, items)
