"""What the methods of one run share: device, data, network, first weights; and how each method's optimizer is made."""

import argparse
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import data
from benchmarks.files import UserError
from benchmarks.models import ResidualNetwork
from benchmarks.options import METHODS
from lookbehind_fused import Lookbehind


class Job:
    """Everything of a run that stays the same from step to step; made from the options, it touches no file but data.

    Raises UserError for whatever the options ask that cannot be had.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        if threads := options.threads or (1 if options.data == "digits" else None):
            torch.set_num_threads(threads)
        self.device = _open_device(options.device)

        images = data.load(options.data, options.data_dir, options.limit)
        images = data.with_label_noise(images, options.label_noise, options.seed)
        self.fingerprint = images.fingerprint()
        self.data = images.to(self.device)
        self.batch_size = min(options.batch_size, len(images.train_labels))
        self.steps_per_epoch = len(images.train_labels) // self.batch_size
        self.total_steps = options.epochs * self.steps_per_epoch

        torch.manual_seed(options.seed)
        channels = images.train_images.shape[1]
        self.model = ResidualNetwork(channels, data.CLASSES, options.width, options.depth).to(self.device)
        self._first_weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for method in METHODS:  # what Lookbehind rejects is found now, before anything is written
            self.make_optimizer(method)
        self.forward = self._compile() if options.compile else self.model

    def reset(self) -> None:
        """Back to the first weights and the first random numbers, where every method starts."""
        torch.manual_seed(self.options.seed)
        self.model.load_state_dict(self._first_weights)
        self.model.zero_grad()

    def make_optimizer(self, method: str) -> tuple[Optimizer, LambdaLR]:
        """The optimizer of `method` and its learning-rate schedule, stepped after every outer step."""
        chosen = self.options
        base = {"lr": chosen.lr, "momentum": chosen.momentum, "weight_decay": chosen.weight_decay}
        if method == "sgd":
            optimizer = SGD(self.model.parameters(), **base)
        else:
            k, alpha = {
                "sam": (1, 1.0),
                "lookbehind": (chosen.k, chosen.alpha),
                "lookbehind-adaptive": (chosen.k, "adaptive"),
            }[method]
            try:
                optimizer = Lookbehind(
                    self.model.parameters(),
                    SGD,
                    rho=chosen.rho,
                    k=k,
                    alpha=alpha,
                    alpha_scope=chosen.alpha_scope,
                    adaptive=chosen.asam,
                    eta=chosen.eta,
                    reuse_gradient=not chosen.no_reuse,
                    backend=chosen.backend,
                    **base,
                )
            except (ValueError, TypeError, RuntimeError, ImportError) as error:
                raise UserError(f"Lookbehind: {first_line(error)}") from error
        if chosen.schedule == "constant":
            return optimizer, LambdaLR(optimizer, lambda step: 1.0)
        return optimizer, LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / self.total_steps)) / 2)

    def batches(self, epoch: int) -> list[Tensor]:
        """Indices of each step's images. They follow from seed and epoch alone, so nothing of it has to be saved."""
        generator = data.seeded_generator(self.options.seed, "order", epoch)
        order = torch.randperm(len(self.data.train_labels), generator=generator).to(self.device)
        return list(order.split(self.batch_size))[: self.steps_per_epoch]

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy, 0-dim, over the training images with these indices."""
        return F.cross_entropy(self.forward(self.data.train_images[batch]), self.data.train_labels[batch])

    @torch.no_grad()
    def test_accuracy(self) -> float:
        """The fraction of the test images that the network as it stands gets right."""
        self.model.eval()
        images, labels = self.data.test_images.split(1000), self.data.test_labels.split(1000)
        right = sum((self.model(x).argmax(1) == y).sum() for x, y in zip(images, labels, strict=True))
        self.model.train()
        return int(right) / len(self.data.test_labels)

    def synchronize(self) -> None:
        """Waits for the device, for a true time."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def describe(self) -> str:
        """The job in one line."""
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = "x".join(map(str, self.data.train_images.shape[1:]))
        return (
            f"{self.options.data}: {len(self.data.train_labels):,} training and {len(self.data.test_labels):,} test "
            f"images of {shape}; {parameters:,} parameters; {self.total_steps:,} steps a method"
        )

    def _compile(self) -> nn.Module:
        """The compiled network, after one trial so that a missing compiler shows now and no method pays for it."""
        compiled = torch.compile(self.model)
        batch = torch.arange(self.batch_size, device=self.device)
        try:
            F.cross_entropy(compiled(self.data.train_images[batch]), self.data.train_labels[batch]).backward()
        except Exception as error:  # torch.compile may fail with anything
            raise UserError(
                f"--compile: torch.compile failed (is there a C++ compiler?): {first_line(error)}"
            ) from error
        return compiled


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _open_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # nothing but use shows whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    if device.type == "cuda":  # the same seed is to give the same bits here too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device
