"""`make test` runs a sample of the large tables, drawn anew each time; `make test-all` runs all of them.

The hooks of pytest below are imported by ``conftest.py``. A test says how many of its cases are a sample with
``@pytest.mark.sample(n)``, or goes through ``sample(cases, n)``; one marked ``slow`` is in no sample.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TypeVar

import pytest

Case = TypeVar("Case")


class Sample:
    """What this run takes: everything as long as pytest has not said otherwise, or what ``seed`` draws."""

    everything, seed = True, 0

    def __call__(self, cases: Sequence[Case], n: int, name: str = "") -> list[Case]:
        """n of the cases in their order; ``name`` tells apart those who draw from as many."""
        if self.everything or len(cases) <= n:
            return list(cases)
        chosen = random.Random(f"{self.seed} {name}").sample(range(len(cases)), n)
        return [cases[i] for i in sorted(chosen)]


sample = Sample()


def drawn(most: int) -> list[str]:
    """Options with which a process of its own draws at the most as many cases."""
    return ["--most", str(most), "--seed", str(sample.seed)]


def evenly(cases: Sequence[pytest.Item], n: int, generator: random.Random) -> list[pytest.Item]:
    """n cases at random, but every value of every parameter as often as any other as far as that can be."""
    left, chosen, times = generator.sample(cases, len(cases)), [], Counter()
    values = {case: [(name, id(value)) for name, value in case.callspec.params.items()] for case in cases}
    while left and len(chosen) < n:
        best = max(left, key=lambda case: sum(2.0 ** -times[value] for value in values[case]))
        left.remove(best)
        chosen.append(best)
        times.update(values[best])
    return chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every case of every table, and the slow tests")
    parser.addoption("--seed", type=int, help="draws the cases; without it each run draws others")
    parser.addoption("--most", type=int, default=10**9, help="of no test draw more cases than that")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sample(n): n of the test's cases are drawn; with --all every one runs")
    config.addinivalue_line("markers", "slow: runs with --all only")
    # Whoever names a test wants to see it run.
    sample.everything = config.option.all or any("::" in argument for argument in config.args)
    sample.seed = config.option.seed
    if sample.seed is None:
        given = getattr(config, "workerinput", {})
        sample.seed = given.get("sample seed", random.SystemRandom().randrange(10**6))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """All processes of pytest-xdist draw the same."""
    node.workerinput["sample seed"] = sample.seed


def pytest_sessionstart(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and not sample.everything:
        terminal.write_line(f"sample seed: {sample.seed}, again with --seed {sample.seed}; everything with --all")


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if sample.everything:
        return
    tests = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, cases in tests.items():
        marker = cases[0].get_closest_marker("sample")
        n = min(marker.args[0] if marker else len(cases), config.option.most)
        kept.update(evenly(cases, n, random.Random(f"{sample.seed} {name}")) if n < len(cases) else cases)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
