"""Depth of each parameter in a network, for learning rates that decrease from the last layer to the first."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torchparams._selector.glob_regex import to_regex
from torchparams._selector.globs import Glob
from torchparams._selector.parser import parse
from torchparams._selector.tree import Compound
from torchparams.errors import NoMatch, OptionError, SelectorError
from torchparams.sources.live.traverse import holders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from torchparams.reading import Reading

_NUMBER = "\ue000"
"""Placeholder for `{}` while a pattern is parsed: a private-use character that no name contains."""


def depths(reading: Reading, model: nn.Module | None, by: object, where: str | None = None) -> list[int]:
    """Depth of every parameter: 0 before the first block, 1 to N in the blocks, N + 1 after the last.

    A parameter between two blocks, as in a layer between two stages, has the depth of the block that follows.

    Args:
        reading: The parameters.
        model: The network; needed if `by` is None.
        by: None to find the blocks from the order of the modules; a pattern with `{}` for the block's number, such as
            `encoder.layer.{}.**`; or a function of `ParameterInfo` that returns the depth.
        where: Label of the model in errors.

    Raises:
        OptionError: No blocks are found, or the function does not return a whole number of at least 0.
        NoMatch: The pattern matches nothing.
        SelectorError: The pattern is invalid or has no `{}`.
    """
    if by is None:
        return _spread(_by_modules(reading, model, where))
    if isinstance(by, str):
        return _spread(_by_pattern(reading.names, by, where))
    if callable(by):
        return [_whole(by(info), info.name) for info in reading.infos]
    raise OptionError(
        f"`depth` must be a pattern such as 'encoder.layer.{{}}.**' or a function, not a {type(by).__name__}",
        where=where,
    )


def _whole(depth: Any, name: str) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise OptionError(f"the depth of {name!r} is {depth!r}, not a whole number of at least 0")
    return depth


def _spread(found: Sequence[int | None]) -> list[int]:
    """Depths of all parameters, from block depths; None marks a parameter outside blocks."""
    last = max((depth for depth in found if depth is not None), default=0)
    deep: list[int] = []
    following = last + 1
    for depth in reversed(found):
        following = following if depth is None else depth
        deep.append(following)
    deep.reverse()
    for place, depth in enumerate(found):
        if depth is not None:
            break
        deep[place] = 0
    return deep


# --- a pattern -----------------------------------------------------------------------------------


def _by_pattern(names: Sequence[str], text: str, where: str | None) -> list[int | None]:
    match = number_pattern(text)
    numbers = [None if (hit := match(name)) is None else tuple(map(int, hit.groups())) for name in names]
    ranks = {key: rank for rank, key in enumerate(sorted({key for key in numbers if key is not None}), 1)}
    if not ranks:
        raise NoMatch(
            f"the depth `{text}` matches nothing",
            where=where,
            exists=f"the names are {names[0]} to {names[-1]}" if names else "there are no parameters",
            hint="it must match whole names: end it with .** to match everything in a block",
        )
    return [None if key is None else ranks[key] for key in numbers]


def number_pattern(text: str) -> Callable[[str], re.Match[str] | None]:
    """Compile the glob `text` to a function that matches whole names, with a group for each `{}`.

    Raises:
        SelectorError: `text` is not a glob, or has no `{}`.

    >>> number_pattern("**.layer.{}.**")("encoder.layer.11.norm.weight").groups()
    ('11',)
    """
    if "{}" not in text:
        raise SelectorError(f"the depth `{text}` has no {{}} for the number", hint="write it as in encoder.layer.{}.**")
    node = parse(text.replace("{}", f'"{_NUMBER}"'))
    if not isinstance(node, Compound) or not isinstance(node.pattern, Glob) or node.conditions:
        raise SelectorError(f"the depth `{text}` is not a plain glob", hint="write it as in encoder.layer.{}.**")
    return re.compile(to_regex(node.pattern).replace(re.escape(_NUMBER), "([0-9]+)")).fullmatch


# --- the modules ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stack:
    """Blocks in one list."""

    blocks: list[nn.Module]

    @property
    def kind(self) -> type:
        return Counter(map(type, self.blocks)).most_common(1)[0][0]


def _by_modules(reading: Reading, model: nn.Module | None, where: str | None) -> list[int | None]:
    if model is None or reading.tensors is None:
        raise OptionError(
            "a layer decay needs the modules of a model to find the depth, and this has none",
            where=where,
            hint="pass a pattern of the blocks' names, as in depth='encoder.layer.{}.**'",
        )
    blocks = blocks_of(model)
    if not blocks:
        raise OptionError(
            "no stack of blocks was found, so a layer decay has no depth",
            where=where,
            exists="a stack is an nn.ModuleList or nn.Sequential with at least two modules of one class",
            hint="pass a pattern of the blocks' names, as in depth='encoder.layer.{}.**', or a function",
        )
    depth: dict[int, int] = {}
    for number, block in enumerate(blocks, 1):
        for _, _, owner in holders(block):
            for parameter in owner._parameters.values():
                depth.setdefault(id(parameter), number)
    return [depth.get(id(tensor)) for tensor in reading.tensors.values()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Blocks of a network, in the order of its modules.

    Blocks are the modules in an `nn.ModuleList` or `nn.Sequential` in which a class occurs at least twice. A module
    without submodules is a layer; layers count as blocks only if no list has other modules. A list inside a block, such
    as experts or heads, is part of the block and adds no depth. A member of a list is a stage, and its blocks count
    instead of it, if it is an `nn.Sequential` in which a class of blocks repeats, if it has a list of repeated blocks
    that contain blocks, or if it has an `nn.Sequential` in which a block repeats with the same shapes. Other members of
    its class in that list are stages too. A list with less than half as many blocks as the longest counts only if its
    blocks are of the same class: a stem of two steps adds no depth.

    >>> from torch import nn
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 3, enable_nested_tensor=False)
    >>> [block is layer for block, layer in zip(blocks_of(encoder), encoder.layers)]
    [True, True, True]
    """
    for in_block in (_is_block, _has_parameters):
        stacks = list(_stacks(model, in_block))
        if stacks:
            longest = max(stacks, key=lambda stack: len(stack.blocks))
            return [
                block
                for stack in stacks
                if 2 * len(stack.blocks) >= len(longest.blocks) or stack.kind is longest.kind
                for block in stack.blocks
            ]
    return []


def _stacks(model: nn.Module, is_member: Callable[[nn.Module], bool]) -> Iterator[_Stack]:
    """Outermost stacks, with stages replaced by their blocks."""
    from torch import nn

    met: set[int] = set()
    todo = [model]
    while todo:
        module = todo.pop()
        if id(module) in met:
            continue
        met.add(id(module))
        children = [child for child in module._modules.values() if child is not None]
        if isinstance(module, nn.ModuleList | nn.Sequential):
            members = [child for child in children if is_member(child)]
            if _most_alike(map(type, members)) >= 2:
                yield _Stack(_without_stages(members))
                continue
        todo += reversed(children)


def _without_stages(members: Sequence[nn.Module]) -> list[nn.Module]:
    """Members of a stack, with each stage, at any depth, replaced by its blocks."""
    found: list[nn.Module] = []
    todo = _with_blocks(members)[::-1]
    while todo:
        member, blocks = todo.pop()
        if blocks:
            todo += _with_blocks(blocks)[::-1]
        else:
            found.append(member)
    return found


def _with_blocks(members: Sequence[nn.Module]) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
    """Members of a list, each with its blocks if it is a stage."""
    inside = [_inside(member) for member in members]
    # A stage may have a single block. The other stages of its class identify it.
    stages = {type(member) for member, (_, repeats) in zip(members, inside, strict=True) if repeats}
    return [
        (member, blocks if type(member) in stages else ()) for member, (blocks, _) in zip(members, inside, strict=True)
    ]


def _inside(member: nn.Module) -> tuple[list[nn.Module], bool]:
    """Blocks in the largest list of a member of a stack, and True if they repeat like the blocks of a stage."""
    from torch import nn

    if isinstance(member, nn.Sequential):
        blocks = _blocks(member)
        return blocks, _most_alike(map(type, blocks)) >= 2
    if isinstance(member, nn.ModuleList):
        blocks = _blocks(member)
        return blocks, _repeated(blocks)
    best: tuple[list[nn.Module], bool] = [], False
    most = 0
    for child in member.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            blocks = _blocks(child)
            deep = [block for block in blocks if any(map(_is_block, block.children())) and not _is_separable(block)]
            # A list of experts, heads or convolutions is part of a block: its members contain layers, not blocks.
            # Only sequences of layers that repeat exactly, shapes included, count as small blocks.
            repeats = _most_alike(map(type, deep)) >= 2 or (isinstance(child, nn.Sequential) and _repeated(blocks))
            size = sum(prod(shape) for block in blocks for shape in _shapes(block))
            if (repeats, size) > (best[1], most):
                best, most = (blocks, repeats), size
    return best


def _blocks(stack: nn.Module) -> list[nn.Module]:
    return [child for child in stack.children() if _is_block(child)]


def _most_alike(kinds: Iterable[object]) -> int:
    return max(Counter(kinds).values(), default=0)


def _repeated(blocks: list[nn.Module]) -> bool:
    """True if a block with more than one layer and its norm occurs twice with the same shapes."""
    return _most_alike((type(block), *_shapes(block)) for block in blocks if _weights(block)[1] >= 2) >= 2


def _is_separable(module: nn.Module) -> bool:
    """True for a depthwise convolution with at most one pointwise convolution, which count as a single layer."""
    weights, mixing = _weights(module)
    return mixing < min(weights, 2)


def _weights(module: nn.Module) -> tuple[int, int]:
    """Number of weights in a module, and number of those that mix channels; depthwise convolutions do not."""
    weights = [shape for shape in _shapes(module) if len(shape) >= 2]
    return len(weights), sum(len(shape) == 2 or shape[1] > 1 for shape in weights)


def _shapes(module: nn.Module) -> Iterator[tuple[int, ...]]:
    from torch.nn.parameter import is_lazy

    for _, _, owner in holders(module):
        for parameter in owner._parameters.values():
            if parameter is not None:
                yield () if is_lazy(parameter) else tuple(parameter.shape)


def _has_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for _, _, owner in holders(module) for parameter in owner._parameters.values())


def _is_block(module: nn.Module) -> bool:
    return any(map(_has_parameters, module.children()))
