"""The command `serve-vae`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from serve.server.settings import LISTEN, Settings

FILE = click.Path(path_type=Path)


def _address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    host, colon, port = value.rpartition(":")
    unix = value.startswith("unix:") and parameter.name == "listen"
    if not value or unix or (host and colon and port.isdigit() and int(port) < 65536):
        return value
    expected = f"HOST:PORT or unix:PATH, such as {LISTEN}" if parameter.name == "listen" else "HOST:PORT"
    raise click.BadParameter(f"{expected}. Received: {value!r}")


def _milliseconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    return value / 1000


def _mebibytes(context: click.Context, parameter: click.Parameter, value: int) -> int:
    return value << 20


@click.command(
    context_settings={"show_default": True, "max_content_width": 110, "auto_envvar_prefix": "SERVE_VAE"},
    epilog="Every option is also an environment variable: SERVE_VAE_ and its name, such as SERVE_VAE_MAX_BATCH.",
)
@click.version_option(package_name="balanced-vae")
# Models
@click.option(
    "--model",
    metavar="FILE",
    multiple=True,
    type=FILE,
    help="A bundle to serve, under its card's name (repeatable).  [default: the embedded faces]",
)
@click.option("--models", metavar="FOLDER", type=FILE, help="Serve every NAME.onnx and NAME@VERSION.onnx in it.")
@click.option(
    "--watch",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    default=0.0,
    help="Keep up with that folder, looking this often; 0: never.",
)
@click.option("--admin", is_flag=True, help="Let callers load and unload models of that folder.")
# Devices and batches
@click.option(
    "--device",
    metavar="NAME",
    multiple=True,
    default=("auto",),
    help="cpu, openvino, cuda, cuda:1, tensorrt ...; repeated: one engine each. auto: the first there is.",
)
@click.option("--threads", metavar="N", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0: all cores.")
@click.option("--max-batch", metavar="N", type=click.IntRange(0, 4096), default=0, help="0: the device's.")
@click.option(
    "--max-delay",
    metavar="MS",
    type=click.FloatRange(0, 10_000),
    default=1.0,
    callback=_milliseconds,
    help="How long a batch that is not full waits for more.",
)
@click.option("--cuda-graphs", is_flag=True, help="Replay each batch size as one CUDA graph.")
@click.option("--cache", metavar="FOLDER", type=FILE, help="Where TensorRT keeps its engines.")
# Limits
@click.option(
    "--queue-samples",
    metavar="N",
    type=click.IntRange(1),
    default=16384,
    help="Most samples under way, of all callers.",
)
@click.option(
    "--queue-bytes",
    metavar="MIB",
    type=click.IntRange(8),
    default=256,
    callback=_mebibytes,
    help="Most MiB of pictures under way.",
)
@click.option("--max-requests", metavar="N", type=click.IntRange(1), default=2048, help="Most requests at a time.")
@click.option(
    "--message-bytes",
    metavar="MIB",
    type=click.IntRange(1, 1024),
    default=4,
    callback=_mebibytes,
    help="Largest message that is taken, MiB.",
)
@click.option("--streams", metavar="N", type=click.IntRange(1), default=1024, help="Most requests on a connection.")
@click.option(
    "--stall",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    help="How long a reader may take nothing of a message before it has to make room for others.",
)
@click.option(
    "--keepalive",
    metavar="SECONDS",
    type=click.FloatRange(10, 86400),
    default=60.0,
    help="Ask a silent connection this often whether it lives.",
)
@click.option(
    "--connection-idle",
    metavar="SECONDS",
    type=click.FloatRange(1, 86400),
    default=600.0,
    help="Close a connection without requests.",
)
@click.option(
    "--connection-age",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    default=0.0,
    help="Have clients connect anew, so that balancers can spread them; 0: never.",
)
@click.option("--grace", metavar="SECONDS", type=click.FloatRange(0, 3600), default=30.0, help="For ending on SIGTERM.")
# Security
@click.option("--listen", metavar="HOST:PORT", default=LISTEN, callback=_address, help="Or unix:PATH; port 0: any.")
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without encryption and tokens.")
@click.option("--tls-cert", metavar="FILE", type=FILE, help="Certificate chain, PEM; read again when it changes.")
@click.option("--tls-key", metavar="FILE", type=FILE, help="Its key, PEM.")
@click.option("--tls-client-ca", metavar="FILE", type=FILE, help="Ask clients for a certificate of this authority.")
@click.option("--tokens", metavar="FILE", type=FILE, help="Ask callers for a bearer token whose hash is in this file.")
@click.option("--new-token", metavar="NAME", help="Add a token to --tokens FILE, print it, and exit.")
# Observability
@click.option("--metrics", metavar="HOST:PORT", default="", callback=_address, help="Prometheus metrics over HTTP.")
@click.option("--log-format", type=click.Choice(("text", "json")), default="text")
@click.option("--log-requests", is_flag=True, help="A line in the log for each request.")
@click.option("--otel", is_flag=True, help="OpenTelemetry traces; OTEL_* variables say where to.")
@click.option("--check", is_flag=True, help="Do all that a start does but listen, say what was found, and exit.")
def main(check: bool, new_token: str | None, **flags: Any) -> None:
    """Serve models over gRPC: balancedvae.sampling.v1 and the Open Inference Protocol v2, health and reflection.

    \b
    serve-vae
    serve-vae --model mine.onnx --listen 127.0.0.1:8470
    serve-vae --models models/ --watch 5 --metrics 127.0.0.1:9470

    SIGTERM and Ctrl-C finish what was accepted first; a second one ends it now.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before the import: gRPC's core would add lines of its own
    from serve.errors import ServeError

    # Until the server takes over. A container's first process is deaf to signals it has no handler for.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        if new_token is not None:
            if flags["tokens"] is None:
                raise click.UsageError("--new-token needs --tokens FILE, which it adds to")
            from serve.server.security import new_token as make

            click.echo(make(flags["tokens"], new_token))
            return
        try:
            settings = Settings(**flags)
        except ServeError as error:
            raise click.UsageError(str(error)) from None
        from serve.server import app, memory, telemetry

        if check:
            for line in asyncio.run(app.check(settings)):
                click.echo(line)
            click.echo("the configuration is good")
            return
        telemetry.log_to_stderr(settings.log_format)
        memory.share_heaps()
        asyncio.run(app.serve(settings))
    except ServeError as error:
        raise click.ClickException(str(error)) from None
