"""The pages that a reader sees, README and docs/, and their code, which runs as it stands there.

What a reader has already, blocks find under the names of ``own``; what one block of a page defines, the next ones have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from lookbehind_fused import Lookahead, Lookbehind

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])

RANKS = {"docs/training/ddp.md": 2, "docs/training/fsdp2.md": 2, "docs/training/captured.md": 1}
"""Pages that run in processes of their own, and in how many (``python -m tests.docs``)."""

TRAINERS = {
    "docs/training/accelerate.md": "accelerate",
    "docs/training/hugging-face.md": "transformers",
    "docs/training/lightning.md": "lightning",
    "docs/training/skorch.md": "skorch",
}
"""Pages that need a trainer, which tests/integrations/test_pages.py runs."""

STEPS = re.compile(
    r"(optimizer|scaler)\.step\(|evaluations\(|(descent|second)_step\(|\.fit\(|trainer\.train\(|= step\(\)"
)
"""What a block that takes steps has."""


class Block(NamedTuple):
    """A piece of Python on a page, and the line that it begins at."""

    page: str
    line: int
    code: str

    def takes_steps(self) -> bool:
        return STEPS.search(self.code) is not None


def blocks(page: str) -> list[Block]:
    """All of a page, also those within lists or notes, without their indentation."""
    text = (ROOT / page).read_text()
    found = []
    for match in re.finditer(r"^( *)```python\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        code = re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE)
        found.append(Block(page, text[: match.start(2)].count("\n") + 1, code))
    return found


def own(folder: Path) -> dict[str, Any]:
    """What a reader has: a model with its loss, a minibatch, loaders, the device, a folder for what is saved."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 4), torch.arange(32) % 3
    data = TensorDataset(inputs, targets)
    return {
        "torch": torch,
        "nn": nn,
        "model": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)),
        "loss_fn": nn.functional.cross_entropy,
        "inputs": inputs[:8],
        "targets": targets[:8],
        "loader": DataLoader(data, batch_size=8),
        "train_loader": DataLoader(data, batch_size=16),
        "device": "cpu",
        "folder": str(folder / "saved"),
    }


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Whether weights have moved in each step of the family that was taken within the block."""
    moved: list[bool] = []
    before: dict[int, list[Tensor]] = {}

    def tensors(optimizer: Any) -> list[Tensor]:
        return [p.detach() for group in optimizer.param_groups for p in group["params"]]

    def note(optimizer: Any, *_: Any) -> None:
        if isinstance(optimizer, (Lookbehind, Lookahead)):
            before[id(optimizer)] = [p.clone() for p in tensors(optimizer)]

    def compare(optimizer: Any, *_: Any) -> None:
        if id(optimizer) in before:
            old = before.pop(id(optimizer))
            moved.append(any(bool((p != q).any()) for p, q in zip(tensors(optimizer), old, strict=True)))

    handles = [register_optimizer_step_pre_hook(note), register_optimizer_step_post_hook(compare)]
    try:
        yield moved
    finally:
        for handle in handles:
            handle.remove()


def run(page: str, folder: Path) -> int:
    """Run a page's blocks, one after the other; what they save is in the folder.

    Returns:
        How many steps were taken.

    Raises:
        AssertionError: a block that should take steps has moved nothing, or has left a step open.
    """
    names, steps = {"__name__": "a page", **own(folder)}, 0
    for block in blocks(page):
        with counted() as moved:
            exec(compile(block.code, f"{block.page}, line {block.line}", "exec"), names)
        assert any(moved) or not block.takes_steps(), f"{block.page}, line {block.line}: no weight has moved"
        steps += len(moved)
        optimizer = names.get("optimizer")
        if optimizer is not None:
            inner = getattr(optimizer, "optimizer", optimizer)
            assert getattr(inner, "evaluation", None) is None, f"{block.page}, line {block.line}: a step is open"
            optimizer.zero_grad()
    return steps
