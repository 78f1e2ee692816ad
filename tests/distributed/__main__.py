"""What several processes do together: ``python -m tests.distributed FOLDER RANK RANKS [CASES]``, once for each rank."""

import sys
from pathlib import Path

from tests.distributed import cases
from tests.distributed.launch import run_cases

folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
run_cases(cases(ranks), folder, rank, ranks, sys.argv[4:])
