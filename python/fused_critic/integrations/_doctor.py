"""The command ``python -m fused_critic doctor``: does the installed trainer fit, and what would install() replace in it?"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, Optional

from . import __name__ as _package
from . import __path__ as _folders
from ._adapter import Adapter, Finding

FITS, MISFIT, NOT_INSTALLED, BROKEN, FUNCTIONS = "fits", "does not fit", "not installed", "cannot be imported", "functions only"
EXIT_STATUS = {FITS: 0, FUNCTIONS: 0, MISFIT: 1, BROKEN: 1, NOT_INSTALLED: 2}
UNKNOWN = 2  # exit status

DESCRIPTION = """\
Imports the trainer that is installed here and compares the functions that
fused_critic.integrations.TRAINER replaces with ours, by signature. Nothing is
replaced. Without TRAINER: one line for each that is known."""

EPILOG = """\
Exit status: 0 it fits (or there is nothing to replace), 1 it does not, or cannot
be imported, 2 it is not installed, or unknown. Without TRAINER those that are
not installed do not count."""


@dataclass
class Diagnosis:
    """Of one trainer; --json prints its fields."""

    trainer: str  # the integration's module name
    name: str  # as the trainer calls itself
    distribution: str
    installed_version: Optional[str]
    compared_version: str
    evidence: str  # what ours was compared with, of that version
    status: str
    reason: Optional[str] = None  # why it cannot be imported
    functions: dict[str, str] = field(default_factory=dict)  # to be called, where nothing is replaced: name and signature
    replacements: list[Finding] = field(default_factory=list)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="whether an installed trainer fits our replacements of its functions",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "trainer", nargs="?", metavar="TRAINER", help="module name in fused_critic.integrations, or the distribution's name"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def known() -> dict[str, ModuleType]:
    """The integrations by module name. Modules that are there to be imported for their effect are none."""
    names = sorted(module.name for module in pkgutil.iter_modules(_folders))
    public = [name for name in names if not name.startswith("_") and not name.endswith("_autoinstall")]
    modules = {name: importlib.import_module(f"{_package}.{name}") for name in public}
    return {name: module for name, module in modules.items() if isinstance(getattr(module, "ADAPTER", None), Adapter)}


def diagnose(trainer: str, module: ModuleType) -> Diagnosis:
    adapter: Adapter = module.ADAPTER
    diagnosis = Diagnosis(
        trainer, adapter.trainer, adapter.distribution, adapter.installed_version(), adapter.version, adapter.evidence, FUNCTIONS
    )
    if not adapter.replacements:
        diagnosis.functions = _functions(module)
        return diagnosis
    package = adapter.replacements[0].module.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        diagnosis.status = NOT_INSTALLED
        return diagnosis
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a trainer prints while it is imported
            diagnosis.replacements = adapter.examine()
    except Exception as error:
        diagnosis.status, diagnosis.reason = BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())}"
        return diagnosis
    diagnosis.status = FITS if all(finding.fits for finding in diagnosis.replacements) else MISFIT
    return diagnosis


def run(arguments: argparse.Namespace) -> int:
    modules = known()
    if arguments.trainer is None:
        diagnoses = [diagnose(name, module) for name, module in modules.items()]
        print(json.dumps([asdict(diagnosis) for diagnosis in diagnoses], indent=2) if arguments.json else _table(diagnoses))
        return max((EXIT_STATUS[d.status] for d in diagnoses if d.status != NOT_INSTALLED), default=0)
    name = _find(arguments.trainer, modules)
    if name is None:
        print(f"unknown trainer {arguments.trainer!r}; known: {', '.join(modules)}", file=sys.stderr)
        return UNKNOWN
    diagnosis = diagnose(name, modules[name])
    print(json.dumps(asdict(diagnosis), indent=2) if arguments.json else _page(diagnosis))
    return EXIT_STATUS[diagnosis.status]


def _find(asked: str, modules: dict[str, ModuleType]) -> Optional[str]:
    def plain(name: str) -> str:
        return name.lower().replace("-", "_")

    for name, module in modules.items():
        if plain(asked) in (plain(name), plain(module.ADAPTER.distribution)):
            return name
    return None


def _functions(module: ModuleType) -> dict[str, str]:
    """The public functions and classes that an integration defines."""
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    found = {name: getattr(module, name) for name in names}
    return {
        name: str(inspect.signature(x)) for name, x in found.items() if getattr(x, "__module__", None) == module.__name__ and callable(x)
    }


def _versions(diagnosis: Diagnosis) -> str:
    return f"{diagnosis.installed_version or 'none'} installed, compared with {diagnosis.compared_version}: {diagnosis.evidence}"


def _table(diagnoses: list[Diagnosis]) -> str:
    width = max(len(diagnosis.trainer) for diagnosis in diagnoses)
    lines = []
    for diagnosis in diagnoses:
        reason = f" ({diagnosis.reason})" if diagnosis.reason else ""
        lines.append(f"{diagnosis.trainer:{width}}  {diagnosis.status:18}  {_versions(diagnosis)}{reason}")
    return "\n".join(lines)


def _page(diagnosis: Diagnosis) -> str:
    lines = [f"{diagnosis.name} ({diagnosis.distribution}): {_versions(diagnosis)}"]
    if diagnosis.status == FUNCTIONS:
        lines.append(f"nothing is replaced; fused_critic.integrations.{diagnosis.trainer} has functions to call:")
        lines += [f"  {name}{signature}" for name, signature in diagnosis.functions.items()]
    for finding in diagnosis.replacements:
        lines += _paragraph(finding)
    if diagnosis.status == NOT_INSTALLED:
        lines.append("not installed")
    elif diagnosis.status == BROKEN:
        lines.append(f"cannot be imported: {diagnosis.reason}")
    elif diagnosis.status == MISFIT:
        lines.append("does not fit: install() would raise an error and replace nothing")
    elif diagnosis.status == FITS:
        lines.append(f"fits: fused_critic.integrations.{diagnosis.trainer}.install() replaces what is named above")
    return "\n".join(lines)


def _paragraph(finding: Finding) -> list[str]:
    if finding.installed:
        return [f"{finding.target}: is ours already"]
    if not finding.fits:
        return [f"{finding.target}: another signature" if finding.theirs else f"{finding.target}: missing"] + [
            f"  theirs: {finding.theirs or 'missing'}",
            f"  ours:   {finding.ours}",
        ]
    return [f"{finding.target}: fits; replaced would be", *(f"  {place}" for place in finding.places)]
