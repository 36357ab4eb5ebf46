"""Whether the workers of a cluster are there: names, ports. Standard library only."""

import errno
import logging
import socket
import time

from gan_dist.cluster import Cluster
from gan_dist.errors import ClusterNotFormed, EnvironmentFault

_log = logging.getLogger("gan_dist")

_POLL_SECS = 1.0
_CONNECT_SECS = 1.0


def wait_for_names(cluster: Cluster, limit_secs: float) -> None:
    """Waits until every worker's host name has an address.

    Raises:
        ClusterNotFormed: After `limit_secs` (0: for ever), naming the hosts that have none.
    """
    deadline = time.monotonic() + limit_secs
    said = False
    while nameless := [worker for worker in cluster.workers if not _resolves(worker)]:
        if limit_secs and time.monotonic() >= deadline:
            raise ClusterNotFormed(
                f"No address for {', '.join(nameless)} in {limit_secs:g} s (TF_CONFIG). Check the names, and that "
                "those hosts are up; then start all workers again."
            )
        if not said:
            _log.info("waiting for an address of %s", ", ".join(nameless))
            said = True
        time.sleep(_POLL_SECS)


def check_own_port(cluster: Cluster) -> None:
    """Refuses to start where another process listens on this worker's port: the peers would wait for ever.

    Raises:
        ClusterNotFormed: If the port is in use.
    """
    own = cluster.workers[cluster.index]
    port = int(own.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # On all interfaces, as TensorFlow will; it is closed again at once.
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EnvironmentFault(
                    f"Port {port} of worker {cluster.index} ({own}, TF_CONFIG) cannot be used: {error.strerror}. Give "
                    "another, from 1024 up, to all workers."
                ) from error
            raise ClusterNotFormed(
                f"Port {port} of worker {cluster.index} ({own}, TF_CONFIG) is in use by another process here. End "
                "that process, or give another port to all workers."
            ) from error


def missing_peers(cluster: Cluster) -> str:
    """Which other workers do not answer now, as a sentence."""
    others = [(i, worker) for i, worker in enumerate(cluster.workers) if i != cluster.index]
    silent = [f"worker {i} ({worker})" for i, worker in others if not _answers(worker)]
    return f"No answer from {', '.join(silent)}." if silent else "All peers answer, and are not ready."


def _resolves(worker: str) -> bool:
    host, _, port = worker.rpartition(":")
    try:
        return bool(socket.getaddrinfo(host.strip("[]"), int(port)))
    except OSError:
        return False


def _answers(worker: str) -> bool:
    host, _, port = worker.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECS):
            return True
    except OSError:
        return False
