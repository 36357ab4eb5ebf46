"""Adversarial objectives against their closed forms."""

import math

import numpy as np
import pytest
import tensorflow as tf

from gan_dist import config as config_lib
from gan_dist import losses


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# e^-30: what is left of -log sigmoid(30).
TAIL = math.log1p(math.exp(-30.0))


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("logit, nats", [(0.0, math.log(2.0)), (30.0, TAIL), (-30.0, 30.0 + TAIL)])
def test_non_saturating_generator_matches_closed_form(logit, nats, dtype):
    loss_B = losses.non_saturating_generator(tf.fill([4], tf.constant(logit, dtype)))
    assert loss_B.shape == [4] and loss_B.dtype == dtype
    np.testing.assert_allclose(loss_B, nats, rtol=1e-5)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize(
    "real, fake, nats",
    [
        (0.0, 0.0, 2 * math.log(2.0)),
        (30.0, -30.0, 2 * TAIL),
        (-30.0, -30.0, 30.0 + 2 * TAIL),
        (30.0, 30.0, 30.0 + 2 * TAIL),
        (-30.0, 30.0, 60.0 + 2 * TAIL),
        (1.0, 2.0, math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0))),
    ],
)
def test_logistic_discriminator_matches_closed_form(real, fake, nats, dtype):
    real_B, fake_B = (tf.fill([4], tf.constant(x, dtype)) for x in (real, fake))
    loss_B = losses.logistic_discriminator(real_B, fake_B)
    assert loss_B.shape == [4] and loss_B.dtype == dtype
    np.testing.assert_allclose(loss_B, nats, rtol=1e-5)


@pytest.mark.parametrize("logit", [-1e4, -1e30, 1e4, 1e30])
def test_losses_and_gradients_of_very_large_logits_are_finite(logit):
    x = tf.constant([logit])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        generator = losses.non_saturating_generator(x)
        discriminator = losses.logistic_discriminator(-x, x)
    np.testing.assert_allclose(generator, [max(-logit, 0.0)], rtol=1e-6)
    np.testing.assert_allclose(discriminator, [2 * max(logit, 0.0)], rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(generator, x), [-1.0 if logit < 0 else 0.0], atol=1e-6)
    np.testing.assert_allclose(tape.gradient(discriminator, x), [2.0 if logit > 0 else 0.0], atol=1e-6)


def test_gradients_match_the_analytic_sigmoid():
    real = np.linspace(-8, 8, 33)
    fake = real[::-1] + 0.3
    real_B, fake_B = tf.constant(real), tf.constant(fake)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([real_B, fake_B])
        generator = losses.non_saturating_generator(fake_B)
        discriminator = losses.logistic_discriminator(real_B, fake_B)
    # d/dx -log sigmoid(x) = sigmoid(x) - 1;  d/dx -log(1 - sigmoid(x)) = sigmoid(x).
    np.testing.assert_allclose(tape.gradient(generator, fake_B), sigmoid(fake) - 1, rtol=1e-12)
    np.testing.assert_allclose(tape.gradient(discriminator, real_B), sigmoid(real) - 1, rtol=1e-12)
    np.testing.assert_allclose(tape.gradient(discriminator, fake_B), sigmoid(fake), rtol=1e-12)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_logits_give_float32_losses_that_keep_the_tail(dtype):
    # 9 is exact in both types; the loss is not, and would lose all but two or three digits of its tail.
    generator = losses.non_saturating_generator(tf.constant([9.0], dtype))
    discriminator = losses.logistic_discriminator(tf.constant([9.0], dtype), tf.constant([-9.0], dtype))
    assert generator.dtype == discriminator.dtype == tf.float32
    np.testing.assert_allclose(generator, [math.log1p(math.exp(-9.0))], rtol=1e-5)
    np.testing.assert_allclose(discriminator, [2 * math.log1p(math.exp(-9.0))], rtol=1e-5)


def test_every_loss_that_can_be_chosen_has_its_functions():
    choices = {s.name: s.option.choices for s in config_lib.settings()}["loss"]
    assert set(losses.OBJECTIVES) == set(choices)


def test_non_saturating_pairs_the_two_formulas():
    objective = losses.OBJECTIVES["non_saturating"]
    assert objective.generator is losses.non_saturating_generator
    assert objective.discriminator is losses.logistic_discriminator
