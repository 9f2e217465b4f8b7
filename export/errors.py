"""The errors of an export. Every message is one line that says what to do."""


class ExportError(Exception):
    """Base of the errors below; the command prints it and exits with 1."""


class ConversionError(ExportError):
    """The chain does not become the graph that a bundle must be."""


class VerificationError(ExportError):
    """The graph does not compute what it should, or not always the same. Nothing is written."""


class LimitError(ExportError):
    """A precision's samples are further from fp32's than the limits allow. Nothing is written."""
