"""The code of README and docs/ runs as it stands there, page by page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo

from tests.distributed.launch import launch
from tests.docs.pages import PAGES, RANKS, TRAINERS, Block, blocks, run

COMPILED = "docs/training/compile.md"
HERE = [page for page in PAGES if blocks(page) and page not in (COMPILED, *RANKS, *TRAINERS)]


@pytest.mark.parametrize("page", HERE)
def test_a_page(page: str, tmp_path: Path) -> None:
    assert run(page, tmp_path) > 0 or not any(map(Block.takes_steps, blocks(page)))


# The same graphs: inductor makes C++ out of them, which takes its time to compile.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_page_that_compiles(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("torch 2.10 does not trace backward passes")
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", False)  # which the page sets
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    try:
        assert run(COMPILED, tmp_path) > 0
    finally:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What is wrong with a page, rank by rank; pages on as many ranks are one launch."""
    own = [item for item in request.session.items if request.node.nodeid == item.nodeid.partition("::")[0]]
    chosen = [item.callspec.params["page"] for item in own if request.fixturename in item.fixturenames]
    folders = {ranks: tmp_path_factory.mktemp("ranks") for ranks in {RANKS[page] for page in chosen}}
    launched = {
        ranks: launch("tests.docs", folder, ranks, [page for page in chosen if RANKS[page] == ranks])
        for ranks, folder in folders.items()
    }
    return lambda page: launched[RANKS[page]](page.replace("/", "-"))


@pytest.mark.xdist_group("pages in processes")  # one process of pytest launches them, not each
@pytest.mark.parametrize("page", RANKS)
def test_a_page_in_processes_of_its_own(page: str, errors: Callable[[str], list[str]]) -> None:
    assert errors(page) == [""] * RANKS[page], "\n\n".join(errors(page))


def test_all_pages_that_are_named_are_there() -> None:
    assert {COMPILED, *RANKS, *TRAINERS} <= set(PAGES)
    assert "README.md" in HERE


def test_blocks_are_found_with_their_lines_and_without_their_indentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "# Page\n\n```python\na = 1\n```\n\n- one\n\n  ```python\n  if a:\n      b = 2\n  ```\n\n```\nno code\n```\n"
    )
    assert blocks("page.md") == [Block("page.md", 4, "a = 1\n"), Block("page.md", 10, "if a:\n    b = 2\n")]


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("optimizer.step(lambda: loss_fn(model(inputs), targets).backward())", None),
        ("optimizer.step(lambda: (0 * loss_fn(model(inputs), targets)).backward())", "line 4: no weight has moved"),
        ("optimizer.ascent_step", None),
        ("loss_fn(model(inputs), targets).backward()\noptimizer.ascent_step()", "line 4: a step is open"),
    ],
)
def test_a_block_that_does_not_do_what_it_says_is_noticed(
    code: str, wrong: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.docs.pages.ROOT", tmp_path)
    begun = "from lookbehind_fused import SAM; optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)"
    (tmp_path / "page.md").write_text(f"# Page\n\n```python\n{begun}\n{code}\n```\n")
    if wrong is None:
        run("page.md", tmp_path)
        return
    with pytest.raises(AssertionError, match=wrong):
        run("page.md", tmp_path)
