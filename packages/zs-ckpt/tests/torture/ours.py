"""zs_ckpt as a tortured system, and the state that it saves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import Any

import torch
import zs_ckpt
from torch import Tensor
from zs_ckpt.boxes import boxes_of_range, whole
from zs_ckpt.shardable import PROTOCOL, Piece, TensorSpec

from .states import Torn, bits, check, expected
from .systems import Nothing, Scenario


class Bits:
    """The state as a `Shardable`: flat ranges over the ranks, small tensors on all, one of each rank's own."""

    PROTOCOL = PROTOCOL

    def __init__(self, step: int = -1, long: bool = True, rank: int = 0, world: int = 1) -> None:
        self.step, self.rank, self.world = step, rank, world
        self.tensors = expected(step, long) if step >= 0 else {}
        self.own: dict[str, Tensor] = {}
        if world > 1:
            self.own["grad"] = bits("grad", (1000,), torch.float32, step * 100 + rank)

    def __zs_shardable__(self) -> Bits:
        return self

    def spoil(self) -> None:
        """Change every value: what an asynchronous save must not see."""
        for tensor in self.tensors.values():
            tensor.view(torch.uint8).bitwise_not_() if tensor.ndim else tensor.add_(1)

    def pieces(self) -> Iterator[Piece]:
        for name, tensor in self.tensors.items():
            spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            if self.world == 1 or tensor.numel() < 100:
                yield Piece(spec, whole(spec.shape), tensor, self.rank, self.world)
                continue
            cut = [0, *(tensor.numel() * k // self.world + 5 * k for k in range(1, self.world)), tensor.numel()]
            low, high = cut[self.rank], cut[self.rank + 1]
            flat, at = tensor.reshape(-1), low
            for box in boxes_of_range(spec.shape, low, high):
                numel = prod(stop - start for start, stop in box)
                yield Piece(spec, box, flat[at : at + numel])
                at += numel
        for name, tensor in self.own.items():
            yield Piece(TensorSpec(name, tuple(tensor.shape), tensor.dtype), whole(tensor.shape), tensor, scope="rank")

    def objects(self) -> Mapping[str, Any]:
        return {"step": self.step, "shape": (1, 2), "rank": b"\x00\xff"}

    def places(self, saved: Mapping[str, TensorSpec], objects: Mapping[str, Any]) -> Iterator[Piece]:
        self.tensors = {}
        for name, spec in saved.items():
            if name != "grad":
                self.tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)
                yield Piece(spec, whole(spec.shape), self.tensors[name])

    def finish(self, objects: Mapping[str, Any]) -> None:
        self.step = objects["step"]
        if objects["shape"] != (1, 2) or objects["rank"] != b"\x00\xff":
            raise Torn(f"objects {objects}")


class Zs:
    name = "zs"
    commit = "manifest.json"

    def __init__(self) -> None:
        self.scenarios = [
            Scenario("new tag", tag="step{step}"),
            Scenario("first save", tag="step{step}", first=True),
            Scenario("same tag, shorter after longer"),
            Scenario("asynchronous", asynchronous=True),
            Scenario("asynchronous, retention", tag="step{step}", asynchronous=True, keep=2),
            Scenario("retention", tag="step{step}", keep=2),
            Scenario("two ranks", tag="step{step}", world=2, keep=2),
            Scenario("two ranks, same tag", world=2),
        ]
        if not entry_points(group="zs_ckpt.blob_io", name="aio"):
            return
        self.scenarios += [Scenario("aio", io="aio"), Scenario("aio, asynchronous", io="aio", asynchronous=True)]

    def prepare(self) -> None:
        """Nothing to set up."""

    def save(self, folder: Path, step: int, scenario: Scenario, group: Any = None) -> None:
        rank, world = (group.rank, group.size) if group is not None else (0, 1)
        state = Bits(step, scenario.long(step), rank, world)
        saved = zs_ckpt.save(
            folder,
            {"model": state},
            tag=scenario.tag.format(step=step),
            group=group,
            client_state={"step": step},
            asynchronous=scenario.asynchronous,
            io=scenario.io,
            keep=scenario.keep,
        )
        if scenario.asynchronous:
            state.spoil()
            saved.wait()

    def load(self, folder: Path, tag: str | None = None) -> int:
        state = Bits()
        try:
            loaded = zs_ckpt.load(folder, {"model": state}, tag=tag)
        except zs_ckpt.CheckpointIncomplete as error:
            raise Nothing(str(error)) from error
        check(state.step, state.tensors)
        if loaded.client_state != {"step": state.step}:
            raise Torn(f"the tensors are of step {state.step}, client_state is {loaded.client_state}")
        return state.step

    def valid(self, folder: Path) -> int:
        return sum(_loads(self, folder, tag) for tag in committed(folder))

    def leftovers(self, folder: Path) -> list[str]:
        known = {"latest"}
        for manifest in folder.glob("*/manifest.json"):
            files = json.loads(manifest.read_bytes())["files"]
            known |= {f"{manifest.parent.name}/{name}" for name in ["manifest.json", *files]}
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
        empty = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir() and not os.listdir(path)}
        return sorted(name for name in (found - known) | empty if not _is_lock(name))


def committed(folder: Path) -> list[str]:
    """The tags that have a manifest."""
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


def _is_lock(name: str) -> bool:
    """The lock's file may stay: removing it would let two processes hold two locks."""
    return "lock" in os.path.basename(name)


def _loads(system: Zs, folder: Path, tag: str) -> bool:
    try:
        system.load(folder, tag)
    except (Nothing, Torn, zs_ckpt.CheckpointCorrupt):
        return False
    return True
