"""The code of the pages of docs/ about trainers runs as it stands there."""

from pathlib import Path

import pytest

from tests.docs.pages import TRAINERS, run

PROCESSES = {"accelerate": "transformers"}
"""As those of the examples: in whose process of the test run a page runs, where that is not the trainer's own."""


@pytest.mark.filterwarnings("ignore:::(lightning|transformers|accelerate|skorch)")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.xdist_group(PROCESSES.get(trainer, trainer)))
        for page, trainer in TRAINERS.items()
    ],
)
def test_a_page(page: str, tmp_path: Path) -> None:
    pytest.importorskip(TRAINERS[page], reason=f"{TRAINERS[page]} is not installed: make trainers")
    assert run(page, tmp_path) > 0
