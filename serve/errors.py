"""What can go wrong while sampling.

ServeError
  BundleError      the model file is not one that we run
  EngineError      the machine cannot run the model
  JobError         the output folder cannot take the samples
  RemoteError      the server refused, or is not there
"""


class ServeError(Exception):
    """Base of the errors below. Messages are one line that says what to do."""


class BundleError(ServeError):
    """A file is not a bundle: no ONNX, not self-contained, or of another schema."""


class EngineError(ServeError):
    """A bundle cannot be run here: no runtime, or no such device."""


class JobError(ServeError):
    """A folder holds another job's files, or cannot be written."""


class RemoteError(ServeError):
    """A server is not reachable or refused the request."""
