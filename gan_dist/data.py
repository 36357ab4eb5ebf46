"""The images of a run, whole in memory, and the order in which steps take them."""

import dataclasses

import numpy as np
import tensorflow as tf

from gan_dist import rng
from gan_dist.config import DataConfig
from gan_dist.datasets import mnist


@dataclasses.dataclass(frozen=True)
class Examples:
    """`pixels`: `[N, H, W, C]` uint8. `labels`: `[N]` int32, each below `num_classes`."""

    pixels: np.ndarray
    labels: np.ndarray
    num_classes: int


def num_classes(config: DataConfig) -> int:
    """Classes of a data set, without reading it."""
    return {"mnist": mnist.NUM_CLASSES}[config.dataset]


def load(config: DataConfig) -> Examples:
    """The training images, in the resolution and with the channels asked for.

    Raises:
        DataError, EnvironmentFault: As the data set's reader.
    """
    pixels, labels = mnist.load("train", config.data_dir)
    return Examples(_fit(pixels, config.resolution, config.channels), labels, num_classes(config))


def _fit(pixels_NHWC: np.ndarray, resolution: int, channels: int) -> np.ndarray:
    """28 pixels stay; 32: two black pixels on each side; 64: each of those 32 twice."""
    if resolution >= 32:
        pixels_NHWC = np.pad(pixels_NHWC, ((0, 0), (2, 2), (2, 2), (0, 0)))
    if resolution == 64:
        pixels_NHWC = pixels_NHWC.repeat(2, axis=1).repeat(2, axis=2)
    return np.repeat(pixels_NHWC, channels, axis=3)


def on_replicas(strategy: tf.distribute.Strategy, array: np.ndarray) -> object:
    """A copy of the array on each replica's device; a step then picks its images by index, without the host."""
    devices = strategy.extended.worker_devices

    def copy(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
        # A worker's own devices, by their order among its replicas.
        with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
            return tf.constant(array)

    return strategy.experimental_distribute_values_from_function(copy)


def pack(pixels_NHWC: np.ndarray) -> np.ndarray:
    """Images as rows of int64, eight bytes each: TensorFlow gathers no uint8 on a GPU, and would fetch the whole array.

    Raises:
        ValueError: If an image's bytes are not a multiple of eight.
    """
    return np.ascontiguousarray(pixels_NHWC).reshape(len(pixels_NHWC), -1).view(np.int64)


def unpack(rows_BW: tf.Tensor, shape_HWC: tuple[int, int, int]) -> tf.Tensor:
    """Rows of `pack` as `[B, H, W, C]` uint8."""
    return tf.reshape(tf.bitcast(rows_BW, tf.uint8), [-1, *shape_HWC])


def order(seed: int, first: int, last: int, global_batch: int, num_examples: int, attempt: int = 0) -> np.ndarray:
    """Which example stands in each row of steps `first` to `last - 1`: `[last - first, global_batch]` int32."""
    positions = np.arange(first * global_batch, last * global_batch, dtype=np.int64)
    return rng.example_order(seed, positions.reshape(-1, global_batch), num_examples, attempt)
