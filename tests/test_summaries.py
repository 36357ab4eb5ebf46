"""One dict of scalars, three places; and nothing twice after a resume."""

import json
import logging

import numpy as np
import pytest
import runs
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gan_dist import summaries

VALUES = {"loss/generator": 0.75, "loss/discriminator": 1.25, "img/s": 6009.4, "sec/step": 0.5}


@pytest.fixture
def folder(tmp_path):
    for name in ("tensorboard", "samples"):
        (tmp_path / name).mkdir()
    return tmp_path


def events(folder):
    """Step, tag and value of everything in all files. Files of the same second have names in no order: by step."""
    found = [event for path in (folder / "tensorboard").iterdir() for event in EventFileLoader(str(path)).Load()]
    for event in sorted(found, key=lambda event: event.step):
        for value in event.summary.value:
            yield event.step, value.tag, value


def write(folder, first, steps):
    writer = summaries.Writer(folder, runs.config("--train_steps=100"), first)
    for step in steps:
        writer.scalars(step, VALUES)
        writer.picture(step, np.full([4, 4, 1], step, np.uint8))
    writer.close()


def test_scalars_have_the_same_keys_and_values_in_file_and_tensorboard(folder):
    write(folder, 0, [10])
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert row == {"step": 10, **VALUES}
    found = {tag: tf.make_ndarray(v.tensor).item() for step, tag, v in events(folder) if step == 10 and tag in VALUES}
    assert found == pytest.approx(VALUES)


def test_the_configuration_is_shown_as_text_once(folder):
    write(folder, 0, [10])
    write(folder, 10, [20])
    # And a run that was killed before its first commit after step 0 starts over.
    write(folder, 0, [10])
    assert [step for step, tag, _ in events(folder) if tag == "samples"] == [10]
    texts = [tf.make_ndarray(v.tensor).item().decode() for _, tag, v in events(folder) if tag == "config"]
    assert len(texts) == 1 and '"global_batch_size": 128' in texts[0]


def test_pictures_are_files_and_in_tensorboard(folder):
    write(folder, 0, [10])
    picture = tf.io.decode_png((folder / "samples" / "step-10.png").read_bytes())
    np.testing.assert_array_equal(picture, np.full([4, 4, 1], 10))
    assert [step for step, tag, _ in events(folder) if tag == "samples"] == [10]


def test_a_resumed_run_takes_back_what_came_after_its_commit(folder):
    write(folder, 0, [10, 20, 30])
    write(folder, 20, [30, 40])
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [10, 20, 30, 40]
    for tag in ("loss/generator", "samples"):
        assert [step for step, t, _ in events(folder) if t == tag] == [10, 20, 30, 40]


def test_a_row_and_an_event_that_were_cut_off_are_dropped(folder):
    write(folder, 0, [10, 20])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "loss/gen')
    path = next((folder / "tensorboard").iterdir())
    path.write_bytes(path.read_bytes()[:-5])
    write(folder, 20, [30])
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == [10, 20, 30]
    assert [step for step, tag, _ in events(folder) if tag == "loss/generator"] == [10, 20, 30]


def test_a_log_line_has_keys_units_and_the_time_left():
    line = summaries.log_line(40, 100, VALUES)
    assert line == "step=40/100 loss/generator=0.75 loss/discriminator=1.25 img/s=6009 sec/step=0.5 eta=00:30"


def test_log_lines_come_where_there_is_no_terminal(folder, caplog):
    with caplog.at_level(logging.INFO, "gan_dist"):
        write(folder, 0, [10])
    assert "step=10/100 loss/generator=0.75" in caplog.text


def test_on_a_terminal_a_bar_shows_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    writer = summaries.Writer(folder, runs.config("--train_steps=100"), 0)
    writer.progress(50)
    writer.scalars(50, VALUES)
    writer.close()
    assert "50/100" in capsys.readouterr().err


def test_memory_is_that_of_a_process_with_tensorflow_in_it():
    assert 0.1 < summaries.memory_gb() < 100
