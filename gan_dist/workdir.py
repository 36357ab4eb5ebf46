"""The folder of a run: what lies where, and files that are either whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

from gan_dist import config as config_lib
from gan_dist.config import Config
from gan_dist.errors import CheckpointError, EnvironmentFault, UsageError

CONFIG, METRICS, CHECKPOINTS, TENSORBOARD, SAMPLES = (
    "config.json",
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "samples",
)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a machine that stops now, sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_config(workdir: Path, flag: str = "--workdir") -> Config | None:
    """The configuration that the run in `workdir` was started with; None if there is no run yet.

    Args:
        workdir: The run's folder.
        flag: The flag that named it, for messages.

    Raises:
        CheckpointError: If the file is there and cannot be read.
        UsageError: If it is of another version.
    """
    path = workdir / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return config_lib.from_dict(stored["config"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise EnvironmentFault(f"{flag}={workdir}: {path} cannot be read ({error.strerror}).") from error
    except UsageError as error:
        raise UsageError(
            f"{flag}={workdir}: {error} It may be of another version of gan_dist ({path}); use that version, or "
            "start in another folder."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{flag}={workdir}: {path} is damaged ({error}). Restore it from a copy, or start in another folder."
        ) from error


def refuse_other_model(workdir: Path, stored: Config, config: Config) -> None:
    """Refuses to go on with another model or data order.

    Raises:
        UsageError: With a line for each setting that differs.
    """
    changed = config_lib.differences(stored, config, identity=True)
    if changed:
        lines = "".join(f"\n  --{name}: {old} in the run, {new} now" for name, (old, new) in changed.items())
        raise UsageError(
            f"--workdir={workdir} holds a run of another model or data order:{lines}\n"
            "Give the run's own values to resume it, or another --workdir to start a new run."
        )


def check_resume(config: Config) -> None:
    """Refuses a folder that holds a run of another model or data order, or that cannot be written.

    Raises:
        UsageError: With a line for each setting that differs.
        EnvironmentFault: If the folder cannot be written.
    """
    workdir = Path(config.run.workdir)
    stored = read_config(workdir)
    if stored:
        refuse_other_model(workdir, stored, config)
    if config.run.dry_run:
        return
    nearest = workdir
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise EnvironmentFault(f"--workdir={workdir}: {nearest} is not a folder; give another --workdir.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"--workdir={workdir}: no permission to write in {nearest}; give another --workdir.")
