"""Exit with 0 where a server says it is serving: `python -m serve.healthcheck [ADDRESS]`.

For containers' and supervisors' health checks; it asks grpc.health.v1, which needs no token.
"""

from __future__ import annotations

from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve import flags
from serve.address import check_address
from serve.client import Options
from serve.client.failures import explain
from serve.errors import ServeError
from serve.server.settings import LISTEN

SECONDS = 3.0


@click.command()
@click.argument("address", default=LISTEN)
@flags.tls
def main(address: str, **options: Any) -> None:
    """Ask the server at ADDRESS for its health, print it, and exit with 0 where it is SERVING, otherwise with 1."""
    how = Options(**options)
    try:
        secure = how.credentials()
        check_address(address)
    except ServeError as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="ADDRESS") from None
    with grpc.secure_channel(address, secure) if secure else grpc.insecure_channel(address) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs leave the calls out
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            raise click.ClickException(str(explain(address, error, how))) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    click.echo(f"{address}: {status}", err=True)
    raise SystemExit(int(reply.status != health_pb2.HealthCheckResponse.SERVING))


if __name__ == "__main__":
    main()
