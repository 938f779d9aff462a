"""What is not in memory is moved a range at a time: the same files, bounded memory, and no failure is lost."""

import errno
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rigs import in_child, limit_file_size
from toys import Sharded, value
from zs_ckpt import CheckpointCorrupt, Checkpointer, LazyPiece, TensorSpec, blob, lazy, load, read, save, staging
from zs_ckpt import saving as saving_module
from zs_ckpt.files import FileWriter
from zs_ckpt.testing import check_shardable
from zs_comm import ConfigError, RankDisagreement
from zs_comm.testing import run_ranks

F, H = torch.float32, torch.bfloat16
TENSORS = {
    "a": ((337, 35, 3), F),
    "b": ((300, 151), H),
    "c": ((), F),
    "d": ((40_001,), F),
    "e": ((0, 4), F),
    "f": ((96, 1024), torch.float64),
    "g": ((3 << 20,), F),  # 12 MiB: its holders share the writing of a copy
}
HOW = {"a": "flat", "b": "rows", "c": "copy", "d": "flat", "e": "copy", "f": "columns", "g": "copy"}
SMALL = {name: TENSORS[name] for name in "abcdef"}
MOST = 1 << 17  # bytes of a buffer in these tests: more than an extent of them has


class Values:
    """A source: the values that a file would hold, and what was asked of it."""

    def __init__(self, log, name, data):
        self.log, self.name, self.data = log, name, data

    def load(self, start, into):
        self.log.append((self.name, start, into.numel(), into.nbytes, into.data_ptr(), threading.current_thread()))
        into.copy_(self.data.view(-1)[start : start + into.numel()])

    def store(self, start, values):
        self.log.append((self.name, start, values.numel(), values.nbytes, values.data_ptr(), None))
        self.data.view(-1)[start : start + values.numel()] = values
        values.fill_(0)  # it is the caller's memory: what is kept is a copy


class Lazy(Sharded):
    """A toy some of whose tensors, those in `lazy`, are not in memory."""

    def __init__(self, rank, world, tensors, how="rows", lazy=None, source=Values, **options):
        super().__init__(rank, world, tensors, how, **options)
        self.lazy, self.source, self.log, self.begun = set(tensors if lazy is None else lazy), source, [], 0

    def _lazily(self, pieces):
        for piece in pieces:
            if piece.spec.name in self.lazy:
                source = self.source(self.log, (piece.spec.name, piece.box), piece.data)
                piece = LazyPiece(piece.spec, piece.box, source, piece.replica, piece.replicas, piece.scope)
            yield piece

    def pieces(self):
        return self._lazily(super().pieces())

    def places(self, saved, objects):
        return self._lazily(super().places(saved, objects))

    def begin(self):
        self.begun += 1


@contextmanager
def small_buffers(save_id="0123abcd"):
    """Buffers of `MOST` bytes, and names of files that are known beforehand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_LAZY_NBYTES", MOST)
        patch.setattr(lazy, "_MOST_NBYTES", MOST)
        if save_id is not None:
            patch.setattr(saving_module.secrets, "token_hex", lambda nbytes: save_id)
        yield


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def check_ranges(log, *, of=None):
    """Every piece's elements once, in ascending order, one piece after the other."""
    seen, last, reached = {}, None, 0
    for name, start, count, *_ in log:
        if name != last:
            assert name not in seen
            last, reached, seen[name] = name, start, count
        else:
            seen[name] += count
        assert start == reached and count > 0
        reached += count
    if of is not None:
        assert seen == of
    return seen


# ---- the same files ----


def save_both(group, folder, how, names, asynchronous):
    rank, world = group.rank, group.size
    with small_buffers():
        ordinary = Sharded(rank, world, TENSORS, how, own=3)
        save(f"{folder}/ordinary", {"m": ordinary, "n": {"x": torch.arange(5)}}, group=group)
        lazily = Lazy(rank, world, TENSORS, how, names, own=3)
        checkpointer = Checkpointer(f"{folder}/lazy", group=group)
        checkpointer.save({"m": lazily, "n": {"x": torch.arange(5)}}, asynchronous=asynchronous)
        assert checkpointer.host_nbytes == 0
        checkpointer.close()
    check_ranges(lazily.log)
    assert all(nbytes <= MOST for _, _, _, nbytes, _, _ in lazily.log)
    assert len({pointer for *_, pointer, _ in lazily.log}) <= 2
    assert {thread for *_, thread in lazily.log} <= {threading.main_thread()}
    return sum(nbytes for _, _, _, nbytes, _, _ in lazily.log)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_files_are_those_of_pieces_in_memory(world, asynchronous, tmp_path):
    moved = run_ranks(save_both, world, str(tmp_path), HOW, None, asynchronous)
    assert sum(moved) == sum(numel_of(TENSORS, name) * TENSORS[name][1].itemsize for name in TENSORS)  # each once
    assert files_of(tmp_path / "lazy/checkpoint") == files_of(tmp_path / "ordinary/checkpoint")


def numel_of(tensors, name):
    return torch.Size(tensors[name][0]).numel()


@pytest.mark.parametrize("names", ["a", "bg", "cdef"])
def test_some_in_memory_and_some_not(names, tmp_path):
    run_ranks(save_both, 2, str(tmp_path), {**HOW, "f": "pairs"}, list(names), False)
    assert files_of(tmp_path / "lazy/checkpoint") == files_of(tmp_path / "ordinary/checkpoint")


def test_pieces_are_loaded_in_the_order_of_the_file(tmp_path):
    """Those with the largest items first, otherwise as they were given."""
    toy = Lazy(0, 1, SMALL)
    save(tmp_path, {"m": toy})
    assert [name for (name, _), *_ in toy.log] == ["f", "a", "c", "d", "b"]


# ---- loads ----


def save_some(group, folder, tensors, how, names):
    with small_buffers(None):
        save(folder, {"m": Lazy(group.rank, group.size, tensors, how, names)}, group=group)


def load_some(group, folder, tensors, how, names, stored=None):
    toy = Lazy(group.rank, group.size, tensors, how, names)
    with small_buffers(None):
        loaded = load(folder, {"m": toy}, group=group)
    needed = toy.check(stored=stored)
    assert toy.finished == {"steps": 3} and toy.begun == 1
    places = {key: data.numel() for key, data in toy.filled.items() if key[0] in toy.lazy and data.numel()}
    check_ranges(toy.log, of=places)
    assert [name for name, start, *_ in toy.log if not start] == list(places)  # in the order of the places
    assert all(nbytes <= MOST for _, _, _, nbytes, _, _ in toy.log)
    assert len({pointer for *_, pointer, _ in toy.log}) <= 1
    return needed, loaded.nbytes_read


@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("sides", ["save", "load", "both"])
def test_every_world_to_every_other(saved, loaded, sides, tmp_path):
    run_ranks(save_some, saved, str(tmp_path), SMALL, HOW, None if sides != "load" else [])
    hows = [HOW, {**HOW, "a": "rows", "b": "columns", "d": "copy", "f": "flat"}]
    for how in hows:
        run_ranks(load_some, loaded, str(tmp_path), SMALL, how, None if sides != "save" else [])


def test_some_places_are_in_memory(tmp_path):
    run_ranks(save_some, 2, str(tmp_path), SMALL, HOW, ["a", "f"])
    run_ranks(load_some, 3, str(tmp_path), SMALL, "flat", ["b", "d", "f"])


def test_values_are_cast_to_the_dtype_of_the_place(tmp_path):
    run_ranks(save_some, 2, str(tmp_path), {"x": ((300, 65), F), "y": ((30_000,), H)}, "flat", None)
    stored = {"x": F, "y": H}
    run_ranks(load_some, 3, str(tmp_path), {"x": ((300, 65), H), "y": ((30_000,), F)}, "rows", None, stored)


def test_what_is_loaded_into_the_same_lay_out_is_read_once(tmp_path):
    run_ranks(save_some, 2, str(tmp_path), TENSORS, HOW, None)
    for needed, got in run_ranks(load_some, 2, str(tmp_path), TENSORS, HOW | {"g": "rows"}, None):
        assert needed == got


# ---- beside the training ----


def test_what_is_not_in_memory_is_written_before_save_returns(tmp_path):
    tensor, toy = {"d": TENSORS["d"]}, None

    class Changing(Lazy):
        def pieces(self):
            spec, box = TensorSpec("d", *tensor["d"]), ((0, 40_001),)
            yield LazyPiece(spec, box, Values(self.log, "d", data))

    data, toy = value("d0", *tensor["d"]), Changing(0, 1, tensor)
    began = data.clone()
    checkpointer = Checkpointer(tmp_path)
    pending = checkpointer.save({"m": toy}, asynchronous=True)
    asked = len(toy.log)
    data.fill_(7)
    pending.wait()
    assert len(toy.log) == asked >= 1 and checkpointer.host_nbytes == 0
    assert torch.equal(read(tmp_path)["m/d"], began)


def one_rank_lazily(group, folder):
    toy = Lazy(group.rank, group.size, SMALL, HOW, None if group.rank else [])
    checkpointer = Checkpointer(folder, group=group)
    for turn in range(2):
        toy.log.clear()
        checkpointer.save({"m": toy}, tag=f"t{turn}", asynchronous=True)
        asked = len(toy.log)
    checkpointer.wait()
    assert len(toy.log) == asked and bool(asked) == bool(group.rank)
    assert bool(checkpointer.host_nbytes) == (not group.rank)
    back = Sharded(group.rank, group.size, SMALL, "rows")
    load(folder, {"m": back}, group=group)
    back.check()


def test_ranks_with_and_without_in_the_background(tmp_path):
    run_ranks(one_rank_lazily, 2, str(tmp_path))


# ---- what goes wrong ----


class Failing(Values):
    """Fails in its second range, as a disk would."""

    def load(self, start, into):
        super().load(start, into)
        if start:
            raise OSError(errno.EIO, "the disk is gone", "/nvme/tier")

    def store(self, start, values):
        super().store(start, values)
        if start:
            raise OSError(errno.EIO, "the disk is gone", "/nvme/tier")


def failing_save(group, folder, asynchronous):
    old, kind = Sharded(group.rank, group.size, SMALL, HOW), Failing if group.rank == 1 else Values
    new = Lazy(group.rank, group.size, SMALL, HOW, source=kind, seed=1)
    checkpointer = Checkpointer(folder, group=group)
    checkpointer.save({"m": old})
    before = threading.active_count()
    with small_buffers(None), pytest.raises((OSError, RankDisagreement)) as failed:
        checkpointer.save({"m": new}, asynchronous=asynchronous)
        checkpointer.wait()
    assert threading.active_count() == before
    if group.rank == 1:
        assert failed.type is OSError and "the disk is gone" in str(failed.value)
        assert failed.value.filename == "/nvme/tier"  # and not the checkpoint's file
        assert sum(1 for _, start, *_ in new.log if start) == 1  # it was not asked any more
    else:
        assert failed.type is RankDisagreement and "/nvme/tier" in str(failed.value)
    back = Sharded(group.rank, group.size, SMALL, HOW)
    load(folder, {"m": back}, group=group)
    back.check(seed=0)
    checkpointer.save({"m": Lazy(group.rank, group.size, SMALL, HOW, seed=1)})
    load(folder, {"m": back}, group=group)
    back.check(seed=1)
    return sorted(os.listdir(f"{folder}/checkpoint"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_source_that_fails_aborts_the_save_on_all_ranks(asynchronous, tmp_path):
    run_ranks(failing_save, 2, str(tmp_path), asynchronous)
    assert len(os.listdir(tmp_path / "checkpoint")) == 3  # two files and the manifest: nothing is left behind


def failing_load(group, folder):
    save(folder, {"m": Sharded(group.rank, group.size, SMALL, HOW)}, group=group)
    toy = Lazy(group.rank, group.size, SMALL, HOW, source=Failing if group.rank == 1 else Values)
    with small_buffers(None), pytest.raises((OSError, RankDisagreement)) as failed:
        load(folder, {"m": toy}, group=group)
    assert toy.begun == 1 and toy.finished is None
    assert "/nvme/tier" in str(failed.value) and failed.type is (OSError if group.rank == 1 else RankDisagreement)
    toy.source = Values
    toy.log.clear()
    load(folder, {"m": toy}, group=group)
    toy.check()


def test_a_source_that_fails_aborts_the_load_on_all_ranks(tmp_path):
    run_ranks(failing_load, 2, str(tmp_path))


def test_a_range_that_is_damaged_is_not_stored(tmp_path):
    tensors = {"d": TENSORS["d"], "z": ((10,), F)}
    save(tmp_path, {"m": Sharded(0, 1, tensors)})
    file = next((tmp_path / "checkpoint").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-10_000] ^= 1
    file.write_bytes(raw)
    toy = Lazy(0, 1, tensors)
    with small_buffers(None), pytest.raises(CheckpointCorrupt, match="m/d"):
        load(tmp_path, {"m": toy})
    assert toy.finished is None
    assert check_ranges(toy.log) == {("d", ((0, 40_001),)): MOST // 4}  # the first range; the second is damaged


@pytest.mark.parametrize("nbytes", [100_000, 1 << 20, 40 << 20])
def test_a_disk_that_is_full(nbytes, tmp_path):
    """The writer ends before all is handed over, and says why."""

    def work(folder):
        tensors = {"x": ((12 << 20,), F)}  # 48 MiB: past the page cache
        save(folder, {"m": Sharded(0, 1, {"y": ((10,), F)})})
        limit_file_size(nbytes)
        toy, before = Lazy(0, 1, tensors), threading.active_count()
        with pytest.raises(OSError) as failed:
            save(folder, {"m": toy})
        assert failed.value.errno == errno.EFBIG and threading.active_count() == before
        return list(read(folder)), len(os.listdir(f"{folder}/checkpoint"))

    assert in_child(work, str(tmp_path)) == (["m/y"], 2)


def test_an_interrupt_ends_the_writer(tmp_path):
    class Interrupted(Values):
        def load(self, start, into):
            raise KeyboardInterrupt

    for asynchronous in (False, True):
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, {"m": Lazy(0, 1, SMALL, source=Interrupted)}, asynchronous=asynchronous)
        assert threading.active_count() == before
    save(tmp_path, {"m": Lazy(0, 1, SMALL)})  # the tag is free again
    load(tmp_path, {"m": Sharded(0, 1, SMALL)})


def test_what_a_piece_cannot_be(tmp_path):
    class Odd(Lazy):
        def pieces(self):
            yield LazyPiece(TensorSpec("d", (5,), F), ((0, 5),), object())

        def places(self, saved, objects):
            yield LazyPiece(TensorSpec("d", (5,), F), *self.place)

    with pytest.raises(ConfigError, match=r"'d': its source, a object, has no load\(\)"):
        save(tmp_path, {"m": Odd(0, 1, {})})
    save(tmp_path, {"m": Sharded(0, 1, {"d": ((5,), F)})})
    odd = Odd(0, 1, {})
    odd.place = (((0, 5),), object())
    with pytest.raises(ConfigError, match=r"its source, a object, has no store\(\)"):
        load(tmp_path, {"m": odd})
    odd.place = (((0, 6),), Values([], "d", torch.zeros(6)))
    with pytest.raises(ConfigError, match=r"the box .* is not inside"):
        load(tmp_path, {"m": odd})
    assert not odd.begun


# ---- how it gets to the file ----


def test_a_writer_that_wants_everything_at_once(tmp_path, monkeypatch):
    """Is left for one that takes a buffer after the other; for what is in memory it stays."""
    made = []

    class AtOnce(FileWriter):
        streams = False

        def write(self, path, buffers):
            made.append(path)
            return super().write(path, list(buffers))

    class Factory:
        writer, reader = AtOnce, staticmethod(blob.open_reader)

    monkeypatch.setattr(blob, "_factory", lambda io: Factory if io == "aio" else None)
    save(tmp_path, {"m": Lazy(0, 1, SMALL)}, tag="lazy", io="aio")
    assert not made
    save(tmp_path, {"m": Sharded(0, 1, SMALL)}, tag="ordinary", io="aio")
    assert len(made) == 1
    one, two = read(tmp_path, tag="lazy"), read(tmp_path, tag="ordinary")
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("nbytes", [32 << 20, (32 << 20) + 1, (40 << 20) + 4095, (33 << 20) + 4096])
@pytest.mark.parametrize("refused", [False, True])
def test_streams_past_the_page_cache(nbytes, refused, tmp_path, monkeypatch):
    view = staging.bytes_of(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
    writer, true = FileWriter(past_cache=True), os.pwrite
    direct = []

    def pwrite(fd, view, offset):
        if is_direct(fd):
            direct.append((len(view), offset))
            if refused:
                raise OSError(errno.EINVAL, "blocks of another size")
        return true(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    cuts = [0, 100, 70_000, 9 << 20, nbytes]
    writer.write(str(tmp_path / "f"), (view[a:b] for a, b in pairwise(cuts)), nbytes=nbytes).wait()
    writer.sync(str(tmp_path / "f"))
    writer.close()
    assert (tmp_path / "f").read_bytes() == bytes(view)
    assert all(size % 4096 == 0 and offset % 4096 == 0 for size, offset in direct)
    assert not direct or refused or sum(size for size, _ in direct) == nbytes // 4096 * 4096


def is_direct(fd):
    with open(f"/proc/self/fdinfo/{fd}") as info:
        flags = next(line for line in info if line.startswith("flags"))
    return bool(int(flags.split()[1], 8) & getattr(os, "O_DIRECT", 0))


def test_a_state_within_a_dictionary_and_the_conformance_check(tmp_path):
    save(tmp_path, {"all": {"actor": Lazy(0, 1, SMALL), "rate": 0.5}})
    back = Lazy(0, 1, SMALL)
    load(tmp_path, {"all": {"actor": back, "rate": 0.0}})
    back.check()
    seeds = iter(range(2))

    class Kept(Lazy):
        """Gives what it holds, as the check looks at it after a load."""

        def __init__(self):
            super().__init__(0, 1, SMALL, seed=next(seeds))
            self.held = {piece.spec.name: piece for piece in super().pieces()}

        def pieces(self):
            return iter(self.held.values())

        def places(self, saved, objects):
            return iter(self.held.values())

    check_shardable(Kept)


PROGRAM = """
import sys, torch
from zs_ckpt import LazyPiece, TensorSpec, load, save
N = 192 << 20  # bytes
class File:
    def load(self, start, into): torch.arange(start, start + into.numel(), out=into)
    def store(self, start, values):
        for part in values.split(1 << 16):
            assert part.equal(torch.arange(start, start + part.numel(), dtype=torch.int32))
            start += part.numel()
        self.stored = start
class State:
    PROTOCOL = 1
    def __init__(self): self.file = File()
    def pieces(self): yield LazyPiece(TensorSpec("x", (N // 4,), torch.int32), ((0, N // 4),), self.file)
    def places(self, saved, objects): return self.pieces()
    def objects(self): return {}
    def finish(self, objects): assert self.file.stored == N // 4
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
small = {"x": torch.zeros(3)}
save(sys.argv[1], small, tag="warm", asynchronous=True).wait()
load(sys.argv[1], small)
before = peak()
pending = save(sys.argv[1], {"m": State()}, asynchronous=sys.argv[2] == "True")
if sys.argv[2] == "True": pending.wait()
saved = peak()
load(sys.argv[1], {"m": State()})
print(saved - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_memory(asynchronous, tmp_path):
    """192 MiB, with two buffers of 4 MiB and one of 8 to save, one of 16 MiB to load."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(asynchronous)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    saved, loaded = map(int, done.stdout.split())
    assert saved < 40 << 20 and loaded < 48 << 20, (saved, loaded)
