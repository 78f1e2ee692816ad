"""The same random numbers at every evaluation of a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .program import Evaluation


class Replay:
    """Lets every evaluation of a step begin with torch's random state of the first one: of the CPU and of the devices;
    with microbatches each with that of the first evaluation of its own.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = [device for device in devices if device.type != "cpu"]
        self._states: dict[int, list[Tensor]] = {}

    def at(self, evaluation: Evaluation) -> None:
        """An evaluation is about to run."""
        modules = [(torch.get_device_module(device), device) for device in self._devices]
        states = self._states.get(evaluation.microbatch)
        if states is None:
            of_devices = [module.get_rng_state(device) for module, device in modules]
            self._states[evaluation.microbatch] = [torch.get_rng_state(), *of_devices]
            return
        torch.set_rng_state(states[0])
        for (module, device), state in zip(modules, states[1:], strict=True):
            module.set_rng_state(state, device)
