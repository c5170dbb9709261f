"""Check written files before they replace the target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchparams.errors import SourceError, WriteError, shorten
from torchparams.sources.opening import open_file

if TYPE_CHECKING:
    from torchparams.edit.plan.layout import View, Writable
    from torchparams.info import ParameterInfo
    from torchparams.io.write import Target


def read_back(plan: Writable, target: Target) -> None:
    """Open every written file, and compare its table with the plan.

    Values are not read again; the table gives the byte range of each tensor.

    Raises:
        WriteError: A file cannot be opened, or its table differs.
    """
    outputs = {output.name: output for output in plan.outputs}
    views: dict[str, list[View]] = {}
    for view in plan.views:
        views.setdefault(view.base, []).append(view)
    for file in plan.files:
        try:
            source = open_file(target.temporary(file.name))
            found = {name: info for info in source.infos().values() for name in (info.name, *info.aliases)}
            source.close()
        except SourceError as error:
            raise _differs(plan, f"{error.what}") from error
        beside = [view for base in file.offsets for view in views.get(base, ())]
        wanted = {*file.offsets, *(view.name for view in beside)}
        for name in found.keys() ^ wanted:
            how = "is missing" if name in wanted else "is not in the plan"
            raise _differs(plan, f"the tensor {shorten(repr(name))} {how}")
        for name, offset in file.offsets.items():
            x, info = outputs[name].expression, found[name]
            if (x.dtype, tuple(x.shape), offset if x.nbytes else None) != (info.dtype, info.shape, _start(info)):
                raise _differs(plan, f"the tensor {shorten(repr(name))} has another dtype, shape or offset")
        for view in beside:
            info = found[view.name]
            if (view.dtype, tuple(view.shape)) != (info.dtype, info.shape):
                raise _differs(plan, f"the tensor {shorten(repr(view.name))} has another dtype or shape")


def _start(info: ParameterInfo) -> int | None:
    return info.location.start if info.location is not None and info.nbytes else None


def _differs(plan: Writable, how: str) -> WriteError:
    return WriteError(
        f"the new file does not match the plan: {how}",
        where=plan.path,
        exists="the target is unchanged, and temporary files were removed",
    )
