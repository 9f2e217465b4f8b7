"""The errors that a user can do something about. Every message is one line that says what to do."""


class TrainingError(Exception):
    """Base of the errors below; commands print it and exit with 1."""


class DataError(TrainingError):
    """The pictures cannot be trained on."""


class RecipeError(TrainingError):
    """A recipe's name or one of its settings is not valid."""


class RunError(TrainingError):
    """A run directory belongs to another run, or is not complete."""


class WriteError(TrainingError):
    """A file cannot be written: a full disk, a missing permission. What was there before is kept."""


class Diverged(TrainingError):
    """A loss term or weight became NaN or infinite. The last saved state is kept."""
