"""Ending a connection from the server's side.

gRPC's asyncio server, as of 1.85, cannot end a call whose reply nobody takes: a status waits behind the reply, and
cancelling the handler leaves the call where it is. The operating system can end the connection, and with it the call.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path
from urllib.parse import unquote

DESCRIPTORS = Path("/dev/fd")  # of this process, on Linux and macOS


def end(peer: str) -> bool:
    """Shut down the TCP connection to a peer; tell whether it was found.

    Args:
        peer: As gRPC names it: "ipv4:127.0.0.1:50000", "ipv6:%5B::1%5D:50000". Peers on unix sockets have no names.
    """
    protocol, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if protocol not in ("ipv4", "ipv6"):
        return False
    wanted = (_plain(host.strip("[]")), int(port))
    for name in os.listdir(DESCRIPTORS):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            # A descriptor of our own, since gRPC may close its own at any moment, and another file get the number.
            with socket.socket(fileno=os.dup(int(name))) as connection:
                there = connection.getpeername()
                if isinstance(there, tuple) and (_plain(there[0]), there[1]) == wanted:
                    connection.shutdown(socket.SHUT_RDWR)
                    return True
        except OSError:  # closed meanwhile, or not connected
            continue
    return False


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address
