"""Examples for several processes, in one of them: ``torchrun -m tests.integrations.ranks FOLDER EXAMPLE ...``.

Each is run whole, and once more broken off and gone on with. What it has printed and the weights that this rank has are
saved as ``FOLDER/EXAMPLE-on-RANK``.
"""

import contextlib
import io
import os
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lookbehind_fused.shards import shard

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = {"ddp": "--checkpoint", "fsdp2": "--checkpoints"}


def run(name: str, *arguments: str, rendezvous: Path | None = None) -> dict[str, Any]:
    """The script as it stands there; ``rendezvous``: instead of torchrun's, which serves one start."""
    start = dist.init_process_group
    if rendezvous is not None:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        start = partial(start, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    sys.argv = [str(EXAMPLES / f"{name}.py"), *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.object(dist, "init_process_group", start):
        script = runpy.run_path(sys.argv[0], run_name="__main__")
    return {"printed": printed.getvalue(), "weights": [shard(p.detach()) for p in script["model"].parameters()]}


if __name__ == "__main__":
    folder, names, rank = Path(sys.argv[1]), sys.argv[2:], os.environ["RANK"]
    torch.set_num_threads(1)
    for number, name in enumerate(names):
        whole, broken = ((CHECKPOINTS[name], str(folder / f"{name}-{end}")) for end in ("whole", "broken"))
        runs = [
            run(name, *whole, rendezvous=folder / f"{name}-first" if number else None),
            run(name, *broken, "--epochs", "2", rendezvous=folder / f"{name}-second"),
            run(name, *broken, rendezvous=folder / f"{name}-third"),
        ]
        torch.save(runs, folder / f"{name}-on-{rank}")
