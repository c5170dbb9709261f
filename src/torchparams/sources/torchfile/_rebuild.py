"""Replacements for the functions of torch and numpy in a pickle, which describe the result instead of building it.

Each function here replaces the function of the same name, and runs when the interpreter meets a call of it. None
imports anything or reads the bytes of a tensor.

One operation of a pickle may call any of these with a huge argument that was built earlier. So each examines a bounded
number of parts, or charges the interpreter.
"""

from __future__ import annotations

import struct
from typing import Any

from torchparams import dtypes
from torchparams.dtypes import DType
from torchparams.errors import shorten
from torchparams.io.packing import contiguous
from torchparams.sources.torchfile._pickle_values import Blob, Constructor, Global, Malformed, Reduced, Services
from torchparams.sources.torchfile._refs import (
    DTYPES,
    ArrayRef,
    NumpyType,
    StorageRef,
    TensorRef,
    fits,
    numel_of,
    show,
    sizes,
)

# --- tensors -----------------------------------------------------------------------------------


def _arguments(func: Global, args: Any, least: int, most: int) -> tuple[Any, ...]:
    if type(args) is not tuple or not least <= len(args) <= most:
        count = len(args) if type(args) is tuple else show(args)
        raise Malformed(f"{func} with {count} arguments; it takes {least} to {most}")
    return args


def _dtype(func: Global, value: Any) -> DType:
    found = DTYPES.get(value.name) if type(value) is Global and value.module == "torch" else None
    if found is None:
        raise Malformed(f"{func} with the dtype {value if type(value) is Global else show(value)}, which is unknown")
    return found


def _view(func: Global, storage: Any, dtype: DType | None, offset: Any, shape: Any, stride: Any) -> TensorRef:
    if type(storage) is not StorageRef:
        raise Malformed(f"{func} of {show(storage)} instead of a storage")
    # Whether the view lies inside its storage is checked later, when its name is known.
    if not fits(offset, shape, stride):
        raise Malformed(f"a tensor of shape {show(shape)} with strides {show(stride)} at offset {show(offset)}")
    return TensorRef(storage, dtype or storage.dtype, offset, shape, stride)


def _flagged(tensor: TensorRef, grad: Any, metadata: Any) -> TensorRef:
    if grad is True:
        tensor.requires_grad = True
    if type(metadata) is dict:
        tensor.conj = metadata.get("conj") is True
        tensor.neg = metadata.get("neg") is True
    return tensor


def _tensor_v1(machine: Services, func: Global, args: Any) -> TensorRef:
    storage, offset, shape, stride = _arguments(func, args, 4, 4)
    return _view(func, storage, None, offset, shape, stride)


def _tensor_v2(machine: Services, func: Global, args: Any) -> TensorRef:
    _arguments(func, args, 6, 7)
    tensor = _view(func, args[0], None, args[1], args[2], args[3])
    return _flagged(tensor, args[4], args[6] if len(args) == 7 else None)


def _tensor_v3(machine: Services, func: Global, args: Any) -> TensorRef:
    _arguments(func, args, 7, 8)
    tensor = _view(func, args[0], _dtype(func, args[6]), args[1], args[2], args[3])
    return _flagged(tensor, args[4], args[7] if len(args) == 8 else None)


def _quantised(machine: Services, func: Global, args: Any) -> TensorRef:
    storage, offset, shape, stride, params, grad, _ = _arguments(func, args, 7, 7)
    tensor = _flagged(_view(func, storage, None, offset, shape, stride), grad, None)
    scheme = params[0] if type(params) is tuple and params else None
    tensor.problem = f"quantised ({scheme})" if type(scheme) is Global else "quantised"
    tensor.quantizer = params
    return tensor


def _parameter(machine: Services, func: Global, args: Any) -> Any:
    data, grad, _, *state = _arguments(func, args, 3, 4)
    if type(data) is not TensorRef:
        return NotImplemented  # a tensor of an unknown class: its parts are listed
    return data.replaced(is_parameter=True, requires_grad=grad is True, state=state[0] if state else data.state)


def _sparse(machine: Services, func: Global, args: Any) -> Any:
    layout, data = _arguments(func, args, 2, 2)
    parts = data if type(data) is tuple and len(data) <= 4 else ()
    tensors = [part for part in parts if type(part) is TensorRef]
    shape = next((part for part in parts if type(part) is tuple), None)
    if not tensors or shape is None:
        raise Malformed(f"{func} without its indices, values and shape")
    shape = sizes(shape, "the shape of a sparse tensor")
    tensor = TensorRef(None, tensors[-1].dtype, 0, shape, contiguous(shape))
    tensor.requires_grad = tensors[-1].requires_grad
    known = layout.removeprefix("torch.") if type(layout) is str else ""
    tensor.layout = known if known in _SPARSE_LAYOUTS else "sparse"
    tensor.problem = f"sparse ({shorten(layout) if type(layout) is str else 'in an unknown layout'})"
    tensor.nbytes = sum(part.dtype.nbytes(numel_of(part.shape or ())) for part in tensors)
    return tensor


_SPARSE_LAYOUTS = ("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")


def _nested(machine: Services, func: Global, args: Any) -> Any:
    data = _arguments(func, args, 4, 4)[0]
    return _ragged(data, "nested")


def _ragged(data: Any, layout: str) -> Any:
    if type(data) is not TensorRef:
        return NotImplemented
    return data.replaced(problem="nested: rows of different lengths", layout=layout, ragged=True)


def _jagged(machine: Services, func: Global, args: Any) -> Any:
    parts = args[0] if type(args) is tuple and len(args) == 1 else None
    return _ragged(parts.get("values"), "jagged") if type(parts) is dict else NotImplemented


def _meta(machine: Services, func: Global, args: Any) -> TensorRef:
    dtype, shape, stride, grad = _arguments(func, args, 4, 4)
    shape = sizes(shape, "the shape of a tensor")
    tensor = TensorRef(None, _dtype(func, dtype), 0, shape, sizes(stride, "the stride of a tensor"))
    tensor.requires_grad = grad is True
    tensor.problem, tensor.meta = "a meta tensor, which has a shape but no values", True
    return tensor


def _wrapper(machine: Services, func: Global, args: Any) -> TensorRef:
    cls, dtype, shape, stride, _, _, _, grad = _arguments(func, args, 8, 8)
    shape = sizes(shape, "the shape of a tensor")
    tensor = TensorRef(None, _dtype(func, dtype), 0, shape, sizes(stride, "the stride of a tensor"))
    tensor.requires_grad = grad is True
    named = cls if type(cls) is Global else "subclass"
    tensor.problem = f"a {named}, which keeps its values in other tensors and cannot be decoded"
    tensor.layout = shorten(cls.name.rpartition(".")[2], 40) if type(cls) is Global else "wrapper"
    tensor.wrapper = cls if type(cls) is Global else None
    return tensor


def _device_tensor(machine: Services, func: Global, args: Any) -> Any:
    data, dtype, _, grad = _arguments(func, args, 4, 4)
    tensor = data.tensor if type(data) is ArrayRef else data
    if type(tensor) is not TensorRef:
        return NotImplemented
    if tensor.dtype != _dtype(func, dtype):
        return tensor.replaced(problem=f"stored as {tensor.dtype}, to be converted to {_dtype(func, dtype)}")
    return tensor.replaced(requires_grad=grad is True)


def _from_type(machine: Services, func: Global, args: Any) -> Any:
    inner, _, inner_args, state = _arguments(func, args, 4, 4)
    # Only one level: a call of this function within itself would make the interpreter recurse.
    if type(inner) is not Global or inner.build is None or inner.build is _from_type:
        machine.note_call(inner)  # torch's function calls it
        return NotImplemented
    tensor = inner.build(machine, inner, inner_args)
    if type(tensor) is not TensorRef:
        machine.note_call(inner)
        return NotImplemented
    # A parameter of a subclass is marked by this attribute only.
    own = state[0] if type(state) is tuple and state else state
    is_parameter = tensor.is_parameter or (type(own) is dict and own.get("_is_param") is True)
    return tensor.replaced(state=state, is_parameter=is_parameter)


def _lazy(machine: Services, func: Global, args: Any) -> TensorRef:
    grad = args[0] if type(args) is tuple and args else False
    tensor = TensorRef(None, DType.of("float32"), 0, None, ())
    tensor.requires_grad = grad is True
    tensor.problem, tensor.meta = "lazy: it has no shape and no values before its module first runs", True
    tensor.layout = "lazy"
    tensor.is_parameter = func.name == "UninitializedParameter"
    return tensor


# --- numpy -------------------------------------------------------------------------------------


def _numpy_type(machine: Services, func: Global, args: Any) -> Any:
    if type(args) is not tuple or not args:
        return NotImplemented
    code = args[0]
    spelling = code.name if type(code) is Global else code
    if type(spelling) is not str or len(spelling) > 64:
        return NotImplemented
    found = _NUMPY_TYPES.get(spelling.lstrip("<>=|"))
    made = NumpyType(found, spelling)
    made.big_endian = spelling.startswith(">")
    return made


_NUMPY_TYPES: dict[str, DType] = {
    **{dtype.numpy_name: dtype for dtype in dtypes.ALL if dtype.numpy_name and dtype.bits >= 8},
    "b1": DType.of("bool"),
    **{f"{letter}{size}": DType.of(f"{name}{size * 8}")
       for letter, name, some in (("f", "float", (2, 4, 8)), ("i", "int", (1, 2, 4, 8)), ("u", "uint", (1, 2, 4, 8)),
                                  ("c", "complex", (8, 16)))
       for size in some},
}  # fmt: skip
_SCALARS = {
    "bool": "?", "float16": "e", "float32": "f", "float64": "d",
    "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
}  # fmt: skip


def _numpy_array(machine: Services, func: Global, args: Any) -> ArrayRef:
    return ArrayRef()


def _numpy_buffer(machine: Services, func: Global, args: Any) -> Any:
    if type(args) is not tuple or len(args) != 4:
        return NotImplemented
    raw, dtype, shape, order = args
    array = ArrayRef()
    array.complete(machine, shape, dtype, order == "F", raw)
    return array


def _numpy_scalar(machine: Services, func: Global, args: Any) -> Any:
    if type(args) is not tuple or len(args) != 2 or type(args[0]) is not NumpyType:
        return NotImplemented
    dtype, raw = args
    code = _SCALARS.get(dtype.dtype or "")
    raw = raw.encode() if type(raw) is str and len(raw) <= 8 else raw
    if code is None or type(raw) is not bytes or len(raw) != dtype.dtype.itemsize:
        return NotImplemented
    return struct.unpack((">" if dtype.big_endian else "<") + code, raw)[0]


# --- Python ------------------------------------------------------------------------------------


def _empty_dict(machine: Services, func: Global, args: Any) -> dict[Any, Any]:
    return {}


def _ordered_dict(machine: Services, func: Global, args: Any) -> Any:
    if args == ():
        return {}
    if type(args) is not tuple or len(args) != 1:
        return NotImplemented
    pairs = args[0]
    if type(pairs) is dict:
        return pairs
    if type(pairs) is not list:
        return NotImplemented
    machine.charge(len(pairs))  # Python 2 gave all of them at once, as a list of pairs
    made: dict[Any, Any] = {}
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            return NotImplemented
        machine.set_items(made, pair)
    return made


def _first(machine: Services, func: Global, args: Any) -> Any:
    """A constructor whose first argument is the result, as far as listing is concerned."""
    return args[0] if type(args) is tuple and len(args) >= 1 else NotImplemented


def _collection(machine: Services, func: Global, args: Any) -> Any:
    if args == ():
        return []
    return args[0] if type(args) is tuple and len(args) == 1 and type(args[0]) in (list, tuple) else NotImplemented


def _encode(machine: Services, func: Global, args: Any) -> Any:
    # Protocol 2 writes bytes as `_codecs.encode(text, "latin1")`.
    if type(args) is not tuple or len(args) != 2 or type(args[0]) is not str or type(args[1]) is not str:
        return NotImplemented
    if args[1] not in ("latin1", "latin-1"):
        return NotImplemented
    try:
        return machine.encoded(args[0], "latin-1")
    except UnicodeEncodeError:
        return NotImplemented


def _bytes(machine: Services, func: Global, args: Any) -> Any:
    if args == ():
        return b""
    if type(args) is tuple and len(args) == 2:
        return _encode(machine, func, args)
    return args[0] if type(args) is tuple and len(args) == 1 and isinstance(args[0], bytes | Blob) else NotImplemented


def _complex(machine: Services, func: Global, args: Any) -> Any:
    if type(args) is not tuple or len(args) != 2 or not all(type(part) is float for part in args):
        return NotImplemented
    return complex(*args)


def _device(machine: Services, func: Global, args: Any) -> Any:
    if type(args) is not tuple or not args or type(args[0]) is not str or len(args[0]) > 64:
        return NotImplemented
    return f"{args[0]}:{args[1]}" if len(args) == 2 and type(args[1]) is int else args[0]


def _object(machine: Services, func: Global, args: Any) -> Any:
    # copyreg functions that create an object of this class
    return Reduced(args[0], args) if type(args) is tuple and args else NotImplemented


_NUMPY_CORES = ("numpy.core", "numpy._core")
_BUILTINS = ("builtins", "__builtin__")
CONSTRUCTORS: dict[tuple[str, str], Constructor] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_qtensor"): _quantised,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_nested_tensor"): _nested,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _device_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _device_tensor,
    ("torch._utils", "_rebuild_xla_tensor"): _device_tensor,
    **{(f"torch.{home}", f"_rebuild_from_type{v}"): _from_type for home in ("_tensor", "tensor") for v in ("", "_v2")},
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"): _jagged,
    ("torch.nn.parameter", "UninitializedParameter"): _lazy,
    ("torch.nn.parameter", "UninitializedBuffer"): _lazy,
    ("torch", "Size"): _collection,
    ("torch", "device"): _device,
    ("torch.serialization", "_get_layout"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
    **{(f"{core}.multiarray", "_reconstruct"): _numpy_array for core in _NUMPY_CORES},
    **{(f"{core}.multiarray", "scalar"): _numpy_scalar for core in _NUMPY_CORES},
    **{(f"{core}.numeric", "_frombuffer"): _numpy_buffer for core in _NUMPY_CORES},
    ("numpy", "dtype"): _numpy_type,
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "Counter"): _ordered_dict,
    ("collections", "defaultdict"): _empty_dict,
    **{(home, name): _collection for home in _BUILTINS for name in ("list", "tuple", "set", "frozenset")},
    **{(home, "bytes"): _bytes for home in _BUILTINS},
    **{(home, "bytearray"): _bytes for home in _BUILTINS},
    **{(home, "complex"): _complex for home in _BUILTINS},
    **{(home, "dict"): _ordered_dict for home in _BUILTINS},
    ("_codecs", "encode"): _encode,
    **{(home, name): _object for home in ("copyreg", "copy_reg")
       for name in ("_reconstructor", "__newobj__", "__newobj_ex__")},
}  # fmt: skip
"""Replacements, by the names used in files."""
