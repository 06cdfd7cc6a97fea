"""Parse the command line and YAML files into a validated Config; all problems are reported in one error.

Precedence: defaults < files in the given order < `--section.key value`. jsonargparse converts and type-checks the values.
The YAML node tree is read here, for line numbers, repeated keys and suggestions for misspelt keys.
"""

import contextlib
import dataclasses
import difflib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

import resilient_t5
from resilient_t5.config.schema import REMOVED_KEYS, Config
from resilient_t5.errors import ConfigError, ExitCode

SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
KEYS = tuple(f"{name}.{key.name}" for name, section in SECTIONS.items() for key in dataclasses.fields(section))
COMMAND_LINE = "command line"
CONFIG_FILE = "config.yaml"
EXIT_CODES = (
    "exit codes: 0 finished or saturated; 2 usage or configuration; 65 bad data; 66 no valid checkpoint; 69 run directory "
    "in use by another run; 70 diverged; 71 out of memory; 73 disk full; 74 input/output; 75 stopped but resumable; "
    "78 resume would change the mathematics; 129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM with the state saved"
)


@dataclass(frozen=True)
class Given:
    """One setting as written by the user; `where` is `command line` or file:line."""

    key: str
    text: str
    where: str


@dataclass(frozen=True)
class Arguments:
    """A validated configuration, the source of each given setting, and the values of the command's own options."""

    config: Config
    sources: dict[str, str]
    flags: dict[str, Any]


def parse_arguments(
    argv: Sequence[str], program: str, description: str, flags: Sequence[tuple[str, dict[str, Any]]] = ()
) -> Arguments:
    """Parse `argv` and the files given with --config.

    Args:
        argv: command line without the program name.
        program: name of the launcher, for `--help`.
        description: purpose of the command, for `--help`.
        flags: options of the command itself, as (name, keywords of add_argument).

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, contradictions.
        SystemExit: with 0, after --help, --version or --print_config.
    """
    parser = _build_parser(program, description, flags)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(ExitCode.OK)
    if "--version" in argv:
        sys.stdout.write(f"resilient_t5 {resilient_t5.__version__}\n")
        raise SystemExit(ExitCode.OK)
    collector = _Collector([name for name, _ in flags])
    collector.read_arguments(argv)
    given = collector.given
    if collector.problems:
        raise ConfigError(*collector.problems, *_wrong_values(parser, given))
    try:
        settings = [f"--{item.key}={item.text}" for item in given]
        namespace = _parse_quietly(parser, [*settings, *collector.option_arguments])
    except Exception as error:  # noqa: BLE001  jsonargparse raises several types
        raise ConfigError(*(_wrong_values(parser, given) or [str(error).replace("\n", " ")])) from None
    config = _instantiate(namespace)
    if "--print_config" in argv:
        sys.stdout.write(config_text(config))
        raise SystemExit(ExitCode.OK)
    names = [name.lstrip("-") for name, _ in flags]
    return Arguments(config, {item.key: item.where for item in given}, {name: namespace.get(name) for name in names})


def parse_config(argv: Sequence[str], program: str, description: str) -> Config:
    """Configuration of a command without options of its own; see `parse_arguments`."""
    return parse_arguments(argv, program, description).config


def run_config(run: Path, program: str) -> Config:
    """The configuration in config.yaml of the run directory `run`, with `run.dir` as given now."""
    config = parse_config(["--config", str(run / CONFIG_FILE)], program, "")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run)))


def config_text(config: Config) -> str:
    """All settings as YAML; read back, it gives an equal configuration."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)


def _build_parser(program: str, description: str, flags: Sequence[tuple[str, dict[str, Any]]]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"bin/{program}",
        usage=f"bin/{program} --config FILE [--section.key VALUE ...]",
        description=f"{description} Settings: YAML files, then --section.key VALUE; later ones override earlier ones.",
        epilog=EXIT_CODES,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--config", action="config", help="YAML file with settings; repeatable, later files override")
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


class _Collector:
    """Collects settings in ascending precedence, the options of the command, and problems other than invalid values."""

    def __init__(self, options: Sequence[str]):
        self.options = options
        self.given: list[Given] = []
        self.option_arguments: list[str] = []
        self.problems: list[str] = []

    def read_arguments(self, argv: Sequence[str]) -> None:
        """Read the command line and the files given with --config."""
        known = {f"--{key}" for key in (*KEYS, *REMOVED_KEYS)} | {"--config", *self.options}
        remaining, first_override = list(argv), ""
        while remaining:
            name, separator, text = remaining.pop(0).partition("=")
            if name == "--print_config":
                continue
            if name not in known:
                self.problems.append(_unknown(name.removeprefix("--"), COMMAND_LINE, is_option=name.startswith("--")))
                if not separator and remaining and not remaining[0].startswith("--"):
                    remaining.pop(0)
                continue
            if not separator and not remaining:
                self.problems.append(f"{name} needs a value")
                return
            text = text if separator else remaining.pop(0)
            if name == "--config":
                if first_override:
                    self.problems.append(f"--config {text} must come before {first_override}; otherwise it would override it")
                self.read_file(Path(text))
            elif name in self.options:
                self.option_arguments.append(f"{name}={text}")
            else:
                first_override = first_override or name
                self.add(name.removeprefix("--"), text, COMMAND_LINE)

    def read_file(self, path: Path) -> None:
        """Read a YAML file."""
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            self.problems.append(f"cannot read the configuration {path}: {reason}")
            return
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            self.problems.append(f"{where} is not valid YAML: {getattr(error, 'problem', error)}")
            return
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            self.problems.append(f"{path} contains no settings; write sections such as 'data:' with indented keys")
            return
        for section, body in self._entries(root, path, ""):
            if isinstance(body, yaml.MappingNode):
                for key, value in self._entries(body, path, f"{section}."):
                    self.add(key, _node_text(value), f"{path}:{value.start_mark.line + 1}")
            elif section in SECTIONS:
                self.problems.append(f"{section} ({path}) needs indented keys")
            else:
                self.problems.append(_unknown(section, f"{path}:{body.start_mark.line + 1}", is_option=False))

    def add(self, key: str, text: str, where: str) -> None:
        """Add a setting, or a problem if it does not exist (any more); a removed setting without effect is ignored."""
        if key in KEYS:
            self.given.append(Given(key, text, where))
        elif key not in REMOVED_KEYS:
            self.problems.append(_unknown(key, where, is_option=False))
        elif _value_of(text) not in REMOVED_KEYS[key].inert:
            self.problems.append(f"{key}: {text} is no longer a setting ({where}). {REMOVED_KEYS[key].hint}")

    def _entries(self, node: yaml.MappingNode, path: Path, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
        """Keys and value nodes of a mapping; repeated keys are a problem, since YAML silently uses the last one."""
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
            if key in seen:
                self.problems.append(f"{key} is given twice ({path}:{seen[key]} and {path}:{line})")
            seen[key] = line
            yield key, value


def _node_text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag.endswith(":null") else str(node.value)
    return str(yaml.serialize(node, Dumper=yaml.SafeDumper)).strip()


def _value_of(text: str) -> Any:
    """The value of a setting as YAML reads it; the text itself if it is not valid YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _unknown(key: str, where: str, *, is_option: bool) -> str:
    last = {name.rpartition(".")[2]: name for name in reversed(KEYS)}
    nearest = difflib.get_close_matches(key, [*KEYS, *SECTIONS], n=1, cutoff=0.75)
    if not nearest:
        nearest = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.75)]
    hint = f"Did you mean {'--' if is_option else ''}{nearest[0]}?" if nearest else "See --help for all settings"
    if not is_option and "=" not in key and where == COMMAND_LINE:
        return f"{key!r} is not an option ({where}); write settings as --section.key value"
    return f"{key} is not a setting ({where}). {hint}"


def _wrong_values(parser: ArgumentParser, given: Sequence[Given]) -> list[str]:
    """Problems of values: settings with a wrong type, and range problems among the others."""
    problems, valid = [], []
    for item in given:
        try:
            _parse_quietly(parser, [f"--{item.key}={item.text}"])
            valid.append(f"--{item.key}={item.text}")
        except Exception as error:  # noqa: BLE001  as in parse_arguments
            expected = str(error).partition("Expected a")[2].partition(". Got value")[0]
            expected = expected.strip().removeprefix("typing.").replace("<class '", "").replace("'>", "")
            hint = ". YAML reads an unquoted yes, no, on, off as a boolean" if item.text in ("no", "off", "yes", "on") else ""
            problems.append(f"{item.key}: {item.text!r} is not a valid value ({item.where}); expected {expected}{hint}")
    try:
        _instantiate(_parse_quietly(parser, valid))
    except ConfigError as error:
        problems += error.problems
    return problems
