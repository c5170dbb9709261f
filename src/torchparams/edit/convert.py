"""From any source to a file of another format, other names, other types, or fewer tensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchparams.edit.plan.entries import Entry, dtypes_of, make, refuse_cast_codes, text_metadata
from torchparams.edit.plan.plan import MEMORY, SAFETENSORS, VIEW, Plan, kind_of
from torchparams.errors import PlanError
from torchparams.left_out import STATE_DICT_HINT, in_words
from torchparams.order import in_order
from torchparams.parameters import Parameters, of
from torchparams.renames import Renames
from torchparams.render.tree import plural
from torchparams.sources.config import config_beside

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torchparams.dtypes import DType
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


def convert(
    x: object,
    path: str | os.PathLike[str] | None = None,
    selector: object = None,
    *,
    rename: object = None,
    strip_prefix: str | None = None,
    dtype: object = None,
    shared: str | None = None,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    memory: int | str = MEMORY,
    overwrite: bool = False,
    allow_overflow: bool = False,
    strict: bool = True,
) -> Plan:
    """A plan that writes the tensors of anything to a file; nothing is written before its `run`.

    Tensors that need no change are copied from file to file by the kernel. The target is the old one or the complete
    new one at every moment, whatever happens. Of a live model, what its state dict holds is written, buffers included,
    under names without wrappers. What a checkpoint holds beside tensors is not written, and the plan lists it.

    A tied tensor has several names and one memory. A torch file keeps that. Safetensors cannot say it: there, unless
    told otherwise, each name is written with bytes of its own, so that nothing is missing when the file is loaded into
    a model that is strict about names. `shared="drop"` writes the first name, and the others into the metadata, as
    `safetensors.torch.save_model` does.

    Args:
        x: Anything that has parameters.
        path: The target: a file that ends in `.safetensors`, or in `.pt`, `.pth`, `.bin` or `.ckpt` for what
            `torch.load(weights_only=True)` reads; or a directory, for safetensors. None for a view, which every verb
            takes and nothing writes.
        selector: Only these; None for all.
        rename: What names become: a mapping, `regex=replacement`, a function, or a list of these.
        strip_prefix: Taken off the names that begin with it, before any other rename.
        dtype: A type for all floating-point tensors, or a mapping, selector → type, of which later entries win.
            A quantised parameter is decoded to the type that is named for it; where none is, its stored tensors are
            copied.
        shared: What becomes of tied tensors: `keep`, `drop` or `clone`.
        max_shard_size: Most bytes of tensors in one file, as a number or as `5GB`; only for a directory.
        metadata: Text that a safetensors file says beside its tensors, added to what the source says.
        format: `safetensors` or `torch zip`; what the path's suffix says unless given.
        memory: Bytes of memory that tensors may take while it runs, as a number or as `256MiB`.
        overwrite: Replace what is there, once the new is complete; also a source.
        allow_overflow: Accept casts under which finite values become infinite.
        strict: Refuse a selector or a rename of which any part hits nothing.

    Raises:
        PlanError: Names collide, the format cannot hold a tensor, something is at the target, or it does not fit.
        NoMatch: A selector or a rename hits nothing.
        MismatchError: A rename makes one name of two.
        NotReadable: A tensor has no values: it is lazy, sparse, quantised or on the meta device. Or a cast hits codes
            of an encoding that is not known, or the scales beside them.

    >>> import numpy as np, tempfile
    >>> import torchparams as tp
    >>> weights = {"model.w": np.array([1.0, 0.1], np.float32), "model.b": np.zeros(1, np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plan = tp.convert(weights, f"{folder}/small.safetensors", strip_prefix="model.", dtype="bf16")
    ...     written = plan.run()
    ...     print([(info.name, str(info.dtype)) for info in tp.of(f"{folder}/small.safetensors").infos.values()])
    [('w', 'bfloat16'), ('b', 'bfloat16')]
    >>> [(cast.name, cast.losses.changed) for cast in written.casts]
    [('w', 1), ('b', 0)]
    """
    params, dropped, notes = choose(x, selector, strict=strict)
    source, infos = params.source, as_stored(params)
    if not infos:
        raise PlanError("it holds no tensors", where=source.label)
    cast: set[str] = set()
    types, said = dtypes_of(dtype, infos, source.label, cast=cast)
    notes += said
    refuse_cast_codes(source, infos.values(), types.values())
    rows, said = _rows(source, infos, types, cast)
    notes += said
    rules = Renames.of([*([Renames.strip_prefix(strip_prefix)] if strip_prefix else []), Renames.of(rename)])
    names = rules.apply(
        [name for _, info, _ in rows for name in (info.name, *info.aliases)], strict=strict, where=source.label
    )
    config = None
    if any(info.encoded is not None and name in cast for name, info in infos.items()) and path is not None:
        config = _plain_config(source, rows, kind_of(path, format)[0], notes)
    entries = [
        Entry(holder, info, tuple(names[name] for name in (info.name, *info.aliases)), wanted)
        for holder, info, wanted in rows
    ]
    return plan_of(
        entries,
        path,
        source,
        shared=shared,
        metadata=metadata,
        format=format,
        dropped=dropped,
        notes=notes,
        config_json=config,
        max_shard_size=max_shard_size,
        memory=memory,
        overwrite=overwrite,
        allow_overflow=allow_overflow,
    )


def _rows(
    source: Source, infos: Mapping[str, ParameterInfo], types: Mapping[str, DType], cast: set[str]
) -> tuple[list[tuple[Source, ParameterInfo, DType]], list[str]]:
    """What is written: rows, and in place of a quantised one that is not cast, the stored tensors it is made of."""
    rows: list[tuple[Source, ParameterInfo, DType]] = []
    kept = decoded = 0
    for name, info in infos.items():
        if info.encoded is None or name in cast:
            decoded += info.encoded is not None
            rows.append((source, info, types[name]))
            continue
        kept += 1
        parts = map(source.stored.info, info.encoded.parts)
        rows += [(source.stored, part, part.dtype) for part in parts]
    notes = [f"decoded: {plural(decoded, 'quantised parameter')}"] if decoded else []
    if kept:
        notes.append(f"copied as stored: {plural(kept, 'quantised parameter')}")
    return rows, notes


def _plain_config(
    source: Source, rows: list[tuple[Source, ParameterInfo, DType]], is_directory: bool, notes: list[str]
) -> str | None:
    """The `config.json` of a directory where all is decoded: the source's, without what says that it is quantised."""
    config = config_beside(source)
    if not is_directory or "quantization_config" not in config or any(holder is not source for holder, _, _ in rows):
        return None
    del config["quantization_config"]
    notes.append("config.json: that of the source, without quantization_config")
    return json.dumps(config, indent=2) + "\n"


def choose(
    x: object, selector: object, *, strict: bool = True, raw: bool = False
) -> tuple[Parameters, list[tuple[str, str]], list[str]]:
    """The table of what is written of `x`, what is not, and what there is to say.

    Args:
        x, selector, strict: See `convert`.
        raw: Take tensors as they are stored.

    Raises:
        NoMatch: The selector hits nothing.
        PlanError: A module of a live model keeps state outside its parameters and buffers.
    """
    params = of(x, buffers=True, raw=raw)
    dropped: list[tuple[str, str]] = []
    notes: list[str] = []
    if not isinstance(x, Parameters):
        passing = [info.name for info in params.infos.values() if not info.persistent]
        if passing:
            params = params.filter(lambda info: info.persistent)
            dropped = [(name, "a buffer that is not persistent") for name in passing]
    if selector is not None:
        total = len(params)
        params = params.select(selector, strict=strict)
        notes.append(f"selected: {len(params):,} of {plural(total, 'tensor')}")
    beside = [each for each in params.left_out if each.live]
    if beside:
        raise PlanError(
            f"{in_words(beside)}, which would be missing from what is written",
            where=params.source.label,
            hint=f"{STATE_DICT_HINT}; or select what such modules do not hold",
        )
    return params, dropped, notes


def as_stored(params: Parameters) -> dict[str, ParameterInfo]:
    """The infos of a table in the order in which its source holds the tensors, which a plan keeps."""
    return in_order(params.infos, params.source.keys())


def plan_of(
    entries: list[Entry],
    path: str | os.PathLike[str] | None,
    source: Source,
    *,
    shared: str | None = None,
    metadata: Mapping[str, str] | None = None,
    format: str | None = None,
    dropped: list[tuple[str, str]] | None = None,
    notes: list[str] | None = None,
    **options: Any,
) -> Plan:
    """The plan that writes entries, with the metadata of the source that they (mostly) are of."""
    _, kind = kind_of(path, format)
    made = make(entries, kind, shared)
    kept, index, lost = _metadata(source, kind)
    given = dict(metadata or {})
    clash = next((name for name in made.metadata if name in given), None)
    if clash is not None:
        raise PlanError(f"the metadata {clash!r} is the name of a tied tensor, which is noted there", where=str(path))
    return Plan(
        made.outputs,
        path,
        views=made.views,
        metadata={**kept, **made.metadata, **given},
        format=format,
        dropped=[*(dropped or []), *lost, *made.dropped],
        notes=[*(notes or []), *made.notes],
        index_metadata=index,
        **options,
    )


def _metadata(source: Source, kind: str) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """What a source's metadata becomes: that of each file, that of the index, and what is not written of it."""
    metadata, index = dict(source.metadata), dict[str, Any]()
    if kind == VIEW:
        return metadata, {}, []
    text: dict[str, str] = {}
    source = source.stored
    if source.format == SAFETENSORS:
        text, metadata = text_metadata(metadata)[0], {}
    elif source.format.startswith("sharded"):
        metadata.pop("total_size", None)
        index, metadata = metadata, {}
        text = shard_metadata(source)
    beside = {each.name: each.reason for each in source.left_out}
    lost = [(str(key), beside.get(str(key), "not a tensor")) for key in metadata]
    if kind != SAFETENSORS:
        said = [(key, "metadata, which a torch file has no place for") for key in text if key != "format"]
        return {}, {}, lost + said
    # Loaders of the Hugging Face libraries refuse a file that does not say which framework's tensors it holds.
    return text or {"format": "pt"}, index, lost


def shard_metadata(source: Source) -> dict[str, str]:
    """What all shards of a set say of themselves alike."""
    from torchparams.sources.sharded import ShardedSource

    if not isinstance(source, ShardedSource):
        return {}
    first, *others = [text_metadata(shard.metadata)[0] for shard in source.shards.values()]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
