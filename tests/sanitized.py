"""How the C code is built and run under gcc's sanitizers. Standard library only, because the noxfile imports it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent / "packages/zs-offload-aio"
CC = os.environ.get("CC", "gcc")

OUTSIDE_OF_THE_ENGINE = ("py_", "module", "optim", "kernels", "pool", "arena")

# What is left out: limits on the address space, which a sanitizer takes all of; what only repeats, and what takes long
# without touching memory in new ways.
OPTIONS = ("-m", "not address_space and not repeats", "-k", "not _cli and not test_fork_at_any_moment", "--capture=sys")
DRIVERS = ("thread", "address,undefined")
ENVIRON = {"TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def extension() -> dict[str, Any]:
    """What the package's own build says of its extension: sources and flags stay in one place."""
    table = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    found: dict[str, Any] = table["tool"]["setuptools"]["ext-modules"][0]
    return found


def commands(folder: Path) -> list[list[str]]:
    """That make `folder`/zs_offload_aio, the package with a sanitized extension, and the stress drivers."""
    spec = extension()
    sources = [str(PACKAGE / path) for path in spec["sources"]]
    python_free = [path for path in sources if not Path(path).name.startswith(OUTSIDE_OF_THE_ENGINE)]
    base = [CC, "-g", "-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", f"-I{PACKAGE / 'csrc'}"]
    base += [flag for flag in spec["extra-compile-args"] if flag not in ("-O3", "-g0")]
    # A forked child inherits what the other threads' stacks had poisoned, and would report it: no checks of stacks in
    # Python's process, but in the drivers'.
    module = ["-shared", "-fPIC", "-fsanitize=address,undefined", "--param=asan-stack=0"]
    module += [f"-D{name}={value}" for name, value in spec["define-macros"]]
    module += [f"-I{sysconfig.get_paths()['include']}", *sources, "-lm", "-o"]
    target = folder / "zs_offload_aio"
    copy = "import shutil, sys; shutil.rmtree(sys.argv[2], True); shutil.copytree(sys.argv[1], sys.argv[2])"
    stress = [str(PACKAGE / "tests/stress/stress.c"), *python_free, "-o"]
    return [
        [sys.executable, "-c", copy, str(PACKAGE / "src/zs_offload_aio"), str(target)],
        [*base, *module, str(target / "_core.abi3.so")],
        *([*base, f"-fsanitize={kind}", *stress, str(_driver(folder, kind))] for kind in DRIVERS),
    ]


def environment(folder: Path) -> dict[str, str | None]:
    """To run Python on the sanitized extension."""
    return {
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": f"{_library('libasan.so')} {_library('libubsan.so')}",
        "PYTHONMALLOC": "malloc",  # so that the sanitizer sees each object's end
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # an interpreter never frees all
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def stress(folder: Path) -> list[list[str]]:
    """The drivers, without address-space randomisation: gcc's thread sanitizer does not know all of today's layouts."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return [["setarch", "-R", str(_driver(folder, kind)), str(scratch), "20"] for kind in DRIVERS]


def _driver(folder: Path, kind: str) -> Path:
    return folder / f"stress-{kind.partition(',')[0]}"


def _library(name: str) -> str:
    return subprocess.run([CC, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
