"""One process, four logical CPU devices: strategies of 1, 2 and 4 replicas share it.

They can, because on CPU `gan_dist.strategy` reduces with ReductionToOneDevice; default collectives could not.
"""

import logging
import os

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration() for _ in range(4)]
)


@pytest.fixture(autouse=True)
def log_as_it_was():
    """The entry points give the package's log a handler of its own; no test shall see another's."""
    log = logging.getLogger("gan_dist")
    handlers, propagate, level = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)
