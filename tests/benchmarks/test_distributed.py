"""What steps over several processes send and wait for: the slow link, the model of the cost, and the counts."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.distributed import __main__ as distributed
from benchmarks.distributed import plan, processes, report
from benchmarks.distributed.contenders import PublicSAM
from benchmarks.distributed.cost import Job, Link
from benchmarks.distributed.link import Sent, SlowGroup
from benchmarks.distributed.plan import Contender, Measured, Plan
from benchmarks.files import UserError
from lookbehind_fused import SAM
from tests.conftest import assert_close

# ---- the slow link ---------------------------------------------------------------------------------------------------


class Inner:
    """A group of two that doubles what it is given, as if the other had the same; that fails if it is told so."""

    def __init__(self) -> None:
        self.fails = False

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, tensors, options=None):
        if self.fails:
            raise RuntimeError("the cable was pulled")
        for t in tensors:
            t.mul_(2)
        return SimpleNamespace(wait=lambda: None)


def test_an_all_reduce_takes_as_long_as_on_the_link():
    group = SlowGroup(Inner(), Link(latency=0.02, bandwidth=1e5))
    x = torch.ones(1000)  # 4,000 bytes: 0.04 s
    start = time.perf_counter()
    group.allreduce([x]).wait()
    assert time.perf_counter() - start >= 0.06
    assert x.tolist() == [2.0] * 1000
    start = time.perf_counter()
    dist.all_reduce(x, group=group)
    assert time.perf_counter() - start >= 0.06
    assert x.tolist() == [4.0] * 1000
    assert group.sent == Sent(collectives=2, payload=8000)


def test_all_reduces_follow_one_another_as_on_one_wire():
    group = SlowGroup(Inner(), Link(latency=0.03, bandwidth=1e9))
    tensors = [torch.ones(4) for _ in range(4)]
    start = time.perf_counter()
    works = [dist.all_reduce(x, group=group, async_op=True) for x in tensors]
    ends = []
    for work in works:
        work.wait()
        ends.append(time.perf_counter() - start)
    assert all(end >= 0.03 * (number + 1) for number, end in enumerate(ends)), ends
    assert [x.tolist() for x in tensors] == [[2.0] * 4] * 4


def test_waiting_for_the_link_takes_no_cpu_time():
    group = SlowGroup(Inner(), Link(latency=0.5, bandwidth=1e9))
    before = time.process_time()
    group.allreduce([torch.ones(4)]).wait()
    assert time.process_time() - before < 0.25


def test_what_fails_in_the_inner_group_is_raised():
    inner = Inner()
    group, inner.fails = SlowGroup(inner, Link(0.0, 1e9)), True
    group.check()
    work = group.allreduce([torch.ones(4)])
    with pytest.raises(RuntimeError, match="the cable was pulled"):
        work.get_future().wait()  # as the reducer does
    with pytest.raises(RuntimeError, match="the cable was pulled"):
        group.check()


# ---- the model of the cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "seconds"), [(2, 1.5), (4, 2.0), (8, 2.25), (64, 0.5 + 2 * 63 / 64)])
def test_a_ring_sends_almost_twice_its_bytes(ranks, seconds):
    assert Link(latency=0.5, bandwidth=100.0).seconds(100, ranks) == pytest.approx(seconds)


def ready_and_sent(job: Job, link: Link, ranks: int, buckets: int) -> float:
    """When a synchronised evaluation ends, bucket by bucket."""
    free = 0.0
    for number in range(buckets):
        ready = job.forward + job.backward * (number + 1) / buckets
        free = max(free, ready) + link.seconds(job.payload / buckets, ranks)
    return free


@pytest.mark.parametrize("bandwidth", [3.0, 10.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("buckets", [1, 2, 4, 7])
def test_a_synchronised_evaluation_ends_with_its_last_bucket(bandwidth, buckets):
    job, link = Job(forward=1.0, backward=2.0, payload=84, buckets=buckets), Link(0.1, bandwidth)
    one = ready_and_sent(job, link, 4, buckets)
    assert job.synced(1, link, 4) == pytest.approx(one)
    assert job.synced(3, link, 4) == pytest.approx(3 * one)
    assert job.synced(1, link, 4, buckets=1) == pytest.approx(3.0 + link.seconds(84, 4))


def mean_by_mean(job: Job, link: Link, ranks: int, k: int) -> float:
    """When a step with local ascents ends: a mean is gathered once the one before has been received, and the buckets of
    the last gradient are sent once the link is free.
    """
    now, free = job.evaluation, 0.0  # evaluation 0
    for _ in range(k - 1):
        now = max(now + job.evaluation, free)
        free = now + link.seconds(job.payload, ranks)
    for number in range(job.buckets):
        ready = now + job.forward + job.backward * (number + 1) / job.buckets
        free = max(free, ready) + link.seconds(job.payload / job.buckets, ranks)
    return free


@pytest.mark.parametrize("bandwidth", [3.0, 10.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_local_ascents_wait_for_the_last_buckets_and_for_what_outlasts_an_evaluation(bandwidth, k):
    job, link = Job(forward=1.0, backward=2.0, payload=84, buckets=4), Link(0.1, bandwidth)
    assert job.local(k, link, 4) == pytest.approx(mean_by_mean(job, link, 4, k))
    if link.seconds(84, 4) <= job.forward:  # hidden, and so are all buckets but the last
        assert job.local(k, link, 4) == pytest.approx((k + 1) * 3.0 + link.seconds(21, 4))


@pytest.mark.parametrize(
    ("contender", "seconds"),
    [
        (Contender("Lookbehind", 2, "nothing"), 9.0),
        (Contender("SGD", 0, "gradients"), 3.9),  # four buckets of 0.6 s, the first of which is full after 1.5 s
        (Contender("public SAM", 1, "gradients"), 7.8),
        (Contender("public SAM", 1, "one bucket"), 2 * (3.0 + 2.1)),
        (Contender("Lookbehind", 2, "gradients"), 11.7),
        (Contender("Lookbehind", 1, "means"), 3.0 + 3.9),
        (Contender("Lookbehind", 3, "means"), 9.0 + 2.1 + 2.4),  # the buckets follow a mean of 2.1 s
    ],
)
def test_each_contender_has_its_cost(contender, seconds):
    job, link = Job(forward=1.0, backward=2.0, payload=84, buckets=4), Link(0.1, bandwidth=42.0)
    assert contender.predicted(job, link, 2) == pytest.approx(seconds)


# ---- who takes part --------------------------------------------------------------------------------------------------


def test_public_sam_takes_the_steps_of_sam():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = []
    for make in (PublicSAM, lambda params, rho, **of_base: SAM(params, torch.optim.SGD, rho=rho, **of_base)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        optimizer = make(model.parameters(), rho=0.3, lr=0.1, momentum=0.8)

        def closure(model: nn.Module = model) -> Tensor:
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss.detach()

        for _ in range(4):
            optimizer.step(closure)
        weights.append([p.detach() for p in model.parameters()])
    for number, (p, q) in enumerate(zip(*weights, strict=True)):
        assert_close(f"tensor {number}", p, q, 1e-10)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One quick run of the command, and what its processes found."""
    folder, found, lines = tmp_path_factory.mktemp("quick"), [], []
    run = processes.run

    def noted(*arguments):
        found.append(run(*arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "run", noted)
        patch.setattr("builtins.print", lambda *what, **_: lines.extend(map(str, what)))
        code = distributed.main(["--quick", "--output", str(folder)])
    return SimpleNamespace(code=code, found=found, printed="\n".join(lines), file=folder / "distributed.md")


GRADIENT = 1024 * 1024
DIGEST = 3 * 2 * 8
"""What ranks compare, of three things: of each a number and its square in float64."""
ONE_RUN = pytest.mark.xdist_group("distributed benchmark")


@ONE_RUN
def test_collectives_and_bytes_are_what_theory_says(quick):
    """DDP's four buckets for each gradient; local ascents send k - 1 means, the last gradient's buckets, the digest."""
    expected = {
        "SGD": (4, GRADIENT),
        "public SAM": (8, 2 * GRADIENT),
        "public SAM, one bucket": (2, 2 * GRADIENT),
        "SAM, synced": (8, 2 * GRADIENT),
        "Lookbehind, k = 2, synced": (12, 3 * GRADIENT),
        "Lookbehind, k = 5, synced": (24, 6 * GRADIENT),
        "SAM, local": (4 + 1, GRADIENT + DIGEST),
        "Lookbehind, k = 2, local": (1 + 4 + 1, 2 * GRADIENT + DIGEST),
        "Lookbehind, k = 5, local": (4 + 4 + 1, 5 * GRADIENT + DIGEST),
        "computation, 2 evaluations": (0, 0),
        "computation, 3 evaluations": (0, 0),
        "computation, 6 evaluations": (0, 0),
        "one all-reduce of a gradient": (1, GRADIENT),
    }
    (by_link,) = quick.found[0].values()
    assert {name: (m.collectives, m.payload) for name, m in by_link.items()} == expected
    assert plan.PAYLOAD == GRADIENT


@ONE_RUN
def test_no_step_is_faster_than_what_it_cannot_hide(quick):
    """Computation, and what of the all-reduces comes after the last gradient."""
    chosen = Plan.of(quick=True)
    ((name, by_link),) = quick.found[0].items()
    for contender in plan.CONTENDERS:
        seconds = by_link[contender.title].seconds
        assert len(seconds) == chosen.rounds
        assert min(seconds) >= 0.999 * contender.predicted(chosen.job, chosen.links[name], 2), contender.title


@ONE_RUN
def test_a_quick_run_says_what_it_found(quick):
    assert quick.code == 0
    file = quick.file.read_text()
    for text in (quick.printed, file):
        assert text.count("Lookbehind, k = 5, local / (computation and one all-reduce): 2 processes, 200 MB/s") == 1
        assert "Predictions of the model, not measured" in text
        assert "What computes is a sleep" in text
    assert "| public SAM | 2 | 8 | 2,097,152 |" in file
    assert str(Path.cwd()) not in file
    assert "python -m benchmarks.distributed --quick" in file


def found_of(seconds: dict[Contender, float], one: float, chosen: Plan) -> dict:
    """Three rounds in the second of which everything took twice as long."""
    by_name = {c.title: seconds.get(c, 1.0) for c in plan.CONTENDERS} | {plan.ONE_ALL_REDUCE: one}
    return {name: {c: Measured([s, 2 * s, s], 1, 8) for c, s in by_name.items()} for name in chosen.links}


@pytest.mark.parametrize(("local", "verdict"), [(3.8 * 1.09, "holds"), (3.8 * 1.11, "FAILS")])
def test_the_bound_is_computation_and_one_all_reduce_of_the_same_round(local, verdict):
    chosen = Plan(Job(0.4, 0.6, 80, 4), {"quick": Link(0.0, 100.0), "slow": Link(0.0, 50.0)}, 3)
    found = found_of({plan.COMPUTATION[2]: 3.0, plan.LOCAL[2]: local}, 0.8, chosen)
    rows = {row[0]: row[1:] for t in report.tables(chosen, {2: found}) for row in t.rows}
    what = "Lookbehind, k = 2, local / (computation and one all-reduce): 2 processes, "
    assert rows[what + "quick"][::2] == ("at most 1.1", verdict)
    assert rows[what + "quick"][1].startswith(f"{local / 3.8:.2f} (")
    wanted = rows[what + "slow"][0]  # all-reduces of 1.6 s: 3 + 0.6 + 1.6 over 3 + 1.6
    assert wanted == "at most 1.1, but all-reduces outlast evaluations: model 1.13"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks: expected at least 2, got 1"),
        (["--ranks", "2,x"], "--ranks: expected numbers with commas between them, got '2,x'"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        distributed.main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


# ---- no process is left behind ---------------------------------------------------------------------------------------


@ONE_RUN
@pytest.mark.parametrize("how", ["a process is killed", "Ctrl-C"])
def test_a_run_that_ends_early_ends_its_processes(how):
    def ends() -> None:
        if how == "Ctrl-C":
            raise KeyboardInterrupt
        multiprocessing.active_children()[-1].kill()

    before = multiprocessing.active_children()
    error, match = (KeyboardInterrupt, None) if how == "Ctrl-C" else (UserError, "rank [01]: its process was ended")
    with pytest.raises(error, match=match):
        processes.run(replace(Plan.of(quick=True, rounds=1000), contenders=()), 2, ends)
    assert multiprocessing.active_children() == before


def those_with(token: str) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            pass
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc to look for processes in")
def test_a_run_that_is_killed_leaves_no_process_behind(tmp_path):
    token = f"LOOKBEHIND_RUN={tmp_path}"
    command = [sys.executable, "-m", "benchmarks.distributed", "--quick", "--rounds", "100000"]
    environment = {**os.environ, **dict([token.split("=")])}
    root = Path(distributed.__file__).parents[2]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment) as run:
        assert run.stderr.readline() == "2 processes: 1 of 100000 rounds\n"
        assert len(those_with(token)) >= 3, "the command and its two processes"
        run.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60  # they end at once, but a machine may be slow
    while (left := those_with(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
