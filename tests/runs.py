"""What several tests share: small configurations, states in this process, and training in processes of its own."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from gan_dist import checkpoints, cli, data, strategy
from gan_dist import state as state_lib
from gan_dist import step as step_lib
from gan_dist.config import Config
from gan_dist.layout import Layout

CONFIGS = Path(__file__).parent.parent / "configs"
# A net of a few thousand weights: a step takes milliseconds.
TINY = (
    "--accelerator=cpu",
    "--width=4",
    "--kernel_size=3",
    "--discriminator_features=8",
    "--latent_size=6",
    "--global_batch_size=8",
)
# The two nets that the promises are proven for.
QUICKSTART = (f"--flagfile={CONFIGS / 'quickstart.cfg'}",)
REFERENCE_1 = ("--accelerator=cpu",)
# Longer than any of these runs takes, and shorter than the whole suite may.
DEADLINE_SECS = 240


def config(*flags: str) -> Config:
    """The configuration that these flags describe."""
    return cli.parse(["--workdir=", *flags], "train").config


class Training:
    """A state in this process, on `num_devices` logical CPU devices, and the function that trains it."""

    def __init__(self, settings: Config, num_devices: int = 1, examples: int = 1000) -> None:
        devices = dataclasses.replace(settings.devices, num_devices=num_devices)
        self.config = dataclasses.replace(settings, devices=devices)
        self.strategy = strategy.create(devices)
        loaded = data.load(settings.data)
        self.examples = examples
        self.state = state_lib.create(settings, self.strategy, loaded.num_classes)
        self.layout = Layout(settings.data.global_batch_size, self.strategy.num_replicas_in_sync)
        pixels = data.on_replicas(self.strategy, data.pack(loaded.pixels[:examples]))
        labels = data.on_replicas(self.strategy, loaded.labels[:examples])
        self.advance = step_lib.compile_block(self.config, self.state, self.strategy, self.layout, pixels, labels)

    def run(self, first: int, last: int) -> tuple[dict[str, float], int]:
        """Steps `first` to `last - 1` in one block: the mean of each scalar, and the number of skipped steps."""
        order = data.order(self.config.run.seed, first, last, self.layout.global_batch, self.examples)
        sums, skipped = self.advance(tf.constant(order))
        means = sums.numpy() / (last - first)
        return dict(zip(step_lib.SCALARS, means.tolist(), strict=True)), int(skipped)

    def values(self) -> dict[str, np.ndarray]:
        return {key: variable.numpy() for key, variable in self.state.flat().items()}


def start(*flags: str, environment: dict[str, str] | None = None, entry: str = "train") -> subprocess.Popen[str]:
    """Starts `python -m gan_dist.train` with these flags; its output can be read from `stdout`."""
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    return subprocess.Popen(
        [sys.executable, "-m", f"gan_dist.{entry}", *flags],
        env={**inherited, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_workers(
    count: int,
    *flags: str,
    only: int | None = None,
    pause: float = 0.0,
    environment: dict[str, str] | None = None,
    each: Sequence[str] = (),
) -> list[subprocess.Popen[str]]:
    """Starts a cluster of worker processes on this host, one thread each.

    All, or `only` one; with a pause between; `each` is a further flag for each worker.
    """
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    specs = [{"cluster": {"worker": workers}, "task": {"type": "worker", "index": i}} for i in range(count)]
    started = []
    for index in range(count) if only is None else [only]:
        time.sleep(pause if started else 0.0)
        given = {**(environment or {}), "TF_CONFIG": json.dumps(specs[index])}
        started.append(start(*flags, *each[index : index + 1], "--intra_op_threads=1", environment=given))
    return started


def finish(processes: Sequence[subprocess.Popen[str]], code: int = 0) -> str:
    """Waits for the processes, which must all leave with `code`; returns what they printed."""
    deadline, printed = time.monotonic() + DEADLINE_SECS, ""
    try:
        for process in processes:
            printed += process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), printed
    return printed


def kill_after_commit(processes: Sequence[subprocess.Popen[str]], workdir: Path, step: int) -> None:
    """Kills the processes as soon as `step` is committed, which must be before they end."""
    marker, deadline = workdir / "checkpoints" / f"ckpt-{step}.json", time.monotonic() + DEADLINE_SECS
    try:
        while not marker.exists() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
            time.sleep(0.002)
    finally:
        for process in processes:
            process.kill()
    printed = "".join(process.communicate()[0] for process in processes)
    assert marker.exists(), printed
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * len(processes), printed


def committed(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All tensors of a commit, which must be whole."""
    folder = workdir / "checkpoints"
    checkpoints.verify(folder, step)
    keys = tf.train.load_checkpoint(str(folder / f"ckpt-{step}")).get_variable_to_shape_map()
    return checkpoints.read(folder, step, keys)


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    """Every tensor agrees to `atol`; to the last bit where that is 0."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=atol, err_msg=key)
