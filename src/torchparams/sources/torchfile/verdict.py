"""What unpickling a file would do beside making tensors, judged by the names that its pickle holds.

Nothing is imported to judge a name. An allow-list holds what torch, numpy and Python's containers need. Of all other
names:

- A function that is called is code that would run, whoever wrote it; so is the result of a call that is called.
- Of Python's standard library, a name that is not on the list is named even where it is not called: it may be handed
  to something that calls it.
- Classes of other packages are listed without alarm. Whole models and configurations hold them.
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
"""What may be called, by module: it makes a value of its arguments and does nothing else."""

_SPELLED = {
    "_io": "io",
    "_operator": "operator",
    "pathlib._local": "pathlib",
    "numpy.core": "numpy._core",
    "numpy.core.multiarray": "numpy._core.multiarray",
}
"""Other names of a module, of earlier and later versions."""

_CLASSES = frozenset({"typing", "abc", "enum", "numbers", "dataclasses", "collections", "builtins", "types", "string"})
"""Modules whose other classes do nothing when they are named: types of annotations, exceptions."""

_QUIET = frozenset({"math", "cmath", "operator", "builtins", "itertools", "statistics"})
"""Modules whose functions do nothing where they are only named: a layer may keep one as its activation."""

_LOUD = frozenset({"eval", "exec", "compile", "open", "input", "breakpoint", "__import__", "setattr", "delattr"})
"""Of the built-in functions, those that are named in no model."""

_ANYWHERE = frozenset({"Popen"})
"""Classes that do harm under whatever module's name a file spells them: modules of torch import them."""

_OWN = ("torch", "torchvision", "torchaudio", "numpy", "ml_dtypes", "__torch__")
"""Packages whose classes are no news."""


class Verdict(NamedTuple):
    """What unpickling a file would do beside making tensors.

    Attributes:
        calls: Functions that it would call, in the order of the file.
        names: Functions and classes that can do harm, and that it imports without a call.
        classes: Classes of other packages that it imports.

    >>> Verdict(("posix.system",)).alarm
    'calls posix.system: do not unpickle'
    """

    calls: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def alarm(self) -> str | None:
        """One sentence where it would run code; None where it would not."""
        said = [f"{verb} {listed(names, 4)}" for verb, names in (("calls", self.calls), ("names", self.names)) if names]
        return f"{' and '.join(said)}: do not unpickle" if said else None

    def to_json(self) -> dict[str, Any]:
        """All attributes."""
        return {"calls": list(self.calls), "names": list(self.names), "classes": list(self.classes)}

    def __or__(self, other: Verdict) -> Verdict:
        """Of two files."""
        return Verdict(*(tuple(dict.fromkeys(mine + yours)) for mine, yours in zip(self, other, strict=True)))


def judge(imported: Iterable[Global]) -> Verdict:
    """The verdict on the globals of a pickle.

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
    """The attribute of a verdict that a global belongs to; None where it is known to be harmless."""
    # Pickles of protocol 0 to 2 spell names as Python 2 did (`commands.Popen`), and Python translates them.
    module, name = NAME_MAPPING.get((found.module, found.name), (found.module, found.name))
    module = IMPORT_MAPPING.get(module, module)
    module = _SPELLED.get(module, module)
    if name in _KNOWN.get(module, ()) or (found.module, found.name) in CONSTRUCTORS:
        return None
    top = module.partition(".")[0]
    *outer, last = name.split(".")
    is_class = _is_class(last)
    # A module's attributes include what it imports: `os.system` of one that imports os.
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
