"""Settings: their rules, their round trip through JSON, and what a resumed run may change."""

import dataclasses
import json

import pytest

from gan_dist import config as config_lib
from gan_dist.config import (
    Config,
    DataConfig,
    DeviceConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
)
from gan_dist.errors import UsageError

SETTINGS = {s.name: s for s in config_lib.settings()}

# The interface that configs, manifests and users depend on.
INTERFACE = """
    workdir train_steps seed dry_run strategy accelerator num_devices virtual_devices_per_gpu precision xla
    steps_per_loop dataset data_dir resolution channels global_batch_size architecture loss update latent_size
    latent_mean latent_stddev conditional generator_lr discriminator_lr adam_beta1 adam_beta2 adam_epsilon
    discriminator_steps ema_half_life_kimg sync_batch_norm log_every_steps checkpoint_every_steps
    checkpoint_every_secs keep_checkpoints eval_every_steps sample_every_steps
""".split()

IDENTITY = set(
    """
    seed precision dataset resolution channels global_batch_size architecture width kernel_size discriminator_features
    conditional latent_size latent_mean latent_stddev sync_batch_norm loss update discriminator_steps
    """.split()
)


def with_setting(name: str, value: object) -> Config:
    section = SETTINGS[name].section
    return dataclasses.replace(Config(), **{section: dataclasses.replace(getattr(Config(), section), **{name: value})})


@pytest.mark.parametrize("name", INTERFACE)
def test_every_flag_of_the_interface_exists(name):
    assert name in SETTINGS


def test_setting_names_are_distinct_over_all_sections():
    names = [s.name for s in config_lib.settings()] + [s.name for s in config_lib.settings(("own", SampleConfig))]
    assert len(names) == len(set(names))


def test_defaults_obey_every_rule():
    config_lib.check(Config())
    for setting in config_lib.settings(("own", SampleConfig)):
        config_lib.check_value(setting, setting.default)


@pytest.mark.parametrize(
    "setting", [*SETTINGS.values(), *config_lib.settings(("own", SampleConfig))], ids=lambda s: s.name
)
def test_every_setting_has_a_help_sentence_and_a_default_of_its_type(setting):
    assert setting.option.help.endswith((".", ")"))
    assert type(setting.default) is setting.type


def test_settings_that_change_the_model_or_the_data_order_are_marked():
    marked = {name for name, s in SETTINGS.items() if s.option.identity}
    assert marked == IDENTITY, (
        "The settings that a resumed run may not change are other ones now. If that is meant, change IDENTITY here, "
        "and say in the commit which stored runs can no longer be resumed, or now can with another value."
    )


@pytest.mark.parametrize(
    "name, value, rule",
    [
        # minimum
        ("train_steps", 0, "at least 1 steps"),
        ("seed", -1, "at least 0"),
        ("num_devices", -1, "at least 0 devices"),
        ("virtual_devices_per_gpu", 0, "at least 1 devices"),
        ("steps_per_loop", 0, "at least 1 steps"),
        ("intra_op_threads", -1, "at least 0 threads"),
        ("global_batch_size", 1, "at least 2 images"),
        ("width", 0, "at least 1"),
        ("kernel_size", 0, "at least 1 pixels"),
        ("discriminator_features", -1, "at least 0"),
        ("latent_size", 0, "at least 1"),
        ("adam_beta1", -0.1, "at least 0"),
        ("adam_beta2", float("-inf"), "at least 0"),
        ("ema_half_life_kimg", -1.0, "at least 0 thousand images"),
        ("log_every_steps", -1, "at least 0 steps"),
        ("checkpoint_every_steps", -1, "at least 0 steps"),
        ("checkpoint_every_secs", -1.0, "at least 0 seconds"),
        ("keep_checkpoints", 0, "at least 1 commits"),
        ("sample_every_steps", -1, "at least 0 steps"),
        # above
        ("latent_stddev", 0.0, "more than 0"),
        ("generator_lr", 0.0, "more than 0"),
        ("discriminator_lr", -1e-4, "more than 0"),
        ("adam_epsilon", 0.0, "more than 0"),
        # below
        ("adam_beta1", 1.0, "less than 1"),
        ("adam_beta2", 1.5, "less than 1"),
        # choices
        ("strategy", "horovod", "auto, single, mirrored, multi_worker"),
        ("accelerator", "tpu", "auto, gpu, cpu"),
        ("precision", "float16", "float32, bfloat16, float64"),
        ("xla", "yes", "auto, on, off"),
        ("dataset", "svhn", "mnist"),
        ("resolution", 128, "28, 32, 64"),
        ("channels", 2, "1, 3"),
        ("architecture", "stylegan", "dcgan"),
        ("loss", "nonsense", "non_saturating"),
        ("update", "sometimes", "alternating"),
        # planned: known, not there yet, and what there is
        ("dataset", "cifar10", "planned and not part of this version; available: mnist"),
        ("dataset", "tfds:celeb_a", "planned and not part of this version; available: mnist"),
        ("dataset", "faces/train.npz", "planned and not part of this version; available: mnist"),
        ("architecture", "resnet", "planned and not part of this version; available: dcgan"),
        ("loss", "hinge", "planned and not part of this version; available: non_saturating"),
        ("update", "simultaneous", "planned and not part of this version; available: alternating"),
        # only
        ("discriminator_steps", 2, "planned and not part of this version; leave it at 1"),
        ("eval_every_steps", 100, "planned and not part of this version; leave it at 0"),
        # numbers that are none
        ("generator_lr", float("nan"), "is not a number; give a number"),
        ("latent_mean", float("nan"), "is not a number; give a number"),
        ("checkpoint_every_secs", float("nan"), "is not a number; give a number seconds"),
        ("latent_mean", float("inf"), "is not finite; give a finite number"),
        ("latent_mean", float("-inf"), "is not finite; give a finite number"),
        ("latent_stddev", float("inf"), "is not finite; give a finite number"),
        ("ema_half_life_kimg", float("inf"), "is not finite; give a finite number thousand images"),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_with_flag_value_and_way_out(name, value, rule):
    with pytest.raises(UsageError) as refused:
        config_lib.check(with_setting(name, value))
    message = str(refused.value)
    assert message.startswith(f"--{name}={value} ")
    assert rule in message
    assert refused.value.exit_code == 64


@pytest.mark.parametrize(
    "name, value",
    [
        ("train_steps", 1),
        ("adam_beta1", 0.0),
        ("adam_beta2", 0.9999),
        ("discriminator_features", 0),
        ("ema_half_life_kimg", 0.0),
        ("checkpoint_every_secs", 0.0),
        ("resolution", 64),
        ("channels", 3),
        ("latent_mean", -1.0),
    ],
)
def test_a_value_at_the_edge_of_its_rule_is_accepted(name, value):
    config_lib.check(with_setting(name, value))


@pytest.mark.parametrize(
    "config, parts",
    [
        (Config(run=RunConfig(workdir="gs://bucket/run")), ("--workdir=gs://bucket/run", "mount the bucket")),
        (Config(run=RunConfig(workdir="s3://bucket/run")), ("--workdir=s3://bucket/run", "mount the bucket")),
        (
            Config(devices=DeviceConfig(strategy="single", num_devices=2)),
            ("--num_devices=2", "--strategy=single", "--strategy=mirrored"),
        ),
        (
            Config(devices=DeviceConfig(precision="float64", accelerator="gpu")),
            ("--precision=float64", "--accelerator=cpu"),
        ),
        (
            Config(devices=DeviceConfig(virtual_devices_per_gpu=2, accelerator="cpu")),
            ("--virtual_devices_per_gpu=2", "--accelerator=cpu", "--num_devices"),
        ),
    ],
    ids=["gs", "s3", "single_with_devices", "float64_on_gpu", "virtual_gpus_on_cpu"],
)
def test_settings_that_do_not_go_together_are_refused_with_the_way_out(config, parts):
    with pytest.raises(UsageError) as refused:
        config_lib.check(config)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "devices",
    [
        DeviceConfig(strategy="single", num_devices=1),
        DeviceConfig(strategy="mirrored", num_devices=4),
        DeviceConfig(precision="float64", accelerator="cpu"),
        DeviceConfig(virtual_devices_per_gpu=2, accelerator="gpu"),
    ],
)
def test_settings_that_go_together_are_accepted(devices):
    config_lib.check(Config(devices=devices))


def changed_everywhere() -> Config:
    """A configuration in which no section has its defaults."""
    return Config(
        run=RunConfig(workdir="runs/ü", train_steps=7, seed=2**40),
        devices=DeviceConfig(strategy="mirrored", num_devices=4, deterministic=False),
        data=DataConfig(resolution=64, channels=3),
        model=ModelConfig(conditional=True, latent_mean=-0.25),
        optim=OptimConfig(generator_lr=1e-3, adam_epsilon=1e-12),
        loop=LoopConfig(checkpoint_every_secs=0.1),
    )


def test_to_dict_and_from_dict_round_trip_through_json():
    config = changed_everywhere()
    stored = json.loads(json.dumps(config_lib.to_dict(config)))
    assert config_lib.from_dict(stored) == config
    assert set(stored) == {"run", "devices", "data", "model", "optim", "loop", "limits"}
    assert stored["run"]["train_steps"] == 7


def test_a_stored_configuration_that_lacks_settings_gets_their_defaults():
    assert config_lib.from_dict({}) == Config()
    assert config_lib.from_dict({"run": {"seed": 3}}) == Config(run=RunConfig(seed=3))


def test_a_stored_whole_number_serves_as_a_float():
    restored = config_lib.from_dict({"optim": {"ema_half_life_kimg": 5}})
    assert type(restored.optim.ema_half_life_kimg) is float
    assert restored.optim.ema_half_life_kimg == 5.0


@pytest.mark.parametrize("stored", [{"model": {"depth": 3}}, {"training": {"seed": 3}}, {"data": {"seed": 3}}])
def test_an_unknown_stored_setting_is_refused_by_name(stored):
    ((section, fields),) = stored.items()
    with pytest.raises(UsageError, match=rf"{section}\.{next(iter(fields))}, which this version does not know"):
        config_lib.from_dict(stored)


@pytest.mark.parametrize(
    "section, name, value, kind",
    [
        ("run", "seed", "3", "int"),
        ("run", "seed", 3.0, "int"),
        ("run", "seed", True, "int"),
        ("run", "seed", None, "int"),
        ("run", "dry_run", 1, "bool"),
        ("run", "workdir", 5, "str"),
        ("optim", "generator_lr", "2e-4", "float"),
        ("optim", "generator_lr", True, "float"),
    ],
)
def test_a_stored_setting_of_another_type_is_refused_by_name(section, name, value, kind):
    with pytest.raises(UsageError) as refused:
        config_lib.from_dict({section: {name: value}})
    assert f"{section}.{name}={value!r}, which is not a {kind}" in str(refused.value)


def test_differences_tell_the_model_from_everything_else():
    old, new = Config(), changed_everywhere()
    assert config_lib.differences(old, new, identity=True) == {
        "seed": (0, 2**40),
        "resolution": (28, 64),
        "channels": (1, 3),
        "conditional": (False, True),
        "latent_mean": (0.0, -0.25),
    }
    assert config_lib.differences(old, new, identity=False) == {
        "workdir": ("", "runs/ü"),
        "train_steps": (20_000, 7),
        "strategy": ("auto", "mirrored"),
        "num_devices": (0, 4),
        "deterministic": (True, False),
        "generator_lr": (2e-4, 1e-3),
        "adam_epsilon": (1e-7, 1e-12),
        "checkpoint_every_secs": (600.0, 0.1),
    }


def test_equal_configurations_have_no_differences():
    for identity in (True, False):
        assert config_lib.differences(changed_everywhere(), changed_everywhere(), identity=identity) == {}


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.seed = 1
