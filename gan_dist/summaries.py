"""One dict of scalars to log line, metrics.jsonl and TensorBoard; pictures and settings beside them.

A resumed run takes back what was written after the commit that it goes on from, so no step appears twice.
"""

import json
import logging
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gan_dist import config as config_lib
from gan_dist import images, workdir
from gan_dist.config import Config

_log = logging.getLogger("gan_dist")


class Writer:
    """Writes a run's summaries. The chief alone has one.

    Args:
        folder: The run's folder.
        config: The settings; shown as text at step 0.
        first: The step that training goes on from.
    """

    def __init__(self, folder: Path, config: Config, first: int) -> None:
        self._folder, self._last = folder, config.run.train_steps
        # A run that starts over has written at step 0 before, perhaps.
        self._open(first or -1)
        # On a terminal a bar; in a file or a pod's log, lines.
        self._bar = (
            tqdm.tqdm(total=self._last, initial=first, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        )
        if first == 0:
            with self._events.as_default():
                tf.summary.text(
                    "config", "    " + json.dumps(config_lib.to_dict(config), indent=2).replace("\n", "\n    "), 0
                )

    def _open(self, step: int) -> None:
        trim_metrics(self._folder / workdir.METRICS, step)
        trim_events(self._folder / workdir.TENSORBOARD, step)
        self._metrics = open(self._folder / workdir.METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self._events: Any = tf.summary.create_file_writer(str(self._folder / workdir.TENSORBOARD))

    def close(self) -> None:
        """Writes out what is still held back."""
        self._metrics.close()
        self._events.close()
        if self._bar:
            self._bar.close()

    def go_back(self, step: int) -> None:
        """Takes back what was written after `step`."""
        self._metrics.close()
        self._events.close()
        self._open(step)
        self.progress(step)

    def progress(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar:
            self._bar.update(step - self._bar.n)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one set of scalars to all three places."""
        row = {"step": step, **values}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        with self._events.as_default():
            for name, value in values.items():
                tf.summary.scalar(name, value, step)
        self._events.flush()
        if self._bar:
            shown = {k: f"{values[k]:.3g}" for k in ("loss/generator", "loss/discriminator", "img/s")}
            self._bar.set_postfix(shown)
        else:
            _log.info("%s", log_line(step, self._last, values))

    def picture(self, step: int, picture_HWC: Any) -> None:
        """Writes samples/step-<step>.png, and the same picture to TensorBoard."""
        workdir.write_whole(self._folder / workdir.SAMPLES / f"step-{step}.png", images.encode_png(picture_HWC))
        with self._events.as_default():
            tf.summary.image("samples", picture_HWC[None], step)
        self._events.flush()


def log_line(step: int, last: int, values: Mapping[str, float]) -> str:
    """`step=100/2000 kimg=6.4 …`: the same keys as metrics.jsonl, four digits each, and the time that is left."""
    shown = " ".join(f"{name}={value:.4g}" for name, value in values.items())
    return f"step={step}/{last} {shown} eta={tqdm.tqdm.format_interval((last - step) * values['sec/step'])}"


def memory_gb() -> float:
    """Most memory used so far, GB: of the first GPU where there is one, else of this process."""
    if tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024 / 1e9


def trim_metrics(path: Path, step: int) -> None:
    """Drops the rows after `step`, and a row that was cut off while it was written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    workdir.write_whole(path, "".join(line + "\n" for line in kept).encode())


def trim_events(folder: Path, step: int) -> None:
    """Rewrites TensorBoard's files without the events after `step`."""
    for path in sorted(folder.glob("events.out.tfevents.*")) if folder.exists() else []:
        events = list(EventFileLoader(str(path)).Load())
        kept = [event for event in events if event.step <= step]
        if len(kept) == len(events):
            continue
        partial = path.with_name(f"partial.{path.name}")
        with tf.io.TFRecordWriter(str(partial)) as file:
            for event in kept:
                file.write(event.SerializeToString())
        partial.replace(path)
