"""The command `serve-vae`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import click

LISTEN = "127.0.0.1:8470"


def _address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    host, colon, port = value.rpartition(":")
    if value.startswith("unix:") or (host and colon and port.isdigit() and int(port) < 65536):
        return value
    raise click.BadParameter(f"HOST:PORT or unix:PATH, such as {LISTEN}. Received: {value!r}")


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="balanced-vae")
@click.option(
    "--model",
    "models",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A bundle to serve, under its card's name (repeatable).  [default: the embedded faces]",
)
@click.option("--listen", metavar="HOST:PORT", default=LISTEN, callback=_address, help="Or unix:PATH; port 0: any.")
@click.option(
    "--device",
    type=click.Choice(("auto", "cuda", "openvino", "cpu")),
    default="auto",
    help="auto takes the first that is there, in this order.",
)
@click.option("--threads", metavar="N", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: all cores.")
@click.option("--batch", metavar="N", type=click.IntRange(0, 4096), default=0, help="Largest batch; 0: the device's.")
@click.option("--grace", metavar="SECONDS", type=click.FloatRange(0, 3600), default=30, help="For ending on SIGTERM.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine, without encryption or passwords.")
def main(
    models: tuple[Path, ...], listen: str, device: str, threads: int, batch: int, grace: float, insecure: bool
) -> None:
    """Serve models over gRPC: balancedvae.sampling.v1, health and reflection.

    \b
    serve-vae
    serve-vae --model mine.onnx --listen 127.0.0.1:8470

    SIGTERM and Ctrl-C finish what is under way first.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would add lines of its own
    from serve.bundle import DEFAULT, load
    from serve.engine import Engine
    from serve.errors import ServeError
    from serve.service import is_loopback, serve

    # Until the server takes over. A container's first process is deaf to signals it has no handler for.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    if not is_loopback(listen) and not insecure:
        raise click.UsageError(f"{listen} can be reached from other machines; pass --insecure if that is meant")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        bundles = [load(path) for path in models or (DEFAULT,)]
        names = [bundle.card.name for bundle in bundles]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ServeError(f"two models are called {twice}; export one with another --name")
        asyncio.run(serve([Engine(bundle, device, threads, batch) for bundle in bundles], listen, grace))
    except ServeError as error:
        raise click.ClickException(str(error)) from None
