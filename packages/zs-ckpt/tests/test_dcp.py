"""torch.distributed.checkpoint both ways, equal tensor by tensor."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zs_ckpt
import zs_comm
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from zs_ckpt import CheckpointCorrupt, CheckpointIncomplete
from zs_ckpt.dcp import export_dcp, import_dcp
from zs_ckpt.unpickler import PickleRefused
from zs_comm import ConfigError
from zs_comm.testing import run_ranks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(2):
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def quietly(function: Any, *arguments: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **kwargs)


def by_dcp(path: Path) -> dict[str, Tensor]:
    """Every tensor that `path` holds, read by torch."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(item.size, dtype=item.properties.dtype)
             for name, item in metadata.items() if hasattr(item, "size")}  # fmt: skip
    quietly(dcp.load, state, checkpoint_id=path, no_dist=True)
    return state


def one_process(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = net()
    optimizer = trained(model)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": states, "step": 5, "extra": {"list": [torch.arange(4), "text"]}}
    quietly(dcp.save, state, checkpoint_id=path, no_dist=True)
    return model, optimizer


def test_read_what_one_process_wrote(tmp_path: Path) -> None:
    model, optimizer = one_process(tmp_path / "dcp")
    saved = import_dcp(tmp_path / "dcp", tmp_path / "ours", tag="first")
    assert saved.tag == "first"
    found = zs_ckpt.read(tmp_path / "ours")
    for name, value in model.state_dict().items():
        assert torch.equal(found.pop(f"model/{name}"), value)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(found.pop(f"optimizer/{key}/{name}"), value)
    assert torch.equal(found.pop("extra/list/0"), torch.arange(4))
    assert not found
    again: dict[str, Any] = {"extra": {}, "step": {}}
    loaded = zs_ckpt.load(tmp_path / "ours", again)
    assert again["extra"]["list"][0].tolist() == [0, 1, 2, 3] and again["extra"]["list"][1] == "text"
    assert loaded.objects["step"]["leaves"] == [[[], 5]]


def test_a_model_and_an_optimizer_go_on(tmp_path: Path) -> None:
    model, optimizer = one_process(tmp_path / "dcp")
    import_dcp(tmp_path / "dcp", tmp_path / "ours")
    other = net()
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    zs_ckpt.load(tmp_path / "ours", {"model": other, "optimizer": fresh})
    for left, right in ((model, optimizer), (other, fresh)):
        left(torch.ones(4, 6)).sum().backward()
        right.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def sharded(group: zs_comm.Group, path: str) -> dict[str, Tensor]:
    """Two ranks, FSDP2: DTensors, uneven."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 100.0 * number)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model, mesh=init_device_mesh("cpu", (group.size,)))
    state = get_model_state_dict(model)
    assert all(type(value).__name__ == "DTensor" for value in state.values())
    quietly(dcp.save, {"model": state}, checkpoint_id=path)
    return whole


@pytest.mark.parametrize("world", [2, 3])
def test_read_what_sharded_ranks_wrote(world: int, tmp_path: Path) -> None:
    expected = run_ranks(sharded, world, str(tmp_path / "dcp"))[0]
    import_dcp(tmp_path / "dcp", tmp_path / "ours")
    found = zs_ckpt.read(tmp_path / "ours")
    assert sorted(found) == sorted(f"model/{name}" for name in expected)
    assert all(torch.equal(found[f"model/{name}"], value) for name, value in expected.items())
    with zs_ckpt.Snapshot(tmp_path / "ours") as snapshot:
        assert len(snapshot.manifest.tensors["model/0.weight"].pieces) == world


def test_write_what_torch_reads(tmp_path: Path) -> None:
    model = net()
    optimizer = trained(model)
    odd = {"empty": torch.empty(0, 3), "bool": torch.tensor([True, False]), "half": torch.ones(3).bfloat16()}
    zs_ckpt.save(tmp_path / "ours", {"model": model, "optimizer": optimizer, "odd": odd})
    export_dcp(tmp_path / "ours", tmp_path / "dcp")
    found, mine = by_dcp(tmp_path / "dcp"), zs_ckpt.read(tmp_path / "ours")
    for name, value in mine.items():
        key, _, rest = name.partition("/")
        slot, _, parameter = rest.partition("/")
        theirs = f"{key}.state.{parameter}.{slot}" if key == "optimizer" else f"{key}.{rest}"
        assert torch.equal(found.pop(theirs), value), name
    assert not found
    import_dcp(tmp_path / "dcp", tmp_path / "again")
    again = zs_ckpt.read(tmp_path / "again")
    assert again.keys() == mine.keys() and all(torch.equal(again[name], value) for name, value in mine.items())


def test_torch_loads_it_into_a_model_and_an_optimizer(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = net()
    optimizer = trained(model)
    zs_ckpt.save(tmp_path / "ours", {"model": model, "optimizer": optimizer})
    export_dcp(tmp_path / "ours", tmp_path / "dcp")
    other = net()
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    weights, states = get_state_dict(other, fresh)
    state = {"model": weights, "optimizer": states}
    quietly(dcp.load, state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert fresh.param_groups[0]["lr"] == 0.01
    for left, right in ((model, optimizer), (other, fresh)):
        left(torch.ones(4, 6)).sum().backward()
        right.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_one_tensor_is_read_at_a_time(tmp_path: Path) -> None:
    """The state that the writer is given has no memory."""
    from zs_ckpt.dcp import _described

    zs_ckpt.save(tmp_path / "ours", {"x": {"a": torch.ones(3), "b": torch.zeros(2, 2)}})
    with zs_ckpt.Snapshot(tmp_path / "ours") as snapshot:
        state, _ = _described(snapshot)
        assert all(value.is_meta for value in state["x"].values()) and snapshot.nbytes_read == 0


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_is_refused(tmp_path: Path) -> None:
    one_process(tmp_path / "dcp")
    file = tmp_path / "dcp" / ".metadata"
    good = file.read_bytes()
    file.write_bytes(pickle.dumps({"a": Runs(tmp_path / "canary")}))
    with pytest.raises(PickleRefused) as caught:
        import_dcp(tmp_path / "dcp", tmp_path / "ours")
    assert caught.value.file == str(file) and caught.value.name == "posix.mkdir"
    file.write_bytes(good)
    state = {"model": {"w": torch.ones(2)}, "evil": Runs(tmp_path / "canary")}
    quietly(dcp.save, state, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(PickleRefused, match=r"__0_0.distcp.*posix.mkdir"):
        import_dcp(tmp_path / "evil", tmp_path / "ours")
    assert not (tmp_path / "canary").exists()


def test_what_is_missing_or_damaged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointIncomplete, match="no DCP"):
        import_dcp(tmp_path, tmp_path / "ours")
    one_process(tmp_path / "dcp")
    data = tmp_path / "dcp" / "__0_0.distcp"
    content = data.read_bytes()
    data.unlink()
    with pytest.raises(CheckpointIncomplete):
        import_dcp(tmp_path / "dcp", tmp_path / "ours")
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointCorrupt):
        import_dcp(tmp_path / "dcp", tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*/manifest.json"))


def test_compressed_items_are_refused_by_name(tmp_path: Path) -> None:
    from zs_ckpt.dcp import _item
    from zs_ckpt.unpickler import Record

    info = Record("_StorageInfo", fields={"relative_path": "x", "transform_descriptors": ["zstd"]})
    with pytest.raises(ConfigError, match="zstd"):
        _item(tmp_path, info)
    for name in ("../x", "a/b", "", ".."):
        with pytest.raises(CheckpointCorrupt, match="names the file"):
            _item(tmp_path, Record("_StorageInfo", fields={"relative_path": name}))


def test_torchs_module_is_imported_when_it_is_needed() -> None:
    code = "import sys, zs_ckpt, zs_ckpt.cli, zs_ckpt.dcp; print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
