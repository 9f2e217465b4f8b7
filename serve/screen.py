"""Pictures in a terminal: as pixels where it takes those (Kitty's protocol, Sixel), else in coloured half blocks."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from serve.errors import ServeError

if TYPE_CHECKING:
    from serve.model import Images

HALF_BLOCKS = 20  # cells that a picture is wide at least: that many pixels, of which a face takes about these
PIXELS = 12  # the same, where a cell has many
WIDEST = 256  # cells: Kitty's protocol numbers no more than 297


def there() -> bool:
    """Tell whether somebody looks: stdin and stdout are a terminal that has a size and colours.

    Stdin, since a terminal is asked there what it can draw.
    """
    try:
        asked = sys.stdin.isatty() and sys.stdout.isatty()
        return asked and os.get_terminal_size(sys.stdout.fileno()).columns > 0 and os.environ.get("TERM") != "dumb"
    except (AttributeError, OSError, ValueError):  # they are closed
        return False


class Screen:
    """A terminal that somebody looks at. What it can draw is asked here, before anybody types ahead.

    Raises:
        ServeError: the library for it is not installed.
    """

    def __init__(self) -> None:
        # It would log that a terminal did not answer, with a traceback, and goes on well without.
        logging.getLogger("textual_image").setLevel(logging.ERROR)
        try:
            from textual_image.renderable import HalfcellImage, Image
        except ImportError:
            raise ServeError("--show takes pip install '.[show]' in the checkout, or textual-image") from None
        from rich.console import Console

        self._image = Image
        self._least = HALF_BLOCKS if Image is HalfcellImage else PIXELS
        self._console = Console(no_color=False, highlight=False)  # pictures are asked for: NO_COLOR is about text
        if self._console.color_system == "standard":  # as TERM=xterm and screen say, which have had 256 for long
            self._console = Console(no_color=False, highlight=False, color_system="256")

    def draw(self, images: Images, heading: str = "") -> None:
        """Print images [n, height, width, channels] in rows, each no higher than the terminal."""
        from serve.encoding import picture, sheet

        if heading:
            self._console.print(heading)
        count, height, width, _ = images.shape
        across = min(self._console.width, WIDEST)
        rows = -(-count // max(1, across // self._least))
        columns = -(-count // rows)  # of equal lengths, if need be but for the last
        most = 2 * (self._console.height - 1) * width // height  # a cell is about twice as high as wide
        each = max(1, min(across // columns, most, width if self._least == HALF_BLOCKS else self._least))
        for at in range(0, count, columns):
            row = images[at : at + columns]
            drawn = picture(sheet(row, len(row), 0)).convert("RGB")
            self._console.print(self._image(drawn, width=each * len(row), height="auto"))
