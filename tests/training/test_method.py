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
from training.autoencoder import VAE
from training.balance import Annealed, Computed, Fixed, Learned, policy
from training.recipe import BALANCES, FIRST_STAGES, Recipe
from training.recipes import recipe
from training.twostage import Posteriors, image_autoencoder, in_units_of, latent_vae

Errors = st.lists(st.floats(0, 4, width=32), min_size=1, max_size=30)


def built(balance: keras.layers.Layer) -> keras.layers.Layer:
    balance.build(())
    return balance


@given(errors=Errors, minimum=st.booleans())
@settings(max_examples=30, deadline=None)
def test_computed_gamma_is_the_root_of_the_lowest_running_error(errors: list[float], minimum: bool) -> None:
    balance = built(Computed(minimum=minimum))
    m, highest = 1.0, 1.0
    for error in errors:
        running = 0.99 * m + 0.01 * error
        m = min(m, running) if minimum else running
        gamma, share = balance(keras.ops.convert_to_tensor(error, "float32"), training=True)
        assert float(gamma) == pytest.approx(math.sqrt(m), rel=1e-4)
        assert float(share) == 1
        assert not minimum or float(balance.m) <= highest
        highest = float(balance.m)
    still = balance(keras.ops.zeros(()), training=False)[0]
    assert float(still) == pytest.approx(math.sqrt(m), rel=1e-4)  # only training moves it


def test_fixed_gamma_never_moves_and_annealing_raises_the_share() -> None:
    fixed, annealed = built(Fixed(0.3)), built(Annealed(0.3, steps=4))
    for step in range(6):
        for balance, wanted in ((fixed, 1.0), (annealed, min(1.0, step / 4))):
            gamma, share = balance(keras.ops.convert_to_tensor(0.01 * step), training=True)
            assert float(gamma) == pytest.approx(0.3)
            assert float(share) == pytest.approx(wanted)
    assert float(annealed(keras.ops.ones(()), training=False)[1]) == 1


@pytest.mark.parametrize("error", [0.5, 0.02])
def test_the_closed_form_optimum_is_where_learning_arrives(error: float) -> None:
    """On a frozen network the learned gamma converges to the root of the error, and so does the computed one."""
    encoder, decoder = Constant(0.0, 0.0, shape=(3,)), Constant(math.sqrt(error), shape=(2, 2, 3))
    x = np.zeros((8, 2, 2, 3), np.float32)
    gammas = []
    for balance, steps in ((Learned(), 400), (Computed(), 1500)):
        vae = VAE(encoder, decoder, balance)
        vae.compile(optimizer=keras.optimizers.Adam(0.05), jit_compile=False)
        logs = vae.fit(np.repeat(x, steps, axis=0), batch_size=8, shuffle=False, verbose=0).history
        assert logs["blown"] == [0]
        gammas.append(float(balance(keras.ops.zeros(()), training=False)[0]))
    assert gammas == pytest.approx([math.sqrt(error)] * 2, rel=0.01)


def test_every_policy_of_the_recipe_exists() -> None:
    wanted = recipe("smoke").set(["gamma=0.5", "gamma2=0.25", "anneal_epochs=3"])
    kinds = {}
    for name in BALANCES:
        one, two = (policy(wanted.set([f"balance={name}", f"balance2={name}"]), stage, steps=7) for stage in (1, 2))
        assert type(one) is type(two)
        kinds[name] = one, two
    assert len({type(one) for one, _ in kinds.values()}) == len(BALANCES)
    assert [each.value for each in kinds["fixed"]] == [0.5, 0.25]
    assert kinds["annealed"][0].steps == 21


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
    vae = VAE(encoder, decoder, Computed(), kl_weight=k, peak=255.0)
    x = np.full((5, 2, 2, 3), 255, np.uint8)
    loss = float(vae.compute_loss(x, y_pred=vae(x), training=True))
    gamma2 = 0.99 + 0.01 * mse
    kl = 0.5 * latents * (1 + math.exp(-2) + 2 - 1)
    likelihood = values * (mse / (2 * gamma2) + 0.5 * math.log(gamma2) + 0.5 * math.log(2 * math.pi))
    assert loss == pytest.approx(k * kl + likelihood, rel=1e-5)


SMALL = ["side=16", "num_scale=2", "base_dim=4", "fc_dim=8", "latent_dim=4"]


def loss(model: keras.Model, x: np.ndarray) -> float:
    return float(model.compute_loss(x, y_pred=model(x), training=False))


@pytest.mark.parametrize(
    ("setting", "network", "weighed"),
    [
        ("l2_down", "encoder", lambda name: name.startswith("down")),
        ("l2_up", "decoder", lambda name: name.startswith("up")),
        ("l2_scale", "decoder", lambda name: name.startswith("scale") and name.endswith(("_conv", "_shortcut"))),
    ],
)
def test_l2_really_enters_the_loss(setting: str, network: str, weighed: object) -> None:
    x = np.zeros((2, 16, 16, 3), np.uint8)
    free, heavy = (image_autoencoder(recipe("celeba-model1").set([*SMALL, f"{setting}={l2}"])) for l2 in (0, 0.5))
    layers = [layer for layer in getattr(heavy, network).layers if weighed(layer.name)]
    assert layers
    penalty = 0.5 * sum(float(np.square(layer.get_weights()[0]).sum()) for layer in layers)
    assert loss(heavy, x) - loss(free, x) == pytest.approx(penalty, rel=1e-3)


def test_l2_shrinks_the_weights_it_weighs() -> None:
    """Not only in the loss's value: its gradient arrives."""
    x = np.zeros((32, 16, 16, 3), np.uint8)
    norms = []
    for l2 in (0.0, 10.0):
        model = image_autoencoder(recipe("celeba-model1").set([*SMALL, f"l2_up={l2}"]))
        model.compile(optimizer=keras.optimizers.Adam(0.01), jit_compile=False)
        model.fit(x, batch_size=4, epochs=3, shuffle=False, verbose=0)
        norms.append(float(np.square(model.decoder.get_layer("up16").get_weights()[0]).sum()))
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize("name", FIRST_STAGES[1:])
def test_deterministic_losses_are_the_papers(name: str) -> None:
    """loss = mse + beta |z|^2 / 2 + lambda REG."""
    wanted = recipe("smoke").set([f"first_stage={name}", "embedding=0.25", "regularisation=0.125"])
    model = image_autoencoder(wanted)
    x = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    reconstruction, z = (np.asarray(each) for each in model(x))
    mse = np.mean((x / 255 - reconstruction) ** 2)
    expected = mse + (0 if name == "ae" else 0.25 * np.mean(np.sum(z**2, axis=1)) / 2)
    if name == "rae-l2":
        kernels = [weight for weight in model.decoder.weights if weight.name == "kernel"]
        expected += 0.125 * sum(float(np.square(kernel).sum()) for kernel in kernels)
    if name == "rae-gp":
        expected += 0.125 * jacobian_norm(model.decoder, z)
    assert loss(model, x) == pytest.approx(expected, rel=0.25 if name == "rae-gp" else 1e-4)


def jacobian_norm(decoder: keras.Model, z: np.ndarray) -> float:
    """The mean squared Frobenius norm of the decoder's Jacobian, latent by latent."""
    total, step = 0.0, 1e-2
    for direction in np.eye(z.shape[1], dtype=np.float32):
        moved, here = np.asarray(decoder(z + step * direction)), np.asarray(decoder(z))
        total += float(np.mean(np.sum(((moved - here) / step) ** 2, axis=(1, 2, 3))))
    return total


def test_spectral_normalisation_holds_every_kernel_at_norm_one() -> None:
    model = image_autoencoder(recipe("smoke").set(["first_stage=rae-sn", "lr=0.05"]))
    model.compile(optimizer=keras.optimizers.Adam(1e-3), jit_compile=False)
    x = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    model.fit(x, batch_size=16, epochs=10, shuffle=False, verbose=0)
    wrapped = [layer for layer in model.decoder.layers if isinstance(layer, keras.layers.SpectralNormalization)]
    assert len(wrapped) == 1 + 3 * (1 + 3) + 1  # stem, three scales of up and three convolutions, pixels
    for layer in wrapped:
        kernel = layer.layer.get_weights()[0]
        assert np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2) == pytest.approx(1, abs=0.1)


def test_a_second_stage_over_standardised_latents_is_one_over_latents() -> None:
    rng = np.random.default_rng(0)
    latents = (rng.standard_normal((50, 8)) * 5 + 3).astype(np.float32)
    seen, centre, spread = Posteriors(latents, np.zeros_like(latents)).standardised()
    assert np.allclose((seen.mean.mean(axis=0), seen.mean.std(axis=0)), ([0], [1]), atol=1e-5)
    vae = latent_vae(recipe("smoke"))
    before = [np.asarray(each) for each in (*vae.encoder(seen.mean), vae.decoder(seen.mean))]
    in_units_of(vae, centre, spread)
    after = [np.asarray(each) for each in (*vae.encoder(latents), vae.decoder(seen.mean))]
    before[2] = before[2] * spread + centre
    for one, two in zip(before, after, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_a_vaes_latents_are_taken_as_they_are() -> None:
    latents = np.full((5, 2), 7, np.float32)
    seen, centre, spread = Posteriors(latents, np.ones_like(latents)).standardised()
    assert np.array_equal(seen.mean, latents)
    assert (centre.any(), spread.min(), spread.max()) == (False, 1, 1)


def test_the_networks_are_those_of_the_paper() -> None:
    assert networks.image_decoder(recipe("celeba")).count_params() == pytest.approx(16.0e6, rel=0.01)
    assert networks.latent_decoder(recipe("celeba")).count_params() == pytest.approx(34e6, rel=0.02)


@pytest.mark.parametrize(("side", "channels", "scales"), [(16, 1, 1), (32, 3, 5), (128, 3, 2), (256, 1, 6)])
def test_any_power_of_two_and_grey(side: int, channels: int, scales: int) -> None:
    wanted = Recipe("x", side=side, channels=channels, num_scale=scales, base_dim=2, fc_dim=8, latent_dim=4)
    vae = image_autoencoder(wanted)
    reconstruction, mean, log_sd = vae(np.zeros((2, side, side, channels), np.uint8))
    assert reconstruction.shape == (2, side, side, channels)
    assert mean.shape == log_sd.shape == (2, 4)
    assert latent_vae(wanted).decoder(mean).shape == (2, 4)


def test_the_kl_weight_keeps_cifars_balance() -> None:
    assert recipe("cifar10").k == 1
    assert recipe("celeba").k == 4
    assert recipe("celeba-model4").k == 1  # table 3 was made before the factor


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
