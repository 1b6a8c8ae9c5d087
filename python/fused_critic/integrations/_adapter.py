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

_MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """`ours` takes the place of `target`, written "package.module:function" or "package.module:Class.method".

    For a staticmethod or classmethod `ours` is the plain function (a classmethod's with its class as the first parameter).
    """

    target: str
    ours: Callable[..., Any]

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def path(self) -> list[str]:
        return self.target.partition(":")[2].split(".")

    def holder(self) -> Any:
        """The module or class that has the target as an attribute; None where the trainer has no such module or class. Imports the module."""
        try:
            found: Any = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or "." not in error.name or not f"{self.module}.".startswith(f"{error.name}."):
                raise  # something that the trainer needs is not installed
            importlib.import_module(self.module.partition(".")[0])  # nor may the trainer itself be
            return None
        for name in self.path[:-1]:
            found = getattr(found, name, None)
            if not isinstance(found, type):
                return None
        return found

    def theirs(self) -> Optional[Callable[..., Any]]:
        """What is at the target, as a plain function; None where nothing is."""
        holder, name = self.holder(), self.path[-1]
        found: Any = inspect.getattr_static(holder, name, None) if isinstance(holder, type) else getattr(holder, name, None)
        return None if holder is None else _plain(found)


@dataclass(frozen=True)
class Finding:
    """What is to be said of one replacement in the installed trainer."""

    target: str
    theirs: Optional[str]  # signature; None where the function is missing
    ours: str
    fits: bool
    installed: bool
    places: tuple[str, ...]  # what install() replaces: attributes of classes and imported modules, entries of registries


@dataclass(frozen=True, eq=False)
class _Place:
    """An attribute of a class or module, or an entry of a registry, that holds a trainer's function."""

    label: str
    namespace: Any  # a mapping, or a class
    name: Any

    def held(self) -> Any:
        return (vars(self.namespace) if isinstance(self.namespace, type) else self.namespace).get(self.name, _MISSING)

    def put(self, value: Any) -> None:
        in_class = isinstance(self.namespace, type)
        if value is _MISSING:  # an inherited method, or what a module's __getattr__ gives
            delattr(self.namespace, self.name) if in_class else self.namespace.pop(self.name)
        elif in_class:
            setattr(self.namespace, self.name, value)
        else:
            self.namespace[self.name] = value


@dataclass(frozen=True, eq=False)
class _Replaced:
    place: _Place
    theirs: Any  # as it was stored there
    ours: Any

    def undo(self) -> None:
        """What somebody else has assigned in the meantime stays."""
        if self.place.held() is self.ours:
            self.place.put(self.theirs)


class Adapter:
    """install(), uninstall() and examine() of one trainer.

    `distribution`: its name on PyPI; `version`: the one whose signatures `replacements` have; `evidence`: what of that version ours is compared
    with; `registries`: mappings of the trainer that hold functions by name, written "package.module:ATTRIBUTE" or
    "package.module:Class.attribute". A trainer whose code is its users' own has no replacements, only functions to call.
    """

    def __init__(
        self,
        trainer: str,
        distribution: str,
        version: str,
        replacements: Sequence[Replacement] = (),
        registries: Sequence[str] = (),
        evidence: str = "its own code, executed in the tests",
    ):
        self.trainer, self.distribution, self.version, self.evidence = trainer, distribution, version, evidence
        self.replacements, self.registries = tuple(replacements), tuple(registries)
        self._replaced: list[_Replaced] = []  # in the order of replacing

    def install(self) -> ContextManager[Any]:
        """Puts our functions into the trainer, which is imported if it is not yet.

        Replaced are the functions where they are defined, in the trainer's registries, and in every attribute of an imported module that
        holds one of them (``from ... import ...``); methods in their class, so in existing instances and subclasses too. Not replaced are
        references kept elsewhere, in closures or instances. A second call finds nothing left to do. If a function of the trainer has
        another signature than ours, a RuntimeError shows both, and nothing is replaced.

        Returns a context manager whose exit undoes what this call did.
        """
        found = self.check()
        done: list[_Replaced] = []
        try:
            for replacement, theirs in found:
                for place in self._places(replacement, theirs):
                    replaced = _Replaced(place, place.held(), _like(_stored(place, replacement), replacement.ours))
                    place.put(replaced.ours)
                    done.append(replaced)
                    self._replaced.append(replaced)
        except BaseException:
            self._undo(done)
            raise
        undo = contextlib.ExitStack()
        undo.callback(self._undo, done)
        return undo

    def uninstall(self) -> None:
        """Puts the trainer's own functions back wherever install() replaced them, and into its modules that were imported since.

        What somebody else has assigned in the meantime stays.
        """
        self._undo(list(self._replaced))

    def check(self) -> list[tuple[Replacement, Callable[..., Any]]]:
        """The replacements that are not made yet, each with the trainer's function. Imports the trainer, changes nothing.

        Raises: RuntimeError, with both signatures, for a function of the trainer that is missing or has another signature than ours.
        """
        found = []
        for replacement in self.replacements:
            theirs = replacement.theirs()
            if theirs is replacement.ours:
                continue
            if theirs is None or not _same_signature(theirs, replacement.ours):
                raise RuntimeError(
                    f"{replacement.target} of the installed {self.trainer} (version {self.installed_version() or 'unknown'}) is not the function "
                    f"that fused_critic replaces, that of version {self.version}:\n"
                    f"  {self.trainer}'s: {_written(theirs) or 'missing'}\n"
                    f"  fused_critic's: {_written(replacement.ours)}"
                )
            found.append((replacement, theirs))
        return found

    def examine(self) -> list[Finding]:
        """One finding per replacement; imports the trainer, changes nothing."""
        findings = []
        for replacement in self.replacements:
            theirs, ours = replacement.theirs(), replacement.ours
            installed = theirs is ours
            fits = installed or theirs is not None and _same_signature(theirs, ours)
            places = [] if theirs is None or installed else [place.label for place in self._places(replacement, theirs)]
            findings.append(Finding(replacement.target, _written(theirs), str(_written(ours)), fits, installed, tuple(places)))
        return findings

    def installed_version(self) -> Optional[str]:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _undo(self, done: list[_Replaced]) -> None:
        """Undoes these replacements, but those that have been undone already."""
        undone = [replaced for replaced in self._replaced if replaced in done]
        self._replaced = [replaced for replaced in self._replaced if replaced not in done]
        for replaced in reversed(undone):
            replaced.undo()
        # Modules of the trainer imported since hold ours under their own names. They keep it as long as it is installed anywhere.
        still_there = [replaced.ours for replaced in self._replaced]
        newest = {
            id(replaced.ours): replaced
            for replaced in undone
            if not isinstance(replaced.place.namespace, type) and not any(replaced.ours is ours for ours in still_there)
        }
        packages = {replacement.module.partition(".")[0] for replacement in self.replacements}
        for _, namespace in [*self._registries(), *_modules(packages)] if newest else ():
            for name, held in list(namespace.items()):
                if id(held) in newest:
                    namespace[name] = newest[id(held)].theirs

    def _places(self, replacement: Replacement, theirs: Callable[..., Any]) -> list[_Place]:
        """Where `theirs` is to be replaced, first where it is defined."""
        holder, name = replacement.holder(), replacement.path[-1]
        in_class = isinstance(holder, type)
        places = [_Place(replacement.target.replace(":", "."), holder if in_class else vars(holder), name)]
        for label, namespace in [] if in_class else [*self._registries(), *_modules()]:
            for key, held in list(namespace.items()):
                if held is theirs and not (namespace is places[0].namespace and key == name):
                    places.append(_Place(f"{label}[{key!r}]" if label in self.registries else f"{label}.{key}", namespace, key))
        return places

    def _registries(self) -> Iterator[tuple[str, MutableMapping[Any, Any]]]:
        for registry in self.registries:
            module, _, path = registry.partition(":")
            found: Any = sys.modules.get(module)  # one that is imported later finds our functions
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is not None:
                yield registry, found


def signature_of(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """What has to agree: names, kinds and defaults. Annotations may differ."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def _same_signature(theirs: Callable[..., Any], ours: Callable[..., Any]) -> bool:
    try:
        return signature_of(theirs) == signature_of(ours)
    except (TypeError, ValueError):  # not a function, or one that tells no signature
        return False


def _written(function: Optional[Callable[..., Any]]) -> Optional[str]:
    if function is None:
        return None
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return f"no signature: {function!r}"


def _plain(stored: Any) -> Optional[Callable[..., Any]]:
    """The function in what a class stores for a method."""
    return stored.__func__ if isinstance(stored, (staticmethod, classmethod)) else stored


def _stored(place: _Place, replacement: Replacement) -> Any:
    """What is at a place, an inherited method included."""
    return inspect.getattr_static(place.namespace, place.name) if isinstance(place.namespace, type) else place.held()


def _like(stored: Any, ours: Callable[..., Any]) -> Any:
    """`ours` as what a class stores for a method of this kind."""
    return type(stored)(ours) if isinstance(stored, (staticmethod, classmethod)) else ours


def _modules(packages: Optional[set[str]] = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and attributes of every imported module (of these packages)."""
    for name, module in list(sys.modules.items()):
        if isinstance(module, types.ModuleType) and (packages is None or name.partition(".")[0] in packages):
            yield name, vars(module)
