"""Who writes what, found alike on every rank without a word between them.

A piece that several ranks hold is written once. A large one is cut and each of its holders writes a part; a small one
goes to the holder that has least to write so far, where every rank holds it and so counts alike, and to one chosen by
the hash of its name otherwise. Two ranks that hold the same box always decide alike; that the parts make up each tensor
is checked once more before the commit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from .boxes import Box, boxes_of_range, numel, shape_of
from .shardable import LazyPiece, Piece

AnyPiece: TypeAlias = Piece | LazyPiece

_CUT_NBYTES = 4 << 20  # a part that is worth an entry of its own


def parts_of(
    pieces: Iterable[tuple[str, AnyPiece]], world: int
) -> Iterator[tuple[str, AnyPiece, Box, tuple[int, int]]]:
    """What this rank writes of its pieces: the name, the piece, the part's box, and its elements in the piece."""
    loads = [0] * world  # bytes by replica, of what every rank holds
    for name, piece in pieces:
        count, size = piece.replicas, numel(piece.box)
        if piece.scope == "rank" or count == 1:
            yield name, piece, piece.box, (0, size)
            continue
        nbytes = size * piece.spec.dtype.itemsize
        rows = next((extent for extent in shape_of(piece.box) if extent > 1), 1)
        cuts = min(count, nbytes // _CUT_NBYTES, rows)
        first = zlib.crc32(name.encode()) % count
        if cuts < 2:
            if count == world:
                first = min(range(world), key=loads.__getitem__)
                loads[first] += nbytes
            if piece.replica == first:
                yield name, piece, piece.box, (0, size)
            continue
        turn = (piece.replica - first) % count
        if turn >= cuts:
            continue
        row = size // rows
        start, stop = rows * turn // cuts * row, rows * (turn + 1) // cuts * row
        for box in boxes_of_range(shape_of(piece.box), start, stop):
            yield name, piece, _moved(box, piece.box), (start, stop)


def _moved(box: Box, within: Box) -> Box:
    """`box`, which counts from the first element of `within`, counted from the tensor's."""
    return tuple((start + first, stop + first) for (start, stop), (first, _) in zip(box, within, strict=True))
