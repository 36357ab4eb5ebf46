"""Adam and the packed reduction."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from gan_dist import optimizers
from gan_dist.optimizers import Adam

SHAPES = {"0_kernel": (3, 4), "1_gamma": (4,), "2_bias": (1,)}
ADAM = Adam(learning_rate=2e-4, beta1=0.5, beta2=0.999, epsilon=1e-7)


def variables(dtype, seed=0) -> dict[str, tf.Variable]:
    random = np.random.default_rng(seed)
    return {name: tf.Variable(random.normal(size=shape).astype(dtype)) for name, shape in SHAPES.items()}


def zeros(dtype) -> dict[str, tf.Variable]:
    slots = {slot: tf.Variable(np.zeros(shape, dtype)) for n, shape in SHAPES.items() for slot in Adam.slots(n)}
    return {"count": tf.Variable(0, dtype=tf.int64), **slots}


def gradients(dtype, step: int) -> dict[str, tf.Tensor]:
    random = np.random.default_rng(100 + step)
    return {name: tf.constant((random.normal(size=s) * 10.0**-step).astype(dtype)) for name, s in SHAPES.items()}


def apply(adam: Adam, grads, weights, state, where=True) -> None:
    variables = [*(weights[name] for name in grads), *state.values()]
    old = [tf.identity(v) for v in variables]
    new_weights, new_state = adam.update(grads, *({n: tf.identity(v) for n, v in d.items()} for d in (weights, state)))
    new = [*(new_weights[name] for name in grads), *(new_state[name] for name in state)]
    optimizers.assign_where(tf.constant(where), variables, new, old)


def bits(state: dict[str, tf.Variable]) -> dict[str, bytes]:
    return {name: v.numpy().tobytes() for name, v in state.items()}


def test_slots_are_named_after_their_variable():
    assert Adam.slots("3_kernel") == ("3_kernel_m", "3_kernel_v")


@pytest.mark.parametrize(
    "beta1, beta2, epsilon", [(0.5, 1 - 2**-10, 1e-7), (0.875, 1 - 2**-6, 1e-3), (0.0, 0.875, 1e-8)]
)
def test_adam_equals_keras_over_twenty_steps(beta1, beta2, epsilon):
    # Keras rounds decays and step size to float32, whatever the variables are: these numbers survive it.
    learning_rate = 2.0**-12
    ours, state = variables(np.float64), zeros(np.float64)
    theirs = [keras.Variable(v.numpy(), dtype="float64") for v in ours.values()]
    reference = keras.optimizers.Adam(learning_rate, beta1, beta2, epsilon)
    reference.build(theirs)
    start = {name: v.numpy() for name, v in ours.items()}
    for step in range(20):
        grads = gradients(np.float64, step % 5)
        apply(Adam(learning_rate, beta1, beta2, epsilon), grads, ours, state)
        reference.apply(list(grads.values()), theirs)
    # Updates, not weights: a weight dwarfs its update, so a wrong update would pass.
    for (name, v), other in zip(ours.items(), theirs, strict=True):
        np.testing.assert_allclose(v - start[name], other.numpy() - start[name], rtol=1e-12, atol=1e-15, err_msg=name)
    assert state["count"].numpy() == 20


def test_adam_follows_its_algorithm_over_twenty_steps_with_the_default_settings():
    ours, state = variables(np.float64), zeros(np.float64)
    start = {name: v.numpy() for name, v in ours.items()}
    moments = {name: (np.zeros(shape), np.zeros(shape)) for name, shape in SHAPES.items()}
    updates = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t in range(1, 21):
        grads = gradients(np.float64, t % 5)
        apply(ADAM, grads, ours, state)
        for name, g in grads.items():
            m, v = moments[name]
            m, v = 0.5 * m + 0.5 * g.numpy(), 0.999 * v + 0.001 * g.numpy() ** 2
            moments[name] = m, v
            updates[name] -= 2e-4 * np.sqrt(1 - 0.999**t) / (1 - 0.5**t) * m / (np.sqrt(v) + 1e-7)
    for name, update in updates.items():
        np.testing.assert_allclose(ours[name] - start[name], update, rtol=1e-11, err_msg=name)
        for slot, moment in zip(Adam.slots(name), moments[name], strict=True):
            np.testing.assert_allclose(state[slot], moment, rtol=1e-12, err_msg=slot)


def test_the_first_step_of_adam_matches_closed_form():
    ours, state = variables(np.float64), zeros(np.float64)
    start = {name: v.numpy() for name, v in ours.items()}
    grads = gradients(np.float64, 0)
    adam = Adam(learning_rate=0.1, beta1=0.5, beta2=0.75, epsilon=1.0)
    apply(adam, grads, ours, state)
    for name, g in grads.items():
        m, v = (1 - 0.5) * g.numpy(), (1 - 0.75) * g.numpy() ** 2
        # Algorithm 1 with the corrections in the step size; epsilon is added to the root of the uncorrected moment.
        update = -0.1 * np.sqrt(1 - 0.75) / (1 - 0.5) * m / (np.sqrt(v) + 1.0)
        np.testing.assert_allclose(ours[name] - start[name], update, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(state[f"{name}_m"], m, rtol=1e-12)
        np.testing.assert_allclose(state[f"{name}_v"], v, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("content", [0.5, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_where_false_changes_no_bit(dtype, content, steps_before):
    ours, state = variables(dtype), zeros(dtype)
    for step in range(steps_before):
        apply(ADAM, gradients(dtype, step), ours, state)
    before = bits(ours) | bits(state)
    apply(
        ADAM, {name: tf.fill(shape, tf.constant(content, dtype)) for name, shape in SHAPES.items()}, ours, state, False
    )
    assert bits(ours) | bits(state) == before


def test_a_skipped_step_leaves_no_trace_in_the_steps_after_it():
    runs = []
    for skip in (False, True):
        ours, state = variables(np.float32), zeros(np.float32)
        for step in range(4):
            if skip and step == 2:
                apply(ADAM, gradients(np.float32, 9), ours, state, where=False)
            apply(ADAM, gradients(np.float32, step), ours, state)
        runs.append(bits(ours) | bits(state))
    assert runs[0] == runs[1]
    assert np.frombuffer(runs[0]["count"], np.int64) == 4


def test_reduce_packed_sums_over_replicas_and_gives_each_part_back_in_its_shape():
    grads = [tf.constant(np.arange(6, dtype=np.float64).reshape(2, 3)), tf.constant(7.0, tf.float64)]
    grads += [tf.ones([2, 1, 2], tf.float64)]
    calls = []

    def two_replicas(x):
        calls.append(x.shape)
        return 2 * x

    reduced = optimizers.reduce_packed(grads, tf.constant([0.25, -3.0], tf.float64), two_replicas)
    assert calls == [[6 + 1 + 4 + 2]], "one all-reduce for everything"
    for got, given in zip(reduced.gradients, grads, strict=True):
        assert got.shape == given.shape
        np.testing.assert_array_equal(got, 2 * given)
    np.testing.assert_array_equal(reduced.extras, [0.5, -6.0])
    # Of the summed gradients, without the extras: 4 * (0 + 1 + 4 + 9 + 16 + 25 + 49 + 4).
    np.testing.assert_allclose(reduced.norm, np.sqrt(4 * 108), rtol=1e-12)
    assert reduced.finite.numpy()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["first gradient", "last gradient", "extras"])
def test_a_number_that_is_not_finite_anywhere_makes_the_whole_reduction_not_finite(place, bad):
    parts = {name: np.ones(3, np.float32) for name in ("first gradient", "last gradient", "extras")}
    parts[place][1] = bad
    first, last, extras = (tf.constant(p) for p in parts.values())
    assert not optimizers.reduce_packed([first, last], extras, tf.identity).finite.numpy()


def test_a_number_that_is_not_finite_on_another_replica_is_seen():
    def all_reduce(x):
        return x + tf.constant([0.0, np.nan, 0.0])

    assert not optimizers.reduce_packed([tf.ones([2])], tf.ones([1]), all_reduce).finite.numpy()


def test_an_update_changes_nothing_in_place():
    ours, state = variables(np.float64), zeros(np.float64)
    before = bits(ours) | bits(state)
    ADAM.update(gradients(np.float64, 0), ours, state)
    assert bits(ours) | bits(state) == before


def test_compiled_and_plain_updates_agree():
    ours, state = variables(np.float64), zeros(np.float64)
    values = [{name: tf.identity(v) for name, v in d.items()} for d in (ours, state)]
    plain = ADAM.update(gradients(np.float64, 0), *values)
    compiled = tf.function(ADAM.update, jit_compile=True)(gradients(np.float64, 0), *values)
    for one, other in zip(plain, compiled, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(("where", "expected"), [(True, [3.0, 4.0]), (False, [1.0, 2.0])])
def test_assign_where_writes_the_new_value_or_leaves_the_old(where, expected):
    v = tf.Variable([1.0, 2.0])
    optimizers.assign_where(tf.constant(where), [v], [tf.constant([3.0, 4.0])], [tf.identity(v)])
    np.testing.assert_array_equal(v, expected)
