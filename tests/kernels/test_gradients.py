"""Lazy views, gradients far from the moments before them, large ones (``gradients``): the same on every backend."""

import os
import subprocess
import sys

import pytest

from tests.kernels.gradients import far_apart, large, lazy_views
from tests.kernels.mutants import MISSING, ROOT


def test_lazy_views(backend: str) -> None:
    lazy_views(backend)


def test_far_apart(backend: str) -> None:
    far_apart(backend)


def test_large(backend: str) -> None:
    large(backend)


@pytest.mark.skipif("triton" in MISSING, reason="needs triton")
def test_triton() -> None:
    """In its interpreter."""
    command = [sys.executable, "-m", "tests.kernels.gradients", "triton", "cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "taken for what they are\n"
