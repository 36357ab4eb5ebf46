"""Commits: whole, verified, or not there."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from gan_dist import checkpoints
from gan_dist.errors import CheckpointError, Diverged, EnvironmentFault


@pytest.fixture
def variables():
    return {"generator/0_kernel": tf.Variable(np.arange(6.0).reshape(2, 3)), "step": tf.Variable(0, dtype=tf.int64)}


def commit(folder, step, variables):
    variables["step"].assign(step)
    checkpoints.commit(folder, step, {key: v.numpy() for key, v in variables.items()}, {"seed": 3})


def data_file(folder, step):
    return folder / f"ckpt-{step}.data-00000-of-00001"


def test_a_commit_comes_back_bit_for_bit(tmp_path, variables):
    commit(tmp_path, 7, variables)
    fresh = {"generator/0_kernel": tf.Variable(tf.zeros([2, 3], tf.float64)), "step": tf.Variable(0, dtype=tf.int64)}
    assert checkpoints.newest_valid(tmp_path) == 7
    checkpoints.restore(tmp_path, 7, fresh)
    assert fresh["step"].numpy() == 7
    np.testing.assert_array_equal(fresh["generator/0_kernel"], np.arange(6.0).reshape(2, 3))


def test_tensorflow_reads_a_commit_under_the_same_keys(tmp_path, variables):
    commit(tmp_path, 1, variables)
    reader = tf.train.load_checkpoint(str(tmp_path / "ckpt-1"))
    assert reader.get_variable_to_shape_map() == {"generator/0_kernel": [2, 3], "step": []}


def test_the_marker_names_files_sizes_hashes_and_tensors_and_what_the_writer_said(tmp_path, variables):
    commit(tmp_path, 1, variables)
    marker = json.loads((tmp_path / "ckpt-1.json").read_text())
    assert marker["step"] == 1 and checkpoints.about(tmp_path, 1) == {"seed": 3}
    assert set(marker["files"]) == {"ckpt-1.index", "ckpt-1.data-00000-of-00001"}
    for name, file in marker["files"].items():
        assert file["bytes"] == (tmp_path / name).stat().st_size and len(file["sha256"]) == 64
    assert marker["tensors"]["generator/0_kernel"] == {"shape": [2, 3], "dtype": "float64"}


def test_only_the_newest_commits_are_kept(tmp_path, variables):
    saver = checkpoints.Saver(tmp_path, variables, keep=2, keep_every_hours=0, every=0, about={})
    for step in (0, 5, 10, 100):
        saver.save(step)
    saver.wait()
    assert checkpoints.steps(tmp_path) == [10, 100]
    assert not list(tmp_path.glob("ckpt-0.*")) and not list(tmp_path.glob("ckpt-5.*"))


def test_beside_the_newest_one_commit_is_kept_for_so_many_hours(tmp_path, variables, monkeypatch):
    clock = iter(range(0, 100_000, 1800))
    monkeypatch.setattr(checkpoints.time, "time", lambda: next(clock))
    saver = checkpoints.Saver(tmp_path, variables, keep=1, keep_every_hours=1, every=0, about={})
    for step in range(7):
        saver.save(step)
    saver.wait()
    assert checkpoints.steps(tmp_path) == [0, 2, 4, 6]


def test_the_commit_to_go_back_to_is_kept_and_found_beside_newer_ones(tmp_path, variables):
    saver = checkpoints.Saver(tmp_path, variables, keep=1, keep_every_hours=0, every=10, about={})
    for step in (0, 10, 13, 17):
        saver.save(step)
    saver.wait()
    assert checkpoints.steps(tmp_path) == [10, 17]
    assert checkpoints.newest_valid(tmp_path) == 17 and checkpoints.newest_valid(tmp_path, every=10) == 10
    checkpoints.discard_after(tmp_path, 10)
    assert checkpoints.steps(tmp_path) == [10]


def test_a_commit_in_the_background_holds_the_values_at_its_call(tmp_path, variables):
    saver = checkpoints.Saver(tmp_path, variables, keep=2, keep_every_hours=0, every=0, about={})
    saver.save(1)
    variables["generator/0_kernel"].assign(-tf.ones([2, 3], tf.float64))
    saver.wait()
    np.testing.assert_array_equal(
        checkpoints.read(tmp_path, 1, ["generator/0_kernel"])["generator/0_kernel"], np.arange(6.0).reshape(2, 3)
    )


def test_an_error_in_the_background_comes_to_light_at_the_next_look(tmp_path, variables):
    (tmp_path / "file").touch()
    saver = checkpoints.Saver(tmp_path / "file", variables, keep=2, keep_every_hours=0, every=0, about={})
    saver.save(1)
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        while True:
            saver.check()
    saver.check()


def test_what_a_killed_run_left_is_swept_and_what_is_damaged_is_set_aside(tmp_path, variables):
    for step in (3, 8):
        commit(tmp_path, step, variables)
    for name in ("ckpt-9.index", "ckpt-9.data-00000-of-00001.tempstate123", "ckpt-3.json.partial", "notes.txt"):
        (tmp_path / name).touch()
    checkpoints.sweep(tmp_path, 3)
    names = {path.name for path in tmp_path.iterdir()}
    files = ("json", "index", "data-00000-of-00001")
    assert names == {"notes.txt", *(f"ckpt-3.{e}" for e in files), *(f"damaged-ckpt-8.{e}" for e in files)}


def test_the_marker_of_a_commit_goes_before_its_files(tmp_path, variables, monkeypatch):
    for step in (1, 2):
        commit(tmp_path, step, variables)
    gone = []
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **rest: (gone.append(path.name), real(path, **rest))[1])
    checkpoints.drop(tmp_path, keep=1, keep_every_hours=0, every=0)
    assert gone[0] == "ckpt-1.json" and len(gone) == 3


def test_nothing_yet_is_no_error(tmp_path):
    assert checkpoints.newest_valid(tmp_path) is None


def test_orphans_of_the_first_commit_are_no_loss(tmp_path, variables):
    commit(tmp_path, 0, variables)
    (tmp_path / "ckpt-0.json").unlink()
    assert checkpoints.newest_valid(tmp_path) is None


def damage_nothing_left(path):
    path.write_bytes(b"")


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_trailing_junk(path):
    path.write_bytes(path.read_bytes() + b"junk")


def damage_missing(path):
    path.unlink()


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001", "json"])
@pytest.mark.parametrize(
    "damage", [damage_nothing_left, damage_truncated, damage_one_bit, damage_trailing_junk, damage_missing]
)
def test_a_damaged_commit_is_passed_over_for_the_one_before_and_alone_it_is_an_error(
    tmp_path, variables, suffix, damage, caplog
):
    commit(tmp_path, 3, variables)
    commit(tmp_path, 8, variables)
    path = tmp_path / f"ckpt-8.{suffix}"
    damage(path)
    if suffix == "json" and damage is damage_one_bit:
        # A bit in the marker may change a version's name; a bit in a hash must be noticed.
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    assert checkpoints.newest_valid(tmp_path) == 3
    if not (suffix == "json" and damage is damage_missing):
        assert "ckpt-8" in caplog.text
    for name in ("ckpt-3.json", "ckpt-3.index", "ckpt-3.data-00000-of-00001"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="no usable commit") as error:
        checkpoints.newest_valid(tmp_path)
    assert error.value.exit_code == 65


def test_a_marker_that_points_outside_its_folder_is_refused(tmp_path, variables):
    commit(tmp_path, 3, variables)
    path = tmp_path / "ckpt-3.json"
    marker = json.loads(path.read_text())
    marker["files"]["../ckpt-3.index"] = marker["files"].pop("ckpt-3.index")
    path.write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="not its own"):
        checkpoints.verify(tmp_path, 3)


@pytest.mark.parametrize("marker", ["[]", "{}", '{"files": 3}', '{"files": {"ckpt-3.index": {}}}', '{"files": {}}'])
def test_a_marker_of_another_form_is_refused(tmp_path, marker):
    (tmp_path / "ckpt-3.json").write_text(marker)
    with pytest.raises(CheckpointError, match="ckpt-3.json"):
        checkpoints.verify(tmp_path, 3)


def test_values_that_are_not_finite_are_never_committed(tmp_path, variables):
    variables["generator/0_kernel"].assign(tf.fill([2, 3], tf.constant(float("nan"), tf.float64)))
    with pytest.raises(Diverged, match="generator/0_kernel"):
        commit(tmp_path, 4, variables)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_the_environments_fault(tmp_path, variables):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written") as error:
        commit(tmp_path / "file", 4, variables)
    assert error.value.exit_code == 78


def test_another_shape_touches_no_variable(tmp_path, variables):
    commit(tmp_path, 2, variables)
    other = {"step": tf.Variable(5, dtype=tf.int64), "generator/0_kernel": tf.Variable(tf.zeros([3, 2], tf.float64))}
    with pytest.raises(CheckpointError, match="generator/0_kernel"):
        checkpoints.restore(tmp_path, 2, other)
    assert other["step"].numpy() == 5


def test_a_key_that_is_not_there_is_named(tmp_path, variables):
    commit(tmp_path, 2, variables)
    with pytest.raises(CheckpointError, match="ema/0_kernel"):
        checkpoints.read(tmp_path, 2, ["ema/0_kernel"])
