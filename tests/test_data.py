"""MNIST from its files, in every form, and the order in which steps take it."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from gan_dist import config as config_lib
from gan_dist import data, rng
from gan_dist.config import DataConfig
from gan_dist.datasets import mnist
from gan_dist.errors import DataError, EnvironmentFault

IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.fixture(scope="module")
def examples() -> data.Examples:
    return data.load(DataConfig())


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of its own with the test set, for damage."""
    packaged = Path(mnist.__file__).parent / "mnist_files"
    for name in (IMAGES, LABELS):
        shutil.copy(packaged / name, tmp_path)
    return tmp_path


def test_the_training_set_is_whole(examples):
    assert examples.pixels.shape == (60_000, 28, 28, 1) and examples.pixels.dtype == np.uint8
    assert examples.labels.shape == (60_000,) and examples.labels.dtype == np.int32
    assert examples.num_classes == 10 == data.num_classes(DataConfig())
    assert examples.labels[:5].tolist() == [5, 0, 4, 1, 9]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(examples.labels).tolist() == counts
    # Mean and deviation of MNIST's pixels, as they are known: 0.1307 and 0.3081 of 255.
    assert abs(examples.pixels.mean() / 255 - 0.1307) < 1e-4
    assert abs(examples.pixels.std() / 255 - 0.3081) < 1e-4


def test_images_stand_upright_beside_their_labels(examples):
    # A one is narrow and tall; rows read as columns, or images one off their labels, would not be.
    ones = examples.pixels[examples.labels == 1, ..., 0] > 127
    height, width = ones.any(2).sum(1).mean(), ones.any(1).sum(1).mean()
    assert height > 1.8 * width


def test_the_test_set_is_whole():
    pixels, labels = mnist.load("t10k")
    assert pixels.shape == (10_000, 28, 28, 1) and labels.shape == (10_000,)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_32_pixels_are_the_28_with_two_black_ones_on_each_side(examples):
    wide = data.load(DataConfig(resolution=32)).pixels
    assert wide.shape == (60_000, 32, 32, 1) and wide.dtype == np.uint8
    np.testing.assert_array_equal(wide[:, 2:30, 2:30], examples.pixels)
    assert wide.sum(dtype=np.int64) == examples.pixels.sum(dtype=np.int64)


def test_64_pixels_are_the_32_with_each_pixel_as_a_square_of_four():
    some = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    doubled, wide = data._fit(some, 64, 1), data._fit(some, 32, 1)
    assert doubled.shape == (5, 64, 64, 1)
    for row in (0, 1):
        for column in (0, 1):
            np.testing.assert_array_equal(doubled[:, row::2, column::2], wide)


@pytest.mark.parametrize("resolution", [28, 32, 64])
def test_three_channels_are_the_grey_one_three_times(resolution):
    some = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    colour, grey = data._fit(some, resolution, 3), data._fit(some, resolution, 1)
    assert colour.shape == (5, resolution, resolution, 3)
    np.testing.assert_array_equal(colour, np.concatenate([grey] * 3, axis=3))


def test_data_dir_takes_the_place_of_the_packaged_files(folder):
    ours, packaged = mnist.load("t10k", str(folder)), mnist.load("t10k")
    for a, b in zip(ours, packaged, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(EnvironmentFault, match="train-images-idx3-ubyte.gz"):
        data.load(DataConfig(data_dir=str(folder)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_trailer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_gzip(path: Path) -> None:
    path.write_bytes(b"<html>404 Not Found</html>")


def unpacked(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def gzip_header_and_nonsense(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 64)


def flip_a_packed_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def flip_an_unpacked_byte(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(content, 1))


def gzip_of_nothing(path: Path) -> None:
    path.write_bytes(gzip.compress(b""))


def another_file(path: Path) -> None:
    shutil.copy(path.with_name(LABELS if path.name == IMAGES else IMAGES), path)


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, "truncated or damaged"),
        (cut_the_trailer, "truncated or damaged"),
        (not_gzip, "truncated or damaged"),
        (unpacked, "truncated or damaged"),
        (gzip_header_and_nonsense, "truncated or damaged"),
        (flip_a_packed_byte, "truncated or damaged"),
        (empty, "not MNIST's"),
        (gzip_of_nothing, "not MNIST's"),
        (flip_an_unpacked_byte, "not MNIST's"),
        (another_file, "not MNIST's"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_damaged_file_is_refused_with_its_path_the_reason_and_the_way_out(folder, name, damage, reason):
    damage(folder / name)
    with pytest.raises(DataError) as refused:
        mnist.load("t10k", str(folder))
    message = str(refused.value)
    assert message.startswith(f"--data_dir: {folder / name} is {reason}")
    assert "Take --data_dir out" in message
    assert refused.value.exit_code == 65


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_file_is_a_fault_of_the_environment_with_its_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(EnvironmentFault) as refused:
        mnist.load("t10k", str(folder))
    assert f"--data_dir={folder}: {name} cannot be read: No such file" in str(refused.value)
    assert refused.value.exit_code == 78


def test_a_missing_folder_and_a_file_in_its_place_are_faults_of_the_environment(tmp_path):
    (tmp_path / "file").write_text("")
    for home, reason in ((tmp_path / "none", "No such file"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(EnvironmentFault) as refused:
            mnist.load("t10k", str(home))
        assert f"--data_dir={home}: {IMAGES} cannot be read: {reason}" in str(refused.value)


def test_every_dataset_that_can_be_chosen_has_its_number_of_classes():
    for name in {s.name: s.option.choices for s in config_lib.settings()}["dataset"]:
        assert data.num_classes(DataConfig(dataset=name)) > 1


def test_order_gives_row_r_of_step_s_the_example_at_position_s_times_batch_plus_r():
    batch, n = 6, 20
    order = data.order(3, 2, 9, batch, n)
    assert order.shape == (7, batch) and order.dtype == np.int32
    for step in range(2, 9):
        for row in range(batch):
            position = np.array(step * batch + row)
            assert order[step - 2, row] == rng.example_order(3, position, n)


@pytest.mark.parametrize("cuts", [(), (1,), (5, 6), (2, 7, 7, 11)])
def test_blocks_of_any_length_take_the_same_order(cuts):
    whole = data.order(3, 0, 12, 8, 30)
    edges = (0, *cuts, 12)
    parts = [data.order(3, a, b, 8, 30) for a, b in zip(edges, edges[1:], strict=False)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_the_order_depends_on_positions_and_not_on_how_they_are_cut_into_batches():
    np.testing.assert_array_equal(data.order(3, 0, 12, 8, 30).ravel(), data.order(3, 0, 6, 16, 30).ravel())


def test_a_batch_larger_than_the_data_takes_every_example_again():
    counts = np.bincount(data.order(0, 0, 1, 30, 10).ravel())
    np.testing.assert_array_equal(counts, [3] * 10)


@pytest.mark.parametrize("shape", [(28, 28, 1), (28, 28, 3), (32, 32, 1), (64, 64, 3)])
def test_packed_images_come_back_bit_for_bit(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    packed = data.pack(pixels)
    assert packed.dtype == np.int64 and packed.nbytes == pixels.nbytes
    np.testing.assert_array_equal(data.unpack(tf.constant(packed), shape), pixels)
