"""Checkpoints that DeepSpeed 0.19.8 wrote go on here: the next losses are its own."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
import zipfile
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zs_ckpt.deepspeed import DeepSpeedCheckpoint, open_deepspeed
from zs_ckpt.errors import CheckpointCorrupt, CheckpointIncomplete
from zs_ckpt.partitions import sharded
from zs_ckpt.unpickler import Record, read_pickled
from zs_comm import ConfigError

FIXTURES = Path(__file__).parent / "deepspeed_fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
TAG = "global_step3"


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("deepspeed_tiny", FIXTURES / "tiny.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


tiny = _module()
CASES = [*tiny.CASES, *tiny.UNIVERSAL]


def dtype_of(case: str) -> torch.dtype:
    return torch.bfloat16 if case.endswith("bf16") else torch.float32


def plain(found: DeepSpeedCheckpoint) -> tuple[nn.Module, torch.optim.Optimizer, list[list[str]]]:
    """The model in fp32 and torch's AdamW with what was found; and the groups' names."""
    model = tiny.Tiny()
    model.load_state_dict(found.model_state())
    named, state = dict(model.named_parameters()), found.optimizer_state()
    hyper = [{**group, "params": [named[name] for name in group["params"]]} for group in found.param_groups]
    optimizer = torch.optim.AdamW(copy.copy(group) for group in hyper)
    numbered = [name for group in found.param_groups for name in group["params"]]
    loaded = optimizer.state_dict()
    loaded["state"] = {number: state[name] for number, name in enumerate(numbered)}
    optimizer.load_state_dict(loaded)
    return model, optimizer, [group["params"] for group in found.param_groups]


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, lrs: list[float], dtype: torch.dtype) -> list[float]:
    """Both ranks' batches in one process; `model` has the masters, a copy in `dtype` runs, as in DeepSpeed."""
    runs = copy.deepcopy(model)
    for parameter in runs.parameters():
        parameter.data = parameter.data.to(dtype)
    losses = []
    for step, lr in enumerate(lrs, tiny.SEEN):
        grads: list[list[Tensor]] = []
        total = 0.0
        for rank in range(tiny.RANKS):
            runs.zero_grad()
            loss = runs(*tiny.batch(step, rank))
            loss.backward()
            total += loss.item()
            grads.append([p.grad.clone() for p in runs.parameters() if p.grad is not None])
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter, *pair in zip(trained, *grads, strict=True):
            parameter.grad = (sum(pair[1:], pair[0]) / tiny.RANKS).float()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(runs.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        losses.append(total / tiny.RANKS)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_plain_torch_goes_on_with_deepspeeds_losses(case: str) -> None:
    model, optimizer, _ = plain(open_deepspeed(FIXTURES / case))
    found = losses_of(model, optimizer, EXPECTED[case]["lrs"], dtype_of(case))
    assert len(found) == tiny.NEXT
    assert found == pytest.approx(EXPECTED[case]["losses"], abs=1e-5, rel=0)


@pytest.mark.parametrize("case", CASES)
def test_everything_beside_the_tensors(case: str) -> None:
    found = open_deepspeed(FIXTURES / case)
    assert (found.stage, found.world, found.version) == (
        int(case[4]) if case[4].isdigit() else found.stage,
        2,
        "0.19.8",
    )
    assert [group["params"] for group in found.param_groups] == tiny.group_names()
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]
    assert found.param_groups[0]["lr"] == pytest.approx(EXPECTED[case]["lrs"][0])
    assert found.counters["global_steps"] == tiny.SEEN and found.counters["global_samples"] == 12
    assert found.counters["skipped_steps"] == 0
    assert found.lr_scheduler == {"last_batch_iteration": tiny.SEEN - 1}
    best = found.client_state.pop("best")
    assert torch.equal(best, tiny.CLIENT_STATE["best"])
    assert found.client_state == {key: value for key, value in tiny.CLIENT_STATE.items() if key != "best"}
    assert found.loss_scaler == {"cur_scale": 1.0, "dynamic": False}
    assert found.config["zero_optimization"]["stage"] == found.stage
    assert found.tied == dict([tiny.TIED])
    assert set(found.states["exp_avg"]) == {name for group in tiny.group_names() for name in group}
    assert all(value.tensor().item() == tiny.SEEN for value in found.states["step"].values())


@pytest.mark.parametrize("case", CASES)
def test_frozen_parameters_and_buffers(case: str) -> None:
    found, fresh = open_deepspeed(FIXTURES / case).model_state(), tiny.Tiny().state_dict()
    assert sorted(found) == sorted(fresh)
    assert torch.equal(found["scale"].float(), fresh["scale"].to(dtype_of(case)).float())
    assert torch.equal(found["shift"], fresh["shift"])
    assert torch.equal(found["out.weight"], found["embed.weight"])


@pytest.mark.parametrize("case", tiny.CASES)
def test_pieces_are_the_whole_without_a_copy(case: str) -> None:
    for whole in open_deepspeed(FIXTURES / case).model.values():
        again = torch.full(whole.shape, float("nan"), dtype=whole.dtype)
        for box, data in whole.pieces():
            again[tuple(slice(start, stop) for start, stop in box)].view(-1).copy_(data)
            assert any(part.untyped_storage().data_ptr() == data.untyped_storage().data_ptr() for part in whole.parts)
        assert torch.equal(again, whole.tensor())


def test_stages_hold_the_same_numbers() -> None:
    """Stages 1, 2 and 3 trained alike, so a mistake in one layout shows."""
    for dtype in ("fp32", "bf16"):
        first = open_deepspeed(FIXTURES / f"zero1_{dtype}").optimizer_state()
        for stage in (2, 3):
            other = open_deepspeed(FIXTURES / f"zero{stage}_{dtype}").optimizer_state()
            assert first.keys() == other.keys()
            for name, states in first.items():
                for key, value in states.items():
                    assert torch.equal(value, other[name][key]), (stage, name, key)


@pytest.mark.parametrize("padding", [0, 3])
def test_the_order_is_that_of_the_shapes(padding: int, tmp_path: Path) -> None:
    """With round-robin gradients DeepSpeed's `param_slice_mappings` tell of another order than the one it stored."""
    shapes = {"b": (3, 2), "a": (5,), "c": (4, 2)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    gaps = [torch.zeros(padding)] * 3
    flat = torch.cat([part for name, gap in zip(shapes, gaps, strict=True) for part in (values[name].view(-1), gap)])
    ranks = []
    for part in flat.chunk(3):
        state = {0: {"exp_avg": torch.cat([part * 2, torch.zeros(2)]), "step": torch.tensor(1.0)}}
        base = {"state": state, "param_groups": [{"params": [0]}]}
        wrong = [{"a": Record("fragment_address", fields={"start": 0, "numel": 5})}]
        ranks.append({"single_partition_of_fp32_groups": [part], "base_optimizer_state": base, "partition_count": [3],
                      "param_alignment_paddings": [[padding] * 3], "param_slice_mappings": wrong})  # fmt: skip
    found, _ = sharded(tmp_path, [shapes], ranks, [tmp_path / str(rank) for rank in range(3)])
    for name, value in values.items():
        assert torch.equal(found["fp32"][name].tensor(), value)
        assert torch.equal(found["exp_avg"][name].tensor(), 2 * value)


def test_a_tags_folder_or_the_folder_above(tmp_path: Path) -> None:
    above = open_deepspeed(FIXTURES / "zero2_fp32")
    assert open_deepspeed(FIXTURES / "zero2_fp32" / TAG).folder == above.folder
    assert open_deepspeed(FIXTURES / "zero2_fp32", tag=TAG).folder == above.folder
    with pytest.raises(CheckpointIncomplete, match="latest"):
        open_deepspeed(tmp_path)
    with pytest.raises(CheckpointIncomplete, match="no such folder"):
        open_deepspeed(FIXTURES / "zero2_fp32", tag="global_step4")
    with pytest.raises(CheckpointCorrupt, match="no folder's name"):
        open_deepspeed(FIXTURES / "zero2_fp32", tag="../zero1_fp32")


def copied(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / case, tmp_path / case))


@pytest.mark.parametrize("case", ["zero1_fp32", "zero2_bf16", "zero3_fp32", "universal_bf16"])
def test_every_missing_file_is_missed(case: str, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    files = [path for path in sorted(folder.rglob("*.pt")) if path.name in NEEDED or "_rank_" in path.name]
    assert len(files) > 2
    for path in files:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises((CheckpointIncomplete, CheckpointCorrupt)):
            open_deepspeed(folder)
        path.write_bytes(content)
    open_deepspeed(folder)


NEEDED = ("fp32.pt", "optimizer_state.pt")


@pytest.mark.parametrize("case", ["zero1_fp32", "zero3_bf16"])
def test_a_flipped_bit_of_a_tensor_is_found(case: str, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    for path in sorted(folder.rglob("*_optim_states.pt")):
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            largest = max(
                (entry for entry in archive.infolist() if "/data/" in entry.filename), key=lambda e: e.file_size
            )
        at = content.index(largest.filename.encode()) + 200
        content[at] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointCorrupt, match="CRC-32") as caught:
            open_deepspeed(folder)
        assert caught.value.file == str(path)
        content[at] ^= 1
        path.write_bytes(content)


def test_a_shard_of_another_step_is_refused(tmp_path: Path) -> None:
    """Both ranks count the steps of a parameter that is cut between them."""
    folder = copied("zero3_fp32", tmp_path) / TAG
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    changed = read_pickled(path)
    zero = changed["optimizer_state_dict"]
    for values in zero["optimizer_state_dict"]["state"].values():
        values["step"] = torch.tensor(4.0)
    zero.update(zero_stage=3, loss_scaler=None)
    torch.save(changed, tmp_path / "changed.pt")
    (tmp_path / "changed.pt").replace(path)
    with pytest.raises(CheckpointCorrupt, match="another step") as caught:
        open_deepspeed(folder)
    assert caught.value.file == str(path) and caught.value.tensor == "embed.weight"


@pytest.mark.parametrize("case", ["zero1_fp32", "zero3_bf16", "universal_fp32"])
def test_values_of_any_other_type_are_typed_errors(case: str, tmp_path: Path) -> None:
    """Something in a file is something else: refused, or of no consequence; never another exception."""
    random = Random(case)
    folder, refused = copied(case, tmp_path), 0
    files = sorted(path for path in folder.rglob("*.pt") if path.stat().st_size > 2000)
    for _ in range(60):
        path = random.choice(files)
        content = path.read_bytes()
        changed = as_plain(read_pickled(path))
        spoil(changed, random)
        torch.save(changed, tmp_path / "changed.pt")
        (tmp_path / "changed.pt").replace(path)
        try:
            open_deepspeed(folder)
        except (CheckpointCorrupt, CheckpointIncomplete, ConfigError):
            refused += 1
        (tmp_path / "good.pt").write_bytes(content)
        (tmp_path / "good.pt").replace(path)
    assert refused > 3
    open_deepspeed(folder)


def as_plain(value: Any) -> Any:
    """Records as namespaces, which can be saved again."""
    if isinstance(value, Record):
        return value.arguments[0] if value.arguments else Namespace(**value.fields)
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, list) else value


def spoil(value: Any, random: Random) -> None:
    """Replace one value somewhere inside."""
    wrong = [None, -1, 2**70, "x", [], {}, [[[]]], (1, "y"), torch.ones(2), torch.tensor(True), 1.5, b"z", {3: 4}]
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = random.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and random.random() < 0.75:
            value = inner
        else:
            value[key] = random.choice(wrong)
            return


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mp_rank_01_model_states.pt", "model-parallel"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
        ("layer_1_expert_0_mp_rank_00_model_states.pt", "experts"),
    ],
)
def test_other_parallelism_is_refused_by_name(name: str, words: str, tmp_path: Path) -> None:
    folder = copied("zero1_fp32", tmp_path) / TAG
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=words):
        open_deepspeed(folder)


def test_two_files_of_one_rank_are_refused(tmp_path: Path) -> None:
    folder = copied("zero1_fp32", tmp_path) / TAG
    shutil.copy(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt",
                folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")  # fmt: skip
    with pytest.raises(CheckpointCorrupt, match="both of rank 0"):
        open_deepspeed(folder)
