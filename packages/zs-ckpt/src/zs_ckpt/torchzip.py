"""torch's zip format, as `torch.save` writes it: uncompressed entries `<top>/data.pkl` and `<top>/data/<key>`.

Memory-mapped, and each entry is checked against the archive's CRC-32 when it is taken.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PICKLE_LIMIT = 256 << 20  # bytes of a file's `data.pkl`, which holds no tensor's values


@dataclass(frozen=True)
class Storage:
    flat: Tensor  # (numel,), of the storage's dtype


class Archive:
    """One file. Raises ValueError, KeyError or zipfile.BadZipFile where it is not what `torch.save` writes."""

    def __init__(self, path: Path, region: tuple[int, int] | None = None) -> None:
        with path.open("rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            start, self.size = region or (0, nbytes)
            if start < 0 or self.size < 0 or start + self.size > nbytes:
                raise ValueError(f"bytes {start} to {start + self.size} of a file of {nbytes}")
            # private: a caller who writes to a tensor changes his copy of the page, never the file
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.map = memoryview(mapped)[start : start + self.size]
        with zipfile.ZipFile(_Reader(self.map)) as archive:
            entries = archive.infolist()
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise ValueError("an entry is there twice")
        tops = [name.removesuffix("/data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(tops) != 1:
            raise ValueError(f"{len(tops)} entries data.pkl")
        self.top = tops[0]
        order = self.entries.get(f"{self.top}/byteorder")
        if order is not None and bytes(self.bytes_of(order.filename)) != b"little":
            raise ValueError("written on a big-endian machine")

    def bytes_of(self, name: str) -> memoryview:
        """The entry's bytes, checked against its CRC-32."""
        entry = self.entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted")
        head = bytes(self.map[entry.header_offset : entry.header_offset + 30])
        if head[:4] != b"PK\x03\x04" or len(head) < 30:
            raise ValueError(f"{name}: no entry at byte {entry.header_offset}")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        if start + entry.file_size > self.size:
            raise ValueError(f"{name} ends at byte {start + entry.file_size} of {self.size}")
        found = self.map[start : start + entry.file_size]
        if zlib.crc32(found) != entry.CRC:
            raise ValueError(f"{name}: CRC-32 {zlib.crc32(found):08x}, the archive says {entry.CRC:08x}")
        return found

    def pickle(self) -> bytes:
        found = self.bytes_of(f"{self.top}/data.pkl")
        if len(found) > PICKLE_LIMIT:
            raise ValueError(f"data.pkl has {len(found)} bytes")
        return bytes(found)

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Storage:
        found = self.bytes_of(f"{self.top}/data/{key}")
        if len(found) != numel * dtype.itemsize:
            raise ValueError(f"storage {key}: {len(found)} bytes for {numel} elements of {dtype}")
        if not numel:
            return Storage(torch.empty(0, dtype=dtype))
        return Storage(torch.frombuffer(found, dtype=dtype))


class _Reader(io.RawIOBase):
    """Mapped bytes as a file, for `zipfile`, which reads the directory at its end."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = len(self._view) if size < 0 else min(self._at + size, len(self._view))
        found = bytes(self._view[self._at : stop])
        self._at = max(self._at, stop)
        return found
