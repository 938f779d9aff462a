"""Conformance checks that any implementation of zs-ckpt's Protocols can run: they take a factory and need no pytest."""

from .blob_io import check_blob_io
from .shardable import check_shardable

__all__ = ["check_blob_io", "check_shardable"]
