"""Writes docs/commands.md from the commands' own argparse parsers; a test compares the two.

Run it after a flag has changed: python docs/make_commands.py
"""

from __future__ import annotations

import argparse
import importlib
import re
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from unittest.mock import patch

from fairchem.core.common.flags import flags

from fairchem_kd.commands.main import COMMANDS
from fairchem_kd.launch.config import make_parser

PAGE = Path(__file__).with_name("commands.md")
CORES, HERE = MACHINES = ("the machine's cores", "the current folder")
_UNLISTED = (argparse._HelpAction, argparse._SubParsersAction)

HEAD = """\
# Command line

<!-- Written by docs/make_commands.py; do not edit. -->

Two commands are installed: `fairchem`, which trains, and `fairchem-kd`, with tools around it.
`--help` after any of them says what stands here. A wrong option, config or file ends in one
sentence on stderr and the exit status 2 ([troubleshooting](troubleshooting.md)).
`eval "$(fairchem-kd --completion bash)"` (or `zsh`) in the start-up file of a shell has it complete
subcommands, options and choices of `fairchem-kd`.

"""

FAIRCHEM = """\
## fairchem

Stock fairchem-core's command with the additions below. `python -m fairchem_kd` is the same,
whatever script is on the PATH.

```
fairchem [main] --mode train --config-yml CONFIG [options] [--KEY=VALUE ...]
```

- A leading `main` is accepted.
- `--KEY=VALUE` overrides a key of the config: `--optim.max_epochs=3`,
  `--task.distillation.losses.n2n=null`. `null`, `true` and `false` are YAML's, which stock takes
  for text.
- Data that the config can build is built before training ([data](data.md)).
- Without a CUDA device, and not submitting to a cluster, it runs as with `--cpu`.
- `--sweep-yml` reads the YAML of [sweeps](sweeps.md).
- `--submit` also works on CPUs, with several ranks and nodes, and without a scheduler; an
  interrupted job goes on ([on a cluster](cluster.md)).

"""


def pages() -> Iterator[str]:
    """Every section, in order."""
    yield HEAD
    yield FAIRCHEM
    stock = {action.dest for action in flags.get_parser()._actions}
    options = [a for a in make_parser()._actions if not isinstance(a, _UNLISTED)]
    yield "An option of ours:\n\n"
    yield _table([a for a in options if a.dest not in stock])
    yield "Stock's options, in its own words:\n\n"
    yield _table([a for a in options if a.dest in stock])
    yield "## fairchem-kd\n\n| command | |\n| --- | --- |\n"
    for name, command in COMMANDS.items():
        yield f"| [`{name}`](#fairchem-kd-{name}) | {command.help} |\n"
    yield "\n"
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser(f"fairchem-kd {name}", description=command.help)
        importlib.import_module(command.module).add_arguments(parser)
        yield from _sections(parser, 3)


def _sections(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    """A parser's section, and those of its subcommands."""
    yield f"{'#' * level} {parser.prog}\n\n"
    yield _text(parser.description or "")
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    yield _usage(parser)
    yield _text(parser.epilog or "")
    own, *titled = _by_group(parser)
    yield _table(own[1])
    for title, actions in titled:
        yield f"{_sentence(title).rstrip().rstrip('.')}:\n\n" + _table(actions)
    for subparsers in below:
        for made in dict.fromkeys(subparsers.choices.values()):
            yield from _sections(made, level + 1)


def _by_group(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """What is to be listed: positionals and plain options first, then each group with a title."""
    plain: list[argparse.Action] = []
    titled = []
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, _UNLISTED)]
        if group.title in ("positional arguments", "options"):
            plain += actions
        elif actions:
            titled.append((group.title or "", actions))
    return [("", plain), *titled]


def _usage(parser: argparse.ArgumentParser) -> str:
    """The command with what it must be given."""
    words = [parser.prog]
    options = False
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if action.option_strings:
            options = options or not action.required
            words += [f"{action.option_strings[-1]} {_value(action)}"] * action.required
        else:
            name = _value(action)
            more = {"+": f"{name} [{name} ...]", "*": f"[{name} ...]", "?": f"[{name}]"}
            words.append(more.get(str(action.nargs), name))
    return f"```\n{' '.join(words + ['[options]'] * options)}\n```\n\n"


def _value(action: argparse.Action) -> str:
    """How the value of an option, or a positional argument, is called."""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return action.dest.upper()


def _table(actions: list[argparse.Action]) -> str:
    if not actions:
        return ""
    rows = ["| option | meaning |", "| --- | --- |"]
    for action in actions:
        names = ", ".join(action.option_strings) or _value(action)
        if action.option_strings and action.nargs != 0:
            names += f" {_value(action)}"
            names += f" [{_value(action)} ...]" if action.nargs in ("+", "*") else ""
        rows.append(f"| `{names}` | {_meaning(action)} |")
    return "\n".join(rows) + "\n\n"


def _meaning(action: argparse.Action) -> str:
    """The help, and what it leaves unsaid: required, choices, default."""
    own = (action.help or "").replace("(default: %(default)s)", "")  # said below, in one form
    text = (own % {**vars(action), "prog": "fairchem-kd"}).strip().rstrip(".")
    parts = [_escaped(text)] if text else []
    if action.choices is not None:
        parts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.required and action.option_strings:
        parts.append("required")
    default = _default(action)
    if default and "(default" not in text and f"({default})" not in text:
        parts.append(f"default: `{default}`" if default not in MACHINES else f"default: {default}")
    return "; ".join(parts)


def _default(action: argparse.Action) -> str:
    """The default in words; empty where there is nothing to say."""
    default = action.default
    if action.dest == "run_dir":
        return HERE
    if default is None or default == argparse.SUPPRESS or action.nargs == 0:
        return ""
    if isinstance(default, list):
        return " ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _text(text: str) -> str:
    """A description or epilog: paragraphs are filled, lines that are indented are commands."""
    parts = []
    for paragraph in text.strip("\n").split("\n\n"):
        for command, lines in groupby(paragraph.splitlines(), _is_command):
            if command:
                parts.append("```\n" + textwrap.dedent("\n".join(lines)) + "\n```\n\n")
            else:
                parts.append(_sentence(" ".join(lines)))
    return "".join(parts)


def _is_command(line: str) -> bool:
    return line.startswith(("  ", "fairchem ", "fairchem-kd "))


def _sentence(text: str) -> str:
    text = _escaped(text.strip())
    if not text:
        return ""
    ends = text.endswith((".", ":"))
    return (
        (text[0].upper() if text[0].isalpha() else text[0]) + text[1:] + "." * (not ends) + "\n\n"
    )


def _escaped(text: str) -> str:
    """As Markdown, in a table too; flags become code, placeholders stay as they are."""
    code = " ".join(text.split()).split("`")  # every second part is inside backticks
    for outside in range(0, len(code), 2):
        escaped = re.sub(r"([<*])", r"\\\1", code[outside])
        code[outside] = re.sub(r"(?<![\w-])(--[a-z][\w-]*)", r"`\1`", escaped)
    return "`".join(code).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    with patch("fairchem_kd.data.create.default_processes", lambda: CORES):
        return "".join(pages()).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
