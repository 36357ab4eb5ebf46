"""What happens when: real processes, real signals, real files. The README's table is checked against these cases."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).parent.parent.parent
STEPS = 30
FLAGS = (
    *runs.TINY,
    f"--train_steps={STEPS}",
    "--checkpoint_every_steps=10",
    "--log_every_steps=10",
    "--sample_every_steps=0",
    "--steps_per_loop=5",
    "--keep_checkpoints=9",
)
# Runs until it is stopped.
ENDLESS = (*FLAGS, "--train_steps=1000000", "--checkpoint_every_steps=50000", "--log_every_steps=1000")
CASES: dict[str, str] = {}


def happens(event: str, outcome: str):
    """A row of the README's table, which the decorated test proves."""

    def register(test):
        CASES[event] = outcome
        return test

    return register


def fault(text: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "inject"), os.environ.get("PYTHONPATH", "")]))
    return {"FAULT": text, "PYTHONPATH": path}


def child_of(parent: subprocess.Popen[str]) -> int:
    """The training child of a supervising parent."""
    return int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()[0])


def wait_until(happened, processes=()) -> None:
    deadline = time.monotonic() + runs.DEADLINE_SECS
    while not happened():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            p.communicate()[0] for p in processes if p.poll() is not None
        ]
        time.sleep(0.005)


def rows(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The final tensors of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("straight")
    runs.finish([runs.start(*FLAGS, f"--workdir={workdir}")])
    return runs.committed(workdir, STEPS)


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def end_like_straight(workdir, straight, *flags):
    printed = runs.finish([runs.start(*FLAGS, *flags, f"--workdir={workdir}")])
    runs.assert_close(runs.committed(workdir, STEPS), straight, atol=0)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
@happens("`kill -9` of a run at any instant", "the same command ends with the same bits")
def test_a_kill_at_a_random_instant_changes_no_bit_of_the_end(seed, workdir, straight):
    dice = random.Random(seed)
    process = runs.start(*FLAGS, "--checkpoint_every_steps=1", "--steps_per_loop=1", f"--workdir={workdir}")
    commits = workdir / "checkpoints"
    if seed % 3 == 0:
        # Start-up and tracing are most of a short run's time.
        time.sleep(dice.uniform(0.2, 4.0))
    else:
        # Among the steps after a commit; or while one is written: its files are there, and its marker is not.
        step = dice.randrange(1, STEPS - 2)
        suffix = "json" if seed % 3 == 1 else "index"
        wait_until(lambda: (commits / f"ckpt-{step}.{suffix}").exists(), [process])
        time.sleep(dice.uniform(0, 0.02) if suffix == "json" else 0)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    end_like_straight(workdir, straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@happens("SIGTERM or SIGINT while steps run", "170 after this block of steps and a commit; the same command goes on")
def test_a_stop_while_steps_run_commits(number, workdir):
    process = runs.start(*ENDLESS, f"--workdir={workdir}")
    wait_until(lambda: rows(workdir) >= 1, [process])
    process.send_signal(number)
    printed = runs.finish([process], code=170)
    step = int(printed.split("stopped at step ")[1].split(";")[0])
    assert step >= 1000 and runs.committed(workdir, step)["step"] == step


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@happens("SIGTERM or SIGINT in start-up", "170 at once; nothing to save")
def test_a_stop_in_start_up_leaves_at_once(number, workdir, straight):
    process = runs.start(*FLAGS, f"--workdir={workdir}")
    wait_until(lambda: (workdir / "lock").exists(), [process])
    time.sleep(0.5)
    process.send_signal(number)
    assert "nothing to save" in runs.finish([process], code=170)
    end_like_straight(workdir, straight)


@happens(
    "SIGTERM while the first step is traced",
    "170 after that block at the latest; a commit if a step was done",
)
def test_a_stop_while_the_first_step_is_traced_is_not_lost(workdir, straight):
    process = runs.start(*FLAGS, "--train_steps=1000000", f"--workdir={workdir}")
    wait_until(lambda: (workdir / "metrics.jsonl").exists(), [process])
    process.send_signal(signal.SIGTERM)
    assert "stopped at step" in runs.finish([process], code=170)
    assert max(int(path.stem.split("-")[1]) for path in (workdir / "checkpoints").glob("*.json")) < 1000


@happens("SIGTERM to one of several workers", "170 on all of them, at the same step")
def test_a_stop_of_one_worker_stops_all_at_the_same_step(workdir):
    workers = runs.start_workers(2, *ENDLESS, "--log_every_steps=100", f"--workdir={workdir}")
    wait_until(lambda: rows(workdir) >= 1, workers)
    workers[1].send_signal(signal.SIGTERM)
    printed = [runs.finish([worker], code=170) for worker in workers]
    steps = {text.split("stopped at step ")[1].split(";")[0] for text in printed}
    assert len(steps) == 1
    assert runs.committed(workdir, int(steps.pop()))


@happens("a second signal", "130 at once; the commits before stay")
def test_a_second_signal_leaves_at_once(workdir):
    process = runs.start(*ENDLESS, "--steps_per_loop=1000000", "--log_every_steps=0", f"--workdir={workdir}")
    wait_until(lambda: (workdir / "checkpoints" / "ckpt-0.json").exists(), [process])
    wait_until(lambda: (workdir / "metrics.jsonl").exists(), [process])
    # Into the block of fifty thousand steps.
    time.sleep(6.0)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    runs.finish([process], code=130)
    assert runs.committed(workdir, 0)["step"] == 0


@happens("a worker dies", "171 on the others, naming it; start all again")
def test_a_worker_that_dies_is_noticed(workdir):
    workers = runs.start_workers(2, *ENDLESS, "--log_every_steps=100", f"--workdir={workdir}")
    wait_until(lambda: rows(workdir) >= 1, workers)
    os.kill(child_of(workers[1]), signal.SIGKILL)
    assert "No answer from worker 1" in runs.finish([workers[0]], code=171)
    runs.finish([workers[1]], code=137)


@pytest.mark.slow
@happens("a worker is frozen (SIGSTOP)", "171 or 172 on the others, 172 on it")
def test_a_frozen_worker_is_noticed(workdir):
    flags = ("--log_every_steps=100", "--step_timeout_secs=25")
    workers = runs.start_workers(2, *ENDLESS, *flags, f"--workdir={workdir}")
    wait_until(lambda: rows(workdir) >= 1, workers)
    os.kill(child_of(workers[1]), signal.SIGSTOP)
    codes = []
    for worker in workers:
        worker.communicate(timeout=runs.DEADLINE_SECS)
        codes.append(worker.returncode)
    assert codes[0] in (171, 172) and codes[1] == 172


@happens("a worker is stuck, and lives", "172 on it, with the stacks of all threads; 171 or 172 on the others")
def test_a_stuck_worker_ends_the_gang(workdir):
    flags = ("--step_timeout_secs=8", "--steps_per_loop=5")
    workers = runs.start_workers(2, *FLAGS, *flags, f"--workdir={workdir}", environment=fault("stuck:20"))
    codes, printed = [], []
    for worker in workers:
        printed.append(worker.communicate(timeout=runs.DEADLINE_SECS)[0])
        codes.append(worker.returncode)
    # The first to leave may be noticed by the other before its own time is up.
    assert codes[1] == 172 and codes[0] in (171, 172)
    assert "inject/sitecustomize.py" in printed[1] and "a block of steps has lasted 8 s" in printed[1]


@pytest.mark.parametrize("present", [0, pytest.param(1, marks=pytest.mark.slow)])
@happens("a worker never comes", "173 after --cluster_timeout_secs, naming it")
def test_a_missing_worker_is_named(present, workdir):
    started = runs.start_workers(2, *FLAGS, "--cluster_timeout_secs=9", f"--workdir={workdir}", only=present)
    printed = runs.finish(started, code=173)
    assert f"No answer from worker {1 - present} (127.0.0.1:" in printed


@pytest.mark.slow
@happens("a worker comes late", "nothing: the others wait")
def test_a_late_worker_is_waited_for(workdir):
    workers = runs.start_workers(2, *FLAGS, f"--workdir={workdir}", pause=6.0)
    runs.finish(workers)
    assert runs.committed(workdir, STEPS)["step"] == STEPS


@happens("SIGTERM while a peer's name has no address", "170; nothing to save")
def test_a_stop_while_names_are_waited_for_leaves_nothing_behind(workdir):
    cluster = {"worker": ["127.0.0.1:1", "nowhere.invalid:2222"]}
    spec = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}})
    process = runs.start(*FLAGS, f"--workdir={workdir}", environment={"TF_CONFIG": spec})
    wait_until(lambda: (workdir / "lock").exists(), [process])
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert "waiting for an address of nowhere.invalid:2222" in runs.finish([process], code=170)
    assert not workdir.exists()


@happens("a worker's port is in use", "173, naming the port")
def test_a_port_in_use_is_named(workdir):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cluster = {"worker": [f"127.0.0.1:{port}", "127.0.0.1:1"]}
        spec = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}})
        process = runs.start(*FLAGS, f"--workdir={workdir}", environment={"TF_CONFIG": spec})
        assert f"Port {port} of worker 0" in runs.finish([process], code=173)


# The same through the functions alone, every day: tests/test_checkpoints.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "truncated data",
        "flipped bit",
        "empty index",
        "missing data",
        "missing marker",
    ],
)
@happens("the newest commit is damaged or incomplete", "a warning, and the run goes on from the one before")
def test_a_damaged_commit_costs_the_steps_since_the_one_before(what, workdir, straight):
    runs.finish([runs.start(*FLAGS, "--train_steps=20", f"--workdir={workdir}")])
    prefix = workdir / "checkpoints" / "ckpt-20"
    data, index, marker = (prefix.with_name(f"ckpt-20.{e}") for e in ("data-00000-of-00001", "index", "json"))
    if what == "truncated data":
        os.truncate(data, 1000)
    elif what == "flipped bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
    elif what == "empty index":
        os.truncate(index, 0)
    else:
        (data if what == "missing data" else marker).unlink()
    printed = end_like_straight(workdir, straight)
    assert "resumed from" in printed and "ckpt-10" in printed


@pytest.mark.slow
@happens("every commit is damaged", "65; never a start at step 0")
def test_a_run_without_a_usable_commit_is_never_started_over(workdir):
    runs.finish([runs.start(*FLAGS, "--train_steps=10", f"--workdir={workdir}")])
    for path in (workdir / "checkpoints").glob("*.data-*"):
        os.truncate(path, 10)
    for _ in range(2):
        assert "no usable commit" in runs.finish([runs.start(*FLAGS, f"--workdir={workdir}")], code=65)


@pytest.mark.slow
@happens("numbers that are not finite, on one replica, in one step", "that step is skipped on all; counted")
def test_one_bad_step_is_skipped(workdir):
    runs.finish([runs.start(*FLAGS, "--num_devices=2", f"--workdir={workdir}", environment=fault("nan:7"))])
    final = runs.committed(workdir, STEPS)
    assert final["skipped_steps"] == 1 and final["generator_optimizer/count"] == STEPS - 1


@pytest.mark.slow
@happens("numbers that are not finite, in every step", "back to the last commit --max_rollbacks times, then 65")
def test_bad_steps_without_end_end_the_run(workdir):
    flags = ("--max_consecutive_skips=5", "--max_rollbacks=1", f"--workdir={workdir}")
    for _ in range(2):
        printed = runs.finish([runs.start(*FLAGS, *flags, environment=fault("nan:all"))], code=65)
        assert "attempt 1" in printed and "after going back 1 times" in printed


@happens("two runs on one workdir", "the second: 78, while the first lives")
def test_a_second_run_on_a_workdir_is_refused(workdir):
    first = runs.start(*ENDLESS, f"--workdir={workdir}")
    wait_until(lambda: (workdir / "lock").exists(), [first])
    assert "in use by a live run" in runs.finish([runs.start(*ENDLESS, f"--workdir={workdir}")], code=78)
    first.send_signal(signal.SIGTERM)
    runs.finish([first], code=170)


@pytest.mark.slow
@happens("the clock is set back", "nothing")
def test_a_clock_that_is_set_back_changes_nothing(workdir, straight):
    runs.finish([runs.start(*FLAGS, "--train_steps=15", f"--workdir={workdir}")])
    flags = (*FLAGS, "--keep_every_hours=1", "--checkpoint_every_secs=1", f"--workdir={workdir}")
    runs.finish([runs.start(*flags, environment=fault("clock:-1000000"))])
    runs.assert_close(runs.committed(workdir, STEPS), straight, atol=0)


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 1 MiB; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@happens("the disk is full", "78; with room again, the same command ends with the same bits")
def test_a_full_disk_loses_nothing(tmpfs, straight):
    workdir, ballast = tmpfs / "run", tmpfs / "ballast"
    runs.finish([runs.start(*FLAGS, "--train_steps=10", f"--workdir={workdir}")])
    free = os.statvfs(tmpfs)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - 60_000)))
    printed = runs.finish([runs.start(*FLAGS, f"--workdir={workdir}")], code=78)
    assert "Make room" in printed or "cannot be written" in printed
    ballast.unlink()
    end_like_straight(workdir, straight)


@pytest.mark.slow
@happens("the workdir is read-only", "78")
def test_a_read_only_workdir_is_refused(tmpfs):
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert "--workdir=" in runs.finish([runs.start(*FLAGS, f"--workdir={tmpfs / 'run'}")], code=78)


def launch(*flags: str, workers: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", f"--num_workers={workers}", *flags],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@happens("a worker dies under `launch.local`", "all are started again, up to --max_restarts; the same bits")
def test_the_launcher_starts_the_gang_again(workdir, tmp_path):
    flags = (*FLAGS, "--intra_op_threads=1", "--steps_per_loop=1", "--train_steps=100")
    runs.finish([launch("--", *flags, f"--workdir={tmp_path / 'straight'}")])
    launcher = launch("--", *flags, f"--workdir={workdir}")
    wait_until(lambda: (workdir / "checkpoints" / "ckpt-10.json").exists(), [launcher])
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    printed = runs.finish([launcher])
    assert "starting all workers again (1 of 3)" in printed and "left first" in printed
    runs.assert_close(runs.committed(workdir, 100), runs.committed(tmp_path / "straight", 100), atol=0)


@pytest.mark.slow
@happens("SIGTERM to `launch.local`", "passed on; 170, and no further start")
def test_a_stop_of_the_launcher_stops_the_gang_for_good(workdir):
    launcher = launch("--", *ENDLESS, "--log_every_steps=100", f"--workdir={workdir}")
    wait_until(lambda: rows(workdir) >= 1, [launcher])
    launcher.send_signal(signal.SIGTERM)
    printed = runs.finish([launcher], code=170)
    assert printed.count("[w0] gan_dist: stopped at step") == 1 and "starting all workers again" not in printed


def test_the_table_in_the_readme_is_these_cases():
    text = (ROOT / "README.md").read_text()
    table = text.split("## What happens when")[1].split("\n## ")[0]
    found = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines() if "|" in line]
    assert found[2:] == list(CASES.items()), "put these rows into the README:\n" + "\n".join(
        f"| {event} | {outcome} |" for event, outcome in CASES.items()
    )
