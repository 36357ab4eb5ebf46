"""Starts N workers on this host as one gang, and starts all of them again when one is lost.

    python -m launch.local --num_workers=2 [--max_restarts=3] -- --flagfile=configs/quickstart.cfg

Everything after `--` goes to `python -m gan_dist.train`, the same for each worker.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# gan_dist/errors.py says which codes a launcher must, and must not, answer with another start.
_USAGE = 64
_NEVER_AGAIN = (_USAGE, 65, 78, 130)
# From TERM, which lets a worker commit, to KILL.
_GRACE_SECS = 60.0
_LAST_LINES = 20
_POLL_SECS = 0.1


class Worker:
    """One process of the gang; its output is passed on, line by line, with its number in front."""

    def __init__(self, index: int, addresses: Sequence[str], command: Sequence[str], logdir: Path | None) -> None:
        self.index, self.last_lines = index, deque[str](maxlen=_LAST_LINES)
        spec = {"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment.pop("TF_CONFIG", None)
        if len(addresses) > 1:
            environment["TF_CONFIG"] = json.dumps(spec)
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Signals from the terminal come through this launcher alone.
            start_new_session=True,
        )
        self._log = open(logdir / f"worker-{index}.log", "a", encoding="utf-8") if logdir else None  # noqa: SIM115
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        for line in self._process.stdout or ():
            self.last_lines.append(line)
            print(f"[w{self.index}] {line}", end="", flush=True)
            if self._log:
                self._log.write(line)
                self._log.flush()

    def code(self) -> int | None:
        """The exit code, 128 + n for signal n; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within `seconds`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        self._reader.join()
        if self._process.stdout:
            self._process.stdout.close()
        if self._log:
            self._log.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the gang until it has finished, failed for good, or been stopped; returns the exit code."""
    options, flags = _parse(sys.argv[1:] if arguments is None else arguments)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    if options.logdir:
        options.logdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gan_dist.train", *flags]
    if options.devices_per_worker:
        command.append(f"--num_devices={options.devices_per_worker}")
    for restart in range(options.max_restarts + 1):
        addresses = _free_addresses(options.num_workers)
        gang = [Worker(i, addresses, command, options.logdir) for i in range(options.num_workers)]
        first, code = _run(gang, signals)
        if code == 0:
            return 0
        again = not signals and code not in _NEVER_AGAIN and restart < options.max_restarts
        _say(f"worker {first.index} left first, with {code}; its last lines:")
        print("".join(f"  | {line}" for line in first.last_lines), end="", file=sys.stderr, flush=True)
        if not again:
            return code
        _say(f"starting all workers again ({restart + 1} of {options.max_restarts})")
    raise AssertionError("the last round returns")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="python -m launch.local", description=__doc__.split("\n")[0])
    parser.add_argument("--num_workers", type=_at_least(1), required=True, help="worker processes on this host")
    parser.add_argument("--devices_per_worker", type=_at_least(1), help="passed on as --num_devices")
    parser.add_argument("--max_restarts", type=_at_least(0), default=3, help="further starts of all workers (3)")
    parser.add_argument("--logdir", type=Path, help="a file a worker, beside what is printed")
    parser.add_argument("flags", nargs="*", help="after --: the flags of gan_dist.train")
    options = parser.parse_args(arguments)
    return options, options.flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        _say(f"{message}. The flags of gan_dist.train go after --.")
        sys.exit(_USAGE)


def _at_least(minimum: int):
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return number


def _run(gang: Sequence[Worker], signals: list[int]) -> tuple[Worker, int]:
    """Waits for the gang, and ends all of it once one has failed. Returns who failed first, and the code."""
    passed_on = 0
    failed: Worker | None = None
    deadline = 0.0
    try:
        while any(worker.code() is None for worker in gang):
            if signals and not deadline:
                deadline = time.monotonic() + _GRACE_SECS
            for number in signals[passed_on:]:
                for worker in gang:
                    worker.signal(number)
                passed_on += 1
            bad = [worker for worker in gang if worker.code()]
            if bad and not failed:
                # A cause before its effects: a peer that was lost says so of another.
                failed = min(bad, key=lambda worker: worker.code() in (170, 171, 172, 173))
                deadline = deadline or time.monotonic() + _GRACE_SECS
                if not signals:
                    for worker in gang:
                        worker.signal(signal.SIGTERM)
            if deadline and time.monotonic() > deadline:
                _say("workers that do not end are killed")
                for worker in gang:
                    worker.signal(signal.SIGKILL)
            time.sleep(_POLL_SECS)
    finally:
        for worker in gang:
            worker.signal(signal.SIGKILL)
            worker.wait(_GRACE_SECS)
            worker.close()
    bad = [worker for worker in gang if worker.code()]
    first = failed or (bad[0] if bad else gang[0])
    codes = [worker.code() or 0 for worker in gang]
    # A code that must not be retried speaks for the gang, whoever left first.
    final = next((code for code in codes if code in _NEVER_AGAIN), first.code() or 0)
    return next((w for w in gang if w.code() == final), first), final


def _free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    return addresses


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
