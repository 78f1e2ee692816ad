"""Processes that do something together, and what went wrong with it, rank by rank."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, folder: Path, ranks: int, arguments: Sequence[str] = ()) -> Callable[[str], list[str]]:
    """Run ``python -m MODULE FOLDER RANK RANKS ARGUMENTS`` once for each rank.

    Processes are started anew: a fork would hang where threads of OpenMP have run.

    Returns:
        What went wrong with a case, rank by rank.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [folder / f"log-{rank}" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", module, str(folder), str(rank), str(ranks), *arguments]
            with log.open("w") as out:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
            processes.append(process)
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.05)  # until all have ended, or one has failed: the others would wait for it
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = [log.read_text() for log in logs]

    def of_case(case: str) -> list[str]:
        files = [folder / f"{case}-{rank}" for rank in range(ranks)]
        return [f.read_text() if f.exists() else f"not run: {o[-2000:]}" for f, o in zip(files, output, strict=True)]

    return of_case


def run_cases(
    cases: Mapping[str, Callable[[], None]], folder: Path, rank: int, ranks: int, chosen: Sequence[str] = ()
) -> None:
    """All cases, or those chosen, on one rank; each writes a file with what went wrong, or with nothing."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"file://{folder}/rendezvous"
    # Long, for slow machines: it ends only a case in which one rank has failed and the others wait for it.
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    for name in chosen or cases:
        wrong = ""
        try:
            cases[name]()
        except BaseException:  # that pytest raises where nothing was raised is no Exception
            wrong = f"rank {rank}: {traceback.format_exc()}"
        (folder / f"{name}-{rank}").write_text(wrong)
        dist.barrier()
    dist.destroy_process_group()
