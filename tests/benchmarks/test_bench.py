"""The benchmark suite: its contenders do equal work, and its table says what was measured."""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.bench import __main__ as bench
from benchmarks.bench import bounds, calls, memory, own_work, timing
from benchmarks.bench import plots as bench_plots
from benchmarks.bench.contenders import Compiled, Foreach, ForeachOnDevice, Fused, Naive, OpsAlone, Pair, Port, Public
from benchmarks.bench.own_work import OwnWork, passes_of_a_step
from benchmarks.bench.settings import Settings
from tests.conftest import assert_close

STEPS = 3
SHAPES = [(7, 5), (5,), (1,), (2, 3, 3, 3), (300,)]
CONFIGURATIONS = list(itertools.product((1, 2, 3), (False, True), (0.4, "adaptive"), ("tensor", "global")))


def run(contender: type, settings: Settings, dtype: torch.dtype, **more: str) -> list[Tensor]:
    """The weights after some steps on a quadratic, each tensor's curvature its own."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    slopes = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    params = [p.requires_grad_() for p in params]
    optimizer = contender(params, settings, **more)
    evaluations = 0
    for _ in range(STEPS):
        for _ in optimizer.evaluations():
            evaluations += 1
            for i, (p, slope) in enumerate(zip(params, slopes, strict=True)):
                assert p.grad is None
                p.grad = (0.3 + 0.1 * i) * p.detach() + slope
    expected = 2 * settings.k if contender in (Naive, Public) else settings.k + 1
    assert evaluations == expected * STEPS
    return [p.detach() for p in params]


def settings_of(k: int, asam: bool, alpha: float | str, scope: str) -> Settings:
    return Settings(
        k=k, asam=asam, alpha=alpha, scope=scope, rho=0.3, eta=0.05, lr=0.07, momentum=0.8, weight_decay=0.03
    )


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_ops_alone_take_native_s_steps(k: int) -> None:
    """To the last bit: what is timed as the least that native's step costs is that step."""
    settings = settings_of(k, True, 0.5, "global")
    found, expected = (run(contender, settings, torch.float64) for contender in (OpsAlone, Fused))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("asam", [False, True])
def test_a_norm_that_stays_on_the_device_is_read_by_nobody(k: int, asam: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectory of the reference backend, and no number of the device on the host."""
    settings = settings_of(k, asam, 0.4, "global")
    expected = run(Fused, settings, torch.float64, backend="reference")

    def refuse(tensor: Tensor) -> float:
        raise AssertionError("float() of a tensor")

    monkeypatch.setattr(torch.Tensor, "__float__", refuse)
    found = run(ForeachOnDevice, settings, torch.float64)
    with pytest.raises(AssertionError, match="float"):
        run(Foreach, settings, torch.float64)
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12), f"tensor {i}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("k", "asam", "alpha", "scope"), CONFIGURATIONS)
@pytest.mark.parametrize("contender", [Naive, Public, Foreach, Compiled, Fused])
def test_contenders_take_the_same_trajectory(contender, k, asam, alpha, scope, dtype, tolerance):
    if contender in (Naive, Public) and alpha == "adaptive" and scope == "global":
        pytest.skip("the public code knows no global alpha")
    if contender in (Naive, Public) and alpha == "adaptive" and k == 1:
        pytest.skip("the public code has no adaptive alpha of one inner step")
    settings = settings_of(k, asam, alpha, scope)
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes; the suite compares what was compiled
        found = run(contender, settings, dtype)
    for i, (actual, expected) in enumerate(zip(found, run(Fused, settings, dtype, backend="reference"), strict=True)):
        assert_close(f"tensor {i}", actual, expected, tolerance)


# The table


def own(set_name: str, native: float = 1.0, **others: float) -> dict:
    """A measurement of three rounds, the second of which the machine was twice as slow in."""
    seconds = {name: [s, 2 * s, s] for name, s in {"native": native, **others}.items()}
    return {"group": "own", "set": set_name, "settings": asdict(Settings()), "seconds": seconds}


def line(measurements: list[dict], what: str) -> bounds.Bound:
    (found,) = [bound for bound in bounds.check(measurements) if what in bound.what]
    return found


@pytest.mark.parametrize(("naive", "verdict"), [(15.5, bounds.HOLDS), (14.5, bounds.FAILS)])
def test_ratio_is_held_to_its_bound(naive, verdict):
    bound = line([own("small", naive=naive, compiled=9.0)], "naive / native: 80 small")
    assert bound.verdict == verdict
    assert bound.measured == f"{naive:.2f} ({naive:.2f} to {naive:.2f})"  # the slow round is as slow for both


def test_what_was_not_measured_is_said_to_be_missing():
    table = bounds.check([])
    assert len(table) > 30
    assert {bound.verdict for bound in table} == {bounds.MISSING}
    assert line([own("small", naive=30.0)], "compiled / native: 80 small").verdict == bounds.MISSING


def test_a_single_slow_round_of_one_contender_does_not_decide():
    m = own("resnet34", naive=4.0)
    m["seconds"]["native"][1] *= 100
    assert line([m], "naive / native: ResNet-34").verdict == bounds.HOLDS
    m["seconds"]["native"][0] *= 100
    assert line([m], "naive / native: ResNet-34").verdict == bounds.FAILS


@pytest.mark.parametrize(("native", "verdict"), [(0.99, bounds.HOLDS), (1.01, bounds.FAILS)])
def test_bandwidth_is_compared_with_the_better_of_copy_and_add(native, verdict):
    n = 1_000_000  # copy moves 8 bytes, add 12, a step 68: in this unit copy reaches 1, add 0.75 of the peak
    seconds = {"copy": [8.0], "add": [16.0], "native": [68 * native / 0.8]}
    m = {"group": "bandwidth", "set": "resnet34", "elements": n, "settings": asdict(Settings()), "seconds": seconds}
    assert line([m], "bandwidth at 21 M").verdict == verdict


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(), 68),
        (Settings(k=1), 40),
        (Settings(k=3, asam=True), 3 * 8 + 16 + 24 + 28 + 24),
        (Settings(k=5), 5 * 4 + 16 + 24 + 3 * 28 + 24),
        (Settings(alpha="adaptive"), 2 * 4 + 16 + 24 + 20 + 12),
        (Settings(k=3, alpha="adaptive"), 3 * 4 + 16 + 2 * 28 + 28 + 12),
    ],
)
def test_passes_move_the_bytes_that_design_allows(settings, expected):
    m = {"passes": passes_of_a_step(settings, 512), "settings": asdict(settings)}
    assert bounds.traffic(m) == bounds.bytes_per_parameter(settings) == expected


def test_traffic_sees_a_read_and_a_write_too_many():
    passes = [["ascend", 16.0], ["descend_ascend", 24.0], ["descend_interpolate", 24.0]]
    m = {"group": "traffic", "case": "one", "passes": passes, "settings": asdict(Settings())}
    bound = line([m], "bytes per parameter")
    assert bound.verdict == bounds.FAILS
    assert "72 instead of 68" in bound.measured


@pytest.mark.parametrize(("state", "peak", "verdict"), [(3, 3, "holds"), (4, 4, "FAILS"), (3, 4, "FAILS")])
def test_memory_counts_state_and_peak(state, peak, verdict):
    native = {"state": state, "base": 1, "peak": peak}
    m = {"group": "memory", "settings": asdict(Settings()), "copies": {"native": native}}
    assert line([m], "k = 2, static").verdict == verdict
    assert line([m], "k = 1, static").verdict == bounds.MISSING


def sam(set_name: str, port: float) -> dict:
    return {"group": "sam", "set": set_name, "seconds": {"port": [port, 2 * port], "pair": [1.0, 2.0]}}


@pytest.mark.parametrize(("port", "verdict"), [(1.6, bounds.HOLDS), (1.4, bounds.FAILS)])
def test_the_pair_is_held_to_the_bound_of_its_set(port, verdict):
    assert line([sam("flat-1e4", port), sam("small", 9.0)], "port / native: one tensor").verdict == verdict
    assert line([sam("flat-1e4", port), sam("small", 9.0)], "port / native: 80").verdict == bounds.HOLDS


@pytest.mark.parametrize(("missing", "verdict"), [(1.1, bounds.HOLDS), (1.2, bounds.FAILS)])
def test_a_missing_gradient_costs_a_ratio(missing, verdict):
    m = {"group": "missing", "seconds": {"all": [1.0, 3.0], "missing": [missing, 3 * missing]}}
    assert line([m], "one gradient of 1,000 missing").verdict == verdict


@pytest.mark.parametrize(("fifty", "verdict"), [(3, bounds.HOLDS), (150, bounds.FAILS)])
def test_fifty_groups_are_held_to_the_launches_of_one(fifty, verdict):
    m = {"group": "groups", "launches": {"one": 3, "fifty": fifty}, "seconds": {"one": [1.0], "fifty": [1.5]}}
    found = line([m], "fifty groups")
    assert found.verdict == verdict
    assert "1.50" in found.measured


@pytest.mark.parametrize(("count", "groups", "verdict"), [(40, 1, "holds"), (41, 1, "FAILS"), (60, 50, "holds")])
def test_calls_are_held_to_their_bound(count, groups, verdict):
    m = {"group": "calls", "groups": groups, "calls": {"step(closure)": count, "pairs": 1000}}
    assert line([m], f"step(closure), {groups} group").verdict == verdict


def test_foreach_is_looked_at_where_native_is_slowest():
    measurements = [
        {**own(name, foreach=foreach), "case": name, "elements": 1}
        for name, foreach in (("small", 4.0), ("flat-1e4", 0.9))
    ]
    found = line(measurements, "foreach / native")
    assert found.verdict == bounds.FAILS
    assert "0.90 (0.90 to 0.90) at flat-1e4, of 2" in found.measured
    measurements[1]["seconds"]["foreach"] = [1.1, 2.2, 1.1]
    assert line(measurements, "foreach / native").verdict == bounds.HOLDS
    assert line(measurements[:1], "foreach / native").verdict == bounds.MISSING


@pytest.mark.parametrize("counts", [[1, 2, 1], [1, 3, 1], [0, 1, 1]])
def test_launches_are_counted_for_any_number_of_tensors_and_groups(counts):
    measurements = [
        {"group": "launches", "set": set_name, "groups": groups, "launches": {"k2": counts}}
        for set_name, groups in bounds.LAUNCHES
    ]
    expected = bounds.HOLDS if counts == [1, 2, 1] else bounds.FAILS
    assert line(measurements, "launches per gradient").verdict == expected
    assert line(measurements[1:], "launches per gradient").verdict == bounds.MISSING


@pytest.mark.parametrize(("power", "verdict"), [(1.0, bounds.HOLDS), (1.3, bounds.FAILS)])
def test_cost_is_fitted_by_a_power(power, verdict):
    measurements = [
        {"group": "scaling", "set": f"{n}x256", "tensors": n, "seconds": {"native": [1e-6 * n**power]}}
        for n in (1, 100, 1000, 10_000)
    ]
    bound = line(measurements, "cost against tensor count")
    assert bound.verdict == verdict
    assert bound.measured.startswith(f"{power:.2f}, 3 sizes")


@pytest.mark.parametrize(("microseconds", "verdict"), [(299, "holds"), (301, "FAILS")])
def test_the_hosts_share_is_a_time(microseconds, verdict):
    m = {"group": "host", "tensors": 161, "seconds": {"native": [1e-6 * microseconds] * 3}}
    found = line([m], "the host's share of a step on a GPU, launches that do nothing, 161 tensors")
    assert (found.verdict, found.measured) == (verdict, f"{microseconds} µs ({microseconds} to {microseconds})")


def test_the_hosts_share_is_measured_without_a_gpu():
    """Kernels are not launched: weights stay; what the host does is timed; and no trace is left."""
    from benchmarks.bench import host
    from lookbehind_fused.kernels import cuda

    before = cuda.why_not(), cuda._prepare
    times = host.host_times(3, steps=4)
    assert len(times) == 4
    assert all(0 < seconds < 10 for seconds in times)
    assert (cuda.why_not(), cuda._prepare) == before


def test_predictions_are_the_formula():
    from benchmarks.bench import predictions

    assert sorted(predictions.DEVICES.values()) == sorted(predictions.BANDWIDTH)
    found = predictions.predicted(1_000_000_000, 1e12, host=1e-3)
    assert found.device == pytest.approx(68e9 / 0.9e12 + 12e-6)
    assert found.eager == found.device
    assert found.captured == pytest.approx(found.device + 10e-6)
    small = predictions.predicted(1000, 1e12, host=1e-3)
    assert small.eager == pytest.approx(1e-3 + 6 * 5e-6)
    text = predictions.table({161: 500e-6})
    assert text.count("captured") == 2 * len(predictions.BANDWIDTH)
    assert "predicted, not measured" in text


@pytest.mark.parametrize(("microseconds", "verdict"), [(140, bounds.HOLDS), (160, bounds.FAILS)])
def test_overhead_is_a_time(microseconds, verdict):
    m = {"group": "overhead", "seconds": {"native": [1e-6 * microseconds] * 3}}
    assert line([m], "Python and dispatch").verdict == verdict


def test_published_memory_is_counted_once():
    flat = torch.zeros(100)
    state = {1: {"momentum_buffer": flat[:50], "step": 3}, 2: {"momentum_buffer": flat[50:], "other": torch.zeros(7)}}
    assert memory.published(state) == 400 + 28


def test_allocated_is_what_stays_and_the_most_at_one_time():
    def action() -> torch.Tensor:
        kept = torch.zeros(1000)
        del kept
        return torch.zeros(600) + torch.ones(600)

    found = memory.allocated(action)
    assert 2400 <= found.kept <= 2400 + 1000
    assert 3 * 2400 <= found.peak <= 3 * 2400 + 1000


def test_calls_of_own_functions_are_counted_and_no_others():
    p = torch.ones(3, requires_grad=True)
    optimizer = Fused([p], Settings(k=1))
    assert calls.own_calls(lambda: sorted([3, 1], key=lambda x: -x)) == 0
    once = calls.own_calls(lambda: optimizer.evaluation)
    assert once == 1
    assert calls.own_calls(lambda: [optimizer.evaluation for _ in range(3)]) == 3


@pytest.mark.parametrize("spoilt", [False, True])
def test_pairs_are_compared_to_the_last_bit(spoilt):
    settings = Settings(k=1, alpha=1.0)
    work = own_work.own_work(["port", "pair"], SHAPES, settings)
    if spoilt:
        with torch.no_grad():
            work["pair"].params[0].view(-1)[3] += 1e-7
        with pytest.raises(RuntimeError, match=r"port and pair: 1 of 5 tensors are not the same bits"):
            own_work.check_equal_bits(work)
    else:
        assert own_work.check_equal_bits(work) < 1e-6


@pytest.mark.parametrize("pair", [Port, Pair])
def test_pairs_take_a_step_of_sam(pair):
    """The same trajectory as SAM of the reference backend, with gradients that depend on the weights."""
    settings = Settings(k=1, alpha=1.0, rho=0.3, lr=0.07, momentum=0.8, weight_decay=0.03)
    found = run(pair, settings, torch.float64)
    expected = run(Fused, settings, torch.float64, backend="reference")
    for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"tensor {i}", actual, wanted, 1e-10)


def test_work_with_a_missing_gradient_leaves_its_tensor_alone():
    work: OwnWork = own_work.native_work([(3,)] * 4, Settings(), groups=2, without=2)
    before = [p.detach().clone() for p in work.params]
    work()
    assert [torch.equal(p, q) for p, q in zip(work.params, before, strict=True)] == [False, False, True, False]


def test_the_clock_is_the_wall_s_or_the_thread_s(monkeypatch):
    monkeypatch.setattr(timing.Clock, "read", time.thread_time)
    (asleep,) = timing.timed(lambda: time.sleep(0.05))()
    assert asleep < 0.04
    monkeypatch.setattr(timing.Clock, "read", time.perf_counter)
    (asleep,) = timing.timed(lambda: time.sleep(0.05))()
    assert asleep >= 0.05


# The command


def test_a_run_measures_draws_and_can_be_drawn_again(tmp_path, capsys):
    code = bench.main(["--quick", "--only", "traffic,calls:50", "--output", str(tmp_path), "--threads", "1"])
    printed = capsys.readouterr().out
    assert code == 0
    assert "holds" in printed
    assert "not measured" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["threads"] == 1
    assert results["environment"]["command"].startswith("python -m benchmarks.bench --quick")
    assert str(Path.cwd()) not in (tmp_path / "results.json").read_text()
    assert [m["group"] for m in results["measurements"]] == ["traffic"] * 6 + ["calls"]
    assert results["environment"]["clock"] == "wall"
    assert "| bytes per parameter" in (tmp_path / "table.md").read_text()
    assert bench.main(["--redraw", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only: expected some of"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--threads", "2", "--cpu-time"], "--threads: expected 1 with --cpu-time, got 2"),
        (["--redraw", "--output", "missing"], "missing/results.json: No such file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = bench.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_pictures_are_drawn_from_synthetic_results():
    settings = asdict(Settings())
    numbers = {"naive": [4.0, 5.0], "foreach": [2.0, 2.0], "compiled": [1.5, 1.6], "native": [1.0, 1.0]}
    measurements = [
        *({**own(name), "seconds": numbers} for name in ("small", "resnet34")),
        *({**own(name), "group": "variations", "seconds": numbers} for name in ("small", "resnet34")),
        *({"group": "scaling", "set": f"{n}x256", "tensors": n, "seconds": numbers} for n in (1, 10)),
        *({"group": "scaling", "set": f"flat-{n}", "elements": n, "seconds": numbers} for n in (10**4, 10**5)),
        {"group": "training", "images": "digits", "k": 2, "seconds": numbers},
        {
            "group": "bandwidth",
            "elements": 10**6,
            "settings": settings,
            "seconds": {"native": [9.0], "copy": [1.0], "add": [1.5]},
        },
        {"group": "memory", "settings": settings, "copies": {"native": {"state": 3, "base": 1, "peak": 3.5}}},
    ]
    environment = {"processor": "a processor", "cores": 2, "threads": 2, "torch": "2"}
    pictures = bench_plots.draw({"measurements": measurements, "environment": environment})
    assert len(pictures) == 5
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert bench_plots.draw({"measurements": [], "environment": environment}) == {}
