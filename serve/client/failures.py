"""What gRPC says of a call that failed, and what it means to whoever made it."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from serve.client.options import NAMES, Options
from serve.errors import Broken, Denied, Overloaded, Rejected, RemoteError, TimedOut, Unreachable

Code = grpc.StatusCode
KINDS: dict[grpc.StatusCode, type[RemoteError]] = {
    Code.UNAVAILABLE: Unreachable,
    Code.INVALID_ARGUMENT: Rejected,
    Code.NOT_FOUND: Rejected,
    Code.OUT_OF_RANGE: Rejected,
    Code.FAILED_PRECONDITION: Rejected,
    Code.RESOURCE_EXHAUSTED: Overloaded,
    Code.PERMISSION_DENIED: Denied,
}
# In gRPC's words (of 1.76 to 1.85) for a connection that did not come about: what they say, and what to do.
SIGNS = {
    "CERTIFICATE_VERIFY_FAILED": "the certificate that {address} shows is not of an authority that {trusted}; give its "
    "authority's certificate with --ca FILE",
    "Hostname Verification": "the certificate that {address} shows is for another name; use a name that is on it, "
    "or in Python Options(server_name=...)",
    "WRONG_VERSION_NUMBER": "what listens at {address} does not use TLS; leave out --tls, --ca, --cert and --key",
    "Failed parsing HTTP/2": "what listens at {address} is not serve-vae; check the address",
    "backend unhealthy": "no server at {address} says that it serves: they are starting, or have no model",
    "lookup error": "there is no host of the name in {address}; check the address",
}
NOBODY = ("Connection refused", "No such file or directory")  # the second, of a unix socket


def retry_delay(failure: Any) -> float | None:
    """Return what google.rpc.RetryInfo says, in seconds; None where it is not there."""
    try:
        status = rpc_status.from_call(failure)
    except (ValueError, DecodeError):  # its code is not the call's, or it is none: some proxy's work
        return None
    for detail in status.details if status else ():
        info = RetryInfo()
        if detail.Unpack(info):
            seconds: float = info.retry_delay.ToNanoseconds() / 1e9
            return seconds
    return None


def nobody_listens(address: str, failure: Any) -> bool:
    """Tell whether nothing at all is at the address: a server that is just starting looks like that."""
    # A name that stands for several servers may be given to them once the first is ready.
    signs = (*NOBODY, "lookup error") if address.startswith(NAMES) else NOBODY
    return failure.code() is Code.UNAVAILABLE and any(each in (failure.details() or "") for each in signs)


def unhealthy(failure: Any) -> bool:
    """Tell whether all servers of a name answer, and say that they do not serve: they may be loading their models."""
    return failure.code() is Code.UNAVAILABLE and "backend unhealthy" in (failure.details() or "")


def explain(address: str, failure: Any, options: Options) -> RemoteError:
    """Return an RpcError as one line that says what it is and what to try."""
    code, details = failure.code(), ((failure.details() or "").splitlines() or [""])[0]
    if code is Code.UNAVAILABLE and retry_delay(failure) is None:
        last = details.rpartition("last error: ")[2]
        return Unreachable(f"{_unreachable(address, details, options)} ({last[:250]})")
    if code is Code.UNAUTHENTICATED:
        did = "does not know the token that was sent" if options.token else "asks for a token"
        way = "give one with --token or SAMPLE_TOKEN, or in Python Options(token=...)"
        return Denied(f"the server at {address} {did}; {way} (UNAUTHENTICATED)")
    if code is Code.UNIMPLEMENTED:
        return Broken(f"what listens at {address} is not serve-vae; check the address")
    if code is Code.DEADLINE_EXCEEDED:
        return TimedOut(f"the server at {address} did not answer in time; is it serve-vae? Or allow a longer timeout")
    return KINDS.get(code, Broken)(f"the server at {address} answered {code.name}: {details}")


def _unreachable(address: str, details: str, options: Options) -> str:
    for sign, text in SIGNS.items():
        if sign in details:
            return text.format(address=address, trusted=f"is in {options.ca}" if options.ca else "this system trusts")
    if "failed to connect" in details and "Socket closed" in details:
        if not options.secure:
            return f"what listens at {address} ended the connection at once; if it uses TLS, pass --tls or --ca FILE"
        what = "does not take this client's certificate" if options.cert else "asks for this client's certificate"
        return f"the server at {address} {what}; give one of an authority that it trusts with --cert and --key"
    way = "start one there" if address.startswith(NAMES) else f"start one with: serve-vae --listen {address}"
    return f"no server answers at {address}; {way}"
