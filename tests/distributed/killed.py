"""A rank that is killed in mid-step: ``python -m tests.distributed.killed FOLDER RANK 2``, once for each rank.

Each start of a training job is a fork of this process, in which no thread of PyTorch's has run: it is imported once.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from lookbehind_fused import Lookbehind
from lookbehind_fused.shards import shard
from tests.conftest import assert_equal
from tests.distributed.table import make_model, mesh_of, shard_layers
from tests.twin import values

ARRANGEMENTS = ("synced", "local", "fsdp2")

STEPS, SAVED_EVERY = 6, 2
KILLED_IN = 3, 2
"""Step and evaluation: two gradients have been used, and the step before is in no checkpoint."""

BOUND = 60.0
"""Seconds from the kill to the error on the other rank, on the slowest of machines; the process group's are 600."""


class Job:
    """Training on one of two ranks, from the last checkpoint on, if there is one."""

    def __init__(self, arrangement: str, folder: Path) -> None:
        self.folder, self.steps, self.kills = folder, 0, False
        self.sharded = arrangement == "fsdp2"
        model = make_model()
        self.model = shard_layers(model, mesh_of(2, names=("dp",))) if self.sharded else DistributedDataParallel(model)
        given = {"ascents": "local", "model": self.model} if arrangement == "local" else {}
        self.optimizer = Lookbehind(
            self.model.parameters(), torch.optim.Adam, lr=0.02, k=2, alpha="adaptive", rho=0.2, **given
        )
        saved = sorted(folder.glob("*/.metadata" if self.sharded else "step-*"))
        if saved:
            self.load(saved[-1])

    def weights(self) -> list[Tensor]:
        return [shard(p.detach()).clone() for p in self.model.parameters()]

    def evaluate(self) -> Tensor:
        x = values(4, 3, seed=2 * self.steps + dist.get_rank())
        loss = (self.model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
        if self.kills and dist.get_rank() == 1 and (self.steps, self.optimizer.evaluation.index) == KILLED_IN:
            (self.folder / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        return loss.detach()

    def train(self) -> None:
        while self.steps < STEPS:
            self.before = self.weights()
            self.optimizer.step(self.evaluate)
            self.steps += 1
            if self.steps % SAVED_EVERY == 0:
                self.save()

    def save(self) -> None:
        name = self.folder / f"step-{self.steps}"
        if self.sharded:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            dcp.save({"model": model, "optimizer": optimizer, "steps": self.steps}, checkpoint_id=name)
        elif dist.get_rank() == 0:
            states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}
            torch.save(states, self.folder / "new")
            os.replace(self.folder / "new", name)

    def load(self, saved: Path) -> None:
        if self.sharded:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            states = {"model": model, "optimizer": optimizer, "steps": 0}
            dcp.load(states, checkpoint_id=saved.parent)
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        else:
            states = torch.load(saved, weights_only=True)
            self.model.load_state_dict(states["model"])
            self.optimizer.load_state_dict(states["optimizer"])
        self.steps = states["steps"]


def whole(arrangement: str, folder: Path) -> None:
    """Nobody is killed; a folder of its own."""
    (folder / "whole").mkdir(exist_ok=True)
    job = Job(arrangement, folder / "whole")
    assert job.steps == 0
    job.train()
    torch.save(job.weights(), folder / f"weights-{dist.get_rank()}")


def broken(arrangement: str, folder: Path) -> None:
    """Rank 1 is killed; the other raises soon, and has the weights of before the step."""
    job = Job(arrangement, folder)
    job.kills = True
    try:
        job.train()
    except RuntimeError as error:
        seconds = time.time() - float((folder / "killed").read_text())
        print(f"{arrangement}: {seconds:.2f} s after the kill {type(error).__name__}: {str(error)[:100]!r}", flush=True)
    else:
        raise AssertionError("no error came")
    assert seconds < BOUND
    assert job.steps == KILLED_IN[0]
    assert job.optimizer.evaluation is None
    for number, (p, w) in enumerate(zip(job.weights(), job.before, strict=True)):
        assert_equal(f"weights of tensor {number}", p, w)


def resumed(arrangement: str, folder: Path) -> None:
    """Both are started again, and end as if nothing had happened."""
    job = Job(arrangement, folder)
    assert job.steps == KILLED_IN[0] - KILLED_IN[0] % SAVED_EVERY
    job.train()
    for number, (p, w) in enumerate(zip(job.weights(), torch.load(folder / f"weights-{dist.get_rank()}"), strict=True)):
        assert_equal(f"weights of tensor {number}", p, w)


def start(job: Callable[[str, Path], None], arrangement: str, folder: Path, rank: int) -> None:
    """What a fork does; what goes wrong is printed."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"file://{folder}/rendezvous-{job.__name__}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    job(arrangement, folder)


def case(arrangement: str, folder: Path, rank: int) -> None:
    """Three starts of a job, one after the other."""
    folder.mkdir(exist_ok=True)
    forks = multiprocessing.get_context("fork")
    for job in (whole, broken, resumed):
        process = forks.Process(target=partial(start, job, arrangement, folder, rank))
        process.start()
        process.join(4 * BOUND)
        code = process.exitcode
        process.kill()
        expected = -signal.SIGKILL if (job, rank) == (broken, 1) else 0
        assert code == expected, f"{job.__name__}: exit code {code}, expected {expected}; see what was printed"


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for arrangement in ARRANGEMENTS:
        wrong = ""
        try:
            case(arrangement, folder / arrangement, rank)
        except BaseException:
            wrong = f"rank {rank}: {traceback.format_exc()}\n{(folder / f'log-{rank}').read_text()[-4000:]}"
        (folder / f"{arrangement}-{rank}").write_text(wrong)
