"""A process that runs checks one after the other: names of checks come in, a line each, and rows go out.

``python -m tests.gpu.worker [--dry-run] [--quick] [--alone]``
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Until there are no more names."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed here is no row

    import torch

    from tests.gpu import rows
    from tests.gpu.checks import checks, ours
    from tests.gpu.machine import here

    here.begin("--dry-run" in sys.argv, "--quick" in sys.argv)
    if "--alone" not in sys.argv:
        torch.set_num_threads(1)  # others have the other cores
    table = {check.name: check for check in checks(ours())}
    for line in sys.stdin:
        print(rows.run(table[line.strip()]).json(), file=out, flush=True)


if __name__ == "__main__":
    main()
