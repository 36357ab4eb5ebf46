"""The order of things, in this process."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import runs
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gan_dist import lock, loop, rng, strategy, supervision
from gan_dist import step as step_lib
from gan_dist.config import Config, LoopConfig, RunConfig
from gan_dist.errors import CheckpointError, Diverged, EnvironmentFault, StopRequested, UsageError

RHYTHM = ("--log_every_steps=4", "--sample_every_steps=6", "--checkpoint_every_steps=5", "--steps_per_loop=3")


def train(workdir, *flags):
    config = runs.config(*runs.TINY, *RHYTHM, f"--workdir={workdir}", *flags)
    loop.train(config, strategy.create(config.devices))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_steps(workdir, tag):
    files = (workdir / "tensorboard").iterdir()
    found = [event for path in files for event in EventFileLoader(str(path)).Load()]
    # Files of the same second have names in no order.
    return sorted(event.step for event in found for value in event.summary.value if value.tag == tag)


def test_a_run_leaves_everything_that_the_readme_says(tmp_path):
    train(tmp_path, "--train_steps=13", "--conditional")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    commits = {f"checkpoints/ckpt-{s}.{e}" for s in (5, 10, 13) for e in ("json", "index", "data-00000-of-00001")}
    samples = {f"samples/step-{s}.png" for s in (0, 6, 12, 13)}
    events = {name for name in files if name.startswith("tensorboard/events.out.tfevents.")}
    assert len(events) == 1
    assert files == {"config.json", "metrics.jsonl", *commits, *samples, *events}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["config"]["run"]["train_steps"] == 13
    assert stored["environment"]["versions"]["tensorflow"] == tf.__version__
    assert stored["environment"]["intra_op_threads"] >= 1 and "command" in stored


def test_scalars_have_the_names_of_the_interface_and_hold_together(tmp_path):
    train(tmp_path, "--train_steps=10", "--num_devices=2")
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 10]
    for row in rows(tmp_path):
        assert set(row) == {
            *("step", "kimg", "loss/generator", "loss/discriminator", "accuracy/real", "accuracy/fake"),
            *("gradient_norm/generator", "gradient_norm/discriminator", "img/s", "img/s/replica", "sec/step"),
            *("data_wait_pct", "skipped_steps", "memory_gb"),
        }
        assert row["kimg"] == row["step"] * 8 / 1000
        assert row["img/s"] == pytest.approx(8 / row["sec/step"]) == pytest.approx(2 * row["img/s/replica"])
        assert 0 <= row["accuracy/real"] <= 1 and 0 <= row["data_wait_pct"] <= 100 and row["skipped_steps"] == 0
    assert tensorboard_steps(tmp_path, "loss/generator") == [4, 8, 10]


def test_a_stopped_run_goes_on_to_the_same_weights_and_shows_no_step_twice(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(straight, "--train_steps=13")
    train(stopped, "--train_steps=7")
    # As if killed at step 7 after the commit at 5: what was written since stays behind.
    for path in (stopped / "checkpoints").glob("ckpt-7.*"):
        path.unlink()
    train(stopped, "--train_steps=13")
    runs.assert_close(runs.committed(stopped, 13), runs.committed(straight, 13), atol=0)
    assert [row["step"] for row in rows(stopped)] == [4, 8, 12, 13]
    assert tensorboard_steps(stopped, "loss/generator") == [4, 8, 12, 13]
    assert tensorboard_steps(stopped, "samples") == tensorboard_steps(straight, "samples") == [0, 6, 12, 13]


def test_another_number_of_replicas_goes_on_with_the_same_order_and_noise(tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    train(straight, "--train_steps=10", "--precision=float64")
    train(moved, "--train_steps=5", "--precision=float64", "--num_devices=2")
    train(moved, "--train_steps=10", "--precision=float64", "--num_devices=4")
    runs.assert_close(runs.committed(moved, 10), runs.committed(straight, 10), atol=1e-9)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(tmp_path, "--train_steps=5")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()}
    train(tmp_path, "--train_steps=5")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").iterdir()} == before
    assert len(rows(tmp_path)) == 2


def test_rhythms_that_are_off_leave_the_first_and_the_last_commit(tmp_path):
    off = ("--log_every_steps=0", "--sample_every_steps=0", "--checkpoint_every_steps=0", "--checkpoint_every_secs=0")
    train(tmp_path, "--train_steps=4", *off)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.json")) == ["ckpt-0.json", "ckpt-4.json"]
    assert not list((tmp_path / "samples").iterdir()) and not rows(tmp_path)


def test_a_commit_is_made_when_the_last_is_old(tmp_path):
    train(tmp_path, "--train_steps=9", "--checkpoint_every_steps=0", "--checkpoint_every_secs=1e-9")
    # Blocks end at 3, 4, 6, 8 and 9: each is later than a nanosecond after the last.
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.json")) == [
        *("ckpt-6.json", "ckpt-8.json", "ckpt-9.json")
    ]


def test_init_from_takes_the_weights_and_nothing_else(tmp_path):
    train(tmp_path / "old", "--train_steps=5")
    train(tmp_path / "new", "--train_steps=1", f"--init_from={tmp_path / 'old'}", "--seed=3", "--keep_checkpoints=9")
    old, new = runs.committed(tmp_path / "old", 5), runs.committed(tmp_path / "new", 0)
    for key, value in new.items():
        if key.startswith(("generator/", "discriminator/", "ema/")):
            np.testing.assert_array_equal(value, old[key], err_msg=key)
        else:
            assert not value.any(), key


def test_init_from_refuses_other_networks_and_leaves_nothing_half_done(tmp_path):
    train(tmp_path / "old", "--train_steps=1")
    with pytest.raises(UsageError, match="--init_from"):
        train(tmp_path / "new", "--train_steps=1", f"--init_from={tmp_path / 'old'}", "--width=8")
    # The way out that the message names.
    train(tmp_path / "new", "--train_steps=1", f"--init_from={tmp_path / 'old'}")
    assert rows(tmp_path / "new")[-1]["step"] == 1


def test_another_model_in_the_folder_is_refused_with_a_diff_and_nothing_is_lost(tmp_path):
    train(tmp_path, "--train_steps=5")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as error:
        train(tmp_path, "--train_steps=9", "--width=8", "--seed=1")
    assert "--width: 4 in the run, 8 now" in str(error.value) and "--seed: 0 in the run, 1 now" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoints_that_are_all_damaged_end_the_run_and_never_start_it_over(tmp_path):
    train(tmp_path, "--train_steps=5")
    for path in (tmp_path / "checkpoints").glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable commit"):
        train(tmp_path, "--train_steps=9")
    assert not (tmp_path / "checkpoints" / "ckpt-9.json").exists()


def test_numbers_that_stay_not_finite_end_the_run_after_going_back_and_the_commit_before_stays(tmp_path, caplog):
    limits = ("--max_consecutive_skips=3", "--max_rollbacks=2")
    with caplog.at_level("WARNING", "gan_dist"), pytest.raises(Diverged, match="after going back 2 times"):
        train(tmp_path, "--train_steps=9", "--latent_mean=3e38", "--latent_stddev=1e38", *limits)
    assert caplog.text.count("back to step 0 with other noise") == 2
    assert (tmp_path / "checkpoints" / "ckpt-0.json").exists()
    # The same command says so again.
    with pytest.raises(Diverged):
        train(tmp_path, "--train_steps=9", "--latent_mean=3e38", "--latent_stddev=1e38", *limits)


def poison(monkeypatch, step, attempt=0, stream="noise/g", seed=0):
    """Makes the first row of one step's noise NaN: on one replica alone."""
    real, poisoned = rng.normal, rng.key(seed, stream)

    def normal(stream_key, clock, first_row, rows, size):
        noise = real(stream_key, clock, first_row, rows, size)
        if stream_key != poisoned:
            return noise
        bad = tf.reduce_any(tf.equal(clock, rng.clock(tf.constant(step), attempt))) & tf.equal(first_row, 0)
        return tf.where(bad, tf.fill(tf.shape(noise), float("nan")), noise)

    monkeypatch.setattr(rng, "normal", normal)


@pytest.mark.parametrize("stream", ["noise/d", "noise/g"])
def test_one_bad_step_on_one_replica_is_skipped_on_all_of_them(tmp_path, monkeypatch, stream):
    poison(monkeypatch, [4], stream=stream)
    train(tmp_path, "--train_steps=8", "--num_devices=2")
    final = runs.committed(tmp_path, 8)
    assert final["skipped_steps"] == 1 and final["consecutive_skips"] == 0 and final["attempt"] == 0
    assert final["generator_optimizer/count"] == final["discriminator_optimizer/count"] == 7
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1]
    assert all(np.isfinite(value) for row in rows(tmp_path) for value in row.values())


def test_a_run_that_goes_back_takes_other_noise_and_data_and_ends(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, [6, 7, 8, 9])
    with caplog.at_level("WARNING", "gan_dist"):
        train(tmp_path, "--train_steps=13", "--max_consecutive_skips=3")
    assert "back to step 5 with other noise, attempt 1" in caplog.text
    final = runs.committed(tmp_path, 13)
    assert final["attempt"] == 1 and final["skipped_steps"] == 0 and final["step"] == 13
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 12, 13]
    assert tensorboard_steps(tmp_path, "loss/generator") == [4, 8, 12, 13]


@pytest.mark.parametrize("disturbance", ["shorter blocks", "a stop before", "commits by the clock"])
def test_where_a_run_goes_back_to_depends_on_steps_alone(tmp_path, monkeypatch, disturbance):
    # Just as many as the limit: the step after them is good, and must wait all the same.
    poison(monkeypatch, [6, 7, 8])
    flags = ("--train_steps=13", "--max_consecutive_skips=3", "--log_every_steps=0", "--sample_every_steps=0")
    train(tmp_path / "straight", *flags, "--steps_per_loop=5")
    disturbed = tmp_path / "disturbed"
    if disturbance == "shorter blocks":
        train(disturbed, *flags, "--steps_per_loop=1")
    elif disturbance == "a stop before":
        train(disturbed, *flags, "--train_steps=7", "--steps_per_loop=1")
        train(disturbed, *flags, "--steps_per_loop=2")
    else:
        train(disturbed, *flags, "--steps_per_loop=1", "--checkpoint_every_secs=1e-9", "--keep_checkpoints=1")
    runs.assert_close(runs.committed(disturbed, 13), runs.committed(tmp_path / "straight", 13), atol=0)


def test_a_live_run_keeps_its_folder(tmp_path):
    with lock.held(tmp_path, 30, lost=lambda: None), pytest.raises(EnvironmentFault, match="in use by a live run"):
        train(tmp_path, "--train_steps=1")


def test_a_request_to_stop_commits_the_step_and_the_same_command_goes_on(tmp_path):
    class StopAfter(supervision.Watch):
        phases: ClassVar[list[str]] = []

        def phase(self, name):
            self.phases.append(name)

        def stop_requested(self):
            return self.phases.count(supervision.STEPS) >= 2

    config = runs.config(*runs.TINY, *RHYTHM, "--train_steps=13", f"--workdir={tmp_path / 'stopped'}")
    with pytest.raises(StopRequested, match="stopped at step 4"):
        loop.train(config, strategy.create(config.devices), StopAfter())
    assert StopAfter.phases[-2:] == [supervision.SAVING, supervision.LEAVING]
    train(tmp_path / "stopped", "--train_steps=13")
    train(tmp_path / "straight", "--train_steps=13")
    runs.assert_close(runs.committed(tmp_path / "stopped", 13), runs.committed(tmp_path / "straight", 13), atol=0)


def test_a_damaged_newest_commit_is_set_aside_and_the_one_before_goes_on(tmp_path):
    train(tmp_path, "--train_steps=10")
    (tmp_path / "checkpoints" / "ckpt-10.index").write_bytes(b"")
    train(tmp_path, "--train_steps=12", "--keep_checkpoints=1")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "damaged-ckpt-10.index" in names and "ckpt-12.json" in names


def test_blocks_end_at_whatever_is_due_next():
    config = Config(
        run=RunConfig(train_steps=20),
        loop=LoopConfig(log_every_steps=7, checkpoint_every_steps=10, sample_every_steps=0),
    )
    config = dataclasses.replace(config, devices=dataclasses.replace(config.devices, steps_per_loop=5))
    ends = {start: loop.block_end(start, config) for start in range(20)}
    assert [ends[start] for start in (0, 5, 7, 10, 14, 19)] == [5, 7, 10, 14, 19, 20]
    assert ends[12] == 14 and ends[13] == 14


def test_rates_leave_out_the_block_that_compiles():
    meter = loop._Meter(runs.Layout(10, 2))
    ones = np.ones(len(step_lib.SCALARS))
    meter.add(2, ones * 2, 0, 1.0, 50.0)
    meter.add(4, ones * 2, 2, 0.5, 2.0)
    values = meter.read(6, 2)
    assert values["sec/step"] == 0.5 and values["img/s"] == 20 and values["img/s/replica"] == 10
    assert values["data_wait_pct"] == 25 and values["skipped_steps"] == 2 and values["loss/generator"] == 1
    meter.add(4, ones * 4, 0, 0.0, 4.0)
    assert meter.read(10, 2)["sec/step"] == 1.0


def test_the_commit_itself_says_which_model_and_data_order_it_is_of(tmp_path):
    train(tmp_path, "--train_steps=5")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="--seed: 0 in the run, 5 now"):
        train(tmp_path, "--train_steps=9", "--seed=5")
    train(tmp_path, "--train_steps=9")
