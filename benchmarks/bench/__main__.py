"""The benchmark suite: measures, prints DESIGN's table of bounds with verdicts, and writes JSON, Markdown and plots.

`python -m benchmarks.bench --help` explains the options.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.suite import GROUPS, measure, warn
from benchmarks.files import UserError, replacing

RESULTS = Path("benchmarks/results")
CASES = [(group, "") for group in GROUPS]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; 0 if all was measured, 1 if a case failed, 2 after a mistake of the caller, 130 on Ctrl-C."""
    chosen = parse(argv)
    try:
        return run(chosen, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        warn(str(error))
        return 2
    except OSError as error:
        warn(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        warn("interrupted, nothing written")
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    groups = "\n".join(f"  {name:12} {what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench",
        description="Measures the optimizer against DESIGN's bounds; all contenders take turns in one process.",
        epilog=f"groups:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter, nothing large, little compiled")
    parser.add_argument(
        "--only", metavar="G,G", help="groups to measure, or cases of a group by a part of their name: own:small,calls "
        "(default: all)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 2, or the cores there are)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="take the CPU time of one thread instead of the wall's: for a machine "
        "that other programs use",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help=f"folder for results.json, table.md and the plots (default: {RESULTS}; with --quick or --only nothing is "
        "written unless a folder is given)",
    )  # fmt: skip
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw from DIR's results.json")
    chosen = parser.parse_args(argv)
    chosen.cases = [case.partition(":")[::2] for case in chosen.only.split(",")] if chosen.only else CASES
    for group, _ in chosen.cases:
        if group not in GROUPS:
            parser.exit(2, f"{parser.prog}: --only: expected some of {', '.join(GROUPS)}, got {group!r}\n")
    if chosen.cpu_time and chosen.threads not in (None, 1):
        parser.exit(2, f"{parser.prog}: --threads: expected 1 with --cpu-time, got {chosen.threads}\n")
    if chosen.threads is not None and chosen.threads < 1:
        parser.exit(2, f"{parser.prog}: --threads: expected at least 1, got {chosen.threads}\n")
    return chosen


def run(chosen: argparse.Namespace, argv: list[str]) -> int:
    """Measure, or load what was measured, and report."""
    output = chosen.output or (RESULTS if not (chosen.quick or chosen.only) or chosen.redraw else None)
    if chosen.redraw:
        results, suite = load(output / "results.json"), None
    else:
        if output:
            output.mkdir(parents=True, exist_ok=True)
        results, suite = measure(chosen.cases, chosen.quick, chosen.threads, chosen.cpu_time, argv)

    from benchmarks.bench import bounds, tables

    table = bounds.check(results["measurements"])
    print(tables.as_text(table), flush=True)
    if output:
        from benchmarks.bench import plots

        results["bounds"] = [vars(bound) for bound in table]
        write(output / "results.json", to_json(results))
        write(output / "table.md", tables.as_markdown(table, results["measurements"], results["environment"]))
        for name, figure in plots.draw(results).items():
            write(output / name, figure)
        print(f"everything is in {output}", file=sys.stderr)
    for line in (suite.skipped + suite.problems) if suite else ():
        warn(line)
    return 1 if suite and suite.problems else 0


def load(path: Path) -> dict[str, Any]:
    """What an earlier run has written."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def write(path: Path, content: bytes) -> None:
    """The whole file or the old one."""
    with replacing(path) as file:
        file.write(content)


def to_json(results: dict[str, Any]) -> bytes:
    """Numbers to five digits, which is more than there is to know."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: short(v) for key, v in value.items()}
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    lines = ",\n  ".join(json.dumps(short(m), allow_nan=False) for m in results["measurements"])
    rest = {key: short(value) for key, value in results.items() if key != "measurements"}
    head = json.dumps(rest, indent=1, allow_nan=False, ensure_ascii=False).rstrip("}\n")
    return f'{head},\n "measurements": [\n  {lines}\n ]\n}}\n'.encode()


if __name__ == "__main__":
    sys.exit(main())
