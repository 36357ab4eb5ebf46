"""One run a folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gan_dist import lock
from gan_dist.errors import EnvironmentFault

HOLDER = "import sys, time; from pathlib import Path; from gan_dist import lock\n" + (
    "with lock.held(Path(sys.argv[1]), 30, lambda: None): print('held', flush=True); time.sleep(600)"
)


def hold(folder, lease_secs=30.0, lost=lambda: None):
    return lock.held(folder, lease_secs, lost)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdout.close()


def foreign(folder, **changes):
    """A lock as a process on another machine would leave it."""
    content = {"owner": "them", "beat": 1, "host": "elsewhere", "pid": 7, "started": "1", "machine": "another"}
    (folder / lock.NAME).write_text(json.dumps({**content, **changes}))


def test_a_lock_is_taken_and_given_back(tmp_path):
    with hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()
    with hold(tmp_path):
        pass


def test_a_folder_made_for_a_run_that_wrote_nothing_goes_again(tmp_path):
    with hold(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()


def test_a_live_process_on_this_machine_keeps_it_even_when_it_is_frozen(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(EnvironmentFault, match=f"process {holder.pid}"), hold(tmp_path, 0.1):
        pass


def test_a_dead_process_on_this_machine_loses_it_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / lock.NAME).exists()
    began = time.monotonic()
    with hold(tmp_path, lease_secs=30):
        assert time.monotonic() - began < 15
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_dead_process_that_nobody_has_looked_after_loses_it_too(tmp_path, holder):
    holder.kill()
    time.sleep(0.5)
    with hold(tmp_path, lease_secs=30):
        pass


def test_a_lock_that_cannot_be_read_once_is_kept(tmp_path, monkeypatch):
    lost = threading.Event()
    with hold(tmp_path, lease_secs=0.3, lost=lost.set):
        (tmp_path / lock.NAME).write_text("")
        time.sleep(0.5)
        (tmp_path / lock.NAME).unlink()
        time.sleep(0.5)
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert not lost.is_set()


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path):
    foreign(tmp_path, machine=lock._machine(), pid=os.getpid(), started="1")
    with hold(tmp_path):
        pass


def test_a_lock_of_another_machine_is_kept_while_it_changes(tmp_path):
    foreign(tmp_path)
    ended = threading.Event()

    def renew():
        beat = 1
        while not ended.wait(0.05):
            beat += 1
            foreign(tmp_path, beat=beat)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(EnvironmentFault, match="on elsewhere"), hold(tmp_path, 5.0):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_lock_of_another_machine_that_does_not_change_for_a_lease_is_taken_over(tmp_path, content):
    foreign(tmp_path)
    if content is not None:
        (tmp_path / lock.NAME).write_text(content)
    with hold(tmp_path, lease_secs=0.3):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_no_clock_is_asked_what_day_it_is(tmp_path, monkeypatch):
    foreign(tmp_path)
    os.utime(tmp_path / lock.NAME, (0, 2**33))
    # A log record has a time of its own.
    monkeypatch.setattr(lock._log, "warning", lambda *_: None)
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the lock read the wall clock"))
    with hold(tmp_path, lease_secs=0.3):
        pass


def test_the_owner_renews_it_and_learns_that_it_was_taken(tmp_path):
    lost = threading.Event()
    with hold(tmp_path, lease_secs=0.3, lost=lost.set):
        first = json.loads((tmp_path / lock.NAME).read_text())["beat"]
        deadline = time.monotonic() + 30
        while json.loads((tmp_path / lock.NAME).read_text())["beat"] == first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert json.loads((tmp_path / lock.NAME).read_text())["beat"] > first
        assert not lost.is_set()
        foreign(tmp_path)
        assert lost.wait(30)
    # What is another's now stays.
    assert json.loads((tmp_path / lock.NAME).read_text())["owner"] == "them"


def test_a_folder_that_cannot_be_made_is_the_environments_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="--workdir="), hold(tmp_path / "file" / "run"):
        pass
