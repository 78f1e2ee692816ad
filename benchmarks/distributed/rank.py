"""What one of the processes does."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer imports, in seconds: once, before there are processes
import torch.distributed as dist

from benchmarks.distributed.contenders import OneAllReduce, Trainer
from benchmarks.distributed.cost import Link
from benchmarks.distributed.link import Sent, SlowGroup
from benchmarks.distributed.plan import ONE_ALL_REDUCE, Plan

Turn = tuple[float, int, int]
"""Seconds, all-reduces and bytes of one step."""
NO_TIME = Link(0.0, math.inf)


def work(connection: Connection, plan: Plan, folder: Path, rank: int, ranks: int) -> None:
    """A process: sends what it has measured, by link and name, and None; or None and what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
        )
        found = measure(plan, connection if rank == 0 else None)
        dist.barrier()
        connection.send((found, None))
    except Exception:
        connection.send((None, traceback.format_exc()))


def measure(plan: Plan, progress: Connection | None) -> dict[str, dict[str, list[Turn]]]:
    """All contenders in turn, round after round, over one link after the other."""
    group = SlowGroup(dist.group.WORLD, NO_TIME)
    trainers = {c.title: Trainer(c, plan.job, group) for c in plan.contenders}
    steps = {**trainers, ONE_ALL_REDUCE: OneAllReduce(plan.job, group)}
    for trainer in trainers.values():
        trainer.device.idles = True
        for _ in range(3):  # until buffers are there and buckets are in the order in which gradients come
            trainer()
        trainer.device.idles = False
    gc.freeze()  # what is here stays, and need not be searched before each turn
    found: dict[str, dict[str, list[Turn]]] = {}
    for title, link in plan.links.items():
        group.link = link
        turns = found[title] = {name: [] for name in steps}
        order = list(steps)
        for _ in range(plan.rounds):
            for name in order:
                turns[name].append(_turn(steps[name], group))
            order.append(order.pop(0))
            if progress is not None:
                progress.send((1, None))
    for trainer in trainers.values():
        trainer.check()
    return found


def _turn(step: Trainer | OneAllReduce, group: SlowGroup) -> Turn:
    gc.collect()
    gc.disable()
    dist.barrier()
    try:
        group.sent = Sent()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    group.check()
    if group.sent.others:
        raise RuntimeError(f"{step}: expected all-reduces alone, got {group.sent.others} other collectives")
    return seconds, group.sent.collectives, group.sent.payload


def _end_with_parent() -> None:
    """A parent that is killed takes its processes along, whatever they wait for."""
    multiprocessing.parent_process().join()
    os._exit(1)
