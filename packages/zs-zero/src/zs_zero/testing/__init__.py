"""Conformance checks that any implementation of zs-zero's Protocols can run: they take a factory and need no pytest.

`FaultyStore` makes any store fail where a test says.
"""

from .block_store import check_block_store
from .faulty_store import Fault, FaultyStore
from .host_optimizer import check_host_optimizer

__all__ = ["Fault", "FaultyStore", "check_block_store", "check_host_optimizer"]
