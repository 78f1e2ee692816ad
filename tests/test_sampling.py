"""What a sample of a table is: even, the same for the same seed, and everything where everything is asked for."""

import itertools
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tests import sampling
from tests.sampling import Sample, evenly, pytest_collection_modifyitems


class Item:
    """As much of a collected test as the sample looks at."""

    def __init__(self, nodeid: str, params: dict[str, Any], **markers: int) -> None:
        self.nodeid, self.callspec, self.markers = nodeid, SimpleNamespace(params=params), markers

    def get_closest_marker(self, name: str) -> Any:
        return SimpleNamespace(args=(self.markers[name],)) if name in self.markers else None


def table(**markers: int) -> list[Item]:
    values = itertools.product(("reference", "native"), ("float64", "float32", "bfloat16", "float16"), range(10))
    return [Item(f"test[{v}]", dict(zip(("backend", "dtype", "case"), v, strict=True)), **markers) for v in values]


@pytest.mark.parametrize("n", [4, 20, 40])
def test_each_value_is_drawn_as_often_as_any_other(n: int) -> None:
    chosen = evenly(table(), n, random.Random(0))
    assert len({item.nodeid for item in chosen}) == n
    for name in ("backend", "dtype"):
        drawn = Counter(item.callspec.params[name] for item in chosen)
        assert max(drawn.values()) - min(drawn.values()) <= 2
        assert len(drawn) == {"backend": 2, "dtype": 4}[name]


def collected(monkeypatch: pytest.MonkeyPatch, items: list[Item], seed: int | None, most: int = 10**9) -> list[Item]:
    """What is left of the items; ``seed`` None: everything is asked for."""
    chosen, left, deselected = Sample(), list(items), []
    chosen.everything, chosen.seed = seed is None, seed
    monkeypatch.setattr(sampling, "sample", chosen)
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    pytest_collection_modifyitems(SimpleNamespace(hook=hook, option=SimpleNamespace(most=most)), left)
    assert sorted(map(id, left + deselected)) == sorted(map(id, items))
    assert left == [item for item in items if item in left], "in their order"
    return left


def test_a_sample_of_what_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, slow, large = [Item("alone", {})], [Item("slow", {}, slow=0)], table(sample=6)
    every = [*alone, *slow, *large]
    found = collected(monkeypatch, every, 1)
    assert found[0] is alone[0]
    assert len(found) == 1 + 6
    assert slow[0] not in found
    assert collected(monkeypatch, every, 1) == found != collected(monkeypatch, every, 2)
    assert len(collected(monkeypatch, every, 1, most=2)) == 1 + 2
    assert collected(monkeypatch, every, None) == every


def test_a_sample_within_a_test() -> None:
    few = Sample()
    assert few(range(100), 3) == list(range(100)), "as long as pytest has not said otherwise"
    few.everything, few.seed = False, 5
    assert len(few(range(100), 3)) == 3
    assert few(range(100), 3) == sorted(few(range(100), 3)) != few(range(100), 3, "another")
    assert few([1, 2], 3) == [1, 2]
