"""One update is the same computation on every number of replicas."""

import types

import numpy as np
import pytest
import runs
import tensorflow as tf
from tensorflow.python.framework import kernels

from gan_dist import step as step_lib


def updates_of_one_step(training: runs.Training) -> dict[str, np.ndarray]:
    before = training.values()
    training.run(0, 1)
    return {key: after - before[key] for key, after in training.values().items()}


def one_step_config(*flags: str):
    # With epsilon=1 Adam's first step is proportional to the gradient; with the usual 1e-7 it is close to
    # lr * sign(gradient), which would hide a gradient N times too large.
    return runs.config(*runs.TINY, "--adam_epsilon=1", "--generator_lr=1", "--discriminator_lr=1", *flags)


def assert_same_updates(shared: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> None:
    assert alone.keys() == shared.keys()
    for name, update in alone.items():
        np.testing.assert_allclose(shared[name], update, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("num_replicas", "labels"), [(2, "--noconditional"), (4, "--conditional")])
def test_an_update_does_not_depend_on_the_replica_count(num_replicas, labels):
    config = one_step_config(labels)
    alone = updates_of_one_step(runs.Training(config))
    assert min(np.abs(alone[f"{network}/0_kernel"]).max() for network in ("generator", "discriminator")) > 1e-4
    assert_same_updates(updates_of_one_step(runs.Training(config, num_replicas)), alone)


@pytest.mark.parametrize("num_replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("net", [runs.QUICKSTART, runs.REFERENCE_1], ids=["quickstart", "reference_1"])
def test_an_update_of_the_real_nets_does_not_depend_on_the_replica_count(net, num_replicas):
    config = runs.config(*net, "--adam_epsilon=1", "--generator_lr=1", "--discriminator_lr=1")
    alone, shared = (updates_of_one_step(runs.Training(config, n, examples=60_000)) for n in (1, num_replicas))
    assert_same_updates(shared, alone)


@pytest.mark.parametrize("part", ["loss", "statistics"])
def test_the_comparison_notices_a_mean_over_the_replica_instead_of_the_global_batch(part, monkeypatch):
    config = one_step_config()
    alone = updates_of_one_step(runs.Training(config))
    right = step_lib._update
    if part == "loss":

        def wrong(config, state, layout):
            return right(
                config, state, types.SimpleNamespace(global_batch=layout.per_replica, replicas=layout.replicas)
            )

        monkeypatch.setattr(step_lib, "_update", wrong)
    else:
        config = one_step_config("--nosync_batch_norm")
    with pytest.raises(AssertionError):
        assert_same_updates(updates_of_one_step(runs.Training(config, 2)), alone)


@pytest.mark.parametrize("net", [runs.QUICKSTART, runs.REFERENCE_1], ids=["quickstart", "reference_1"])
def test_twenty_steps_in_float64_agree_on_one_two_and_four_replicas(net):
    config = runs.config(*net, "--precision=float64")
    results = []
    for num_replicas in (1, 2, 4):
        training = runs.Training(config, num_replicas, examples=60_000)
        training.run(0, 20)
        results.append(training.values())
    for shared in results[1:]:
        runs.assert_close(shared, results[0], atol=1e-9)


@pytest.mark.parametrize("resolution", [32, 64])
def test_colour_images_of_other_resolutions_agree_too(resolution):
    config = runs.config(*runs.TINY, "--precision=float64", f"--resolution={resolution}", "--channels=3")
    alone, shared = runs.Training(config), runs.Training(config, 2)
    for training in (alone, shared):
        training.run(0, 5)
    runs.assert_close(shared.values(), alone.values(), atol=1e-9)


@pytest.mark.parametrize("sync", ["--sync_batch_norm", "--nosync_batch_norm"])
def test_every_variable_is_equal_on_all_replicas(sync):
    training = runs.Training(runs.config(*runs.TINY, sync), 2)
    training.run(0, 3)
    for key, variable in training.state.flat().items():
        first, *others = (copy.numpy() for copy in training.strategy.experimental_local_results(variable))
        assert len(others) == 1
        for other in others:
            np.testing.assert_array_equal(other, first, err_msg=key)


def test_without_sync_batch_norm_the_averages_are_the_mean_over_replicas():
    shared = runs.Training(one_step_config("--nosync_batch_norm"), 2)
    alone = runs.Training(one_step_config())
    shared.run(0, 1)
    alone.run(0, 1)
    # The mean of two halves' means is the mean of the whole; the first layer sees the same noise in both.
    name = "generator/1_moving_mean"
    assert np.abs(alone.values()[name]).max() > 1e-6
    np.testing.assert_allclose(shared.values()[name], alone.values()[name], atol=1e-7)


def test_how_steps_are_cut_into_blocks_changes_no_bit():
    config = runs.config(*runs.TINY)
    whole, cut = runs.Training(config), runs.Training(config)
    whole.run(0, 5)
    for first, last in ((0, 1), (1, 4), (4, 5)):
        cut.run(first, last)
    runs.assert_close(cut.values(), whole.values(), atol=0)
    assert cut.advance.experimental_get_tracing_count() == 1


def test_the_golden_steps():
    training = runs.Training(runs.config(*runs.TINY, "--precision=float64", "--conditional"))
    scalars, skipped = training.run(0, 10)
    golden = {
        "loss/generator": 0.6831126913589912,
        "loss/discriminator": 1.388384198486947,
        "accuracy/real": 0.525,
        "accuracy/fake": 0.4,
        "gradient_norm/generator": 0.6408609791367229,
        "gradient_norm/discriminator": 1.0542189160024185,
    }
    assert skipped == 0
    for name, value in golden.items():
        assert scalars[name] == pytest.approx(value, rel=1e-7), (
            f"{name}, the mean of ten steps, has changed: {scalars}. If that is meant, say why in the commit, put "
            "the new numbers here, and say in CHANGELOG.md that runs begun before cannot be reproduced."
        )


@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(network):
    training = runs.Training(runs.config(*runs.TINY), 2)
    # In the generator's update the discriminator's is done already; it must be undone, too.
    variables = getattr(training.state, f"{network}_variables")
    name = "0_kernel" if network == "discriminator" else "1_gamma"
    variables[name].assign(tf.fill(variables[name].shape, float("inf")))
    before = training.values()
    _, skipped = training.run(0, 3)
    assert skipped == 3
    after = training.values()
    counters = {"step": 3, "skipped_steps": 3, "consecutive_skips": 3}
    assert {key: after.pop(key) for key in counters} == counters
    runs.assert_close(after, {key: value for key, value in before.items() if key not in counters}, atol=0)


def test_scalars_are_means_over_the_global_batch():
    alone, _ = runs.Training(runs.config(*runs.TINY)).run(0, 1)
    shared, _ = runs.Training(runs.config(*runs.TINY), 2).run(0, 1)
    assert shared == pytest.approx(alone, rel=1e-4, abs=1e-6)
    # Both networks start near indifference: log 2 for each of the three terms.
    assert alone["loss/generator"] == pytest.approx(np.log(2), abs=0.1)
    assert alone["loss/discriminator"] == pytest.approx(2 * np.log(2), abs=0.1)


def test_every_operation_of_a_step_has_a_kernel_for_gpus():
    """Without one TensorFlow computes it on the host, and moves what it needs there and back in each step."""
    training = runs.Training(runs.config(*runs.TINY, "--conditional"))
    graph = training.advance.get_concrete_function().graph.as_graph_def()
    functions = {function.signature.name: function.node_def for function in graph.library.function}
    # Control flow and calls have no kernel of their own; constants and arguments are where they are used.
    plumbing = {"Const", "Placeholder", "NoOp", "While", "StatelessWhile", "If", "StatelessIf", "_Arg", "_Retval"}
    plumbing |= {"PartitionedCall", "StatefulPartitionedCall"}
    missing = set()
    for node in [*graph.node, *(node for nodes in functions.values() for node in nodes)]:
        if node.op not in plumbing and not has_gpu_kernel(node):
            missing.add((node.op, *(tf.as_dtype(a.type).name for a in node.attr.values() if a.type)))
    assert not missing


def has_gpu_kernel(node) -> bool:
    registered = kernels.get_registered_kernels_for_op(node.op).kernel
    for kernel in registered:
        types = {c.name: c.allowed_values.list.type for c in kernel.constraint if c.name in node.attr}
        fits = all(not allowed or node.attr[name].type in allowed for name, allowed in types.items())
        if kernel.device_type in ("GPU", "DEFAULT") and fits:
            return True
    return False


def test_bfloat16_trains_float32_variables():
    training = runs.Training(runs.config(*runs.TINY, "--precision=bfloat16"), 2)
    scalars, skipped = training.run(0, 2)
    assert skipped == 0
    assert all(np.isfinite(value) for value in scalars.values())
    kinds = {variable.dtype for variable in training.state.flat().values()}
    assert kinds == {tf.float32, tf.int64}


def test_xla_computes_the_same_update():
    config = one_step_config("--xla=off")
    plain = updates_of_one_step(runs.Training(config))
    assert_same_updates(updates_of_one_step(runs.Training(one_step_config("--xla=on"))), plain)


def test_the_average_moves_towards_the_generator_by_the_young_rate_first():
    training = runs.Training(runs.config(*runs.TINY, "--ema_half_life_kimg=10"))
    before = training.values()
    training.run(0, 1)
    after = training.values()
    # After one update a young average keeps (1 + 1) / (10 + 1) of the old.
    for name in ("0_kernel", "1_moving_mean"):
        expected = before[f"ema/{name}"] * 2 / 11 + after[f"generator/{name}"] * 9 / 11
        np.testing.assert_allclose(after[f"ema/{name}"], expected, rtol=1e-5, atol=1e-8)


def test_half_of_the_average_is_left_after_its_half_life():
    images = 10_000
    assert step_lib.ema_decay(10.0, 100) ** (images / 100) == pytest.approx(0.5)
    assert step_lib.ema_decay(0.0, 100) == 0.0


def test_without_a_half_life_the_average_is_the_generator():
    training = runs.Training(runs.config(*runs.TINY, "--ema_half_life_kimg=0"))
    training.run(0, 2)
    values = training.values()
    for name in training.state.ema:
        np.testing.assert_allclose(values[f"ema/{name}"], values[f"generator/{name}"], rtol=1e-6, atol=1e-8)
