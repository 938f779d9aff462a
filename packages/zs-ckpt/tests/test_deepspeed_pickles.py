"""Nothing in DeepSpeed's files is run: a pickle that would is refused in each of them, by file and global."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from zs_ckpt.deepspeed import open_deepspeed
from zs_ckpt.errors import CheckpointCorrupt
from zs_ckpt.unpickler import PickleRefused, Record, read_pickled

FIXTURES = Path(__file__).parent / "deepspeed_fixtures"


class Runs:
    """What an attacker writes: unpickling it calls `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def spoil(path: Path, evil: Any) -> None:
    """Replace the value in a torch archive by one that holds `evil` beside it."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("/data.pkl"))
    good = entries[name]
    assert good[:2] == b"\x80\x02" and good[-1:] == b"."
    # the evil value first, dropped again, then what was there before
    entries[name] = good[:2] + pickle.dumps(evil, protocol=2)[2:-1] + b"0" + good[2:]
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


FILES = [
    "zero1_fp32/global_step3/mp_rank_00_model_states.pt",
    "zero1_fp32/global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero1_fp32/global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero2_bf16/global_step3/mp_rank_00_model_states.pt",
    "zero2_bf16/global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero3_fp32/global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "zero3_fp32/global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt",
    "zero3_bf16/global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "universal_fp32/global_step3/mp_rank_00_model_states.pt",
    "universal_fp32/global_step3/zero/optimizer_state.pt",
    "universal_fp32/global_step3/zero/up.weight/fp32.pt",
    "universal_fp32/global_step3/zero/up.weight/exp_avg.pt",
    "universal_fp32/global_step3/zero/up.weight/step.pt",
    "universal_bf16/global_step3/zero_pp_rank_1_mp_rank_00_model_states.pt",
]


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_that_would_run_is_refused_in_each_file(name: str, tmp_path: Path) -> None:
    case = name.partition("/")[0]
    folder, canary = shutil.copytree(FIXTURES / case, tmp_path / case), tmp_path / "canary"
    open_deepspeed(folder)
    spoil(tmp_path / name, Runs(os.mkdir, str(canary)))
    with pytest.raises(PickleRefused) as caught:
        open_deepspeed(folder)
    assert caught.value.file == str(tmp_path / name) and caught.value.name == "posix.mkdir"
    assert str(tmp_path / name) in str(caught.value) and "posix.mkdir" in str(caught.value)
    assert not canary.exists()


def test_the_canary_is_a_real_one(tmp_path: Path) -> None:
    """Python's own unpickler runs it."""
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


EVIL = {
    "builtins.eval": Runs(eval, "1"),
    "builtins.exec": Runs(exec, "1"),
    "builtins.getattr": Runs(getattr, 1, "real"),
    "builtins.__import__": Runs(__import__, "os"),
    "posix.system": Runs(os.system, "true"),
    "torch._load_global_deps": Runs(torch._load_global_deps),
    "torch.hub.load": Runs(torch.hub.load, "a", "b"),
    "torch.serialization.load": Runs(torch.load, "x"),
    "shutil.rmtree": Runs(shutil.rmtree, "nowhere"),
    "pathlib.Path": Path,
}


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_other_globals_are_refused_in_every_protocol(name: str, protocol: int, tmp_path: Path) -> None:
    torch.save({"a": EVIL[name]}, tmp_path / "x.pt", pickle_protocol=max(protocol, 2))
    if protocol < 2:
        archive(tmp_path / "x.pt", pickle.dumps({"a": EVIL[name]}, protocol=protocol))
    with pytest.raises(PickleRefused) as caught:
        read_pickled(tmp_path / "x.pt")
    assert caught.value.name == name


def archive(path: Path, data: bytes, entries: dict[str, bytes] | None = None) -> Path:
    path.unlink(missing_ok=True)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a/data.pkl", data)
        for name, content in (entries or {}).items():
            made.writestr(name, content)
    return path


REFUSED = [
    b"\x80\x02\x82\x01.",  # an extension that somebody registered
    b"(S'x'\ni__main__\nA\n.",
    b"(cos\nsystem\no.",
    b"cdeepspeed.launcher.runner\nmain\n)R.",
    b"ccollections\nOrderedDict\n)R}(S'_x'\nK\x01ub",
    b"Pabc\n.",
    b"cbuiltins\nset\n(cbuiltins\nset\ntR.",  # a global is no list
]


@pytest.mark.parametrize("data", REFUSED, ids=lambda data: repr(data)[:30])
def test_odd_operations_are_refused_or_not_readable(data: bytes, tmp_path: Path) -> None:
    with pytest.raises((PickleRefused, CheckpointCorrupt)) as caught:
        read_pickled(archive(tmp_path / "x.pt", data))
    assert caught.value.file == str(tmp_path / "x.pt")


def test_a_state_is_set_on_records_only(tmp_path: Path) -> None:
    for target in (b"]", b")", b"K\x01", b"\x8f"):
        with pytest.raises((PickleRefused, CheckpointCorrupt)):
            read_pickled(archive(tmp_path / "x.pt", b"\x80\x04" + target + b"}b."))


def test_what_the_files_of_a_training_hold_comes_back(tmp_path: Path) -> None:
    import argparse

    tensor = torch.arange(12.0).view(3, 4)
    value = {
        "ordered": OrderedDict(b=1, a=[True, None, 2.5, -3, 2**70, "text ü", b"bytes"]),
        "tensors": (tensor, tensor[1], tensor.t(), tensor.bfloat16(), torch.tensor(3), torch.empty(0, 2)),
        "parameter": torch.nn.Parameter(tensor.clone()),
        "set": {1, 2},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "namespace": argparse.Namespace(lr=0.1, name="run"),
        3: float("inf"),
    }
    for protocol in (2, 4):
        torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
        found = read_pickled(tmp_path / "x.pt")
        assert found["ordered"] == value["ordered"] and found["set"] == {1, 2} and found[3] == float("inf")
        assert found["size"] == torch.Size([2, 3]) and found["dtype"] is torch.bfloat16
        for ours, theirs in zip(found["tensors"], value["tensors"], strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert torch.equal(found["parameter"], tensor)
        assert isinstance(found["namespace"], Record) and found["namespace"].fields == {"lr": 0.1, "name": "run"}
        (tmp_path / "x.pt").unlink()


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    """As numpy pickles them, without numpy."""
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        state = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        kind = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R" + state
        data = b"\x80\x03c" + module + b"\nscalar\n" + kind + b"C\x08" + struct.pack("<d", 1.5) + b"\x86R."
        assert read_pickled(archive(tmp_path / "x.pt", data)) == 1.5
        for wrong in (data.replace(b"f8", b"O8"), data.replace(b"00<", b"00>").replace(b"\x00<N", b"\x00>N")):
            with pytest.raises(CheckpointCorrupt):
                read_pickled(archive(tmp_path / "x.pt", wrong))


def test_a_value_that_is_endless_written_out_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURES / "zero1_fp32", tmp_path / "run")
    path = folder / "global_step3" / "mp_rank_00_model_states.pt"
    state = {**read_pickled(path), "laughs": []}
    for _ in range(40):
        state["laughs"] = [state["laughs"], state["laughs"]]
    torch.save(state, tmp_path / "new.pt")
    (tmp_path / "new.pt").replace(path)
    with pytest.raises(CheckpointCorrupt, match="values"):
        open_deepspeed(folder)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    read_pickled(tmp_path / "x.pt")["a"].fill_(7)
    assert (tmp_path / "x.pt").read_bytes() == before


def test_every_truncation_and_flip_is_an_error_or_the_same_value(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5.0), "b": [1, "two"]}, tmp_path / "good.pt")
    content, path = (tmp_path / "good.pt").read_bytes(), tmp_path / "x.pt"
    wrong = [content[:n] for n in range(0, len(content), 41)]
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 8)
        wrong.append(bytes(flipped))
    same = 0
    for data in wrong:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            found = read_pickled(path)
        except (CheckpointCorrupt, PickleRefused):  # any other error fails the test
            continue
        same += 1  # padding, times, names of entries that are not used
        assert torch.equal(found["a"], torch.arange(5.0)) and found["b"] == [1, "two"]
    assert same < len(wrong) / 1.5


def test_claims_of_huge_sizes_cost_nothing(tmp_path: Path) -> None:
    """A tensor larger than its storage, a compressed entry, a storage that is not there."""

    def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return ("storage", torch.FloatStorage, "0", "cpu", 4) if value == "here" else None

        data = io.BytesIO()
        Pickler(data, protocol=2).dump(
            Runs(torch._utils._rebuild_tensor_v2, "here", offset, size, stride, False, OrderedDict())
        )
        return data.getvalue()

    storage = {"a/data/0": bytes(16)}
    good = read_pickled(archive(tmp_path / "good.pt", tensor(0, (2, 2), (2, 1)), storage))
    assert good.shape == (2, 2)
    for claim in [
        (0, (2**40,), (0,)), (0, (2**40,), (1,)), (1, (4,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
        (0, (2, 2), (4, 1)), (0, (2**63, 2), (1, 1)), (0, (2,), (1, 1)),
    ]:  # fmt: skip
        with pytest.raises(CheckpointCorrupt):
            read_pickled(archive(tmp_path / "x.pt", tensor(*claim), storage))
    with pytest.raises(CheckpointCorrupt):
        read_pickled(archive(tmp_path / "x.pt", tensor(0, (2, 2), (2, 1)), {"a/data/0": bytes(15)}))
    with pytest.raises(CheckpointCorrupt):
        read_pickled(archive(tmp_path / "x.pt", tensor(0, (2, 2), (2, 1))))
    with zipfile.ZipFile(tmp_path / "z.pt", "w", compression=zipfile.ZIP_DEFLATED) as made:
        made.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointCorrupt, match="compressed"):
        read_pickled(tmp_path / "z.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointCorrupt, match="archive"):
        read_pickled(tmp_path / "old.pt")
