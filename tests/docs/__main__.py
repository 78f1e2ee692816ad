"""Pages in processes of their own: ``python -m tests.docs FOLDER RANK RANKS PAGES``, once for each rank."""

import sys
from functools import partial
from pathlib import Path

from tests.distributed.launch import run_cases
from tests.docs import captured
from tests.docs.pages import run

folder, rank, ranks, pages = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
if ranks == 1:
    captured.use_double()
    captured.check_double()
run_cases({page.replace("/", "-"): partial(run, page, folder) for page in pages}, folder, rank, ranks)
