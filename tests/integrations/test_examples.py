"""Every script of examples/ runs as it stands there, in a few seconds, and has learned something."""

import re
import runpy
from pathlib import Path

import pytest

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
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    runpy.run_path(str(path), run_name="__main__")
    accuracy = re.fullmatch(r"accuracy (\d\.\d+)", capsys.readouterr().out.splitlines()[-1])
    assert accuracy
    assert float(accuracy[1]) > 0.85


def test_all_examples_are_run() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(TRAINERS)
