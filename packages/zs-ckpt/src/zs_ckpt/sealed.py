"""JSON objects that end in their own checksum: `{...,"crc32":"89abcdef"}`.

The checksum is the CRC-32 of all bytes before `,"crc32"`, so it covers everything but itself, and a flip in it is found
by its not matching.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointCorrupt
from .names import open_file

MOST_NBYTES = 1 << 30  # of a manifest; a million pieces take a third of it
_TAIL = re.compile(rb',"crc32":"([0-9a-f]{8})"\}')
_TAIL_NBYTES = len(',"crc32":"01234567"}')


def seal(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON with its checksum as the last member."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return body + b',"crc32":"%08x"}' % zlib.crc32(body)


def unseal(raw: bytes, file: Path) -> dict[str, Any]:
    """The members without the checksum.

    Raises:
        CheckpointCorrupt: the checksum does not match, or this is no JSON object; it has a member twice, NaN or
            Infinity, integers of thousands of digits, or is nested too deep to be read.
    """
    tail = _TAIL.fullmatch(raw[-_TAIL_NBYTES:])
    if tail is None:
        raise CheckpointCorrupt(f"{len(raw):,} bytes that do not end in a checksum: cut short, or damaged", file)
    body = raw[:-_TAIL_NBYTES]
    found = b"%08x" % zlib.crc32(body)
    if found != tail[1]:
        raise CheckpointCorrupt(f"the checksum is {found.decode()}, and {tail[1].decode()} was written", file)
    try:
        value = json.loads(body + b"}", object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointCorrupt(
            f"not the JSON that was expected: {type(error).__name__}: {error}"[:500], file
        ) from error
    if isinstance(value, dict) and "crc32" in value:
        raise CheckpointCorrupt("the member 'crc32' is there twice", file)
    if not isinstance(value, dict):
        raise CheckpointCorrupt(f"a JSON {type(value).__name__} instead of an object", file)
    return value


def read_sealed(path: Path) -> tuple[dict[str, Any], bytes]:
    """The members of the file at `path`, and its bytes.

    Raises:
        CheckpointIncomplete: there is no such file.
        CheckpointCorrupt: as `unseal`; or it is a link, no file, or has more than 1 GiB.
    """
    fd = open_file(path)
    try:
        nbytes = os.fstat(fd).st_size
        if nbytes > MOST_NBYTES:
            raise CheckpointCorrupt(f"{nbytes:,} bytes are more than such a file has", path)
        with os.fdopen(fd, "rb", closefd=False) as file:
            raw = file.read(nbytes)
    finally:
        os.close(fd)
    return unseal(raw, path), raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the member {twice[:200]!r} is there twice")
    return made


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
