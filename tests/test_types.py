"""Types: what mypy says of the calls in ``typed_calls.py``. That of the package itself is in ``make check``."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lookbehind_fused import ASAM, SAM, Lookbehind, MultistepSAM, arguments, compat, signatures
from tests.kernels.mutants import ROOT

CALLS = Path(__file__).with_name("typed_calls.py")


@pytest.mark.slow
def test_wrong_calls_are_errors_of_mypy_and_right_ones_are_not() -> None:
    """One process, with mypy's settings of the project."""
    pytest.importorskip("mypy")
    expected = {}
    for number, line in enumerate(CALLS.read_text().splitlines(), 1):
        if marked := re.search(r"  # error: ([a-z-]+)$", line):
            expected[number] = marked[1]
    assert len(expected) > 30
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", str(CALLS)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = re.findall(r"^tests/typed_calls\.py:(\d+): error: .*\[([a-z-]+)\]$", found.stdout, re.MULTILINE)
    assert {int(number): code for number, code in errors} == expected, found.stdout + found.stderr
    assert found.stdout.count(": error: ") == len(errors) == len(expected), found.stdout


@pytest.mark.parametrize(
    ("method", "with_an_instance"),
    [
        (Lookbehind, signatures.OfLookbehind),
        (SAM, signatures.OfASAM),
        (ASAM, signatures.OfASAM),
        (MultistepSAM, signatures.OfMultistepSAM),
        (compat.SingleFileSAM, signatures.Everywhere),
    ],
    ids=lambda value: value.__name__,
)
def test_what_is_written_for_type_checkers_is_what_constructors_take(method: type, with_an_instance: type) -> None:
    """Every name of theirs, and of their own arguments; but for the method's own form, which has those by itself."""
    own = {name for name in inspect.signature(method.__init__).parameters} - {"self", "base_kwargs", "settings"}
    written = {*with_an_instance.__annotations__}
    taken = arguments.arguments_of(method)
    assert written - taken == set()
    if method is Lookbehind:
        assert written - {*arguments.ASCENT} == own - {"params", "base_optimizer"}
    else:
        refused = {ASAM: {"adaptive"}, compat.SingleFileSAM: {"microbatches", "ascent_gradient", "ascent_fraction"}}
        refused = refused.get(method, set())
        assert taken - refused - {*arguments.OLD_NAMES} == written | own


def test_the_package_says_that_it_has_types() -> None:
    assert (Path(inspect.getfile(Lookbehind)).parent / "py.typed").exists()
    assert "py.typed" in (ROOT / "pyproject.toml").read_text()


def test_attributes_that_are_declared_are_there() -> None:
    """Each of the annotations beside ``SETTINGS``: a name without an attribute would be a promise to mypy alone."""
    optimizer = Lookbehind([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1)
    declared = [name for kind in type(optimizer).__mro__[:-2] for name in vars(kind).get("__annotations__", {})]
    assert {"k", "alpha", "loss_scale", "buffers_at_slow", "model"} <= {*declared}
    for name in declared:
        assert hasattr(optimizer, name), name
