"""What a checkpoint holds, and under which keys."""

import numpy as np
import runs

from gan_dist import data, strategy
from gan_dist import state as state_lib


def test_keys_are_structural_and_the_same_on_any_number_of_replicas():
    config = runs.config(*runs.TINY)
    keys = [set(state_lib.create(config, strategy.create(config.devices), 10).flat()) for _ in range(2)]
    keys.append(set(runs.Training(config, 4).state.flat()))
    assert keys[0] == keys[1] == keys[2]
    generator = {f"{i}_{role}" for i in (1, 3) for role in ("gamma", "beta", "moving_mean", "moving_variance")}
    generator |= {"0_kernel", "2_kernel", "4_kernel", "4_bias"}
    trained = {name for name in generator if "moving" not in name}
    assert {key for key in keys[0] if key.startswith("generator/")} == {f"generator/{name}" for name in generator}
    assert {key for key in keys[0] if key.startswith("ema/")} == {f"ema/{name}" for name in generator}
    assert {key for key in keys[0] if key.startswith("generator_optimizer/")} == {
        "generator_optimizer/count",
        *(f"generator_optimizer/{name}_{moment}" for name in trained for moment in "mv"),
    }
    assert "step" in keys[0]


def test_a_state_starts_with_the_average_at_the_generator_and_empty_moments():
    training = runs.Training(runs.config(*runs.TINY))
    values = training.values()
    for key, value in values.items():
        if key.startswith("ema/"):
            np.testing.assert_array_equal(value, values[key.replace("ema/", "generator/")])
        if "_optimizer/" in key or key == "step":
            assert not value.any(), key


def test_initial_values_depend_on_the_seed_alone():
    first, again, other = (
        runs.Training(runs.config(*runs.TINY, f"--seed={seed}")).values()["discriminator/0_kernel"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_the_networks_of_a_state_are_those_of_the_configuration():
    config = runs.config(*runs.TINY, "--conditional")
    generator, discriminator = state_lib.networks(config, data.num_classes(config.data))
    assert generator.num_classes == discriminator.num_classes == 10
    assert generator.initial["0_kernel"].shape == (config.model.latent_size + 10, 7 * 7 * 8)
