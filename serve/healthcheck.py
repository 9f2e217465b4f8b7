"""Exit with 0 where a server says it is serving: `python -m serve.healthcheck [ADDRESS]`, or `--pid 1` in a container.

For containers' and supervisors' health checks; it asks grpc.health.v1, which needs no token. A container that
runs another command, such as sample-cli, serves nothing; it counts as healthy, or a long job would be killed.
"""

from __future__ import annotations

import os
import socket
import ssl
from pathlib import Path
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve import flags
from serve.address import check_address, loopback
from serve.client import Options
from serve.client.failures import explain
from serve.errors import ServeError
from serve.server.settings import LISTEN

SECONDS = 3.0
OTHERS = ("sample-cli", "train-vae", "evaluate-vae", "export-onnx")  # they serve nothing


@click.command()
@click.argument("address", default=LISTEN)
@click.option(
    "--pid",
    metavar="N",
    type=int,
    help="Ask the serve-vae that runs as this process, by its own options and variables, instead of ADDRESS; "
    "exit with 0 where it is sample-cli or another command of balanced-vae, which serves nothing.",
)
@flags.tls
def main(address: str, pid: int | None, **options: Any) -> None:
    """Ask the server at ADDRESS for its health, print it, and exit with 0 where it is SERVING, otherwise with 1."""
    how = Options(**options)
    try:
        if pid is not None:
            found = of_process(pid)
            if found is None:
                click.echo(f"process {pid} is another command than serve-vae, and serves nothing", err=True)
                return
            address, how = found
        secure = how.credentials()
        check_address(address)
    except ServeError as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ADDRESS") from None
    more = how.channel_options(address)
    with grpc.secure_channel(address, secure, more) if secure else grpc.insecure_channel(address, more) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs leave the calls out
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            raise click.ClickException(str(explain(address, error, how))) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    click.echo(f"{address}: {status}", err=True)
    raise SystemExit(int(reply.status != health_pb2.HealthCheckResponse.SERVING))


def of_process(pid: int) -> tuple[str, Options] | None:
    """Return the address of a server, and how to reach it, from what its process was started with.

    It is asked from beside it, so the certificate to trust is its own; where it wants one of clients, it is shown its
    own as well, which has to be of that authority. None stands for another command of balanced-vae.

    Raises:
        ServeError: there is no such process of this user; it is no server; it does not show its certificate.
    """
    from serve.server.cli import main as server

    process = Path("/proc") / str(pid)
    try:
        words = process.joinpath("cmdline").read_text().split("\0")[:-1]
        variables = process.joinpath("environ").read_text().split("\0")
        os.chdir(process / "cwd")  # where relative paths of its begin
    except OSError as error:
        raise ServeError(f"--pid takes a server of this user; cannot look at process {pid}: {error.strerror}") from None
    names = [Path(word).name for word in words]
    ours = next((name for name in names if name in ("serve-vae", *OTHERS)), None)
    if ours in OTHERS:
        return None
    if ours is None:
        raise ServeError(f"--pid takes a serve-vae's process. Received: {pid}, which is {' '.join(names[:1])}")
    os.environ |= dict(line.split("=", 1) for line in variables if line.startswith("SERVE_VAE_"))
    given = server.make_context("serve-vae", words[names.index("serve-vae") + 1 :]).params
    address, cert, key = loopback(given["listen"]), given["tls_cert"], given["tls_key"]
    if cert is None:
        return address, Options()
    shown = (cert, key) if given["tls_client_ca"] else (None, None)
    return address, Options(ca=cert, cert=shown[0], key=shown[1], server_name=_name(address, cert, key))


def _name(address: str, cert: Path, key: Path) -> str:
    """Return the first name on the certificate that a server shows, by a handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, whoever issued it
    host, _, port = address.rpartition(":")
    try:
        context.load_verify_locations(cert)
        context.load_cert_chain(cert, key)
        with (
            socket.create_connection((host.strip("[]"), int(port)), SECONDS) as plain,
            context.wrap_socket(plain) as secure,
        ):
            names = (secure.getpeercert() or {}).get("subjectAltName", ())
    except OSError as error:
        raise ServeError(f"{address} does not show the certificate {cert}: {error}") from None
    return str(names[0][1]).replace("*", "any") if names else ""


if __name__ == "__main__":
    main()
