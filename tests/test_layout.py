"""How the global batch is laid out over replicas."""

import numpy as np
import pytest
import tensorflow as tf

from gan_dist.errors import UsageError
from gan_dist.layout import Layout


@pytest.mark.parametrize("global_batch, replicas, share", [(128, 1, 128), (128, 4, 32), (12, 3, 4), (5, 5, 1)])
def test_each_replica_gets_an_equal_share(global_batch, replicas, share):
    assert Layout(global_batch, replicas).per_replica == share


@pytest.mark.parametrize("global_batch, replicas", [(128, 4), (12, 3), (7, 1), (8, 8)])
def test_the_shares_in_replica_order_are_the_rows_of_the_global_batch(global_batch, replicas):
    layout = Layout(global_batch, replicas)
    rows = [layout.first_row(r) + i for r in range(replicas) for i in range(layout.per_replica)]
    assert rows == list(range(global_batch))


def test_first_row_takes_the_replica_number_as_a_tensor():
    np.testing.assert_array_equal(Layout(12, 3).first_row(tf.constant(2)), 8)


@pytest.mark.parametrize(
    "global_batch, replicas, nearest",
    [(10, 4, "8 and 12"), (127, 8, "120 and 128"), (129, 2, "128 and 130"), (3, 4, "4"), (1, 2, "2")],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes_that_do(global_batch, replicas, nearest):
    with pytest.raises(UsageError) as refused:
        Layout(global_batch, replicas)
    message = str(refused.value)
    assert f"--global_batch_size={global_batch} does not divide over {replicas} replicas" in message
    assert f"the nearest that do: {nearest}." in message
    assert "--num_devices" in message
