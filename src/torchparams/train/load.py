"""Load values from any source into a live model, in place: every parameter stays the same object."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchparams.train._losses import losses_of, lossy_names, refuse_overflow
from torchparams.train._matching import matching
from torchparams.train._memory import give_memory
from torchparams.train._resharding import Moving, losses_together, parts_of
from torchparams.train._transfer import transfer
from torchparams.train.coverage import Coverage, grouped, strict_kinds

if TYPE_CHECKING:
    from collections.abc import Collection

    from torchparams.engines.base import Progress

_MATCHED_AMONG = 10_000  # names on both sides; above that, only shapes and endings are compared


def load(
    model: Any,
    x: Any,
    selector: object = None,
    *,
    rename: object = None,
    strict: bool | Collection[str] = True,
    cast: bool = True,
    allow_overflow: bool = False,
    device: Any = None,
    progress: Progress | None = None,
) -> Coverage:
    """Fill a model's parameters and saved buffers with the values of `x`, in place.

    Every parameter stays the same object, with its memory, device, dtype, ties and `requires_grad`: an optimizer's
    references stay valid. Values are streamed tensor by tensor; there are never two copies of the model in memory.
    Names, shapes and dtypes are checked first, as `strict` says, and casts are checked for overflow. If a check fails,
    nothing is changed. For casts that can lose values, the values are read twice: first to count the losses.

    As in torch, the source may lack the `num_batches_tracked` of batch norms, which are then not changed. Buffers that
    a state dict leaves out (`persistent=False`) are not loaded. Extra state of modules (`get_extra_state`) is not
    loaded either, and load hooks of modules are not run; the coverage lists both. Tensors on the meta device get memory
    before they are loaded.

    Of a sharded parameter (a DTensor), each rank reads the byte ranges of its own part alone, and nothing is
    communicated, with two exceptions, in which all ranks make the call. For casts that can lose values, they meet and
    gather the losses with two collectives. From a model that is sharded differently on the same ranks, they meet and
    send each other the elements, without collectives. Parameters in FSDP1's flat parameter are refused outside of
    `summon_full_params`.

    Args:
        model: A live `nn.Module`, wrapped or not, or a table of one: `torchparams.of(model).select(…)`.
        x: Source of the values: the path of a checkpoint, a mapping of tensors, a different model, or a table of any of
            these.
        selector: Parameters of the model to load; all by default. Tensors of `x` for other parameters are left out.
        rename: Map from names in `x` to the model's names: any form that `torchparams.renames` accepts; or `"auto"`,
            which strips or adds the prefixes that make most names match, and pairs the rest if shape and position
            allow only one answer. The coverage describes the renaming.
        strict: True to refuse missing, unexpected and mismatched tensors; False to load the tensors that fit; or the
            kinds to refuse, as in `("missing", "mismatched")`.
        cast: Allow a different dtype of the same kind: between floats, between complex numbers, into wider integers.
            Codes of unknown encodings are never cast.
        allow_overflow: Allow casts in which finite values become infinite, or saturate in a dtype without infinity.
        device: Device of the memory for tensors on the meta device; by default torch's default device.
        progress: Callback with the bytes loaded so far and in total.

    Raises:
        MismatchError: A tensor has a mismatch that `strict` refuses, no tensor fits, or a value is too large for the
            model's dtype. Nothing is changed.
        NoMatch: The selector matches nothing.
        SourceError: `x` cannot be read. If reading fails after the start, the model is partly loaded, and the error's
            notes list the loaded tensors.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(3, 2)
    >>> print(tp.load(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2, dtype=torch.float64)}))
    dict → Linear
    what    name  from  note
    loaded  bias        float64 → float32
    2 loaded (1 cast) · 0 missing · 0 unexpected · 0 mismatched
    """
    strict_kinds(strict)
    match = matching(model, x, selector, rename, cast)
    match.coverage.refuse(strict, lambda: match.hint(rename, strict))
    match.refuse_nothing(rename)
    match.given.check_unchanged()
    pairs = match.pairs()
    lost = losses_together(pairs, losses_of(parts_of(pairs)), lossy_names(pairs), match.where)
    if not allow_overflow:
        refuse_overflow(lost, pairs, match.where)
    moving = Moving(pairs, match.where)
    moving.meet()
    give_memory(match.without_memory, device, match.shapes, where=match.live.label)
    parts = parts_of(moving.others, pairs)
    done = sum(pair.info.nbytes for pair in parts)
    transfer(parts, progress and (lambda at, total: progress(at, total + moving.nbytes)))
    moving.run(progress and (lambda at, total: progress(done + at, done + total)))
    match.set_counters(device)
    found = match.coverage
    loaded = {name: item._replace(lost=lost[name]) if name in lost else item for name, item in found.loaded.items()}
    return replace(found, loaded=grouped(loaded.values()), notes=(*found.notes, *match.left_on_meta()))


def coverage(model: Any, x: Any, selector: object = None, *, rename: object = None, cast: bool = True) -> Coverage:
    """Check what `load` would load, without changing the model.

    Values are read only to compare two tensors of `x` for one tied parameter. Ranks do not communicate.

    Args:
        model, x, selector, rename, cast: As for `load`.

    >>> import torch
    >>> import torchparams as tp
    >>> print(tp.coverage(torch.nn.Linear(3, 2), {"weight": torch.ones(3, 2), "bias": torch.zeros(2)}))
    dict → Linear
    what        name    from  note
    mismatched  weight        shape [3, 2], not [2, 3]
    1 loaded · 0 missing · 0 unexpected · 1 mismatched
    """
    return matching(model, x, selector, rename, cast).coverage
