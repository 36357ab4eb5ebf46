"""The order of things: restore, step, log, save, sample, stop."""

import _thread
import contextlib
import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gan_dist import checkpoints, data, images, lock, rng, sample, summaries, supervision, workdir
from gan_dist import config as config_lib
from gan_dist import state as state_lib
from gan_dist import step as step_lib
from gan_dist import strategy as strategy_lib
from gan_dist.config import Config
from gan_dist.errors import (
    CheckpointError,
    Diverged,
    EnvironmentFault,
    GanDistError,
    PeerLost,
    StopRequested,
    UsageError,
)
from gan_dist.layout import Layout
from gan_dist.state import State
from gan_dist.supervision import Watch

_log = logging.getLogger("gan_dist")

# Pictures in the fixed-noise grid.
_GRID = 100


def train(config: Config, strategy: tf.distribute.Strategy, watch: Watch | None = None) -> None:
    """Trains to `config.run.train_steps`, going on from the newest commit in the workdir.

    Args:
        config: The settings; `run.workdir` must be given.
        strategy: From `gan_dist.strategy.create`, made before anything else used TensorFlow.
        watch: The line to a supervising parent, which also holds the workdir's lock; without, it is held here.

    Raises:
        UsageError: If a setting breaks a rule, or the workdir holds a run of another model or data order.
        DataError, CheckpointError: If data or checkpoints cannot be read.
        Diverged: If going back to the last commit `max_rollbacks` times did not help.
        EnvironmentFault: If the workdir cannot be written, or belongs to a live run.
        StopRequested: After a request to stop, once everything is committed.
    """
    config_lib.check(config)
    if not config.run.workdir:
        raise UsageError("--workdir is empty; give the folder of the run.")
    workdir.check_resume(config)
    watch = watch or Watch()
    with contextlib.ExitStack() as stack:
        if not watch.supervised and strategy_lib.is_chief(strategy):
            folder = Path(config.run.workdir)
            stack.enter_context(lock.held(folder, config.limits.lock_lease_secs, lost=_thread.interrupt_main))
        run = _Run(config, strategy, watch, stack)
        run.resume()
        run.advance_to_end()


class _Run:
    """A run in this process, from restore to the last commit."""

    def __init__(
        self, config: Config, strategy: tf.distribute.Strategy, watch: Watch, stack: contextlib.ExitStack
    ) -> None:
        self._config, self._strategy, self._watch = config, strategy, watch
        self._folder, self._chief = Path(config.run.workdir), strategy_lib.is_chief(strategy)
        self._commits = self._folder / workdir.CHECKPOINTS
        self._layout = Layout(config.data.global_batch_size, strategy.num_replicas_in_sync)
        self._examples = data.load(config.data)
        self._state = state_lib.create(config, strategy, self._examples.num_classes)
        self._variables = self._state.flat()
        self._saver = checkpoints.Saver(
            self._commits,
            self._variables,
            config.loop.keep_checkpoints,
            config.loop.keep_every_hours,
            config.loop.checkpoint_every_steps,
            {"settings": config_lib.to_dict(config), "versions": environment()["versions"]},
        )
        stack.callback(self._saver.close)
        self._stack = stack
        self._committed = -1

    def resume(self) -> None:
        """Brings the state to where the run stands, on every worker; the chief says where that is."""
        self._refuse_other_settings()
        self._restore(self._prepare)
        step, last = self._counter("step"), self._config.run.train_steps
        if step:
            _log.info("step=%d/%d: resumed from %s", step, last, self._commits / f"ckpt-{step}")

    def advance_to_end(self) -> None:
        """Step, log, save, sample, stop."""
        config, watch, layout = self._config, self._watch, self._layout
        last, rhythm = config.run.train_steps, config.loop
        if self._counter("step") >= last:
            _log.info("step=%d/%d: nothing left to do; a larger --train_steps goes on.", self._counter("step"), last)
            self._leave()
            return
        # From here on a request to stop is answered by a commit.
        watch.phase(supervision.FIRST_STEP)
        pixels = data.on_replicas(self._strategy, data.pack(self._examples.pixels))
        labels = data.on_replicas(self._strategy, self._examples.labels)
        advance = step_lib.compile_block(config, self._state, self._strategy, layout, pixels, labels)
        grid = _Grid(config, self._state)
        meter = _Meter(layout)
        writer = None
        if self._chief:
            writer = summaries.Writer(self._folder, config, self._counter("step"))
            self._stack.callback(writer.close)
            if self._counter("step") == 0 and rhythm.sample_every_steps:
                writer.picture(0, grid())
        committed_at = time.monotonic()
        while (start := self._counter("step")) < last:
            if self._agreed(watch.stop_requested()):
                self._stop(start)
            began = time.monotonic()
            end = block_end(start, config)
            order = data.order(
                config.run.seed,
                start,
                end,
                layout.global_batch,
                len(self._examples.pixels),
                self._counter("attempt"),
            )
            fed = time.monotonic()
            sums, skipped = advance(tf.constant(order))
            meter.add(end - start, sums.numpy(), int(skipped), fed - began, time.monotonic() - began)
            step = self._counter("step")
            watch.phase(supervision.STEPS)
            if self._counter("consecutive_skips") >= config.limits.max_consecutive_skips:
                self._roll_back(step)
                meter = _Meter(layout)
                if writer:
                    writer.go_back(self._counter("step"))
                continue
            if writer:
                self._saver.check()
                writer.progress(step)
                if _due(step, rhythm.log_every_steps, last):
                    writer.scalars(step, meter.read(step, self._counter("skipped_steps")))
                if _due(step, rhythm.sample_every_steps, last):
                    writer.picture(step, grid())
                aged = 0 < rhythm.checkpoint_every_secs <= time.monotonic() - committed_at
                if aged or step == last or _due(step, rhythm.checkpoint_every_steps, last):
                    self._save(step)
                    committed_at = time.monotonic()
        self._wait_for_save()
        self._leave()

    def _counter(self, name: str) -> int:
        return int(self._state.counters[name].numpy())

    def _refuse_other_settings(self) -> None:
        """Refuses workers that were started with different flags: each would train something else, or wait for ever."""
        settings = config_lib.to_dict(self._config)
        # What each host may have of its own, and what only the chief looks at.
        for name in ("workdir", "init_from", "dry_run"):
            settings["run"].pop(name)
        settings["data"].pop("data_dir")
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        # Five bytes: a sum over many devices stays below 2^63.
        own = int.from_bytes(digest[:5], "little")
        of_chief = strategy_lib.sum_over_workers(self._strategy, own if self._chief else 0)
        different = strategy_lib.sum_over_workers(self._strategy, int(own != of_chief))
        if different:
            raise UsageError(
                f"{different} worker(s) were started with other flags than the chief; give all the same command."
            )

    def _agreed(self, asked: bool) -> bool:
        """Whether any worker was asked to stop: all of them stop at the same step, or none."""
        return strategy_lib.sum_over_workers(self._strategy, int(asked)) > 0

    def _stop(self, step: int) -> None:
        if self._chief and step != self._committed:
            self._save(step)
        self._wait_for_save()
        self._leave()
        raise StopRequested(f"stopped at step {step}; everything is committed, and the same command goes on.")

    def _save(self, step: int) -> None:
        self._watch.phase(supervision.SAVING)
        self._saver.save(step)
        self._committed = step
        self._watch.phase(supervision.STEPS)

    def _wait_for_save(self) -> None:
        self._watch.phase(supervision.SAVING)
        self._saver.wait()

    def _leave(self) -> None:
        # A worker that leaves while the chief still writes would break the chief's next collective.
        strategy_lib.sum_over_workers(self._strategy, 0)
        self._watch.phase(supervision.LEAVING)

    def _roll_back(self, step: int) -> None:
        """Goes back to the last commit, with other noise and order of the data from there on."""
        limits, attempt = self._config.limits, self._counter("attempt") + 1
        message = (
            f"The last {self._counter('consecutive_skips')} steps before step {step} had numbers that are not finite"
        )
        if attempt > limits.max_rollbacks:
            raise Diverged(
                f"{message}, after going back {limits.max_rollbacks} times (--max_rollbacks). The commits before stay. "
                "Lower --generator_lr and --discriminator_lr, or start in another --workdir."
            )
        self._wait_for_save()
        self._restore(self._regular)
        self._state.counters["attempt"].assign(attempt)
        self._state.counters["consecutive_skips"].assign(0)
        _log.warning("%s: back to step %d with other noise, attempt %d.", message, self._counter("step"), attempt)
        self._watch.phase(supervision.STEPS)

    def _restore(self, find: Callable[[], int]) -> None:
        """Restores, on every worker, the commit that `find` gives the chief."""
        # The chief alone looks: on shared storage another worker may see other files. Its word, plus one; 0: it failed.
        word, failure = 0, None
        if self._chief:
            try:
                word = find() + 1
            except GanDistError as error:
                failure = error
        step = strategy_lib.sum_over_workers(self._strategy, word) - 1
        if failure:
            raise failure
        if step < 0:
            raise PeerLost("The chief cannot go on; its log says why.")
        checkpoints.restore(self._commits, step, self._variables)
        self._committed = step

    def _regular(self) -> int:
        """The commit to go back to: where steps say, not a clock or a signal, or a resumed run would go elsewhere."""
        newest = checkpoints.newest_valid(self._commits, self._config.loop.checkpoint_every_steps or 1)
        if newest is None:
            raise CheckpointError(f"{self._commits} has lost its commits; restore the folder from a copy.")
        checkpoints.discard_after(self._commits, newest)
        return newest

    def _prepare(self) -> int:
        """The chief's part: the folder, the configuration, the commit to go on from, made if there is none."""
        config, folder = self._config, self._folder
        try:
            for name in (workdir.CHECKPOINTS, workdir.TENSORBOARD, workdir.SAMPLES):
                (folder / name).mkdir(parents=True, exist_ok=True)
            newest = checkpoints.newest_valid(self._commits)
            checkpoints.sweep(self._commits, newest)
            if newest is None:
                if config.run.init_from:
                    self._init_from(Path(config.run.init_from))
                self._write_config()
                self._saver.save(0)
                self._saver.wait()
                return 0
            # The commit's own word: config.json may have been lost, or put there by hand.
            about = checkpoints.about(self._commits, newest) or {}
            stored = config_lib.from_dict(about.get("settings", {}))
            workdir.refuse_other_model(folder, stored, config)
            for name, (old, new) in config_lib.differences(stored, config, identity=False).items():
                _log.info("--%s: %s until now, %s from here on", name, old, new)
            self._write_config()
            return newest
        except OSError as error:
            raise EnvironmentFault(
                f"--workdir={folder} cannot be written: {error.strerror}. Make room, or give another --workdir."
            ) from error

    def _write_config(self) -> None:
        described = {"config": config_lib.to_dict(self._config), "environment": environment(), "command": sys.argv}
        workdir.write_whole(self._folder / workdir.CONFIG, workdir.json_bytes(described))

    def _init_from(self, other: Path) -> None:
        """Gives the networks the weights of another run's newest commit."""
        commits = other / workdir.CHECKPOINTS
        step = checkpoints.newest_valid(commits)
        if step is None:
            raise UsageError(f"--init_from={other} holds no commit; give the workdir of a run that has one.")
        groups = ("generator/", "discriminator/", "ema/")
        try:
            checkpoints.restore(commits, step, {k: v for k, v in self._variables.items() if k.startswith(groups)})
        except GanDistError as error:
            raise UsageError(
                f"--init_from={other} is a run of other networks ({error}) Give the model settings of that run."
            ) from error
        _log.info("weights from %s, step %d", other, step)


def block_end(start: int, config: Config) -> int:
    """The step up to which the host leaves the device alone: `steps_per_loop` on, or where something is due."""
    loop = config.loop
    rhythms = [r for r in (loop.log_every_steps, loop.checkpoint_every_steps, loop.sample_every_steps) if r]
    return min(start + config.devices.steps_per_loop, config.run.train_steps, *(start - start % r + r for r in rhythms))


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


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
        self._layout, self._cold = layout, 1
        self._clear()

    def _clear(self) -> None:
        self._sums, self._good = np.zeros(len(step_lib.SCALARS)), 0
        self._blocks: list[tuple[int, float, float]] = []

    def add(self, steps: int, sums: Any, skipped: int, waited: float, secs: float) -> None:
        """Counts a block: the sums over its good steps, and seconds in all and waiting for data."""
        self._sums = self._sums + sums
        self._good += steps - skipped
        self._blocks.append((steps, waited, secs))

    def read(self, step: int, skipped: int) -> dict[str, float]:
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
            "skipped_steps": skipped,
            "memory_gb": summaries.memory_gb(),
        }
        self._cold = 0
        self._clear()
        return values
