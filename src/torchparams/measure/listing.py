"""List parameters: a flat table, or a tree with subtotals that folds equal layers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import undecoded_lines
from torchparams.left_out import left_out_lines
from torchparams.measure.beside import as_json, beside_lines
from torchparams.parameters import Parameters, of
from torchparams.render.result import Result
from torchparams.render.rows import INFO_COLUMNS, shape_of, sort_infos, total_of
from torchparams.render.tabular import Tabular
from torchparams.render.tree import (
    Cell,
    Column,
    Row,
    Table,
    Text,
    Tree,
    human_bytes,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from torchparams.info import ParameterInfo

_MOST_DIGITS = 18  # maximum digits of a layer number; int() rejects thousands of digits


@dataclass(frozen=True, repr=False)
class Listing(Result, Tabular):
    """Listing of parameters, the result of `ls`.

    Attributes:
        params: The listed table.
        nested: Group by module instead of a flat table.
        depth: Maximum depth of the tree; None for all.
        fold: Whether the tree shows equal layers as one row.
        sort: Column to sort by, with a leading `-` for descending; `stored` for file order; None for the order of the
            table.
        limit: Maximum number of rows of a flat table; None for all.
    """

    columns = INFO_COLUMNS

    params: Parameters
    nested: bool = False
    depth: int | None = None
    fold: bool = True
    sort: str | None = None
    limit: int | None = None

    def table_rows(self) -> list[ParameterInfo]:
        """Infos in order."""
        return sort_infos(list(self.params.infos.values()), self.sort, self.params.source.keys)

    def tree(self) -> Tree:
        """Tree of the table, the totals, and non-tensor content."""
        source = self.params.source
        beside = tuple(beside_lines(source)) if self.params.selector is None else ()
        if not self.nested:
            return Tree((*self.params.tree(limit=self.limit, sort=self.sort).parts, *beside))
        infos = self.table_rows()
        return Tree(
            (
                Text(printable(f"{source.label} ({source.format})"), "title"),
                tree_table(tree_of(infos, fold=self.fold), depth=self.depth),
                Text(total_of(infos), "dim"),
                *((Text(narrow, "warn"),) if (narrow := self.params.narrow) else ()),
                *undecoded_lines(self.params.undecoded),
                *left_out_lines(self.params.left_out),
                *beside,
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The listing as JSON data.

        Source, format, metadata, totals, infos, codes that are not decoded, left-out state, verdict on the pickle.
        """
        source = self.params.source
        infos = self.table_rows()
        counted = [info for info in infos if info.requires_grad is not None and info.kind != "buffer"]
        return {
            "source": source.label,
            "format": source.format,
            "metadata": as_json(dict(source.metadata)),
            "total": {
                "tensors": len(infos),
                "numel": sum(info.numel for info in infos),
                "nbytes": sum(info.nbytes for info in infos),
                "trainable": sum(info.numel for info in counted if info.requires_grad) if counted else None,
            },
            "parameters": [info.to_json() for info in infos],
            "undecoded": [{"name": name, "reason": reason} for name, reason in self.params.undecoded.items()],
            "left_out": [each.to_json() for each in self.params.left_out],
            "pickle": None if source.verdict is None else source.verdict.to_json(),
        }


def ls(
    x: object,
    selector: object = None,
    *,
    tree: bool = False,
    depth: int | None = None,
    fold: bool = True,
    sort: str | None = None,
    limit: int | None = None,
    buffers: bool = False,
) -> Listing:
    """List parameters, flat or by module; reads only names and shapes. Ranks of a sharded model do not communicate.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`.
        selector: Parameters to list; None for all.
        tree: Group by module, with subtotals.
        depth: Maximum depth of the tree.
        fold: In the tree, show equal numbered layers as one row, even if numbers are skipped.
        sort: `name`, `shape`, `dtype`, `numel`, `size` or `module`, with a leading `-` for descending; `stored` for
            file order.
        limit: Maximum number of rows of a flat table; rows in the middle are omitted and counted.
        buffers: Include the buffers of a live model.

    Raises:
        NoMatch: A part of the selector matches nothing.
        SourceError: `x` cannot be listed.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> print(tp.ls({f"layers.{i}.weight": np.zeros((2, 2), np.float32) for i in range(3)}, tree=True))
    dict (mapping)
    name                  shape   dtype    tensors  numel  size
    layers.{0..2}.weight  [2, 2]  float32        3     12  48 B
    3 tensors · 12 parameters · 48 B
    """
    params = of(x, buffers=buffers)
    if selector is not None:
        params = params.select(selector)
    return Listing(params, tree, depth, fold, sort, limit)


DEPTH = 64
"""Maximum depth of a tree. Longer names, which no real network has, keep the rest as one component."""


@dataclass(slots=True)
class Node:
    """Node of a tree: a module or a tensor.

    Attributes:
        name: Last component of the name; `{0..5}` or `{0,2,4..5}` for folded layers.
        info: Info of a tensor, or of the first of several folded ones; None for a module.
        children: Child nodes in order. A module and a tensor may share a name.
        tensors, numel, nbytes: Totals of the subtree, including folded layers.
        parameters: Number of elements of live parameters, without buffers.
        trainable: Number of elements that require grad.
    """

    name: str
    info: ParameterInfo | None = None
    children: list[Node] = field(default_factory=list)
    tensors: int = 0
    numel: int = 0
    nbytes: int = 0
    parameters: int = 0
    trainable: int = 0

    def add(self, info: ParameterInfo) -> None:
        """Add a tensor to the totals."""
        self.tensors += 1
        self.numel += info.numel
        self.nbytes += info.nbytes
        if info.requires_grad is not None and info.kind != "buffer":
            self.parameters += info.numel
            self.trainable += info.numel if info.requires_grad else 0


def alike(info: ParameterInfo) -> Hashable:
    """Key that is equal for matching tensors of equal layers."""
    # Shape as text: a hostile file could choose numbers whose hashes collide.
    return str(info.shape), info.dtype, info.kind, info.requires_grad, info.module, info.aliases, info.layout


def tree_of(
    infos: Iterable[ParameterInfo], *, fold: bool = True, alike: Callable[[ParameterInfo], Hashable] = alike
) -> Node:
    """Build a tree from dotted names. A module with a single child is joined with it.

    Args:
        infos: Infos of one source, in order.
        fold: Join numbered children with equal subtrees: the layers of a network.
        alike: Key function that is equal for matching tensors.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> layers = {f"layers.{i}.weight": np.zeros((2, 2), np.float32) for i in range(3)}
    >>> [child.name for child in tree_of(tp.of(layers).infos.values()).children]
    ['layers.{0..2}.weight']
    """
    modules: dict[tuple[str, ...], Node] = {(): Node("")}
    for info in infos:
        *parts, last = info.name.split(".", DEPTH)
        node = modules[()]
        node.add(info)
        for depth in range(1, len(parts) + 1):
            path = tuple(parts[:depth])
            if path not in modules:
                modules[path] = Node(parts[depth - 1])
                node.children.append(modules[path])
            node = modules[path]
            node.add(info)
        leaf = Node(last, info)
        leaf.add(info)
        node.children.append(leaf)
    root = modules[()]
    if fold:
        _fold(root, {}, alike)
    root.children = [_joined(child) for child in root.children]
    return root


def _joined(node: Node) -> Node:
    """Join chains of single children into one node: `lin0.model.1`."""
    while len(node.children) == 1:
        child = node.children[0]
        child.name = f"{node.name}.{child.name}"
        node = child
    node.children = [_joined(child) for child in node.children]
    return node


def _fold(node: Node, seen: dict[Hashable, int], alike: Callable[[ParameterInfo], Hashable]) -> int:
    """Fold equal subtrees from the bottom up; returns a number that is equal for equal subtrees."""
    looks = [_fold(child, seen, alike) for child in node.children]
    names = [child.name for child in node.children]
    children: dict[Hashable, list[Node]] = {}
    for at, (look, child) in enumerate(zip(looks, node.children, strict=True)):
        children.setdefault(look if _is_number(child.name) else (at,), []).append(child)
    node.children = [same[0] if len(same) == 1 else _numbered(same) for same in children.values()]
    own = None if node.info is None else alike(node.info)
    return seen.setdefault((own, *zip(names, looks, strict=True)), len(seen))


def leaves(root: Node) -> Iterator[tuple[tuple[str, ...], ParameterInfo]]:
    """Name components and info of each tensor of a tree; for folded tensors, of the first.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> layers = {f"layers.{i}.weight": np.zeros((2, 2), np.float32) for i in range(3)}
    >>> [parts for parts, _ in leaves(tree_of(tp.of(layers).infos.values()))]
    [('layers', '{0..2}', 'weight')]
    """
    stack: list[tuple[tuple[str, ...], Node]] = [((), root)]
    while stack:
        above, node = stack.pop()
        parts = above + tuple(_COMPONENTS.findall(node.name))
        if node.info is not None:
            yield parts, node.info
        stack += [(parts, child) for child in reversed(node.children)]


_COMPONENTS = re.compile(r"\{[\d.,]+\}|[^.]+")
"""Name components. The dots inside a folded range do not separate components."""


def _is_number(name: str) -> bool:
    # As in globs: `{0..5}` does not match `05`.
    return name.isdecimal() and name.isascii() and len(name) <= _MOST_DIGITS and (name == "0" or name[0] != "0")


def _numbered(nodes: list[Node]) -> Node:
    """Join numbered nodes into one, named by a glob such as `{0..2,5}`."""
    nodes.sort(key=lambda node: int(node.name))
    runs: list[list[int]] = []
    for number in (int(node.name) for node in nodes):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return _folded(nodes, f"{{{','.join('..'.join(map(str, run)) for run in runs)}}}")


def _folded(nodes: Sequence[Node], name: str) -> Node:
    joined = Node(name, nodes[0].info)
    joined.tensors = sum(node.tensors for node in nodes)
    joined.numel = sum(node.numel for node in nodes)
    joined.nbytes = sum(node.nbytes for node in nodes)
    joined.parameters = sum(node.parameters for node in nodes)
    joined.trainable = sum(node.trainable for node in nodes)
    for same in zip(*(node.children for node in nodes), strict=True):
        joined.children.append(_folded(same, same[0].name))
    return joined


def tree_table(root: Node, *, depth: int | None = None) -> Table:
    """Table with a row for each module, with subtotals, and for each tensor.

    A folded row, and every row below it, counts all folded layers, so that columns add up.

    Args:
        root: Result of `tree_of`.
        depth: Maximum depth of rows, 1 for top-level modules; None for all.
    """
    live = root.parameters > 0
    columns = (
        Column("name", style="name", shrink=True),
        Column("shape"),
        Column("dtype", style="dtype", drop=2),
        Column("tensors", right=True, drop=1),
        Column("numel", right=True, style="number", drop=4),
        Column("size", right=True),
        *((Column("trainable", right=True, drop=3),) if live else ()),
    )

    def rows(node: Node, at: int) -> Iterator[Row]:
        for child in node.children:
            info = child.info
            yield Row(
                (
                    Cell(child.name, "" if info is not None else "title"),
                    "" if info is None else shape_of(info),
                    "" if info is None else str(info.dtype),
                    f"{child.tensors:,}",
                    f"{child.numel:,}",
                    human_bytes(child.nbytes),
                    *((_share(child),) if live else ()),
                ),
                depth=at,
            )
            if depth is None or at + 1 < depth:
                yield from rows(child, at + 1)

    return Table(columns, tuple(rows(root, 0)), tree=True)


def _share(node: Node) -> Cell:
    if not node.parameters:
        return Cell("")
    if node.trainable == node.parameters:
        return Cell("yes", "good")
    return Cell(f"{node.trainable / node.parameters:.1%}" if node.trainable else "no", "dim")
