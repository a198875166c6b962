"""How an ASE calculator is made, ``PACKAGE.MODULE:FACTORY`` with arguments, and how it is known.

A calculator has no checkpoint whose bytes could be looked at. It is known by its factory, its
arguments (of those that name files, by what is in these), the version of the package that the
factory comes from or the contents of its file, and a name that the user may give.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fairchem_kd.digest import sha256_of
from fairchem_kd.errors import UserError, did_you_mean
from fairchem_kd.json_file import parse_json

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Factory:
    """What makes a calculator.

    Args:
        path: ``PACKAGE.MODULE:FACTORY``, a class or a function.
        arguments: keyword arguments, plain values.
        label: a name that tells it from others with the same factory and arguments.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def given(cls, path: str, arguments: str | None = None, label: str | None = None) -> Factory:
        """As a command line has it.

        Raises:
            UserError: a path of another form, arguments that are no JSON object.
        """
        if not _PATH.fullmatch(path):
            raise UserError(
                f"--calculator {path} must read PACKAGE.MODULE:FACTORY, such as "
                "ase.calculators.emt:EMT."
            )
        values: Any = {}
        if arguments is not None:
            try:
                values = parse_json(arguments)
            except ValueError as error:
                raise UserError(f"--calculator-args: {error}; give keyword arguments as "
                                'JSON, such as \'{"device": "cpu"}\'.') from None  # fmt: skip
        if not isinstance(values, dict) or not all(name.isidentifier() for name in values):
            raise UserError(
                "--calculator-args must be a JSON object of keyword arguments, such as "
                f'\'{{"device": "cpu"}}\', not {arguments!s:.80}.'
            )
        if not _finite(values):
            raise UserError("--calculator-args has a number that is not finite: give another.")
        if label is not None and not label.strip():
            raise UserError("--teacher-name is empty: give a name, or leave it out.")
        return cls(path, values, (label or "").strip())

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.label} ({self.path})" if self.label else self.path

    @property
    def words(self) -> list[str]:
        """The options of a command that make it."""
        words = ["--calculator", self.path]
        if self.arguments:
            words += ["--calculator-args", json.dumps(dict(self.arguments))]
        return words + (["--teacher-name", self.label] if self.label else [])

    def make(self) -> Any:
        """The calculator.

        Raises:
            UserError: it cannot be made, or is none.
        """
        factory = self._found
        try:
            made = factory(**self.arguments)
        except Exception as error:  # whatever somebody else's code raises
            raise UserError(
                f"--calculator {self.path} cannot be made with the arguments "
                f"{json.dumps(dict(self.arguments))} ({_first_line(error)}): mend them with "
                "--calculator-args."
            ) from error
        if not callable(getattr(made, "get_property", None)) and not callable(
            getattr(made, "get_potential_energy", None)
        ):
            raise UserError(
                f"--calculator {self.path} makes a {type(made).__name__}, which is no ASE "
                "calculator: name what makes one."
            )
        implemented = getattr(made, "implemented_properties", ("energy", "forces"))
        for wanted in ("energy", "forces"):
            if wanted not in implemented:
                raise UserError(
                    f"--calculator {self.path} gives no {wanted} (it gives "
                    f"{', '.join(map(str, implemented)) or 'nothing'}), and a student learns "
                    "energies and forces: take a calculator with both."
                )
        return made

    @cached_property
    def _found(self) -> Any:
        module_name, _, inside = self.path.partition(":")
        here = os.getcwd()
        if here not in sys.path:
            sys.path.append(here)  # a file of the user's own, in the current folder
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError)
            mend = (
                "install it here, or fill the store where it is, with the file that "
                "`fairchem-kd teach --writer FILE` writes"
                if missing
                else "mend that, or try it in an environment of its own, with the file that "
                "`fairchem-kd teach --writer FILE` writes"
            )
            raise UserError(
                f"--calculator {self.path}: {module_name} cannot be imported "
                f"({_first_line(error)}): {mend}."
            ) from error
        for name in inside.split("."):
            if not hasattr(found, name):
                near = did_you_mean(name, [n for n in dir(found) if not n.startswith("_")][:200])
                near = near if "did you mean" in near else ""
                raise UserError(f"--calculator {self.path}: {module_name} has no '{name}'{near}.")
            found = getattr(found, name)
        if not callable(found):
            raise UserError(f"--calculator {self.path} is no class and no function.")
        return found

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of the package that it comes from, or of the file where it comes from none.

        Raises:
            UserError: it cannot be imported.
        """
        module = sys.modules.get(getattr(self._found, "__module__", ""))
        file = getattr(module, "__file__", None)
        versions = _versions(self.path.partition(":")[0].partition(".")[0], file)
        if not versions and file is not None and Path(file).is_file():
            versions[Path(file).name] = f"sha256 {sha256_of(file)[:16]}"
        return versions

    @cached_property
    def digest(self) -> str:
        """Of all that it is known by: another one is another teacher.

        Raises:
            UserError: it cannot be imported.
        """
        told = [self.path, _contents(self.arguments), self.versions, self.label]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def told(self, features: Mapping[str, str]) -> dict[str, Any]:
        """For the card of a store.

        Args:
            features: under which key of the calculator's results each is, by address.
        """
        return {
            "factory": self.path,
            "arguments": dict(self.arguments),
            "label": self.label,
            "versions": self.versions,
            "features": dict(features),
        }

    @classmethod
    def of_card(cls, told: Mapping[str, Any]) -> Factory:
        """The factory that a card tells of."""
        return cls(told["factory"], told["arguments"], str(told.get("label", "")))


def _versions(package: str, file: str | None) -> dict[str, str]:
    """Of the distributions that a package is of, by name; none where it was not installed."""
    if file is not None and not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return {}  # a file of the user's own
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:  # it has another name, which takes a while
        found = importlib.metadata.packages_distributions().get(package, [])
        return {name: importlib.metadata.version(name) for name in sorted(set(found))}


def _finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _contents(value: Any) -> Any:
    """The value, with what is in a file in place of the file's name."""
    if isinstance(value, Mapping):
        return {key: _contents(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_contents(one) for one in value]
    if isinstance(value, str) and 0 < len(value) < 1000 and os.path.isfile(value):
        return {"file": sha256_of(value)}
    return value


def _first_line(error: BaseException) -> str:
    """An error of somebody else's in a few words."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
