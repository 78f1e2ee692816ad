"""Which combinations `make matrix` goes through; the combinations themselves take hours and are no part of this."""

from tests.matrix import PYTHONS, TORCHES, chosen, interpreters


def test_the_ends_meet_all_and_each_torch_the_oldest_python() -> None:
    few, all_of_them = (chosen([*TORCHES], [*PYTHONS], every) for every in (False, True))
    assert {t for t, p in few if p == PYTHONS[0]} == {*TORCHES}
    for end in (TORCHES[0], TORCHES[-1]):
        assert {p for t, p in few if t == end} == {*PYTHONS}
    assert len(few) == len({*few}) == len(TORCHES) + 2 * (len(PYTHONS) - 1)
    assert {*all_of_them} == {(t, p) for t in TORCHES for p in PYTHONS}
    assert few[0][0] == all_of_them[0][0] == TORCHES[-1]  # its library is tried on the others


def test_a_python_that_is_not_there_is_named(tmp_path, monkeypatch, capsys) -> None:
    """Nor is one that answers with another version, as a shim does, or that makes no environments."""
    for version, says in (("4.1", "3.8"), ("4.2", "4.2")):
        stub = tmp_path / f"python{version}"
        stub.write_text(f"#!/bin/sh\necho {says}\n")
        stub.chmod(0o755)
    (tmp_path / "python4.3").write_text("#!/bin/sh\necho 4.3; exit 1\n")
    (tmp_path / "python4.3").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert interpreters(["4.1", "4.2", "4.3"]) == {"4.2": tmp_path / "python4.2"}
    assert capsys.readouterr().out.splitlines() == [
        f"Python {version}: none found that makes environments" for version in ("4.1", "4.3")
    ]
