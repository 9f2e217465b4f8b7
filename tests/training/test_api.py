"""training as a library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import training
from training import RECIPES, Run, load_data, train


def test_importing_training_changes_no_environment_and_loads_no_keras() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import training\n"
        "assert dict(os.environ) == before\n"
        "loaded = [name for name in ('keras', 'tensorflow', 'numpy') if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ["model", "fit", "record", "evaluation"])
def test_whichever_room_comes_first_sets_what_keras_reads(room: str) -> None:
    """And what the user has set stays."""
    code = (
        "import os, sys; os.environ.pop('KERAS_BACKEND', None); os.environ['TF_ENABLE_ONEDNN_OPTS'] = '0'\n"
        f"import training.{room}\n"
        "assert 'keras' not in sys.modules\n"
        "assert (os.environ['KERAS_BACKEND'], os.environ['TF_DETERMINISTIC_OPS']) == ('tensorflow', '1')\n"
        "assert os.environ['TF_ENABLE_ONEDNN_OPTS'] == '0'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_is_loaded_without_its_notes_and_with_its_errors(tmp_path: Path) -> None:
    """A stand-in logs as TensorFlow's libraries do as they are loaded, and crashes as they do on an old processor."""
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\n"
        "os.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n')\n"
        "os.write(2, b'I0000 00:00:1795641342.559776   11726 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "os.write(2, b'W0000 00:00:1795641342.560185   11726 one.cc:31] a warning\\n')\n"
        "os.write(2, b'E0000 00:00:1795641342.560185   11726 one.cc:32] an error\\n')\n"
        "print('of Python', file=sys.stderr, flush=True)\n"
        "os.write(2, b'F0000 00:00:1795641342.560185   11726 one.cc:33] no AVX')\n"
        "os.abort()\n"
    )
    said = {}
    for level in ("", "0", "1"):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
        environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
        code = "import training.model, tensorflow"
        full = environment | ({"TF_CPP_MIN_LOG_LEVEL": level} if level else {})
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full)
        assert result.returncode == -signal.SIGABRT
        said[level] = [line.split("] ")[-1] for line in result.stderr.splitlines()]
    assert said[""] == ["an error", "of Python", "no AVX"]
    assert said["1"] == ["a warning", "an error", "of Python", "no AVX"]
    assert len(said["0"]) == 6


def test_keras_is_loaded_without_what_nothing_here_uses_and_has_it_when_asked() -> None:
    code = (
        "import gc, sys, training.backend\n"
        "training.backend.spare()\n"
        "import training.model, keras\n"
        "heavy = {'jax', 'matplotlib.pyplot', 'pandas', 'scipy.stats', 'sklearn'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "assert gc.isenabled()\n"
        "assert keras.wrappers.SKLearnClassifier and keras.visualization.plot_image_gallery\n"
        "import sklearn.mixture, matplotlib.pyplot, pandas\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})


def test_every_public_name_is_there() -> None:
    for name in training.__all__:
        assert getattr(training, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = training.nothing


def test_a_recipe_is_trained_and_gone_on_with(pictures: Path, tmp_path: Path) -> None:
    recipe, out = RECIPES["smoke"]().set(["epochs=1", "epochs2=1"]), tmp_path / "run"
    run = train(recipe, pictures, out)
    assert isinstance(run, Run)
    assert run.priors == ("normal", "second-stage")
    assert run.recipe == recipe
    assert [record["stage"] for record in run.history()] == [1, 2]
    assert {path.name for path in out.iterdir()} >= {"figures", "samples", "tensorboard", "stage1.keras"}
    again = train(recipe, load_data(pictures, recipe), out)  # there is nothing left to do
    assert again.history() == run.history()
