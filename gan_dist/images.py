"""Pixels to network range and back, grids, PNG.

Dimension key for name suffixes:
  N  images   H, W  height and width   C  channels
"""

import numpy as np
import tensorflow as tf


def scale(pixels_NHWC: tf.Tensor, image_range: tuple[float, float]) -> tf.Tensor:
    """uint8 in [0, 255] to float32 in `image_range`."""
    low, high = image_range
    return tf.cast(pixels_NHWC, tf.float32) * ((high - low) / 255.0) + low


def unscale(images_NHWC: np.ndarray, image_range: tuple[float, float]) -> np.ndarray:
    """Floats in `image_range` to uint8, rounded; what lies outside is clipped, NaN is black."""
    low, high = image_range
    pixels = (np.asarray(images_NHWC, np.float32) - low) * (255.0 / (high - low))
    # NaN has no uint8: black.
    return np.clip(np.rint(np.nan_to_num(pixels)), 0, 255).astype(np.uint8)


def grid(pixels_NHWC: np.ndarray, columns: int) -> np.ndarray:
    """`[N, H, W, C]` uint8 to one `[rows * H, columns * W, C]` picture, row by row; empty cells are black."""
    n, height, width, channels = pixels_NHWC.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:n] = pixels_NHWC
    cells = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return cells.reshape(rows * height, columns * width, channels)


def encode_png(picture_HWC: np.ndarray) -> bytes:
    """A uint8 picture with 1 or 3 channels as the bytes of a PNG."""
    return bytes(tf.io.encode_png(picture_HWC).numpy())
