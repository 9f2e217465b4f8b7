"""The errors of sampling.

ServeError
  BundleError      the model file is not one that we run
  EngineError      the machine cannot run the model
  JobError         the output folder cannot take the samples
  SettingsError    the server's configuration cannot work
  RemoteError      a server did not do what it was asked
    Unreachable    no server answers, or the connection broke and did not come back
    Overloaded     the server, or the caller's allowance, stayed full
    Denied         the token, or the certificate, is missing or does not allow this
    Rejected       the request is wrong: the message says what to change (a ValueError as well)
    Changed        the model is another one than when the client first asked
    TimedOut       the deadline passed
    Closed         the client was closed, before or meanwhile
    Broken         the server failed, or is not serve-vae
"""

from __future__ import annotations

from serve.text import one_line


class ServeError(Exception):
    """Base of the errors below. Messages are one line that says what to do.

    They may quote files and servers, so it is seen to here: whatever is not printable is escaped, and a message of
    over a thousand characters loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class BundleError(ServeError):
    """A file is not a bundle: no ONNX, not self-contained, or of another schema."""


class EngineError(ServeError):
    """A bundle cannot be run here: no runtime, or no such device."""


class JobError(ServeError):
    """A folder holds another job's files, or cannot be written."""


class SettingsError(ServeError):
    """A server cannot be started like this: flags that contradict each other, a file that cannot be used."""


class RemoteError(ServeError):
    """Base of what a client raises about its server.

    Attributes:
        retry_after: Seconds after which a server that answers, and cannot do it yet, is to be asked again; 0 of others.
    """

    retry_after = 0.0


class Unreachable(RemoteError):
    """No server answers at the address, or the connection broke and did not come back in time."""


class Overloaded(RemoteError):
    """The server, or the caller's allowance, is full and stayed so while the client was ready to wait."""


class Denied(RemoteError):
    """The token or certificate is missing, unknown, or does not allow the call."""


class Rejected(RemoteError, ValueError):
    """The request is wrong: no such model, or an argument that no model takes; so it is a ValueError too."""


class Changed(RemoteError):
    """The model that the client began with is no longer there."""


class TimedOut(RemoteError):
    """The deadline passed before the server had answered."""


class Closed(RemoteError):
    """The client was closed, before the call or while it was under way."""


class Broken(RemoteError):
    """The server failed, or what listens is not serve-vae."""
