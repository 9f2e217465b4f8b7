"""The command `serve-vae`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from serve.address import check_address
from serve.server.settings import Settings

FILE = click.Path(path_type=Path)
PREFIX = "SERVE_VAE_"  # of environment variables
_SETTINGS = Settings()
# By option, each in its option's unit.
DEFAULTS = vars(_SETTINGS) | {
    "max_delay": _SETTINGS.max_delay * 1000,
    "queue_bytes": _SETTINGS.queue_bytes >> 20,
    "message_bytes": _SETTINGS.message_bytes >> 20,
}


def _address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    listen = parameter.name == "listen"
    try:
        return check_address(value, ("unix",) if listen else (), least_port=0) if value or listen else value
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _check_environment() -> None:
    """Raise UsageError for a variable that looks like an option's and is none, as an unknown option would.

    Kubernetes sets some for each of its services: SERVE_VAE_PORT=tcp://... for one that is called serve-vae.
    """
    context = click.get_current_context()
    options = {parameter.name.upper() for parameter in context.command.params if parameter.name}
    for variable, value in sorted(os.environ.items()):
        name = variable.removeprefix(PREFIX)
        kubernetes = re.search("(^|_)SERVICE_(HOST|PORT)|(^|_)PORT_[0-9]", name) or "://" in value
        if name != variable and name not in options and not kubernetes:
            close = get_close_matches(name, options, 1)
            which = f"did you mean {PREFIX}{close[0]}?" if close else "unset it; --help shows the options"
            raise click.UsageError(f"no option belongs to the environment variable {variable}; {which}")


def _milliseconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    return value / 1000


def _mebibytes(context: click.Context, parameter: click.Parameter, value: int) -> int:
    return value << 20


@click.command(
    context_settings={
        "show_default": True,
        "max_content_width": 110,
        "auto_envvar_prefix": PREFIX.rstrip("_"),
        "default_map": DEFAULTS,
    },
    epilog="Every option can also be set by an environment variable: --max-batch 64 by SERVE_VAE_MAX_BATCH=64.",
)
@click.version_option(package_name="balanced-vae")
# Models
@click.option(
    "--model",
    metavar="FILE",
    multiple=True,
    type=FILE,
    help="A bundle to serve: NAME.onnx as the model NAME, NAME@2.onnx as its version 2 (repeatable).  "
    "[default: the embedded faces]",
)
@click.option(
    "--models",
    metavar="FOLDER",
    type=FILE,
    help="A folder of bundles: serve every NAME.onnx and NAME@VERSION.onnx in it.",
)
@click.option(
    "--watch",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    help="How often to look for changes in the folder of --models; 0: never.",
)
@click.option("--admin", is_flag=True, help="Let callers load and unload models of the folder of --models.")
# Devices and batches
@click.option(
    "--device",
    metavar="NAME",
    multiple=True,
    help="Device to run on: cpu, openvino, cuda, cuda:1, tensorrt ...; auto: a GPU or else the CPU. Repeatable: "
    "models then run on each.",
)
@click.option(
    "--arithmetic",
    type=click.Choice(("exact", "fast")),
    help="What to compute in. exact: float32, the same pictures on every device to one grey level. fast: the fastest "
    "that the device has, such as bfloat16; its difference is measured, and replies name it.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(0, 1024),
    help="CPU threads of each device; 0: all cores.",
)
@click.option(
    "--max-batch",
    metavar="N",
    type=click.IntRange(0, 4096),
    help="Largest batch; 0: the device's own.",
)
@click.option(
    "--max-delay",
    metavar="MS",
    type=click.FloatRange(0, 10_000),
    callback=_milliseconds,
    help="How long a batch that is not full waits for more requests, in milliseconds.",
)
@click.option("--cuda-graphs", is_flag=True, help="Replay the kernels of each batch size as one CUDA graph.")
@click.option("--cache", metavar="FOLDER", type=FILE, help="Where TensorRT keeps the engines that it has compiled.")
# Limits
@click.option(
    "--queue-samples",
    metavar="N",
    type=click.IntRange(1),
    help="Most samples that may wait or be in work for all callers; further requests are refused.",
)
@click.option(
    "--queue-bytes",
    metavar="MIB",
    type=click.IntRange(8),
    callback=_mebibytes,
    help="Most MiB of pictures held for all callers; further requests are refused.",
)
@click.option(
    "--max-requests",
    metavar="N",
    type=click.IntRange(1),
    help="Most requests of all callers at a time; further ones are refused.",
)
@click.option(
    "--message-bytes",
    metavar="MIB",
    type=click.IntRange(1, 1024),
    callback=_mebibytes,
    help="Largest message accepted from a client, in MiB.",
)
@click.option(
    "--streams",
    metavar="N",
    type=click.IntRange(1),
    help="Most requests at a time on one connection; more wait in the client.",
)
@click.option(
    "--stall",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    help="How long a client may read nothing while others need its room; then its connection is closed.",
)
@click.option(
    "--keepalive",
    metavar="SECONDS",
    type=click.FloatRange(10, 86400),
    help="How often to ask a silent connection whether its client is alive.",
)
@click.option(
    "--connection-idle",
    metavar="SECONDS",
    type=click.FloatRange(1, 86400),
    help="Close a connection after this long without a request.",
)
@click.option(
    "--connection-age",
    metavar="SECONDS",
    type=click.FloatRange(0, 86400),
    help="Have clients reconnect after this long, so that a load balancer can spread them; 0: never.",
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.FloatRange(0, 3600),
    help="How long accepted requests may take to finish after SIGTERM.",
)
# Security
@click.option(
    "--listen",
    metavar="HOST:PORT",
    callback=_address,
    help="Address to listen on; unix:PATH is a socket, port 0 any free port.",
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    show_default=False,
    callback=_address,
    help="Also serve a gallery and pictures by URL at this address, under the same rules.",
)
@click.option(
    "--share-models", is_flag=True, help="Give the model files to callers of --http, whose browsers can then run them."
)
@click.option("--open", is_flag=True, help="Open the gallery of --http in a browser once there is a picture to see.")
@click.option(
    "--insecure", is_flag=True, help="Allow other machines to connect without TLS and tokens, also to --metrics."
)
@click.option(
    "--tls-cert", metavar="FILE", type=FILE, help="Use TLS: certificate chain, PEM, read again when it changes."
)
@click.option("--tls-key", metavar="FILE", type=FILE, help="Private key of --tls-cert, PEM.")
@click.option(
    "--tls-client-ca", metavar="FILE", type=FILE, help="Require clients' certificates, signed by this authority."
)
@click.option("--tokens", metavar="FILE", type=FILE, help="Require a bearer token whose hash is in this TOML file.")
@click.option("--new-token", metavar="NAME", help="Make a token, add its hash to the file of --tokens, print it, exit.")
# Observability
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    show_default=False,
    callback=_address,
    help="Serve Prometheus metrics over HTTP at this address.",
)
@click.option(
    "--metrics-insecure", is_flag=True, help="Allow other machines to read --metrics, which has no TLS and no tokens."
)
@click.option("--log-format", type=click.Choice(("text", "json")), help="How log lines are written.")
@click.option("--log-requests", is_flag=True, help="Log a line at the end of each request.")
@click.option("--otel", is_flag=True, help="Send OpenTelemetry traces to where the OTEL_* variables say.")
@click.option("--check", is_flag=True, help="Read, validate and warm up all that a start would, print it, and exit.")
def main(check: bool, new_token: str | None, **flags: Any) -> None:
    """Serve models over gRPC: balancedvae.sampling.v1, the Open Inference Protocol v2, health and reflection.

    \b
    serve-vae
    serve-vae --model mine.onnx --listen 127.0.0.1:8470
    serve-vae --models models/ --watch 5 --metrics 127.0.0.1:9470

    On SIGTERM or Ctrl-C the server finishes the requests that it has accepted; on a second one it exits at once.
    """
    _check_environment()
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
