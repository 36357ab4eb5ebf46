"""The parent: deadlines, signals, exit codes; with children that import nothing heavy."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A parent with these deadlines, and a child that runs what the test says with `watch` as its line to the parent.
PARENT = """
import sys
from gan_dist import supervision
deadlines = {"starting": 60.0, "forming the cluster": float(sys.argv[2]), "saving": 1.5}
sys.exit(supervision.run([sys.executable, "-c", sys.argv[1]], deadlines, lambda: "No answer from worker 1 (b:2)."))
"""
CHILD = """
import ctypes, os, signal, sys, time
from gan_dist import supervision
watch = supervision.attach()
def forever_without_the_interpreter():
    ctypes.PyDLL(None).sleep(600)
"""


def start(child: str, cluster_secs: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD + child, str(cluster_secs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return process.returncode, text


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@pytest.mark.parametrize(("child", "code"), [("", 0), ("sys.exit(64)", 64), ("raise ValueError", 1)])
def test_the_childs_exit_code_is_the_parents(child, code):
    assert finish(start(child))[0] == code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, 137), (signal.SIGSEGV, 139), (signal.SIGTERM, 170), (signal.SIGINT, 170)]
)
def test_a_signal_that_ends_the_child_becomes_a_code(number, code):
    assert finish(start(f"os.kill(os.getpid(), {int(number)})"))[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["starting", "forming the cluster"])
def test_a_stop_before_there_is_anything_to_save_ends_a_child_that_cannot_answer(number, phase):
    process = start(f"watch.phase({phase!r}); print('up', flush=True); forever_without_the_interpreter()")
    wait_for(process, "up")
    process.send_signal(number)
    code, text = finish(process)
    assert code == 170 and "nothing to save" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_later_is_a_request(number):
    child = "watch.phase('a block of steps'); print('up', flush=True)\n"
    child += "while not watch.stop_requested(): time.sleep(0.01)\n"
    process = start(child + "print('asked', flush=True); sys.exit(170)")
    wait_for(process, "up")
    process.send_signal(number)
    code, text = finish(process)
    assert code == 170 and "asked" in text and "stopping after this block" in text


def test_a_stop_is_asked_for_when_nobody_reads_the_output_any_more():
    child = "watch.phase('a block of steps'); print('up', flush=True)\n"
    process = start(child + "while not watch.stop_requested(): time.sleep(0.01)\nos._exit(170)")
    wait_for(process, "up")
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 170


def test_a_second_signal_leaves_at_once():
    process = start("watch.phase('a block of steps'); print('up', flush=True); forever_without_the_interpreter()")
    wait_for(process, "up")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "gan_dist: SIGTERM: stopping after this block of steps; a second signal leaves at once.")
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 130 and "second signal" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_child_itself_is_a_request_too(number):
    child = f"watch.take_signals(); watch.phase('a block of steps'); os.kill(os.getpid(), {int(number)})\n"
    child += "deadline = time.monotonic() + 30\n"
    child += "while not watch.stop_requested() and time.monotonic() < deadline: time.sleep(0.01)\n"
    assert finish(start(child + "sys.exit(7 if watch.stop_requested() else 8)"))[0] == 7


@pytest.mark.parametrize("how", ["forever_without_the_interpreter()", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_phase_that_lasts_too_long_ends_the_child(how):
    code, text = finish(start(f"watch.phase('saving'); {how}"))
    assert code == 172 and "saving has lasted 1.5 s" in text


def test_the_stacks_of_all_threads_are_printed_before_the_end():
    code, text = finish(start("watch.phase('saving'); forever_without_the_interpreter()"))
    assert code == 172 and "forever_without_the_interpreter" in text and "_listen" in text


def test_a_cluster_that_does_not_form_names_who_is_missing():
    code, text = finish(start("watch.phase('forming the cluster'); forever_without_the_interpreter()", 1.0))
    assert code == 173 and "No answer from worker 1 (b:2)." in text


def test_a_phase_that_begins_again_has_its_whole_time_again():
    assert finish(start("for _ in range(8): watch.phase('saving'); time.sleep(0.25)"))[0] == 0


def test_a_child_does_not_outlive_its_parent():
    process = start("print(os.getpid(), flush=True); forever_without_the_interpreter()")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            # A child that nobody waits for stays in the table as a zombie until its new parent looks.
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except FileNotFoundError:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child lives on")
    process.stdout.close()
