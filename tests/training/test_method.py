"""The method: the balance, the loss, the networks, against the paper's own formulas."""

from __future__ import annotations

import os
import tracemalloc

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow
from hypothesis import given, settings
from hypothesis import strategies as st

from training.model import latents, networks
from training.model.autoencoder import VAE
from training.model.balance import Annealed, Computed, Fixed, Learned, policy
from training.model.build import image_autoencoder, in_units_of, latent_vae, plain_images
from training.model.latents import Posteriors
from training.model.spectral import SpectrallyNormalised
from training.model.tangent import along
from training.recipe import BALANCES, FIRST_STAGES, Recipe
from training.recipes import recipe
from training.record.stage import Schedule

Errors = st.lists(st.floats(0, 4, width=32), min_size=1, max_size=30)


def built(balance: keras.layers.Layer) -> keras.layers.Layer:
    balance.build(())
    return balance


def after(balance: Computed, *errors: float) -> float:
    """gamma^2 after minibatches of these errors."""
    for error in errors:
        gamma, share = balance(keras.ops.convert_to_tensor(error, "float32"), training=True)
        assert float(share) == 1
    assert float(balance(keras.ops.zeros(()), training=False)[0]) == float(gamma)  # only training moves it
    return float(gamma) ** 2


def test_computed_gamma_by_hand() -> None:
    """The paper's rule from m = 1, worked out on paper: a fall, a rise that the minimum refuses, a fall."""
    balance = built(Computed())
    assert [after(balance, error) for error in (0.5, 4.0, 0.0)] == pytest.approx([0.995, 0.995, 0.98505])
    balance = built(Computed(minimum=False))
    assert [after(balance, error) for error in (0.5, 4.0, 0.0)] == pytest.approx([0.995, 1.02505, 1.0147995])
    assert after(built(Computed(momentum=0.5)), 0.5, 0.5) == pytest.approx(0.625)


@given(error=st.floats(0, 1, width=32), momentum=st.floats(0, 0.999), count=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_computed_gamma_decays_to_a_constant_error(error: float, momentum: float, count: int) -> None:
    """In closed form: what is left of the way from 1 to the error is momentum^count."""
    expected = error + (1 - error) * momentum**count
    for minimum in (True, False):
        assert after(built(Computed(momentum, minimum)), *[error] * count) == pytest.approx(
            expected, rel=1e-3, abs=1e-6
        )


@given(errors=Errors)
@settings(max_examples=20, deadline=None)
def test_computed_gamma_only_falls_and_never_below_the_lowest_error(errors: list[float]) -> None:
    lowest, running = built(Computed()), built(Computed(minimum=False))
    seen = [1.0]
    for error in errors:
        seen.append(after(lowest, error))
        assert seen[-1] <= after(running, error) * (1 + 1e-5)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] >= min([1.0, *errors]) * (1 - 1e-5)


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
        assert logs["non_finite"] == [0]
        gammas.append(float(balance(keras.ops.zeros(()), training=False)[0]))
    assert gammas == pytest.approx([math.sqrt(error)] * 2, rel=0.01)


def test_every_policy_of_the_recipe_exists() -> None:
    wanted = replace(recipe("smoke"), gamma=0.5, gamma2=0.25, anneal_epochs=3)
    kinds = {}
    for name in BALANCES:
        one, two = (policy(replace(wanted, balance=name, balance2=name), stage, steps=7) for stage in (1, 2))
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
    vae = VAE(encoder, decoder, Computed(), kl_weight=k, input_scale=255.0)
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
    model = image_autoencoder(replace(recipe("smoke"), first_stage=name, embedding=0.25, regularisation=0.125))
    x = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)
    reconstruction, z = (np.asarray(each) for each in model(x)[:2])
    mse = np.mean((x / 255 - reconstruction) ** 2)
    expected = mse + (0 if name == "ae" else 0.25 * np.mean(np.sum(z**2, axis=1)) / 2)
    if name == "rae-l2":
        kernels = [weight for weight in model.decoder.weights if weight.name == "kernel"]
        expected += 0.125 * sum(float(np.square(kernel).sum()) for kernel in kernels)
    if name == "rae-gp":
        expected += 0.125 * jacobian_norm(model.decoder, z)
        x = np.tile(x, (100, 1, 1, 1))  # directions enough for their mean
    assert loss(model, x) == pytest.approx(expected, rel=0.02 if name == "rae-gp" else 1e-4)


def jacobian_norm(decoder: keras.Model, z: np.ndarray) -> float:
    """The mean squared Frobenius norm of the decoder's Jacobian."""
    with tensorflow.GradientTape() as tape:
        latents = tensorflow.constant(z)
        tape.watch(latents)
        images = decoder(latents)
    return float(np.mean(np.sum(np.square(tape.batch_jacobian(images, latents)), axis=(1, 2, 3, 4))))


@pytest.mark.parametrize("training", [False, True])
def test_a_slope_and_its_gradient_are_those_of_automatic_differentiation(training: bool) -> None:
    """Of a decoder that has learned something, in float32; and in bfloat16 as near as that can be."""
    wanted = recipe("smoke").set(["first_stage=rae-gp"])
    model = image_autoencoder(wanted)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), jit_compile=False)
    x = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    model.fit(x, batch_size=16, epochs=5, shuffle=False, verbose=0)
    z = tensorflow.convert_to_tensor(model(x)[1])
    direction = tensorflow.constant(np.random.default_rng(1).standard_normal(z.shape), tensorflow.float32)
    half = image_autoencoder(replace(wanted, precision="mixed_bfloat16")).decoder
    half.set_weights(model.decoder.get_weights())
    plain = image_autoencoder(wanted).decoder
    plain.set_weights(model.decoder.get_weights())

    def reference() -> tuple[tensorflow.Tensor, tensorflow.Tensor]:
        with tensorflow.autodiff.ForwardAccumulator(z, direction) as accumulator:
            images = model.decoder(z, training=training)
        return images, accumulator.jvp(images)

    def penalty_and_gradient(decoder: keras.Model, slope: Callable[[], tuple[object, ...]]) -> tuple[np.ndarray, ...]:
        weights = [weight.value for weight in decoder.trainable_weights]
        with tensorflow.GradientTape() as tape:
            images, moved = slope()
            penalty = tensorflow.reduce_mean(tensorflow.reduce_sum(tensorflow.square(moved), axis=(1, 2, 3)))
        gradients = tape.gradient(penalty, weights, unconnected_gradients="zero")
        statistics = [np.ravel(weight) for weight in decoder.non_trainable_weights]
        flat = np.concatenate([np.ravel(gradient) for gradient in gradients])
        return np.asarray(images), np.asarray(penalty), flat, np.concatenate(statistics)

    exact = penalty_and_gradient(model.decoder, reference)
    ours = penalty_and_gradient(plain, lambda: along(plain, z, direction, training))
    rough = penalty_and_gradient(half, lambda: along(half, z, direction, training))
    for found, near in ((ours, (1e-5, 0.01, 1e-5)), (rough, (0.03, 0.1, 0.01))):
        assert found[1] == pytest.approx(exact[1], rel=near[0])
        assert np.linalg.norm(found[2] - exact[2]) < near[1] * np.linalg.norm(exact[2])
        np.testing.assert_allclose(found[0], exact[0], atol=5 * near[2])
        np.testing.assert_allclose(found[3], exact[3], atol=near[2])  # batch norm's, moved once


def test_a_network_is_a_function_of_its_recipe_alone() -> None:
    """Not of what was built before it, nor of Keras' globals - which stay what they are."""
    wanted = recipe("smoke").set(["first_stage=rae-sn", "precision=mixed_bfloat16"])
    before = keras.config.dtype_policy().name
    one = image_autoencoder(wanted), latent_vae(wanted)
    keras.utils.set_random_seed(7)
    two = latent_vae(wanted), image_autoencoder(wanted)
    assert keras.config.dtype_policy().name == before == "float32"
    for first, second in zip(one, reversed(two), strict=True):
        for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
            assert np.array_equal(a, b)
    other = image_autoencoder(wanted.set(["seed=1"]))
    assert not np.array_equal(other.decoder.get_weights()[0], one[0].decoder.get_weights()[0])
    heads = {"images", "mean", "latents"}
    computed = {
        layer.name: getattr(layer, "layer", layer).compute_dtype  # of what is spectrally normalised
        for network in (one[0].encoder, one[0].decoder)
        for layer in network.layers
        if not isinstance(layer, keras.layers.InputLayer)
    }
    assert {name for name, dtype in computed.items() if dtype == "float32"} <= heads
    assert set(computed.values()) == {"float32", "bfloat16"}
    for network in (one[1].encoder, one[1].decoder):
        assert {layer.compute_dtype for layer in network.layers} == {"float32"}


def test_spectral_normalisation_holds_every_kernel_at_norm_one() -> None:
    """In what is kept, too: and what is kept makes the same pictures."""
    chosen = recipe("smoke").set(["first_stage=rae-sn", "lr=0.05"])
    model = image_autoencoder(chosen)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), jit_compile=False)
    x = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    model.fit(x, batch_size=16, epochs=10, shuffle=False, verbose=0)
    kept = plain_images(model, chosen).get_layer("decoder")
    kernels = [layer.get_weights()[0] for layer in kept.layers if hasattr(layer, "kernel")]
    assert len(kernels) == 1 + 3 * (1 + 2) + 1  # stem, three scales of up and two convolutions, pixels
    latents = np.random.default_rng(1).standard_normal((4, 8), np.float32)
    np.testing.assert_allclose(kept(latents, training=False), model.decoder(latents, training=False), atol=1e-5)
    for kernel in kernels:
        assert np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("layer", [keras.layers.Dense(5), keras.layers.Conv2D(5, 3, padding="same")])
def test_a_divided_kernel_is_the_same_in_training_and_after_it(layer: keras.layers.Layer) -> None:
    """And the kernel itself is only the optimizer's to change, as it has to be on JAX."""
    divided = SpectrallyNormalised(layer)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    divided(x)
    before = layer.kernel.numpy()
    for _ in range(30):
        trained = divided(x, training=True)
    assert np.array_equal(before, layer.kernel.numpy())
    np.testing.assert_allclose(divided(x, training=False), trained, rtol=1e-4, atol=1e-5)
    largest = np.linalg.norm(before.reshape(-1, 5), 2)
    layer.kernel.assign(before / largest)
    np.testing.assert_allclose(layer(x), trained, rtol=1e-3, atol=1e-4)


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


def test_large_pictures_go_through_a_network_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []

    class Twice(keras.layers.Layer):  # type: ignore[misc]  # Keras ships no types
        def call(self, x: Any) -> Any:
            seen.append(x.shape[0])
            return 2 * x

    images = keras.Input((8, 8, 3))
    network = keras.Model(images, Twice()(images))
    seen.clear()
    items = np.random.default_rng(0).uniform(size=(10, 8, 8, 3)).astype(np.float32)
    monkeypatch.setattr(latents, "MOST_VALUES", 4 * 8 * 8 * 3)
    (made,) = latents.infer(network, items)
    assert np.array_equal(made, 2 * items)
    assert seen == [4, 4, 2]
    seen.clear()
    whole = (items * 255).astype(np.uint8)
    (made,) = latents.infer(network, whole, 255)
    assert np.array_equal(made, 2 * (whole.astype(np.float32) / np.float32(255)))


def test_large_pictures_are_compared_in_little_memory() -> None:
    """They are some GB: whatever is made of all of them in float32 at once is four times that, and may be too much."""
    from training.fit.two_stage import variance

    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (200, 64, 64, 3), np.uint8)
    decoded = (pictures / 255 + 0.1).astype(np.float32)
    tracemalloc.start()
    error, spread = latents.squared_error(pictures, 255, decoded), variance(pictures)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < pictures.nbytes
    assert error == pytest.approx(0.01, rel=1e-5)
    assert spread == pytest.approx(np.var(pictures, axis=0).mean())


def test_what_is_recorded_of_an_epoch_is_of_pictures_from_all_over() -> None:
    """Files are sorted: the first may be of one class."""
    from training.fit.stage import _some

    class Numbers:
        def __len__(self) -> int:
            return 100

        def batch(self, indices: Any, rng: Any) -> Any:
            return indices

    some = _some(Numbers(), Schedule(1, 100, 1, 10, 1e-3, 1, seed=0), 5)
    assert some.tolist() == [0, 24, 49, 74, 99]
