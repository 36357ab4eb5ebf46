"""Commits of the whole state: written, made durable, marked; verified before a variable is touched.

A commit of step s is `ckpt-<s>.index`, `ckpt-<s>.data-00000-of-00001` (TensorFlow's format, readable with
`tf.train.load_checkpoint`), and `ckpt-<s>.json`, the marker, written last: without it the rest does not count.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gan_dist import workdir
from gan_dist.errors import CheckpointError, Diverged, EnvironmentFault

_log = logging.getLogger("gan_dist")
_MARKER = re.compile(r"ckpt-(\d+)\.json")
_FILE = re.compile(r"ckpt-(\d+)\.")

Arrays = dict[str, np.ndarray]


def commit(folder: Path, step: int, variables: Mapping[str, tf.Variable], keep: int, versions: Any) -> None:
    """Writes the variables as the commit of `step`, then drops all but the newest `keep` commits.

    Args:
        folder: Where commits are; it must exist.
        step: Steps done.
        variables: By key. On the chief alone: they are equal on all replicas.
        keep: How many commits stay.
        versions: Goes into the marker as it is.

    Raises:
        Diverged: If a value is not finite; nothing is written then.
        EnvironmentFault: If it cannot be written; commits before it stay.
    """
    arrays = {key: variable.numpy() for key, variable in variables.items()}
    bad = [key for key, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if bad:
        raise Diverged(f"Step {step}: {', '.join(bad[:5])} not finite; not committed. Lower the learning rates.")
    prefix = folder / f"ckpt-{step}"
    try:
        # The op, not tf.train.Checkpoint: that one adds an object graph, and keys of its own making.
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=list(arrays),
            shape_and_slices=[""] * len(arrays),
            tensors=list(arrays.values()),
        )
        # Sorted: the data before the index that refers to it.
        files = sorted(path for path in folder.glob(f"{prefix.name}.*") if _is_content(path))
        for path in files:
            _sync(path)
        marker = {
            "step": step,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
            "tensors": {key: {"shape": list(a.shape), "dtype": a.dtype.name} for key, a in arrays.items()},
            "versions": versions,
        }
        workdir.sync_folder(folder)
        workdir.write_whole(prefix.with_name(f"{prefix.name}.json"), workdir.json_bytes(marker))
        for old in steps(folder)[:-keep]:
            _remove(folder, old)
    except (OSError, tf.errors.OpError) as error:
        raise EnvironmentFault(
            f"The checkpoint of step {step} cannot be written to {folder}: {error}. Make room or give it write "
            "permission, and run the same command again."
        ) from error


def steps(folder: Path) -> list[int]:
    """Steps that have a marker, oldest first."""
    found = (_MARKER.fullmatch(path.name) for path in folder.glob("ckpt-*.json"))
    return sorted(int(match[1]) for match in found if match)


def newest_valid(folder: Path) -> int | None:
    """The newest step whose commit is whole; None where nothing was ever committed.

    Raises:
        CheckpointError: If there are files of checkpoints, and no commit that can be used.
    """
    reasons = []
    for step in reversed(steps(folder)):
        try:
            verify(folder, step)
        except CheckpointError as error:
            _log.warning("%s Trying the commit before it.", error)
            reasons.append(str(error))
        else:
            return step
    # Files of step 0 without a marker are from a run that was killed in its first commit: nothing is lost.
    started = {match[1] for path in folder.glob("ckpt-*") if (match := _FILE.match(path.name))} - {"0"}
    if reasons or started:
        why = " ".join(reasons) or f"There are files of step {max(map(int, started))}, and no marker (ckpt-*.json)."
        raise CheckpointError(
            f"{folder} holds no usable commit. {why} Restore the folder from a copy, or start in another --workdir."
        )
    return None


def verify(folder: Path, step: int) -> None:
    """Checks a commit's files against its marker, byte by byte.

    Raises:
        CheckpointError: Saying what is wrong.
    """
    path = folder / f"ckpt-{step}.json"
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in marker["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    for name, (size, sha256) in expected.items():
        file = folder / name
        # A marker from a stranger must not point outside the folder.
        if Path(name).name != name or not name.startswith(f"ckpt-{step}."):
            raise CheckpointError(f"{path} names a file that is not its own: {name!r}.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, and had {size} when committed.")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{file} has changed since it was committed (SHA-256).")
    if len(expected) < 2:
        raise CheckpointError(f"{path} names {sorted(expected)}; an index and its data are needed.")


def read(folder: Path, step: int, keys: Collection[str]) -> Arrays:
    """Arrays of a commit, by key. Check it with `verify` first.

    Raises:
        CheckpointError: If a key is not there or cannot be read.
    """
    try:
        reader = tf.train.load_checkpoint(str(folder / f"ckpt-{step}"))
        return {key: np.asarray(reader.get_tensor(key)) for key in keys}
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/ckpt-{step} cannot be read: {error}.") from error


def restore(folder: Path, step: int, variables: Mapping[str, tf.Variable]) -> None:
    """Gives the variables the values of a verified commit. All values are read before one is assigned.

    Raises:
        CheckpointError: If a value cannot be read, or has another shape or type.
    """
    arrays = read(folder, step, variables.keys())
    for key, variable in variables.items():
        stored, own = (arrays[key].shape, arrays[key].dtype.name), (tuple(variable.shape), variable.dtype.name)
        if stored != own:
            raise CheckpointError(f"{folder}/ckpt-{step}: {key} is {stored}, and this model's is {own}.")
    for key, variable in variables.items():
        variable.assign(arrays[key])


def _is_content(path: Path) -> bool:
    return path.name.endswith(".index") or re.search(r"\.data-\d{5}-of-\d{5}$", path.name) is not None


def _remove(folder: Path, step: int) -> None:
    # The marker first: a commit must not look whole while its files go.
    (folder / f"ckpt-{step}.json").unlink(missing_ok=True)
    workdir.sync_folder(folder)
    for path in folder.glob(f"ckpt-{step}.*"):
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
