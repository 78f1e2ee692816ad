"""What was measured, as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.bench.bounds import Bound, Measurements
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import TITLES
from benchmarks.spread import Spread
from benchmarks.tables import aligned, markdown


def as_text(table: Iterable[Bound]) -> str:
    """For a terminal."""
    return aligned(
        ("bound", "wanted", "measured: median (quartiles)", "verdict"),
        [(b.what, b.bound, b.measured, b.verdict) for b in table],
    )


def as_markdown(table: Iterable[Bound], measurements: Measurements, environment: Mapping[str, Any]) -> bytes:
    """The bounds, and below them what the optimizer's own work took."""
    e = environment
    policy = e["OMP_WAIT_POLICY"] or "not set"
    lines = [
        "# Benchmark results",
        "",
        f"{e['processor']}, {e['cores']} cores ({e['instructions']}), {e['threads']} threads, "
        f"OMP_WAIT_POLICY {policy}, load average {e['load_before']} before the run, torch {e['torch']}, "
        f"Python {e['python']}, {e['system']}, {e.get('clock', 'wall')} clock; "
        f"float32, SGD with momentum and weight decay. Made by `{e['command']}` in {e['minutes']} minutes. Ratios are "
        "taken within each round of all contenders; median, and in brackets the quartiles.",
        "",
        *markdown(
            ("bound", "wanted", "measured", "verdict"), [(b.what, b.bound, b.measured, b.verdict) for b in table]
        ),
        "",
        "## The optimizer's own work, milliseconds a step",
        "",
    ]
    names = ("naive", "public", "foreach", "compiled", "native")
    rows = []
    for m in measurements:
        if m["group"] in ("own", "variations"):
            s = Settings(**m["settings"])
            what = f"{'ASAM' if s.asam else 'SAM'}, {'adaptive' if s.adaptive else 'static'}, k = {s.k}"
            times = [_milliseconds(m["seconds"].get(name)) for name in names]
            rows.append((TITLES.get(m["set"], m["set"]), what, *times))
    lines += markdown(("tensors", "settings", *names), rows)
    pairs = [m for m in measurements if m["group"] == "sam"]
    if pairs:
        lines += ["", "## As SAM, by halves, milliseconds a step", ""]
        names = ("port", "pair")
        rows = [(TITLES[m["set"]], *(_milliseconds(m["seconds"][name]) for name in names)) for m in pairs]
        lines += markdown(("tensors", "single-file port", "native"), rows)
    return "\n".join([*lines, ""]).encode()


def _milliseconds(seconds: list[float] | None) -> str:
    return f"{1e3 * Spread.of(seconds).median:.4g}" if seconds else ""
