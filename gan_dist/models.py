"""Generators and discriminators by name and resolution.

A network is a Keras layer used as a pure function: the variables live in `state.py`, and `Network` calls the layer with
their values. So Keras never meets a distribution strategy, and the running average of the generator is the same
function on other values.

Dimension key for name suffixes:
  B  images on one replica   H, W  height and width   P  positions, H x W   C  channels   Z  latent size
  K  classes   G  groups
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gan_dist import rng
from gan_dist.config import DataConfig, ModelConfig

# Of a network's variables, by name: tensors or arrays.
Values = Mapping[str, Any]

_KERAS_POLICY = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float64": "float64"}


@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """How one training pass takes its batch-norm statistics.

    Attributes:
        groups: Batches stacked on the first axis, each normalised by its own statistics. Real and generated images
            pass the discriminator as two groups: one convolution and one all-reduce serve both.
        replicas: Over how many replicas `all_reduce` sums; 1 for statistics of this replica's share alone.
        all_reduce: Sums a tensor over replicas.
    """

    groups: int = 1
    replicas: int = 1
    all_reduce: Callable[[tf.Tensor], tf.Tensor] = lambda x: x

    def moments(self, x_GBPC: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and (biased) variance over images, positions and replicas, both `[G, C]`.

        As exact as float32 allows, because a GAN amplifies what differs between one replica and several: sums of a
        few hundred numbers at a time, deviations from the mean instead of the mean of squares (for the border of MNIST
        the mean is a hundred deviations away), and float64 where the replicas' few numbers are joined.
        """
        mean_GC = _mean(x_GBPC)
        variance_GC = _mean(tf.square(x_GBPC - mean_GC[:, tf.newaxis, tf.newaxis]))
        if self.replicas == 1:
            return mean_GC, variance_GC
        mean64_GC, variance64_GC = tf.cast(mean_GC, tf.float64), tf.cast(variance_GC, tf.float64)
        # Both in one tensor: one all-reduce a layer.
        sums = self.all_reduce(tf.stack([mean64_GC, variance64_GC + tf.square(mean64_GC)]))
        mean64_GC, square64_GC = tf.unstack(sums / self.replicas)
        variance64_GC = tf.maximum(square64_GC - tf.square(mean64_GC), 0)
        return tf.cast(mean64_GC, x_GBPC.dtype), tf.cast(variance64_GC, x_GBPC.dtype)


def _mean(x_GBPC: tf.Tensor) -> tf.Tensor:
    # In two steps: one sum of a hundred thousand numbers loses three digits of seven.
    return tf.reduce_mean(tf.reduce_mean(x_GBPC, 2), 1)


class BatchNorm(keras.layers.Layer):
    """Batch normalisation (Ioffe & Szegedy 2015) over the last axis; statistics in float32 at least.

    Called with `statistics`, it normalises by them and moves its averages; without, it normalises by the averages.
    """

    def __init__(self, momentum: float = 0.99, epsilon: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape: Sequence[int | None]) -> None:
        def add(name: str, initializer: str, trainable: bool) -> Any:
            # No autocast: bfloat16 statistics would be useless.
            return self.add_weight(
                shape=(input_shape[-1],), initializer=initializer, trainable=trainable, name=name, autocast=False
            )

        self.gamma, self.beta = add("gamma", "ones", True), add("beta", "zeros", True)
        self.moving_mean = add("moving_mean", "zeros", False)
        self.moving_variance = add("moving_variance", "ones", False)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Sequence[int | None]:
        return input_shape

    def call(self, x: tf.Tensor, statistics: BatchStatistics | None = None) -> tf.Tensor:
        groups = statistics.groups if statistics else 1
        shape = tf.shape(x)
        positions = math.prod(size or 1 for size in x.shape.as_list()[1:-1])
        x_GBPC = tf.reshape(tf.cast(x, self.variable_dtype), [groups, -1, positions, x.shape[-1]])
        if statistics:
            mean_GC, variance_GC = statistics.moments(x_GBPC)
            for average, batch_GC in ((self.moving_mean, mean_GC), (self.moving_variance, variance_GC)):
                batch = tf.stop_gradient(tf.reduce_mean(batch_GC, 0))
                average.assign(average.value * self.momentum + batch * (1 - self.momentum))
        else:
            mean_GC = tf.convert_to_tensor(self.moving_mean.value)[tf.newaxis]
            variance_GC = tf.convert_to_tensor(self.moving_variance.value)[tf.newaxis]
        scale_GC = tf.math.rsqrt(variance_GC + self.epsilon) * self.gamma.value
        centred_GBPC = x_GBPC - mean_GC[:, tf.newaxis, tf.newaxis]
        y_GBPC = centred_GBPC * scale_GC[:, tf.newaxis, tf.newaxis] + self.beta.value
        return tf.ensure_shape(tf.reshape(tf.cast(y_GBPC, x.dtype), shape), x.shape)


class Stack(keras.layers.Layer):
    """Layers in a row; a `BatchNorm` among them is told how to take its statistics."""

    def __init__(self, layers: Sequence[keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack = list(layers)

    def call(self, x: tf.Tensor, statistics: BatchStatistics | None = None) -> tf.Tensor:
        for layer in self.stack:
            x = layer(x, statistics=statistics) if isinstance(layer, BatchNorm) else layer(x)
        return x

    def elements(self, input_size: int | Sequence[int]) -> int:
        """Numbers that all layers' outputs hold for one image."""
        shape: Any = (1, *np.atleast_1d(input_size).tolist())
        total = 0
        for layer in self.stack:
            shape = layer.compute_output_shape(shape)
            total += int(np.prod(shape))
        return total


class Generator(keras.layers.Layer):
    """`[B, Z]` noise and `[B, K]` one-hot labels (or none) to `[B, H, W, C]` images."""

    def __init__(self, stack: Stack, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack = stack

    def call(
        self, latent_BZ: tf.Tensor, labels_BK: tf.Tensor | None = None, statistics: BatchStatistics | None = None
    ) -> tf.Tensor:
        if labels_BK is not None:
            latent_BZ = tf.concat([latent_BZ, tf.cast(labels_BK, latent_BZ.dtype)], 1)
        return tf.cast(self.stack(latent_BZ, statistics=statistics), self.variable_dtype)


class Discriminator(keras.layers.Layer):
    """`[B, H, W, C]` images and `[B, K]` one-hot labels (or none) to `[B]` logits; positive means real.

    Labels enter by projection: the inner product of the features with an embedding of the label (Miyato & Koyama 2018,
    arXiv:1802.05637, figure 1d).
    """

    def __init__(
        self, stack: Stack, logit: keras.layers.Layer, embedding: keras.layers.Layer | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.stack, self.logit, self.embedding = stack, logit, embedding

    def call(
        self, image_BHWC: tf.Tensor, labels_BK: tf.Tensor | None = None, statistics: BatchStatistics | None = None
    ) -> tf.Tensor:
        features = self.stack(image_BHWC, statistics=statistics)
        logits_B = self.logit(features)[:, 0]
        if self.embedding is not None:
            logits_B += tf.reduce_sum(self.embedding(labels_BK) * features, 1)
        return tf.cast(logits_B, self.variable_dtype)


class _Layers:
    """Makes the weighted layers of one network, named by their index, initialised by their name."""

    def __init__(self, network: str, seed: int, dtype: str) -> None:
        self.network, self.seed, self.dtype, self.count = network, seed, dtype, 0

    def _next(self, kernel: bool = True) -> dict[str, Any]:
        name = str(self.count)
        self.count += 1
        options: dict[str, Any] = {"name": name, "dtype": self.dtype}
        if kernel:
            # stddev: Radford et al. 2016, section 4.
            options["kernel_initializer"] = keras.initializers.RandomNormal(
                0.0, 0.02, seed=rng.init_seed(self.seed, f"{self.network}/{name}_kernel")
            )
        return options

    def dense(self, units: int, bias: bool = False) -> keras.layers.Layer:
        return keras.layers.Dense(units, use_bias=bias, **self._next())

    def conv(self, channels: int, kernel_size: int) -> keras.layers.Layer:
        return keras.layers.Conv2D(channels, kernel_size, strides=2, padding="same", use_bias=False, **self._next())

    def conv_transpose(self, channels: int, kernel_size: int, bias: bool = False) -> keras.layers.Layer:
        return keras.layers.Conv2DTranspose(
            channels, kernel_size, strides=2, padding="same", use_bias=bias, **self._next()
        )

    def norm_and_leaky_relu(self) -> list[keras.layers.Layer]:
        return [BatchNorm(**self._next(kernel=False)), keras.layers.LeakyReLU(0.2, dtype=self.dtype)]


def dcgan(model: ModelConfig, data: DataConfig, classes: int, seed: int, dtype: str) -> tuple[Generator, Discriminator]:
    """The DCGAN (Radford et al. 2016) in the form of reference 1: LeakyReLU 0.2 in both, a dense layer near the logit.

    The image halves from layer to layer down to 7 or 4 pixels, and the channels double: two layers for 28 pixels,
    three for 32, four for 64. No bias stands in front of a batch norm, which would take it out again.
    """
    halvings = {28: 2, 32: 3, 64: 4}[data.resolution]
    base = data.resolution >> halvings
    widths = [model.width << i for i in range(halvings)]

    g = _Layers("generator", seed, dtype)
    up: list[keras.layers.Layer] = [g.dense(base * base * widths[-1]), *g.norm_and_leaky_relu()]
    up.append(keras.layers.Reshape((base, base, widths[-1]), dtype=dtype))
    for channels in reversed(widths[:-1]):
        up += [g.conv_transpose(channels, model.kernel_size), *g.norm_and_leaky_relu()]
    up += [g.conv_transpose(data.channels, model.kernel_size, bias=True), keras.layers.Activation("tanh", dtype=dtype)]

    d = _Layers("discriminator", seed, dtype)
    down: list[keras.layers.Layer] = []
    for channels in widths:
        down += [d.conv(channels, model.kernel_size), *d.norm_and_leaky_relu()]
    down.append(keras.layers.Flatten(dtype=dtype))
    features = base * base * widths[-1]
    if model.discriminator_features:
        features = model.discriminator_features
        down += [d.dense(features), *d.norm_and_leaky_relu()]
    logit = d.dense(1, bias=True)
    embedding = d.dense(features) if classes else None
    return (
        Generator(Stack(up, name="", dtype=dtype), name="generator", dtype=dtype),
        Discriminator(Stack(down, name="", dtype=dtype), logit, embedding, name="discriminator", dtype=dtype),
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A pair of networks, and the range of the images that they make and judge."""

    build: Callable[[ModelConfig, DataConfig, int, int, str], tuple[keras.layers.Layer, keras.layers.Layer]]
    image_range: tuple[float, float]


# --architecture to networks. To add one: the function, a line here, its name in config.py, a parameter-count test.
ARCHITECTURES = {"dcgan": Architecture(dcgan, (-1.0, 1.0))}


class Network:
    """A Keras layer as a pure function of the values of its variables.

    Attributes:
        initial: Initial value of each variable, by structural name (`0_kernel`, `1_gamma`, …).
        num_classes: Classes K of the labels that it takes; 0: none.
        trainable: The names that get gradients; the others are batch-norm averages.
    """

    def __init__(self, layer: Any, example: tf.Tensor, labels_BK: tf.Tensor | None) -> None:
        self.layer = layer
        self.num_classes = 0 if labels_BK is None else int(labels_BK.shape.as_list()[1] or 0)
        layer(example, labels_BK)  # Creates the variables.
        # The path is network/…/layer/role; what lies between is structure, too.
        named = {"_".join(part for part in v.path.split("/")[1:] if part): v for v in layer.variables}
        if len(named) != len(layer.variables):
            raise ValueError(f"{layer.name}: two variables share a name; give each layer a name of its own.")
        by_id = {id(v): name for name, v in named.items()}
        self.trainable = tuple(by_id[id(v)] for v in layer.trainable_variables)
        self.averages = tuple(by_id[id(v)] for v in layer.non_trainable_variables)
        self.initial: dict[str, np.ndarray] = {name: v.numpy() for name, v in named.items()}

    def __call__(
        self, values: Values, inputs: tf.Tensor, labels_BK: tf.Tensor | None, statistics: BatchStatistics | None
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """The output, and the new value of each batch-norm average."""
        output, averages = self.layer.stateless_call(
            [values[name] for name in self.trainable],
            [values[name] for name in self.averages],
            inputs,
            labels_BK,
            statistics=statistics,
        )
        return output, dict(zip(self.averages, averages, strict=True))

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(self.initial[name].size for name in self.trainable)


def create(
    model: ModelConfig, data: DataConfig, num_classes: int, seed: int, precision: str
) -> tuple[Network, Network]:
    """The generator and the discriminator of a configuration, with their initial values.

    Args:
        model, data: The settings.
        num_classes: Classes of the data; used when `model.conditional`.
        seed: The run's seed.
        precision: `float32`, `bfloat16` or `float64`.
    """
    classes = num_classes if model.conditional else 0
    architecture = ARCHITECTURES[model.architecture]
    # On CPU: with GPUs, initial values would else depend on the device's arithmetic.
    with tf.device("CPU:0"):
        generator, discriminator = architecture.build(model, data, classes, seed, _KERAS_POLICY[precision])
        labels_BK = tf.zeros([2, classes], generator.compute_dtype) if classes else None
        latent_BZ = tf.zeros([2, model.latent_size], generator.compute_dtype)
        image_BHWC = tf.zeros([2, data.resolution, data.resolution, data.channels], generator.compute_dtype)
        return Network(generator, latent_BZ, labels_BK), Network(discriminator, image_BHWC, labels_BK)
