"""Every setting: its name, default, unit, help text and rules, each stated once.

The name of a field is the name of its flag. Fields marked `identity` change the model or the order of the data, so a
run cannot be resumed with another value. A value in `planned` is part of the interface, and refused until the code for
it exists.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from gan_dist.errors import UsageError

# Of a whole number: positions in the stream of images are 64-bit, and a step takes up to this many of them.
_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of a setting beside its name, type and default."""

    help: str
    unit: str = ""
    identity: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    planned: tuple[str, ...] = ()
    only: Any = None


def option(default: Any, help: str, **rules: Any) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(help, **rules)})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Which run, and how long."""

    workdir: str = option(
        "",
        "Folder of the run. The same command again resumes it. Default: runs/<name of the flagfile>.",
        unit="path",
    )
    train_steps: int = option(20_000, "Generator updates in all, from the start of the run.", unit="steps", minimum=1)
    seed: int = option(0, "The one seed: initial weights, order of the data, noise.", identity=True, minimum=0)
    init_from: str = option("", "Start a new run from the newest weights of this other run's folder.", unit="path")
    dry_run: bool = option(False, "Print what would run (settings, parameters, devices, memory); write nothing.")


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """On what it runs, and with which arithmetic."""

    strategy: str = option(
        "auto",
        "How to replicate. auto: multi_worker with more than one worker in the cluster, else mirrored with more than "
        "one device, else single.",
        choices=("auto", "single", "mirrored", "multi_worker"),
    )
    accelerator: str = option("auto", "auto takes GPUs where there are any.", choices=("auto", "gpu", "cpu"))
    num_devices: int = option(
        0,
        "Devices per worker process. 0: all GPUs, or one CPU device. On CPU they are logical devices.",
        unit="devices",
        minimum=0,
    )
    virtual_devices_per_gpu: int = option(
        1, "Split each GPU into this many logical devices, to try replication on one card.", unit="devices", minimum=1
    )
    precision: str = option(
        "float32",
        "Arithmetic of the networks. bfloat16 keeps variables, statistics and losses in float32. float64 (CPU) is for "
        "proofs.",
        choices=("float32", "bfloat16", "float64"),
        identity=True,
    )
    xla: str = option(
        "auto",
        "Compile the step with XLA. auto: where no collective lies inside, that is with one replica on a GPU. "
        "on: needs one replica.",
        choices=("auto", "on", "off"),
    )
    steps_per_loop: int = option(
        50, "Most steps in one call of the compiled loop; the host looks in between.", unit="steps", minimum=1
    )
    intra_op_threads: int = option(
        0,
        "CPU threads inside an operation. 0: TensorFlow's choice, all cores. Another number rounds differently.",
        unit="threads",
        minimum=0,
    )
    deterministic: bool = option(
        True, "On GPU, only kernels that give the same bits each time, so that a resumed run is bit-identical."
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images."""

    dataset: str = option(
        "mnist",
        "mnist (60,000 digits, part of the package).",
        choices=("mnist",),
        planned=("fashion_mnist", "cifar10", "*.npz", "*.tfrecord*", "tfds:*", "*/*"),
        identity=True,
    )
    data_dir: str = option("", "Folder that holds the four MNIST files, instead of those in the package.", unit="path")
    resolution: int = option(
        28,
        "Height and width of the images. mnist: 28 as they are, 32 padded, 64 padded and doubled.",
        unit="pixels",
        identity=True,
        choices=("28", "32", "64"),
    )
    channels: int = option(1, "1 for grey, 3 for colour.", unit="channels", choices=("1", "3"), identity=True)
    global_batch_size: int = option(
        128, "Images per step over all replicas; batch norm needs two.", unit="images", minimum=2, identity=True
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The two networks. Defaults: reference 1 in its modern form (README, "Where things live")."""

    architecture: str = option(
        "dcgan", "The pair of networks.", choices=("dcgan",), planned=("mlp", "resnet"), identity=True
    )
    width: int = option(
        64, "Channels of the layer nearest the image; each layer further doubles them.", minimum=1, identity=True
    )
    kernel_size: int = option(5, "Side of the convolution kernels.", unit="pixels", minimum=1, identity=True)
    discriminator_features: int = option(
        1024,
        "Units of the discriminator's dense layer before the logit. 0: none, the logit reads the last convolution.",
        minimum=0,
        identity=True,
    )
    conditional: bool = option(
        False,
        "Use class labels: one-hot beside the latent in the generator, projection (Miyato & Koyama 2018) in the "
        "discriminator.",
        identity=True,
    )
    latent_size: int = option(100, "Numbers of noise per image.", minimum=1, identity=True)
    latent_mean: float = option(0.0, "Mean of the noise.", identity=True)
    latent_stddev: float = option(1.0, "Standard deviation of the noise.", above=0, identity=True)
    sync_batch_norm: bool = option(
        True, "Batch-norm statistics over the global batch. Off: over each replica's share.", identity=True
    )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The objective, and Adam for both networks. Defaults: Radford et al. 2016 (arXiv:1511.06434), section 4."""

    loss: str = option(
        "non_saturating",
        "The adversarial objective.",
        choices=("non_saturating",),
        planned=(
            "softmax",
            "minimax",
            "least_squares",
            "hinge",
            "wasserstein_gp",
            "wasserstein_clipping",
            "relativistic_average",
        ),
        identity=True,
    )
    update: str = option(
        "alternating",
        "alternating: discriminator, then generator on fresh noise.",
        choices=("alternating",),
        planned=("simultaneous",),
        identity=True,
    )
    generator_lr: float = option(2e-4, "Adam step size of the generator.", above=0)
    discriminator_lr: float = option(2e-4, "Adam step size of the discriminator.", above=0)
    adam_beta1: float = option(0.5, "Decay of Adam's first moment, both networks.", minimum=0, below=1)
    adam_beta2: float = option(0.999, "Decay of Adam's second moment, both networks.", minimum=0, below=1)
    adam_epsilon: float = option(1e-7, "Added to the root of Adam's second moment.", above=0)
    discriminator_steps: int = option(1, "Discriminator updates per step.", only=1, identity=True)
    ema_half_life_kimg: float = option(
        10.0,
        "Half-life of the running average of the generator's weights, which samples are drawn from. 0: no average.",
        unit="thousand images",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What happens how often. 0 turns one off."""

    log_every_steps: int = option(100, "A line of scalars: log, metrics.jsonl, TensorBoard.", unit="steps", minimum=0)
    checkpoint_every_steps: int = option(1000, "A commit of the whole state.", unit="steps", minimum=0)
    checkpoint_every_secs: float = option(
        600.0, "A commit when the last is this old (the chief's clock).", unit="seconds", minimum=0
    )
    keep_checkpoints: int = option(3, "Newest commits to keep.", unit="commits", minimum=1)
    keep_every_hours: float = option(
        0.0, "Beside the newest commits, keep one for so many hours.", unit="hours", minimum=0
    )
    eval_every_steps: int = option(0, "Measure the quality of the samples.", unit="steps", only=0)
    sample_every_steps: int = option(1000, "A grid of images from fixed noise.", unit="steps", minimum=0)


@dataclasses.dataclass(frozen=True)
class LimitConfig:
    """How long a phase may last before the process is ended (0: for ever), and how much may go wrong."""

    start_timeout_secs: float = option(600.0, "Start-up: imports, data, restore (exit 172).", unit="seconds", minimum=0)
    cluster_timeout_secs: float = option(
        600.0, "Forming the cluster: names, then connections (exit 173).", unit="seconds", minimum=0
    )
    first_step_timeout_secs: float = option(
        1800.0, "The first block of steps, which traces and compiles (exit 172).", unit="seconds", minimum=0
    )
    step_timeout_secs: float = option(
        600.0, "A block of --steps_per_loop steps, and what is logged after it (exit 172).", unit="seconds", minimum=0
    )
    save_timeout_secs: float = option(600.0, "A commit (exit 172).", unit="seconds", minimum=0)
    exit_timeout_secs: float = option(120.0, "Leaving, once all is committed (exit 172).", unit="seconds", minimum=0)
    lock_lease_secs: float = option(
        30.0,
        "How long the workdir's lock may stay unchanged before its owner on another machine counts as dead.",
        unit="seconds",
        above=0,
    )
    max_consecutive_skips: int = option(
        20,
        "Steps in a row whose numbers are not finite before the run goes back to its last commit, with other noise and "
        "order of the data.",
        unit="steps",
        minimum=1,
    )
    max_rollbacks: int = option(3, "How often it may go back before it ends as diverged (exit 65).", minimum=0)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run, in the order of the pipeline."""

    run: RunConfig = RunConfig()
    devices: DeviceConfig = DeviceConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()
    limits: LimitConfig = LimitConfig()


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Flags of `python -m gan_dist.sample` alone."""

    num_images: int = option(100, "How many images.", unit="images", minimum=1)
    label: int = option(-1, "Only this class (a conditional model); -1: row r asks for class r.", minimum=-1)
    output: str = option(
        "", "A .png (one grid) or a .npz (key images: uint8 NHWC). Default: <workdir>/samples/sample.png.", unit="path"
    )
    checkpoint_step: int = option(-1, "The commit to sample from; -1: the newest.", unit="steps", minimum=-1)
    sample_seed: int = option(0, "Seed of the noise.", minimum=0)
    use_ema: bool = option(True, "Draw from the running average of the weights.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of one section, as the command line and the resume check see it."""

    section: str
    name: str
    type: type
    default: Any
    option: Option


def settings(*sections: tuple[str, type]) -> Iterator[Setting]:
    """The fields of the given sections (default: all of `Config`), in order."""
    for section, cls in sections or tuple((f.name, _class(f.type)) for f in dataclasses.fields(Config)):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            yield Setting(section, field.name, hints[field.name], field.default, field.metadata["option"])


def _class(annotation: Any) -> type:
    return annotation if isinstance(annotation, type) else globals()[annotation]


def check_value(setting: Setting, value: Any) -> None:
    """Refuses a value that breaks the rule of its own field.

    Raises:
        UsageError: With the flag, the value, the rule and the way out.
    """
    o, flag = setting.option, f"--{setting.name}={value}"
    unit = f" {o.unit}" if o.unit else ""
    if o.only is not None and value != o.only:
        raise UsageError(f"{flag} is planned and not part of this version; leave it at {o.only}.")
    if o.choices and str(value) not in o.choices:
        known = ", ".join(o.choices)
        if any(_planned(str(value), pattern) for pattern in o.planned):
            raise UsageError(f"{flag} is planned and not part of this version; available: {known}.")
        raise UsageError(f"{flag} is not one of: {known}.")
    if isinstance(value, float) and value != value:
        raise UsageError(f"{flag} is not a number; give a number{unit}.")
    if setting.type is int and value > _LARGEST:
        raise UsageError(f"{flag} is too large; give at most {_LARGEST}{unit}.")
    if o.minimum is not None and value < o.minimum:
        raise UsageError(f"{flag} is too small; give at least {o.minimum}{unit}.")
    if o.above is not None and not value > o.above:
        raise UsageError(f"{flag} is too small; give more than {o.above}{unit}.")
    if isinstance(value, float) and abs(value) == float("inf"):
        raise UsageError(f"{flag} is not finite; give a finite number{unit}.")
    if o.below is not None and not value < o.below:
        raise UsageError(f"{flag} is too large; give less than {o.below}{unit}.")


def _planned(value: str, pattern: str) -> bool:
    import fnmatch

    return fnmatch.fnmatchcase(value, pattern)


def check(config: Config) -> None:
    """Refuses settings that break a rule, alone or together.

    Raises:
        UsageError: With the flag, the value, the rule and the way out.
    """
    for setting in settings():
        check_value(setting, getattr(getattr(config, setting.section), setting.name))
    devices = config.devices
    if config.run.workdir.startswith(("gs://", "s3://")):
        raise UsageError(
            f"--workdir={config.run.workdir} is in an object store, which is planned and not part of this version; "
            "mount the bucket and give the mounted path."
        )
    if devices.strategy == "single" and devices.num_devices > 1:
        raise UsageError(
            f"--num_devices={devices.num_devices} does not fit --strategy=single, which has one; "
            "use --strategy=mirrored, or --num_devices=1."
        )
    if devices.precision == "float64" and devices.accelerator == "gpu":
        raise UsageError(
            "--precision=float64 is for proofs on CPU; add --accelerator=cpu, or use --precision=float32 or bfloat16."
        )
    if devices.virtual_devices_per_gpu > 1 and devices.accelerator == "cpu":
        raise UsageError(
            f"--virtual_devices_per_gpu={devices.virtual_devices_per_gpu} splits GPUs, and --accelerator=cpu has none; "
            "use --num_devices for logical CPU devices."
        )


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings by section and name, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """The inverse of `to_dict`. A setting that `values` lacks has its default.

    Raises:
        UsageError: If `values` holds a setting that this version does not know, or one of another type.
    """
    known = {(s.section, s.name): s for s in settings()}
    sections: dict[str, dict[str, Any]] = {f.name: {} for f in dataclasses.fields(Config)}
    for section, fields in values.items():
        for name, value in fields.items():
            setting = known.get((section, name))
            if setting is None:
                raise UsageError(f"The stored configuration has {section}.{name}, which this version does not know.")
            if setting.type is float and type(value) is int and abs(value) <= _LARGEST:
                value = float(value)
            if type(value) is not setting.type:
                raise UsageError(
                    f"The stored configuration has {section}.{name}={value!r}, which is not a {setting.type.__name__}."
                )
            sections[section][name] = value
    return Config(**{f.name: _class(f.type)(**sections[f.name]) for f in dataclasses.fields(Config)})


def differences(old: Config, new: Config, *, identity: bool) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by name: those that change the model or the data order, or (False) the others."""
    changed = {}
    for s in settings():
        before, after = getattr(getattr(old, s.section), s.name), getattr(getattr(new, s.section), s.name)
        if before != after and s.option.identity == identity:
            changed[s.name] = (before, after)
    return changed
