"""Imports point strictly down, and the modules that answer a wrong flag stay light."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gan_dist

PACKAGE = Path(gan_dist.__file__).parent

# A module imports from lower layers alone. A package within the package (`datasets`) stands for all its modules.
LAYERS = (
    {"errors", "supervision"},
    {"config", "cluster", "losses"},
    {"layout", "cli", "rng", "images", "workdir"},
    {"strategy", "datasets", "models", "optimizers", "lock", "rendezvous"},
    {"data", "state"},
    {"step", "checkpoints", "summaries"},
    {"sample"},
    {"loop"},
    {"train"},
)
LAYER_OF = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}

# What answers --help and refuses a flag: without anything that takes seconds to import.
LIGHT = ("cli", "cluster", "config", "errors", "layout", "lock", "rendezvous", "supervision", "workdir")
HEAVY = {"tensorflow", "keras", "numpy", "tensorboard"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it, `datasets.mnist` for one."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join([*folders, name] if name != "__init__" else folders)] = path
    return found


MODULES = modules()


def imported_by(source: str, module: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it, relative imports made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                around = ["gan_dist", *module.split(".")][: -node.level]
                base = ".".join([*around, *([base] if base else [])])
            # `from gan_dist import rng` imports a module, `from gan_dist.rng import key` a name of one.
            yield from (f"{base}.{alias.name}" if base == "gan_dist" else base for alias in node.names)


def inside(names: Iterator[str]) -> set[str]:
    """Of imported names those of this package, as keys of LAYER_OF."""
    return {name.split(".")[1] for name in names if name.startswith("gan_dist.")}


def imports_of(module: str) -> set[str]:
    return inside(imported_by(MODULES[module].read_text(encoding="utf-8"), module))


def test_imports_are_found_in_every_form_and_inside_functions():
    source = """
import os, gan_dist.rng
from gan_dist import config as config_lib, cli
from gan_dist.datasets import mnist
from . import state
from .step import compile_block
def function():
    if True:
        from gan_dist.loop import train
        import tensorflow as tf
"""
    assert inside(imported_by(source, "data")) == {"rng", "config", "cli", "datasets", "state", "step", "loop"}
    assert {"os", "tensorflow"} <= set(imported_by(source, "data"))
    assert inside(imported_by("from .. import rng\nfrom ..config import Config", "datasets.mnist")) == {"rng", "config"}


def test_the_package_is_found():
    assert {"errors", "step", "datasets.mnist"} <= set(MODULES)


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_every_module_has_a_layer(module):
    assert module.split(".")[0] in LAYER_OF, f"gan_dist/{module} has no layer; give it one in LAYERS."


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_imports_point_strictly_down(module):
    depth = LAYER_OF[module.split(".")[0]]
    for imported in imports_of(module):
        assert LAYER_OF[imported] < depth, (
            f"{module} (layer {depth}) imports {imported} (layer {LAYER_OF[imported]}). "
            "Move what they share to a lower layer, or pass it in."
        )


def test_importing_the_package_imports_nothing():
    assert not list(imported_by(MODULES[""].read_text(encoding="utf-8"), ""))


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_no_module_is_imported_by_a_string(module):
    names = {
        n.id if isinstance(n, ast.Name) else n.attr for n in nodes(module) if isinstance(n, ast.Name | ast.Attribute)
    }
    assert not names & {"import_module", "__import__"}


def nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_name_nothing_heavy(module):
    tops = {name.split(".")[0] for name in imported_by(MODULES[module].read_text(encoding="utf-8"), module)}
    assert not tops & HEAVY
    # The flags are absl's; everything else is the standard library.
    allowed = {"gan_dist", *sys.stdlib_module_names} | ({"absl"} if module == "cli" else set())
    assert tops <= allowed


def test_importing_the_light_modules_imports_nothing_heavy():
    lines = "".join(f"import gan_dist.{module}\n" for module in LIGHT)
    done = subprocess.run(
        [sys.executable, "-c", f"{lines}import sys\nprint(*sorted({HEAVY!r} & set(sys.modules)))"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", [m for m in MODULES if m != "strategy"])
def test_only_strategy_names_a_strategy_class(module):
    # `tf.distribute.Strategy`, the type that all of them share, may be named everywhere.
    named = {
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in nodes(module)
        if isinstance(n, ast.Attribute | ast.Name)
    }
    assert not {name for name in named if re.fullmatch(r"[A-Z]\w*Strategy(V\d)?", name)}


def test_strategy_names_the_classes():
    named = {n.attr for n in nodes("strategy") if isinstance(n, ast.Attribute)}
    assert {"OneDeviceStrategy", "MirroredStrategy", "MultiWorkerMirroredStrategy"} <= named
