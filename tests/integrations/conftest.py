"""Nothing is downloaded, and no test finds what another has left in a trainer's process-wide state."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    state = sys.modules.get("accelerate.state")
    for name in ("AcceleratorState", "GradientState", "PartialState") if state is not None else ():
        getattr(state, name)._reset_state()


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Lightning's strategies leave the one that they have made, and its ranks in the environment, of which Accelerate
    would then make use.
    """
    environment = dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
