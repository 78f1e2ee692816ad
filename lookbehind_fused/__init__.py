"""Lookbehind-SAM (Mordido et al., ICML 2024) as a torch optimizer, from k + 1 gradients a step."""

from .buckets import Evaluation
from .optimizer import Lookbehind

__all__ = ["Evaluation", "Lookbehind"]
__version__ = "0.1.0.dev0"
