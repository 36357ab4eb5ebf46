"""The order of things: restore, step, log, save, sample, stop."""

import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gan_dist import checkpoints, data, images, rng, sample, summaries, workdir
from gan_dist import config as config_lib
from gan_dist import state as state_lib
from gan_dist import step as step_lib
from gan_dist import strategy as strategy_lib
from gan_dist.config import Config
from gan_dist.errors import Diverged, EnvironmentFault, GanDistError, PeerLost, UsageError
from gan_dist.layout import Layout
from gan_dist.state import State

_log = logging.getLogger("gan_dist")

# Pictures in the fixed-noise grid.
_GRID = 100


def train(config: Config, strategy: tf.distribute.Strategy) -> None:
    """Trains to `config.run.train_steps`, going on from the newest commit in the workdir.

    Args:
        config: The settings; `run.workdir` must be given.
        strategy: From `gan_dist.strategy.create`, made before anything else used TensorFlow.

    Raises:
        UsageError: If a setting breaks a rule, or the workdir holds a run of another model or data order.
        DataError, CheckpointError: If data or checkpoints cannot be read.
        Diverged: If every step of a block was skipped for numbers that are not finite; the message gives the steps.
        EnvironmentFault: If the workdir cannot be written.
    """
    config_lib.check(config)
    if not config.run.workdir:
        raise UsageError("--workdir is empty; give the folder of the run.")
    workdir.check_resume(config)
    layout = Layout(config.data.global_batch_size, strategy.num_replicas_in_sync)
    folder, chief = Path(config.run.workdir), strategy_lib.is_chief(strategy)
    examples = data.load(config.data)
    state = state_lib.create(config, strategy, examples.num_classes)
    first = _resume(config, strategy, state)
    last = config.run.train_steps
    if first >= last:
        _log.info("step=%d/%d: nothing left to do; a larger --train_steps goes on.", first, last)
        strategy_lib.sum_over_workers(strategy, 0)
        return

    pixels = data.on_replicas(strategy, examples.pixels)
    labels = data.on_replicas(strategy, examples.labels)
    advance = step_lib.compile_block(config, state, strategy, layout, pixels, labels)
    writer = summaries.Writer(folder, config, first) if chief else None
    grid = _Grid(config, state)
    rhythm = config.loop
    meter = _Meter(layout)
    committed_at = time.monotonic()
    try:
        if writer and first == 0 and rhythm.sample_every_steps:
            writer.picture(0, grid())
        for start, end in blocks(first, config):
            began = time.monotonic()
            order = data.order(config.run.seed, start, end, layout.global_batch, len(examples.pixels))
            fed = time.monotonic()
            sums, skipped = advance(tf.constant(order))
            meter.add(end - start, sums.numpy(), int(skipped), fed - began, time.monotonic() - began)
            step = int(state.counters["step"].numpy())
            if int(skipped) == end - start:
                raise Diverged(
                    f"Every step from {start} to {end} had numbers that are not finite; the commits before stay. "
                    "Lower --generator_lr and --discriminator_lr, and start in another --workdir."
                )
            if writer:
                writer.progress(step)
                if _due(step, rhythm.log_every_steps, last):
                    writer.scalars(step, meter.read(step))
                if _due(step, rhythm.sample_every_steps, last):
                    writer.picture(step, grid())
                aged = 0 < rhythm.checkpoint_every_secs <= time.monotonic() - committed_at
                if aged or step == last or _due(step, rhythm.checkpoint_every_steps, last):
                    _commit(config, state, step)
                    committed_at = time.monotonic()
    finally:
        if writer:
            writer.close()
    # A worker that leaves while the chief still writes would break the chief's next collective.
    strategy_lib.sum_over_workers(strategy, 0)


def blocks(first: int, config: Config) -> Iterator[tuple[int, int]]:
    """Steps `[start, end)` to run without the host: at most `steps_per_loop`, up to the next thing that is due."""
    loop, last = config.loop, config.run.train_steps
    rhythms = [r for r in (loop.log_every_steps, loop.checkpoint_every_steps, loop.sample_every_steps) if r]
    while first < last:
        end = min(first + config.devices.steps_per_loop, last, *(first - first % r + r for r in rhythms))
        yield first, end
        first = end


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def _resume(config: Config, strategy: tf.distribute.Strategy, state: State) -> int:
    """Brings the state to where the run stands, on every worker; the chief says where that is. Returns the step."""
    folder, chief = Path(config.run.workdir), strategy_lib.is_chief(strategy)
    commits = folder / workdir.CHECKPOINTS
    # The chief alone looks: on shared storage another worker may see other files. Its word, plus one; 0: it failed.
    word, failure = 0, None
    if chief:
        try:
            word = _prepare(config, state) + 1
        except GanDistError as error:
            failure = error
    step = strategy_lib.sum_over_workers(strategy, word) - 1
    if failure:
        raise failure
    if step < 0:
        raise PeerLost("The chief could not start; its log says why.")
    checkpoints.restore(commits, step, state.flat())
    if step:
        _log.info("step=%d/%d: resumed from %s", step, config.run.train_steps, commits / f"ckpt-{step}")
    return step


def _prepare(config: Config, state: State) -> int:
    """The chief's part: the folder, the configuration, the commit to go on from, which is made if there is none."""
    folder = Path(config.run.workdir)
    commits = folder / workdir.CHECKPOINTS
    try:
        for name in (workdir.CHECKPOINTS, workdir.TENSORBOARD, workdir.SAMPLES):
            (folder / name).mkdir(parents=True, exist_ok=True)
        newest = checkpoints.newest_valid(commits)
        stored = workdir.read_config(folder)
        for name, (old, new) in (config_lib.differences(stored, config, identity=False) if stored else {}).items():
            _log.info("--%s: %s until now, %s from here on", name, old, new)
        described = {"config": config_lib.to_dict(config), "environment": environment(), "command": sys.argv}
        workdir.write_whole(folder / workdir.CONFIG, workdir.json_bytes(described))
    except OSError as error:
        raise EnvironmentFault(
            f"--workdir={folder} cannot be written: {error.strerror}. Make room, or give another --workdir."
        ) from error
    if newest is None:
        if config.run.init_from:
            _init_from(Path(config.run.init_from), state)
        _commit(config, state, 0)
        return 0
    return newest


def _init_from(other: Path, state: State) -> None:
    """Gives the networks the weights of another run's newest commit."""
    commits = other / workdir.CHECKPOINTS
    step = checkpoints.newest_valid(commits)
    if step is None:
        raise UsageError(f"--init_from={other} holds no commit; give the workdir of a run that has one.")
    weights = {k: v for k, v in state.flat().items() if k.startswith(("generator/", "discriminator/", "ema/"))}
    try:
        checkpoints.restore(commits, step, weights)
    except GanDistError as error:
        raise UsageError(
            f"--init_from={other} is a run of other networks ({error}) Give the model settings of that run."
        ) from error
    _log.info("weights from %s, step %d", other, step)


def _commit(config: Config, state: State, step: int) -> None:
    folder = Path(config.run.workdir) / workdir.CHECKPOINTS
    checkpoints.commit(folder, step, state.flat(), config.loop.keep_checkpoints, environment()["versions"])


def environment() -> dict[str, Any]:
    """What a result depends on besides the settings: versions, threads, machine."""
    packages = ("gan_dist", "tensorflow", "keras", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count(),
        "devices": [device.name for device in tf.config.list_logical_devices()],
        "machine": platform.machine(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class _Grid:
    """The fixed-noise picture of the averaged generator, `[H, W, C]` uint8."""

    def __init__(self, config: Config, state: State) -> None:
        self._classes = state.generator.num_classes
        self._ema = state.ema
        self._generate = sample.compile_generator(state.generator, config, rng.key(config.run.seed, "samples"))

    def __call__(self) -> Any:
        labels = sample.grid_labels(_GRID, self._classes) if self._classes else _GRID
        pixels = self._generate({name: variable.numpy() for name, variable in self._ema.items()}, labels)
        return images.grid(pixels, sample.grid_columns(_GRID, self._classes))


class _Meter:
    """Means over a log interval. Rates leave out the process's first block, which traces and compiles."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._skipped, self._cold = layout, 0, 1
        self._clear()

    def _clear(self) -> None:
        self._sums, self._good = np.zeros(len(step_lib.SCALARS)), 0
        self._blocks: list[tuple[int, float, float]] = []

    def add(self, steps: int, sums: Any, skipped: int, waited: float, secs: float) -> None:
        """Counts a block: the sums over its good steps, and seconds in all and waiting for data."""
        self._sums = self._sums + sums
        self._good += steps - skipped
        self._skipped += skipped
        self._blocks.append((steps, waited, secs))

    def read(self, step: int) -> dict[str, float]:
        """The scalars of the interval that ends at `step`; the next interval starts."""
        # Where the interval is the first block alone, its rates are that block's.
        steps, waited, secs = (
            sum(column) for column in zip(*(self._blocks[self._cold :] or self._blocks), strict=True)
        )
        rate = steps * self._layout.global_batch / secs
        means = self._sums / self._good if self._good else np.full_like(self._sums, np.nan)
        values = {
            "kimg": step * self._layout.global_batch / 1000,
            **{name: float(value) for name, value in zip(step_lib.SCALARS, means, strict=True)},
            "img/s": rate,
            "img/s/replica": rate / self._layout.replicas,
            "sec/step": secs / steps,
            "data_wait_pct": 100 * waited / secs,
            "skipped_steps": self._skipped,
            "memory_gb": summaries.memory_gb(),
        }
        self._cold = 0
        self._clear()
        return values
