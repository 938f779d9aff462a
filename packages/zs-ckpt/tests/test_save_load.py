"""What was saved is what is loaded, whatever the ranks, lay-outs and dtypes; and only what is needed is read."""

import glob
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import Sharded, value
from zs_ckpt import CheckpointCorrupt, Checkpointer, CheckpointIncomplete, Snapshot, load, read, save, tags, verify
from zs_ckpt.testing import check_shardable
from zs_comm import ConfigError
from zs_comm.testing import run_ranks

F, H = torch.float32, torch.bfloat16
SMALL = {
    "a": ((37, 5, 3), F),
    "b": ((30, 50), F),
    "c": ((), F),
    "d": ((129,), H),
    "e": ((3,), torch.bool),
    "f": ((0, 4), F),
}
LARGE = {"a": ((1000, 513), F), "b": ((777, 1031), F), "c": ((1 << 20,), H)}


def do_save(group, folder, tensors, how, own=0, **options):
    state = {"m": Sharded(group.rank, group.size, tensors, how, own), "n": {"x": torch.arange(5), "lr": 0.5}}
    return save(folder, state, group=group, client_state={"t": (1, b"x")}, **options).nbytes


def do_load(group, folder, tensors, how, own=0, stored=None, **options):
    toy, plain = Sharded(group.rank, group.size, tensors, how, own), {"x": torch.zeros(5, dtype=torch.long), "lr": 0.0}
    loaded = load(folder, {"m": toy, "n": plain}, group=group, **options)
    needed = toy.check(stored=stored)
    assert toy.finished == {"steps": 3} and torch.equal(plain["x"], torch.arange(5)) and plain["lr"] == 0.5
    assert loaded.client_state == {"t": (1, b"x")}
    assert toy.rank_saved == [{"rank": rank} for rank in range(loaded.world)]
    return needed, loaded.nbytes_read


def save_and_load(group, folder, matrix):
    """All lay-outs between the ranks of one world: they are cheap once the ranks are there."""
    for index, (saved, loaded) in enumerate(matrix):
        do_save(group, folder, SMALL, saved, own=3, tag=f"t{index}")
        do_load(group, folder, SMALL, loaded, own=3, tag=f"t{index}")


HOWS = ("rows", "flat", "columns", "copy")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_lay_out_to_every_other(world, tmp_path):
    hows = (*HOWS, "pairs") if world % 2 == 0 else HOWS
    run_ranks(save_and_load, world, str(tmp_path), [(a, b) for a in hows for b in hows])


@pytest.mark.parametrize("saved", [1, 2, 3, 4])
def test_every_world_to_every_other_reads_what_it_needs(saved, tmp_path):
    how = {"a": "rows", "b": "flat", "c": "copy"}
    written = sum(run_ranks(do_save, saved, str(tmp_path), LARGE, how, io="threads"))
    tensors = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in LARGE.values())
    assert tensors < written < tensors + 8192  # replicas share the writing
    for loaded in (1, 2, 3, 4):
        found = run_ranks(do_load, loaded, str(tmp_path), LARGE, how)
        assert sum(got for _, got in found) <= 1.05 * sum(needed for needed, _ in found)


def test_dtypes_are_cast(tmp_path):
    run_ranks(do_save, 2, str(tmp_path), {"x": ((64, 65), F), "y": ((100,), H)}, "flat")
    stored = {"x": F, "y": H}
    run_ranks(do_load, 3, str(tmp_path), {"x": ((64, 65), H), "y": ((100,), torch.float64)}, "rows", stored=stored)


def uneven(group, folder, weights, loading):
    class Uneven(Sharded):
        def boxes(self, name):
            from toys import rows

            return rows(self.tensors[name][0], self.rank, self.world, weights), 0, 1

    toy = Uneven(group.rank, group.size, {"x": ((50, 7), F), "y": ((2, 3), F)})
    if loading:
        load(folder, {"m": toy}, group=group)
        toy.check()
    else:
        save(folder, {"m": toy}, group=group)


def test_uneven_boxes_and_ranks_with_nothing(tmp_path):
    run_ranks(uneven, 4, str(tmp_path), [1, 0, 30, 9], False)
    run_ranks(uneven, 3, str(tmp_path), [7, 1, 0], True)
    run_ranks(uneven, 1, str(tmp_path), [1], True)


def test_what_is_one_ranks_own(tmp_path):
    """It comes back to the same rank; at another world size it can be asked for by the rank that saved it."""
    run_ranks(do_save, 3, str(tmp_path), SMALL, "rows", own=4)
    run_ranks(do_load, 3, str(tmp_path), SMALL, "flat", own=4)
    assert [read(tmp_path, names=f"rank{rank}/m/mine")[f"rank{rank}/m/mine"][0].item() for rank in range(3)] == [
        1,
        2,
        3,
    ]
    run_ranks(sum_of_own, 2, str(tmp_path))


def sum_of_own(group, folder):
    class Sums(Sharded):
        def places(self, saved, objects):
            assert "mine" not in saved and saved.world == 3  # as many ranks saved as do not load
            self.parts = []
            for rank, own in enumerate(saved.ranks):
                self.parts.append(torch.zeros(4))
                from zs_ckpt import Piece

                yield Piece(own["mine"], ((0, 4),), self.parts[-1], scope=f"rank:{rank}")

    toy = Sums(group.rank, group.size, {})
    load(folder, {"m": toy}, group=group)
    assert torch.equal(sum(toy.parts), torch.full((4,), 6.0))


def trees(group, folder):
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "bare": weights.t(),  # not contiguous
        "tree": {"layers": [{"w": weights, "n": 1}, {"w": weights + 1, "n": 2}], 3: torch.tensor(True), "lr": 0.1},
        "epoch": 7,
    }
    save(folder, state, group=group)
    target = {
        "bare": torch.zeros(3, 4).t(),
        "tree": {
            "layers": [{"w": torch.zeros(3, 4), "n": 0}, {"w": torch.zeros(3, 4, dtype=H), "n": 0}],
            3: torch.tensor(False),
            "lr": 0,
        },
        "epoch": 0,
    }
    load(folder, target, group=group)
    assert torch.equal(target["bare"], weights.t()) and target["epoch"] == 7
    assert torch.equal(target["tree"]["layers"][0]["w"], weights) and target["tree"]["layers"][1]["n"] == 2
    assert torch.equal(target["tree"]["layers"][1]["w"], (weights + 1).to(H))
    assert target["tree"][3].item() is True and target["tree"]["lr"] == 0.1
    empty = {"tree": {}}
    load(folder, empty, group=group)
    assert torch.equal(empty["tree"]["layers"][1]["w"], weights + 1) and empty["tree"]["lr"] == 0.1


@pytest.mark.parametrize("world", [1, 2])
def test_plain_values(world, tmp_path):
    run_ranks(trees, world, str(tmp_path))


def test_read(tmp_path):
    state = {"m": {"w": torch.randn(5, 6), "b": torch.ones(5)}, "x": torch.tensor(3, dtype=torch.complex64)}
    saved = save(tmp_path, state, tag="one", step=12)
    found = read(tmp_path)
    assert list(found) == ["m/w", "m/b", "x"] and torch.equal(found["m/w"], state["m"]["w"])
    assert found["x"].dtype == torch.complex64 and found["x"].item() == 3
    assert list(read(tmp_path, tag="one", names="m/*")) == ["m/w", "m/b"]
    assert list(read(tmp_path, names=["x", "m/b"])) == ["m/b", "x"]
    with pytest.raises(CheckpointIncomplete, match="m/none"):
        read(tmp_path, names=["x", "m/none"])
    with Snapshot(tmp_path) as snapshot:
        assert torch.equal(snapshot.read("m/w", ((1, 3), (2, 6))), state["m"]["w"][1:3, 2:])
        assert snapshot.manifest.step == 12 and snapshot.manifest.save_id == saved.save_id
    (file,) = glob.glob(f"{tmp_path}/one/*.safetensors")
    assert torch.equal(load_file(file)["m/w"], state["m"]["w"])


def test_nothing_is_changed_where_names_or_shapes_differ(tmp_path):
    save(tmp_path, {"m": {"w": torch.ones(2, 3), "b": torch.ones(3)}})
    for wrong in (
        {"w": torch.zeros(3, 2), "b": torch.zeros(3)},
        {"w": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3), "b": torch.zeros(3), "c": torch.zeros(1)},
    ):
        with pytest.raises(ConfigError):
            load(tmp_path, {"m": wrong})
        assert not any(tensor.any() for tensor in wrong.values())
    with pytest.raises(ConfigError, match=r"no \['k'\]"):
        load(tmp_path, {"m": {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, "k": torch.zeros(1)})
    some = {"m": {"w": torch.zeros(2, 3), "c": torch.zeros(1)}, "k": torch.zeros(1)}
    load(tmp_path, some, strict=False)
    assert some["m"]["w"].all() and not some["m"]["c"].any()


@pytest.mark.parametrize("world", [1, 2])
def test_bad_arguments(world, tmp_path):
    run_ranks(bad_arguments, world, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def bad_arguments(group, folder):
    for state, options in (
        ({"a/b": torch.ones(1)}, {}),
        ({3: torch.ones(1)}, {}),
        ([torch.ones(1)], {}),
        ({"x": torch.ones(1).to_sparse()}, {}),
        ({"x": object()}, {}),
        ({"x": {"a": torch.ones(1), "b": object()}}, {}),
        ({"x": torch.ones(1)}, {"tag": "../x"}),
        ({"x": torch.ones(1)}, {"client_state": lambda: 0}),
        ({"x": torch.ones(1)}, {"io": "fast"}),
        ({"x": torch.ones(1)}, {"keep": 0}),
        ({"x": torch.ones(1)}, {"step": -1}),
        ({"x": {"1": torch.ones(1), 1: torch.ones(1)}}, {}),
    ):
        with pytest.raises(ConfigError):
            save(folder, state, group=group, **options)


def test_flips_in_every_region_are_found(tmp_path):
    """Each flip is an error that names its file; where the manifest is whole, `verify` says the same."""
    state = {"m": Sharded(0, 1, {"a": ((40, 33), F), "b": ((7,), H)}, own=2), "n": {"x": torch.ones(3), "lr": 0.1}}
    save(tmp_path, state)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) == 3
    for path in files:
        raw = path.read_bytes()
        for position in sorted({*range(0, len(raw), 97), *range(0, min(200, len(raw)), 5), len(raw) - 1}):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            if path.name == "latest" and flipped.split() == raw.split():
                continue  # another kind of white space
            with pytest.raises((CheckpointCorrupt, CheckpointIncomplete)) as caught:
                toy = Sharded(0, 1, {"a": ((40, 33), F), "b": ((7,), H)}, own=2)
                load(tmp_path, {"m": toy, "n": {"x": torch.zeros(3), "lr": 0}})
            assert caught.value.file == str(path)
            if path.name != "latest":
                report = verify(tmp_path, "checkpoint")
                assert not report.ok and report.problems[0].file == str(path)
        path.write_bytes(raw)
    assert verify(tmp_path).ok and verify(tmp_path).tensors == 4


def test_swapped_shards_and_extents_are_found(tmp_path):
    same = torch.zeros(4096)
    save(tmp_path, {"a": same, "b": same.clone(), "c": torch.arange(4096)}, tag="one")
    save(tmp_path, {"a": same + 1, "b": same.clone(), "c": torch.arange(4096)}, tag="two")
    (one,), (two,) = glob.glob(f"{tmp_path}/one/*.safetensors"), glob.glob(f"{tmp_path}/two/*.safetensors")
    good, other = Path(one).read_bytes(), Path(two).read_bytes()
    Path(one).write_bytes(other)  # a shard of another step
    with pytest.raises(CheckpointCorrupt):
        read(tmp_path, tag="one")
    data = len(good) - 2 * 16384 - 32768  # `c` comes first; its second extent takes the place of the first
    Path(one).write_bytes(good[:data] + good[data + 4096 : data + 8192] + good[data + 4096 :])
    with pytest.raises(CheckpointCorrupt) as caught:
        read(tmp_path, tag="one")
    assert caught.value.tensor == "c" and caught.value.file == one
    assert [problem.tensor for problem in verify(tmp_path, "one").problems] == ["c"]


def test_tags(tmp_path):
    assert tags(tmp_path) == [] and tags(tmp_path / "none") == []
    for tag in ("b", "a", "c"):
        save(tmp_path, {"x": torch.ones(1)}, tag=tag)
    save(tmp_path, {"x": torch.zeros(1)}, tag="a")
    assert tags(tmp_path) == ["b", "c", "a"]
    assert read(tmp_path)["x"].item() == 0
    (tmp_path / "latest").write_text("b")  # by hand
    assert read(tmp_path)["x"].item() == 1
    (tmp_path / "latest").unlink()
    assert read(tmp_path)["x"].item() == 0
    (tmp_path / "latest").write_text("gone\n")  # by hand, and wrong
    with pytest.raises(CheckpointIncomplete, match="gone"):
        read(tmp_path)
    save(tmp_path, {"x": torch.zeros(1)}, tag="d")
    (tmp_path / "d" / "manifest.json").unlink()  # removed by hand, and `latest` has not heard of it
    assert read(tmp_path)["x"].item() == 0
    (tmp_path / "latest").write_text("../b\n")
    with pytest.raises(CheckpointCorrupt):
        read(tmp_path)


class Real:
    """A Shardable with values of its own, as `check_shardable` wants it."""

    PROTOCOL = 1
    count = 0

    def __init__(self, group, broken=False):
        Real.count += 1
        self.group, self.broken, self.steps = group, broken, Real.count
        self.toy = Sharded(group.rank, group.size, SMALL, "rows", seed=Real.count)
        self.data = list(self.toy.pieces())

    def pieces(self):
        yield from self.data

    def objects(self):
        return {"steps": self.steps}

    def places(self, saved, objects):
        yield from self.data[1:] if self.broken else self.data

    def finish(self, objects):
        self.steps = objects["steps"]


def check(group, broken):
    if not broken:
        check_shardable(lambda: Real(group), group)
        return
    with pytest.raises(AssertionError, match="other values"):
        check_shardable(lambda: Real(group, broken=True), group)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_the_check_of_shardables(world, broken):
    run_ranks(check, world, broken)


def test_import_is_light():
    code = "import sys, zs_comm; before = set(sys.modules); import zs_ckpt; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) == {"zs_ckpt", "zs_ckpt.errors"}


def test_values_of_toys_are_the_same_everywhere():
    assert torch.equal(value("x", (3,)), value("x", (3,))) and not torch.equal(value("x", (3,)), value("y", (3,)))


def test_what_is_newest(tmp_path):
    """Between a commit and its `latest` the commit counts; with `latest=False` it stays what it was."""
    keeper = Checkpointer(tmp_path)
    for number, tag in enumerate(("a", "b")):
        keeper.save({"x": torch.full((1,), float(number))}, tag=tag)
    old = (tmp_path / "latest").read_bytes()
    keeper.save({"x": torch.full((1,), 2.0)}, tag="c")
    assert read(tmp_path)["x"].item() == 2
    (tmp_path / "latest").write_bytes(old)  # killed before it was written
    assert read(tmp_path)["x"].item() == 2
    keeper.save({"x": torch.full((1,), 3.0)}, tag="b")
    keeper.save({"x": torch.full((1,), 4.0)}, tag="d", latest=False)
    assert read(tmp_path)["x"].item() == 3 and tags(tmp_path) == ["a", "c", "b", "d"]
    (tmp_path / "latest").unlink()
    assert read(tmp_path)["x"].item() == 4
    raw = bytearray((tmp_path / "d" / "manifest.json").read_bytes())
    raw[5] ^= 1
    (tmp_path / "d" / "manifest.json").write_bytes(raw)
    with pytest.raises(CheckpointCorrupt) as caught:
        read(tmp_path)
    assert caught.value.file == str(tmp_path / "d" / "manifest.json")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_progress_of_a_save_ends_at_all(asynchronous, tmp_path):
    state, seen = {"x": {str(size): torch.ones(size) for size in (3, 5, 0)}}, []
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(state, asynchronous=asynchronous, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(12, 32), (32, 32), (32, 32)]


def test_a_large_state_is_copied_as_it_is(tmp_path):
    """Beyond 64 MiB by two threads; what is saved is what was there at the call."""
    generator = torch.Generator().manual_seed(0)
    state = {str(size): torch.randn(size, generator=generator) for size in (17, 9 << 20, 1, 0, (9 << 20) + 3)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"x": state}, asynchronous=True)
        for tensor in state.values():
            tensor.zero_()
    found = read(tmp_path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"x/{name}"], tensor, rtol=0, atol=0)


def test_reads_through_buffers_are_ahead_of_one_another(tmp_path):
    """Columns of a large tensor: every read goes through a buffer, and buffers are used again."""
    wide = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1))
    save(tmp_path, {"x": {"wide": wide}})
    for io in ("auto", "threads"):
        with Snapshot(tmp_path, io=io) as snapshot:
            for start, stop in ((0, 1), (7, 2000), (2000, 4096)):
                part = snapshot.read("x/wide", ((0, 4096), (start, stop)))
                torch.testing.assert_close(part, wide[:, start:stop], rtol=0, atol=0)


PEAK = """
import sys, torch, zs_ckpt

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

path, io, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
state = {"x": {str(index): torch.ones(1 << 20, dtype=dtype) for index in range(96)}}
zs_ckpt.load(path, {"x": {"0": state["x"]["0"]}}, io=io, strict=False)  # what is made once: threads, modules
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = status("VmRSS")
zs_ckpt.load(path, state, io=io)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("io", ["auto", "threads"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_takes_bounded_memory(io, dtype, tmp_path):
    """384 MiB into place, as they are or cast on the way: buffers of 96 MiB at the most, and the pool of the engine."""
    save(tmp_path, {"x": {str(index): torch.full((1 << 20,), float(index)) for index in range(96)}})
    command = [sys.executable, "-c", PEAK, str(tmp_path), io, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (192 << 20 if dtype == "bfloat16" else 64 << 20)
