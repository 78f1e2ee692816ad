"""What SAM sees in 16 bits: the main job with wrong labels, with and without autocast, and what is left of its ascents.

`python -m benchmarks.train.rounding` prints two tables. It takes the main job's options, and half an hour on CPUs
without 16-bit arithmetic.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import options
from benchmarks.checkpoint import Record
from benchmarks.files import UserError
from benchmarks.job import Job
from lookbehind_fused import analysis

METHODS = {"sgd": (0.0,), "sam": (0.05, 0.1, 0.2), "lookbehind": (0.05, 0.1, 0.2)}
RADII = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DTYPES = (torch.bfloat16, torch.float16)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and prints what it found; exits with 2 after a mistake of the caller."""
    parser = options.Parser(prog="benchmarks.train.rounding", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=options.count, default=3, metavar="N", help="runs of each kind (default: 3)")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), default="bfloat16", help="(default: bfloat16)")
    chosen, more = parser.parse_known_args(argv)
    try:
        compare(chosen.seeds, ["--autocast", chosen.autocast], more)
    except UserError as error:
        parser.error(str(error))
    return 0


def compare(seeds: int, autocast: Sequence[str], more: Sequence[str]) -> None:
    """Both tables; ``autocast`` is the option that makes the difference, ``more`` are options that all runs have."""
    print("| method | rho | float32 | autocast | difference |\n|---|--:|--:|--:|--:|")
    for method, radii in METHODS.items():
        for rho in radii:
            pairs = [
                [trained(method, rho, seed, [*more, *cast]).test_accuracy() for cast in ([], autocast)]
                for seed in tqdm(range(seeds), desc=f"{method} {rho:g}", disable=None, leave=False)
            ]
            columns = [*zip(*pairs, strict=True), [b - a for a, b in pairs]]
            print("|", method, f"| {rho:g} |", " | ".join(map(spread, columns)), "|", flush=True)

    print(f"\n| rho | rho / ‖w‖ |{' changed | cosine | length |' * len(DTYPES)}\n|{'--:|' * (2 + 3 * len(DTYPES))}")
    for row in curve(trained("sam", 0.05, 0, more)):
        print("|", " | ".join(row), "|")


def trained(method: str, rho: float, seed: int, more: Sequence[str]) -> Job:
    """The main job with two fifths of the labels wrong, when one method has run."""
    given = f"--method {method} --rho {rho} --seed {seed} --label-noise 0.4".split()
    job = Job(options.parse([*given, *more])[0])
    if job.options.autocast:  # three times faster where the CPU has no 16-bit arithmetic
        job.model.to(memory_format=torch.channels_last)
    job.reset()
    optimizer, scheduler = job.make_optimizer(method)
    job.train(method, optimizer, scheduler, Record(job.steps_per_epoch), job.total_steps, lambda: None)
    return job


def curve(job: Job) -> Iterator[tuple[str, ...]]:
    """What is left of ascents along the gradient of one minibatch from the final weights: a line for each radius."""
    job.model.zero_grad()
    job.loss(job.batch(0)).backward()
    cast = [p for x in job.model.modules() if isinstance(x, (nn.Conv2d, nn.Linear)) for p in x.parameters()]
    length = torch.cat([p.detach().flatten() for p in cast]).norm().item()
    for rho in RADII:
        found = [analysis.effective_perturbation(job.model, rho=rho, dtype=dtype, cast=cast) for dtype in DTYPES]
        figures = [f"{share:.0%} | {cosine:.2f} | {ratio:.2f}" for share, cosine, ratio in found]
        yield f"{rho:g}", f"{rho / length:.2g}", *figures


def spread(fractions: Sequence[float]) -> str:
    """Mean and standard deviation in percent."""
    percent = [100 * x for x in fractions]
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent) if len(percent) > 1 else 0:.1f}"


if __name__ == "__main__":
    sys.exit(main())
