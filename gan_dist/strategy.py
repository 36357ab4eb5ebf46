"""From settings and cluster to a `tf.distribute` strategy. No other module names one.

Create the strategy before anything else runs in TensorFlow, and one per process: collectives are set up at start-up.
"""

import ctypes
import dataclasses
import functools
import glob
import os
import sysconfig
from collections.abc import Callable

import tensorflow as tf

from gan_dist.cluster import Cluster
from gan_dist.config import DeviceConfig
from gan_dist.errors import EnvironmentFault, UsageError

# What TensorFlow 2.21 loads before it registers a GPU: first the driver, then CUDA 12's libraries.
_GPU_LIBRARIES = (
    "libcuda.so.1",
    "libcudart.so.12",
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libcufft.so.11",
    "libcusolver.so.11",
    "libcusparse.so.12",
    "libcudnn.so.9",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a strategy will be made of: `devices` of the `accelerator` in each of `workers` processes."""

    kind: str
    accelerator: str
    devices: int
    workers: int

    @property
    def replicas(self) -> int:
        return self.devices * self.workers

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.workers} worker(s) x {self.devices} {self.accelerator.upper()} device(s) "
            f"= {self.replicas} replica(s)"
        )


def plan(devices: DeviceConfig, cluster: Cluster, gpus_here: int) -> Plan:
    """Resolves `auto` and 0 against a machine with `gpus_here` GPUs.

    Raises:
        UsageError: If the settings cannot go together, on any machine.
    """
    accelerator = devices.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus_here and devices.precision != "float64" else "cpu"
    split = devices.virtual_devices_per_gpu if accelerator == "gpu" else 1
    count = (devices.num_devices or (gpus_here if accelerator == "gpu" else 0) or 1) * split
    workers = len(cluster.workers)
    kind = devices.strategy
    if kind == "single":
        if split > 1:
            raise UsageError(f"--virtual_devices_per_gpu={split} does not fit --strategy=single; use mirrored.")
        count = 1
    elif kind == "auto":
        kind = "multi_worker" if workers > 1 else "mirrored" if count > 1 else "single"
    if kind == "multi_worker" and workers == 1:
        raise UsageError(
            "--strategy=multi_worker needs more than one worker, and TF_CONFIG names no other; "
            "set TF_CONFIG on every worker, or use --strategy=auto."
        )
    if kind != "multi_worker" and workers > 1:
        raise UsageError(
            f"--strategy={kind} does not fit a cluster of {workers} workers (TF_CONFIG): each would train its own "
            "model; use --strategy=auto, or unset TF_CONFIG."
        )
    if kind == "multi_worker" and accelerator == "cpu" and count > 1:
        # MultiWorkerMirroredStrategy takes one CPU device a worker, whatever the number of logical devices.
        raise UsageError(
            f"--num_devices={count} does not fit --strategy=multi_worker on CPU, which has one device a worker; "
            "use --num_devices=1 and more workers."
        )
    if kind == "multi_worker" and split > 1:
        raise UsageError(
            f"--virtual_devices_per_gpu={split} does not fit --strategy=multi_worker: NCCL takes a card once. "
            "Use --virtual_devices_per_gpu=1."
        )
    resolved = Plan(kind, accelerator, count, workers)
    if devices.xla == "on" and resolved.replicas > 1:
        raise UsageError(
            f"--xla=on needs one replica, and there are {resolved.replicas}: collectives cannot be compiled. "
            "Use --xla=auto."
        )
    return resolved


def gpus_here() -> int:
    """How many GPUs TensorFlow registers."""
    return len(tf.config.list_physical_devices("GPU"))


def create(devices: DeviceConfig, cluster: Cluster | None = None) -> tf.distribute.Strategy:
    """The strategy for these settings; call it once, before any other use of TensorFlow.

    Raises:
        UsageError: If the settings cannot go together.
        EnvironmentFault: If the GPUs asked for are not there.
    """
    cluster = cluster or Cluster()
    resolved = plan(devices, cluster, gpus_here())
    if devices.intra_op_threads:
        tf.config.threading.set_intra_op_parallelism_threads(devices.intra_op_threads)
    if resolved.accelerator == "gpu":
        names = _use_gpus(devices, resolved)
    else:
        names = _use_cpu(resolved)
    if resolved.kind == "single":
        return tf.distribute.OneDeviceStrategy(names[0])
    if resolved.kind == "mirrored":
        # On CPU the reduction is an addition in a fixed order; on GPU the default is NCCL, which takes a card once.
        plain = resolved.accelerator == "cpu" or devices.virtual_devices_per_gpu > 1
        reduction = tf.distribute.ReductionToOneDevice() if plain else None
        return tf.distribute.MirroredStrategy(names, cross_device_ops=reduction)
    implementation = tf.distribute.experimental.CommunicationImplementation
    return tf.distribute.MultiWorkerMirroredStrategy(
        cluster_resolver=tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": list(cluster.workers)}),
            task_type="worker",
            task_id=cluster.index,
            num_accelerators={"GPU": resolved.devices} if resolved.accelerator == "gpu" else {},
            rpc_layer="grpc",
        ),
        communication_options=tf.distribute.experimental.CommunicationOptions(
            implementation=implementation.NCCL if resolved.accelerator == "gpu" else implementation.RING
        ),
    )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes: worker 0, or the only one."""
    return worker_index(strategy) == 0


def worker_index(strategy: tf.distribute.Strategy) -> int:
    resolver = strategy.cluster_resolver
    return int(resolver.task_id or 0) if resolver else 0


def num_workers(strategy: tf.distribute.Strategy) -> int:
    resolver = strategy.cluster_resolver
    return len(resolver.cluster_spec().as_dict().get("worker", [])) or 1 if resolver else 1


def sum_over_workers(strategy: tf.distribute.Strategy, value: int) -> int:
    """The sum of one whole number of each worker. Every worker must call it; so it is a barrier, too."""
    workers = num_workers(strategy)
    if workers == 1:
        return value
    # Every replica of a worker contributes the worker's number.
    return int(_total(strategy)(tf.constant(value, tf.int64))) * workers // strategy.num_replicas_in_sync


@functools.cache
def _total(strategy: tf.distribute.Strategy) -> Callable[[tf.Tensor], tf.Tensor]:
    @tf.function
    def total(number: tf.Tensor) -> tf.Tensor:
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(tf.identity, args=(number,)), axis=None)

    return total


def _use_cpu(resolved: Plan) -> list[str]:
    # Hidden, or MultiWorkerMirroredStrategy would take the GPUs all the same.
    if tf.config.list_physical_devices("GPU"):
        _before_start(tf.config.set_visible_devices, [], "GPU")
    cpu = tf.config.list_physical_devices("CPU")[0]
    if resolved.devices > len(tf.config.get_logical_device_configuration(cpu) or [None]):
        _before_start(
            tf.config.set_logical_device_configuration,
            cpu,
            [tf.config.LogicalDeviceConfiguration() for _ in range(resolved.devices)],
        )
    return [f"CPU:{i}" for i in range(resolved.devices)]


def _use_gpus(devices: DeviceConfig, resolved: Plan) -> list[str]:
    gpus = tf.config.list_physical_devices("GPU")
    split = devices.virtual_devices_per_gpu
    wanted = resolved.devices // split
    if len(gpus) < wanted:
        raise EnvironmentFault(_missing_gpus(wanted, len(gpus)))
    _before_start(tf.config.set_visible_devices, gpus[:wanted], "GPU")
    for gpu in gpus[:wanted]:
        if split > 1:
            # Half a GiB is left to the driver and the libraries.
            memory_mb = int(_gpu_memory_mb(gpu) - 512) // split
            _before_start(
                tf.config.set_logical_device_configuration,
                gpu,
                [tf.config.LogicalDeviceConfiguration(memory_limit=memory_mb) for _ in range(split)],
            )
        else:
            _before_start(tf.config.experimental.set_memory_growth, gpu, True)
    if devices.deterministic:
        tf.config.experimental.enable_op_determinism()
    return [f"GPU:{i}" for i in range(resolved.devices)]


def _before_start(change: object, *arguments: object) -> None:
    try:
        change(*arguments)  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        raise UsageError(
            "TensorFlow has started already, with other devices. Call gan_dist.strategy.create before anything else "
            "that uses TensorFlow, once per process."
        ) from error


def _gpu_memory_mb(gpu: tf.config.PhysicalDevice) -> float:
    """Memory of the card in MiB, as the driver says; TensorFlow has no call for it."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, total = ctypes.c_int(), ctypes.c_size_t()
    index = int(gpu.name.rsplit(":", 1)[1])
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), index)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(total), handle)
    )
    if failed:
        raise EnvironmentFault(f"The CUDA driver does not tell the memory of {gpu.name} (error {failed}).")
    return total.value / 2**20


def _missing_gpus(wanted: int, found: int) -> str:
    missing = [name for name in _GPU_LIBRARIES if not _loads(name)]
    if "libcuda.so.1" in missing:
        reason = "the NVIDIA driver (libcuda.so.1) is not on this machine; install it, or run on a machine that has it"
    elif missing:
        reason = f"TensorFlow misses {', '.join(missing)}; pip install 'gan_dist[gpu]' brings them"
    else:
        reason = "driver and libraries are there: see `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    return (
        f"{wanted} GPU(s) asked for (--accelerator=gpu, --num_devices), {found} found: {reason}. "
        "With pip, GPUs need the extra: pip install 'gan_dist[gpu]'. To try the same configuration without GPUs, add "
        "--accelerator=cpu."
    )


def _loads(library: str) -> bool:
    # The wheels of the extra `gpu` keep their libraries outside the loader's path; TensorFlow looks there, too.
    bundled = glob.glob(os.path.join(sysconfig.get_paths()["purelib"], "nvidia", "*", "lib", library))
    try:
        ctypes.CDLL(bundled[0] if bundled else library)
    except OSError:
        return False
    return True
