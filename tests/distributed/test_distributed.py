"""One launch of two processes, and with ``--all`` one of four, each with the cases that were chosen."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import cases
from tests.distributed.launch import launch


def launched(request: pytest.FixtureRequest, folder: Path, ranks: int) -> Callable[[str], list[str]]:
    """The cases of the tests that are going to run."""
    own = [item for item in request.session.items if request.node.nodeid == item.nodeid.partition("::")[0]]
    chosen = [item.callspec.params["case"] for item in own if request.fixturename in item.fixturenames]
    return launch("tests.distributed", folder, ranks, chosen)


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return launched(request, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return launched(request, tmp_path_factory.mktemp("four"), 4)


@pytest.mark.sample(24)
@pytest.mark.xdist_group("two ranks")  # one process of pytest launches them, not each
@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(two: Callable[[str], list[str]], case: str) -> None:
    assert two(case) == ["", ""], "\n\n".join(two(case))


@pytest.mark.slow
@pytest.mark.xdist_group("four ranks")
@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks(four: Callable[[str], list[str]], case: str) -> None:
    assert four(case) == [""] * 4, "\n\n".join(four(case))
