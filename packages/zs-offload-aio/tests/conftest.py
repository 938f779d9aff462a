"""What the tests of this package share, and the matrix backend x behaviour at the end of the run.

    @pytest.mark.row(3)      the test belongs to row 3 of `behaviours.ROWS`
    @pytest.mark.root        it needs root (mounts, other users); deselected for anybody else, never for root
    NEEDS = {"torch"}        module level: the file is left out where one of these cannot be imported

Nothing is skipped at run time: what is left out was declared, and is listed at the end.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the helper modules beside this file

import faults_mounts  # noqa: E402
from behaviours import BACKENDS, CANNOT_APPLY, REASONS, ROWS  # noqa: E402
from faults_memory import Endless  # noqa: E402

if TYPE_CHECKING:
    from zs_offload_aio import Engine

LEFT_OUT = pytest.StashKey[list[str]]()
CELLS = pytest.StashKey[dict[tuple[int, str], set[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--zs-backends",
        default=",".join(BACKENDS),
        help="the backends this machine has, by comma; where a container forbids one, leave it out here",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(number): the behaviour of behaviours.ROWS that this test checks")
    config.addinivalue_line("markers", "root: needs root; deselected for other users")
    config.addinivalue_line("markers", "address_space: limits the address space, of which sanitizers take all")
    config.addinivalue_line("markers", "repeats: the same again and again; too long under a sanitizer")
    config.stash[LEFT_OUT] = []
    config.stash[CELLS] = defaultdict(set)


# ---- what is left out, by declaration ----


def needs(path: Path) -> set[str]:
    """The value of the file's `NEEDS`, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NEEDS":
            return set(ast.literal_eval(node.value))
    return set()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != HERE or not collection_path.name.startswith("test_"):
        return None
    missing = sorted(name for name in needs(collection_path) if importlib.util.find_spec(name) is None)
    line = f"{collection_path.name}: needs {', '.join(missing)}"
    if missing and line not in config.stash[LEFT_OUT]:  # asked once for each argument
        config.stash[LEFT_OUT].append(line)
    return True if missing else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--zs-backends", ",".join(BACKENDS)).split(",")
    mine = [item for item in items if HERE in item.path.parents]
    out = [item for item in mine if _left_out(item, chosen, config)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def _left_out(item: pytest.Item, chosen: list[str], config: pytest.Config) -> bool:
    backend = _backend(item)
    rows = _rows(item)
    item.user_properties += [("zs_row", (row, backend)) for row in rows]
    name = getattr(item, "originalname", item.name)
    reason = CANNOT_APPLY.get((name, backend))
    if item.get_closest_marker("root") and os.geteuid() != 0:
        reason = "root"
        if f"{name}: needs root" not in config.stash[LEFT_OUT]:
            config.stash[LEFT_OUT].append(f"{name}: needs root")
    if backend in BACKENDS and backend not in chosen:
        reason = "left out"
    for row in rows if reason else ():
        config.stash[CELLS][row, backend].add(f"cannot apply: {REASONS[reason]}")
    return reason is not None


def _backend(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("backend", "any") if callspec else "any"


def _rows(item: pytest.Item) -> list[int]:
    return sorted({row for mark in item.iter_markers("row") for row in mark.args})


# ---- the matrix ----


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[LEFT_OUT]:
        terminalreporter.write_line(f"left out by declaration: {line}")
    cells = config.stash[CELLS]
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "zs_row":
                    cells[tuple(value)].add("pass" if outcome == "passed" else "FAIL")
    if cells:
        for line in matrix(cells):
            terminalreporter.write_line(line)


def matrix(cells: dict[tuple[int, str], set[str]]) -> Iterator[str]:
    """One line for each behaviour; a cell fails where one of its tests does."""
    yield ""
    yield f"{'behaviour':46}" + "".join(f"{name:>12}" for name in BACKENDS)
    notes: dict[str, int] = {}
    for row, title in ROWS.items():
        found = {name: cells.get((row, name), set()) | cells.get((row, "any"), set()) for name in BACKENDS}
        if not any(found.values()):
            continue
        words = []
        for outcomes in found.values():
            if "FAIL" in outcomes or "pass" in outcomes:
                words.append("FAIL" if "FAIL" in outcomes else "pass")
            elif outcomes:
                number = notes.setdefault(min(outcomes), len(notes) + 1)
                words.append(f"n/a [{number}]")
            else:
                words.append("not run")
        yield f"{row:3}  {title:41}" + "".join(f"{word:>12}" for word in words)
    for note, number in notes.items():
        yield f"[{number}] {note}"


# ---- fixtures ----


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Several would wait for each other at every small operation on a busy machine."""
    torch: Any = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend, forced."""
    return request.param


@pytest.fixture
def engine(backend: str) -> Iterator[Engine]:
    """An engine of this backend; closed at the end."""
    from zs_offload_aio import Engine

    with Engine(backend=backend) as found:
        yield found


@pytest.fixture(scope="module")
def engines() -> Iterator[Callable[..., Engine]]:
    """`engines(backend, chunk_nbytes=..., depth=...)`: the same engine for the same arguments, in all of a file."""
    from zs_offload_aio import Engine

    made: dict[tuple[Any, ...], Engine] = {}
    with ExitStack() as stack:

        def get(backend: str, **options: Any) -> Engine:
            key = (backend, *sorted(options.items()))
            if key not in made:
                made[key] = stack.enter_context(Engine(backend=backend, **options))
            return made[key]

        yield get


@pytest.fixture(scope="session")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to mount in; the mounts are this process's own and end with it."""
    faults_mounts.own_namespace()
    return tmp_path_factory.mktemp("mounts")


@pytest.fixture(scope="module")
def small_ext4(namespace: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """48 MiB of ext4 on a loop device; each test leaves it as empty as it found it."""
    with faults_mounts.loop_ext4(namespace / request.module.__name__.rpartition(".")[2], 48 << 20) as mount:
        yield mount


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endless]:
    """A read that is still in flight whenever the test looks."""
    made = Endless(tmp_path_factory.mktemp("endless"))
    yield made
    made.close()


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user can reach and write to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o777)
        yield Path(name)
