"""What the kernel carried, over the loopback device and for this process: the second count of every wire-byte test."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_DEV = Path("/proc/net/dev")


def loopback_nbytes() -> int:
    """Bytes sent over `lo` since boot, in this network namespace.

    TCP/IP headers and acknowledgements are in it (under 1 % of bulk traffic at lo's 64 KiB packets),
    and so is everybody else's traffic: take differences, with nothing else running on the device.

    Raises:
        NotImplementedError: there is no /proc/net/dev (not Linux), or no `lo` in it.
    """
    try:
        lines = _DEV.read_text().splitlines()
    except FileNotFoundError as error:
        raise NotImplementedError(f"loopback_nbytes() reads {_DEV}, which only Linux has") from error
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])  # transmit bytes; on lo what is sent is what is received
    raise NotImplementedError(f"{_DEV} lists no loopback device 'lo'")


def socket_nbytes() -> int:
    """Bytes that the kernel has carried for this process's TCP connections: acknowledged ones, without headers.

    Unlike the counters of the device these are this process's own, whatever else the machine does. Linux only.
    """
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except FileNotFoundError:
            continue
        with connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                total += int(struct.unpack_from("Q", info, 120)[0])  # tcpi_bytes_acked
    return total
