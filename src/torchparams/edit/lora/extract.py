"""Extract a LoRA adapter in PEFT's layout from the difference of two checkpoints."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.edit.convert import as_stored, select_to_write
from torchparams.edit.lora._adapter import CONFIG, PREFIX, WEIGHTS
from torchparams.edit.lora._lowrank import Difference, Factor, Factors
from torchparams.edit.lora._orientation import EMBEDDING, Orientation
from torchparams.edit.merge.matching import some
from torchparams.edit.plan.layout import Output
from torchparams.edit.plan.plan import MEMORY, Plan
from torchparams.edit.save import differing
from torchparams.encodings.companions import refuse
from torchparams.errors import MismatchError, OptionError, PlanError, shorten
from torchparams.expressions.combination import combines
from torchparams.io.write import replace_file, telling
from torchparams.render.result import Result
from torchparams.render.tree import Column, Row, Table, Text, Tree, cut, plural, printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.edit.plan.written import Written
    from torchparams.engines.base import Progress
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source

_ROWS_SHOWN = 40


def extract_lora(
    base: object,
    tuned: object,
    path: str | os.PathLike[str],
    selector: object = None,
    *,
    rank: int,
    embeddings: object = None,
    fan_in_fan_out: object = None,
    save_rest: bool = False,
    dtype: object = "float32",
    base_name: str = "",
    memory: int | str = MEMORY,
    overwrite: bool = False,
) -> LoraPlan:
    """Plan the best LoRA adapter of a given rank between a base and a tuned checkpoint.

    The factors of each matrix come from the truncated singular value decomposition of the difference; each factor takes
    the square root of the singular values. No other change of that rank leaves a smaller Frobenius error (Eckart and
    Young 1936). The difference is never in memory as a whole (see `torchparams.edit.lora._lowrank.Factors`). The result
    of `run` reports the relative Frobenius error of each matrix.

    The directory has PEFT's layout: `adapter_config.json`, with `lora_alpha` equal to `r`, and
    `adapter_model.safetensors`. Only matrices named `….weight` get factors. Other tensors that differ, such as biases,
    norms and convolutions, are listed; `save_rest` writes them whole. Planning reads both checkpoints once.

    Args:
        base, tuned: Models, checkpoints or mappings of tensors with the same names and shapes.
        path: Target directory; created if missing.
        selector: Tensors to compare; None for all.
        rank: Rank, capped at the number of rows and columns of each matrix.
        embeddings: Selector of embedding weights, for which PEFT uses another layout. By default, the embedding layers
            of a live model; for a file, the modules named `wte`, `wpe` or `…embed…`.
        fan_in_fan_out: Whether weights are stored as (in, out), as by transformers' `Conv1D` in GPT-2; or a selector of
            such weights. By default, the class of a live layer or the `config.json` beside the base decides. If neither
            does, it is required for weights with typical `Conv1D` names such as `c_proj`.
        save_rest: Write differing tensors without factors whole, as PEFT's `modules_to_save`.
        dtype: Dtype of the factors.
        base_name: Value of `base_model_name_or_path` in the configuration.
        memory: Memory limit for tensors during the run, in bytes.
        overwrite: Replace an existing adapter.

    Raises:
        MismatchError: Names or shapes differ.
        PlanError: Nothing differs that can be written; the target exists; the disk or memory is too small; or the
            orientation of a weight is unknown.
        NotReadable: A differing tensor holds codes or scales of an unknown encoding.
        OptionError: The rank is invalid.

    >>> import numpy as np, tempfile
    >>> import torchparams as tp
    >>> base = {"fc.weight": np.zeros((4, 3), np.float32), "fc.bias": np.zeros(4, np.float32)}
    >>> tuned = {"fc.weight": np.ones((4, 3), np.float32), "fc.bias": np.ones(4, np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = tp.extract_lora(base, tuned, f"{folder}/adapter", rank=1).run()
    ...     print(tp.of(f"{folder}/adapter/adapter_model.safetensors").names)
    ['base_model.model.fc.lora_A.weight', 'base_model.model.fc.lora_B.weight']
    >>> [(one.name, one.error < 1e-6) for one in made.changes], made.left
    ([('fc.weight', True)], ('fc.bias',))
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise OptionError(f"`rank` must be a positive integer, not {rank!r}")
    wanted = DType.of(dtype)
    if not combines(wanted):
        raise OptionError(f"the dtype of factors must be floating-point, not {wanted}")
    ours, _, notes = select_to_write(tuned, selector)
    below, _, _ = select_to_write(base, None)
    before, after = as_stored(below), as_stored(ours)
    theirs = {name: info for info in before.values() for name in (info.name, *info.aliases)}
    _check_same(theirs, after, below.source, ours.source)
    changed = differing(
        {name: (ours.source, info) for name, info in after.items()},
        {name: (below.source, theirs[name]) for name in after},
    )
    if not changed:
        raise PlanError("the checkpoints do not differ", where=f"{below.source.label} and {ours.source.label}")
    hint = "Exclude these tensors with a selector (-s), or decode both checkpoints first"
    refuse(ours.source.coded(), (name for name in after if name in changed), ours.source.label, hint)
    refuse(below.source.coded(), (theirs[name].name for name in after if name in changed), below.source.label, hint)
    embedding = _embeddings(embeddings, after, ours.source.label)
    orientation = Orientation(below.source, before, fan_in_fan_out)
    outputs: list[Output] = []
    found: list[Factors] = []
    transposed = False
    left: list[str] = []
    for name in (name for name in after if name in changed):
        info = after[name]
        if not (name.endswith(".weight") and len(info.shape or ()) == 2 and info.numel and combines(info.dtype)):
            left.append(name)
            continue
        difference = Difference(ours.source.row(name, info), below.source.row(theirs[name].name, theirs[name]))
        factors = Factors(difference, rank, wanted, name)
        found.append(factors)
        module = PREFIX + name.removesuffix(".weight")
        if name in embedding:
            outputs.append(Output(f"{module}.lora_embedding_A", Factor(factors, "b", transposed=True)))
            outputs.append(Output(f"{module}.lora_embedding_B", Factor(factors, "a", transposed=True)))
        elif _is_transposed(theirs[name], orientation, below.source.label):
            transposed = True
            outputs.append(Output(f"{module}.lora_A.weight", Factor(factors, "b", transposed=True)))
            outputs.append(Output(f"{module}.lora_B.weight", Factor(factors, "a", transposed=True)))
        else:
            outputs.append(Output(f"{module}.lora_A.weight", Factor(factors, "a")))
            outputs.append(Output(f"{module}.lora_B.weight", Factor(factors, "b")))
    modules: list[str] = []
    if left and save_rest:
        modules = list(dict.fromkeys(_module(name) for name in left))
        whole = [info for info in after.values() if _module(info.name) in modules]
        clash = next((info.name for info in whole if info.name in changed and info.name not in left), None)
        if clash is not None or "" in modules:
            raise PlanError(
                f"{clash or left[0]!r} cannot be written whole: "
                + ("its module already has factors" if clash else "it has no module"),
                where=os.fspath(path),
                hint="exclude it with a selector, or omit save_rest (--save-rest)",
            )
        outputs += [Output(PREFIX + info.name, ours.source.row(info.name, info)) for info in whole]
        notes.append(f"written whole: {some([info.name for info in whole])}")
    elif left:
        notes.append(f"differ, but are not written, because only matrices have factors: {some(left)}")
    if not outputs:
        raise PlanError(f"only {some(left)} differ, and only matrices can have factors", where=ours.source.label)
    notes.insert(
        0,
        f"method: truncated singular value decomposition (LoRA, Hu et al. 2021, arXiv:2106.09685), rank {rank}, of "
        f"{ours.source.label} - {below.source.label}; {plural(len(found), 'matrix', 'matrices')}",
    )
    config = {**_config_of(found, rank, modules, base_name), "fan_in_fan_out": transposed}
    return LoraPlan(
        path, outputs, found, config, tuple(() if save_rest else left), notes=notes, memory=memory, overwrite=overwrite
    )


def _check_same(
    theirs: Mapping[str, ParameterInfo], after: Mapping[str, ParameterInfo], base: Source, tuned: Source
) -> None:
    for name, info in after.items():
        if name not in theirs:
            raise MismatchError(
                f"{shorten(repr(name))} of {tuned.label} is not in {base.label}",
                hint="exclude such tensors with a selector (-s)",
            )
        if info.shape != theirs[name].shape:
            raise MismatchError(
                f"{name!r} has shape {list(theirs[name].shape or ())} in {base.label} and {list(info.shape or ())} "
                f"in {tuned.label}",
                hint="exclude such tensors with a selector (-s)",
            )


def _is_transposed(info: ParameterInfo, orientation: Orientation, label: str) -> bool:
    known = orientation.is_transposed(info)
    if known is None and orientation.looks_transposed(info.name):
        raise PlanError(
            f"cannot tell whether {info.name!r} is stored as (out, in) or as (in, out), as in transformers' Conv1D",
            where=label,
            exists="a config.json beside the base would decide",
            hint="pass fan_in_fan_out: False, True, or a selector of (in, out) weights "
            "(--no-fan-in-fan-out, --fan-in-fan-out SELECTOR)",
        )
    return bool(known)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _embeddings(selector: object, infos: Mapping[str, ParameterInfo], label: str) -> set[str]:
    if selector is not None:
        from torchparams.selectors import Selector

        return set(Selector.of(selector).names(infos.values(), strict=True, where=label))
    return {
        name
        for name, info in infos.items()
        if (info.module.endswith("Embedding") if info.module is not None else EMBEDDING.fullmatch(name))
    }


def _config_of(found: list[Factors], rank: int, modules: list[str], base_name: str) -> dict[str, Any]:
    """PEFT configuration. Module names are complete, so that each matches only itself."""
    smaller = {factors.name.removesuffix(".weight"): factors.rank for factors in found if factors.rank != rank}
    patterns = {re.escape(name): number for name, number in smaller.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": [factors.name.removesuffix(".weight") for factors in found],
        "modules_to_save": modules or None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


class LoraPlan(Plan):
    """Plan of an adapter directory: two files, weights first.

    Args:
        folder: Target directory.
        outputs: Output tensors.
        found: Factors among the outputs.
        config: Content of `adapter_config.json`.
        left: Names of differing tensors that are not written.
        options: Options of `Plan`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        outputs: list[Output],
        found: list[Factors],
        config: dict[str, Any],
        left: tuple[str, ...],
        **options: Any,
    ) -> None:
        self.folder = os.fspath(folder).rstrip("/" + os.sep) or os.fspath(folder)
        self.found, self.config, self.left = found, config, left
        super().__init__(outputs, os.path.join(self.folder, WEIGHTS), metadata={"format": "pt"}, **options)

    def check(self) -> None:
        """Check the target like `Plan.check`; the directory itself may be missing, its parent may not."""
        if os.path.isdir(self.folder):
            config = os.path.join(self.folder, CONFIG)
            if os.path.lexists(config) and not self.overwrite:
                raise PlanError(
                    "it exists already",
                    where=config,
                    hint="to replace it once the new one is complete, pass overwrite=True (--force)",
                )
            super().check()
            return
        if os.path.lexists(self.folder):
            raise PlanError(
                "an adapter needs a directory, but the target is a file",
                where=self.folder,
                hint="choose another target",
            )
        self.check_sources()
        above = os.path.dirname(self.folder) or "."
        if not os.path.isdir(above):
            raise PlanError("directory not found", where=above, hint=f"make it first: mkdir -p {above}")

    def run(self, progress: Progress | None = None) -> Extracted:  # type: ignore[override]  # a richer result
        """Write the adapter; see `Plan.run`. The configuration is written last, and makes the directory an adapter.

        If an adapter is replaced, its two files are replaced one right after the other.

        Returns:
            A summary of the run, with the error of each change.
        """
        self.check()
        fresh = not os.path.isdir(self.folder)
        if fresh:
            with telling(self.folder):
                os.mkdir(self.folder)
        try:
            written = super().run(progress)
            with telling(self.folder):
                replace_file(os.path.join(self.folder, CONFIG), (json.dumps(self.config, indent=2) + "\n").encode())
        except BaseException:
            if fresh:
                with suppress(OSError):
                    os.remove(self.path)
                with suppress(OSError):
                    os.rmdir(self.folder)
            raise
        changes = tuple(
            Change(factors.name, factors.difference.shape, factors.rank, factors.norm or 0.0, factors.error or 0.0)
            for factors in self.found
        )
        return Extracted(written, changes, self.left)


@dataclass(frozen=True, slots=True)
class Change:
    """Low-rank change of one weight.

    Attributes:
        name: Name of the weight.
        shape: Shape of the weight.
        rank: Rank of the factors.
        norm: Frobenius norm of the difference.
        error: Relative Frobenius error of the factors as written.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, repr=False)
class Extracted(Result):
    """Summary of a written adapter.

    Attributes:
        written: Summary of the run.
        changes: Change of each weight, with its error.
        left: Names of differing tensors that were not written.
    """

    written: Written
    changes: tuple[Change, ...]
    left: tuple[str, ...]

    def tree(self) -> Tree:
        """Tree of the changes, largest error first."""
        columns = (
            Column("name", style="name", shrink=True),
            Column("shape", drop=2),
            Column("rank", right=True, style="number"),
            Column("norm", right=True, style="number", drop=1),
            Column("relative error", right=True, style="number"),
        )
        worst = sorted(self.changes, key=lambda change: -change.error)
        rows = [Row((c.name, str(list(c.shape)), f"{c.rank}", f"{c.norm:.4g}", f"{c.error:.4g}")) for c in worst]
        parts: list[Text | Table] = [
            *self.written.tree().parts[:1],
            Table(columns, cut(rows, _ROWS_SHOWN, "matrices")),
        ]
        return Tree((*parts, *(Text(printable(note)) for note in self.written.notes)))

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON data."""
        return {
            "written": self.written.to_json(),
            "changes": [
                {"name": c.name, "shape": list(c.shape), "rank": c.rank, "norm": c.norm, "relative_error": c.error}
                for c in self.changes
            ],
            "left": list(self.left),
        }
