"""Every way to run this repository. `nox -l` lists them; CONTRIBUTING.md says what each is for.

What is tested is what is shipped: wheels, built once without workspace sources, installed into a fresh
environment, run from an empty directory. Matrices come from the packages' metadata (tests/workspace.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))
import sanitized  # noqa: E402
from workspace import closure, combinations, graph, requires, third_party  # noqa: E402

DIST = ROOT / "dist"
GRAPH = graph()
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
TORCH_FREE = [name for name in sorted(GRAPH) if not requires("torch", closure([name], GRAPH))]
TORCH = nox.project.dependency_groups(PYPROJECT, "torch")[0]

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["tests", "lint", "combos"]


@nox.session(python=False)
def wheels(session: nox.Session) -> None:
    """Build every package's wheel into dist/, unless nothing changed since the last time."""
    stamp, digest = DIST / ".inputs", _inputs_digest()
    if stamp.exists() and stamp.read_text() == digest:
        session.log(f"dist/ is up to date: {', '.join(sorted(path.name for path in DIST.glob('*.whl')))}")
        return
    for folder in [DIST, *ROOT.glob("packages/*/build")]:  # setuptools would put what it built last time into the wheel
        shutil.rmtree(folder, ignore_errors=True)
    env = {"SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1767225600")}  # the same bytes from the same files
    if sys.platform == "linux":  # some Pythons link with -rpath to where they were built
        env["LDSHARED"] = f"{os.environ.get('CC', 'cc')} -shared"
    build = [_uv(), "build", "--all-packages", "--wheel", "--no-sources", "-q", "-o", str(DIST)]
    session.run(*build, external=True, env=env)
    stamp.write_text(digest)


@nox.session(requires=["wheels"])
def tests(session: nox.Session) -> None:
    """The test suite that CI runs: all packages from wheels, and the repository's own rules."""
    _install(session, *GRAPH, groups=("test", "arrays", "dtypes"))
    _assert_installed(session, GRAPH)
    _pytest(session, *_suites(GRAPH), str(ROOT / "tests/repo"), *session.posargs)


@nox.session(requires=["wheels"])
@nox.parametrize(
    "request_", [nox.param(names, id="+".join(sorted(found))) for found, names in combinations(GRAPH).items()]
)
def combos(session: nox.Session, request_: tuple[str, ...]) -> None:
    """Each combination of packages: install the request, check what came with it, run what it enables."""
    installed = closure(request_, GRAPH)
    _install(session, *request_, groups=("test",))
    _assert_installed(session, installed)
    _pytest(session, str(ROOT / "tests/combos"), f"--zs-installed={','.join(sorted(installed))}", *session.posargs)


@nox.session(requires=["wheels"])
def matrix(session: nox.Session) -> None:
    """What `tests` and `combos` leave out of their largest matrices (`-m matrix`)."""
    _install(session, *GRAPH, groups=("test", "arrays"))
    _assert_installed(session, GRAPH)
    suites = [*_suites(GRAPH), str(ROOT / "tests/combos"), f"--zs-installed={','.join(sorted(GRAPH))}"]
    _pytest(session, *suites, "-m", "matrix", *session.posargs)


@nox.session(requires=["wheels"])
@nox.parametrize("arrays", ["numpy", "torch", "nothing"], ids=["numpy", "torch", "nothing"])
def alone(session: nox.Session, arrays: str) -> None:
    """The packages that need no torch, with numpy only, torch only, neither: the first examples of their READMEs."""
    groups = ("test", "arrays") if arrays == "numpy" else ("test",)
    _install(session, *TORCH_FREE, *((TORCH,) if arrays == "torch" else ()), groups=groups)
    _assert_installed(session, TORCH_FREE)
    suites = [str(ROOT / "tests/alone"), *_suites(TORCH_FREE), "-k", "test_alone or test_adapters"]
    _pytest(session, *suites, f"--zs-arrays={arrays}", *session.posargs)


@nox.session(requires=["wheels"], venv_backend="none")
def pythons(session: nox.Session) -> None:
    """The wheels that need no torch, the very same, on every other CPython from 3.11 on that this machine has."""
    found = _interpreters()
    mine = ".".join(map(str, sys.version_info[:2]))
    session.log(f"CPython here: {', '.join(sorted(found))}; nothing is downloaded; {mine} is what `tests` runs on")
    options = session.posargs or ["-m", "not repeats and not root"]  # neither mounts nor repetition know of Python
    tools = nox.project.dependency_groups(PYPROJECT, "test")
    for version, path in sorted(found.items()):
        if version.startswith(f"{mine}."):
            continue
        venv = Path(session.create_tmp()).resolve() / f"python-{version}"
        python = str(venv / "bin" / "python")
        session.run(_uv(), "venv", "-q", "--clear", "--python", path, str(venv), external=True)
        fresh = [f"--refresh-package={name}" for name in TORCH_FREE]
        install = [_uv(), "pip", "install", "-q", "--python", python, *fresh, *TORCH_FREE, *tools]
        session.run(*install, env=_find_links(), external=True)
        _pytest(session, *_suites(TORCH_FREE), *options, python=python)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C code under the address and undefined-behaviour sanitizers, and its threads under the thread sanitizer."""
    _install(session, groups=("test",), torch=None)
    folder = Path(session.create_tmp()).resolve()
    for command in sanitized.commands(folder):
        session.run(*command, external=True)
    environ = sanitized.environment(folder)
    _pytest(session, *_suites(TORCH_FREE), *sanitized.OPTIONS, *session.posargs, env=environ)
    for command in sanitized.stress(folder):
        session.run(*command, external=True, env=sanitized.ENVIRON)


@nox.session(requires=["wheels"])
def lint(session: nox.Session) -> None:
    """Style, strict types per package, imports, public API, bounds, budgets; no test of behaviour."""
    _install(session, *GRAPH, groups=("lint",))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    for package in sorted(GRAPH):
        session.run("mypy", "--strict", f"packages/{package}/src")
    session.run("mypy", "--strict", "noxfile.py", "tests/workspace.py")
    _pytest(session, str(ROOT / "tests/repo"), str(ROOT / "tests/tools"), f"--zs-uv={_uv()}", *session.posargs)


@nox.session(requires=["wheels"])
def lowest(session: nox.Session) -> None:
    """Every requirement but torch at its lower bound, with the tests that depend on it most."""
    _install(session, groups=("test",))
    ask = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    torch = f"torch=={str(session.run('python', '-c', ask, silent=True)).strip()}"
    # By its full version, local label and all: the lowest match of torch==2.13.0 is another build than the highest.
    _install(session, *GRAPH, *third_party(), torch=torch, options=("--resolution", "lowest-direct"))
    _assert_installed(session, GRAPH)
    session.run(_uv(), "pip", "list", external=True)
    suites = map(str, [ROOT / "tests/combos", *sorted(ROOT.glob("packages/*/tests/test_config*.py"))])
    _pytest(session, *suites, f"--zs-installed={','.join(sorted(GRAPH))}", *session.posargs)


@nox.session(requires=["wheels"])
def configs(session: nox.Session) -> None:
    """A folder of real configurations (`-- FOLDER`, or ZS_DS_CONFIGS): verdicts, and the share that trains."""
    folder = next(iter(session.posargs), "") or os.environ.get("ZS_DS_CONFIGS", "")
    if not folder:
        session.error("name a folder of JSON files: nox -s configs -- FOLDER")
    _install(session, "zs-engine", groups=("test",))
    environ: dict[str, str | None] = {"ZS_DS_CONFIGS": str(Path(folder).resolve())}
    suite = [str(ROOT / "packages/zs-engine/tests" / name) for name in ("test_corpus.py", "test_mutations.py")]
    _pytest(session, *suite, env=environ)


@nox.session(requires=["wheels"])
def torture(session: nox.Session) -> None:
    """10,000 saves killed at every file operation and at random times, and the peers' figures; up to two hours."""
    _install(session, "zs-ckpt", "zs-offload-aio", groups=("test",))
    folder = ROOT / "packages/zs-ckpt/tests/torture"
    environ = {**_ISOLATED, "OMP_NUM_THREADS": "1"}
    with session.chdir(session.create_tmp()):
        jobs = f"--jobs={os.cpu_count() or 2}"
        options = list(session.posargs) or ["--runs", "10000", "--seed", "20261121"]
        session.run("python", "-P", str(folder / "drive.py"), "kills", jobs, "--progress", *options, env=environ)
        session.run("python", "-P", str(folder / "drive.py"), "faults", jobs, env=environ)
        session.run("python", "-P", str(folder / "peers.py"), "--runs", "300", jobs, env=environ)


@nox.session(requires=["wheels"])
def train(session: nox.Session) -> None:
    """The main job: a small GPT on real text, two ranks, stage 3. `-- --steps 30` cuts it short."""
    _install(session, *GRAPH, groups=("train",))
    session.run("zs", "run", "-n", "2", "examples/train_gpt.py", *session.posargs, env={"PYTHONPATH": None})


@nox.session(requires=["wheels"])
def bench(session: nox.Session) -> None:
    """The project's own benchmarks: `-- train`, and `-- train --deepspeed` to have that peer in it."""
    arguments = list(session.posargs) or ["train"]
    _install(session, *GRAPH, groups=("train",))
    if "--deepspeed" in arguments:
        arguments.remove("--deepspeed")
        _install(session, "setuptools", "wheel")
        _install(session, "deepspeed==0.19.*", options=("--no-build-isolation",), env={"DS_BUILD_OPS": "0"})
    session.run("python", "benchmarks/run.py", *arguments, env={"PYTHONPATH": None})


# The checkout stays out of sys.path, whatever the caller's environment says. One thread for torch: its threads do not
# survive a fork, and the suite forks; and on two cores several would wait for each other at every small operation.
_ISOLATED: dict[str, str | None] = {"PYTHONPATH": None, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def _install(
    session: nox.Session,
    *names: str,
    groups: tuple[str, ...] = (),
    torch: str | None = TORCH,
    options: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
) -> None:
    """Install by name: siblings can only come from dist/; torch, where one needs it, is the one we develop against."""
    siblings = closure([name for name in names if name in GRAPH], GRAPH)
    if torch is None or (siblings and not requires("torch", siblings)):
        with_torch = []
    else:
        with_torch = [torch]
    tools = nox.project.dependency_groups(PYPROJECT, *groups) if groups else ()
    fresh = [f"--refresh-package={name}" for name in GRAPH]  # the version stays while the wheel changes
    environ = {**_find_links(), **_torch_backend(session), **(env or {})}
    session.install(*options, *fresh, *names, *tools, *with_torch, env=environ)


def _find_links() -> dict[str, str]:
    """dist/ and the folders that PIP_FIND_LINKS names: uv reads its own variable only, and wants commas."""
    theirs = os.environ.get("PIP_FIND_LINKS", "").split() + os.environ.get("UV_FIND_LINKS", "").split(",")
    return {"UV_FIND_LINKS": ",".join(dict.fromkeys([str(DIST), *filter(None, theirs)]))}


def _torch_backend(session: nox.Session) -> dict[str, str]:
    """Which builds of torch to look at (docs/decisions/2026-11-20-torch-builds.md)."""
    if os.environ.get("PIP_FIND_LINKS") or os.environ.get("UV_TORCH_BACKEND"):
        return {}
    if not _pytorch_index_answers():
        session.warn("PyTorch's own index cannot be reached: torch comes from the package index, with CUDA on Linux")
        return {}
    return {"UV_TORCH_BACKEND": "auto"}


@functools.cache
def _pytorch_index_answers() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        where = ["--python", sys.executable, "--target", folder]
        ask = [_uv(), "pip", "install", "--dry-run", "-q", "--torch-backend=auto", *where, TORCH]
        return subprocess.run(ask, capture_output=True, check=False).returncode == 0


def _pytest(
    session: nox.Session, *arguments: str, python: str = "python", env: dict[str, str | None] | None = None
) -> None:
    """Run pytest in an empty directory, where nothing of the checkout can be imported."""
    empty = Path(session.create_tmp()) / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir(parents=True)
    with session.chdir(empty):
        options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        command = [python, "-P", "-m", "pytest", *options, *arguments]
        session.run(*command, env={**_ISOLATED, **(env or {})}, external=python != "python")


_INSTALLED = """
import importlib, importlib.metadata, pathlib, sys
wanted = set(sys.argv[1].split(","))
installed = {d.name for d in importlib.metadata.distributions() if d.name.startswith("zs-")}
if installed != wanted:
    sys.exit(f"installed {sorted(installed)}, but the request's closure is {sorted(wanted)}")
for name in wanted:
    file = importlib.import_module(name.replace("-", "_")).__file__
    if not pathlib.Path(file).resolve().is_relative_to(pathlib.Path(sys.prefix).resolve()):
        sys.exit(f"{name} is imported from {file}, not from the environment")
print("installed:", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(wanted)))
"""


def _assert_installed(session: nox.Session, wanted: object) -> None:
    """The siblings in the environment are exactly these, and are imported from it."""
    names = ",".join(sorted(wanted))  # type: ignore[call-overload]
    with session.chdir(session.create_tmp()):
        session.run("python", "-P", "-c", _INSTALLED, names, env=_ISOLATED, log=False)


def _inputs_digest() -> str:
    """Of everything that goes into a wheel."""
    digest = hashlib.sha256()
    for pattern in ("packages/*/*", "packages/*/src/**/*", "packages/*/csrc/**/*"):
        for path in sorted(ROOT.glob(pattern)):
            if not path.is_file() or path.suffix in (".pyc", ".so") or path.parent.suffix == ".egg-info":
                continue
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _suites(names: Iterable[str]) -> list[str]:
    return [str(ROOT / "packages" / name / "tests") for name in sorted(names)]


def _interpreters() -> dict[str, str]:
    """The newest CPython of each minor version from 3.11 on, on PATH or kept by pyenv: version -> executable."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    path = os.pathsep.join([*map(str, pyenv.glob("versions/*/bin")), os.environ.get("PATH", "")])
    ask = [_uv(), "python", "list", "--only-installed", "--output-format", "json"]
    done = subprocess.run(ask, env={**os.environ, "PATH": path}, capture_output=True, check=True)
    newest: dict[tuple[int, int], tuple[int, str, str]] = {}
    for python in json.loads(done.stdout):
        major, minor, patch = (python["version_parts"][part] for part in ("major", "minor", "patch"))
        if python["implementation"] == "cpython" and python["variant"] == "default" and (major, minor) >= (3, 11):
            newest[major, minor] = max(
                newest.get((major, minor), (-1, "", "")), (patch, python["version"], python["path"])
            )
    return {version: path for _, version, path in newest.values()}


def _uv() -> str:
    """uv beside this nox (`pip install nox uv`), the one that runs it (`uvx nox`), or the one on PATH."""
    with contextlib.suppress(ImportError, FileNotFoundError):
        return str(importlib.import_module("uv").find_uv_bin())
    found = os.environ.get("UV") or shutil.which("uv")
    if not found:
        raise SystemExit("uv is not installed: python -m pip install uv")
    return found
