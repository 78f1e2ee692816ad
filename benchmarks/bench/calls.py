"""Calls of the package's own Python functions, which is what a step of small tensors mostly costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lookbehind_fused

FOLDER = str(Path(lookbehind_fused.__file__).parent)


def own_calls(action: Callable[[], Any]) -> int:
    """How often ``action`` enters a function in a file of the package: calls, generators that go on, and whatever else
    has a frame of its own (comprehensions before Python 3.12).
    """
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(FOLDER)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count
