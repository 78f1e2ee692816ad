"""Which runs there are, and what is chosen among them."""

from dataclasses import replace

import pytest

from benchmarks.transformers import plan
from benchmarks.transformers.plan import Run
from benchmarks.transformers.translation.job import DEFAULT as TRANSLATION
from benchmarks.transformers.vit.job import DEFAULT as VIT


def answered(settings, score) -> tuple[dict, dict]:
    """Performs tuning runs by `score` until nothing is open; returns the answers and the results."""
    done: dict = {}
    while True:
        answers = plan.answer(settings, done)
        runs = [run for run in plan.plan(settings, answers) if run.purpose == "tune" and run.name not in done]
        if not runs:
            return answers, done
        done |= {run.name: {"score": score(run)} for run in runs}


@pytest.mark.parametrize("settings", [TRANSLATION, VIT], ids=["translation", "vit"])
def test_each_method_takes_what_it_chose_itself(settings):
    best = {("sam", False): 0.05, ("sam", True): 0.5, ("lookbehind", False): 0.02, ("lookbehind", True): 0.2}

    def score(run: Run) -> float:
        if run.method == "base":
            return -abs(run.lr - settings.learning_rates[1])
        assert run.lr == settings.learning_rates[1]
        return -abs(run.rho - best[run.method, run.asam]) - (run.k == 2) * 0.001

    answers, done = answered(settings, score)
    rows = {row.key: row for row in plan.rows(settings, answers, "SGD")}
    of_row = {key: row.runs[0] for key, row in rows.items()}
    assert of_row["sam"].rho == 0.05
    assert of_row["asam"].rho == 0.5
    assert of_row["lookbehind-sam"].rho == of_row["adaptive-sam"].rho == 0.02
    assert of_row["lookbehind-asam"].rho == of_row["adaptive-asam"].rho == 0.2
    assert of_row["lookbehind-sam"].k == of_row["adaptive-sam"].k == settings.ks[-1]
    assert of_row["adaptive-sam"].alpha is None
    assert {run.asam for key, row in rows.items() for run in row.runs if "asam" in key} == {True}
    for row in rows.values():
        assert [run.seed for run in row.runs] == list(settings.seeds)
    assert not {Run(**vars(run)).seed for run in plan.plan(settings, answers) if run.purpose == "tune"} & set(
        settings.seeds
    )
    everything = plan.plan(settings, answers)
    assert len({run.name for run in everything}) == len(everything)
    assert len([run for run in everything if run.purpose == "final"]) == len(rows) * len(settings.seeds)
    assert {run.name for run in everything if run.purpose == "tune"} == done.keys()


def test_of_equals_the_first_is_chosen():
    answers, _ = answered(VIT, lambda run: 0.5)
    assert answers["base"] == {"lr": VIT.learning_rates[0]}
    assert answers["lookbehind-asam"] == {"rho": VIT.asam_rhos[0], "k": 2, "alpha": 0.5}


def test_what_runs_cost():
    """Switched, Lookbehind costs what SAM does; else k + 1 times the base. The longer base as much as the dearest."""
    lookbehind = Run("final", "lookbehind", 0, lr=0.1, rho=0.1, k=5, alpha=0.5)
    assert lookbehind.cost(TRANSLATION) == 2
    assert lookbehind.cost(VIT) == 6
    assert Run("final", "sam", 0, lr=0.1, rho=0.1).cost(VIT) == 2
    assert Run("final", "base", 0, lr=0.1, times=3).cost(VIT) == 3
    for settings, cost in ((TRANSLATION, 2), (VIT, 6)):
        answers, _ = answered(settings, lambda run: run.k or 0)
        rows = {row.key: row for row in plan.rows(settings, answers, "SGD")}
        assert rows["longer"].runs[0].cost(settings) == rows["lookbehind-sam"].runs[0].cost(settings) == cost
        assert rows["longer"].label == f"SGD, {cost} times as long"


def test_the_guess_is_as_long_as_the_plan_will_be():
    first = plan.plan(VIT, plan.guess(VIT, {}))
    answers, _ = answered(VIT, lambda run: run.k or 0)
    assert len(first) == len(plan.plan(VIT, answers))
    assert len(plan.plan(VIT, {})) == len(VIT.learning_rates)
    more = replace(VIT, seeds=tuple(range(9)))
    assert len(plan.plan(more, answers)) - len(plan.plan(VIT, answers)) == 4 * 8
