"""The gain at nearly SGD's cost: the main job with wrong labels, ascents by the gradient of a part of the minibatch.

`python -m benchmarks.train.fractions` prints accuracy over fraction and rho, beside controls, and the time of a step.
It takes the main job's options, goes on where it was killed, and needs half an hour on one core.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks import data, options
from benchmarks.files import UserError, replacing
from benchmarks.job import Job
from benchmarks.machine import processor
from benchmarks.spread import ratios
from benchmarks.tables import markdown

FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 16)
RHOS = (0.1, 0.2, 0.4, 0.8)
RHOS_OF_CONTROLS = (0.2, 0.4)
KINDS = {
    "sgd": "SGD",
    "sam": "ascent on the first {0} of the minibatch",
    "other": "ascent on {0} of another minibatch of the epoch",
    "random": "ascent in a random direction",
    "second": "SAM at every second step",
}
ROUNDS = 40  # of the time of a step
NAME = "fractions.json"


class Run(NamedTuple):
    """One training run: of a key of ``KINDS``."""

    kind: str
    seed: int
    fraction: float = 1.0
    rho: float = 0.0

    @property
    def name(self) -> str:
        """Under which its result is kept."""
        return f"{self.kind} fraction {self.fraction:g} rho {self.rho:g} seed {self.seed}"

    @property
    def cost(self) -> float:
        """Gradients of a whole minibatch, a step."""
        return {"sgd": 1.0, "random": 1.0, "second": 1.5}.get(self.kind, 1 + self.fraction)


def rows() -> list[list[Run]]:
    """The lines of the table, each with a run of seed 0 for each of its rhos."""
    of_sam = [[Run("sam", 0, fraction, rho) for rho in RHOS] for fraction in FRACTIONS]
    controls = [("other", 1 / 4), ("random", 1.0), ("second", 1.0)]
    return [[Run("sgd", 0)], *of_sam, *([Run(kind, 0, f, rho) for rho in RHOS_OF_CONTROLS] for kind, f in controls)]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is not there yet, and prints what it found; exits with 2 after a mistake of the caller."""
    parser = options.Parser(prog="benchmarks.train.fractions", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=options.count, default=3, metavar="N", help="runs of each kind (default: 3)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/fractions"), metavar="DIR",
        help=f"where {NAME} is, or is to be (default: runs/fractions)",
    )  # fmt: skip
    chosen, more = parser.parse_known_args(argv)
    try:
        measure(chosen.seeds, chosen.folder, more)
    except UserError as error:
        parser.error(str(error))
    return 0


def measure(seeds: int, folder: Path, more: Sequence[str]) -> None:
    """Everything; what is in ``folder`` already is not trained again. ``more`` are options that all runs have."""
    parsed = job_of(Run("sgd", 0), more)
    settings = {**options.settings(parsed.options), "torch": str(torch.__version__), "data": parsed.data.fingerprint()}
    path, found = folder / NAME, dict[str, float]()
    if path.exists():
        content = json.loads(path.read_text())
        if content["settings"] != settings:
            raise UserError(f"--folder: {path} is of runs with other options or another torch; name another folder")
        found = content["accuracy"]
    folder.mkdir(parents=True, exist_ok=True)
    table = rows()
    wanted = [run._replace(seed=seed) for seed in range(seeds) for row in table for run in row]
    for run in tqdm([run for run in wanted if run.name not in found], desc="runs", disable=None, leave=False):
        found[run.name] = trained(run, more).test_accuracy()
        with replacing(path) as file:
            content = {"settings": settings, "python": platform.python_version(), "accuracy": found}
            file.write(json.dumps(content, indent=1).encode())

    header = ["", "gradients a step", *(f"rho {rho:g}" for rho in RHOS)]
    print("\n".join(markdown(header, [_line(row, found, seeds) for row in table])), flush=True)
    print("\n" + "\n".join(markdown(["", "gradients", "CPU time of a step / SGD's"], times(more))))
    print(f"\n{processor()}, one thread, torch {torch.__version__}, Python {platform.python_version()}, {seeds} seeds")


def _line(row: Sequence[Run], found: dict[str, float], seeds: int) -> list[str]:
    cells = {run.rho: _spread([100 * found[run._replace(seed=seed).name] for seed in range(seeds)]) for run in row}
    by_rho = [next(iter(cells.values()))] * len(RHOS) if row[0].kind == "sgd" else [cells.get(rho, "") for rho in RHOS]
    return [*_label(row[0]), *by_rho]


def _label(run: Run) -> list[str]:
    whole = run.kind == "sam" and run.fraction == 1
    text = "SAM" if whole else KINDS[run.kind].format(f"1/{1 / run.fraction:g}")
    return [text, f"{run.cost:g}"]


def _spread(percent: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent) if len(percent) > 1 else 0:.1f}"


def job_of(run: Run, more: Sequence[str]) -> Job:
    """The main job with two fifths of the labels wrong, before a run."""
    given = f"--rho {run.rho} --seed {run.seed} --label-noise 0.4".split()
    job = Job(options.parse([*given, *more])[0])
    job.reset()
    return job


def trained(run: Run, more: Sequence[str]) -> Job:
    """The job after a run."""
    job = job_of(run, more)
    optimizer, scheduler = job.make_optimizer("sgd" if run.kind == "sgd" else "sam")
    one_step = stepper(run, job, optimizer)
    for step in range(job.total_steps):
        one_step(step)
        scheduler.step()
    return job


def stepper(run: Run, job: Job, optimizer: Any) -> Callable[[int], object]:
    """A function that takes the step of a number."""
    sgd: Optimizer = optimizer if run.kind == "sgd" else optimizer.base_optimizer
    if run.kind in ("sam", "other"):
        optimizer.ascent_fraction = run.fraction
    generator = data.seeded_generator(job.options.seed, "direction", 0)

    def gradient(batch: Tensor) -> None:
        optimizer.zero_grad()
        job.loss(batch).backward()

    def one_step(step: int) -> None:
        batch = job.batch(step)
        if run.kind == "sgd" or (run.kind == "second" and step % 2):
            gradient(batch)
            sgd.step()
            return
        for evaluation in optimizer.evaluations():
            if evaluation.index or run.kind in ("sam", "second"):
                gradient(evaluation.part(batch))
            elif run.kind == "other":  # of the same epoch, so that no example is of both
                epoch, place = divmod(step, job.steps_per_epoch)
                other = epoch * job.steps_per_epoch + (place + job.steps_per_epoch // 2) % job.steps_per_epoch
                gradient(evaluation.part(job.batch(other)))
            else:
                for p in job.model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator).to(p.device)

    return one_step


def times(more: Sequence[str], at_once: int = 3) -> list[list[str]]:
    """CPU time of a step over SGD's: medians and quartiles over rounds in which everyone has a turn of some steps."""
    runs = [Run("sgd", 0), *(Run("sam", 0, fraction, RHOS[0]) for fraction in FRACTIONS)]
    steppers, spent = [], [list[float]() for _ in runs]
    for run in runs:
        job = job_of(run, more)
        steppers.append(stepper(run, job, job.make_optimizer("sgd" if run.kind == "sgd" else "sam")[0]))
    for number in range(ROUNDS + 1):
        for one_step, of_one in zip(steppers, spent, strict=True):
            start = time.process_time()
            for step in range(at_once):
                one_step(step)
            if number:  # the first round makes buffers
                of_one.append(time.process_time() - start)
    return [[*_label(run), ratios(of_one, spent[0]).show()] for run, of_one in zip(runs, spent, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
