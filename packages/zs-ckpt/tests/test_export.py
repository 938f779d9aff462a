"""Exports equal the source tensor by tensor, open in safetensors, and need one tensor's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zs_ckpt
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from zs_ckpt import CheckpointCorrupt, CheckpointIncomplete
from zs_ckpt import exporting as module
from zs_ckpt.exporting import export, parse_size, write_sharded
from zs_ckpt.shardable import TensorSpec
from zs_comm import ConfigError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight


def saved(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    net = Net()
    zs_ckpt.save(tmp_path / "c", {"model": net, "other": {"x": torch.ones(3)}})
    values = dict(net.state_dict())
    del values["head.weight"]
    return tmp_path / "c", values


def load_exported(folder: Path) -> dict[str, Tensor]:
    """As transformers does: the index where there is one."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found[name] = opened.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    return found


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16", "fp16", torch.bfloat16])
@pytest.mark.parametrize("limit", ["5GB", 2000, 1])
def test_equals_the_source(dtype: str | torch.dtype | None, limit: str | int, tmp_path: Path) -> None:
    path, values = saved(tmp_path)
    files = export(path, tmp_path / "out", dtype=dtype, max_shard_size=limit)
    wanted = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, dtype)  # type: ignore[call-overload]
    found = load_exported(tmp_path / "out")
    assert sorted(found) == sorted(values)
    for name, value in values.items():
        expected = value.to(wanted) if wanted is not None and value.is_floating_point() else value
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
    count = {"5GB": 1, 1: len(values)}.get(limit)
    names = [file.name for file in files]
    if count == 1:
        assert names == ["model.safetensors"]
    else:
        shards = [name for name in names if name.endswith(".safetensors")]
        assert names[-1] == "model.safetensors.index.json" and count in (None, len(shards))
        assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(names)


def test_files_stay_below_the_limit(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    for file in export(path, tmp_path / "out", max_shard_size=2200)[:-1]:
        held = load_file(file)
        assert sum(value.nbytes for value in held.values()) <= 2200 or len(held) == 1


def test_one_tensor_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counted: bytes of the tensors that were handed to the writer and are still alive."""
    path, values = saved(tmp_path)
    import weakref

    alive: dict[int, int] = {}
    peak = 0
    read = module._read

    def counted(*arguments: object) -> Tensor:
        nonlocal peak
        found = read(*arguments)  # type: ignore[arg-type]
        number = len(alive)
        alive[number] = found.nbytes
        weakref.finalize(found, alive.__setitem__, number, 0)
        peak = max(peak, sum(alive.values()))
        return found

    monkeypatch.setattr(module, "_read", counted)
    export(path, tmp_path / "out", max_shard_size=2200)
    largest = max(value.nbytes for value in values.values())
    assert len(alive) == len(values) and peak == largest
    shards = [sum(v.nbytes for v in load_file(f).values()) for f in (tmp_path / "out").glob("*.safetensors")]
    assert peak <= max(shards)


def test_an_export_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    out = tmp_path / "out"
    export(path, out, max_shard_size=2200)
    (out / "config.json").write_text("{}")
    export(path, out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    files = export(path, out, max_shard_size=3000)
    assert sorted(file.name for file in out.iterdir()) == sorted(["config.json", *(file.name for file in files)])


def test_a_damaged_checkpoint_leaves_the_folder_alone(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    out = tmp_path / "out"
    export(path, out)
    before = (out / "model.safetensors").read_bytes()
    file = next((path / "checkpoint").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointCorrupt) as caught:
        export(path, out, max_shard_size=2200)
    assert caught.value.file == str(file)
    assert [one.name for one in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == before


def test_items_are_aligned(tmp_path: Path) -> None:
    """An odd number of bytes before a float would keep readers from taking views."""
    values = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5), "c": torch.ones(1, dtype=torch.bfloat16)}
    specs = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in values.items()}
    write_sharded(tmp_path, specs, values.__getitem__)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_progress_ends_at_all(tmp_path: Path) -> None:
    path, values = saved(tmp_path)
    seen: list[tuple[int, int]] = []
    export(path, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(values) and seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in values.values())


def test_wrong_arguments_are_errors(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    with pytest.raises(CheckpointIncomplete, match="nothing was saved under the key 'net'"):
        export(path, tmp_path / "out", key="net")
    with pytest.raises(CheckpointIncomplete):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype"):
        export(path, tmp_path / "out", dtype="int8")
    for size in ("", "5 apples", "-1", "0", "GB"):
        with pytest.raises(ConfigError, match="max_shard_size"):
            export(path, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    assert [parse_size(size) for size in ("5GB", "1.5 kb", "2GiB", 7, "12")] == [5 * 10**9, 1500, 2**31, 7, 12]
