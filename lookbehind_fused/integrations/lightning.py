"""Lightning: ``Trainer(callbacks=[WholeSteps()])``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class WholeSteps(Callback):
    """Steps of ``Lookbehind`` and its family in Lightning's automatic optimization: exact with accumulated batches,
    clipping and a ``GradScaler``, and logged once::

        trainer = Trainer(accumulate_grad_batches=4, gradient_clip_val=1.0, callbacks=[WholeSteps()])

    What Lightning runs itself is evaluation 0 of each microbatch. The others are run here: ``training_step`` and
    backward of all microbatches of the step, whose ``self.log`` is without effect. Metrics that ``training_step``
    updates itself are up to it: ``optimizer.evaluation`` is None or has the index 0 where they count.

    Under 16-mixed precision the optimizer gets the plugin's scaler, and its ``max_grad_norm`` is ``gradient_clip_val``,
    where that is given; else evaluations are clipped by the module's ``configure_gradient_clipping``. In manual
    optimization the closure that is handed to ``step`` is the user's; the optimizer gets the scaler alone, and needs
    ``optimizer.closure`` with one, since Lightning then runs the first evaluation by itself.

    Raises:
        ValueError: at the start of training, clipping other than by norm under a scaler; at a step of several
            microbatches, ``same_randomness``.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[Any, int]] = []
        self._connected: list[tuple[Any, RemovableHandle]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect the optimizers that take several gradients a step."""
        self._batches = []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in [optimizer for optimizer in trainer.optimizers if hasattr(optimizer, "closure")]:
            if scaler is not None:
                optimizer.scaler = scaler
            if not pl_module.automatic_optimization:
                continue
            if scaler is not None and trainer.gradient_clip_val:
                _require_clips_by_norm(trainer, pl_module)
                optimizer.max_grad_norm = trainer.gradient_clip_val
            optimizer.closure = partial(self._evaluate_again, trainer, pl_module, optimizer)
            self._connected.append((optimizer, optimizer.register_step_pre_hook(self._begin)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disconnect them, but for scaler and clipping."""
        self._batches = []
        while self._connected:
            optimizer, hook = self._connected.pop()
            hook.remove()
            optimizer.closure = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As ``on_train_end``."""
        self.on_train_end(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A microbatch, of the same step as those before it."""
        if self._connected:
            self._batches.append((batch, batch_idx))

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The microbatch at hand is the first of its step."""
        del self._batches[:-1]

    def _begin(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a step: Lightning's closure, which runs the last microbatch, becomes one that runs all of them. With a
        scaler there is none, and gradients of evaluation 0 are there.
        """
        lightnings = kwargs.get("closure")
        if lightnings is None:
            return None
        accumulated = []
        if len(self._batches) > 1:
            if optimizer.same_randomness:
                raise ValueError(
                    "same_randomness: expected False with accumulated microbatches, whose random states are gone, got "
                    "True"
                )
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            accumulated = [(p, p.grad) for p in tensors if p.grad is not None]
            optimizer.zero_grad()
        again = optimizer.closure

        def closure(*_: Any) -> Any:
            if optimizer.evaluation.index > 0:
                return again()
            for p, grad in accumulated:
                p.grad = grad
            return lightnings()

        return args, {**kwargs, "closure": closure}

    def _evaluate_again(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Forward and backward of all microbatches of the step, at the weights as they are now."""
        strategy = trainer.strategy
        unsynced = getattr(strategy, "block_backward_sync", nullcontext)
        takes = len(inspect.signature(pl_module.training_step).parameters)
        pl_module.log = _log_nothing
        try:
            for number, batch_and_index in enumerate(self._batches, 1):
                with nullcontext() if number == len(self._batches) else unsynced():
                    output = strategy.training_step(*batch_and_index[:takes])
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if isinstance(loss, Tensor):
                        strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)
        finally:
            del pl_module.log
        if optimizer.scaler is None:
            pl_module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


def _require_clips_by_norm(trainer: Trainer, pl_module: LightningModule) -> None:
    own = type(pl_module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    if own or trainer.gradient_clip_algorithm not in (None, "norm"):
        raise ValueError(
            "gradient_clip_algorithm: expected 'norm', and no configure_gradient_clipping of the module's own, with a "
            f"GradScaler, whose gradients are scaled after evaluation 0, got {trainer.gradient_clip_algorithm!r}"
        )
