"""Which workers there are, and which of them this process is. Reads the environment; imports nothing heavy."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gan_dist.errors import EnvironmentFault


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Addresses (`host:port`) of all workers, the same list on each, and this process's place in it."""

    workers: tuple[str, ...] = ("localhost:0",)
    index: int = 0


_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'


def _fault(text: str, rule: str) -> EnvironmentFault:
    shown = text if len(text) <= 200 else text[:200] + "…"
    return EnvironmentFault(
        f"TF_CONFIG={shown}: {rule} It should look like {_EXAMPLE}; unset it to train on one machine."
    )


def from_environment(environment: Mapping[str, str]) -> Cluster:
    """The cluster that `TF_CONFIG` describes; without it, this process alone.

    Raises:
        EnvironmentFault: If TF_CONFIG is not JSON, or not a list of distinct workers with this task among them.
    """
    text = environment.get("TF_CONFIG", "")
    if not text.strip():
        return Cluster()
    try:
        spec: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fault(text, f"not JSON ({error}).") from error
    spec = spec if isinstance(spec, dict) else {}
    jobs, task = spec.get("cluster"), spec.get("task")
    if not isinstance(jobs, dict) or not isinstance(task, dict):
        raise _fault(text, "an object with `cluster` and `task` is needed.")
    if set(jobs) != {"worker"}:
        raise _fault(text, f"the cluster must hold `worker` alone (worker 0 is the chief), not {sorted(jobs)}.")
    workers = jobs["worker"]
    if not isinstance(workers, list) or not workers or not all(_is_address(w) for w in workers):
        raise _fault(text, "`worker` must be a list of host:port.")
    if len(set(workers)) != len(workers):
        raise _fault(text, "an address occurs twice in `worker`.")
    if task.get("type") != "worker":
        raise _fault(text, f"the task's type must be worker, not {task.get('type')!r}.")
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(workers):
        raise _fault(text, f"the task's index must be a whole number from 0 to {len(workers) - 1}, not {index!r}.")
    return Cluster(tuple(workers), index)


def _is_address(worker: Any) -> bool:
    if not isinstance(worker, str):
        return False
    host, colon, port = worker.rpartition(":")
    digits = port.isascii() and port.isdigit() and len(port) <= 5 and port[0] != "0"
    return bool(host and colon and not any(c.isspace() for c in host)) and digits and 0 < int(port) < 65536
