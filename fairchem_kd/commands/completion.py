"""``fairchem-kd --completion SHELL``: what a shell needs to complete the command line.

The script is made of the parsers themselves, and knows all subcommands, options and choices; where
none of them fits, the shell completes names of files. Nothing is run when a key is pressed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

SHELLS = ("bash", "zsh")

_ZSH = """\
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""

_OFFER = 'COMPREPLY=( $(compgen -W "$words" -- "$cur") ); return'
_SCRIPT = """\
_fairchem_kd() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" at="" i words=""
  COMPREPLY=()
  for (( i = 1; i < COMP_CWORD; i++ )); do
    case "$at ${{COMP_WORDS[i]}}" in
{steps}
    esac
  done
  case "$at $prev" in
{choices}
  esac
  case "$at" in
{words}
  esac
  COMPREPLY=( $(compgen -W "$words" -- "$cur") )
}}
complete -o default -F _fairchem_kd fairchem-kd
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell, one of `SHELLS`, to be read by ``eval "$(...)"``.

    Args:
        parser: with the options of all subcommands.
    """
    steps, choices, words = [], [], []
    for at, one in _parsers(parser, ""):
        if at:
            steps.append(f"      {shlex.quote(at)}) at={shlex.quote(at)} ;;")
        own = []
        for action in one._actions:
            if action.help == argparse.SUPPRESS:
                continue
            if isinstance(action, argparse._SubParsersAction):
                own += list(action.choices)
                continue
            own += action.option_strings
            if not action.choices:
                continue
            listed = shlex.quote(" ".join(map(str, action.choices)))
            for name in action.option_strings:
                # such an option takes one of them, and nothing else
                choices.append(f"    {shlex.quote(f'{at} {name}')}) words={listed}; {_OFFER} ;;")
            if not action.option_strings:
                own += map(str, action.choices)
        words.append(f"    {shlex.quote(at)}) words={shlex.quote(' '.join(own))} ;;")
    text = _SCRIPT.format(
        steps="\n".join(steps) or "      *) ;;",
        choices="\n".join(choices) or "    *) ;;",
        words="\n".join(words),
    )
    return (_ZSH if shell == "zsh" else "") + text


def _parsers(
    parser: argparse.ArgumentParser, at: str
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and those of its subcommands, with the words that lead to each."""
    yield at, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from _parsers(one, f"{at} {name}")
