"""`python -m gan_dist.train`: parse, resolve, print or run."""

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gan_dist import cli, lock, rendezvous, supervision, workdir
from gan_dist import cluster as cluster_lib
from gan_dist import config as config_lib
from gan_dist.cluster import Cluster
from gan_dist.config import Config
from gan_dist.errors import ClusterNotFormed, EnvironmentFault, PeerLost, StopRequested, UsageError
from gan_dist.layout import Layout
from gan_dist.supervision import Watch

# Of a workdir that cannot be written, or not any more.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ESTALE)
# What the shapes and types of the weights depend on.
_SHAPES = {f.name for f in dataclasses.fields(config_lib.ModelConfig)} - {"latent_mean", "latent_stddev"}
_SHAPES |= {"resolution", "channels", "precision"}


def main(argv: Sequence[str]) -> None:
    """Trains what the flags describe, or, with --dry_run, says what that would be.

    What can be refused without TensorFlow is refused here; then a child trains, and this process supervises it.
    """
    config = cli.parse(argv, "train").config
    config_lib.check(config)
    cluster = cluster_lib.from_environment(os.environ)
    _check_known_batch(config, len(cluster.workers))
    if config.data.data_dir and not Path(config.data.data_dir).is_dir():
        raise EnvironmentFault(f"--data_dir={config.data.data_dir} is not a folder; give one, or leave it out.")
    workdir.check_resume(config)
    if config.run.init_from and workdir.read_config(Path(config.run.workdir)) is None:
        _check_init_from(config)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    watch = supervision.attach()
    if config.run.dry_run:
        from gan_dist import strategy

        gpus = strategy.gpus_here()
        if config.devices.strategy == "multi_worker" and len(cluster.workers) == 1:
            print("TF_CONFIG is not set: a cluster of two workers is assumed.")
            cluster = Cluster(("host0:2222", "host1:2222"))
        print(describe(config, strategy.plan(config.devices, cluster, gpus), gpus))
    elif watch:
        work(config, cluster, watch)
    else:
        _supervise(argv, config, cluster)


def _supervise(argv: Sequence[str], config: Config, cluster: Cluster) -> None:
    """Runs the training child, and leaves with its exit code."""
    limits = config.limits
    deadlines = {
        supervision.STARTING: limits.start_timeout_secs,
        supervision.CLUSTER: limits.cluster_timeout_secs,
        supervision.FIRST_STEP: limits.first_step_timeout_secs,
        supervision.STEPS: limits.step_timeout_secs,
        supervision.SAVING: limits.save_timeout_secs,
        supervision.LEAVING: limits.exit_timeout_secs,
    }
    command = [sys.executable, "-m", "gan_dist.train", *argv]

    def stop(number: int, _: Any) -> None:
        raise StopRequested(f"{signal.Signals(number).name} while waiting: nothing to save; the same command goes on.")

    # Until there is a child, and supervision.run has its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    _log_to_stdout()
    with contextlib.ExitStack() as stack:
        if cluster.index == 0:
            # Taken by the parent, which lives when the child is stuck.
            folder = Path(config.run.workdir)
            stack.enter_context(lock.held(folder, limits.lock_lease_secs, lost=_lock_lost))
        if len(cluster.workers) > 1:
            rendezvous.wait_for_names(cluster, limits.cluster_timeout_secs)
            rendezvous.check_own_port(cluster)
        code = supervision.run(command, deadlines, lambda: rendezvous.missing_peers(cluster))
    if code:
        sys.exit(code)


def _check_init_from(config: Config) -> None:
    """Refuses to start from a run of other networks, before anything is written."""
    other = workdir.read_config(Path(config.run.init_from), "--init_from")
    if other is None:
        raise UsageError(f"--init_from={config.run.init_from} holds no run (no config.json); give a run's workdir.")
    changed = [
        f"\n  --{name}: {old} there, {new} now"
        for name, (old, new) in config_lib.differences(other, config, identity=True).items()
        if name in _SHAPES
    ]
    if changed:
        raise UsageError(
            f"--init_from={config.run.init_from} is a run of other networks:{''.join(changed)}\nGive its own values."
        )


def _lock_lost() -> None:
    print("gan_dist: another run has taken the workdir's lock: leaving at once.", file=sys.stderr, flush=True)
    # Without a word to anyone: the child goes with its parent, and must not write again.
    os._exit(EnvironmentFault.exit_code)


def work(config: Config, cluster: Cluster, watch: Watch) -> None:
    """The training child's part."""
    import tensorflow as tf

    from gan_dist import loop, strategy

    _log_to_stdout()
    formed = False
    try:
        if len(cluster.workers) > 1:
            watch.phase(supervision.CLUSTER)
        replicas = strategy.create(config.devices, cluster)
        formed = True
        watch.phase(supervision.STARTING)
        watch.take_signals()
        logging.getLogger("gan_dist").info(
            "%s, %d replica(s), workdir %s", type(replicas).__name__, replicas.num_replicas_in_sync, config.run.workdir
        )
        loop.train(config, replicas, watch)
    except tf.errors.ResourceExhaustedError as error:
        if "No space left" in str(error):
            # TensorFlow has one error for both.
            raise _disk_fault(config, error) from error
        raise EnvironmentFault(
            f"Out of memory on a device: {_first_line(error)} Use more devices (--num_devices), a smaller "
            "--global_batch_size or --width, or --precision=bfloat16; --dry_run shows the memory that a replica needs."
        ) from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise _disk_fault(config, error) from error
    except tf.errors.OpError as error:
        if len(cluster.workers) == 1:
            raise
        if not formed:
            raise ClusterNotFormed(
                f"Worker {cluster.index} could not join the cluster: {_first_line(error)} Start all workers again."
            ) from error
        if not isinstance(error, _lost(tf)):
            raise
        raise PeerLost(
            f"Worker {cluster.index} lost a peer: {_first_line(error)} {rendezvous.missing_peers(cluster)} Start all "
            "workers again; they go on from the last commit."
        ) from error
    finally:
        # However it ends: TensorFlow may hang on its way out of a cluster.
        watch.phase(supervision.LEAVING)


def _lost(tf: Any) -> tuple[type[Exception], ...]:
    """What a collective raises when a peer is gone."""
    names = ("Unavailable", "DeadlineExceeded", "Aborted", "Cancelled", "Internal", "FailedPrecondition")
    return tuple(getattr(tf.errors, f"{name}Error") for name in names)


def _disk_fault(config: Config, error: Exception) -> EnvironmentFault:
    reason = "No space left on device" if "No space left" in str(error) else str(error)
    return EnvironmentFault(
        f"--workdir={config.run.workdir}: {reason}. Make room or give write permission, and run the same command "
        "again: it goes on from the last commit."
    )


def _first_line(error: Any) -> str:
    """The line of a TensorFlow error that says what happened, not where in the graph."""
    lines = [line.strip() for line in error.message.splitlines()]
    where = ("Graph execution error", "Detected at", "[[", "<stack", "File ", "Additional GRPC", "The following")
    return next((line for line in lines if line and not line.startswith(where)), type(error).__name__)


def describe(config: Config, plan: Any, gpus_here: int) -> str:
    """What would run: settings, devices, parameters, memory of a replica. Imports TensorFlow."""
    from gan_dist import data, state

    layout = Layout(config.data.global_batch_size, plan.replicas)
    generator, discriminator = state.networks(config, data.num_classes(config.data))
    lines = ["settings:"]
    for setting in config_lib.settings():
        value = getattr(getattr(config, setting.section), setting.name)
        unit = f"  ({setting.option.unit})" if setting.option.unit else ""
        lines.append(f"  --{setting.name}={value}{unit}")
    lines.append(f"devices: {plan}; {layout.per_replica} images a replica; this machine has {gpus_here} GPU(s)")
    if plan.accelerator == "gpu" and gpus_here < plan.devices // config.devices.virtual_devices_per_gpu:
        lines.append("  these GPUs are not here: to run on this machine, add --accelerator=cpu")
    for network in (generator, discriminator):
        lines.append(f"parameters: {network.layer.name} {network.parameters:,}")
    lines.append(f"memory: about {replica_memory(config, layout, generator, discriminator) / 1e9:.2f} GB a replica")
    return "\n".join(lines)


def replica_memory(config: Config, layout: Layout, generator: Any, discriminator: Any) -> int:
    """An estimate of the bytes that a replica needs at its fullest: state, gradients, data set, activations.

    Activations are those of the discriminator's pass over real and generated images together, or of the generator's
    through the discriminator, whichever is more, each kept for the backward pass and met there by its gradient.
    """
    variable = 8 if config.devices.precision == "float64" else 4
    activation = {"float32": 4, "bfloat16": 2, "float64": 8}[config.devices.precision]
    # Weights, two moments, gradients twice (apart, and packed for the all-reduce); the generator's average.
    numbers = 5 * (generator.parameters + discriminator.parameters) + generator.parameters
    model, pixels = config.model, config.data.resolution**2 * config.data.channels
    g = generator.layer.stack.elements(model.latent_size + generator.num_classes)
    d = discriminator.layer.stack.elements((config.data.resolution, config.data.resolution, config.data.channels))
    activations = 2 * layout.per_replica * max(2 * (d + pixels), g + d)
    return numbers * variable + activations * activation + 60_000 * pixels


def _check_known_batch(config: Config, workers: int) -> None:
    """Refuses a batch that cannot divide, where the number of replicas is already known."""
    devices = config.devices
    if devices.num_devices:
        split = 1 if devices.accelerator == "cpu" else devices.virtual_devices_per_gpu
        Layout(config.data.global_batch_size, devices.num_devices * split * workers)


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("gan_dist")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    cli.run(main)
