"""Lookbehind-SAM (Mordido et al., ICML 2024) as a torch optimizer, from k + 1 gradients a step."""

from .arguments import weight_scaling
from .evaluations import Evaluation
from .family import ASAM, SAM, MultistepSAM
from .optimizer import Lookbehind

__all__ = ["ASAM", "SAM", "Evaluation", "Lookbehind", "MultistepSAM", "weight_scaling"]
__version__ = "0.1.0.dev0"
