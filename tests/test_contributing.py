"""The worked example in CONTRIBUTING.md: one class, one row, and the family's own test."""

import re
from pathlib import Path

import pytest
import torch

from lookbehind_fused import Lookbehind
from lookbehind_fused.family import refuse
from lookbehind_fused.program import Trace
from tests import test_family
from tests.algorithm1 import Formulas
from tests.conftest import assert_close

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
CLASS, ROW = re.findall(r"```python\n(.*?)```", TEXT.partition("## A new method of the family")[2], re.DOTALL)[:2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> type[Lookbehind]:
    """The class of the example, its row being in the table of the family."""
    monkeypatch.setattr(test_family, "METHODS", dict(test_family.METHODS))
    names = {"Lookbehind": Lookbehind, "Trace": Trace, "refuse": refuse}
    exec(CLASS, names)
    exec(ROW, {"torch": torch, "METHODS": test_family.METHODS, "PenaltySAM": names["PenaltySAM"]})
    return names["PenaltySAM"]


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", test_family.TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("rule", test_family.RULES)
def test_the_example_is_its_transcription(
    backend: str, example: type[Lookbehind], rule: str, form: str, dtype: torch.dtype
) -> None:
    test_family.test_a_method_is_its_transcription(backend, "PenaltySAM", rule, form, dtype)


def test_the_example_restores_what_it_perturbed_and_keeps_16_bits(backend: str, example: type[Lookbehind]) -> None:
    problem, exact = test_family.Problem(torch.bfloat16), test_family.Problem()
    before = [p.detach().clone() for p in problem.params]
    optimizer = example(problem.params, torch.optim.SGD, lr=0.1, rho=0.3, backend=backend)
    for _ in optimizer.evaluations():
        problem.evaluate()
        if any(not torch.equal(p, w) for p, w in zip(problem.params, before, strict=True)):
            break
    assert all(torch.equal(p, w) for p, w in zip(problem.params, before, strict=True))
    for w, p in zip(exact.params, problem.params, strict=True):
        w.data.copy_(p.data)
    optimizer.step(problem.evaluate)
    _, _, transcription, _ = test_family.METHODS["PenaltySAM"]
    base = Formulas(test_family.RULES["sgd"][0][1], {"lr": 0.1}, len(exact.params))
    expected = transcription([p.detach() for p in exact.params], exact.gradient, base)
    for i, (p, w) in enumerate(zip(problem.params, expected, strict=True)):
        assert_close(f"tensor {i}", p.detach().double(), w, 4 * torch.finfo(torch.bfloat16).eps)


def test_the_example_refuses_what_it_has_no_use_for(example: type[Lookbehind]) -> None:
    with pytest.raises(TypeError, match="^k: expected no such argument for PenaltySAM, got 3"):
        example(test_family.Problem().params, torch.optim.SGD, lr=0.1, k=3)
