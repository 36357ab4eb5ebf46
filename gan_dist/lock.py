"""One run a folder: a lock that a live run keeps by changing it, and that a dead one loses.

No clock is compared with another: whoever wants a lock watches for one lease whether its content changes. On the same
machine a look at the process table answers at once. It works on any storage that can replace a file.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gan_dist import workdir
from gan_dist.errors import EnvironmentFault

NAME = "lock"

_log = logging.getLogger("gan_dist")


@contextlib.contextmanager
def held(folder: Path, lease_secs: float, lost: Callable[[], None]) -> Iterator[None]:
    """Holds the folder's lock, renewing it from a thread.

    Args:
        folder: The run's folder; made if it is not there.
        lease_secs: How long a lock may stay unchanged before its owner counts as dead.
        lost: Called from the thread if another run has taken the lock.

    Raises:
        EnvironmentFault: If a live run holds it, or the folder cannot be written.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            lock = _acquire(folder / NAME, lease_secs)
    except OSError as error:
        raise EnvironmentFault(f"--workdir={folder} cannot be written: {error}. Give another --workdir.") from error
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease_secs / 3):
            # A full disk or a server away for a moment must not end the run: a lease is three renewals long.
            with contextlib.suppress(OSError):
                owner = _owner(lock.path)
                # A lock that cannot be read, or is not there, is nobody else's.
                if owner and owner != lock.owner:
                    lost()
                    return
                lock.write()

    thread = threading.Thread(target=renew, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _owner(lock.path) == lock.owner:
                lock.path.unlink()
                if new:
                    # Only where the run left nothing in it.
                    folder.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps others on this machine from looking at the lock while this process looks and writes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems lock no folders; there the look after the write has to do.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path, self.owner, self._beat = path, secrets.token_hex(8), 0

    def content(self) -> bytes:
        self._beat += 1
        return json.dumps(
            {"owner": self.owner, "beat": self._beat, "host": socket.gethostname(), **_process()}
        ).encode()

    def write(self) -> None:
        workdir.write_whole(self.path, self.content())


def _acquire(path: Path, lease_secs: float) -> _Lock:
    lock = _Lock(path)
    try:
        with open(path, "xb") as file:
            try:
                file.write(lock.content())
                file.flush()
            except OSError:
                path.unlink()
                raise
        return lock
    except FileExistsError:
        pass
    before = _read(path)
    alive = _runs_here(before)
    if alive is None:
        _log.warning("%s is of another machine: watching for %g s whether its owner lives", path, lease_secs)
    if _changes(path, before, lease_secs) if alive is None else alive:
        raise EnvironmentFault(
            f"--workdir={path.parent} is in use by a live run: process {before.get('pid', '?')} on "
            f"{before.get('host', 'another machine')}. Wait for it, stop it, or give another --workdir."
        )
    # Two may come here at once: the last to write has it, once both have written.
    lock.write()
    time.sleep(min(1.0, lease_secs / 10))
    if _owner(path) != lock.owner:
        raise EnvironmentFault(f"--workdir={path.parent} was taken by another run just now; give another --workdir.")
    return lock


def _changes(path: Path, before: dict[str, Any], lease_secs: float) -> bool:
    """Whether the lock is renewed within a lease."""
    deadline = time.monotonic() + lease_secs
    while time.monotonic() < deadline:
        time.sleep(min(0.2, lease_secs / 10))
        if _read(path) != before:
            return True
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _owner(path: Path) -> str:
    return str(_read(path).get("owner", ""))


def _process() -> dict[str, Any]:
    """This process, so that another on the same machine can see whether it lives."""
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "machine": _machine()}


def _machine() -> str:
    """The running kernel and the namespace of process numbers: within both, a number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When the process started, in the kernel's ticks; numbers are used again, pairs of number and start are not."""
    try:
        # The name, in brackets, may hold blanks; the start is field 22, the 20th after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _runs_here(content: dict[str, Any]) -> bool | None:
    """Whether the process of a lock lives; None if that cannot be seen from this machine."""
    if not _machine() or content.get("machine") != _machine():
        return None
    pid = content.get("pid", 0)
    return bool(content.get("started")) and _started(pid) == content.get("started") and not _ended(pid)


def _ended(pid: int) -> bool:
    """Whether the process has ended, and only its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except (OSError, IndexError):
        return True
