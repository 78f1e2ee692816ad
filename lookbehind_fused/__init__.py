"""Lookbehind-SAM (Mordido et al., ICML 2024) as a torch optimizer, from k + 1 gradients a step."""

from .arguments import weight_scaling
from .family import ASAM, SAM, MultistepSAM
from .lookahead import Lookahead
from .optimizer import Lookbehind
from .parts.buffers import buffers_at_slow, running_stats_at_slow
from .program import Evaluation
from .report import show_backends, version
from .schedules import LambdaSchedule

__all__ = [
    "ASAM",
    "SAM",
    "Evaluation",
    "LambdaSchedule",
    "Lookahead",
    "Lookbehind",
    "MultistepSAM",
    "buffers_at_slow",
    "running_stats_at_slow",
    "show_backends",
    "weight_scaling",
]
__version__ = version()
