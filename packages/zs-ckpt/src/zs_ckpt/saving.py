"""Saving: from a state to parts, from parts to a durable file, and the commit."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from zs_comm import ConfigError, Group, as_group

from .blob import BlobWriter, check_mode
from .collector import paused
from .commit import Commit
from .durable import make_folder, put_in_place, remove, sync_folder
from .errors import CheckpointIncomplete
from .gathering import Content, gather
from .index import Index, merge
from .latest import serials
from .lock import TagLock
from .manifest import StoredTensor
from .names import DEFAULT_TAG, check_case, check_tag, temporary
from .ranks import meet
from .retention import clean, collect, collect_leftovers, prune
from .shardfile import Layout, lay_out, stored_piece
from .staging import Progress, open_writer_for, write_parts

if TYPE_CHECKING:
    from zs_comm.group import GroupLike

    from .background import Pending


_log = logging.getLogger("zs_ckpt")


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint. `nbytes`: what this rank wrote."""

    path: Path
    tag: str
    save_id: str
    nbytes: int


@dataclass
class Started:
    """A save that all ranks have agreed on; `lock` and `serial` are rank 0's."""

    commit: Commit
    content: Content
    lock: TagLock | None
    serial: int
    latest: bool = True
    progress: Progress | None = None
    rest: Callable[[float], None] | None = None  # called between pieces of work with the seconds that one took


@overload
def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    tag: str | None = ...,
    group: GroupLike = ...,
    client_state: Any = ...,
    step: int | None = ...,
    asynchronous: Literal[False] = ...,
    io: str = ...,
    keep: int | None = ...,
    progress: Progress | None = ...,
) -> Saved: ...


@overload
def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    tag: str | None = ...,
    group: GroupLike = ...,
    client_state: Any = ...,
    step: int | None = ...,
    asynchronous: bool,
    io: str = ...,
    keep: int | None = ...,
    progress: Progress | None = ...,
) -> Saved | Pending: ...


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    tag: str | None = None,
    group: GroupLike = None,
    client_state: Any = None,
    step: int | None = None,
    asynchronous: bool = False,
    io: str = "auto",
    keep: int | None = None,
    progress: Progress | None = None,
) -> Saved | Pending:
    """Save `state` in the folder `path` under `tag`; every rank of the group calls it.

    When it returns the checkpoint is committed and on the disk: whatever happens from then on, a load finds it whole.
    Until then a load finds what was there before.

    Args:
        path: the folder of the tags, which all ranks see.
        state: what to save, by key: modules, optimizers, anything with `state_dict()` or `__zs_shardable__()`; tensors,
            and dictionaries and lists of tensors and of JSON values, which are the same on all ranks.
        tag: the checkpoint's name in the folder ("checkpoint").
        group: the ranks that save together: all of torch.distributed's, or one, where None.
        client_state: anything that JSON can hold, and tuples, bytes, inf and the like; rank 0's is saved.
        step: shown by the tools.
        asynchronous: return a `Pending` when the state is copied to host memory, and write it in the background. A rank
            with values that are not in memory (`LazyPiece`) writes its file before this returns, and copies nothing.
        io: "auto", "aio" (zs-offload-aio, or an error) or "threads". What is not in memory is written by threads.
        keep: how many checkpoints of the folder to keep, this one included; older ones are removed (None: all).
        progress: called with the bytes that have been read and summed so far, and all that this rank writes.

    Raises:
        ConfigError: a tag, a key or a value that cannot be saved.
        CheckpointBusy: another process is saving to this tag.
        RankDisagreement: another rank failed, or came with other arguments.
        CommTimeout, PeerLost: a rank did not make this call.
        OSError: the disk is full, the folder read-only, a write lost; what was committed before is as it was.
    """
    from .checkpointer import Checkpointer

    checkpointer = Checkpointer(path, group=group, io=io, keep=keep)
    options: dict[str, Any] = {"tag": tag, "client_state": client_state, "step": step, "progress": progress}
    return checkpointer.save(state, asynchronous=asynchronous, **options)


def begin(
    root: Path,
    state: Mapping[str, Any],
    group: Group,
    *,
    tag: str | None,
    client_state: Any,
    step: int | None,
    asynchronous: bool,
    latest: bool,
    stall_s: float,
    progress: Progress | None = None,
    error: BaseException | None = None,
) -> Started:
    """Everything up to the first byte: the parts, the tag's lock, and the agreement of all ranks.

    `error`: what went wrong on this rank before; it is raised on all of them.
    """
    tag = DEFAULT_TAG if tag is None else tag
    save_id, lock, serial, content = secrets.token_hex(4), None, 0, Content()
    if error is None:
        try:
            check_tag(tag)
            with paused():
                content = gather(state, group, client_state=client_state, step=step)
            if group.rank == 0:
                make_folder(root)
                check_case(root, tag)
                if (root / tag).is_symlink():
                    raise ConfigError(f"{root / tag} is a link: save where it leads to")
                make_folder(root / tag)
                lock = TagLock(root / tag, patience_s=2.0)
                clean(root / tag)
                if lock.exclusive:
                    collect_leftovers(root)
                lock.say(save_id)  # by now there is the space that a crashed save had taken
                serial = 1 + max(serials(root).values(), default=0)
        except Exception as failed:
            error = failed
    what = ""
    if error is None:
        kind = "in the background" if asynchronous else "at once"
        what = f"tag {tag!r}, keys {sorted(map(str, state))}, {kind}, latest {latest}, path {os.path.abspath(root)}"
    try:
        words = meet(group, "save", mine=save_id, error=error, what=what)
    except BaseException:
        if lock is not None:
            lock.release()
            _remove_empty(root / tag)
        raise
    commit = Commit(root, tag, words[0], group.rank, group.size, stall_s=stall_s)
    return Started(commit, content, lock, serial, latest, progress)


def write(started: Started, writer: BlobWriter) -> Index:
    """This rank's data, durably in place, and what is known of it."""
    commit, content = started.commit, started.content
    index = Index(commit.save_id, commit.rank, own_objects=content.own_objects)
    if commit.rank == 0:
        index.objects, index.client_state = content.objects, content.client_state
    if not commit.folder.is_dir():
        raise CheckpointIncomplete(
            "rank 0 made this folder, and this rank does not see it: it is not shared", commit.folder
        )
    if content.parts:
        path = commit.path()
        metadata = {"format": "pt", "zs_ckpt": json.dumps({"save_id": commit.save_id, "rank": commit.rank})}
        layout = lay_out(content.parts, metadata)
        crcs = _write_file(path, layout, writer, started)
        index.files[path.name] = layout.file
        places = {id(part): (offset, crc) for part, offset, crc in zip(layout.parts, layout.offsets, crcs, strict=True)}
        for part in content.parts:  # in the order of the state, which is the one to show
            offset, crc = places[id(part)]
            group = index.tensors if part.rank is None else index.own_tensors
            known = group.get(part.spec.name)
            if known is not None and known.spec != part.spec:
                raise ConfigError(f"tensor {part.spec.name!r} is there twice, with {known.spec} and {part.spec}")
            piece = stored_piece(part, path.name, offset, crc)
            group[part.spec.name] = StoredTensor(part.spec, (*known.pieces, piece) if known else (piece,))
    return index


def finish(started: Started, index: Index, keep: int | None) -> None:
    """Say that this rank is done, and commit (rank 0) or wait for it."""
    commit = started.commit
    if commit.rank:
        commit.say_done(index)
        commit.wait_committed()
        return
    indexes = commit.indexes(index)
    with paused():
        manifest = merge(
            indexes, tag=commit.tag, serial=started.serial, step=started.content.step, file=commit.manifest_path
        )
    commit.commit(manifest, latest=started.latest)
    try:
        collect(commit.folder, set(manifest.files))
        if keep is not None:
            prune(commit.root, keep)
    except OSError as error:  # the checkpoint is committed: what could not be removed is removed another time
        _log.warning("files of older saves could not be removed: %s", error)


def write_all(started: Started, io: str) -> Index:
    """`write` with a writer of its own."""
    writer = open_writer_for(started.content.parts, io)
    try:
        return write(started, writer)
    finally:
        writer.close()


def run(started: Started, io: str, keep: int | None, index: Index | None = None) -> Saved:
    """From the agreement to the commit; what fails on one rank is published, so that the others do not wait.

    `index`: what this rank has written already.
    """
    commit = started.commit
    try:
        if index is None:
            index = write_all(started, io)
        finish(started, index, keep)
    except BaseException as error:
        give_up(started, error)
        raise
    if started.lock is not None:
        started.lock.release()
    nbytes = sum(entry.nbytes for entry in index.files.values())
    return Saved(commit.folder, commit.tag, commit.save_id, nbytes)


def give_up(started: Started, error: BaseException) -> None:
    """Tell the other ranks that this save does not come about, and take back what this one has written."""
    started.commit.withdraw()  # first, as it may be a full disk that is in the way
    started.commit.say_failed(error)
    if started.lock is not None:
        started.lock.release()


def check_arguments(io: str, keep: int | None) -> None:
    check_mode(io)
    if keep is not None and (type(keep) is not int or keep < 1):
        raise ConfigError(f"keep is {keep!r}; it must be a positive integer, or None for all")


def as_world(group: GroupLike) -> Group:
    return as_group(group, "world")


def _write_file(path: Path, layout: Layout, writer: BlobWriter, started: Started) -> list[str]:
    """Write and sync under a temporary name, and put it in place; the parts' checksums."""
    unfinished = path.with_name(temporary(path.name, started.commit.save_id))
    try:
        crcs = write_parts(str(unfinished), layout, writer, started.progress, started.rest)
        writer.sync(str(unfinished))
        put_in_place(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise
    return crcs


def _remove_empty(folder: Path) -> None:
    """A tag's folder that was made for nothing."""
    try:
        os.rmdir(folder)
        sync_folder(folder.parent)
    except OSError:
        return
