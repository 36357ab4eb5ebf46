"""Images from a run's folder."""

import numpy as np
import pytest
import runs
import tensorflow as tf

from gan_dist import loop, sample, strategy
from gan_dist.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A conditional run with commits of steps 0 and 3, on two devices."""
    folder = tmp_path_factory.mktemp("run")
    config = runs.config(*runs.TINY, "--conditional", "--num_devices=2", "--train_steps=3", f"--workdir={folder}")
    loop.train(config, strategy.create(config.devices))
    return folder


def draw(workdir, output, *flags):
    sample.main([f"--workdir={workdir}", f"--output={output}", "--accelerator=cpu", *flags])
    return np.load(output) if str(output).endswith(".npz") else tf.io.decode_png(output.read_bytes()).numpy()


def test_a_grid_is_drawn_into_the_run_by_default(workdir):
    sample.main([f"--workdir={workdir}"])
    assert tf.io.decode_png((workdir / "samples" / "sample.png").read_bytes()).shape == [280, 280, 1]


def test_raw_images_come_with_their_labels(workdir, tmp_path):
    with draw(workdir, tmp_path / "s.npz", "--num_images=205") as arrays:
        assert arrays["images"].shape == (205, 28, 28, 1) and arrays["images"].dtype == np.uint8
        assert arrays["labels"][[0, 9, 10, 99, 100, 204]].tolist() == [0, 0, 1, 9, 0, 0]


def test_a_label_gives_that_class_alone(workdir, tmp_path):
    with draw(workdir, tmp_path / "s.npz", "--num_images=3", "--label=7") as arrays:
        assert arrays["labels"].tolist() == [7, 7, 7]


def test_an_image_depends_on_its_number_and_not_on_how_many_are_drawn(workdir, tmp_path):
    few = draw(workdir, tmp_path / "few.npz", "--num_images=30")["images"]
    many = draw(workdir, tmp_path / "many.npz", "--num_images=150")["images"]
    np.testing.assert_array_equal(many[:30], few)
    other = draw(workdir, tmp_path / "other.npz", "--num_images=30", "--sample_seed=1")["images"]
    assert (other != few).any()


def test_the_average_and_the_named_commit_are_what_is_asked_for(workdir, tmp_path):
    average = draw(workdir, tmp_path / "a.npz", "--num_images=5")["images"]
    first = draw(workdir, tmp_path / "f.npz", "--num_images=5", "--checkpoint_step=0")["images"]
    first_raw = draw(workdir, tmp_path / "r.npz", "--num_images=5", "--checkpoint_step=0", "--nouse_ema")["images"]
    raw = draw(workdir, tmp_path / "w.npz", "--num_images=5", "--nouse_ema")["images"]
    # At step 0 the average is the generator.
    np.testing.assert_array_equal(first, first_raw)
    assert (average != raw).any() and (average != first).any()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--width=8"], "--width=8 contradicts the run's 4"),
        (["--label=10"], "--label=10"),
        (["--checkpoint_step=2"], r"--checkpoint_step=2 is not there; there are \[0, 3\]"),
        (["--output=picture.jpg"], "--output=picture.jpg"),
        (["--workdir=/nowhere"], "--workdir=/nowhere"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_by_name(workdir, flags, named):
    with pytest.raises(UsageError, match=named):
        sample.main([f"--workdir={workdir}", *flags])


def test_flags_that_only_say_the_same_or_set_a_rhythm_are_no_contradiction(workdir, tmp_path):
    draw(workdir, tmp_path / "s.png", "--width=4", "--log_every_steps=1", "--num_devices=4", "--num_images=1")


def test_a_flagfile_yields_to_the_run_where_the_command_line_may_not(workdir, tmp_path):
    flagfile = tmp_path / "run.cfg"
    flagfile.write_text("--width=8\n--accelerator=gpu\n--global_batch_size=512\n")
    output = f"--output={tmp_path / 's.png'}"
    sample.main([f"--flagfile={flagfile}", f"--workdir={workdir}", output, "--num_images=1"])
    with pytest.raises(UsageError, match="--width=8 contradicts"):
        sample.main([f"--flagfile={flagfile}", f"--workdir={workdir}", output, "--width=8"])


def test_a_label_without_a_conditional_model_is_refused(tmp_path):
    config = runs.config(*runs.TINY, "--train_steps=1", f"--workdir={tmp_path}")
    loop.train(config, strategy.create(config.devices))
    with pytest.raises(UsageError, match="conditional"):
        sample.main([f"--workdir={tmp_path}", "--label=3"])
    picture = draw(tmp_path, tmp_path / "deep" / "s.png", "--num_images=5")
    assert picture.shape == (2 * 28, 3 * 28, 1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="no commit"):
        sample.main([f"--workdir={tmp_path}"])


def test_a_grid_has_a_row_a_class():
    assert sample.grid_labels(25, 3).tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert sample.grid_labels(110, 10)[100:].tolist() == [0] * 10
    assert sample.grid_columns(7, 0) == 3 and sample.grid_columns(7, 10) == 10
