"""Adversarial objectives on logits: a function per formula, per image, in nats.

Dimension key for name suffixes:
  B  images on one replica
"""

import dataclasses
from collections.abc import Callable

import tensorflow as tf


def at_least_float32(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if x.dtype in (tf.bfloat16, tf.float16) else x


def non_saturating_generator(fake_logits_B: tf.Tensor) -> tf.Tensor:
    """`-log sigmoid(logit)` per image (Goodfellow et al. 2014, arXiv:1406.2661, section 3)."""
    # softplus(-x) is -log sigmoid(x) without the overflow; at least float32, because bfloat16 loses the tail.
    return tf.nn.softplus(-at_least_float32(fake_logits_B))


def logistic_discriminator(real_logits_B: tf.Tensor, fake_logits_B: tf.Tensor) -> tf.Tensor:
    """`-log sigmoid(real) - log(1 - sigmoid(fake))` per pair of images (Goodfellow et al. 2014, equation 1)."""
    return tf.nn.softplus(-at_least_float32(real_logits_B)) + tf.nn.softplus(at_least_float32(fake_logits_B))


@dataclasses.dataclass(frozen=True)
class Objective:
    """`discriminator(real_logits, fake_logits)` and `generator(fake_logits)`, both `[B]` to `[B]`."""

    discriminator: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    generator: Callable[[tf.Tensor], tf.Tensor]


# --loss to functions. To add one: write the functions above, a line here, its name in config.py, a test.
OBJECTIVES = {"non_saturating": Objective(logistic_discriminator, non_saturating_generator)}
