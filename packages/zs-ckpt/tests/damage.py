"""Checkpoints to be damaged, and ways to damage them that do not use the code under test."""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zs_ckpt
from torch import Tensor
from zs_comm import ZsError
from zs_comm.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from torture.ours import Bits, Zs
from torture.states import check

TAG = "checkpoint"


def _save_two(group: Any, folder: str, step: int) -> None:
    state = Bits(step, long=False, rank=group.rank, world=group.size)
    zs_ckpt.save(folder, {"model": state}, tag=TAG, group=group, client_state={"step": step, "pair": (1, 2)})


def make_two_ranks(folder: Path, step: int) -> Path:
    """A checkpoint that two ranks saved: one tensor whole, most of them in two files."""
    run_ranks(_save_two, 2, str(folder), step)
    return folder


def save_one(folder: Path, step: int, tag: str = TAG, **options: Any) -> None:
    zs_ckpt.save(folder, {"model": Bits(step, long=False)}, tag=tag, client_state={"step": step}, **options)


def load_one(folder: Path, tag: str | None = None) -> int:
    """The step that is there, checked bit for bit."""
    state = Bits()
    zs_ckpt.load(folder, {"model": state}, tag=tag)
    check(state.step, state.tensors)
    return state.step


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every byte of every tensor, what is one rank's own included."""
    return zs_ckpt.read(folder)


def copy(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TAG / "manifest.json").read_bytes())


def seal(text: bytes) -> bytes:
    """A manifest's text without its last member -> with the checksum that belongs to it."""
    body = text.removesuffix(b"}")
    return body + b',"crc32":"%08x"}' % zlib.crc32(body)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it a checksum that is right."""
    members = manifest_of(folder)
    del members["crc32"]
    change(members)
    write_manifest(folder, json.dumps(members, separators=(",", ":")).encode())


def write_manifest(folder: Path, text: bytes) -> None:
    (folder / TAG / "manifest.json").write_bytes(seal(text))


def shards(folder: Path) -> list[Path]:
    return sorted((folder / TAG).glob("*.safetensors"))


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def extents(folder: Path) -> Iterator[tuple[str, str, int, int]]:
    """(tensor, file, first byte, behind the last byte) of everything that has a checksum in the manifest."""
    members = manifest_of(folder)
    for group in (members["tensors"], *members["rank_tensors"]):
        for name, tensor in group.items():
            for piece in tensor["pieces"]:
                start = members["files"][piece["file"]]["data_offset"] + piece["offset"]
                for offset in range(0, piece["nbytes"], piece["extent_nbytes"]):
                    stop = min(offset + piece["extent_nbytes"], piece["nbytes"])
                    yield name, piece["file"], start + offset, start + stop


def error_of(work: Callable[[], object]) -> Exception | None:
    """The typed error that `work` raises, where it raises one."""
    try:
        work()
    except (OSError, ZsError) as error:
        return error
    return None


def caught(folder: Path, read: Callable[[Path], object] = read_all) -> zs_ckpt.CheckpointCorrupt:
    """The error that loading gives."""
    with pytest.raises((zs_ckpt.CheckpointCorrupt, zs_ckpt.CheckpointIncomplete)) as caught_:
        read(folder)
    return caught_.value


def folder_with_step_2(tmp_path: Path) -> Path:
    """For a fixture: a folder in which step 2 is committed."""
    save_one(tmp_path / "folder", 2)
    return tmp_path / "folder"


def save_long(folder: Path, step: int, **options: Any) -> None:
    """3 MB."""
    saved = zs_ckpt.save(folder, {"model": Bits(step)}, tag=TAG, client_state={"step": step}, **options)
    if options.get("asynchronous"):
        saved.wait()


def intact(folder: Path, step: int = 2) -> None:
    """What was committed is there, and the next save works and leaves nothing of the one that failed."""
    assert load_one(folder) == step
    save_one(folder, step + 2)
    assert load_one(folder) == step + 2
    assert Zs().leftovers(folder) == []


def refused(save: Callable[[], object]) -> BaseException:
    with pytest.raises((OSError, ZsError)) as caught:
        save()
    return caught.value
