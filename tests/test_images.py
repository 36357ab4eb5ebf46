"""Pixels to network range and back, grids, PNG."""

import numpy as np
import pytest
import tensorflow as tf

from gan_dist import images

RANGES = [(-1.0, 1.0), (0.0, 1.0)]
ALL_VALUES = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


@pytest.mark.parametrize("image_range", RANGES)
def test_every_pixel_value_survives_scale_and_unscale(image_range):
    scaled = images.scale(ALL_VALUES, image_range)
    assert scaled.dtype == tf.float32 and scaled.shape == ALL_VALUES.shape
    restored = images.unscale(scaled.numpy(), image_range)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, ALL_VALUES)


@pytest.mark.parametrize("low, high", RANGES)
def test_scale_maps_0_and_255_to_the_ends_of_the_range_and_is_linear(low, high):
    expected = low + np.arange(256) / 255 * (high - low)
    np.testing.assert_allclose(images.scale(ALL_VALUES, (low, high)).numpy().ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("low, high", RANGES)
def test_unscale_rounds_to_the_nearest_pixel_value(low, high):
    width = (high - low) / 255
    exact = low + np.arange(256) * width
    for offset in (-0.45, 0.45):
        np.testing.assert_array_equal(images.unscale(exact + offset * width, (low, high)), np.arange(256))


@pytest.mark.parametrize("low, high", RANGES)
def test_unscale_clips_what_lies_outside_the_range(low, high):
    outside = np.array([low - 0.1, low - 1e6, -np.inf, high + 0.1, high + 1e6, np.inf])
    np.testing.assert_array_equal(images.unscale(outside, (low, high)), [0, 0, 0, 255, 255, 255])


def test_a_number_that_is_none_is_black():
    np.testing.assert_array_equal(images.unscale(np.array([np.nan, 1.0]), (-1.0, 1.0)), [0, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_places_image_r_times_columns_plus_c_at_row_r_and_column_c(channels):
    height, width, columns = 2, 3, 4
    pixels = np.random.default_rng(0).integers(0, 256, (8, height, width, channels), np.uint8)
    picture = images.grid(pixels, columns)
    assert picture.shape == (2 * height, columns * width, channels) and picture.dtype == np.uint8
    for r in range(2):
        for c in range(columns):
            cell = picture[r * height : (r + 1) * height, c * width : (c + 1) * width]
            np.testing.assert_array_equal(cell, pixels[r * columns + c], err_msg=f"row {r}, column {c}")


@pytest.mark.parametrize("count, rows", [(1, 1), (5, 2), (8, 2), (9, 3)])
def test_cells_without_an_image_are_black(count, rows):
    picture = images.grid(np.full((count, 2, 2, 1), 255, np.uint8), 4)
    assert picture.shape == (rows * 2, 8, 1)
    assert np.count_nonzero(picture) == count * 4


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_decodes_to_the_same_pixels(channels):
    picture = np.random.default_rng(1).integers(0, 256, (17, 31, channels), np.uint8)
    content = images.encode_png(picture)
    assert type(content) is bytes and content.startswith(b"\x89PNG\r\n\x1a\n")
    np.testing.assert_array_equal(tf.io.decode_png(content, channels=0), picture)
