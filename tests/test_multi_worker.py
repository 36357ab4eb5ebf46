"""Two processes on this host compute what one does, and only the chief writes."""

import pytest
import runs


@pytest.mark.parametrize("net", [runs.QUICKSTART, runs.REFERENCE_1], ids=["quickstart", "reference_1"])
def test_twenty_steps_in_float64_agree_on_two_workers_and_one(net, tmp_path):
    flags = (*net, "--precision=float64", "--train_steps=20", "--sample_every_steps=0")
    one, two = tmp_path / "one", tmp_path / "two"
    printed = runs.finish(runs.start_workers(2, *flags, f"--workdir={two}"))
    assert printed.count("2 replica(s)") == 2
    runs.finish([runs.start(*flags, f"--workdir={one}")])
    runs.assert_close(runs.committed(two, 20), runs.committed(one, 20), atol=1e-9)


def test_the_chief_alone_writes(tmp_path):
    flags = (*runs.TINY, "--train_steps=4")
    chief, other = runs.start_workers(2, *flags, f"--workdir={tmp_path / 'shared'}")
    runs.finish([chief, other])
    found = {path.name for path in (tmp_path / "shared").iterdir()}
    assert found == {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "samples"}
    assert len(list((tmp_path / "shared" / "tensorboard").iterdir())) == 1
    assert len((tmp_path / "shared" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_chief_that_cannot_start_does_not_leave_the_other_waiting(tmp_path):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "checkpoints" / "ckpt-5.index").touch()
    chief, other = runs.start_workers(2, *runs.TINY, "--train_steps=4", f"--workdir={workdir}")
    assert "no usable commit" in runs.finish([chief], code=65)
    assert "The chief cannot go on" in runs.finish([other], code=171)


def test_workers_with_other_flags_are_refused_on_both(tmp_path):
    chief, other = runs.start_workers(
        2, *runs.TINY, "--train_steps=4", f"--workdir={tmp_path / 'run'}", each=("--seed=0", "--seed=7")
    )
    for worker in (chief, other):
        assert "1 worker(s) were started with other flags" in runs.finish([worker], code=64)
