"""Files of a ZeRO checkpoint, each checked on its own."""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams.errors import FileFormatError, SourceError, shorten
from torchparams.expressions.strided import Strided
from torchparams.io.folders import entries
from torchparams.io.opened import bytes_of_file
from torchparams.io.paths import join, name_of
from torchparams.render.tree import listed, plural
from torchparams.sources.torchfile.archive import Archive
from torchparams.sources.torchfile.nodes import NumberKey, Reduced, TensorRef, describe, is_size, sizes_of
from torchparams.sources.torchfile.torchzip import ChosenSource

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.expressions.base import Expression

MODEL = "module"
"""Key of the state dict of the model in `*_model_states.pt`."""

OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,7})_mp_rank_(?P<mp>\d{1,5})_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d{1,7})_)?mp_rank_(?P<mp>\d{1,5})_model_states\.pt")
_EXPERT_FILE = re.compile(
    r"(?:expp_rank_\d+_mp_rank_\d+_optim_states|layer_\d+_expert_\d+_mp_rank_\d+_model_states)\.pt"
)
_SCRIPT = "zero_to_fp32.py"  # DeepSpeed writes it beside `latest`
_TAG = re.compile(r"[\w.=+-]{1,200}")


def is_tag(there: Iterable[str]) -> bool:
    """Whether these are the file names in the folder of a tag."""
    return any(OPTIM_FILE.fullmatch(name) for name in there)


def folder_of(path: str, there: Mapping[str, bool]) -> str | None:
    """Folder of the tag that `latest` names, or the directory itself if it is such a folder; otherwise None.

    Raises:
        FileFormatError: The directory is from DeepSpeed, but `latest` does not name a folder in it.
    """
    if is_tag(there):
        return path
    if "latest" not in there:
        return None
    file = bytes_of_file(join(path, "latest"))
    tag = file.read(0, min(file.size, 256)).decode("utf-8", "replace").strip()
    # Only a plain name is accepted, not a path.
    if _TAG.fullmatch(tag) and tag not in (".", "..") and there.get(tag):
        folder = join(path, tag)
        return folder if is_tag(entries(folder)) else None
    if _SCRIPT not in there:
        return None  # other trainers keep a file of that name too
    tags = sorted(name for name, is_folder in there.items() if is_folder)
    raise FileFormatError(
        f"it names the tag {shorten(repr(tag))}, which is not in the directory",
        where=file.path,
        exists=f"there are {listed(tags, 8)}" if tags else None,
        hint=f"choose one: {join(path, tags[-1])}" if tags else None,
    )


def opened(folder: str) -> tuple[list[ModelFile], list[OptimFile]]:
    """Open the files in the folder of a tag, in the order of ranks.

    Raises:
        FileFormatError: Ranks are missing, or this kind of checkpoint is not supported.
    """
    there = sorted(entries(folder))
    experts = [name for name in there if _EXPERT_FILE.fullmatch(name)]
    if experts:
        raise FileFormatError(
            f"it has experts in separate files ({shorten(experts[0])}), which are not supported",
            where=folder,
            hint="ds_to_universal.py of DeepSpeed converts it",
        )
    optims = _numbered(folder, there, OPTIM_FILE)
    models = _numbered(folder, there, MODEL_FILE)
    first = OptimFile(join(folder, optims[min(optims)]), min(optims))
    world = first.world
    missing = [rank for rank in range(min(world, len(optims) + 9)) if rank not in optims]
    if missing or len(optims) != world:
        raise FileFormatError(
            f"there are the partitions of {len(optims)} ranks, and {first.name} is one of {world}",
            where=folder,
            exists=f"missing is rank {listed(list(map(str, missing)), 8)}" if missing else None,
            hint="copy the files of all ranks" if missing else "files of another run lie between them",
        )
    found = [first, *(OptimFile(join(folder, optims[rank]), rank) for rank in range(1, world))]
    for optim in found:
        if optim.stage != first.stage or optim.world != world:
            raise optim.error(
                f"it is of stage {optim.stage} and {optim.world} ranks, and {first.name} of {first.stage} and {world}"
            )
    count = world if first.stage == 3 else 1
    lost = [rank for rank in range(min(count, len(models) + 9)) if rank not in models]
    if lost:
        raise FileFormatError(
            f"it lacks {plural(count - len(models) if len(models) < count else len(lost), 'file')} *_model_states.pt: "
            f"that of rank {listed(list(map(str, lost)), 8)}",
            where=folder,
            hint="copy the files of all ranks",
        )
    return [ModelFile(join(folder, models[rank]), rank) for rank in range(count)], found


def _numbered(folder: str, there: Sequence[str], pattern: re.Pattern[str]) -> dict[int, str]:
    """File names by rank."""
    found: dict[int, str] = {}
    for match in map(pattern.fullmatch, there):
        if match is None:
            continue
        if int(match["mp"]):
            raise FileFormatError(
                f"{shorten(match[0])} belongs to a second model-parallel rank, but no file records how tensors "
                "are split between these",
                where=folder,
                hint="ds_to_universal.py of DeepSpeed converts it",
            )
        rank = int(match["rank"] or 0)
        if rank in found:
            raise FileFormatError(
                f"{shorten(found[rank])} and {shorten(match[0])} are both of rank {rank}", where=folder
            )
        found[rank] = match[0]
    return found


class Flat:
    """A flat tensor in a file, of which only the first `numel` elements are used.

    Args:
        source: The file.
        name: Name of the tensor in it.
        numel: Number of elements; the rest is padding.
    """

    def __init__(self, source: ChosenSource, name: str, numel: int) -> None:
        self.source, self.name, self.numel = source, name, numel

    def row(self) -> Expression:
        """The tensor with its padding, in one dimension."""
        x = self.source.row(self.name)
        return x if len(x.shape) == 1 else Strided(x, x.dtype, (x.numel,), 0, (1,))


class _StateFile:
    """Base of both kinds of files.

    Attributes:
        path, name, file: The file.
        archive: Its contents.
    """

    def __init__(self, path: str, rank: int) -> None:
        self.path, self.rank, self.name = path, rank, name_of(path)
        self.file = bytes_of_file(path)
        self.archive = Archive(self.file)
        self._root = self._dict(self.archive.root, "it")

    def error(self, what: str) -> FileFormatError:
        """Make an error about the file."""
        return FileFormatError(what, where=self.path)

    def _dict(self, value: Any, what: str) -> dict[Any, Any]:
        if type(value) is not dict:
            raise self.error(f"{what} is {describe(value)}, not a dict")
        return value

    def _list(self, value: Any, what: str) -> Sequence[Any]:
        if type(value) not in (list, tuple):
            raise self.error(f"{what} is {describe(value)}, not a list")
        return value  # type: ignore[no-any-return]  # its type was just looked at


class OptimFile(_StateFile):
    """A `*_optim_states.pt`: the partition of one rank.

    Attributes:
        stage: 1, 2 or 3; 0 for BF16_Optimizer, whose groups have the layout of stage 1.
        world: Number of ranks according to the file.
        groups: The flat float32 weights of each group.
        states: For each group, values of the optimizer state by name.
        beside: Entries of the optimizer that are not tensors.
    """

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, rank)
        self._state = state = self._dict(self._root.get("optimizer_state_dict"), "its optimizer_state_dict")
        self.stage = self._stage(state.get("zero_stage", 0))
        counts = state.get("partition_count")
        counts = counts if type(counts) is list and counts else [counts]
        if not all(is_size(count) and 0 < count <= 1 << 20 for count in counts):
            raise self.error(f"its partition_count is {describe(state.get('partition_count'))}")
        if len(set(counts)) > 1:
            raise self.error(
                "its groups are split over different numbers of ranks "
                f"({listed(sorted(map(str, set(counts))))}), as those "
                "of experts are; this is not supported"
            )
        self.world: int = counts[0]
        self._made: ChosenSource | None = None
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        listed_groups = self._list(state.get(key), f"its {key}")
        tensors = {f"{key}.{number}": tensor for number, tensor in enumerate(listed_groups)}
        moments = self._moments(state, len(tensors))
        self.states: list[dict[str, TensorRef]] = moments
        for number, values in enumerate(moments):
            tensors |= {f"state.{number}.{name}": tensor for name, tensor in values.items()}
        for name, tensor in tensors.items():
            if type(tensor) is not TensorRef or tensor.shape is None:
                raise self.error(f"{shorten(name)} is {describe(tensor)}, not a tensor")
        self._made = ChosenSource(self.archive, tensors, (_optim_again, (path, rank)))
        self.groups = [
            Flat(self._made, f"{key}.{number}", prod(tensor.shape or ())) for number, tensor in enumerate(listed_groups)
        ]
        self.beside = self._beside(state)

    def _stage(self, value: Any) -> int:
        if type(value) is Reduced and type(value.args) is tuple and len(value.args) == 1:  # an enumeration
            value = value.args[0]
        if value not in (0, 1, 2, 3) or type(value) is not int:
            raise self.error(f"its zero_stage is {describe(value)}, not 1, 2 or 3")
        return value

    @property
    def source(self) -> ChosenSource:
        """Tensors of the file."""
        assert self._made is not None  # made when the file is opened
        return self._made

    def _moments(self, state: dict[Any, Any], count: int) -> list[dict[str, TensorRef]]:
        """Tensors of the optimizer state for each group; empty if the file has no state."""
        held = state.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")
        found: list[dict[str, TensorRef]] = [{} for _ in range(count)]
        if type(held) is list:  # checkpoints for other world sizes have a dict for each group
            pairs = list(enumerate(held))
        elif type(held) is dict and type(held.get("state")) is dict:
            pairs = [(key.value if type(key) is NumberKey else key, value) for key, value in held["state"].items()]
        else:
            return found
        for number, values in pairs:
            if not is_size(number) or number >= count or type(values) is not dict:
                raise self.error(
                    f"its optimizer has a state {describe(number)}, and there are {plural(count, 'group')}"
                )
            for name, value in values.items():
                if type(name) is str and type(value) is TensorRef:
                    found[number][name] = value
        return found

    def moment(self, group: int, key: str) -> Flat | None:
        """State of a group under one name; None if there is none.

        Raises:
            FileFormatError: The state has fewer elements than the group.
        """
        tensor = self.states[group].get(key)
        if tensor is None:
            return None
        numel = prod(tensor.shape or ())
        if numel < self.groups[group].numel:
            raise self.error(
                f"{shorten(key)} of group {group} has {numel:,} elements, and the group {self.groups[group].numel:,}"
            )
        return Flat(self.source, f"state.{group}.{key}", self.groups[group].numel)

    def single(self, group: int, key: str) -> Expression | None:
        """A state that is one number per group, such as the step; None for any other state."""
        tensor = self.states[group].get(key) if group < len(self.states) else None
        if tensor is None or tensor.shape is None or (tensor.shape and prod(tensor.shape) != 1):
            return None
        if tensor.shape and self.groups[group].numel == 1:
            return None
        return self.source.row(f"state.{group}.{key}")

    def paddings(self, group: int, count: int) -> Sequence[int]:
        """Number of padding elements after each parameter of a group."""
        given = self._state.get("param_alignment_paddings")
        if given is None:
            return [0] * count
        found = self._list(given, "its param_alignment_paddings")
        ours = found[group] if group < len(found) else None
        if type(ours) is not list or len(ours) != count or not all(map(is_size, ours)):
            raise self.error(f"its param_alignment_paddings give group {group} {describe(ours)}, not {count} numbers")
        return ours

    def _beside(self, state: dict[Any, Any]) -> dict[str, Any]:
        held = state.get("optimizer_state_dict" if self.stage == 3 else "base_optimizer_state")
        groups = held.get("param_groups") if type(held) is dict else None
        names = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "ds_version")
        kept = {name: state[name] for name in names if name in state}
        return kept if groups is None else {"param_groups": groups, **kept}


class ModelFile(_StateFile):
    """A `*_model_states.pt`.

    Attributes:
        shapes: Shapes by name for each group, in the order of the elements.
        frozen: Shapes by name of the parameters that are not in the optimizer.
        module: Names in the state dict of the model.
        buffers: Which of them are buffers.
        shared: Parameter that each tied name stands for.
        beside: Entries that are not tensors.
    """

    def __init__(self, path: str, rank: int) -> None:
        super().__init__(path, rank)
        root = self._root
        if "param_shapes" not in root or MODEL not in root:
            raise SourceError(
                "it lacks the shapes of the parameters (param_shapes), which older versions of DeepSpeed did not write",
                where=path,
                hint="open only its module: add #module to the file",
            )
        given = root["param_shapes"]
        self.shapes = [self._shapes(each, "param_shapes") for each in (given if type(given) is list else [given])]
        frozen = root.get("frozen_param_shapes")
        self.frozen = {} if frozen is None else self._shapes(frozen, "frozen_param_shapes")
        fragments = root.get("frozen_param_fragments")
        held = {} if fragments is None else self._dict(fragments, "its frozen_param_fragments")
        module = {name: value for name, value in self._dict(root[MODEL], f"its {MODEL}").items() if type(name) is str}
        names = root.get("buffer_names") or ()
        self.buffers = {name for name in self._list(names, "its buffer_names") if type(name) is str}
        self.module = [name for name, value in module.items() if type(value) is TensorRef]
        for name, shape in ((name, shape) for shapes in self.shapes for name, shape in shapes.items()):
            whole = module.get(name)  # float16 or bfloat16, unless it is partitioned
            if type(whole) is TensorRef and whole.shape not in (shape, (0,)):
                raise self.error(
                    f"{shorten(repr(name))} has the shape {list(whole.shape or ())} in its {MODEL}, and "
                    f"{list(shape)} in its param_shapes"
                )
        tensors = {f"{MODEL}.{name}": module[name] for name in self.module}
        for name in self.frozen:
            if type(held.get(name)) is not TensorRef:
                raise self.error(f"it has the shape of the frozen {shorten(repr(name))}, but no fragment of it")
            tensors[f"frozen.{name}"] = held[name]
        seen: set[str] = set()
        for name in (name for shapes in (*self.shapes, self.frozen) for name in shapes):
            if name in seen:
                raise self.error(f"it has the shape of {shorten(repr(name))} twice")
            seen.add(name)
        self.shared = self._pairs(root.get("shared_params"), seen)
        self._made = ChosenSource(self.archive, tensors, (_model_again, (path, rank)))
        skipped = {
            MODEL,
            "param_shapes",
            "frozen_param_shapes",
            "frozen_param_fragments",
            "shared_params",
            "buffer_names",
        }
        self.beside = {
            name: value
            for name, value in root.items()
            if type(name) is str and name not in skipped and value is not None
        }

    @property
    def source(self) -> ChosenSource:
        """Tensors of the file."""
        return self._made

    def _shapes(self, value: Any, what: str) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, given in self._dict(value, f"its {what}").items():
            shape = sizes_of(given)
            if type(name) is not str or shape is None:
                raise self.error(f"its {what} give {describe(name)} the shape {describe(given)}")
            found[name] = shape
        return found

    def _pairs(self, value: Any, known: set[str]) -> dict[str, str]:
        """Parameter of each tied name; for a chain of ties, the last one."""
        pairs = {} if value is None else self._dict(value, "its shared_params")
        return {
            name: other
            for name, other in pairs.items()
            if type(name) is str and type(other) is str and name not in known and other in known
        }

    def fragment(self, name: str) -> Flat:
        """The fragment of a frozen parameter in this file."""
        tensor = self._dict(self._root["frozen_param_fragments"], "its frozen_param_fragments").get(name)
        if type(tensor) is not TensorRef:
            raise self.error(f"it has no fragment of the frozen {shorten(repr(name))}")
        return Flat(self._made, f"frozen.{name}", prod(tensor.shape or ()))


def _optim_again(path: str, rank: int) -> ChosenSource:
    return OptimFile(path, rank).source


def _model_again(path: str, rank: int) -> ChosenSource:
    return ModelFile(path, rank).source
