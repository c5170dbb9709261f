"""Loading of values into sharded parameters: compatibility, and the elements that a rank needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.engines.ranks import Ranks, fingerprint
from torchparams.engines.redistribute import redistribute, whole_on
from torchparams.expressions.casts import Losses
from torchparams.expressions.sharded import Sharded, part_of
from torchparams.render.tree import listed, plural
from torchparams.sources.live.flat import RESHARD
from torchparams.sources.live.sharded import layout_of, local_of
from torchparams.sources.live.sharding import is_dtensor
from torchparams.sources.mapping import MappingSource
from torchparams.sources.view import ViewSource
from torchparams.train._assignment import Assignment
from torchparams.train._shards import box_here, is_alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torchparams.engines.base import Progress
    from torchparams.expressions.base import Expression
    from torchparams.expressions.sharded import Layout
    from torchparams.info import ParameterInfo
    from torchparams.sources.base import Source


def sharded_problem(given: ParameterInfo, source: Source, wanted: ParameterInfo, target: Any) -> str:
    """Reason why values cannot be copied between two tensors if one is sharded; empty if they can.

    Args:
        given, source: Tensor of the source.
        wanted, target: Tensor of the model.
    """
    for sharding in (given.sharding, wanted.sharding):
        if sharding is not None and sharding.kind != "DTensor":
            return f"FSDP keeps it: {RESHARD}"
        if sharding is not None and any(placement.startswith("Partial") for placement in sharding.placements):
            return "ranks keep summands of it"
    if given.sharding is None:
        return ""
    if given.device == "meta":
        return "it is on the meta device, which holds no values"
    theirs = sorted(given.sharding.ranks)
    if wanted.sharding is not None and sorted(wanted.sharding.ranks) != theirs:
        ours = listed([str(rank) for rank in sorted(wanted.sharding.ranks)], 8)
        there = listed([str(rank) for rank in theirs], 8)
        return f"the ranks {there} keep it, and {ours} the model's: save it with torchparams.save, and load the file"
    return ""


def _is_moved(pair: Assignment) -> bool:
    """Whether the values are sharded, and in another way than the model's tensor."""
    if pair.info.sharding is None:
        return False
    return not (is_dtensor(pair.target) and is_alike(pair.source.value(pair.info.name), pair.target))


def parts_of(pairs: Sequence[Assignment], writing: Iterable[Assignment] = ()) -> list[Assignment]:
    """Replace each DTensor by its part on this rank, and each source by the elements of that part.

    So a rank reads only its own elements from a file. For values that are sharded in another way than their target, the
    elements are those of the source's part.

    Args:
        pairs: The pairs.
        writing: All pairs whose targets are written; values that are among these are copied first.
    """
    targets = {id(pair.target) for pair in (*pairs, *writing)}
    found: list[Assignment] = []
    rows: list[tuple[str, Expression]] = []
    places: list[int] = []
    for pair in pairs:
        if is_dtensor(pair.target) or pair.info.sharding is not None:
            places.append(len(found))
            rows.append((pair.name, _part_of_row(pair, targets)))
        found.append(pair)
    if not rows:
        return list(pairs)
    view = ViewSource(rows, label=pairs[0].source.label)
    for place in places:
        pair = pairs[place]
        target = local_of(pair.target) if is_dtensor(pair.target) else pair.target
        found[place] = Assignment(pair.name, target, view, view.infos()[pair.name])
    return found


def _part_of_row(pair: Assignment, targets: set[int]) -> Expression:
    row = pair.source.row(pair.info.name, pair.info)
    if isinstance(row, Sharded):
        value = pair.source.value(pair.info.name)
        if value is not pair.target and id(value) in targets:  # another pair writes to it, perhaps earlier
            return MappingSource({pair.name: row.tensor().clone()}, pair.source.label).row(pair.name)
        return row.local
    layout = layout_of(pair.target, pair.name, pair.source.label)
    return part_of(row, layout.grid, box_here(layout))


class Moving:
    """The pairs of a load whose values are sharded, and in another way than their targets: ranks exchange elements.

    Args:
        pairs: All pairs of the load.
        where: Label of the load.

    Attributes:
        others: The other pairs.
        nbytes: Total size of the values, of whole tensors.
    """

    def __init__(self, pairs: Sequence[Assignment], where: str) -> None:
        targets = {id(pair.target) for pair in pairs}
        self.others = [pair for pair in pairs if not _is_moved(pair)]
        self._where = where
        self._moves: list[tuple[Assignment, Any, Layout]] = []
        for pair in pairs if len(self.others) < len(pairs) else ():
            if _is_moved(pair):
                value = pair.source.value(pair.info.name)
                part = local_of(value)
                if id(value) in targets:  # another pair may write to it earlier
                    part = part.clone()
                self._moves.append((pair, part, layout_of(value, pair.name, where)))
        self.nbytes = sum(pair.info.nbytes for pair, _, _ in self._moves)

    def meet(self) -> None:
        """Wait for the other ranks, if there are pairs to move.

        Raises:
            RanksError: A rank does not make the same call in time.
        """
        if self._moves:
            team = Ranks(rank for _, _, layout in self._moves for rank in layout.ranks)
            common = [pair.name for pair, _, layout in self._moves if layout.ranks == team.members]
            team.meet(f"load of {plural(len(common), 'tensor')} between different shards ({fingerprint(common)})")

    def run(self, progress: Progress | None = None) -> None:
        """Copy the values, one tensor after the other; all ranks call it after `meet`.

        Args:
            progress: Callback with the bytes moved so far and in total.
        """
        done = 0
        for pair, part, source in self._moves:
            target = pair.target.detach()
            layout = layout_of(target, pair.name, self._where) if is_dtensor(target) else whole_on(source)
            redistribute(part, local_of(target) if is_dtensor(target) else target, source, layout)
            done += pair.info.nbytes
            if progress is not None:
                progress(done, self.nbytes)


def losses_together(
    pairs: Sequence[Assignment], lost: Mapping[str, Losses], lossy: Sequence[str], where: str
) -> dict[str, Losses]:
    """Losses of casts: for DTensors summed over all ranks, and equal on every rank; for other tensors on this rank.

    All ranks of the tensors must call this: they meet, and gather once. It does nothing without casts that may lose
    values.

    Args:
        pairs: All pairs of the load.
        lost: Losses of casts on this rank.
        lossy: Names of tensors whose cast may lose values.
        where: Label of the load.
    """
    names = frozenset(lossy)
    layouts: dict[str, Layout] = {}
    for pair in pairs:
        if pair.name in names and pair.info.sharding is not None:  # each rank counted the values of its own part
            layouts[pair.name] = layout_of(pair.source.value(pair.info.name), pair.name, where)
        elif pair.name in names and is_dtensor(pair.target):
            layouts[pair.name] = layout_of(pair.target, pair.name, where)
    if not layouts:
        return dict(lost)
    team = Ranks(rank for layout in layouts.values() for rank in layout.ranks)
    team.meet(f"load {len(layouts)} sharded tensors with casts ({fingerprint(layouts)})")
    heard = dict(zip(team.members, team.gather(dict(lost)), strict=True))
    found = {name: losses for name, losses in lost.items() if name not in layouts}
    for name, layout in layouts.items():
        total = sum((heard[rank].get(name, Losses()) for rank in layout.owners()), Losses())
        if total:
            found[name] = total
    return found
