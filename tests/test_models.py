"""The networks: sizes, names, initial values, batch norm, labels, precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gan_dist import config as config_lib
from gan_dist import models
from gan_dist.config import DataConfig, ModelConfig
from gan_dist.models import BatchNorm, BatchStatistics, Network

TINY = {"width": 4, "discriminator_features": 8, "latent_size": 6}
BATCH = 3


def create(resolution=28, channels=1, seed=0, precision="float32", **model: object) -> tuple[Network, Network]:
    return models.create(
        ModelConfig(**model), DataConfig(resolution=resolution, channels=channels), 10, seed, precision
    )


def values(network: Network) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value) for name, value in network.initial.items()}


def noise(*shape: int, dtype=np.float32, seed=0) -> tf.Tensor:
    return tf.constant(np.random.default_rng(seed).normal(size=shape).astype(dtype))


# --- sizes, ranges, names


def generator_parameters(resolution: int, c: int) -> int:
    """Layer by layer: latent 100, kernels 5x5, 64 channels nearest the image, c in it."""
    if resolution == 28:
        return (
            100 * (7 * 7 * 128)  # dense to 7x7x128, no bias
            + 2 * (7 * 7 * 128)  # batch norm of 6,272 features: gamma, beta
            + 5 * 5 * 128 * 64  # to 14x14x64, no bias
            + 2 * 64
            + 5 * 5 * 64 * c  # to 28x28xc
            + c  # with a bias: no batch norm follows
        )
    if resolution == 32:
        return (
            100 * (4 * 4 * 256)
            + 2 * (4 * 4 * 256)
            + 5 * 5 * 256 * 128  # to 8x8x128
            + 2 * 128
            + 5 * 5 * 128 * 64  # to 16x16x64
            + 2 * 64
            + 5 * 5 * 64 * c  # to 32x32xc
            + c
        )
    return (
        100 * (4 * 4 * 512)
        + 2 * (4 * 4 * 512)
        + 5 * 5 * 512 * 256  # to 8x8x256
        + 2 * 256
        + 5 * 5 * 256 * 128  # to 16x16x128
        + 2 * 128
        + 5 * 5 * 128 * 64  # to 32x32x64
        + 2 * 64
        + 5 * 5 * 64 * c  # to 64x64xc
        + c
    )


def discriminator_parameters(resolution: int, c: int) -> int:
    """Layer by layer, the mirror image, then 1,024 features and a logit with a bias."""
    total = 5 * 5 * c * 64 + 2 * 64  # half the resolution, 64 channels
    total += 5 * 5 * 64 * 128 + 2 * 128  # a quarter
    if resolution >= 32:
        total += 5 * 5 * 128 * 256 + 2 * 256  # an eighth
    if resolution == 64:
        total += 5 * 5 * 256 * 512 + 2 * 512  # a sixteenth
    flat = {28: 7 * 7 * 128, 32: 4 * 4 * 256, 64: 4 * 4 * 512}[resolution]
    return total + flat * 1024 + 2 * 1024 + 1024 + 1


@pytest.mark.parametrize(
    "resolution, channels, in_generator, in_discriminator",
    [
        (28, 1, 846_273, 6_632_385),
        (28, 3, 849_475, 6_635_585),
        (32, 1, 1_443_777, 5_223_873),
        (32, 3, 1_446_979, 5_227_073),
        (64, 1, 5_138_881, 12_696_001),
        (64, 3, 5_142_083, 12_699_201),
    ],
)
def test_the_dcgan_has_the_parameters_of_its_formula(resolution, channels, in_generator, in_discriminator):
    assert generator_parameters(resolution, channels) == in_generator
    assert discriminator_parameters(resolution, channels) == in_discriminator
    generator, discriminator = create(resolution, channels)
    assert (generator.parameters, discriminator.parameters) == (in_generator, in_discriminator)


def test_labels_add_a_row_a_class_to_the_generator_and_an_embedding_to_the_discriminator():
    generator, discriminator = create(conditional=True)
    assert generator.parameters == 846_273 + 10 * (7 * 7 * 128)
    assert discriminator.parameters == 6_632_385 + 10 * 1024
    assert generator.num_classes == discriminator.num_classes == 10


def test_without_dense_features_the_logit_reads_the_last_convolution():
    _, discriminator = create(discriminator_features=0, conditional=True)
    convolutions = 25 * 64 + 2 * 64 + 25 * 64 * 128 + 2 * 128
    assert discriminator.parameters == convolutions + (6272 + 1) + 10 * 6272


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [28, 32, 64])
@pytest.mark.parametrize("statistics", [None, BatchStatistics()], ids=["inference", "training"])
def test_images_and_logits_have_their_shapes_and_images_fill_their_range(resolution, channels, statistics):
    generator, discriminator = create(resolution, channels, **TINY)
    scaled = values(generator) | {"0_kernel": tf.constant(generator.initial["0_kernel"]) * 1e5}
    scaled |= {name: v * 100 for name, v in scaled.items() if name.endswith("kernel")}
    image_BHWC, _ = generator(scaled, noise(BATCH, 6), None, statistics)
    assert image_BHWC.shape == [BATCH, resolution, resolution, channels]
    low, high = models.ARCHITECTURES["dcgan"].image_range
    assert (low, high) == (-1.0, 1.0)
    assert low <= image_BHWC.numpy().min() < -0.9 and 0.9 < image_BHWC.numpy().max() <= high
    logits_B, _ = discriminator(values(discriminator), image_BHWC, None, statistics)
    assert logits_B.shape == [BATCH]


def test_every_architecture_that_can_be_chosen_is_there():
    choices = {s.name: s.option.choices for s in config_lib.settings()}["architecture"]
    assert set(models.ARCHITECTURES) == set(choices)


NORM = ("gamma", "beta", "moving_mean", "moving_variance")
NAMES = (
    "The structural names of the 28x28 networks are other ones now, so checkpoints written before cannot be read. If "
    "that is meant, put the new names here and say in CHANGELOG.md that old checkpoints are lost."
)


def test_structural_names_golden():
    generator, discriminator = create(conditional=True, **TINY)
    norms = {i: [f"{i}_{role}" for role in NORM] for i in (1, 3, 5)}
    assert list(generator.initial) == ["0_kernel", *norms[1], "2_kernel", *norms[3], "4_kernel", "4_bias"], NAMES
    assert list(discriminator.initial) == [
        *("0_kernel", *norms[1], "2_kernel", *norms[3], "4_kernel", *norms[5], "6_kernel", "6_bias", "7_kernel")
    ], NAMES


@pytest.mark.parametrize("resolution", [28, 32, 64])
def test_trainable_and_averages_are_all_variables_and_no_bias_stands_before_a_batch_norm(resolution):
    for network, biases in zip(create(resolution, **TINY), (1, 1), strict=True):
        assert sorted((*network.trainable, *network.averages)) == sorted(network.initial)
        assert all("_moving_" in name for name in network.averages)
        assert not any("_moving_" in name for name in network.trainable)
        normed = [int(name.split("_")[0]) for name in network.trainable if name.endswith("gamma")]
        with_bias = [int(name.split("_")[0]) for name in network.trainable if name.endswith("bias")]
        assert len(with_bias) == biases
        assert not {i + 1 for i in with_bias} & set(normed)


def test_the_elements_of_a_stack_are_the_numbers_of_all_its_outputs():
    generator, discriminator = create()
    # Dense, norm, LeakyReLU, reshape; 14x14x64 three times; 28x28x1 and its tanh.
    assert generator.layer.stack.elements(100) == 4 * 6272 + 3 * 14 * 14 * 64 + 2 * 28 * 28
    # 14x14x64 and 7x7x128 three times each, flat, and 1,024 features three times.
    assert discriminator.layer.stack.elements((28, 28, 1)) == 3 * 14 * 14 * 64 + 4 * 6272 + 3 * 1024


# --- initial values


def test_initial_values_are_those_of_radford_and_of_batch_norm():
    for network in create():
        for name, value in network.initial.items():
            if name.endswith("kernel"):
                error = 5 * 0.02 / np.sqrt(value.size)
                assert abs(value.mean()) < error and abs(value.std() - 0.02) < error, name
            else:
                np.testing.assert_array_equal(value, float(name.endswith(("gamma", "variance"))), err_msg=name)


def test_initial_values_depend_on_seed_and_name_alone():
    keras.utils.set_random_seed(1)
    generator, discriminator = create(**TINY)
    keras.utils.set_random_seed(2)
    # Another discriminator is built, and the first layers that both have stay as they are.
    for other in ({"conditional": False, "discriminator_features": 0}, {"discriminator_features": 8}):
        again, other_discriminator = create(**(TINY | other))
        assert again.initial.keys() == generator.initial.keys()
        for name, value in generator.initial.items():
            np.testing.assert_array_equal(again.initial[name], value, err_msg=name)
        for name in ("0_kernel", "2_kernel"):
            np.testing.assert_array_equal(other_discriminator.initial[name], discriminator.initial[name], err_msg=name)


def test_layers_networks_and_seeds_have_initial_values_of_their_own():
    # Kernels of one shape in several places.
    same = {"width": 4, "kernel_size": 3}
    kernels = [n.initial[k].ravel()[:32] for n in create(64, **same) for k in n.initial if k.endswith("kernel")]
    kernels += [
        n.initial[k].ravel()[:32] for n in create(64, seed=1, **same) for k in n.initial if k.endswith("kernel")
    ]
    assert len(kernels) == 22
    correlations = np.abs(np.corrcoef(kernels) - np.eye(len(kernels)))
    assert correlations.max() < 0.9


# --- batch norm

SHAPE = (6, 5, 4, 3)


def norm_pair(seed: int, shape=SHAPE) -> tuple[BatchNorm, keras.layers.BatchNormalization]:
    """Ours and Keras', in float64, with the same random weights and averages."""
    ours, theirs = BatchNorm(dtype="float64"), keras.layers.BatchNormalization(dtype="float64")
    ours.build(shape)
    theirs.build(shape)
    random = np.random.default_rng(seed)
    for role in NORM:
        value = random.uniform(0.5, 2, shape[-1])
        getattr(ours, role).assign(value)
        getattr(theirs, role).assign(value)
    return ours, theirs


def images(seed: int, shape=SHAPE) -> tf.Tensor:
    random = np.random.default_rng(seed)
    return tf.constant(random.normal(size=shape) * random.uniform(0.5, 2, shape[-1]) + random.normal(size=shape[-1]))


@pytest.mark.parametrize("shape", [SHAPE, (12, 3)], ids=["images", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_keras_in_outputs_gradients_and_averages(shape, training):
    ours, theirs = norm_pair(0, shape)
    x, weight = images(1, shape), noise(*shape, dtype=np.float64, seed=2)
    results = []
    for layer, options in (
        (ours, {"statistics": BatchStatistics() if training else None}),
        (theirs, {"training": training}),
    ):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **options)
            # Weighted, because the plain sum of a normalised batch has no gradient.
            loss = tf.reduce_sum(y * weight)
        gradients = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
        results.append([y, *gradients, layer.moving_mean.value, layer.moving_variance.value])
    for name, a, b in zip(("y", "dx", "dgamma", "dbeta", "mean", "variance"), *results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


def test_batch_norm_moves_its_averages_in_training_alone():
    ours, _ = norm_pair(0)
    x = images(1)
    before = ours.moving_mean.numpy(), ours.moving_variance.numpy()
    ours(x)
    np.testing.assert_array_equal((ours.moving_mean.numpy(), ours.moving_variance.numpy()), before)
    ours(x, statistics=BatchStatistics())
    batch = x.numpy().reshape(-1, 3)
    np.testing.assert_allclose(ours.moving_mean, 0.99 * before[0] + 0.01 * batch.mean(0), rtol=1e-12)
    np.testing.assert_allclose(ours.moving_variance, 0.99 * before[1] + 0.01 * batch.var(0), rtol=1e-12)


def test_two_groups_stacked_are_normalised_like_two_separate_batches():
    first, second = images(1), images(2) * 3 + 5
    start = norm_pair(0)[0]
    means = []
    outputs = []
    for x in (first, second):
        layer, _ = norm_pair(0)
        outputs.append(layer(x, statistics=BatchStatistics()))
        means.append((layer.moving_mean.numpy(), layer.moving_variance.numpy()))
    stacked = start(tf.concat([first, second], 0), statistics=BatchStatistics(groups=2))
    np.testing.assert_allclose(stacked, tf.concat(outputs, 0), rtol=1e-12, atol=1e-12)
    # The averages move by the mean of both groups' statistics.
    np.testing.assert_allclose((start.moving_mean, start.moving_variance), np.mean(means, 0), rtol=1e-12)


def test_statistics_over_replicas_are_those_of_the_whole_batch():
    whole = images(1)
    here, elsewhere = tf.split(whole, 2)
    flat = tf.reshape(elsewhere, [-1, 3])
    others = tf.stack([tf.reduce_mean(flat, 0), tf.reduce_mean(flat**2, 0)])[:, tf.newaxis]
    ours, reference = norm_pair(0)
    shared = ours(here, statistics=BatchStatistics(replicas=2, all_reduce=lambda sums: sums + others))
    np.testing.assert_allclose(shared, reference(whole, training=True)[: here.shape[0]], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(ours.moving_variance, reference.moving_variance, rtol=1e-12)


@pytest.mark.parametrize(("replicas", "collectives"), [(1, 0), (2, 1)])
def test_a_batch_norm_layer_needs_one_all_reduce_and_none_on_one_replica(replicas, collectives):
    calls = []
    ours, _ = norm_pair(0)
    statistics = BatchStatistics(2, replicas, all_reduce=lambda sums: calls.append(sums) or replicas * sums)
    ours(images(1), statistics=statistics)
    assert len(calls) == collectives


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_small_variance_beside_a_large_mean_is_exact_in_float32(replicas):
    deviations = np.random.default_rng(0).normal(size=(1, 8, 500, 16))
    x = (1000.0 + deviations).astype(np.float32)
    statistics = BatchStatistics(replicas=replicas, all_reduce=lambda sums: replicas * sums)
    mean, variance = statistics.moments(tf.constant(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((1, 2)), rtol=1e-5)
    # The mean of squares would have lost all of it.
    naive = tf.reduce_mean(tf.square(x), [1, 2]) - tf.square(tf.reduce_mean(x, [1, 2]))
    assert np.abs(naive / exact.var((1, 2)) - 1).max() > 1e-2


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_variance_of_a_constant_batch_is_not_negative(replicas):
    constants = np.random.default_rng(0).uniform(1, 1000, 64).astype(np.float32)
    x = tf.constant(np.broadcast_to(constants, (1, 10, 100, 64)))
    _, variance = BatchStatistics(replicas=replicas, all_reduce=lambda sums: replicas * sums).moments(x)
    assert 0 <= variance.numpy().min() and variance.numpy().max() < 1e-6


def test_statistics_of_a_bfloat16_batch_are_taken_in_float32():
    layer = BatchNorm(dtype="mixed_bfloat16")
    layer.build((None, 1))
    x = tf.cast(images(1, (4096, 1)), tf.bfloat16)
    y = layer(x, statistics=BatchStatistics())
    assert y.dtype == tf.bfloat16
    assert {v.dtype for v in layer.variables} == {"float32"}
    exact = tf.cast(x, tf.float64).numpy()
    np.testing.assert_allclose(layer.moving_mean, 0.01 * exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.99 + 0.01 * exact.var(0), rtol=1e-5)


# --- networks as functions


def test_a_discriminator_judges_two_stacked_batches_as_it_judges_each_alone():
    _, discriminator = create(precision="float64", **TINY)
    v = values(discriminator)
    real, fake = noise(4, 28, 28, 1, dtype=np.float64, seed=1), noise(4, 28, 28, 1, dtype=np.float64, seed=2) * 2 + 1
    together, _ = discriminator(v, tf.concat([real, fake], 0), None, BatchStatistics(groups=2))
    alone = [discriminator(v, x, None, BatchStatistics())[0] for x in (real, fake)]
    np.testing.assert_allclose(together, tf.concat(alone, 0), rtol=1e-12, atol=1e-14)
    mixed, _ = discriminator(v, tf.concat([real, fake], 0), None, BatchStatistics(groups=1))
    assert np.abs(mixed - together).max() > 1e-3


def test_a_network_is_a_function_of_the_values_that_it_is_given():
    generator, _ = create(**TINY)
    start, z = values(generator), noise(BATCH, 6)
    first, averages = generator(start, z, None, BatchStatistics())
    again, _ = generator(start, z, None, BatchStatistics())
    np.testing.assert_array_equal(first, again)
    assert set(averages) == set(generator.averages)
    assert all(np.abs(averages[name] - start[name]).max() > 0 for name in averages)
    other, _ = generator(start | {"4_bias": start["4_bias"] + 0.5}, z, None, BatchStatistics())
    np.testing.assert_allclose(tf.atanh(other), tf.atanh(first) + 0.5, atol=1e-5)


def test_the_networks_compute_what_the_paper_says_layer_by_layer():
    """Against TensorFlow's own operations, in float64: strides, padding, slopes, and what comes before what."""
    generator, discriminator = create(precision="float64", **TINY)
    random = np.random.default_rng(0)
    g, d = (
        {
            name: tf.constant(random.uniform(0.5, 1.5, value.shape) - 1.0 * name.endswith("kernel"))
            for name, value in n.initial.items()
        }
        for n in (generator, discriminator)
    )

    def norm_and_leaky_relu(x, v, i):
        x = (x - v[f"{i}_moving_mean"]) / tf.sqrt(v[f"{i}_moving_variance"] + 1e-3) * v[f"{i}_gamma"] + v[f"{i}_beta"]
        # The slope is an attribute of the operation, and those are float32.
        return tf.where(x > 0, x, float(np.float32(0.2)) * x)

    z = noise(BATCH, 6, dtype=np.float64)
    x = tf.reshape(norm_and_leaky_relu(z @ g["0_kernel"], g, 1), [BATCH, 7, 7, 8])
    x = norm_and_leaky_relu(tf.nn.conv2d_transpose(x, g["2_kernel"], [BATCH, 14, 14, 4], 2, "SAME"), g, 3)
    x = tf.tanh(tf.nn.conv2d_transpose(x, g["4_kernel"], [BATCH, 28, 28, 1], 2, "SAME") + g["4_bias"])
    np.testing.assert_allclose(generator(g, z, None, None)[0], x, rtol=1e-9, atol=1e-12)

    image = noise(BATCH, 28, 28, 1, dtype=np.float64)
    x = norm_and_leaky_relu(tf.nn.conv2d(image, d["0_kernel"], 2, "SAME"), d, 1)
    x = norm_and_leaky_relu(tf.nn.conv2d(x, d["2_kernel"], 2, "SAME"), d, 3)
    x = norm_and_leaky_relu(tf.reshape(x, [BATCH, 7 * 7 * 8]) @ d["4_kernel"], d, 5)
    logits_B = (x @ d["6_kernel"] + d["6_bias"])[:, 0]
    np.testing.assert_allclose(discriminator(d, image, None, None)[0], logits_B, rtol=1e-9, atol=1e-12)


def test_without_statistics_the_averages_are_used_and_stay():
    generator, _ = create(**TINY)
    start, z = values(generator), noise(BATCH, 6)
    alone, averages = generator(start, z[:1], None, None)
    batch, _ = generator(start, z, None, None)
    np.testing.assert_allclose(alone[0], batch[0], atol=1e-6)
    for name, value in averages.items():
        np.testing.assert_array_equal(value, start[name], err_msg=name)
    moved, _ = generator(start | {"1_moving_mean": start["1_moving_mean"] + 1}, z, None, None)
    assert np.abs(moved - batch).max() > 1e-5


def test_labels_change_images_and_logits_of_a_conditional_pair():
    generator, discriminator = create(conditional=True, **TINY)
    z, image = noise(2, 6), noise(2, 28, 28, 1)
    three, five = (tf.one_hot([k, k], 10) for k in (3, 5))
    for network, inputs in ((generator, z), (discriminator, image)):
        outputs = [network(values(network), inputs, labels, None)[0].numpy() for labels in (three, five, three)]
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-6
        np.testing.assert_array_equal(outputs[0], outputs[2])


def test_the_label_enters_the_logit_as_an_inner_product_with_its_embedding():
    _, discriminator = create(conditional=True, precision="float64", **TINY)
    v = values(discriminator)
    image, labels = noise(2, 28, 28, 1, dtype=np.float64), tf.one_hot([3, 5], 10, dtype=tf.float64)
    plain, _ = discriminator(v | {"7_kernel": tf.zeros_like(v["7_kernel"])}, image, labels, None)
    features, _ = discriminator.layer.stack.stateless_call(
        [v[n] for n in discriminator.trainable if n[0] < "6"], [v[n] for n in discriminator.averages], image
    )
    embedding = tf.gather(v["7_kernel"], [3, 5])
    logits, _ = discriminator(v, image, labels, None)
    np.testing.assert_allclose(logits - plain, tf.reduce_sum(embedding * features, 1), rtol=1e-10)


@pytest.mark.parametrize(
    "precision, compute, variables",
    [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("float64", "float64", "float64")],
)
def test_outputs_and_variables_have_the_type_of_the_precision(precision, compute, variables):
    for network, inputs in zip(create(precision=precision, **TINY), (noise(2, 6), noise(2, 28, 28, 1)), strict=True):
        assert network.layer.compute_dtype == compute
        assert {str(value.dtype) for value in network.initial.values()} == {variables}
        output, averages = network(values(network), tf.cast(inputs, variables), None, BatchStatistics())
        assert output.dtype == variables
        assert {a.dtype for a in averages.values()} == {tf.as_dtype(variables)}


def test_bfloat16_computes_in_bfloat16_and_stays_near_float32():
    for network, reference, inputs in zip(
        create(precision="bfloat16", **TINY), create(**TINY), (noise(2, 6), noise(2, 28, 28, 1)), strict=True
    ):
        v = values(reference)
        half, full = network(v, inputs, None, None)[0].numpy(), reference(v, inputs, None, None)[0].numpy()
        difference = np.abs(half - full).max() / np.abs(full).max()
        assert 1e-4 < difference < 0.05
