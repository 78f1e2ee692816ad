"""A rank that is killed in mid-step, with each way to share the work (``tests.distributed.killed``)."""

from collections.abc import Callable

import pytest

from tests.distributed.killed import ARRANGEMENTS
from tests.distributed.launch import launch


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return launch("tests.distributed.killed", tmp_path_factory.mktemp("killed"), 2)


@pytest.mark.xdist_group("killed ranks")  # one process of pytest launches them, not each
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_rank_is_killed(outcome: Callable[[str], list[str]], arrangement: str) -> None:
    """The other raises in bounded time, and both go on from the checkpoint with the bits of an unbroken run."""
    assert outcome(arrangement) == ["", ""], "\n\n".join(outcome(arrangement))
