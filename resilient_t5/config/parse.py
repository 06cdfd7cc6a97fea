"""The command line and YAML files -> one checked Config, with every problem told at once.

Order: defaults < files in the order given < `--section.key value`. jsonargparse reads and types the values; the YAML
node tree gives the line of each key, finds repeated keys, and lets a misspelt key name its nearest neighbour.
"""

import contextlib
import dataclasses
import difflib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

import resilient_t5
from resilient_t5.config.schema import REMOVED_KEYS, Config, flat
from resilient_t5.errors import ConfigError, ExitCode

SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
KEYS = tuple(f"{name}.{key.name}" for name, section in SECTIONS.items() for key in dataclasses.fields(section))
EXIT_CODES = (
    "exit codes: 0 finished or saturated; 2 usage or configuration; 65 bad data; 66 no valid checkpoint; 69 run directory "
    "held by another run; 70 diverged; 71 out of memory; 73 disk full; 74 input/output; 75 stopped but resumable; "
    "78 resume would change the mathematics; 129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM with the state saved"
)


@dataclass(frozen=True)
class Given:
    """One setting as the user wrote it."""

    key: str
    text: str
    where: str


@dataclass(frozen=True)
class Arguments:
    """A checked configuration and where each value that was given came from."""

    config: Config
    sources: dict[str, str]
    flags: dict[str, Any]


def parse_arguments(
    argv: Sequence[str], program: str, description: str, flags: Sequence[tuple[str, dict[str, Any]]] = ()
) -> Arguments:
    """Read `argv` and the files it names.

    Args:
        argv: the command line without the program's name.
        program: launcher's name, for messages and `--help`.
        description: what the command does, for `--help`.
        flags: further options as (name, keywords of add_argument), such as ("--dry_run", {...}).

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, contradictions; all of them in one error.
        SystemExit: after --help, --version or --print_config, with 0.
    """
    parser = _build_parser(program, description, flags)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(ExitCode.OK)
    if "--version" in argv:
        sys.stdout.write(f"resilient_t5 {resilient_t5.__version__}\n")
        raise SystemExit(ExitCode.OK)
    given, flag_arguments, problems = _collect(argv, [name for name, _ in flags])
    if problems:
        raise ConfigError(*problems, *_wrong_values(parser, given))
    try:
        namespace = _parse_quietly(parser, [*(f"--{item.key}={item.text}" for item in given), *flag_arguments])
    except Exception as error:  # noqa: BLE001  jsonargparse raises several types; all of them become one message
        raise ConfigError(*(_wrong_values(parser, given) or [str(error).replace("\n", " ")])) from None
    config = _instantiate(namespace)
    if "--print_config" in argv:
        sys.stdout.write(config_text(config))
        raise SystemExit(ExitCode.OK)
    names = [name.lstrip("-") for name, _ in flags]
    return Arguments(config, {item.key: item.where for item in given}, {name: namespace.get(name) for name in names})


def parse_config(argv: Sequence[str], program: str, description: str) -> Config:
    """`parse_arguments` for a command without options of its own."""
    return parse_arguments(argv, program, description).config


def config_text(config: Config) -> str:
    """The whole configuration as YAML that starts an equal run."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)


def differences(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, as {"section.key": value}."""
    defaults = flat(Config())
    return {key: value for key, value in flat(config).items() if value != defaults[key]}


def _build_parser(program: str, description: str, flags: Sequence[tuple[str, dict[str, Any]]]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"bin/{program}",
        usage=f"bin/{program} --config FILE [--section.key VALUE ...]",
        description=f"{description} Settings come from YAML files and from --section.key VALUE; later ones win, files first.",
        epilog=EXIT_CODES,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times, later wins")
    for name, keywords in flags:
        parser.add_argument(name, **keywords)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


def _parse_quietly(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    with contextlib.redirect_stderr(io.StringIO()):
        return parser.parse_args(list(argv))


def _instantiate(namespace: Namespace) -> Config:
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for name, section in SECTIONS.items():
        try:
            sections[name] = section(**namespace[name].as_dict())
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    return Config(**sections)


def _collect(argv: Sequence[str], flags: Sequence[str]) -> tuple[list[Given], list[str], list[str]]:
    """The settings in order of precedence, the arguments that are flags, and the problems of form.

    Problems of form are unknown, repeated and removed keys, unreadable files, and files after overrides.
    """
    given: list[Given] = []
    flag_arguments: list[str] = []
    problems: list[str] = []
    known = {f"--{key}" for key in KEYS} | {"--config", "--print_config", *flags}
    overridden = ""
    position = 0
    while position < len(argv):
        name, separator, text = argv[position].partition("=")
        position += 1
        if name == "--print_config":
            continue
        if (key := name.removeprefix("--")) in REMOVED_KEYS:
            if not separator and position < len(argv):
                text, position = argv[position], position + 1
            problems += _removed(key, text, "command line")
            continue
        if name not in known:
            problems.append(_unknown(name.removeprefix("--"), "command line", is_option=name.startswith("--")))
            position += 0 if separator or position >= len(argv) or argv[position].startswith("--") else 1
            continue
        if not separator:
            if position >= len(argv):
                problems.append(f"{name} wants a value")
                break
            text, position = argv[position], position + 1
        if name == "--config":
            if overridden:
                problems.append(f"--config {text} stands behind {overridden} and would silently win; put --config first")
            given_in_file, problems_in_file = _read_file(Path(text))
            given += given_in_file
            problems += problems_in_file
        elif name in flags:
            flag_arguments.append(f"{name}={text}")
        else:
            overridden = overridden or name
            given.append(Given(key, text, "command line"))
    return given, flag_arguments, problems


def _read_file(path: Path) -> tuple[list[Given], list[str]]:
    """The settings of one YAML file, each with its line."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        return [], [f"cannot read the configuration {path}: {reason}"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return [], [f"{path}{f':{mark.line + 1}' if mark else ''} is not valid YAML: {getattr(error, 'problem', error)}"]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{path} holds no settings; write sections such as 'data:' with keys below them"]
    given: list[Given] = []
    problems: list[str] = []
    for section, body in _entries(root, path, "", problems):
        if not isinstance(body, yaml.MappingNode):
            problem = _unknown(section, f"{path}:{body.start_mark.line + 1}", is_option=False)
            problems.append(problem if section not in SECTIONS else f"{section} ({path}) wants keys below it")
            continue
        for key, value in _entries(body, path, f"{section}.", problems):
            where = f"{path}:{value.start_mark.line + 1}"
            if key in KEYS:
                given.append(Given(key, _node_text(value), where))
            elif key in REMOVED_KEYS:
                problems += _removed(key, _node_text(value), where)
            else:
                problems.append(_unknown(key, where, is_option=False))
    return given, problems


def _entries(node: yaml.MappingNode, path: Path, prefix: str, problems: list[str]) -> list[tuple[str, yaml.Node]]:
    """Key and value nodes of a mapping; a repeated key is a problem, since YAML would let the last one win silently."""
    seen: dict[str, int] = {}
    entries = []
    for key_node, value in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            problems.append(f"{key} stands twice ({path}:{seen[key]} and {path}:{line})")
        seen[key] = line
        entries.append((key, value))
    return entries


def _node_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag.endswith(":null") else str(node.value)
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper)).strip()


def _unknown(key: str, where: str, *, is_option: bool) -> str:
    last = {name.rpartition(".")[2]: name for name in reversed(KEYS)}
    nearest = difflib.get_close_matches(key, [*KEYS, *SECTIONS], n=1, cutoff=0.75)
    if not nearest:
        nearest = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.75)]
    hint = f"Did you mean {'--' if is_option else ''}{nearest[0]}?" if nearest else "See --help for all settings"
    if not is_option and "=" not in key and where == "command line":
        return f"{key!r} is no option ({where}); settings are written --section.key value"
    return f"{key} is not a setting ({where}). {hint}"


def _removed(key: str, text: str, where: str) -> list[str]:
    """The problem of a setting that this version no longer has; none for a value that had no effect."""
    removed = REMOVED_KEYS[key]
    if yaml.safe_load(text) in removed.inert:
        return []
    return [f"{key}: {text} is no longer a setting ({where}). {removed.hint}"]


def _wrong_values(parser: ArgumentParser, given: Sequence[Given]) -> list[str]:
    """The problems of value: what a setting does not take, and, among the others, what is out of its range."""
    problems, good = [], []
    for item in given:
        try:
            _parse_quietly(parser, [f"--{item.key}={item.text}"])
            good.append(f"--{item.key}={item.text}")
        except Exception as error:  # noqa: BLE001  as in parse_arguments
            expected = str(error).partition("Expected a")[2].partition(". Got value")[0]
            expected = expected.strip().removeprefix("typing.").replace("<class '", "").replace("'>", "")
            hint = ". YAML reads an unquoted yes, no, on, off as a boolean" if item.text in ("no", "off", "yes", "on") else ""
            problems.append(f"{item.key}: {item.text!r} is not a valid value ({item.where}); expected {expected}{hint}")
    try:
        _instantiate(_parse_quietly(parser, good))
    except ConfigError as error:
        problems += error.problems
    return problems
