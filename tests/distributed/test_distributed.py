"""One launch of two processes, and with ``--all`` one of four, each with a row of cases (``tests.distributed``)."""

from collections.abc import Callable

import pytest

from tests.distributed import cases
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return launch("tests.distributed", tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return launch("tests.distributed", tmp_path_factory.mktemp("four"), 4)


@pytest.mark.xdist_group("two ranks")  # one process of pytest launches them, not each
@pytest.mark.parametrize("case", cases(2))
def test_on_two_ranks(two: Callable[[str], list[str]], case: str) -> None:
    assert two(case) == ["", ""], "\n\n".join(two(case))


@pytest.mark.slow
@pytest.mark.xdist_group("four ranks")
@pytest.mark.parametrize("case", cases(4))
def test_on_four_ranks(four: Callable[[str], list[str]], case: str) -> None:
    assert four(case) == [""] * 4, "\n\n".join(four(case))
