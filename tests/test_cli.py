"""The command line: flags, flagfiles, help, and the exit codes that launchers act on."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gan_dist import cli
from gan_dist import config as config_lib
from gan_dist.config import Config, SampleConfig
from gan_dist.errors import CheckpointError, Diverged, EnvironmentFault, PeerLost, UsageError

CHECKOUT = Path(cli.__file__).parent.parent


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parse(*argv: object) -> cli.Parsed:
    return cli.parse([str(a) for a in argv], "train")


def refusal(*argv: object) -> str:
    with pytest.raises(UsageError) as refused:
        parse(*argv)
    return str(refused.value)


def test_no_flags_give_the_defaults_and_the_default_workdir():
    parsed = parse()
    assert parsed.config == dataclasses.replace(Config(), run=dataclasses.replace(Config().run, workdir="runs/default"))
    assert parsed.own is None
    assert parsed.given == frozenset()


def test_flags_reach_their_fields_with_their_types():
    parsed = parse("--seed=3", "--generator_lr=1e-3", "--conditional", "--nosync_batch_norm", "--workdir", "/w")
    assert parsed.config.run.seed == 3
    assert parsed.config.optim.generator_lr == 1e-3
    assert parsed.config.model.conditional is True
    assert parsed.config.model.sync_batch_norm is False
    assert parsed.config.run.workdir == "/w"


def test_given_names_the_flags_of_the_command_line_and_not_those_of_a_flagfile(tmp_path):
    file = write(tmp_path / "a.cfg", "--train_steps=20000")
    # A flag that repeats its default was given all the same.
    assert parse(f"--flagfile={file}", "--nodry_run").given == {"dry_run"}
    assert parse("--flagfile", str(file), "--seed=0").given == {"seed"}


def test_the_command_line_overrides_the_flagfile_and_the_last_value_wins(tmp_path):
    file = write(tmp_path / "a.cfg", "--seed=1", "--seed=2", "--width=8")
    assert parse(f"--flagfile={file}").config.run.seed == 2
    assert parse(f"--flagfile={file}", "--seed=3", "--seed=4").config.run.seed == 4
    assert parse("--flagfile", file, "--seed=3").config.model.width == 8
    # The place in the line decides, not the kind: a file after a flag overrides it.
    assert parse("--seed=3", f"--flagfile={file}").config.run.seed == 2


def test_a_nested_flagfile_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    write(tmp_path / "configs" / "base.cfg", "--seed=1", "--width=8")
    write(tmp_path / "configs" / "deep" / "run.cfg", "--flagfile=../base.cfg", "--seed=2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = parse("--flagfile=../configs/deep/run.cfg").config
    assert (config.run.seed, config.model.width) == (2, 8)
    assert config.run.workdir == "runs/run"


def test_one_flagfile_may_be_named_twice_when_it_does_not_include_itself(tmp_path):
    base = write(tmp_path / "base.cfg", "--seed=1")
    write(tmp_path / "a.cfg", "--flagfile=base.cfg", "--width=8")
    assert parse(f"--flagfile={base}", f"--flagfile={tmp_path / 'a.cfg'}").config.model.width == 8


@pytest.mark.parametrize("middle", [(), ("b.cfg",)])
def test_a_flagfile_that_includes_itself_is_refused(tmp_path, middle):
    names = ("a.cfg", *middle, "a.cfg")
    for name, included in zip(names, names[1:], strict=False):
        write(tmp_path / name, f"--flagfile={included}")
    message = refusal(f"--flagfile={tmp_path / 'a.cfg'}")
    assert "--flagfile=a.cfg includes itself" in message
    assert "take one of the two lines out" in message


def test_comments_and_empty_lines_of_a_flagfile_are_skipped(tmp_path):
    file = write(tmp_path / "a.cfg", "# --seed=1", "", "   ", "// --seed=2", "  --width=8  ")
    parsed = parse(f"--flagfile={file}")
    assert parsed.config.model.width == 8 and parsed.config.run.seed == 0


def test_an_unreadable_flagfile_is_refused_with_its_path_and_the_reason(tmp_path):
    message = refusal(f"--flagfile={tmp_path / 'none.cfg'}")
    assert str(tmp_path / "none.cfg") in message and "No such file" in message
    assert "Is a directory" in refusal(f"--flagfile={tmp_path}")
    (tmp_path / "binary.cfg").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(f"--flagfile={tmp_path / 'binary.cfg'}")


def test_a_line_that_is_not_a_flag_is_refused_with_file_and_line(tmp_path):
    file = write(tmp_path / "a.cfg", "--seed=1", "width = 8")
    message = refusal(f"--flagfile={file}")
    assert str(file) in message and "'width = 8'" in message and "--name=value" in message


def test_flagfile_without_a_file_is_refused():
    assert "--flagfile needs a file" in refusal("--seed=3", "--flagfile")


def test_an_unknown_flag_is_refused_with_its_name_and_where_to_look():
    message = refusal("--batchsize=3")
    assert "batchsize" in message and "python -m gan_dist.train --help" in message


def test_an_unknown_flag_in_a_flagfile_is_refused(tmp_path):
    assert "batchsize" in refusal(f"--flagfile={write(tmp_path / 'a.cfg', '--batchsize=3')}")


def test_a_word_that_is_not_a_flag_is_refused():
    assert "'mnist' is not a flag" in refusal("--seed=3", "mnist")


@pytest.mark.parametrize("argument", ["--seed=three", "--generator_lr=fast", "--conditional=perhaps", "--seed=1.5"])
def test_a_value_of_another_type_is_refused_with_flag_and_value(argument):
    name, value = argument.removeprefix("--").split("=")
    message = refusal(argument)
    assert name in message and value in message


def test_a_value_that_breaks_its_rule_is_refused():
    assert refusal("--train_steps=0").startswith("--train_steps=0 is too small")


def test_the_workdir_is_named_after_the_last_flagfile_of_the_command_line(tmp_path):
    write(tmp_path / "base.cfg", "--width=8")
    run = write(tmp_path / "a100x4.cfg", "--flagfile=base.cfg")
    assert parse(f"--flagfile={run}").config.run.workdir == "runs/a100x4"
    assert parse(f"--flagfile={run}", f"--flagfile={tmp_path / 'base.cfg'}").config.run.workdir == "runs/base"


def test_a_workdir_in_a_flagfile_counts_and_the_command_line_overrides_it(tmp_path):
    file = write(tmp_path / "a.cfg", "--workdir=/from/file")
    assert parse(f"--flagfile={file}").config.run.workdir == "/from/file"
    assert parse(f"--flagfile={file}", "--workdir=/from/line").config.run.workdir == "/from/line"


def test_configs_of_the_package_are_found_from_any_folder_and_a_local_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "packaged_configs", lambda: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "package" / "some.cfg", "--seed=1")
    assert parse("--flagfile=configs/some.cfg").config.run.seed == 1
    write(tmp_path / "configs" / "some.cfg", "--seed=2")
    assert parse("--flagfile=configs/some.cfg").config.run.seed == 2


def test_an_entry_points_own_flags_come_back_beside_the_common_ones(tmp_path):
    file = write(tmp_path / "a.cfg", "--seed=3", "--num_images=25")
    parsed = cli.parse([f"--flagfile={file}", "--nouse_ema"], "sample", SampleConfig)
    assert parsed.own == SampleConfig(num_images=25, use_ema=False)
    assert parsed.config.run.seed == 3
    assert parsed.given == {"use_ema"}


def test_own_flags_obey_their_rules_and_are_unknown_to_other_entry_points():
    with pytest.raises(UsageError, match="--num_images=0 is too small; give at least 1 images"):
        cli.parse(["--num_images=0"], "sample", SampleConfig)
    assert "num_images" in refusal("--num_images=25")


def help_text(*argv: str, own: type | None = None) -> str:
    with pytest.raises(cli.HelpRequested) as requested:
        cli.parse(argv, "train", own)
    return str(requested.value)


def help_entries(text: str) -> dict[str, str]:
    """What the help says of each flag, on one line."""
    entries: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("  --"):
            name = line.strip().removeprefix("--").removeprefix("[no]")
            entries[name] = ""
        elif line.startswith("      "):
            entries[name] += " " + line.strip()
    return entries


@pytest.mark.parametrize(
    "argv", [("--help",), ("-h",), ("--helpfull",), ("--seed=3", "--help"), ("--nonsense", "-help")]
)
def test_help_is_given_wherever_it_is_asked_for(argv):
    assert help_text(*argv).startswith("usage: python -m gan_dist.train")


def test_help_lists_every_flag_once_with_unit_and_default():
    text = help_text("--help", own=SampleConfig)
    entries = help_entries(text)
    settings = [*config_lib.settings(), *config_lib.settings(("own", SampleConfig))]
    assert list(entries) == [*(s.name for s in settings), "flagfile"]
    for setting in settings:
        entry = entries[setting.name]
        assert "default: " in entry, setting.name
        if setting.type in (int, float):
            assert f"{setting.option.unit or 'no unit'}; default: {setting.default}" in entry, setting.name
        for choice in setting.option.choices:
            assert choice in entry, setting.name


@pytest.mark.parametrize(
    "name, end",
    [
        ("train_steps", "(steps; default: 20000)"),
        ("dry_run", "(default: false)"),
        ("workdir", "(path; default: none)"),
        ("resolution", "(28|32|64; pixels; default: 28; part of the model)"),
        ("seed", "(no unit; default: 0; part of the model)"),
        ("checkpoint_every_secs", "(seconds; default: 600.0)"),
    ],
)
def test_help_shows_choices_unit_default_and_identity(name, end):
    assert help_entries(help_text("--help"))[name].endswith(end)


def test_help_shows_how_a_boolean_is_turned_off_and_fits_a_terminal():
    text = help_text("--help")
    assert "\n  --[no]conditional\n" in text
    assert max(map(len, text.splitlines())) <= 120


def exit_of_run(main, monkeypatch, *argv: str) -> object:
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with pytest.raises(SystemExit) as left:
        cli.run(main)
    return left.value.code


def test_run_hands_over_the_arguments_and_leaves_with_0(monkeypatch):
    seen: list[str] = []
    assert exit_of_run(seen.extend, monkeypatch, "--seed=3", "--dry_run") == 0
    assert seen == ["--seed=3", "--dry_run"]


def test_run_prints_help_and_leaves_with_0(monkeypatch, capsys):
    assert exit_of_run(lambda argv: parse(*argv), monkeypatch, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") and err == ""


@pytest.mark.parametrize(
    "error, code",
    [(UsageError, 64), (CheckpointError, 65), (Diverged, 65), (EnvironmentFault, 78), (PeerLost, 171)],
)
def test_run_prints_a_known_error_without_a_traceback_and_leaves_with_its_code(error, code, monkeypatch, capsys):
    def main(argv):
        raise error("the flag, the value, the rule, the way out")

    assert exit_of_run(main, monkeypatch) == code
    assert capsys.readouterr() == ("", "gan_dist: the flag, the value, the rule, the way out\n")


def test_run_leaves_with_130_when_interrupted(monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert exit_of_run(main, monkeypatch) == 130
    assert "interrupted" in capsys.readouterr().err


def test_run_lets_an_unknown_error_through(monkeypatch):
    def main(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ZeroDivisionError):
        cli.run(main)


_ENTRY = """
import sys
from gan_dist import cli

def main(argv):
    try:
        cli.parse(argv, "train")
    finally:
        heavy = {"tensorflow", "keras", "numpy"} & set(sys.modules)
        if heavy:
            sys.exit(f"imported {sorted(heavy)}")

cli.run(main)
"""


@pytest.mark.parametrize(
    "argument, code, stdout, stderr",
    [
        ("--help", 0, "usage: ", ""),
        ("--train_steps=0", 64, "", "gan_dist: --train_steps=0 is too small; give at least 1 steps.\n"),
        ("--nonsense=1", 64, "", "gan_dist: Unknown command line flag 'nonsense'"),
    ],
)
def test_help_and_refusals_leave_the_process_with_their_code_before_tensorflow(argument, code, stdout, stderr):
    done = subprocess.run(
        [sys.executable, "-c", _ENTRY, argument],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr[: len(stderr) or None]) == (code, stderr)
    assert done.stdout.startswith(stdout)
