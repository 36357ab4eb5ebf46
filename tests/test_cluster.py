"""TF_CONFIG to a cluster, and what is said of one that is malformed."""

import json

import pytest

from gan_dist.cluster import Cluster, from_environment
from gan_dist.errors import EnvironmentFault


def tf_config(workers=("a:1", "b:2"), index=0, kind="worker", **more: object) -> str:
    return json.dumps({"cluster": {"worker": list(workers)}, "task": {"type": kind, "index": index}, **more})


@pytest.mark.parametrize("environment", [{}, {"TF_CONFIG": ""}, {"TF_CONFIG": " \n"}])
def test_without_tf_config_this_process_is_alone(environment):
    cluster = from_environment(environment)
    assert cluster == Cluster()
    assert len(cluster.workers) == 1 and cluster.index == 0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_tf_config_gives_the_workers_in_order_and_this_ones_place(index):
    workers = ("host-0.svc:2222", "10.0.0.7:65535", "[::1]:1")
    assert from_environment({"TF_CONFIG": tf_config(workers, index)}) == Cluster(workers, index)


def test_keys_of_tf_config_that_mean_nothing_here_are_ignored():
    text = tf_config(environment="cloud", rpc_layer="grpc")
    assert from_environment({"TF_CONFIG": text, "OTHER": "x"}) == Cluster(("a:1", "b:2"), 0)


def test_a_cluster_of_one_worker_is_valid():
    assert from_environment({"TF_CONFIG": tf_config(["a:1"])}) == Cluster(("a:1",), 0)


@pytest.mark.parametrize(
    "text, rule",
    [
        ("{not json", "not JSON"),
        ("worker", "not JSON"),
        ("[]", "an object with `cluster` and `task`"),
        ("null", "an object with `cluster` and `task`"),
        ("{}", "an object with `cluster` and `task`"),
        ('{"cluster": {"worker": ["a:1"]}}', "an object with `cluster` and `task`"),
        ('{"task": {"type": "worker", "index": 0}}', "an object with `cluster` and `task`"),
        ('{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}', "an object with `cluster` and `task`"),
        ('{"cluster": {"worker": ["a:1"]}, "task": 0}', "an object with `cluster` and `task`"),
        ('{"cluster": {}, "task": {"type": "worker", "index": 0}}', "`worker` alone"),
        (
            '{"cluster": {"chief": ["c:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            "`worker` alone (worker 0 is the chief), not ['chief', 'worker']",
        ),
        (
            '{"cluster": {"worker": ["a:1"], "ps": ["p:1"]}, "task": {"type": "worker", "index": 0}}',
            "`worker` alone (worker 0 is the chief), not ['ps', 'worker']",
        ),
        ('{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}', "a list of host:port"),
        (tf_config([]), "a list of host:port"),
        (tf_config(["a"]), "a list of host:port"),
        (tf_config([":1"]), "a list of host:port"),
        (tf_config(["a:"]), "a list of host:port"),
        (tf_config(["a:http"]), "a list of host:port"),
        (tf_config(["a:-1"]), "a list of host:port"),
        (tf_config(["a:0"]), "a list of host:port"),
        (tf_config(["a:65536"]), "a list of host:port"),
        (tf_config(["a:\u0661"]), "a list of host:port"),
        (tf_config(["a:1", 5]), "a list of host:port"),
        (tf_config(["a:1", None]), "a list of host:port"),
        (tf_config(["a:1", ["b:2"]]), "a list of host:port"),
        (tf_config(["a:1", "a:1"]), "an address occurs twice"),
        (tf_config(kind="chief"), "the task's type must be worker, not 'chief'"),
        (tf_config(kind=None), "the task's type must be worker, not None"),
        (tf_config(index=2), "a whole number from 0 to 1, not 2"),
        (tf_config(index=-1), "a whole number from 0 to 1, not -1"),
        (tf_config(index="0"), "a whole number from 0 to 1, not '0'"),
        (tf_config(index=0.0), "a whole number from 0 to 1, not 0.0"),
        (tf_config(index=True), "a whole number from 0 to 1, not True"),
        (tf_config(index=None), "a whole number from 0 to 1, not None"),
    ],
)
def test_a_malformed_tf_config_is_refused_with_its_text_the_rule_and_an_example(text, rule):
    with pytest.raises(EnvironmentFault) as refused:
        from_environment({"TF_CONFIG": text})
    message = str(refused.value)
    assert message.startswith(f"TF_CONFIG={text}: ")
    assert rule in message
    assert '"task": {"type": "worker", "index": 0}' in message and "unset it" in message
    assert refused.value.exit_code == 78


def test_a_very_long_tf_config_is_shown_in_part():
    with pytest.raises(EnvironmentFault) as refused:
        from_environment({"TF_CONFIG": "x" * 10_000})
    assert len(str(refused.value)) < 600


def test_the_example_in_the_message_is_itself_valid():
    with pytest.raises(EnvironmentFault) as refused:
        from_environment({"TF_CONFIG": "{}"})
    example = str(refused.value).split("should look like ")[1].split("; unset")[0]
    assert from_environment({"TF_CONFIG": example}) == Cluster(("host0:2222", "host1:2222"), 0)
