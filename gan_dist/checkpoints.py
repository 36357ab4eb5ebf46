"""Commits of the whole state: written, made durable, marked; verified before a variable is touched.

A commit of step s is `ckpt-<s>.index`, `ckpt-<s>.data-00000-of-00001` (TensorFlow's format, readable with
`tf.train.load_checkpoint`), and `ckpt-<s>.json`, the marker, written last: without it the rest does not count.
"""

import concurrent.futures
import hashlib
import json
import logging
import math
import re
import time
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


class Saver:
    """Commits in the background: `save` copies the values and returns, a thread writes them.

    Args:
        folder: Where commits are; it must exist.
        variables: By key. On the chief alone: they are equal on all replicas.
        keep: How many of the newest commits stay.
        keep_every_hours: Beside these stays one commit for so many hours; 0: none.
        every: Beside these stays the newest commit at a multiple of so many steps, which a run may have to go back
            to; 0: none.
        about: Goes into the markers, as `about` gives it back.
    """

    def __init__(
        self,
        folder: Path,
        variables: Mapping[str, tf.Variable],
        keep: int,
        keep_every_hours: float,
        every: int,
        about: Any,
    ) -> None:
        self._folder, self._variables, self._about = folder, variables, about
        self._keep, self._keep_every_hours, self._every = keep, keep_every_hours, every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, step: int) -> None:
        """Begins the commit of `step`, once the one before is done.

        Raises:
            Diverged: If a value of the commit before was not finite.
            EnvironmentFault: If the commit before could not be written; those before it stay.
        """
        self.wait()
        arrays = {key: variable.numpy() for key, variable in self._variables.items()}
        self._writing = self._thread.submit(self._write, step, arrays)

    def check(self) -> None:
        """Raises what went wrong in the background, if anything did; does not wait."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last commit is durable.

        Raises:
            Diverged, EnvironmentFault: As `save`.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Waits, and says nothing of what went wrong: for the way out after another error."""
        self._thread.shutdown()

    def _write(self, step: int, arrays: Arrays) -> None:
        commit(self._folder, step, arrays, self._about)
        try:
            drop(self._folder, self._keep, self._keep_every_hours, self._every)
        except OSError as error:
            _log.warning("Old commits in %s cannot be removed: %s.", self._folder, error)


def commit(folder: Path, step: int, arrays: Arrays, about: Any) -> None:
    """Writes the arrays, by key, as the commit of `step`.

    Raises:
        Diverged: If a value is not finite; nothing is written then.
        EnvironmentFault: If it cannot be written; commits before it stay.
    """
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
            workdir.sync(path)
        marker = {
            "step": step,
            "time": time.time(),
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files},
            "tensors": {key: {"shape": list(a.shape), "dtype": a.dtype.name} for key, a in arrays.items()},
            "about": about,
        }
        workdir.sync(folder)
        workdir.write_whole(prefix.with_name(f"{prefix.name}.json"), workdir.json_bytes(marker))
    except (OSError, tf.errors.OpError) as error:
        raise EnvironmentFault(
            f"The checkpoint of step {step} cannot be written to {folder}: {error}. Make room or give it write "
            "permission, and run the same command again."
        ) from error


def about(folder: Path, step: int) -> Any:
    """What the writer of a verified commit said of it; None in a commit that says nothing."""
    return json.loads((folder / f"ckpt-{step}.json").read_text(encoding="utf-8")).get("about")


def drop(folder: Path, keep: int, keep_every_hours: float, every: int) -> None:
    """Removes all commits but those that `Saver` keeps."""
    last = -math.inf
    regular = [step for step in steps(folder) if every and step % every == 0][-1:]
    for step in steps(folder)[:-keep]:
        if step in regular:
            continue
        written = _time(folder, step) if keep_every_hours else 0.0
        if keep_every_hours and written - last >= keep_every_hours * 3600:
            last = written
        else:
            _remove(folder, step)


def sweep(folder: Path, newest: int | None) -> None:
    """Removes what a killed run left half written, and sets damaged commits aside, as `damaged-ckpt-<step>.*`.

    Only for who holds the workdir's lock.

    Args:
        folder: Where commits are.
        newest: The newest valid commit; what is later is damaged, and would count as the newest when old ones go.
    """
    committed = set(steps(folder))
    for path in folder.glob("ckpt-*"):
        match = _FILE.match(path.name)
        if path.name.endswith(".partial") or (match and int(match[1]) not in committed):
            _log.info("%s is from a commit that was not finished: removed", path)
            path.unlink()
        elif match and newest is not None and int(match[1]) > newest:
            path.rename(path.with_name(f"damaged-{path.name}"))


def steps(folder: Path) -> list[int]:
    """Steps that have a marker, oldest first."""
    found = (_MARKER.fullmatch(path.name) for path in folder.glob("ckpt-*.json"))
    return sorted(int(match[1]) for match in found if match)


def discard_after(folder: Path, step: int) -> None:
    """Removes the commits after `step`: the run goes on from there in another way."""
    for later in steps(folder):
        if later > step:
            _remove(folder, later)


def newest_valid(folder: Path, every: int = 1) -> int | None:
    """The newest step whose commit is whole; None where nothing was ever committed.

    Args:
        folder: Where commits are.
        every: Only commits at a multiple of so many steps.

    Raises:
        CheckpointError: If there are files of checkpoints, and no commit that can be used.
    """
    reasons = []
    for step in reversed([step for step in steps(folder) if step % every == 0]):
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


def _time(folder: Path, step: int) -> float:
    """When a commit was written, by its writer's clock; -inf where its marker does not say."""
    try:
        return float(json.loads((folder / f"ckpt-{step}.json").read_text(encoding="utf-8"))["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def _is_content(path: Path) -> bool:
    return path.name.endswith(".index") or re.search(r"\.data-\d{5}-of-\d{5}$", path.name) is not None


def _remove(folder: Path, step: int) -> None:
    # The marker first: a commit must not look whole while its files go.
    (folder / f"ckpt-{step}.json").unlink(missing_ok=True)
    workdir.sync(folder)
    for path in folder.glob(f"ckpt-{step}.*"):
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
