"""The constructor forms that people already use, over this library's passes: a script changes its import line alone.

The form of the authors of Lookbehind-SAM, around a torch optimizer and a model (the two spellings are one class)::

    from lookbehind_fused.compat import ASAM, SAM, Lookbehind_ASAM, Lookbehind_SAM, LookbehindASAM, LookbehindSAM

The form of the popular single-file port of SAM and of the optimizer collections, a torch optimizer::

    from lookbehind_fused.compat import SingleFileSAM as SAM
"""

from .authors import ASAM, SAM, Lookbehind_ASAM, Lookbehind_SAM, LookbehindASAM, LookbehindSAM
from .single_file import SingleFileSAM

__all__ = [
    "ASAM",
    "SAM",
    "LookbehindASAM",
    "LookbehindSAM",
    "Lookbehind_ASAM",
    "Lookbehind_SAM",
    "SingleFileSAM",
]
