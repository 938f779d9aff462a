"""Commands that other packages bring to `zs`."""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

import pytest
from zs_engine import cli


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the command `other` was called with."""
    calls: list[list[str]] = []

    def main(argv: list[str]) -> int:
        calls.append(argv)
        return 3

    module = ModuleType("other_commands")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "other_commands", module)
    point = metadata.EntryPoint("other", "other_commands:main", "zs_engine.commands")
    found = cli.metadata.entry_points

    def entry_points(**wanted: str) -> object:
        return metadata.EntryPoints([point]) if wanted == {"group": "zs_engine.commands"} else found(**wanted)

    monkeypatch.setattr(cli.metadata, "entry_points", entry_points)
    return calls


@pytest.mark.parametrize("argv", [[], ["ls", "folder"], ["--help"], ["verify", "-x", "--tag", "a", "b=c"]])
def test_everything_behind_the_name_is_the_commands(argv: list[str], given: list[list[str]]) -> None:
    assert cli.main(["other", *argv]) == 3
    assert given == [argv]


def test_it_is_listed_and_not_loaded(given: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "other" in capsys.readouterr().out and given == []
    assert cli.main(["schema"]) == 0 and given == []
