"""The method: the balance, the loss, the networks, against the paper's own formulas."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import networks
from training.balance import ComputedBalance
from training.recipes import Recipe, recipe
from training.twostage import Posteriors, image_vae, latent_vae
from training.vae import VAE


@given(errors=st.lists(st.floats(0, 4, width=32), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_gamma_is_the_root_of_the_lowest_running_error(errors: list[float]) -> None:
    balance = ComputedBalance()
    balance.build(())
    m = 1.0
    for error in errors:
        m = min(m, 0.99 * m + 0.01 * error)
        gamma = float(balance(keras.ops.convert_to_tensor(error, "float32"), training=True))
        assert gamma == pytest.approx(math.sqrt(m), rel=1e-4)
        assert float(balance.m) <= 1
    assert float(balance(keras.ops.zeros(()), training=False)) == pytest.approx(
        math.sqrt(m), rel=1e-4
    )  # only training moves it


class Constant(keras.layers.Layer):
    """An encoder or decoder that gives the same whatever comes in."""

    def __init__(self, *values: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.values, self.shape = values, shape

    def call(self, x: object, training: bool = False) -> object:
        size = keras.ops.shape(x)[0]
        outputs = [keras.ops.full((size, *self.shape), value) for value in self.values]
        return outputs if len(outputs) > 1 else outputs[0]


def test_the_loss_is_the_papers() -> None:
    """One step from m = 1: mse .25, mean 1, sd e^-1, 3 latents, 12 values, k = 4."""
    mse, latents, values, k = 0.25, 3, 12, 4.0
    encoder, decoder = Constant(1.0, -1.0, shape=(latents,)), Constant(0.5, shape=(2, 2, 3))
    vae = VAE(encoder, decoder, ComputedBalance(), kl_weight=k, peak=255.0)
    x = np.full((5, 2, 2, 3), 255, np.uint8)
    loss = float(vae.compute_loss(x, y_pred=vae(x), training=True))
    gamma2 = 0.99 + 0.01 * mse
    kl = 0.5 * latents * (1 + math.exp(-2) + 2 - 1)
    likelihood = values * (mse / (2 * gamma2) + 0.5 * math.log(gamma2) + 0.5 * math.log(2 * math.pi))
    assert loss == pytest.approx(k * kl + likelihood, rel=1e-5)


def test_l2_really_enters_the_loss() -> None:
    settings = ["side=16", "num_scale=2", "base_dim=4", "fc_dim=8", "latent_dim=4"]
    x = np.zeros((2, 16, 16, 3), np.uint8)
    weighted, free = (image_vae(recipe("celeba").set([*settings, f"l2={l2}"])) for l2 in (0.5, 0.0))
    losses = [float(vae.compute_loss(x, y_pred=vae(x), training=False)) for vae in (weighted, free)]
    parts = [weighted.encoder.get_layer("down0"), *(weighted.decoder.get_layer(f"up{side}") for side in (4, 8, 16))]
    penalty = 0.5 * sum(float(np.square(part.get_weights()[0]).sum()) for part in parts)
    assert losses[0] - losses[1] == pytest.approx(penalty, rel=1e-3)


def test_the_networks_are_those_of_the_paper() -> None:
    assert networks.image_decoder(recipe("celeba")).count_params() == pytest.approx(16.0e6, rel=0.01)
    assert networks.latent_decoder(recipe("celeba")).count_params() == pytest.approx(34e6, rel=0.02)


@pytest.mark.parametrize(("side", "channels", "scales"), [(16, 1, 1), (32, 3, 5), (128, 3, 2)])
def test_any_power_of_two_and_grey(side: int, channels: int, scales: int) -> None:
    wanted = Recipe("x", side=side, channels=channels, num_scale=scales, base_dim=2, fc_dim=8, latent_dim=4)
    vae = image_vae(wanted)
    reconstruction, mean, log_sd = vae(np.zeros((2, side, side, channels), np.uint8))
    assert reconstruction.shape == (2, side, side, channels)
    assert mean.shape == log_sd.shape == (2, 4)
    assert latent_vae(wanted).decoder(mean).shape == (2, 4)


def test_the_kl_weight_keeps_cifars_balance() -> None:
    assert recipe("cifar10").kl_weight == 1
    assert recipe("celeba").kl_weight == 4


def test_posteriors_are_drawn_anew_and_describe_the_aggregate() -> None:
    rng = np.random.default_rng(0)
    mean = (rng.standard_normal((4000, 2)) * [0.6, 0.0] + [0.5, 0.0]).astype(np.float32)
    sd = np.tile(np.float32([0.8, 1.0]), (4000, 1))
    latents = Posteriors(mean, sd)
    every = np.arange(4000)
    one, two = (latents.batch(every, np.random.default_rng(seed)) for seed in (1, 2))
    assert not np.array_equal(one, two)
    known = latents.diagnostics()
    np.testing.assert_allclose(known["aggregate_mean"], one.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(known["aggregate_variance"], one.var(axis=0), atol=0.08)
    assert known["variance_law"] == pytest.approx(1.0, abs=0.03)
    assert known["active"] == 1  # the second latent's posterior is the prior
