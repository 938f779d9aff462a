"""An open checkpoint: its manifest, its files, and reading from them."""

from __future__ import annotations

import errno
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zs_comm.views import bytes_of

from .blob import BlobReader, Ticket, open_reader, wait_for
from .boxes import Box, shape_of, whole
from .collector import paused
from .errors import CheckpointCorrupt, CheckpointIncomplete
from .extents import Read, Target, reads_of
from .files import FileReader, read_into
from .hostcopy import wait_for_devices
from .jsonvalues import decode
from .latest import newest
from .manifest import Manifest, StoredTensor, parse_manifest
from .names import MANIFEST, check_tag, open_file
from .sealed import read_sealed
from .threads import in_threads, processors

_THREADS = min(max(processors(), 2), 4)
_THREADS_THAT_WAIT = 8  # where a read is done by the thread that asks for it
_AHEAD_NBYTES, _MOST_AHEAD = (64 << 20) // _THREADS, 16  # of one thread: under way while it waits for another
_NOTHING = torch.empty(0, dtype=torch.uint8)
_INLINE_NBYTES = 1 << 20  # below it threads cost more than they give
_MOST_OPEN = 256  # files that are kept open; further ones are opened for each read


class Snapshot:
    """A committed checkpoint, as it was when it was opened.

    `tag`: None takes the newest. `nbytes_read` counts the bytes of tensors that were read from files. Reading takes
    memory for what is asked for, and up to 96 MiB where that does not go straight to its place (and the reader's own).

    Raises:
        CheckpointIncomplete: there is no such checkpoint, or nothing committed in the folder.
        CheckpointCorrupt: the manifest is damaged, or is none.
    """

    def __init__(self, path: str | os.PathLike[str], tag: str | None = None, *, io: str = "auto") -> None:
        self.root = Path(path)
        self.tag = newest(self.root) if tag is None else check_tag(tag)
        self.folder = self.root / self.tag
        if self.folder.is_symlink():
            raise CheckpointCorrupt("this is a link, and no checkpoint is one", self.folder)
        members, raw = read_manifest(self.folder)
        self.digest = f"{self.tag} {len(raw)} {zlib.crc32(raw):08x}"
        self.manifest: Manifest = parse_manifest(members, self.folder / MANIFEST)
        if self.manifest.tag != self.tag:
            raise CheckpointCorrupt(f"it is of the tag {self.manifest.tag!r}", self.folder / MANIFEST)
        self.nbytes_read = 0
        self._lock = threading.Lock()
        self._checked: set[str] = set()
        self._fds: dict[str, int] = {}
        reader = open_reader(io)
        self._reader: BlobReader | None = None if isinstance(reader, FileReader) else reader

    @property
    def objects(self) -> dict[str, Any]:
        """What was saved by key and is no tensor."""
        return {key: decode(value) for key, value in self.manifest.objects.items()}

    @property
    def client_state(self) -> Any:
        return decode(self.manifest.client_state)

    def stored(self, name: str, rank: int | None = None) -> StoredTensor:
        """A tensor's entry; `rank`: that rank's own."""
        group = self.manifest.tensors if rank is None else self.manifest.rank_tensors[rank]
        if name not in group:
            raise CheckpointIncomplete(f"the checkpoint {self.tag} has no such tensor", self.folder, name)
        return group[name]

    def read(self, name: str, box: Box | None = None, *, rank: int | None = None) -> Tensor:
        """A tensor, or a box of it, on the CPU in the dtype that was saved."""
        stored = self.stored(name, rank)
        box = whole(stored.spec.shape) if box is None else box
        self.open(piece.file for piece in stored.pieces)  # sizes are checked before memory is taken on their word
        data = torch.empty(shape_of(box), dtype=stored.spec.dtype)
        self.fill([Target(stored, box, data, rank)])
        return data

    def open(self, files: Iterable[str]) -> None:
        """Open these data files and check their sizes and headers; from then on they cannot vanish.

        Raises:
            CheckpointIncomplete: one is missing.
            CheckpointCorrupt: one has another size or header than the manifest says, or is no file.
        """
        for name in dict.fromkeys(files):
            with self._lock:
                if name in self._checked:
                    continue
                fd = self._check(name)
                self._checked.add(name)
                if len(self._fds) < _MOST_OPEN:
                    self._fds[name] = fd
                else:
                    os.close(fd)

    def fill(self, targets: Sequence[Target]) -> None:
        """Read every target's box into its data, verified.

        Raises:
            CheckpointCorrupt: a checksum does not match; targets may be partly filled then.
            CheckpointIncomplete: a file is missing.
            OSError: a file cannot be read; it is named.
        """
        self.open(piece.file for target in targets for piece in target.stored.pieces)
        with paused():
            reads = [read for target in targets for read in reads_of(target)]
        wait_for_devices(target.data for target in targets)
        self.run(reads)

    def run(self, reads: Sequence[Read]) -> None:
        """Carry out reads of open files: what they are for is in its place, verified. Raises as `fill`."""
        self.each(reads, self._place)
        self.nbytes_read += sum(read.nbytes for read in reads)

    def each(self, reads: Sequence[Read], then: Callable[[Read, memoryview, Tensor], None]) -> None:
        """Read each of these and call `then(read, bytes, buffer)`, in several threads where it is worth it."""
        nbytes = max((read.nbytes for read in reads if read.into is None), default=0)
        stop = threading.Event()
        if sum(read.nbytes for read in reads) <= _INLINE_NBYTES or len(reads) < 2:
            _Reading(self, iter(reads), then, nbytes, stop).run()
            return
        source = _Shared(iter(reads))
        threads = _THREADS if self._reader is not None else _THREADS_THAT_WAIT
        in_threads(lambda: _Reading(self, source, then, nbytes, stop).run(), min(threads, len(reads)), "zs-ckpt read")

    def _place(self, read: Read, view: memoryview, buffer: Tensor) -> None:
        read.verify(view, self.folder / read.piece.file)
        if read.into is None:
            read.place(buffer)

    def _start(self, read: Read, view: memoryview) -> Callable[[], None]:
        """Start to fill `view` with a read's bytes; what waits for that, and raises what went wrong."""
        name = read.piece.file
        path = self.folder / name
        offset = self.manifest.files[name].data_offset + read.piece.offset + read.offset
        kept = self._fds.get(name)
        fd = open_file(path) if kept is None else kept

        def close() -> None:
            if kept is None:
                os.close(fd)

        def failed(error: OSError) -> Exception:
            if os.fstat(fd).st_size < offset + view.nbytes or error.errno == errno.ENODATA:
                message = f"it ends before byte {offset + view.nbytes}: {error}"
                return CheckpointCorrupt(message, path, read.target.spec.name)
            error.filename = str(path)
            return error

        try:
            if self._reader is None:
                read_into(fd, offset, view)
                ticket: Ticket | None = None
            else:
                ticket = self._reader.read(_path_of(fd, path), offset, view)
        except OSError as error:
            try:
                raise failed(error) from error
            finally:
                close()
        except BaseException:
            close()
            raise

        def wait() -> None:
            try:
                if ticket is not None:
                    wait_for(ticket)
            except OSError as error:
                raise failed(error) from error
            finally:
                close()

        return wait

    def _check(self, name: str) -> int:
        path, entry = self.folder / name, self.manifest.files[name]
        fd = open_file(path)
        try:
            nbytes = os.fstat(fd).st_size
            if nbytes != entry.nbytes:
                raise CheckpointCorrupt(f"it has {nbytes:,} bytes, and {entry.nbytes:,} were written", path)
            found, done = 0, 0
            while done < entry.data_offset:
                part = os.pread(fd, min(entry.data_offset - done, 1 << 20), done)
                if not part:
                    raise CheckpointCorrupt(f"it ends at byte {done}, in its header", path)
                found, done = zlib.crc32(part, found), done + len(part)
            if found != entry.header_crc:
                raise CheckpointCorrupt(
                    f"the header's checksum is {found:08x}, and {entry.header_crc:08x} was written", path
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Close the files. May be called again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])
            self._checked.clear()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Reading:
    """One thread's reads: several are under way while the oldest is waited for and handed on."""

    def __init__(
        self,
        snapshot: Snapshot,
        reads: Iterator[Read],
        then: Callable[[Read, memoryview, Tensor], None],
        buffer_nbytes: int,
        stop: threading.Event,
    ) -> None:
        self._snapshot, self._reads, self._then, self._stop = snapshot, reads, then, stop
        self._buffer_nbytes = buffer_nbytes
        self._most_ahead = 0 if snapshot._reader is None else _AHEAD_NBYTES
        self._spare: list[Tensor] = []
        self._started: deque[tuple[Read, memoryview, Tensor, Callable[[], None]]] = deque()
        self._ahead = 0  # bytes

    def run(self) -> None:
        try:
            for read in self._reads:
                if self._stop.is_set():
                    return
                self._start(read)
                while self._ahead > self._most_ahead or len(self._started) > _MOST_AHEAD:
                    self._finish()
            while self._started:
                self._finish()
        except BaseException:
            self._stop.set()
            raise
        finally:
            for *_, wait in self._started:  # they write to memory that is the caller's again
                with suppress(Exception):
                    wait()

    def _start(self, read: Read) -> None:
        if read.into is None:
            buffer = self._spare.pop() if self._spare else torch.empty(self._buffer_nbytes, dtype=torch.uint8)
            view = bytes_of(buffer)[: read.nbytes]
        else:
            buffer, view = _NOTHING, read.into
        self._started.append((read, view, buffer, self._snapshot._start(read, view)))
        self._ahead += read.nbytes

    def _finish(self) -> None:
        read, view, buffer, wait = self._started.popleft()
        self._ahead -= read.nbytes
        wait()
        self._then(read, view, buffer)
        if read.into is None:
            self._spare.append(buffer)


class _Shared:
    """An iterator that several threads take from."""

    def __init__(self, source: Iterator[Read]) -> None:
        self._source, self._lock = source, threading.Lock()

    def __iter__(self) -> Iterator[Read]:
        return self

    def __next__(self) -> Read:
        with self._lock:
            return next(self._source)


def read_manifest(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The members of a tag's manifest and its bytes; CheckpointIncomplete where there is none."""
    try:
        return read_sealed(folder / MANIFEST)
    except CheckpointIncomplete as error:
        raise CheckpointIncomplete("no checkpoint has been committed here: there is no manifest", folder) from error


def _path_of(fd: int, path: Path) -> str:
    """A path to the file that is open, even where its name has gone."""
    opened = f"/proc/self/fd/{fd}"
    return opened if os.path.exists(opened) else str(path)
