"""Lightning's FSDP2 strategy on two processes, which torchrun starts."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="lightning is not installed: make trainers")


@pytest.mark.xdist_group("lightning")
@pytest.mark.parametrize("case", ["example", pytest.param("plain", marks=pytest.mark.slow)])
def test_on_two_ranks(case: str, tmp_path: Path) -> None:
    """The example as it stands there; equal to the plain loop, also where a run goes on from a checkpoint."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*torchrun, "tests.integrations.lightning_ranks", str(tmp_path), case]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    files = [tmp_path / f"{case}-{rank}" for rank in range(2)]
    wrong = [file.read_text() if file.exists() else "not run" for file in files]
    assert wrong == ["", ""], "\n\n".join([*wrong, done.stderr[-2000:]])
