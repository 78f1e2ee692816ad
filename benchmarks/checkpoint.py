"""Checkpoints: everything that a run needs to go on as though it had not stopped."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import UserError, replacing

NAME = "checkpoint.pt"
FORMAT = 2


@dataclass
class Record:
    """What one method has done so far."""

    steps_per_epoch: int
    step: int = 0
    evaluations: float = 0
    """Gradients that were computed, counted where they are; one of a part of the minibatch counts as that part."""
    seconds: float = 0.0
    """Spent in training steps: no evaluation on the test images, no files."""
    loss: list[float] = field(default_factory=list)
    """Of each step, at the weights it began with."""
    alpha: list[float] = field(default_factory=list)
    """Of each step (the mean over tensors with --alpha-scope tensor); empty for SGD."""
    accuracy: list[float] = field(default_factory=list)
    """On the test images after each epoch, a fraction."""
    sharpness: float | None = None
    """Of the final weights, at the run's rho; None until they are there."""
    noise_accuracy: float | None = None
    """On test images with noise in the final weights, a fraction."""


@dataclass
class Checkpoint:
    """A whole run, between two steps."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    """Versions and threads: where they differ, the same bits are not promised."""
    data: str
    """Fingerprint of the training and test data."""
    records: dict[str, Record]
    current: dict[str, Any] | None = None
    """Of the method under way: its name and the states of model, optimizer, scheduler and random numbers."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the folder's checkpoint, so that a kill at any moment leaves the old one or the new one."""
    with replacing(folder / NAME) as file:
        content = {**vars(checkpoint), "records": {name: vars(record) for name, record in checkpoint.records.items()}}
        torch.save({"format": FORMAT, **content}, file)


def load(folder: Path) -> Checkpoint:
    """Reads the folder's checkpoint onto the CPU. UserError if there is none or it is not one of ours."""
    path = folder / NAME
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"--resume: there is no {path}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a checkpoint, or a damaged one") from error
    try:
        if content.pop("format") != FORMAT:
            raise ValueError
        content["records"] = {method: Record(**record) for method, record in content["records"].items()}
        checkpoint = Checkpoint(**content)
        if list(checkpoint.records) != checkpoint.settings["method"]:
            raise ValueError
        if any(record.step != len(record.loss) for record in checkpoint.records.values()):
            raise ValueError
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a checkpoint of this version of the program") from error
    return checkpoint


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of every random number generator that training may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
