"""The code blocks of the README run as they stand, one after the other."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
LATER = "torch.compile", "analysis"  # tests/test_compile.py runs the first of these, tests/test_analysis.py the other


def test_the_code_of_the_readme_runs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    names: dict[str, Any] = {"torch": torch, "model": model, "loss_fn": nn.functional.cross_entropy, "device": "cpu"}
    names |= {"inputs": torch.randn(8, 4), "targets": torch.arange(8) % 3}
    assert len(BLOCKS) >= 7
    for block in BLOCKS:
        if any(word in block for word in LATER):
            continue
        before = [p.detach().clone() for p in model.parameters()]
        exec(block, names)
        if "step(" in block or "evaluations" in block:
            assert not any(map(torch.equal, model.parameters(), before)), block
        names["optimizer"].zero_grad()
    assert names["scaler"].get_scale() == 65536.0


@pytest.mark.parametrize("block", [block for block in BLOCKS if any(word in block for word in LATER)])
def test_what_is_run_elsewhere_is_python(block: str) -> None:
    compile(block, "README.md", "exec")
