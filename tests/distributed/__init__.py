"""Tests of several processes: all cases of as many ranks run in one launch."""

from collections.abc import Callable


def cases(ranks: int) -> dict[str, Callable[[], None]]:
    """All of them by their names."""
    from tests.distributed import agreement, gathered, local, saving, table

    two, four = {**agreement.CASES, **gathered.CASES, **local.CASES}, {**agreement.OF_FOUR, **local.OF_ANY}
    return {**table.cases(ranks), **(two if ranks == 2 else four), **saving.CASES[ranks]}
