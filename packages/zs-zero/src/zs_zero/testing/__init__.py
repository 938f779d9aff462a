"""Conformance checks that any implementation of zs-zero's Protocols can run: they take a factory and need no pytest."""

from .block_store import check_block_store
from .host_optimizer import check_host_optimizer

__all__ = ["check_block_store", "check_host_optimizer"]
