"""From settings and cluster to a plan and a strategy."""

import dataclasses

import pytest
import runs
import tensorflow as tf

from gan_dist import strategy
from gan_dist.cluster import Cluster
from gan_dist.config import DeviceConfig
from gan_dist.errors import EnvironmentFault, UsageError

TWO_WORKERS = Cluster(("a:1", "b:1"), 1)


@pytest.mark.parametrize(
    ("settings", "cluster", "gpus", "expected"),
    [
        ({}, Cluster(), 0, ("single", "cpu", 1, 1)),
        ({}, Cluster(), 1, ("single", "gpu", 1, 1)),
        ({}, Cluster(), 8, ("mirrored", "gpu", 8, 1)),
        ({"accelerator": "cpu"}, Cluster(), 8, ("single", "cpu", 1, 1)),
        ({"num_devices": 4}, Cluster(), 0, ("mirrored", "cpu", 4, 1)),
        ({"num_devices": 4, "accelerator": "gpu"}, Cluster(), 0, ("mirrored", "gpu", 4, 1)),
        ({"virtual_devices_per_gpu": 2}, Cluster(), 1, ("mirrored", "gpu", 2, 1)),
        ({"virtual_devices_per_gpu": 2, "num_devices": 2}, Cluster(), 4, ("mirrored", "gpu", 4, 1)),
        ({"strategy": "single"}, Cluster(), 8, ("single", "gpu", 1, 1)),
        ({}, TWO_WORKERS, 0, ("multi_worker", "cpu", 1, 2)),
        ({}, TWO_WORKERS, 8, ("multi_worker", "gpu", 8, 2)),
        ({"precision": "float64"}, Cluster(), 2, ("single", "cpu", 1, 1)),
    ],
)
def test_auto_and_zero_are_resolved_against_the_machine(settings, cluster, gpus, expected):
    plan = strategy.plan(DeviceConfig(**settings), cluster, gpus)
    assert (plan.kind, plan.accelerator, plan.devices, plan.workers) == expected
    assert plan.replicas == expected[2] * expected[3]


@pytest.mark.parametrize(
    ("settings", "cluster", "flag"),
    [
        ({"strategy": "multi_worker"}, Cluster(), "--strategy=multi_worker"),
        ({"strategy": "mirrored"}, TWO_WORKERS, "--strategy=mirrored"),
        ({"strategy": "single"}, TWO_WORKERS, "--strategy=single"),
        ({"num_devices": 2}, TWO_WORKERS, "--num_devices=2"),
        ({"xla": "on", "num_devices": 2}, Cluster(), "--xla=on"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_by_name(settings, cluster, flag):
    with pytest.raises(UsageError, match=flag):
        strategy.plan(DeviceConfig(accelerator="cpu", **settings), cluster, 0)


def test_gpus_that_are_not_there_are_missed_by_name_with_a_way_out():
    with pytest.raises(EnvironmentFault) as error:
        strategy.create(DeviceConfig(accelerator="gpu", num_devices=4))
    text = str(error.value)
    assert "4 GPU(s) asked for" in text and "0 found" in text
    assert "libcuda.so.1" in text and "pip install 'gan_dist[gpu]'" in text and "--accelerator=cpu" in text


@pytest.mark.parametrize(("kind", "replicas"), [("single", 1), ("mirrored", 1), ("mirrored", 2), ("mirrored", 4)])
def test_a_strategy_has_the_replicas_asked_for(kind, replicas):
    made = strategy.create(DeviceConfig(accelerator="cpu", strategy=kind, num_devices=replicas))
    assert made.num_replicas_in_sync == replicas
    assert isinstance(made, tf.distribute.MirroredStrategy) == (kind == "mirrored")
    assert strategy.is_chief(made) and strategy.num_workers(made) == 1
    assert strategy.sum_over_workers(made, 5) == 5


def test_devices_that_come_too_late_are_refused():
    tf.constant(1).numpy()
    with pytest.raises(UsageError, match="before anything else"):
        strategy.create(DeviceConfig(accelerator="cpu", num_devices=5))


def test_every_shipped_configuration_divides_over_its_replicas():
    checked = 0
    for path in runs.CONFIGS.glob("*.cfg"):
        config = runs.config(f"--flagfile={path}")
        workers = 2 if path.stem.startswith("multi_worker_2x") else 1
        cluster = Cluster(tuple(f"host{i}:2222" for i in range(workers)))
        plan = strategy.plan(config.devices, cluster, gpus_here=8)
        runs.Layout(config.data.global_batch_size, plan.replicas)
        checked += 1
    assert checked >= 7


def test_a_plan_says_what_it_is_made_of():
    plan = strategy.Plan("mirrored", "gpu", 4, 1)
    assert str(plan) == "mirrored: 1 worker(s) x 4 GPU device(s) = 4 replica(s)"
    assert dataclasses.replace(plan, workers=2).replicas == 8
