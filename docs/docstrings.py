"""An extension of griffe: in docstrings a block of code follows a double colon, in Markdown a single one."""

import re
from typing import Any

import griffe


class DoubleColons(griffe.Extension):
    """Code blocks as Markdown has them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """A docstring that was found."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
