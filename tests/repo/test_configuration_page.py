"""docs/configuration.md is what `zs schema --markdown` prints."""

from __future__ import annotations

import pytest
from workspace import ROOT
from zs_engine.cli import main

PAGE = ROOT / "docs/configuration.md"


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--markdown"]) == 0
    made = capsys.readouterr().out
    assert made == PAGE.read_text("utf-8"), f"run: zs schema --markdown > {PAGE.relative_to(ROOT)}"


def test_every_key_is_on_the_page_with_a_text() -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 400
    silent = [row for row in rows if row.rstrip().endswith("| |") and "[a section]" not in row]
    assert silent == []
