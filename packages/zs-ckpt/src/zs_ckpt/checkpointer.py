"""A folder of checkpoints with what is used again from save to save: host memory and the background thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from zs_comm import agree

from . import saving
from .background import Pending
from .commit import STALL_S
from .hostcopy import HostBuffer
from .saving import Saved, Started
from .staging import Progress, any_lazy

if TYPE_CHECKING:
    from zs_comm.group import GroupLike

    from .index import Index


class Checkpointer:
    """Saves to the folder `path`, again and again; see `save` for the arguments.

    Every rank of the group makes the same calls in the same order. An asynchronous save needs host memory for one copy
    of what this rank writes, which stays for the next one; there is at most one in flight. None is needed where values
    are not in memory (`LazyPiece`): such a rank's file is written before `save` returns.

    Args:
        stall_s: how long a rank waits for another that shows no sign of life, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        group: GroupLike = None,
        io: str = "auto",
        keep: int | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        saving.check_arguments(io, keep)
        self.path = Path(path)
        self._group, self._io, self._keep, self._stall_s = saving.as_world(group), io, keep, stall_s
        self._buffer = HostBuffer()
        self._pending: Pending | None = None
        self._failed: BaseException | None = None  # in the background, and not raised yet

    @property
    def host_nbytes(self) -> int:
        """Host memory that is held for asynchronous saves."""
        return self._buffer.nbytes

    @overload
    def save(
        self,
        state: Mapping[str, Any],
        *,
        tag: str | None = ...,
        client_state: Any = ...,
        step: int | None = ...,
        asynchronous: Literal[False] = ...,
        latest: bool = ...,
        progress: Progress | None = ...,
    ) -> Saved: ...

    @overload
    def save(
        self,
        state: Mapping[str, Any],
        *,
        tag: str | None = ...,
        client_state: Any = ...,
        step: int | None = ...,
        asynchronous: bool,
        latest: bool = ...,
        progress: Progress | None = ...,
    ) -> Saved | Pending: ...

    def save(
        self,
        state: Mapping[str, Any],
        *,
        tag: str | None = None,
        client_state: Any = None,
        step: int | None = None,
        asynchronous: bool = False,
        latest: bool = True,
        progress: Progress | None = None,
    ) -> Saved | Pending:
        """Save `state` under `tag`; see `zs_ckpt.save`.

        Waits for a save that is in flight. One that failed in the background is raised here, on every rank, and nothing
        is saved; the next call starts afresh. `latest=False`: what `load` takes where no tag is named stays what it is,
        if `latest` names something.
        """
        self._settle()
        error, self._failed = self._failed, None
        started = saving.begin(
            self.path,
            state,
            self._group,
            tag=tag,
            client_state=client_state,
            step=step,
            asynchronous=asynchronous,
            latest=latest,
            stall_s=self._stall_s,
            progress=progress,
            error=error,
        )
        return self._in_background(started) if asynchronous else self._now(started)

    def wait(self) -> Saved | None:
        """Wait for the save that is in flight; None where there is none. Raises what went wrong with it."""
        pending = self._pending
        self._settle()
        error, self._failed = self._failed, None
        if error is not None:
            raise error
        return pending.wait() if pending is not None else None

    def close(self) -> None:
        """Wait for what is being written; raises what went wrong with it. May be called again."""
        try:
            self.wait()
        finally:
            self._buffer = HostBuffer()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self._settle()

    def _settle(self) -> None:
        """Wait for the background; its error is kept for who asks next."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.wait()
            except Exception as error:
                self._failed = error

    def _now(self, started: Started) -> Saved:
        error: BaseException | None = None
        try:
            saved = saving.run(started, self._io, self._keep)
        except Exception as failed:
            error = failed
        try:
            agree(self._group, error, what="save")
        except Exception:
            if self._group.rank == 0:
                started.commit.forget()
            raise
        return saved

    def _in_background(self, started: Started) -> Pending:
        error: BaseException | None = None
        index: Index | None = None
        try:
            if any_lazy(started.content.parts):  # they may change from now on, and a copy may not fit into memory
                index = saving.write_all(started, self._io)
            else:
                parts = self._buffer.copy(started.content.parts)
                started = replace(started, content=replace(started.content, parts=parts))
        except Exception as failed:  # no memory: the others are told by a file, as they are by then in the background
            error = failed
        except BaseException as failed:
            saving.give_up(started, failed)
            raise

        def work(rest: Callable[[float], None]) -> Saved:
            if error is not None:
                saving.give_up(started, error)
                raise error
            return saving.run(replace(started, rest=rest), self._io, self._keep, index)

        self._pending = Pending(work, f"tag {started.commit.tag!r}")
        return self._pending
