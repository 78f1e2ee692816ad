"""Whole training steps, and how near a step comes to the memory's own speed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

from benchmarks import data
from benchmarks.bench.cases.common import BASELINE, full, measure, needs_memory
from benchmarks.bench.contenders import CONTENDERS
from benchmarks.bench.own_work import own_work
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import SETS, elements
from benchmarks.bench.timing import Interleaved, timed
from benchmarks.files import UserError
from benchmarks.models import ResidualNetwork


@pytest.mark.parametrize("k", [2, pytest.param(5, marks=full), pytest.param(10, marks=full)])
@pytest.mark.parametrize("images", ["digits", pytest.param("fashion-mnist", marks=full)])
def bench_training(benchmark, plan, images, k):
    """Forward, backward and optimizer of the main job's network on real images: naive 2k against native k + 1."""
    steps = training_steps(images, Settings(k=k, lr=0.01))
    interleaved = Interleaved({contender: timed(step) for contender, step in steps.items()}, 2 * plan.block_seconds)
    measure(benchmark, interleaved, plan.rounds, images=images, k=k)


def training_steps(images: str, settings: Settings, batch_size: int = 64) -> dict[str, Callable[[], None]]:
    """For naive and native: what takes one outer step on the next batch."""
    try:
        dataset = data.load(images, limit=2048)
    except UserError as error:
        pytest.skip(str(error))
    batches = list(zip(dataset.train_images.split(batch_size), dataset.train_labels.split(batch_size), strict=True))
    if len(batches[-1][1]) < batch_size:
        batches.pop()
    torch.manual_seed(0)
    network = ResidualNetwork(dataset.train_images.shape[1], data.CLASSES)

    def make(contender: str) -> Callable[[], None]:
        model, coming = copy.deepcopy(network), cycle(batches)
        optimizer = CONTENDERS[contender](list(model.parameters()), settings)

        def step() -> None:
            inputs, targets = next(coming)
            for _ in optimizer.evaluations():
                F.cross_entropy(model(inputs), targets).backward()

        return step

    return {contender: make(contender) for contender in ("naive", "native")}


@pytest.mark.parametrize("set_name", ["resnet34", pytest.param("flat-2e8", marks=full)])
def bench_bandwidth(benchmark, plan, set_name):
    """A step's bytes over its time, against ``copy_`` and ``add`` of flat tensors with as many elements."""
    shapes = SETS[set_name]
    n = elements(shapes)
    needs_memory(36 * n)
    x, y, z = torch.ones(n), torch.ones(n), torch.ones(n)
    contenders = {
        **own_work(["native"], shapes, BASELINE),
        "copy": timed(lambda: y.copy_(x)),
        "add": timed(lambda: torch.add(x, y, out=z)),
    }
    facts = {"set": set_name, "elements": n, "settings": asdict(BASELINE)}
    measure(benchmark, Interleaved(contenders, plan.block_seconds), plan.rounds, **facts)
