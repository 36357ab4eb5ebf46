"""The command line: flags generated from `config.py`. The only reader of flag values."""

import contextlib
import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from gan_dist import config as config_lib
from gan_dist.config import Config, Setting
from gan_dist.errors import GanDistError, UsageError


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What the command line said.

    Attributes:
        config: All common settings, defaults filled in. Each value obeys its own rule; rules that join several are
            checked by `config.check`.
        own: The entry point's own settings, an instance of the class given to `parse`, or None.
        given: Names of the flags that were on the command line itself, not in a flagfile.
    """

    config: Config
    own: Any
    given: frozenset[str]


class HelpRequested(Exception):
    """--help was given; the text is the exception's message."""


def parse(argv: Sequence[str], entry: str, own: type | None = None) -> Parsed:
    """Reads a command line (without the program's name).

    Args:
        argv: Flags. `--flagfile=F` reads more of them from a file, also inside one, where F is relative to it.
        entry: Module of the entry point, for messages: `train`.
        own: A dataclass of further flags that only this entry point has.

    Raises:
        UsageError: For an unknown flag, a value that breaks its rule, an unreadable flagfile.
        HelpRequested: For --help.
    """
    settings = list(config_lib.settings())
    if own:
        settings += config_lib.settings(("own", own))
    values = _flag_values(settings)
    if any(a in ("--help", "-help", "-h", "--helpfull") for a in argv):
        raise HelpRequested(_help(entry, settings))
    flagfiles: list[Path] = []
    arguments = list(_expand(argv, (), flagfiles))
    typed = _flag_values(settings)
    try:
        rest = values(["gan_dist", *arguments])[1:]
        typed(["gan_dist", *_without_flagfiles(argv)])
    except flags.Error as error:
        raise UsageError(f"{_sentence(str(error))} `python -m gan_dist.{entry} --help` lists all flags.") from error
    if rest:
        raise UsageError(f"{rest[0]!r} is not a flag; write --name=value. `--help` lists all flags.")
    given = frozenset(s.name for s in settings if typed[s.name].present)
    fields: dict[str, dict[str, Any]] = {}
    for setting in settings:
        value = values[setting.name].value
        config_lib.check_value(setting, value)
        fields.setdefault(setting.section, {})[setting.name] = value
    own_value = own(**fields.pop("own")) if own else None
    config = config_lib.from_dict(fields)
    if not config.run.workdir:
        stem = flagfiles[-1].stem if flagfiles else "default"
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, workdir=f"runs/{stem}"))
    return Parsed(config, own_value, given)


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Calls an entry point with the process's arguments and leaves with its exit code."""
    code = 0
    # The exit code must not depend on whether somebody still reads the output.
    with contextlib.suppress(BrokenPipeError):
        try:
            main(sys.argv[1:])
        except HelpRequested as help_text:
            print(help_text, flush=True)
        except GanDistError as error:
            code = error.exit_code
            print(f"gan_dist: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            code = 130
            print("gan_dist: interrupted; the same command goes on from the last commit.", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def packaged_configs() -> Path:
    """The folder of the flagfiles that come with the package: inside it when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _expand(arguments: Sequence[str], chain: tuple[Path, ...], top: list[Path]) -> Iterator[str]:
    """The arguments with every flagfile in its place replaced by its lines.

    `chain` holds the files that we are inside of; `top` gets those that the command line itself names.
    """
    waiting = False
    for argument in arguments:
        if waiting:
            name, waiting = argument, False
        elif argument in ("--flagfile", "-flagfile"):
            waiting = True
            continue
        elif argument.startswith(("--flagfile=", "-flagfile=")):
            name = argument.split("=", 1)[1]
        elif argument.lstrip("-").startswith("undefok"):
            # absl's own way to let misspelt flags pass.
            raise UsageError(f"{argument} is not a flag of gan_dist: every flag must be known; take it out.")
        else:
            yield argument
            continue
        path = _find(name, chain[-1] if chain else None)
        if path in chain:
            raise UsageError(f"--flagfile={name} includes itself; take one of the two lines out.")
        if not chain:
            top.append(path)
        yield from _expand(_lines(path), (*chain, path), top)
    if waiting:
        raise UsageError("--flagfile needs a file; write --flagfile=configs/quickstart.cfg.")


def _without_flagfiles(arguments: Sequence[str]) -> list[str]:
    kept = [a for a in arguments if not a.startswith(("--flagfile=", "-flagfile="))]
    return [a for before, a in zip(["", *kept], kept, strict=False) if not {a, before} & {"--flagfile", "-flagfile"}]


def _find(name: str, including: Path | None) -> Path:
    if not name or "\0" in name:
        raise UsageError(f"--flagfile={name!r} is not the name of a file; write --flagfile=configs/quickstart.cfg.")
    path = Path(name) if including is None else including.parent / name
    if including is None and not path.exists() and path.parts[:1] == ("configs",):
        # Outside a checkout: the file of that name in the installed package.
        path = packaged_configs().joinpath(*path.parts[1:])
    return path.resolve()


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--flagfile={path} cannot be read: {reason}. Give the path of a file of flags.") from error
    lines = [line for line in lines if line and not line.startswith(("#", "//"))]
    for line in lines:
        if not line.startswith("-") or any(c.isspace() for c in line.partition("=")[0]):
            raise UsageError(f"--flagfile={path}: the line {line!r} is not a flag; write --name=value, a flag a line.")
    return lines


def _flag_values(settings: Sequence[Setting]) -> flags.FlagValues:
    values = flags.FlagValues()
    define = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for setting in settings:
        define[setting.type](setting.name, setting.default, setting.option.help, flag_values=values)
    return values


def _help(entry: str, settings: Sequence[Setting]) -> str:
    titles = {f.name: f.type for f in dataclasses.fields(Config)}
    lines = [f"usage: python -m gan_dist.{entry} [--flagfile=configs/quickstart.cfg] [--flag=value ...]"]
    section = ""
    for setting in settings:
        if setting.section != section:
            section = setting.section
            cls = titles.get(section)
            doc = (cls.__doc__ or "").split("\n")[0].strip() if isinstance(cls, type) else f"Flags of {entry} alone."
            lines += ["", doc]
        name = f"--[no]{setting.name}" if setting.type is bool else f"--{setting.name}"
        o = setting.option
        unit = o.unit or ("no unit" if setting.type in (int, float) else "")
        identity = "part of the model" if o.identity else ""
        details = "; ".join(filter(None, ("|".join(o.choices), unit, f"default: {_shown(setting.default)}", identity)))
        lines.append(f"  {name}")
        lines += textwrap.wrap(f"{o.help} ({details})", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += [
        "",
        "  --flagfile",
        "      A file with a flag a line; the last value of a flag wins. Inside a file: relative to that file. (path)",
    ]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default) or "none"


def _sentence(text: str) -> str:
    text = text.replace("FATAL Flags parsing error:", "").replace("\n", " ").strip()
    with contextlib.suppress(IndexError):
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."
