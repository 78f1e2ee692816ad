"""The main job: several methods train the same network on the same images for the same number of steps.

Without options a comparison of a few methods, each at its best rho, over several seeds; with options a single run.
`python -m benchmarks.train --help` explains them.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from benchmarks import checkpoint as checkpoints
from benchmarks import methods, options
from benchmarks.checkpoint import Checkpoint, Record
from benchmarks.command import check_folders, ended, say
from benchmarks.files import UserError, replacing
from benchmarks.job import Job, first_line
from benchmarks.store import write_json
from benchmarks.train import results
from benchmarks.train.results import NOISE_LEVEL

RUNS = Path("runs")
PICTURE = "curves.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    chosen, given = options.parse(argv)

    def work() -> None:
        if chosen.resume or given - options.OF_COMPARISON - {"output"}:
            train(chosen, given)
        else:
            compare(chosen, shlex.join(sys.argv[1:] if argv is None else argv))

    goes_on = "the same command, for a single run with --resume, goes on from what is there"
    return ended("benchmarks.train", work, goes_on)


def compare(chosen: argparse.Namespace, arguments: str) -> None:
    """The comparison: all runs that are missing, then the report."""
    from benchmarks.train import picture, report, study  # takes seconds, and a mistake should not have to wait for it

    settings = study.QUICK if chosen.quick else study.SHOWN
    folder = chosen.output or RUNS / ("train-quick" if chosen.quick else "train")
    written = chosen.results or folder
    check_folders(folder, written)
    store = study.run(settings, folder, chosen.jobs or os.cpu_count())
    found = report.make(settings, store, f"python -m benchmarks.train {arguments}".strip())
    written.mkdir(parents=True, exist_ok=True)
    with replacing(written / "train.png") as file:
        file.write(picture.draw(found))
    write_json(written / "train.json", report.plain(found), indent=1)
    with replacing(written / "train.md") as file:
        file.write(report.markdown(found).encode())
    say(f"everything is in {written}, the finished runs in {folder}; a new comparison takes another --output")
    print(report.text(found), flush=True)


def train(chosen: argparse.Namespace, given: frozenset[str]) -> None:
    """One run, new or resumed. Whatever is wrong with it is found before anything is written."""
    if of_comparison := given & options.OF_COMPARISON:
        raise UserError(f"{options.as_flag(min(of_comparison), True)}: belongs to the comparison, not to a single run")
    if chosen.resume:
        folder = chosen.output or newest_run()
        checkpoint = checkpoints.load(folder)
        adopt_settings(chosen, given, checkpoint, folder)
        job = Job(chosen)
        check_fit(job, checkpoint, folder)
    else:
        if chosen.output is not None:
            refuse_to_overwrite(chosen.output)
        job = Job(chosen)
        records = {method: Record(job.steps_per_epoch) for method in chosen.method}
        checkpoint = Checkpoint(options.settings(chosen), environment(), job.fingerprint, records)
        folder = chosen.output or new_run(chosen.data)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(folder, checkpoint)

    say(job.describe())
    for method, record in checkpoint.records.items():
        if record.step < job.total_steps:
            run_method(method, job, checkpoint, folder)
            results.write(folder, checkpoint)
    results.write(folder, checkpoint)  # once more for a run that was killed on its last lines

    from benchmarks.train import plots  # takes a second, and a mistake should not have to wait for it

    plots.draw(folder / PICTURE, checkpoint)
    print(results.format_table(results.summarize(checkpoint)), flush=True)
    say(f"everything is in {folder}, the curves in {folder / PICTURE}")


def run_method(method: str, job: Job, checkpoint: Checkpoint, folder: Path) -> None:
    """Trains with one method, from its beginning or from where the checkpoint stands, and saves as it goes."""
    record = checkpoint.records[method]
    job.reset()
    optimizer, scheduler = job.make_optimizer(method)
    if record.step:
        restore(job, optimizer, scheduler, checkpoint.current)
    every = job.options.checkpoint_every or job.total_steps
    with tqdm(
        total=job.total_steps, initial=record.step, desc=f"{method:19}", unit=" step", disable=None, leave=False
    ) as bar:
        while record.step < job.total_steps:
            # up to the next end of an epoch or the next checkpoint, whichever comes first
            stop = record.step + min(interval - record.step % interval for interval in (job.steps_per_epoch, every))
            job.train(method, optimizer, scheduler, record, min(stop, job.total_steps), bar.update)
            if record.step % job.steps_per_epoch == 0:
                with methods.evaluated(optimizer):
                    record.accuracy.append(job.test_accuracy())
                bar.set_postfix_str(f"loss {record.loss[-1]:.3g}, test accuracy {record.accuracy[-1]:.1%}")
            if record.step < job.total_steps:
                checkpoint.current = snapshot(method, job, optimizer, scheduler)
            else:  # first the weights: after the checkpoint says that the method is done, nothing would write them
                checkpoint.current = None
                with methods.evaluated(optimizer), replacing(folder / f"weights-{method}.pt") as file:
                    measure(job, record)
                    torch.save(job.model.state_dict(), file)
            checkpoints.save(folder, checkpoint)
    say(f"{method}: {record.accuracy[-1]:.1%} of the test images after {record.step:,} steps, {record.seconds:.1f} s")


def measure(job: Job, record: Record) -> None:
    """What the table says of the final weights beside their accuracy."""
    record.sharpness = job.sharpness([job.options.rho], job.options.asam)[0] if job.options.rho else 0.0
    record.noise_accuracy = statistics.mean(job.noise_robustness([NOISE_LEVEL], samples=10)[0])


def snapshot(method: str, job: Job, optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """The method under way, between two steps."""
    return {
        "method": method,
        "model": job.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": checkpoints.random_state(job.device),
    }


def restore(job: Job, optimizer: Optimizer, scheduler: LRScheduler, current: dict[str, Any]) -> None:
    """Puts a snapshot back, bit for bit."""
    job.model.load_state_dict(current["model"])
    optimizer.load_state_dict(current["optimizer"])
    scheduler.load_state_dict(current["scheduler"])
    checkpoints.set_random_state(current["random"], job.device)


def adopt_settings(chosen: argparse.Namespace, given: frozenset[str], checkpoint: Checkpoint, folder: Path) -> None:
    """Takes every option from the checkpoint. Those given on the command line have to agree with it."""
    path = folder / checkpoints.NAME
    if checkpoint.settings.keys() != options.settings(chosen).keys():
        raise UserError(f"{path}: written by another version of this program")
    for name, value in checkpoint.settings.items():
        if name not in given:
            setattr(chosen, name, value)
        elif name not in options.FREE_ON_RESUME and getattr(chosen, name) != value:
            was, wanted = options.as_flag(name, value), options.as_flag(name, getattr(chosen, name))
            raise UserError(f"{path}: this run has {was}, not {wanted}; leave it out or name another --output")
    chosen.threads = chosen.threads or checkpoint.environment["threads"]


def check_fit(job: Job, checkpoint: Checkpoint, folder: Path) -> None:
    """UserError unless the checkpoint belongs to this data, this network and these optimizers."""
    path = folder / checkpoints.NAME
    if checkpoint.data != job.fingerprint:
        raise UserError(f"{path}: this run was trained on other data than there is now")
    under_way = [method for method, record in checkpoint.records.items() if 0 < record.step < job.total_steps]
    if under_way != ([checkpoint.current["method"]] if checkpoint.current else []):
        raise UserError(f"{path}: does not say how to go on")
    if checkpoint.current is not None:
        job.reset()
        try:
            restore(job, *job.make_optimizer(checkpoint.current["method"]), checkpoint.current)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: of another model or optimizer: {first_line(error)}") from error
    for name, now in environment().items():
        if (then := checkpoint.environment.get(name)) != now:
            say(f"note: {name} was {then} and is {now}: the result may differ in its last bits")


def environment() -> dict[str, Any]:
    """What the last bits of a result may depend on, beside the settings."""
    return {"torch": str(torch.__version__), "python": platform.python_version(), "threads": torch.get_num_threads()}


def newest_run() -> Path:
    """The folder in runs/ whose checkpoint was written last."""
    found = sorted(RUNS.glob(f"*/{checkpoints.NAME}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: there is no run in {RUNS}/; name its folder with --output")
    return found[-1].parent


def new_run(name: str) -> Path:
    """Makes the first folder of runs/NAME-001, -002, ... that is not there yet."""
    for number in range(1, 1_000_000):
        folder = RUNS / f"{name}-{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise UserError(f"{RUNS}/ is full; name a folder with --output")


def refuse_to_overwrite(folder: Path) -> None:
    """UserError if `folder` has a run in it, finished or not."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: not a folder")
    ours = (checkpoints.NAME, results.HISTORY, results.SUMMARY, results.RESULTS, PICTURE, "weights-*.pt")
    if any(found for name in ours for found in folder.glob(name)):
        raise UserError(f"--output {folder}: holds a run already; continue it with --resume, or name another folder")


if __name__ == "__main__":
    sys.exit(main())
