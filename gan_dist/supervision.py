"""The parent process: deadlines, signals and exit codes of a training child. Standard library only.

TensorFlow can hold the interpreter for ever while a cluster forms, and swallows SIGTERM; so what must always work does
not live in its process. The child says through a pipe which phase it is in; the parent keeps that phase's deadline,
asks the child to stop when told to, and ends it where it cannot answer.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

# How the child finds its ends of the pipes.
_VARIABLE = "GAN_DIST_SUPERVISOR"
_PR_SET_PDEATHSIG = 1
# From SIGABRT, which prints all stacks, to SIGKILL.
_STACKS_SECS = 5.0

STARTING, CLUSTER, FIRST_STEP, STEPS, SAVING, LEAVING = (
    "starting",
    "forming the cluster",
    "the first step",
    "a block of steps",
    "saving",
    "leaving",
)
STOPPED, SECOND_SIGNAL, NO_PROGRESS, NO_CLUSTER = 170, 130, 172, 173


class Watch:
    """What a loop without a parent sees: nobody watches, nobody asks it to stop."""

    supervised = False

    def phase(self, name: str) -> None:
        """Says that a phase begins (again)."""

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""
        return False

    def take_signals(self) -> None:
        """Makes SIGTERM and SIGINT to this process requests to stop. Call it once the strategy is built."""


class Child(Watch):
    """A child's line to its parent."""

    supervised = True

    def __init__(self, requests: int, phases: int) -> None:
        self._requests, self._phases = requests, phases
        self._stop = threading.Event()
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        # A child whose parent is killed must not go on alone, with nobody who keeps the lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # Until `take_signals` a signal to the child itself ends it, without Python's own way out.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # SIGABRT, the parent's last word but one, prints the stacks of all threads.
        faulthandler.enable()
        threading.Thread(target=self._listen, name="supervision", daemon=True).start()

    def _listen(self) -> None:
        # A thread: a signal handler would wait for the main thread, which may be inside TensorFlow.
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            for end in ready:
                said = os.read(end, 64)
                if said:
                    self._stop.set()
                elif end == self._requests:
                    os._exit(128 + signal.SIGKILL)

    def phase(self, name: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._phases, f"{name}\n".encode())

    def stop_requested(self) -> bool:
        return self._stop.is_set()

    def take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)


def attach() -> Child | None:
    """The line to the parent, in a child; None in a process that has none."""
    ends = os.environ.pop(_VARIABLE, "")
    return Child(*map(int, ends.split(","))) if ends else None


def run(command: Sequence[str], deadlines: Mapping[str, float], missing: Callable[[], str]) -> int:
    """Runs a child to its end.

    Args:
        command: The child's program and arguments.
        deadlines: Seconds that a phase may last, by name; 0 or absent: for ever.
        missing: Says which peers do not answer; asked when the cluster has not formed in time.

    Returns:
        The exit code: the child's own, 128 + n if signal n ended it, 170 if it was stopped before there was anything
        to save, 130 after a second signal, 172 if a phase lasted too long, 173 if that was the forming of the cluster.
    """
    signals: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    previous = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    requests, ask = os.pipe()
    heard, phases = os.pipe()
    child = subprocess.Popen(
        command,
        env={**os.environ, _VARIABLE: f"{requests},{phases}"},
        pass_fds=(requests, phases),
        # Control-C in a terminal goes to the whole group; the child shall hear of it from us alone.
        start_new_session=True,
    )
    os.close(requests)
    os.close(phases)
    try:
        return _watch(child, deadlines, missing, signals, heard, woken, ask)
    finally:
        child.kill()
        child.wait()
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for end in (heard, ask, woken, wake):
            os.close(end)


def _watch(
    child: "subprocess.Popen[bytes]",
    deadlines: Mapping[str, float],
    missing: Callable[[], str],
    signals: list[int],
    heard: int,
    woken: int,
    ask: int,
) -> int:
    phase, began, asked, text = STARTING, time.monotonic(), 0, ""
    listening = [heard, woken]
    while True:
        limit = deadlines.get(phase, 0.0)
        left = max(0.0, began + limit - time.monotonic()) if limit else 60.0
        # Without a pipe to wait for, look at the child itself.
        ready, _, _ = select.select(listening, [], [], left if heard in listening else min(left, 0.05))
        if woken in ready:
            os.read(woken, 64)
        if heard in ready:
            said = os.read(heard, 65536).decode()
            if said:
                *names, text = (text + said).split("\n")
                if names:
                    phase, began = names[-1], time.monotonic()
            else:
                listening.remove(heard)
        if heard not in listening and child.poll() is not None:
            return _exit_code(child.returncode)
        if len(signals) > 1:
            _say(f"second signal: leaving at once, from {phase}.")
            return SECOND_SIGNAL
        if signals and not asked:
            asked = signals[0]
            name = signal.Signals(asked).name
            if phase in (STARTING, CLUSTER):
                _say(f"{name} while {phase}: nothing to save; the same command goes on.")
                return STOPPED
            with contextlib.suppress(BrokenPipeError):
                os.write(ask, b"s")
            _say(f"{name}: stopping after this block of steps; a second signal leaves at once.")
        if limit and time.monotonic() - began >= limit:
            return _too_long(child, phase, limit, missing)


def _too_long(child: "subprocess.Popen[bytes]", phase: str, limit: float, missing: Callable[[], str]) -> int:
    who = missing() if phase == CLUSTER else ""
    _say(f"{phase} has lasted {limit:g} s, its deadline. {who}".rstrip())
    _say("the stacks of all threads follow, and the process ends; start it again to go on from the last commit.")
    child.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_STACKS_SECS)
    return NO_CLUSTER if phase == CLUSTER else NO_PROGRESS


def _exit_code(returncode: int) -> int:
    if returncode >= 0:
        return returncode
    # To a child that did not listen yet: there was nothing to save.
    return STOPPED if -returncode in (signal.SIGTERM, signal.SIGINT) else 128 - returncode


def _say(text: str) -> None:
    # Whoever read our output may be gone; what we have to do stays.
    with contextlib.suppress(OSError):
        print(f"gan_dist: {text}", file=sys.stderr, flush=True)
