"""Safety check of a pickle: what unpickling would do besides building tensors, judged by the names in it.

Names are judged without importing anything. An allow-list has the names that torch, numpy and Python's containers need.
For all other names:

- A function that is called is code that would run, so it is reported; so is a result of a call that is called.
- A name of Python's standard library that is not on the list is reported even if it is not called: it may be passed to
  something that calls it.
- Classes of other packages are listed without alarm. Whole models and configurations contain them.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import TYPE_CHECKING, Any, NamedTuple

from torchparams.render.tree import listed
from torchparams.sources.torchfile._rebuild import CONSTRUCTORS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchparams.sources.torchfile._pickle_values import Global

_KNOWN: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "builtins": "set frozenset list tuple dict bytes bytearray complex int float bool str object slice range type "
        "getattr",
        "collections": "OrderedDict defaultdict Counter deque ChainMap UserDict UserList UserString",
        "copyreg": "_reconstructor __newobj__ __newobj_ex__",
        "_codecs": "encode",
        "array": "array _array_reconstructor",
        "argparse": "Namespace",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "functools": "partial",
        "io": "BytesIO StringIO",
        "logging": "getLogger Logger",
        "operator": "getitem",
        "random": "Random",
        "re": "_compile Pattern",
        "time": "struct_time",
        "types": "SimpleNamespace MappingProxyType GenericAlias",
        "uuid": "UUID SafeUUID",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
        "numpy": "dtype ndarray matrix recarray ufunc memmap",
        "numpy.core._internal": "_convert_to_dtype",
        "numpy._core._multiarray_umath": "_reconstruct scalar",
        "numpy._core": "_ufunc_reconstruct",
        "numpy.ma.core": "_mareconstruct",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    }.items()
}
"""Names that may be called, by module: they make a value from their arguments and do nothing else."""

_SPELLED = {
    "_io": "io",
    "_operator": "operator",
    "pathlib._local": "pathlib",
    "numpy.core": "numpy._core",
    "numpy.core.multiarray": "numpy._core.multiarray",
}
"""Module names used by earlier and later versions."""

_CLASSES = frozenset({"typing", "abc", "enum", "numbers", "dataclasses", "collections", "builtins", "types", "string"})
"""Modules whose other classes do nothing when named: types of annotations, exceptions."""

_QUIET = frozenset({"math", "cmath", "operator", "builtins", "itertools", "statistics"})
"""Modules whose functions are harmless if only named: a layer may keep one as its activation."""

_LOUD = frozenset({"eval", "exec", "compile", "open", "input", "breakpoint", "__import__", "setattr", "delattr"})
"""Built-in functions that no model names."""

_ANYWHERE = frozenset({"Popen"})
"""Classes that are harmful under any module name, because torch modules import them."""

_OWN = ("torch", "torchvision", "torchaudio", "numpy", "ml_dtypes", "__torch__")
"""Packages whose classes are not reported."""


class Verdict(NamedTuple):
    """What unpickling a file would do besides building tensors.

    Attributes:
        calls: Functions that it would call, in the order of the file.
        names: Potentially harmful functions and classes that it imports without calling them.
        classes: Classes of other packages that it imports.

    >>> Verdict(("posix.system",)).alarm
    'calls posix.system: do not unpickle'
    """

    calls: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def alarm(self) -> str | None:
        """A sentence if unpickling would run code; otherwise None."""
        said = [f"{verb} {listed(names, 4)}" for verb, names in (("calls", self.calls), ("names", self.names)) if names]
        return f"{' and '.join(said)}: do not unpickle" if said else None

    def to_json(self) -> dict[str, Any]:
        """The verdict as JSON data."""
        return {"calls": list(self.calls), "names": list(self.names), "classes": list(self.classes)}

    def __or__(self, other: Verdict) -> Verdict:
        """Combine the verdicts of two files."""
        return Verdict(*(tuple(dict.fromkeys(mine + yours)) for mine, yours in zip(self, other, strict=True)))


def judge(imported: Iterable[Global]) -> Verdict:
    """Judge the globals of a pickle.

    >>> from torchparams.sources.torchfile._pickle_values import Global
    >>> system, net = Global("posix", "system"), Global("mylib.nets", "Net")
    >>> system.called = net.called = True
    >>> judge([Global("torch._utils", "_rebuild_tensor_v2"), net, system])
    Verdict(calls=('posix.system',), names=(), classes=('mylib.nets.Net',))
    """
    found: dict[str, dict[str, None]] = {"calls": {}, "names": {}, "classes": {}}
    for each in imported:
        kind = _kind(each)
        if kind is not None:
            found[kind][repr(each)] = None
    return Verdict(tuple(found["calls"]), tuple(found["names"]), tuple(found["classes"]))


def _kind(found: Global) -> str | None:
    """The attribute of `Verdict` for a global; None if it is known to be harmless."""
    # Pickles of protocols 0 to 2 use the names of Python 2 (`commands.Popen`), which Python translates.
    module, name = NAME_MAPPING.get((found.module, found.name), (found.module, found.name))
    module = IMPORT_MAPPING.get(module, module)
    module = _SPELLED.get(module, module)
    if name in _KNOWN.get(module, ()) or (found.module, found.name) in CONSTRUCTORS:
        return None
    top = module.partition(".")[0]
    *outer, last = name.split(".")
    is_class = _is_class(last)
    # A module's attributes include its imports: `os.system` can be reached through a module that imports os.
    through = not all(map(_is_class, outer)) or last in _ANYWHERE
    if through or top in sys.stdlib_module_names:
        if is_class and not through and module in _CLASSES and not outer:
            return None
        if not found.called and not through and module in _QUIET and not is_class and last not in _LOUD:
            return None
        return "calls" if found.called else "names"
    if not found.module:
        return "calls"
    if is_class:
        return None if top in _OWN else "classes"
    if not found.called:
        return None if top in _OWN else "classes"
    return None if top in _OWN and last.startswith(("_rebuild_", "__pyx_unpickle_")) else "calls"


def _is_class(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()
