"""Killed at some instant, the same command goes on and ends with the same bits."""

import pytest
import runs

STEPS = 40
# The quickstart net, slowed by its batch so that there is time to be killed in.
FLAGS = (
    *runs.QUICKSTART,
    "--global_batch_size=128",
    f"--train_steps={STEPS}",
    "--checkpoint_every_steps=10",
    "--sample_every_steps=0",
    "--steps_per_loop=4",
    "--keep_checkpoints=9",
)


def launch(kind: str, workdir, *flags: str):
    flags = (*FLAGS, f"--workdir={workdir}", *flags)
    if kind == "two_workers":
        return runs.start_workers(2, *flags)
    return [runs.start(*flags, "--num_devices=2" if kind == "mirrored" else "--num_devices=1")]


@pytest.mark.parametrize("kind", ["single", "mirrored", "two_workers"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(kind, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs.finish(launch(kind, straight))
    runs.kill_after_commit(launch(kind, killed), killed, step=10)
    assert not (killed / "checkpoints" / f"ckpt-{STEPS}.json").exists()
    printed = runs.finish(launch(kind, killed))
    assert "resumed from" in printed
    runs.assert_close(runs.committed(killed, STEPS), runs.committed(straight, STEPS), atol=0)


def test_a_run_killed_before_its_first_commit_starts_afresh(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs.finish(launch("single", straight, "--train_steps=10"))
    (killed / "checkpoints").mkdir(parents=True)
    for path in (straight / "checkpoints").glob("ckpt-0.*"):
        if path.suffix != ".json":
            (killed / "checkpoints" / path.name).write_bytes(path.read_bytes()[:100])
    runs.finish(launch("single", killed, "--train_steps=10"))
    runs.assert_close(runs.committed(killed, 10), runs.committed(straight, 10), atol=0)


def test_after_a_kill_another_number_of_replicas_agrees_in_float64(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs.finish(launch("single", straight, "--precision=float64", "--train_steps=20"))
    runs.kill_after_commit(launch("two_workers", killed, "--precision=float64"), killed, step=10)
    for path in (killed / "checkpoints").glob("ckpt-[234]0.*"):
        path.unlink()
    runs.finish(launch("mirrored", killed, "--precision=float64", "--train_steps=20"))
    runs.assert_close(runs.committed(killed, 20), runs.committed(straight, 20), atol=1e-9)
