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
        click.option("--key", metavar="FILE", type=FILE, help="Private key of --cert, PEM."),
        click.option(
            "--cert", metavar="FILE", type=FILE, help="Certificate to show to a server that asks for one, PEM."
        ),
        click.option(
            "--ca", metavar="FILE", type=FILE, help="Use TLS, and trust this certificate authority alone, PEM."
        ),
        click.option("--tls", is_flag=True, help="Use TLS, and trust the authorities that the system trusts."),
    ):
        command = option(command)
    return command
