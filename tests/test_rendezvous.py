"""Whether the workers of a cluster are there."""

import socket
import threading

import pytest

from gan_dist import rendezvous
from gan_dist.cluster import Cluster
from gan_dist.errors import ClusterNotFormed


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_names_that_have_addresses_are_not_waited_for():
    rendezvous.wait_for_names(Cluster(("127.0.0.1:1", "localhost:2")), 0.001)


def test_a_name_without_an_address_is_named_after_the_deadline(monkeypatch):
    monkeypatch.setattr(rendezvous, "_POLL_SECS", 0.01)
    with pytest.raises(ClusterNotFormed, match="nowhere.invalid:2222") as error:
        rendezvous.wait_for_names(Cluster(("127.0.0.1:1", "nowhere.invalid:2222")), 0.05)
    assert "127.0.0.1" not in str(error.value) and error.value.exit_code == 173


def test_a_name_that_gets_its_address_late_is_waited_for(monkeypatch):
    late = threading.Event()
    monkeypatch.setattr(rendezvous, "_POLL_SECS", 0.01)
    monkeypatch.setattr(rendezvous, "_resolves", lambda worker: late.is_set())
    threading.Timer(0.1, late.set).start()
    rendezvous.wait_for_names(Cluster(("a:1", "b:2")), 30)
    assert late.is_set()


def test_a_port_in_use_is_refused_and_a_free_one_is_not(listener):
    with pytest.raises(ClusterNotFormed, match=f"Port {listener} of worker 0"):
        rendezvous.check_own_port(Cluster((f"127.0.0.1:{listener}", "b:2"), 0))
    rendezvous.check_own_port(Cluster((f"127.0.0.1:{free_port()}", "b:2"), 0))


def test_peers_that_do_not_answer_are_named(listener):
    silent = free_port()
    cluster = Cluster(("127.0.0.1:1", f"127.0.0.1:{listener}", f"127.0.0.1:{silent}"), 0)
    assert rendezvous.missing_peers(cluster) == f"No answer from worker 2 (127.0.0.1:{silent})."
    assert rendezvous.missing_peers(Cluster(cluster.workers[:2], 0)) == "All peers answer, and are not ready."
