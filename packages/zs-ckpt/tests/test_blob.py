"""The two ways of reaching files, and the choice between them."""

import errno
import importlib.metadata
import logging
import os
import types
from itertools import pairwise
from pathlib import Path

import pytest
from zs_ckpt import blob, direct
from zs_ckpt.files import FileReader, FileWriter
from zs_ckpt.testing import check_blob_io
from zs_comm import ConfigError, MissingPackage


def test_threads_keep_the_protocols():
    check_blob_io(FileWriter, FileReader)


def test_the_file_engine_keeps_the_protocols():
    from zs_offload_aio import blobs

    check_blob_io(blobs.AioWriter, blobs.AioReader)


class Forgetful(FileReader):
    def read(self, path, offset, buf):
        ticket = super().read(path, offset, buf)
        if len(buf) > 5000:
            buf[4999] ^= 1
        return ticket


def test_the_check_finds_what_is_wrong():
    with pytest.raises(AssertionError):
        check_blob_io(FileWriter, Forgetful)
    writer = type("Other", (FileWriter,), {"PROTOCOL": 2})
    with pytest.raises(AssertionError, match="PROTOCOL"):
        check_blob_io(writer, FileReader)


def provide(monkeypatch, made):
    point = types.SimpleNamespace(name="aio", load=made)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == blob.GROUP else [])


def test_auto_takes_what_is_installed(monkeypatch):
    class Fast(FileWriter):
        pass

    provide(monkeypatch, lambda: types.SimpleNamespace(writer=Fast, reader=FileReader))
    assert type(blob.open_writer("auto")) is Fast and type(blob.open_writer("aio")) is Fast
    assert type(blob.open_writer("threads")) is FileWriter
    assert type(blob.open_reader("aio")) is FileReader


def test_a_mode_that_was_asked_for_becomes_no_other(monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    with pytest.raises(MissingPackage, match="zs-offload-aio"):
        blob.open_writer("aio")
    with pytest.raises(ConfigError, match="auto, aio, threads"):
        blob.open_reader("disk")
    assert type(blob.open_writer("auto")) is FileWriter

    def fails():
        raise ImportError("no library")

    provide(monkeypatch, fails)
    with pytest.raises(ImportError):
        blob.open_writer("aio")
    with caplog.at_level(logging.WARNING, "zs_ckpt"):
        assert type(blob.open_writer("auto")) is FileWriter
    assert "no library" in caplog.text
    provide(monkeypatch, lambda: types.SimpleNamespace(writer=type("Old", (FileWriter,), {"PROTOCOL": 0})))
    with pytest.raises(ConfigError, match="version 0"):
        blob.open_writer("auto")


def test_an_error_of_a_sync_stays(tmp_path, monkeypatch):
    """The kernel reports a loss once and then forgets it; the writer does not."""
    writer, path, calls = FileWriter(), str(tmp_path / "file"), []

    def fails(fd):
        calls.append(fd)
        raise OSError(5, "lost")

    writer.write(path, [b"abc"]).wait()
    monkeypatch.setattr(os, "fdatasync", fails)
    for _ in range(2):
        with pytest.raises(OSError, match="lost"):
            writer.sync(path)
    assert len(calls) == 1
    monkeypatch.undo()
    writer.write(path, [b"abcd"]).wait()
    writer.sync(path)
    writer.close()


def pieces_of(raw, cuts):
    edges = [0, *cuts, len(raw)]
    whole = memoryview(bytearray(raw))
    views = [whole[start:stop] for start, stop in pairwise(edges)]
    return [bytes(views[0]), *views[1:]]  # one that is read-only


@pytest.mark.parametrize("nbytes", [1 << 16, (1 << 16) + 1, 300_001, 4095 + (1 << 17)])
@pytest.mark.parametrize("cuts", [[], [64, 64, 70_000 % 65_000], [1, 2, 3, 4097, 8192, 60_000]])
def test_large_files_past_the_page_cache(nbytes, cuts, tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "LEAST", 1 << 16)
    monkeypatch.setattr(direct, "CHUNK", 1 << 15)
    writer, raw = FileWriter(), os.urandom(nbytes)
    for path in (str(tmp_path / "file"), str(tmp_path / "other")):
        writer.write(path, pieces_of(raw, cuts)).wait()
        writer.sync(path)
        assert Path(path).read_bytes() == raw
        monkeypatch.setattr(direct, "open_direct", lambda path: None)
    writer.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_large_files_where_direct_writes_fail(number, tmp_path, monkeypatch):
    """Blocks that the disk does not want are written as usual; a full disk is a full disk, and leaves an empty file."""
    monkeypatch.setattr(direct, "LEAST", 1 << 16)
    monkeypatch.setattr(direct, "CHUNK", 1 << 15)
    calls = []

    def fails(fd, view, offset):
        calls.append(offset)
        raise OSError(number, "no")

    monkeypatch.setattr(os, "pwrite", fails)
    writer, raw, path = FileWriter(), os.urandom(200_000), tmp_path / "file"
    ticket = writer.write(str(path), [raw])
    if number == errno.EINVAL:
        ticket.wait()
        assert path.read_bytes() == raw
    else:
        with pytest.raises(OSError, match="no"):
            ticket.wait()
        with pytest.raises(OSError, match="no"):
            writer.sync(str(path))
        assert path.stat().st_size == 0
    assert calls
    writer.close()


def test_short_writes_are_completed(tmp_path, monkeypatch):
    true = os.pwritev

    def some(fd, buffers, offset):
        return true(fd, [memoryview(buffers[0])[:1000]], offset)

    monkeypatch.setattr(os, "pwritev", some)
    writer, raw = FileWriter(), os.urandom(5000)
    writer.write(str(tmp_path / "file"), [raw[:1], raw[1:2500], raw[2500:]]).wait()
    writer.close()
    assert (tmp_path / "file").read_bytes() == raw
