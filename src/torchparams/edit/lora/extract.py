"""LoRA adapters in PEFT's layout, made of the difference of two checkpoints."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchparams.dtypes import DType
from torchparams.edit.convert import as_stored, choose
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
from torchparams.render.tree import Column, Report, Row, Table, Text, cut, plural, printable

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
    """A plan that writes the best LoRA adapter of a rank between a base and what was tuned from it.

    The factors of a matrix are the truncated singular value decomposition of the difference, each with the square root
    of the singular values: of all changes of that rank, the one that leaves the least (Eckart and Young 1936).
    `torchparams.edit.lora._lowrank.Factors` computes it without the difference in memory. The result of `run` gives the
    relative Frobenius error that each leaves.

    The directory has PEFT's layout: `adapter_config.json`, with `lora_alpha` equal to `r`, and
    `adapter_model.safetensors`. An adapter has factors for matrices called `….weight` only. Other tensors that differ,
    such as biases, norms and convolutions, are listed, and written whole with `save_rest`. Making the plan reads both
    sides once.

    Args:
        base, tuned: Anything that has parameters, of the same names and shapes.
        path: The directory; made where there is none.
        selector: Only the differences of these; None for all.
        rank: The rank; of smaller matrices, their rows or columns.
        embeddings: What selects the weights of embeddings, which PEFT lays out in its own way. None for those of a
            live model's embeddings; of a file, those with a module called `wte`, `wpe` or `…embed…`.
        fan_in_fan_out: Whether weights are stored as (in, out), as those of `Conv1D` in transformers' GPT-2; or what
            selects those that are. None for what the class of a live layer or the `config.json` beside the base says;
            else it has to be stated of weights that are called as such, `c_proj` and the like.
        save_rest: Write tensors that differ and have no factors whole, as PEFT's `modules_to_save`.
        dtype: The factors' type.
        base_name: What the configuration says the base is: `base_model_name_or_path`.
        memory: Bytes of memory that tensors may take while it runs.
        overwrite: Replace an adapter that is there.

    Raises:
        MismatchError: Names or shapes differ.
        PlanError: Nothing differs that could be written; something is at the path; it does not fit; or nothing says
            which way round a weight is stored.
        NotReadable: Codes differ, of an encoding that is not known, which stand beside their scales.
        OptionError: A rank that is none.

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
        raise OptionError(f"rank={rank!r} is no rank", hint="give a number of 1 or more")
    wanted = DType.of(dtype)
    if not combines(wanted):
        raise OptionError(f"factors are floats, and not {wanted}")
    ours, _, notes = choose(tuned, selector)
    below, _, _ = choose(base, None)
    before, after = as_stored(below), as_stored(ours)
    theirs = {name: info for info in before.values() for name in (info.name, *info.aliases)}
    _check_same(theirs, after, below.source, ours.source)
    changed = differing(
        {name: (ours.source, info) for name, info in after.items()},
        {name: (below.source, theirs[name]) for name in after},
    )
    if not changed:
        raise PlanError("nothing differs", where=f"{below.source.label} and {ours.source.label}")
    hint = "Leave such out with a selector (-s), or decode both checkpoints first"
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
                + ("its module has factors already" if clash else "it has no module"),
                where=os.fspath(path),
                hint="leave such out with a selector, or do without save_rest (--save-rest)",
            )
        outputs += [Output(PREFIX + info.name, ours.source.row(info.name, info)) for info in whole]
        notes.append(f"written whole: {some([info.name for info in whole])}")
    elif left:
        notes.append(f"differ, and are not in the adapter, which has factors of matrices alone: {some(left)}")
    if not outputs:
        raise PlanError(f"only {some(left)} differ, and have no factors", where=ours.source.label)
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
                hint="leave such out with a selector (-s)",
            )
        if info.shape != theirs[name].shape:
            raise MismatchError(
                f"{name!r} has shape {list(theirs[name].shape or ())} in {base.label} and {list(info.shape or ())} "
                f"in {tuned.label}",
                hint="leave such out with a selector (-s)",
            )


def _is_transposed(info: ParameterInfo, orientation: Orientation, label: str) -> bool:
    known = orientation.is_transposed(info)
    if known is None and orientation.looks_transposed(info.name):
        raise PlanError(
            f"nothing says whether {info.name!r} is stored as (out, in) or, as by Conv1D of transformers, as (in, out)",
            where=label,
            exists="the config.json beside the base would",
            hint="state it: fan_in_fan_out=False or True, or a selector of the latter "
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
    """What PEFT needs to know. Names of modules are whole, so that each hits itself alone."""
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
    """A plan of an adapter: two files in a directory, the weights first.

    Args:
        folder: The directory.
        outputs: The tensors.
        found: The factors among them.
        config: What `adapter_config.json` says.
        left: Names of tensors that differ and are not written.
        options: Those of `Plan`.
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
        """As that of `Plan`; the directory may be missing, and its own directory may not."""
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
            raise PlanError("an adapter is a directory, and this is none", where=self.folder, hint="name another")
        self.check_sources()
        above = os.path.dirname(self.folder) or "."
        if not os.path.isdir(above):
            raise PlanError("there is no such directory", where=above, hint=f"make it first: mkdir -p {above}")

    def run(self, progress: Progress | None = None) -> Extracted:  # type: ignore[override]  # it says more
        """Write it: see `Plan.run`. The configuration comes last; without it, it is no adapter.

        Of an adapter that is replaced, the two files are, one right after the other.

        Returns:
            What was written, and what each change leaves.
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
    """A change of low rank.

    Attributes:
        name: The weight's name.
        shape: Its shape.
        rank: The rank.
        norm: Frobenius norm of the whole difference.
        error: Frobenius norm of what the change, as it is written, leaves of it, relative to that.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, repr=False)
class Extracted(Result):
    """An adapter that was written.

    Attributes:
        written: What was written.
        changes: Each weight's change, and what it leaves.
        left: Names of tensors that differ and are not in the adapter.
    """

    written: Written
    changes: tuple[Change, ...]
    left: tuple[str, ...]

    def report(self) -> Report:
        """The report: a table of the changes, the worst first."""
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
            *self.written.report().parts[:1],
            Table(columns, cut(rows, _ROWS_SHOWN, "matrices")),
        ]
        return Report((*parts, *(Text(printable(note)) for note in self.written.notes)))

    def to_json(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "written": self.written.to_json(),
            "changes": [
                {"name": c.name, "shape": list(c.shape), "rank": c.rank, "norm": c.norm, "relative_error": c.error}
                for c in self.changes
            ],
            "left": list(self.left),
        }
