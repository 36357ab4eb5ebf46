"""A run's folder: files that are whole or not there, and what a second command may change."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from gan_dist import config as config_lib
from gan_dist import workdir
from gan_dist.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from gan_dist.errors import CheckpointError, EnvironmentFault, UsageError


def config_in(folder: Path, **sections: object) -> Config:
    run = dataclasses.replace(sections.pop("run", RunConfig()), workdir=str(folder))
    return Config(run=run, **sections)


def store(folder: Path, config: Config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write_whole(folder / workdir.CONFIG, workdir.json_bytes({"config": config_lib.to_dict(config)}))


def test_write_whole_creates_and_replaces_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "file"
    for content in (b"first, and longer", b"second", b""):
        workdir.write_whole(path, content)
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    workdir.write_whole(path, b"old")

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir.os, failing, no_space)
    with pytest.raises(OSError, match="No space left"):
        workdir.write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_content_is_durable_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(workdir.os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(workdir.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    workdir.write_whole(tmp_path / "file", b"content")
    assert calls == [str(tmp_path / "file.partial"), "replace", str(tmp_path)]


def test_json_is_readable_by_people_and_ends_with_a_newline():
    content = workdir.json_bytes({"name": "ü", "n": 1})
    assert content == '{\n  "name": "ü",\n  "n": 1\n}\n'.encode()


def test_a_folder_without_a_run_has_no_configuration(tmp_path):
    assert workdir.read_config(tmp_path) is None
    assert workdir.read_config(tmp_path / "not" / "there") is None


def test_the_stored_configuration_comes_back(tmp_path):
    config = config_in(tmp_path, run=RunConfig(seed=5), model=ModelConfig(width=8))
    store(tmp_path, config)
    assert workdir.read_config(tmp_path) == config


@pytest.mark.parametrize(
    "content",
    [b"", b'{"config": {"run"', b"[]", b"3", b"null", b'{"command": []}', b'{"config": 3}', b'{"config": {"run": 3}}']
    + [b"\xff\xfe"],
)
def test_a_damaged_configuration_is_an_error_with_its_path_and_not_a_new_run(tmp_path, content):
    (tmp_path / workdir.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        workdir.read_config(tmp_path)
    assert str(tmp_path / workdir.CONFIG) in str(refused.value) and "damaged" in str(refused.value)
    assert refused.value.exit_code == 65


def test_a_configuration_of_another_version_is_refused_with_the_setting(tmp_path):
    (tmp_path / workdir.CONFIG).write_text(json.dumps({"config": {"model": {"depth": 3}}}))
    with pytest.raises(UsageError, match=r"model\.depth, which this version does not know"):
        workdir.read_config(tmp_path)


def test_a_configuration_that_may_not_be_read_is_a_fault_of_the_environment(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workdir.Path, "read_text", refuse)
    with pytest.raises(EnvironmentFault, match=r"config\.json cannot be read \(Permission denied\)"):
        workdir.read_config(tmp_path)


def test_a_new_folder_and_an_empty_one_may_be_used_and_the_check_writes_nothing(tmp_path):
    workdir.check_resume(config_in(tmp_path))
    workdir.check_resume(config_in(tmp_path / "not" / "there" / "yet"))
    assert os.listdir(tmp_path) == []


def test_a_relative_workdir_may_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir.check_resume(config_in(Path("runs/a")))


def test_the_same_command_may_resume(tmp_path):
    config = config_in(tmp_path, run=RunConfig(seed=5))
    store(tmp_path, config)
    workdir.check_resume(config)


def test_a_resume_may_change_what_is_not_part_of_the_model(tmp_path):
    store(tmp_path, config_in(tmp_path))
    workdir.check_resume(
        config_in(
            tmp_path,
            run=RunConfig(train_steps=7),
            devices=config_lib.DeviceConfig(strategy="mirrored", num_devices=4, steps_per_loop=3),
            optim=OptimConfig(generator_lr=1e-3),
            loop=config_lib.LoopConfig(log_every_steps=1),
        )
    )


def test_a_resume_with_another_model_is_refused_with_a_line_for_each_setting(tmp_path):
    store(tmp_path, config_in(tmp_path))
    new = config_in(
        tmp_path,
        run=RunConfig(seed=1, train_steps=7),
        data=DataConfig(global_batch_size=64),
        model=ModelConfig(conditional=True),
    )
    with pytest.raises(UsageError) as refused:
        workdir.check_resume(new)
    head, *changes, way_out = str(refused.value).splitlines()
    assert head.startswith(f"--workdir={tmp_path} holds a run of another model")
    assert changes == [
        "  --seed: 0 in the run, 1 now",
        "  --global_batch_size: 128 in the run, 64 now",
        "  --conditional: False in the run, True now",
    ]
    assert "another --workdir" in way_out
    assert refused.value.exit_code == 64


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_file_where_the_folder_should_be_is_a_fault_of_the_environment(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"file is not a folder; give another --workdir"):
        workdir.check_resume(config_in(tmp_path / "file" / below))


@pytest.mark.parametrize("below", ["", "new/run"])
def test_a_folder_that_cannot_be_written_is_a_fault_of_the_environment(tmp_path, monkeypatch, below):
    # Asked of the system, because permission bits do not bind root.
    asked = []
    monkeypatch.setattr(workdir.os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(EnvironmentFault) as refused:
        workdir.check_resume(config_in(tmp_path / below))
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
    assert f"no permission to write in {tmp_path}; give another --workdir" in str(refused.value)
    assert refused.value.exit_code == 78
