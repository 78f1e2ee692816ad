"""Who takes part: a network whose layers take the time that they are told to, and the steps that train it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed.cost import Job
from benchmarks.distributed.link import SlowGroup
from benchmarks.distributed.plan import LAYERS, NARROW, WIDE, Contender
from lookbehind_fused import Lookbehind

EXAMPLES = 2
SGD = {"lr": 1e-3, "momentum": 0.9}
RHO = 0.05


class Device:
    """Stands for an accelerator that computes while the host sleeps: with more processes than cores, what computes on
    the cores would measure how they are shared.

    An evaluation ends after its seconds, whatever the host has done meanwhile.

    Args:
        job: how long a forward and a backward pass take, in parts that are alike for all layers.

    Attributes:
        idles: nothing takes any time.
    """

    def __init__(self, job: Job) -> None:
        self.forward, self.backward = job.forward / LAYERS, job.backward / LAYERS
        self.until = 0.0
        self.idles = False

    def begin(self) -> None:
        """An evaluation starts now."""
        self.until = time.perf_counter()

    def compute(self, seconds: float) -> None:
        """Sleep until so many seconds after what was computed before, so that no late waking adds up."""
        if self.idles:
            return
        self.until += seconds
        time.sleep(max(0.0, self.until - time.perf_counter()))


class Busy(torch.autograd.Function):
    """Nothing, which takes a layer's time in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device) -> Tensor:
        """x itself, later."""
        ctx.device = device
        device.compute(device.forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient, later: that of the layer's weights follows, so they are ready one layer after the other."""
        ctx.device.compute(ctx.device.backward)
        return gradient, None


class Network(nn.Module):
    """Layers with as many weights each, so small that what they compute takes no time beside their sleep."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.weights = nn.ParameterList()
        for number in range(LAYERS):
            shape = (NARROW, WIDE) if number % 2 else (WIDE, NARROW)
            self.weights.append(torch.randn(shape, generator=generator) / shape[1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x of shape (examples, NARROW)."""
        for weight in self.weights:
            x = Busy.apply(nn.functional.linear(x, weight), self.device)
        return x


class PublicSAM:
    """SAM as public code takes a step under DistributedDataParallel: both backward passes are synchronised; loops over
    the parameters, a copy of each asked for anew. This project's own transcription.
    """

    def __init__(self, params: Any, rho: float, **of_base: Any) -> None:
        self.params, self.rho = list(params), rho
        self.base = torch.optim.SGD(self.params, **of_base)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of two gradients."""
        self.base.zero_grad()
        loss = closure()
        copies = self.ascend()
        self.base.zero_grad()
        closure()
        for p, copy in zip(self.params, copies, strict=True):
            p.data = copy
        self.base.step()
        return loss

    @torch.no_grad()
    def ascend(self) -> list[Tensor]:
        """Perturb the weights; the copies are what they were."""
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in self.params]), p=2)
        scale = self.rho / (norm + 1e-12)
        copies = []
        for p in self.params:
            copies.append(p.data.clone())
            p.add_(p.grad * scale)
        return copies


@dataclass
class Trainer:
    """A contender with a network of its own.

    Args:
        contender: who. job: what an evaluation takes. group: over which it sends.
    """

    contender: Contender
    job: Job
    group: SlowGroup

    def __post_init__(self) -> None:
        c = self.contender
        self.device = Device(self.job)
        self.network: nn.Module = Network(self.device)
        self.model = self.network
        if c.sends != "nothing":
            # a bucket is closed by the layer that fills it
            size = self.job.payload / (1 if c.sends == "one bucket" else self.job.buckets)
            self.model = DistributedDataParallel(self.network, process_group=self.group, bucket_cap_mb=size / 2**20)
        generator = torch.Generator().manual_seed(1 + self.group.rank())
        self.examples = torch.randn(EXAMPLES, NARROW, generator=generator)
        params = self.network.parameters()
        if c.method == "SGD":
            self.optimizer: Any = torch.optim.SGD(params, **SGD)
        elif c.method == "public SAM":
            self.optimizer = PublicSAM(params, RHO, **SGD)
        else:
            local = {"ascents": "local", "model": self.model} if c.sends == "means" else {}
            alpha = 1.0 if c.k == 1 else 0.5
            self.optimizer = Lookbehind(params, torch.optim.SGD, rho=RHO, k=c.k, alpha=alpha, **local, **SGD)

    def evaluate(self) -> Tensor:
        """The closure."""
        self.device.begin()
        loss = self.model(self.examples).square().mean()
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        """One step."""
        if self.contender.method == "SGD":
            self.optimizer.zero_grad()
        self.optimizer.step(self.evaluate)

    def check(self) -> None:
        """All ranks have the same weights."""
        for number, p in enumerate(self.network.parameters() if self.contender.sends != "nothing" else ()):
            first = p.detach().clone()
            dist.broadcast(first, 0)
            if not torch.equal(first, p):
                raise RuntimeError(
                    f"{self.contender.title}: expected the same weights on all ranks, got others in "
                    f"layer {number} of rank {self.group.rank()}"
                )


class OneAllReduce:
    """What is sent is a whole gradient, once, and is waited for."""

    def __init__(self, job: Job, group: SlowGroup) -> None:
        self.group, self.buffer = group, torch.zeros(job.payload // 4)

    def __call__(self) -> None:
        """One all-reduce."""
        dist.all_reduce(self.buffer, group=self.group)
