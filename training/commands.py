"""What the commands share: help that shows all options, and one line where a package is missing or an option idle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from click.core import ParameterSource
from click_default_group import DefaultGroup

from training.backend import check
from training.errors import TrainingError


class Group(DefaultGroup):
    """A group whose help shows the options of its default command too: most people who ask for help want those."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the default command, then the group's own and its commands."""
        name = self.default_cmd_name or ""
        with click.Context(self.commands[name], ctx, name) as its:
            records = [each.get_help_record(its) for each in its.command.params if isinstance(each, click.Option)]
        with formatter.section(f"Options of {name}"):
            formatter.write_dl([record for record in records if record])
        super().format_options(ctx, formatter)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Say in one line that KERAS_BACKEND is no backend, or which extra is missing; decorates a command's function.

    Raises:
        click.ClickException: KERAS_BACKEND names no backend, or a package could not be imported.
    """
    try:
        check()
        yield
    except TrainingError as error:
        raise click.ClickException(str(error)) from None
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("jax", "torch"):  # the extra of a backend; TensorFlow is in train
            extra = missing
        gpu = " (or jax-gpu)" if extra == "jax" else ""
        raise click.ClickException(
            f"{error}; install the extra: pip install '.[{extra}]'{gpu} in the checkout"
        ) from None


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
