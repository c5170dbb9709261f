"""Convert a source to a checkpoint file: change format, names or dtypes, or extract a part."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torchparams.edit.plan.plan import MEMORY, SAFETENSORS, VIEW, Plan, kind_of
from torchparams.edit.plan.to_write import ToWrite, dtypes_of, make, refuse_cast_codes, text_metadata
from torchparams.encodings.flattened import described
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
    """Plan a conversion: write the tensors of `x` to a checkpoint file, when `run` is called.

    Tensors that need no change are copied from file to file by the kernel. At every moment, even after a crash, the
    target is either the old file or the complete new one. For a live model, the content of its state dict is written,
    including buffers, under names without wrappers. Non-tensor entries of a checkpoint are not written; the plan lists
    them.

    A tied tensor is one tensor with several names. A torch file keeps ties. Safetensors cannot express them: by default
    each name gets its own copy, so that strict loading finds every name. `shared="drop"` writes only the first name,
    and records the others in the metadata, as `safetensors.torch.save_model` does.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`.
        path: Target file or directory. The suffix `.safetensors` selects safetensors; `.pt`, `.pth`, `.bin` and `.ckpt`
            select a torch file that `torch.load(weights_only=True)` reads; a directory gets safetensors. With None, the
            plan is a view: every verb can read it, and it cannot be written.
        selector: Tensors to write; None for all.
        rename: New names: a mapping, `regex=replacement`, a function, or a list of these.
        strip_prefix: Prefix to remove from names, before any other rename.
        dtype: A dtype for all floating-point tensors, or a mapping selector → dtype, in which later entries win. A
            quantised parameter with a requested dtype is decoded; without one, its stored tensors are copied.
        shared: Treatment of tied tensors: `keep`, `drop` or `clone`.
        max_shard_size: Maximum bytes of tensors per file, a number or a text such as `5GB`; directories only.
        metadata: Text metadata for a safetensors file, added to the metadata of the source.
        format: `safetensors` or `torch zip`; by default, follows the suffix of the path.
        memory: Memory limit for tensors during the run, in bytes or as text such as `256MiB`.
        overwrite: Replace an existing target, once the new one is complete. The target may be a source.
        allow_overflow: Allow casts that turn finite values into infinity.
        strict: Raise if any part of a selector or rename matches nothing.

    Raises:
        PlanError: Names collide, the format cannot store a tensor, the target exists, or the disk or memory is too
            small.
        NoMatch: A selector or rename matches nothing.
        MismatchError: A rename maps two names to one.
        NotReadable: A tensor has no values: it is lazy, sparse, quantised or on the meta device. Or a cast would change
            the codes or scales of an unknown encoding.

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
    params, dropped, notes = select_to_write(x, selector, strict=strict)
    source, infos = params.source, as_stored(params)
    if not infos:
        raise PlanError("it holds no tensors", where=source.label)
    cast: set[str] = set()
    asked: set[str] = set()
    types, said = dtypes_of(dtype, infos, source.label, cast=cast, asked=asked)
    notes += said
    refuse_cast_codes(source, infos.values(), types.values(), asked)
    rows, said = _rows(source, infos, types, cast)
    notes += said
    rules = Renames.of([*([Renames.strip_prefix(strip_prefix)] if strip_prefix else []), Renames.of(rename)])
    names = rules.apply(
        [name for _, info, _ in rows for name in (info.name, *info.aliases)], strict=strict, where=source.label
    )
    _refuse_undescribed(source, rows, names, kind_of(path, format)[1])
    entries = [
        ToWrite(holder, info, tuple(names[name] for name in (info.name, *info.aliases)), wanted)
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
        max_shard_size=max_shard_size,
        memory=memory,
        overwrite=overwrite,
        allow_overflow=allow_overflow,
    )


def _rows(
    source: Source, infos: Mapping[str, ParameterInfo], types: Mapping[str, DType], cast: set[str]
) -> tuple[list[tuple[Source, ParameterInfo, DType]], list[str]]:
    """Rows to write. A quantised row that is not cast is replaced by its stored tensors."""
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


def _refuse_undescribed(
    source: Source,
    rows: list[tuple[Source, ParameterInfo, DType]],
    names: Mapping[str, str],
    kind: str,
) -> None:
    """Refuse to copy the stored tensors of a class without the description of how they belong together.

    Raises:
        PlanError: What is written would not hold it.
    """
    kept = {info.name for holder, info, _ in rows if holder is not source}
    for structure in source.stored.structures if kept and kind != VIEW else ():
        parts = [part for part in structure.parts.values() if part in kept]
        told = kind == SAFETENSORS and "tensor_names" in _metadata(source, kind)[0]
        if parts and not (told and all(names[part] == part for part in parts)):
            raise PlanError(
                f"{structure.name!r} is of the class {structure.kind}, whose description is not written here",
                where=source.label,
                hint="pass a dtype, which writes the values; torch.save(model.state_dict()) writes such tensors whole",
            )


def select_to_write(
    x: object, selector: object, *, strict: bool = True, raw: bool = False
) -> tuple[Parameters, list[tuple[str, str]], list[str]]:
    """Choose what to write: the table, the tensors left out with the reason, and notes.

    Args:
        x, selector, strict: See `convert`.
        raw: Read tensors as stored, without decoding.

    Raises:
        NoMatch: The selector matches nothing.
        PlanError: A module of a live model keeps state outside its parameters and buffers.
    """
    params = of(x, buffers=True, raw=raw)
    dropped: list[tuple[str, str]] = []
    notes: list[str] = []
    if not isinstance(x, Parameters):
        passing = [info.name for info in params.infos.values() if not info.persistent]
        if passing:
            params = params.filter(lambda info: info.persistent)
            dropped = [(name, "a non-persistent buffer") for name in passing]
    if selector is not None:
        total = len(params)
        params = params.select(selector, strict=strict)
        notes.append(f"selected: {len(params):,} of {plural(total, 'tensor')}")
    beside = [each for each in params.left_out if each.live]
    if beside:
        raise PlanError(
            f"{in_words(beside)}, which would not be written",
            where=params.source.label,
            hint=f"{STATE_DICT_HINT}; or select tensors outside these modules",
        )
    return params, dropped, notes


def as_stored(params: Parameters) -> dict[str, ParameterInfo]:
    """Infos of a table in stored order. Plans keep that order."""
    return in_order(params.infos, params.source.keys())


def plan_of(
    entries: list[ToWrite],
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
    """Plan to write `entries`, with the metadata of `source`, from which most of them come."""
    is_directory, kind = kind_of(path, format)
    said = list(notes or [])
    config = None if path is None else _config(source, entries, is_directory, said)
    made = make(entries, kind, shared)
    kept, index, lost = _metadata(source, kind)
    if "tensor_names" in kept and kind == SAFETENSORS:
        kept = described(kept, {output.name for output in made.outputs})
    given = dict(metadata or {})
    clash = next((name for name in made.metadata if name in given), None)
    if clash is not None:
        raise PlanError(
            f"the metadata key {clash!r} is also the name of a tied tensor that the metadata must record",
            where=str(path),
        )
    return Plan(
        made.outputs,
        path,
        views=made.views,
        metadata={**kept, **made.metadata, **given},
        format=format,
        dropped=[*(dropped or []), *lost, *made.dropped],
        notes=[*said, *made.notes],
        index_metadata=index,
        config_json=config,
        **options,
    )


def _config(source: Source, entries: list[ToWrite], is_directory: bool, notes: list[str]) -> str | None:
    """The `config.json` for a directory: that of the source, without `quantization_config` if all is decoded.

    None where nothing is quantised, where the source has none that describes it, or where a part is decoded and the
    rest is not.
    """
    decoded = any(entry.info.encoded is not None for entry in entries)
    copied = source.stored is not source and any(entry.source is source.stored for entry in entries)
    if not decoded and not copied:
        return None
    config = config_beside(source)
    holders = [each for each in (config, config.get("text_config")) if isinstance(each, dict)]
    describing = [each for each in holders if "quantization_config" in each]
    if not describing:
        return None
    if not is_directory or (copied and decoded):
        if copied:
            notes.append("config.json, which says how the stored tensors are decoded, is not written")
        return None
    if copied:
        notes.append("config.json: that of the source")
    else:
        for each in describing:
            del each["quantization_config"]
        notes.append("config.json: that of the source, without quantization_config")
    return json.dumps(config, indent=2) + "\n"


def _metadata(source: Source, kind: str) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:
    """Split metadata of a source: for each file, for the index, and entries that are not written."""
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
        said = [(key, "metadata; a torch file cannot store it") for key in text if key != "format"]
        return {}, {}, lost + said
    # Loaders of the Hugging Face libraries reject a file without a `format` entry.
    return text or {"format": "pt"}, index, lost


def shard_metadata(source: Source) -> dict[str, str]:
    """Metadata that all shards of a set share."""
    from torchparams.sources.sharded import ShardedSource

    if not isinstance(source, ShardedSource):
        return {}
    first, *others = [text_metadata(shard.metadata)[0] for shard in source.shards.values()]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
