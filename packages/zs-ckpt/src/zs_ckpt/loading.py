"""Loading: every rank fills its own places, reading what it needs of whatever lay-out was saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from zs_comm import ConfigError, Group, agree

from .boxes import numel
from .collector import paused
from .errors import CheckpointIncomplete
from .extents import Target
from .jsonvalues import decode
from .lazy import LazyTarget, store
from .manifest import Manifest, StoredTensor
from .plan import AnyPiece
from .ranks import meet
from .saving import as_world
from .shardable import Shardable, TensorSpec, is_lazy
from .snapshot import Snapshot
from .state import full_name, shardables
from .trees import Tree

if TYPE_CHECKING:
    from zs_comm.group import GroupLike

_TRIES = 10  # a save takes far longer than opening files: one turn more is enough, unless they follow at once


@dataclass(frozen=True)
class Loaded:
    """What a load found. `objects` by key; `nbytes_read`: of tensors, by this rank."""

    path: Path
    tag: str
    objects: Mapping[str, Any]
    client_state: Any
    step: int | None
    world: int
    nbytes_read: int


class SavedSpecs(dict[str, TensorSpec]):
    """The tensors of a checkpoint under one key, by name without the prefix: what `Shardable.places` is given.

    Its items are the tensors of all ranks and, where as many ranks load as saved, this rank's own. `world`: how many
    ranks saved. `ranks[k]`: rank k's own; to read one give a Piece the scope "rank", for this rank's, or "rank:<k>".
    """

    def __init__(self, shared: Mapping[str, TensorSpec], ranks: Sequence[Mapping[str, TensorSpec]], rank: int | None):
        super().__init__(shared)
        self.ranks = tuple(ranks)
        self.world = len(ranks)
        if rank is not None:
            self.update(ranks[rank])


@dataclass
class _Plan:
    """Where everything goes on this rank."""

    shardables: dict[str, Shardable]
    objects: dict[str, Any]
    targets: list[Target] = field(default_factory=list)
    lazy: list[LazyTarget] = field(default_factory=list)  # in the order of the places

    def files(self) -> Iterator[str]:
        """Those that are needed, each perhaps several times."""
        stored = [target.stored for target in self.targets] + [target.stored for target in self.lazy]
        return (piece.file for one in stored for piece in one.pieces)


def load(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    tag: str | None = None,
    group: GroupLike = None,
    strict: bool = True,
    io: str = "auto",
) -> Loaded:
    """Fill `state` in place from the checkpoint `tag` of the folder `path`; every rank of the group calls it.

    How many ranks saved, and which parts they held, does not matter. Every byte that is used is verified.

    Args:
        path: the folder of the tags.
        state: as for `save`: what to load, by key. Keys of the checkpoint that are not in it are left alone.
        tag: None takes the newest.
        strict: a key or a tensor that only one side has is an error.

    Raises:
        CheckpointIncomplete: there is no such checkpoint, or a file of it is missing.
        CheckpointCorrupt: bytes are not those that were written: file, tensor, expected and found. Values may have been
            filled in already: load another checkpoint before going on.
        ConfigError: names or shapes do not match; nothing has been changed.
        RankDisagreement: another rank failed, or came with other arguments.
        CommTimeout, PeerLost: a rank did not make this call.
    """
    world = as_world(group)
    snapshot, plan = _agreed(Path(path), tag, state, world, strict, io)
    with snapshot:
        error: BaseException | None = None
        try:
            for shardable in plan.shardables.values():
                if callable(begins := getattr(shardable, "begin", None)):
                    begins()  # from here on until finish() its values are of two states
            snapshot.fill(plan.targets)
            store(snapshot, plan.lazy)
        except Exception as failed:
            error = failed
        agree(world, error, what="load")
        for key, shardable in plan.shardables.items():
            _finish(key, shardable, plan.objects[key], snapshot.manifest, state)
        return Loaded(
            snapshot.folder,
            snapshot.tag,
            plan.objects,
            snapshot.client_state,
            snapshot.manifest.step,
            snapshot.manifest.world,
            snapshot.nbytes_read,
        )


def read(
    path: str | os.PathLike[str],
    *,
    tag: str | None = None,
    names: str | Iterable[str] | None = None,
    io: str = "auto",
) -> dict[str, Tensor]:
    """The checkpoint's tensors as a plain dictionary, whole, on the CPU, in the dtypes that were saved.

    Args:
        names: full names or patterns (`model/*`); None takes all. What is one rank's own is `rank<k>/<name>`.

    Raises:
        CheckpointIncomplete: there is no such checkpoint, a file of it is missing, or no tensor has a name that was
            asked for.
        CheckpointCorrupt: bytes are not those that were written.
    """
    for turn in range(_TRIES):
        with Snapshot(path, tag, io=io) as snapshot:
            try:
                return _read(snapshot, names)
            except CheckpointIncomplete:
                # its files may have gone because a newer save took its place
                if turn + 1 == _TRIES or not _replaced(Path(path), tag, snapshot.digest):
                    raise
    raise CheckpointIncomplete("it is being replaced all the time", path)


def _read(snapshot: Snapshot, names: str | Iterable[str] | None) -> dict[str, Tensor]:
    found: dict[str, tuple[StoredTensor, int | None]] = {
        name: (stored, None) for name, stored in snapshot.manifest.tensors.items()
    }
    for rank, own in enumerate(snapshot.manifest.rank_tensors):
        found |= {f"rank{rank}/{name}": (stored, rank) for name, stored in own.items()}
    wanted = list(found)
    if names is not None:
        patterns = [names] if isinstance(names, str) else list(names)
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in found):
                raise CheckpointIncomplete(f"the checkpoint {snapshot.tag} has no such tensor", snapshot.root, pattern)
        wanted = [name for name in found if any(_matches(name, pattern) for pattern in patterns)]
    snapshot.open(piece.file for name in wanted for piece in found[name][0].pieces)
    return {name: snapshot.read(found[name][0].spec.name, rank=found[name][1]) for name in wanted}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _agreed(
    path: Path, tag: str | None, state: Mapping[str, Any], world: Group, strict: bool, io: str
) -> tuple[Snapshot, _Plan]:
    """The same checkpoint on every rank, everything planned, and the files open that cannot vanish then.

    Between the manifest and the files a newer save may take their place: then once more, on all ranks.
    """
    keys = sorted(map(str, state))
    for turn in range(_TRIES):
        snapshot: Snapshot | None = None
        plan: _Plan | None = None
        error: Exception | None = None
        word = "again"
        try:
            with paused():
                snapshot = Snapshot(path, tag, io=io)
                plan = _plan(snapshot, state, world, strict)
            word = snapshot.digest
            snapshot.open(plan.files())
        except CheckpointIncomplete as failed:
            if plan is None or turn + 1 == _TRIES or not _replaced(path, tag, word):
                error = failed
            word = "again"
        except Exception as failed:
            error = failed
        try:
            words = meet(world, "load", mine=word, error=error, what=f"tag {tag!r}, keys {keys}")
        except BaseException:
            if snapshot is not None:
                snapshot.close()
            raise
        if snapshot is not None and plan is not None and word != "again" and set(words) == {word}:
            return snapshot, plan
        if snapshot is not None:
            snapshot.close()
    raise CheckpointIncomplete("it is being replaced all the time, or the ranks see different files", path)


def _replaced(path: Path, tag: str | None, digest: str) -> bool:
    """Is it another checkpoint by now?"""
    try:
        with Snapshot(path, tag) as now:
            return now.digest != digest
    except CheckpointIncomplete:
        return False


def _plan(snapshot: Snapshot, state: Mapping[str, Any], world: Group, strict: bool) -> _Plan:
    made = shardables(state, world, strict=strict)
    manifest = snapshot.manifest
    missing = [key for key in made if key not in manifest.objects]
    if missing and strict:
        raise ConfigError(f"the checkpoint {snapshot.tag} has no {missing}; it has {sorted(manifest.objects)}")
    plan = _Plan({key: one for key, one in made.items() if key not in missing}, {})
    same = world.rank if world.size == manifest.world else None
    for key, shardable in plan.shardables.items():
        plan.objects[key] = decode(manifest.objects[key])
        saved = SavedSpecs(_under(key, manifest.tensors), [_under(key, own) for own in manifest.rank_tensors], same)
        for piece in shardable.places(saved, plan.objects[key]):
            rank = _rank_of(piece.scope, world.rank, manifest.world)
            stored = snapshot.stored(full_name(key, piece.spec.name), rank)
            _check_place(stored, piece)
            if is_lazy(piece):
                plan.lazy.append(LazyTarget(stored, piece.box, piece.source, piece.spec.dtype, rank))
            else:
                plan.targets.append(Target(stored, piece.box, piece.data, rank))
    return plan


def _under(key: str, tensors: Mapping[str, StoredTensor]) -> dict[str, TensorSpec]:
    """The specs under a key, by name without the prefix."""
    found = {}
    for name, stored in tensors.items():
        head, slash, rest = name.partition("/")
        if head == key:
            found[rest if slash else ""] = TensorSpec(rest if slash else "", stored.spec.shape, stored.spec.dtype)
    return found


def _rank_of(scope: str, rank: int, world: int) -> int | None:
    if not scope:
        return None
    _, _, text = scope.partition(":")
    found = int(text) if text.isdecimal() else rank
    if scope not in ("rank", f"rank:{found}") or found >= world:
        raise ConfigError(f"scope is {scope!r}; it must be '', 'rank' or 'rank:<k>' with k below {world}")
    return found


def _check_place(stored: StoredTensor, piece: AnyPiece) -> None:
    spec, box = stored.spec, piece.box
    if tuple(piece.spec.shape) != spec.shape:
        raise ConfigError(f"tensor {spec.name!r}: {tuple(piece.spec.shape)} here and {spec.shape} in the checkpoint")
    inside = len(box) == len(spec.shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(box, spec.shape, strict=True)
    )
    if is_lazy(piece):
        if not inside:
            raise ConfigError(f"tensor {spec.name!r}: the box {box} is not inside {spec.shape}")
        if not callable(getattr(piece.source, "store", None)):
            raise ConfigError(f"tensor {spec.name!r}: its source, a {type(piece.source).__name__}, has no store()")
    elif not inside or piece.data.numel() != numel(box) or not piece.data.is_contiguous():
        raise ConfigError(f"tensor {spec.name!r}: {piece.data.numel()} elements for the box {box} of {spec.shape}")


def _finish(key: str, shardable: Shardable, objects: Any, manifest: Manifest, state: Mapping[str, Any]) -> None:
    take = getattr(shardable, "take_rank_objects", None)
    if take is not None:
        take([decode(own.get(key, {})) for own in manifest.rank_objects])
    shardable.finish(objects)
    if isinstance(shardable, Tree) and isinstance(state, MutableMapping):
        for keys, leaf in objects["leaves"]:
            if not keys:
                state[key] = leaf
