"""Environment variables of Keras and TensorFlow. Both read them once, when they are imported."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import LazyLoader
from pathlib import Path
from types import ModuleType

from training.errors import TrainingError

BACKENDS = ("tensorflow", "jax", "torch")
NVIDIA_DRIVER = Path("/dev/nvidiactl")

# Parts of Keras that nothing here uses: they load scikit-learn, SciPy's statistics and pyplot, once they are used.
_SELDOM = {"keras.src.visualization", "keras.visualization", "keras.wrappers"}
_SELDOM |= {f"keras._tf_keras.{name}" for name in ("keras.visualization", "keras.wrappers")}
# What Keras and TensorFlow load where it is installed, to take data frames and to convert models of another library.
_OPTIONAL = {"jax", "pandas"}

# Repeats the lines of its input that do not match; a process, so that what is said before a crash is still said.
_REPEAT = """
import re, sys
for line in sys.stdin.buffer:
    if not re.match(sys.argv[1].encode(), line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def check() -> None:
    """See that KERAS_BACKEND, where it is set, names a backend that trains.

    Raises:
        TrainingError: it names none.
    """
    name = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if name not in BACKENDS:
        raise TrainingError(f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, or not be set. Received: {name!r}")


def set_defaults() -> None:
    """Set our defaults for the variables that the user has not set, and keep the import of TensorFlow quiet.

    Every subpackage that uses Keras calls this in its __init__, which runs before anything in it imports Keras.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # Errors alone; and not even these where there is no GPU, since that is the error that is reported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if NVIDIA_DRIVER.exists() else "3")
    # TensorFlow leaves oneDNN off on processors without AVX-512, where it trains three times faster too.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # A resumed run must be equal, bit by bit, to one that was never stopped.
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _Finder())


def spare() -> None:
    """Have Keras load sooner, without what none of our commands uses.

    For processes that are such a command: in others, somebody may train on data frames, or wait for garbage to be
    collected that is older than Keras.
    """
    _Finder.sparing = True


class _Finder(MetaPathFinder):
    """Finds Keras and TensorFlow as Python would, whoever imports them first, and has `_Loader` load them."""

    sparing = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tensorflow" and not (self.sparing and fullname in {"keras", *_SELDOM}):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec and spec.origin and spec.loader:
            spec.loader = LazyLoader(spec.loader) if fullname in _SELDOM else _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Loads TensorFlow quietly, and Keras, where it is to spare, without what takes long and is not used.

    Its libraries log as they are loaded, before they have read TF_CPP_MIN_LOG_LEVEL.
    """

    def exec_module(self, module: ModuleType) -> None:
        # Errors stay at any level: what ends an import says why.
        unwanted = {"1": "I", "2": "IW", "3": "IW"}.get(os.environ.get("TF_CPP_MIN_LOG_LEVEL", ""))
        pattern = rf"[{unwanted}]\d{{4}} [\d:.]+ |WARNING: All log messages before absl::InitializeLog"
        loud = module.__name__ != "tensorflow" or not unwanted
        with ExitStack() as stack:
            if not loud:
                stack.enter_context(_without(pattern))
            if _Finder.sparing:
                stack.enter_context(_absent(_OPTIONAL - {os.environ["KERAS_BACKEND"]}))
                stack.enter_context(_uncollected())
            super().exec_module(module)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector of garbage from what is loaded meanwhile: it stays, and looking through it takes seconds."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextmanager
def _absent(names: set[str]) -> Iterator[None]:
    """Have imports of modules that are not loaded yet fail, as if they were not installed."""
    hidden = names - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is Python's mark of what is not there
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def _without(pattern: str) -> Iterator[None]:
    """Leave out lines that begin so of what this process, its libraries included, writes to stderr."""
    kept = os.dup(2)
    words = [sys.executable, "-ISc", _REPEAT, pattern]
    # A session of its own: Ctrl-C is for us, and it ends when we close the pipe.
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as repeater:  # noqa: S603
        assert repeater.stdin
        os.dup2(repeater.stdin.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
