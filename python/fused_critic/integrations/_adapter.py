"""How a trainer's functions are replaced by ours, put back, and examined: one class for all trainers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
import types
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ContextManager, Optional


@dataclass(frozen=True)
class Replacement:
    """`ours` takes the place of `target`, written "package.module:function" or "package.module:Class.method"."""

    target: str
    ours: Callable

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def path(self) -> list[str]:
        return self.target.partition(":")[2].split(".")

    def holder(self) -> Any:
        """The module or class that has the target as an attribute; None where it is missing. Imports the module."""
        found: Any = importlib.import_module(self.module)
        for name in self.path[:-1]:
            found = getattr(found, name, None)
        return found

    def theirs(self) -> Optional[Callable]:
        return getattr(self.holder(), self.path[-1], None)


@dataclass(frozen=True)
class Finding:
    """What is to be said of one replacement in the installed trainer."""

    target: str
    theirs: Optional[str]  # signature; None where the function is missing
    ours: str
    installed: bool

    @property
    def fits(self) -> bool:
        return self.installed or self.theirs == self.ours


@dataclass(frozen=True)
class _Replaced:
    namespace: Any  # a mapping, or a class
    name: str
    theirs: Any
    ours: Callable

    def undo(self) -> None:
        """What somebody else has assigned in the meantime stays."""
        if isinstance(self.namespace, type):
            if vars(self.namespace).get(self.name) is self.ours:
                setattr(self.namespace, self.name, self.theirs)
        elif self.namespace.get(self.name) is self.ours:
            self.namespace[self.name] = self.theirs


class Adapter:
    """install(), uninstall() and examine() of one trainer.

    `distribution`: its name on PyPI; `version`: the one whose signatures `replacements` have; `registries`: mappings of the trainer that
    hold functions by name, written "package.module:ATTRIBUTE". A trainer whose code is its users' own has no replacements, only functions
    to call.
    """

    def __init__(self, trainer: str, distribution: str, version: str, replacements: Sequence[Replacement] = (), registries: Sequence[str] = ()):
        self.trainer, self.distribution, self.version = trainer, distribution, version
        self.replacements, self.registries = tuple(replacements), tuple(registries)
        self._replaced: list[_Replaced] = []

    def install(self) -> ContextManager[Any]:
        """Puts our functions into the trainer, which is imported if it is not yet.

        Replaced are the functions where they are defined, in the trainer's registries, and in every attribute of an imported module that
        holds one of them (``from ... import ...``); not references kept elsewhere, in closures or instances. A second call finds nothing
        left to do. If a function of the trainer has another signature than ours, a RuntimeError shows both, and nothing is replaced.

        Returns a context manager whose exit undoes what this call did.
        """
        pairs = [(replacement, replacement.theirs()) for replacement in self.replacements]
        pairs = [(replacement, theirs) for replacement, theirs in pairs if theirs is not replacement.ours]
        for replacement, theirs in pairs:
            if theirs is None or signature_of(theirs) != signature_of(replacement.ours):
                raise RuntimeError(self._mismatch(replacement, theirs))
        for replacement, theirs in pairs:
            assert theirs is not None
            self._replace(replacement, theirs)
        undo = contextlib.ExitStack()
        if pairs:
            undo.callback(self.uninstall)
        return undo

    def uninstall(self) -> None:
        """Puts the trainer's own functions back wherever install() replaced them, and into its modules that were imported since.

        What somebody else has assigned in the meantime stays.
        """
        originals = [(replaced.theirs, replaced.ours) for replaced in self._replaced if not isinstance(replaced.namespace, type)]
        while self._replaced:
            self._replaced.pop().undo()
        packages = {replacement.module.partition(".")[0] for replacement in self.replacements}
        for namespace in [*self._registries(), *_modules(packages)]:
            for name, held in list(namespace.items()):
                for theirs, ours in originals:
                    if held is ours:
                        namespace[name] = theirs

    def examine(self) -> list[Finding]:
        """One finding per replacement; imports the trainer, changes nothing."""
        findings = []
        for replacement in self.replacements:
            theirs = replacement.theirs()
            theirs_signature = None if theirs is None else _written(signature_of(theirs))
            findings.append(
                Finding(replacement.target, theirs_signature, _written(signature_of(replacement.ours)), theirs is replacement.ours)
            )
        return findings

    def installed_version(self) -> Optional[str]:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _replace(self, replacement: Replacement, theirs: Callable) -> None:
        name, ours, holder = replacement.path[-1], replacement.ours, replacement.holder()
        if isinstance(holder, type):
            # vars(): the attribute as it is stored, a staticmethod object for one.
            self._replaced.append(_Replaced(holder, name, vars(holder).get(name, theirs), ours))
            setattr(holder, name, ours)
            return
        for namespace in [*self._registries(), *_modules()]:
            for key, held in list(namespace.items()):
                if held is theirs:
                    namespace[key] = ours
                    self._replaced.append(_Replaced(namespace, key, theirs, ours))

    def _registries(self) -> Iterator[MutableMapping[str, Any]]:
        for registry in self.registries:
            module, _, name = registry.partition(":")
            yield getattr(sys.modules.get(module), name, {})

    def _mismatch(self, replacement: Replacement, theirs: Optional[Callable]) -> str:
        return (
            f"{replacement.target} of the installed {self.trainer} (version {self.installed_version() or 'unknown'}) is not the function that "
            f"fused_critic replaces, that of version {self.version}:\n"
            f"  {self.trainer}'s: {'missing' if theirs is None else inspect.signature(theirs)}\n"
            f"  fused_critic's: {inspect.signature(replacement.ours)}"
        )


def signature_of(function: Callable) -> list[tuple[str, Any, Any]]:
    """What has to agree: names, kinds and defaults. Annotations may differ."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _written(parameters: list[tuple[str, Any, Any]]) -> str:
    return str(inspect.Signature([inspect.Parameter(name, kind, default=default) for name, kind, default in parameters]))


def _modules(packages: Optional[set[str]] = None) -> Iterator[dict[str, Any]]:
    """The attributes of every imported module (of these packages)."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and (packages is None or name.partition(".")[0] in packages):
            yield vars(module)
