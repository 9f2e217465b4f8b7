"""Addresses, as people write them."""

from __future__ import annotations

import re

SCHEMES = ("unix", "unix-abstract", "dns", "ipv4", "ipv6", "xds")  # gRPC's own, which it checks itself
HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):([0-9]{1,5})", re.ASCII)


def check_address(text: str, schemes: tuple[str, ...] = SCHEMES, least_port: int = 1) -> str:
    """Return an address; ValueError says in words that follow "expected" what is wrong with it.

    Args:
        text: HOST:PORT, [HOST]:PORT where it is IPv6, or SCHEME:PLACE.
        schemes: Which of these are taken.
        least_port: 0 where any free port may be meant.
    """
    scheme, colon, place = text.partition(":")
    if colon and place and scheme in schemes:
        return text
    match = HOST_PORT.fullmatch(text)
    if match and least_port <= int(match[2]) < 65536:
        return text
    expected = "HOST:PORT or unix:PATH, such as 127.0.0.1:8470" if "unix" in schemes else "HOST:PORT"
    if re.match("[a-z]+://", text):
        expected += f" (without {scheme}://)"
    elif ":" not in text:
        expected += " (the port is missing)"
    raise ValueError(f"{expected}. Received: {text!r}")


def loopback(listen: str) -> str:
    """Return the address to ask of a server on this machine, from the one that it listens on."""
    host, _, port = listen.rpartition(":")
    every = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # who listens on all is on this one too
    return f"{every.get(host, host)}:{port}"
