"""A hundred random walks over the interface; `make fuzz` takes ten thousand."""

import pytest

from tests.fuzz import Walk, walk
from tests.sampling import sample


@pytest.mark.parametrize("number", range(100))
def test_walk(number: int) -> None:
    """Others each time: the seed that fails is in the message."""
    seed = 100 * sample.seed + number
    try:
        walk(seed)
    except BaseException as error:
        raise AssertionError(f"python -m tests.fuzz --seeds 1 --first {seed} --verbose") from error


def test_a_walk_depends_on_its_seed_alone() -> None:
    """The same words twice, and others for another seed."""

    def words(seed: int) -> list[str]:
        said: list[str] = []
        Walk(seed, say=lambda *what: said.append(repr(what))).run(5)
        return said

    assert words(5) == words(5)
    assert words(5) != words(6)
