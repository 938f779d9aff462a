"""`--zs-uv`: the uv to build and resolve with. These tests run in the lint session, which has one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Uv = Callable[..., str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zs-uv", default="uv", help="path of the uv executable")


@pytest.fixture(scope="session")
def uv(request: pytest.FixtureRequest) -> Uv:
    """`uv(*arguments, cwd=..., env={...})` -> its output; None in `env` unsets. A failure shows what it wrote."""

    def run(*arguments: str, cwd: Path, env: dict[str, str | None] | None = None, stdin: str = "") -> str:
        environ = {key: value for key, value in {**os.environ, **(env or {})}.items() if value is not None}
        command = [request.config.getoption("--zs-uv"), *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=environ, input=stdin, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    return run
