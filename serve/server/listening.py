"""Where a server listens: on every address that a name has here, or on none."""

from __future__ import annotations

import socket
from typing import Any

import grpc

from serve.errors import SettingsError


def bind(server: grpc.aio.Server, address: str, secure: grpc.ServerCredentials | None) -> str:
    """Listen on every address that a host name has here; gRPC is content with one, and another server has the rest.

    Raises:
        SettingsError: one of them is in use, or there is none.
    """
    if address.startswith("unix:"):
        _check_unused(address)
        _bind(server, address, secure, address)
        return address
    host, _, port = address.rpartition(":")
    bound = int(port)
    for family, place in _places(address):
        text = f"[{place}]" if family == socket.AF_INET6 else place
        bound = _bind(server, f"{text}:{bound}", secure, address)
    return f"{host}:{bound}"


def sockets(address: str) -> tuple[str, list[socket.socket]]:
    """Return sockets bound to every address that a host name has here, and HOST:PORT with the port that they have.

    Raises:
        SettingsError: one of them is in use, or there is none.
    """
    host, _, port = address.rpartition(":")
    number, bound = int(port), list[socket.socket]()
    for family, place in _places(address):
        try:
            bound.append(socket.create_server((place, number), family=family))
        except OSError:
            raise SettingsError(f"cannot listen on {address}: it is in use, or not allowed; choose another") from None
        number = bound[-1].getsockname()[1]
    return f"{host}:{number}", bound


def _places(address: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return what a HOST:PORT stands for on this machine.

    Raises:
        SettingsError: nothing.
    """
    host = address.rpartition(":")[0]
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        places = {(family, str(place[0])) for family, _, _, _, place in found if _is_here(family, place)}
    except OSError:
        places = set()
    if not places:
        raise SettingsError(f"cannot listen on {address}: {host} is not this machine's; choose another")
    return sorted(places)


def _is_here(family: int, place: tuple[Any, ...]) -> bool:
    """Tell whether an address can be listened on; names such as localhost may have one of a protocol that is off."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((place[0], 0, *place[2:]))
        except OSError:
            return False
    return True


def _check_unused(address: str) -> None:
    """Raise SettingsError where a server listens on a unix socket; gRPC would take the name from it without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address.removeprefix("unix:").removeprefix("//"))
        except OSError:  # nobody is there: at most what a server left that was killed
            return
    raise SettingsError(f"cannot listen on {address}: it is in use; choose another")


def _bind(server: grpc.aio.Server, place: str, secure: grpc.ServerCredentials | None, address: str) -> int:
    try:
        return server.add_secure_port(place, secure) if secure else server.add_insecure_port(place)
    except RuntimeError:
        raise SettingsError(f"cannot listen on {address}: it is in use, or not allowed; choose another") from None
