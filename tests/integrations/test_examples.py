"""Every script of examples/ runs as it stands there, in a few seconds, and has learned something."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"

TRAINERS = {
    "accelerate_loop": "accelerate",
    "fabric_loop": "lightning",
    "hugging_face": "transformers",
    "lightning_automatic": "lightning",
    "plain_amp": None,
    "skorch_net": "skorch",
    "timm_loop": None,
}
"""What each needs."""

OF_SEVERAL_PROCESSES = ["ddp", "fsdp2", "lightning_fsdp2"]
"""The last one is run by ``test_lightning_fsdp2``."""

PROCESSES = {"accelerate": "transformers", None: "skorch"}
"""Where that is not the trainer's own: in whose process of the test run an example runs."""


@pytest.mark.filterwarnings("ignore:::(lightning|transformers|accelerate|skorch)")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(PROCESSES.get(trainer, trainer)))
        for name, trainer in TRAINERS.items()
    ],
)
def test_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if TRAINERS[name] is not None:
        pytest.importorskip(TRAINERS[name], reason=f"{TRAINERS[name]} is not installed: make trainers")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert accuracy_in(capsys.readouterr().out) > 0.85


def accuracy_in(printed: str) -> float:
    """That of the last line."""
    accuracy = re.fullmatch(r"accuracy (\d\.\d+)", printed.splitlines()[-1])
    assert accuracy
    return float(accuracy[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what two processes that torchrun has started have left (``tests.integrations.ranks``)."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*torchrun, "tests.integrations.ranks", str(folder), "ddp", "fsdp2"]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.xdist_group("examples of two ranks")  # one process of pytest launches them, not each
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_an_example_of_two_ranks(name: str, folder: Path) -> None:
    """It has learned something, and a run that goes on from a checkpoint has the same bits as one that was whole."""
    ranks = [torch.load(folder / f"{name}-on-{rank}", weights_only=True) for rank in range(2)]
    for whole, broken, resumed in ranks:
        assert all(map(torch.equal, whole["weights"], resumed["weights"]))
        assert not any(map(torch.equal, whole["weights"], broken["weights"]))
        assert whole["printed"].endswith(resumed["printed"])
    (whole, _, resumed), (other, *_) = ranks
    assert accuracy_in(whole["printed"]) > 0.85
    assert len(resumed["printed"].splitlines()) == 3 + 1
    assert not other["printed"]
    if name == "ddp":
        assert all(map(torch.equal, whole["weights"], other["weights"]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.xdist_group("examples of two ranks")
def test_what_fsdp2_has_saved_is_the_model(folder: Path) -> None:
    """On one process: of each weight the parts that ranks had."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    saved: dict[str, Any] = {"model": model.state_dict()}
    dcp.load(saved, checkpoint_id=folder / "fsdp2-whole" / "epoch-0005", no_dist=True)
    ranks = [torch.load(folder / f"fsdp2-on-{rank}", weights_only=True)[0]["weights"] for rank in range(2)]
    for p, *parts in zip(saved["model"].values(), *ranks, strict=True):
        assert torch.equal(p, torch.cat(parts))


def test_all_examples_are_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted([*TRAINERS, *OF_SEVERAL_PROCESSES])


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 90, path.name
