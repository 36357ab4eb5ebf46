"""The entry point: what it refuses and how it leaves, before anything is lost."""

import json
import os
import subprocess
import sys

import pytest
import runs
import tensorflow as tf

from gan_dist import train
from gan_dist.cluster import Cluster
from gan_dist.errors import EnvironmentFault, GanDistError
from gan_dist.supervision import Watch

TF_CONFIG = '{"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": %d}}'


def refused(*flags, environment=None):
    """Exit code and message of a run that may not import TensorFlow."""
    blocker = "import sys; sys.modules['tensorflow'] = None; from gan_dist import cli, train; cli.run(train.main)"
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    process = subprocess.run(
        [sys.executable, "-c", blocker, *flags],
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=runs.DEADLINE_SECS,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("flags", "code", "named"),
    [
        (["--train_step=5"], 64, "train_step"),
        (["--width=wide"], 64, "--width=wide"),
        (["--loss=hinge"], 64, "--loss=hinge"),
        (["--dataset=cifar10"], 64, "--dataset=cifar10"),
        (["--eval_every_steps=10"], 64, "--eval_every_steps=10"),
        (["--discriminator_steps=2"], 64, "--discriminator_steps=2"),
        (["--update=simultaneous"], 64, "--update=simultaneous"),
        (["--workdir=gs://bucket/run"], 64, "--workdir=gs://bucket/run"),
        (["--num_devices=3", "--global_batch_size=64"], 64, "63 and 66"),
        (["--flagfile=missing.cfg"], 64, "missing.cfg"),
        (["--init_from=/nowhere"], 64, "--init_from=/nowhere"),
        (["--data_dir=/nowhere"], 78, "--data_dir=/nowhere"),
        (["--workdir=/dev/null/run"], 78, "--workdir=/dev/null/run"),
    ],
)
def test_bad_flags_are_refused_before_tensorflow_is_imported(flags, code, named, tmp_path):
    found, message = refused(f"--workdir={tmp_path / 'run'}", *flags)
    assert found == code and named in message and "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{not json", "[]", TF_CONFIG % 2, TF_CONFIG.replace("a:1", "a") % 0])
def test_a_malformed_tf_config_is_refused_before_tensorflow_is_imported(text, tmp_path):
    code, message = refused(f"--workdir={tmp_path / 'run'}", environment={"TF_CONFIG": text})
    assert code == 78 and "TF_CONFIG=" in message and "Traceback" not in message


def test_help_lists_every_flag_without_tensorflow():
    code, text = refused("--help")
    assert code == 0 and "--global_batch_size" in text and "images" in text


def test_a_folder_of_another_run_is_refused_before_tensorflow_is_imported(tmp_path):
    runs.finish([runs.start(*runs.TINY, "--train_steps=1", f"--workdir={tmp_path}")])
    code, message = refused(*runs.TINY, f"--workdir={tmp_path}", "--width=8")
    assert code == 64 and "--width: 4 in the run, 8 now" in message


def test_a_damaged_config_of_a_run_is_an_error_and_not_a_new_run(tmp_path):
    (tmp_path / "config.json").write_text('{"config": ')
    code, message = refused(*runs.TINY, f"--workdir={tmp_path}")
    assert code == 65 and "config.json is damaged" in message


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path, monkeypatch):
    # Root may write anywhere: a mount that is read-only is what stops it.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EnvironmentFault, match="no permission"):
        train.main([*runs.TINY, f"--workdir={tmp_path / 'run'}"])


def test_a_truncated_data_file_ends_the_run_before_its_folder_is_made(tmp_path):
    data_dir = tmp_path / "mnist"
    data_dir.mkdir()
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (data_dir / f"{split}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b\x08\x00")
    process = runs.start(*runs.TINY, f"--workdir={tmp_path / 'run'}", f"--data_dir={data_dir}")
    assert "train-images-idx3-ubyte.gz is truncated" in runs.finish([process], code=65)
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_is_the_environments_fault_with_advice(tmp_path, monkeypatch):
    from gan_dist import loop

    def exhausted(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[128,28,28,64]")

    monkeypatch.setattr(loop, "train", exhausted)
    with pytest.raises(EnvironmentFault, match="--global_batch_size") as error:
        train.work(runs.config(*runs.TINY), Cluster(), Watch())
    assert error.value.exit_code == 78


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path, capsys):
    flagfile = f"--flagfile={runs.CONFIGS / 'a100x4.cfg'}"
    train.main([flagfile, f"--workdir={tmp_path / 'run'}", "--dry_run"])
    text = capsys.readouterr().out
    assert "--global_batch_size=512  (images)" in text and "mirrored: 1 worker(s) x 4 GPU device(s)" in text
    assert "these GPUs are not here" in text and "--accelerator=cpu" in text
    assert "generator 846,273" in text and "discriminator 6,632,385" in text and "GB a replica" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_several_hosts_needs_no_cluster(tmp_path, capsys):
    flagfile = f"--flagfile={runs.CONFIGS / 'multi_worker_2x_a100x8.cfg'}"
    train.main([flagfile, f"--workdir={tmp_path / 'run'}", "--dry_run"])
    text = capsys.readouterr().out
    assert "2 worker(s) x 8 GPU device(s) = 16 replica(s)" in text and "TF_CONFIG is not set" in text


def test_init_from_is_looked_at_when_a_run_starts_and_not_when_it_goes_on(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    runs.finish([runs.start(*runs.TINY, "--train_steps=1", f"--workdir={old}")])
    flags = (*runs.TINY, f"--workdir={new}", f"--init_from={old}")
    code, message = refused(*flags, "--width=8")
    assert code == 64 and "--width: 4 there, 8 now" in message and not new.exists()
    runs.finish([runs.start(*flags, "--train_steps=1")])
    old.rename(tmp_path / "gone")
    assert "resumed from" in runs.finish([runs.start(*flags, "--train_steps=2")])


def test_the_memory_of_a_replica_grows_with_its_share_and_with_the_precision():
    def memory(*flags, replicas=1):
        config = runs.config(*flags)
        networks = runs.state_lib.networks(config, 10)
        return train.replica_memory(config, runs.Layout(config.data.global_batch_size, replicas), *networks)

    assert memory() > memory(replicas=2) > memory(replicas=4)
    assert memory("--precision=float64") > 1.5 * memory() > memory() > memory("--precision=bfloat16")


def test_four_replicas_of_a_gpu_configuration_run_on_a_cpu(tmp_path):
    flags = (f"--flagfile={runs.CONFIGS / 'a100x4.cfg'}", "--accelerator=cpu", "--global_batch_size=64")
    printed = runs.finish([runs.start(*flags, "--train_steps=2", f"--workdir={tmp_path}")])
    assert "4 replica(s)" in printed and "step=2/2" in printed
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["skipped_steps"] == 0


def test_errors_leave_with_their_own_code():
    for error in GanDistError.__subclasses__():
        assert error.exit_code in (64, 65, 78, 170, 171, 173), error
