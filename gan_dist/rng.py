"""Random numbers as pure functions of (seed, stream, step, row): nothing to save, nothing to restore.

Philox is a function from (key, counter) to random bits. The key names the seed and the stream; the counter's high word
is the step, its low word the row of the global batch. A replica computes just its own rows, bit-equal to the same rows
of the whole batch (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Dimension key for name suffixes:
  R  rows of the global batch   Z  latent size
"""

import hashlib

import numpy as np
import tensorflow as tf

_PHILOX = 1
# A Philox block is four 32-bit words: four float32 normals.
_BLOCK = 4


def key(seed: int, stream: str) -> int:
    """A 64-bit key. Streams are independent of each other; the names are part of the run's definition."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def clock(step: tf.Tensor | int, attempt: tf.Tensor | int) -> tf.Tensor:
    """The `step` of the functions below for a step and an attempt at it: other noise for each of both."""
    return tf.cast(attempt, tf.int64) * 2**48 + tf.cast(step, tf.int64)


def _counter(first_row: tf.Tensor | int, blocks_per_row: int, step: tf.Tensor | int) -> tf.Tensor:
    low = tf.cast(first_row, tf.int64) * blocks_per_row
    return tf.bitcast(tf.stack([low, tf.cast(step, tf.int64)]), tf.uint64)


def normal(stream_key: int, step: tf.Tensor | int, first_row: tf.Tensor | int, rows: int, size: int) -> tf.Tensor:
    """Standard normal noise for rows `first_row` to `first_row + rows` of step `step`.

    Args:
        stream_key: From `key`.
        step: Scalar int64.
        first_row: Scalar, row of the global batch.
        rows: Number of rows R.
        size: Numbers per row Z.

    Returns:
        `[R, Z]` float32.
    """
    # Each row takes whole blocks, so that a row starts at a counter of its own.
    blocks = -(-size // _BLOCK)
    noise = tf.raw_ops.StatelessRandomNormalV2(
        shape=[rows, blocks * _BLOCK],
        key=tf.constant([stream_key], tf.uint64),
        counter=_counter(first_row, blocks, step),
        alg=_PHILOX,
        dtype=tf.float32,
    )
    return noise[:, :size]


def classes(
    stream_key: int, step: tf.Tensor | int, first_row: tf.Tensor | int, rows: int, num_classes: int
) -> tf.Tensor:
    """Class labels, uniform over `num_classes`: `[R]` int32, for the same rows as `normal`."""
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[rows, _BLOCK],
        key=tf.constant([stream_key], tf.uint64),
        counter=_counter(first_row, 1, step),
        alg=_PHILOX,
        dtype=tf.uint32,
    )
    # int64: there is no GPU kernel for the remainder of uint32. The bias is below num_classes / 2^32.
    return tf.cast(tf.cast(bits[:, 0], tf.int64) % num_classes, tf.int32)


def example_order(seed: int, positions: np.ndarray, num_examples: int, attempt: int = 0) -> np.ndarray:
    """Which example stands at each global position: `permute(p mod n)` of epoch `p div n`.

    Args:
        seed: The run's seed.
        positions: int64, any shape; position p is image p since the start of the run.
        num_examples: n.
        attempt: Another number gives another permutation.

    Returns:
        int32 of the same shape, each in `[0, n)`; every n positions hold each example once.
    """
    positions = np.asarray(positions, np.int64)
    epochs, places = np.divmod(positions, num_examples)
    order = np.empty(positions.shape, np.int32)
    # The kernel exists on CPU alone, and takes one seed a call.
    with tf.device("CPU:0"):
        for epoch in np.unique(epochs):
            bits = key(seed, f"data/epoch/{epoch}" + (f"/attempt/{attempt}" if attempt else ""))
            seeds = tf.constant([bits & 0x7FFFFFFF, bits >> 33], tf.int32)
            here = epochs == epoch
            order[here] = tf.random.experimental.index_shuffle(
                tf.constant(places[here], tf.int32), seeds, tf.constant(num_examples - 1, tf.int32)
            ).numpy()
    return order


def init_seed(seed: int, name: str) -> int:
    """The seed of a variable's initialiser, from its structural name and not from the order of creation."""
    return key(seed, f"init/{name}") & 0x7FFFFFFF
