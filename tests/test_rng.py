"""Random numbers as pure functions of (seed, stream, step, row)."""

import math

import numpy as np
import pytest
import tensorflow as tf

from gan_dist import rng

KEY = rng.key(0, "noise/g")
MEANT = (
    "The random numbers of a given seed are other ones now: runs before and after this change cannot be compared, and "
    "a resumed run goes on with another order or noise. If that is meant, put the new numbers here and say so in the "
    "commit and in CHANGELOG.md."
)


def philox(key: int, low: int, high: int) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four 32-bit words, in Python's whole numbers."""
    mask = 0xFFFFFFFF
    c = [low & mask, low >> 32, high & mask, high >> 32]
    k = [key & mask, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def box_muller(words: list[int]) -> list[float]:
    """Two 32-bit words to two normals, with the low 23 bits of each word as a number in [0, 1)."""
    u, v = ((word & 0x7FFFFF) / 2**23 for word in words)
    radius = math.sqrt(-2 * math.log(max(u, 1e-7)))
    return [radius * math.sin(2 * math.pi * v), radius * math.cos(2 * math.pi * v)]


def test_the_philox_of_this_test_is_the_published_one():
    # The known answers that come with Random123: all zeros, all ones.
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(2**64 - 1, 2**64 - 1, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("step, row, size", [(0, 0, 4), (5, 3, 6), (10**6, 511, 100), (2**33, 2**20, 1)])
def test_normal_is_box_muller_of_philox_with_the_step_in_the_high_and_the_row_in_the_low_word(step, row, size):
    blocks = math.ceil(size / 4)
    words = [philox(KEY, row * blocks + block, step) for block in range(blocks)]
    expected = [x for w in words for x in (*box_muller(w[:2]), *box_muller(w[2:]))][:size]
    np.testing.assert_allclose(rng.normal(KEY, step, row, 1, size)[0], expected, atol=1e-5)


@pytest.mark.parametrize("step, row", [(0, 0), (5, 3), (2**33, 2**20)])
def test_classes_are_the_first_philox_word_of_the_row_modulo_their_number(step, row):
    expected = [philox(KEY, row + i, step)[0] % 10 for i in range(3)]
    np.testing.assert_array_equal(rng.classes(KEY, step, row, 3, 10), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 100, 101])
@pytest.mark.parametrize("replicas", [2, 4])
def test_the_rows_of_each_replica_are_the_rows_of_the_whole_batch(size, replicas):
    batch = 16
    whole = rng.normal(KEY, 7, 0, batch, size).numpy()
    assert whole.shape == (batch, size) and whole.dtype == np.float32
    share = batch // replicas
    parts = [rng.normal(KEY, 7, replica * share, share, size).numpy() for replica in range(replicas)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_rows_are_the_same_with_tensors_inside_a_tf_function():
    inside = tf.function(lambda step, row: rng.normal(KEY, step, row, 3, 7))
    np.testing.assert_array_equal(
        inside(tf.constant(9, tf.int64), tf.constant(2, tf.int32)), rng.normal(KEY, 9, 2, 3, 7)
    )


def test_numbers_do_not_repeat_over_rows_steps_streams_and_seeds():
    noise = [rng.normal(KEY, 0, 0, 64, 100), rng.normal(KEY, 1, 0, 64, 100), rng.normal(KEY, 0, 64, 64, 100)]
    noise += [rng.normal(rng.key(s, name), 0, 0, 64, 100) for s, name in ((1, "noise/g"), (0, "noise/d"))]
    rows = np.concatenate([n.numpy() for n in noise])
    assert len(np.unique(rows, axis=0)) == len(rows)
    # Rows that shared blocks would agree in parts, not as a whole: of 32,000 numbers with 23 random bits each, hardly
    # more than a few hundred are equal by chance.
    assert rows.size - len(np.unique(rows)) < 0.02 * rows.size


@pytest.fixture(scope="module")
def million() -> np.ndarray:
    """Steps 0 and 1 of one stream, 500,000 numbers each."""
    return np.stack([rng.normal(KEY, step, 0, 5000, 100).numpy() for step in (0, 1)]).astype(np.float64)


def test_the_moments_of_a_million_numbers_are_those_of_the_normal_distribution(million):
    n, x = million.size, million.ravel()
    # Five standard errors each; the numbers are fixed, so the test is, too.
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors of the correlation of independent numbers."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1] * math.sqrt(a.size))


def test_steps_rows_and_columns_are_uncorrelated(million):
    assert abs(correlation(million[0], million[1])) < 5
    assert abs(correlation(million[:, :-1], million[:, 1:])) < 5
    assert abs(correlation(million[..., :-1], million[..., 1:])) < 5


@pytest.mark.parametrize("other", [rng.key(0, "noise/d"), rng.key(1, "noise/g")], ids=["stream", "seed"])
def test_streams_and_seeds_are_uncorrelated(million, other):
    assert abs(correlation(million[0], rng.normal(other, 0, 0, 5000, 100).numpy())) < 5


@pytest.mark.parametrize("num_classes", [2, 10])
def test_classes_are_uniform(num_classes):
    n = 100_000
    drawn = rng.classes(KEY, 0, 0, n, num_classes)
    assert drawn.dtype == tf.int32
    counts = np.bincount(drawn, minlength=num_classes)
    assert len(counts) == num_classes
    # Chi-square has K - 1 degrees of freedom: mean K - 1, variance 2 (K - 1).
    chi_square = ((counts - n / num_classes) ** 2 / (n / num_classes)).sum()
    assert chi_square < (num_classes - 1) + 5 * math.sqrt(2 * (num_classes - 1))


def test_the_classes_of_each_replica_are_those_of_the_whole_batch():
    whole = rng.classes(KEY, 7, 0, 16, 10).numpy()
    for replica in range(4):
        np.testing.assert_array_equal(rng.classes(KEY, 7, replica * 4, 4, 10), whole[replica * 4 : replica * 4 + 4])
    assert (rng.classes(KEY, 8, 0, 16, 10).numpy() != whole).any()


@pytest.mark.parametrize("num_examples", [1, 2, 3, 5, 10, 1000, 60_000])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_epoch_holds_each_example_once(num_examples, epoch):
    positions = epoch * num_examples + np.arange(num_examples)
    order = rng.example_order(0, positions, num_examples)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 1000
    positions = np.arange(n)
    first = rng.example_order(0, positions, n)
    for other in (rng.example_order(0, n + positions, n), rng.example_order(1, positions, n)):
        # A permutation that knows nothing of the other agrees with it in one place on average.
        assert (other == first).sum() < 8
        assert abs(correlation(first, other)) < 5
    assert abs(correlation(first, positions)) < 5


def test_the_order_of_some_positions_is_that_part_of_the_whole_order():
    n = 100
    positions = np.arange(250)
    whole = rng.example_order(4, positions, n)
    np.testing.assert_array_equal(rng.example_order(4, positions[95:210], n), whole[95:210])
    np.testing.assert_array_equal(rng.example_order(4, positions.reshape(5, 50), n), whole.reshape(5, 50))
    np.testing.assert_array_equal(rng.example_order(4, positions[::-1], n), whole[::-1])


def test_one_example_is_taken_every_time():
    np.testing.assert_array_equal(rng.example_order(0, np.arange(6).reshape(2, 3), 1), np.zeros([2, 3]))


def test_no_positions_give_no_examples():
    assert rng.example_order(0, np.zeros([0, 4], np.int64), 10).shape == (0, 4)


def test_positions_far_into_a_run_are_in_range():
    far = 10**12 + np.arange(1000)
    order = rng.example_order(0, far, 60_000)
    assert order.min() >= 0 and order.max() < 60_000 and len(np.unique(order)) == 1000


@pytest.mark.parametrize(
    "seed, first, num_examples, expected",
    [
        (0, 0, 60_000, [46569, 57056, 22849, 549, 26795, 6957, 4459, 42980]),
        # Over the border of the first epoch.
        (7, 59_996, 60_000, [50144, 41980, 8662, 30204, 27805, 3657, 6459, 44769]),
        (3, 0, 5, [3, 4, 2, 1, 0, 2, 3, 1]),
    ],
)
def test_example_order_golden(seed, first, num_examples, expected):
    assert rng.example_order(seed, first + np.arange(8), num_examples).tolist() == expected, MEANT


def test_keys_golden():
    assert rng.key(0, "noise/d") == 5985223781527421429, MEANT


@pytest.mark.parametrize(
    "seed, name, expected", [(0, "generator/0_kernel", 576353762), (1, "discriminator/2_kernel", 393541758)]
)
def test_init_seed_golden(seed, name, expected):
    assert rng.init_seed(seed, name) == expected, MEANT


def test_keys_and_init_seeds_differ_and_fit_their_types():
    names = [(seed, name) for seed in (0, 1, 10, 11) for name in ("a", "b", "1/a", "0_kernel", "1_kernel")]
    keys = {rng.key(*n) for n in names}
    seeds = {rng.init_seed(*n) for n in names}
    assert len(keys) == len(seeds) == len(names)
    assert all(0 <= k < 2**64 for k in keys) and all(0 <= s < 2**31 for s in seeds)
