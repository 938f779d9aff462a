"""zs-offload-aio's wheel: one for every CPython from 3.11 on, small, and in need of nothing but libc."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from workspace import ROOT

PACKAGE = ROOT / "packages/zs-offload-aio"
NAME = "zs_offload_aio"
NEEDED = {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
Uv = Callable[..., str]


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The one that everything else is tested with."""
    found = list((ROOT / "dist").glob(f"{NAME}-*.whl"))
    assert len(found) == 1, f"dist/ has {[path.name for path in found]}"
    return found[0]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_tag_and_suffix(wheel: Path, unpacked: Path) -> None:
    assert re.fullmatch(rf"{NAME}-[\d.]+-cp311-abi3-\w+\.whl", wheel.name)
    assert [path.name for path in unpacked.rglob("*.so")] == ["_core.abi3.so"]
    assert (unpacked / NAME / "_core.abi3.so").exists()
    metadata = next(unpacked.glob("*.dist-info/WHEEL")).read_text()
    assert "Tag: cp311-abi3-" in metadata and "Root-Is-Purelib: false" in metadata


def test_audit_of_the_stable_interface(wheel: Path) -> None:
    """Of a file: nothing is looked up anywhere."""
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(done.stdout)["specs"][str(wheel)]["wheel"]
    assert found["name"] == "_core.abi3.so"
    assert found["result"]["is_abi3"] and found["result"]["is_abi3_baseline_compatible"]
    assert found["result"]["baseline"] == found["result"]["computed"] == "3.11"


def test_contents(unpacked: Path) -> None:
    files = {path.name for path in (unpacked / NAME).iterdir()}
    sources = {path.name for path in (PACKAGE / "src" / NAME).iterdir() if path.suffix in (".py", ".pyi", ".typed")}
    assert files == {*sources, "py.typed", "_core.pyi", "_core.abi3.so"}
    assert {path.name for path in unpacked.iterdir() if path.name != NAME} == {next(unpacked.glob("*.dist-info")).name}
    entries = next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    assert "aio = zs_offload_aio.store:NvmeStore" in entries and "console_scripts" not in entries


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size <= 160_000


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF file is looked at")
def test_it_needs_libc_only_and_knows_no_machine(unpacked: Path) -> None:
    listing = subprocess.run(
        ["readelf", "--dynamic", "--wide", str(unpacked / NAME / "_core.abi3.so")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", listing)
    assert libraries and {name.partition(".so")[0] for name in libraries} <= NEEDED
    assert not re.findall(r"RPATH|RUNPATH", listing)


# ---- from source ----


def build(uv: Uv, folder: Path, kind: str, **env: str) -> Path:
    tree = folder / "zs-offload-aio"
    if not tree.exists():
        shutil.copytree(PACKAGE, tree, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", "*.so"))
    out = folder / f"{kind}-out"
    uv("build", f"--{kind}", "--no-sources", "-q", "-o", str(out), cwd=tree, env={"UV_FIND_LINKS": None, **env})
    return next(path for path in out.iterdir() if path.suffix in (".gz", ".whl"))


def test_the_same_bytes_from_another_folder(wheel: Path, uv: Uv, tmp_path: Path) -> None:
    """What was not changed is not released again."""
    env = {"SOURCE_DATE_EPOCH": "1767225600"}
    if sys.platform == "linux":
        env["LDSHARED"] = f"{os.environ.get('CC', 'cc')} -shared"
    again = build(uv, tmp_path, "wheel", **env)
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []
    assert again.read_bytes() == wheel.read_bytes()


def test_a_source_build_without_kernel_interfaces_gives_a_working_package(uv: Uv, tmp_path: Path) -> None:
    """As where the headers of Linux are missing, or Linux is: no io_uring, no Linux AIO, the thread backend does it."""
    sdist = build(uv, tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert sorted(path.name for path in source.glob("csrc/*")) == sorted(path.name for path in PACKAGE.glob("csrc/*"))
    (tmp_path / "zs-offload-aio").rename(tmp_path / "unused")
    source.rename(tmp_path / "zs-offload-aio")

    flags = f"{os.environ.get('CFLAGS', '')} -DZS_NO_KERNEL_AIO"
    wheel = build(uv, tmp_path, "wheel", CFLAGS=flags)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = """
import os
import zs_offload_aio
from zs_offload_aio import Engine, BackendUnavailable, backends
print(sorted(name for name, why in backends().items() if not why), os.path.dirname(zs_offload_aio.__file__))
try:
    Engine(backend="io_uring")
    raise SystemExit("io_uring works without its code")
except BackendUnavailable:
    pass
data, again = os.urandom(5_000_001), bytearray(5_000_001)
with Engine() as engine, engine.open("file", "w") as file:
    file.write(data, 3).wait()
    file.flush("full")
    file.read(again, 3).wait()
    print(engine.backend, again == data)
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "ZS_AIO_BACKEND": ""}
    env.pop("ZS_AIO_BACKEND")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"['plain', 'threads'] {tmp_path / 'installed' / NAME}"
    assert done.stdout.split("\n")[1] == "threads True"
    library = (tmp_path / "installed" / NAME / "_core.abi3.so").read_bytes()
    assert b"threads" in library and b"io_uring_setup" not in library
