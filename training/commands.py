"""What the commands share: one line where a package is not installed, or where an option would change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.core import ParameterSource


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say in one line which extra a command lacks; decorates the command's function.

    Raises:
        click.ClickException: a package could not be imported.
    """
    try:
        yield
    except ImportError as error:
        raise click.ClickException(f"{error}; install the extra: pip install 'balanced-vae[{extra}]'") from None


def refuse(parameters: tuple[str, ...], why: str) -> None:
    """Refuse options that would change nothing; call it where that is so.

    Args:
        parameters: Names of the command's parameters.
        why: What to say after the option's name.

    Raises:
        click.UsageError: one of them was typed. Its default, or a value from elsewhere, is nobody's mistake.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        typed = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if typed and parameter.name in parameters:
            raise click.UsageError(f"{parameter.opts[0]} {why}")
