"""Flags that more than one command has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)
TLS = ("tls", "ca", "cert", "key")  # as `serve.client.Options` has them


def tls(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the flags in TLS: how a server is trusted, and convinced."""
    for option in (
        click.option("--key", metavar="FILE", type=FILE, help="Its key."),
        click.option("--cert", metavar="FILE", type=FILE, help="Show the server this certificate of one's own."),
        click.option("--ca", metavar="FILE", type=FILE, help="TLS, trusting this authority alone."),
        click.option("--tls", is_flag=True, help="TLS, trusting the authorities that the system trusts."),
    ):
        command = option(command)
    return command
