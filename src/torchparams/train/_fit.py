"""Checks before a load: tensors whose values cannot be copied, and module state or code outside tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.engines.base import Job
from torchparams.engines.equality import SameBits
from torchparams.engines.threads import ThreadEngine
from torchparams.render.tree import human_shape
from torchparams.sources.live.state import named_modules
from torchparams.sources.live.traverse import modules_of
from torchparams.train._resharding import sharded_problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

# --- one tensor -----------------------------------------------------------------------------------


def problem(given: ParameterInfo, source: Source, wanted: ParameterInfo, target: torch.Tensor, *, cast: bool) -> str:
    """Reason why a source tensor cannot be copied into a model tensor; empty if it can. Reads no values.

    Args:
        given: Info of the source's tensor.
        source: The source.
        wanted: Info of the model's tensor.
        target: The model's tensor.
        cast: Allow casts that `castable` accepts.
    """
    if given.shape is None:
        return "it has no shape yet"
    if wanted.shape is not None and wanted.shape != given.shape:
        return f"shape {human_shape(given.shape)}, not {human_shape(wanted.shape)}"
    same = given.dtype is wanted.dtype or given.dtype == wanted.dtype
    if not same and not (cast and castable(given.dtype, wanted.dtype)):
        return f"dtype {given.dtype}, not {wanted.dtype}"
    if given.sharding is not None or wanted.sharding is not None:
        return (
            sharded_problem(given, source, wanted, target)
            or (_unreadable(given, source) if given.sharding is None else "")
            or (_unwritable(wanted, target) if wanted.sharding is None else "")
        )
    return _unreadable(given, source) or _unwritable(wanted, target)


def castable(given: DType, wanted: DType) -> bool:
    """True for casts from float to float, complex to complex, and integer to an integer type that holds every value.

    >>> from torchparams.dtypes import DType
    >>> castable(DType.of("F32"), DType.of("BF16")), castable(DType.of("I64"), DType.of("I32"))
    (True, False)
    """
    if given.kind == wanted.kind and given.kind in ("float", "complex"):
        # float8_e8m0fnu, the type of block scales, has neither sign nor zero.
        return wanted.torch_name is not None and wanted != "float8_e8m0fnu"
    if {given.kind, wanted.kind} <= {"int", "uint"}:
        import numpy as np

        return np.can_cast(given.numpy, wanted.numpy, "safe")
    return False


def _unreadable(given: ParameterInfo, source: Source) -> str:
    if given.device == "meta":
        return "it is on the meta device, which holds no values"
    if given.dtype.kind == "opaque" and source.span(given.name) is None:
        return f"values of {given.dtype} cannot be copied"
    if given.storage is not None or not given.numel:
        return ""
    if source.files:
        lies = given.location is not None or given.layout is None
        return "" if lies else "it is sparse or quantised, which load does not read from a file"
    return _not_plain(source.value(given.name)) if source.borrowed else ""


def _unwritable(wanted: ParameterInfo, target: torch.Tensor) -> str:
    import torch

    if wanted.storage is not None and wanted.numel and not wanted.storage.nbytes:
        return "the model's tensor has no memory: its storage was freed"
    if type(target) in (torch.nn.Parameter, torch.Tensor) and target.layout is torch.strided and target.is_contiguous():
        return ""  # the common case, without further checks
    if wanted.shape is None:
        from torch.nn.parameter import is_lazy

        return "" if is_lazy(target) else "the model's tensor has no shape"
    why = _not_plain(target) if wanted.storage is None and wanted.numel else ""
    if why:
        return f"the model's tensor: {why}"
    if wanted.storage is not None and any(
        step == 0 and size > 1 for step, size in zip(wanted.storage.stride, wanted.shape, strict=True)
    ):
        return "the model's tensor is expanded: several elements share one memory location"
    return ""


def _not_plain(value: Any) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return ""
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(value).__name__} keeps its values in other tensors"
    return "" if value.layout is torch.strided else f"it is sparse ({value.layout})"


def same_values(source: Source, a: ParameterInfo, b: ParameterInfo) -> bool:
    """True if two tensors of one source, with equal shape and dtype, have the same bits. Memory stays flat."""
    return all(ThreadEngine().map([Job(a.name, (source.row(a.name, a), source.row(b.name, b)))], SameBits()).values())


# --- modules --------------------------------------------------------------------------------------

EXTRA_STATE = "_extra_state"
"""Suffix of a state dict's key for a module's extra state."""

_TORCHS_OWN = ("torch.nn.modules.", "torch.nn.utils.")  # their hooks only upgrade state dicts of older versions


def beside_tensors(root: nn.Module) -> tuple[list[str], list[str]]:
    """Modules with state or code that loading tensors does not cover, by canonical name.

    Returns:
        Modules that save state outside tensors, and modules that run their own code in `load_state_dict`.
    """
    from torch import nn

    saves: dict[type, bool] = {}
    loads: dict[type, bool] = {}
    found: dict[int, nn.Module] = {}
    for module in modules_of(root):
        cls = type(module)
        if cls not in saves:
            saves[cls] = cls.get_extra_state is not nn.Module.get_extra_state
            loads[cls] = not _is_torchs(cls._load_from_state_dict)
        if saves[cls] or loads[cls] or _has_own_hooks(module):
            found[id(module)] = module
    if not found:  # mostly, and no names are made
        return [], []
    named = [(name, module) for name, module in named_modules(root) if id(module) in found]
    with_extra = [name for name, module in named if saves[type(module)]]
    with_code = [name for name, module in named if loads[type(module)] or _has_own_hooks(module)]
    return with_extra, with_code


def _has_own_hooks(module: nn.Module) -> bool:
    before, after = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
    if not (before or after):
        return False
    return not all(
        _is_torchs(function) for function in (*(getattr(h, "hook", h) for h in before.values()), *after.values())
    )


def _is_torchs(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").startswith(_TORCHS_OWN)


def shown(module: str) -> str:
    """Module name for a message."""
    return module or "the outermost"
