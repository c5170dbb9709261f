"""Regularisers over a selection: L1, L2, and L2-SP, which pulls towards the pretrained values.

L2-SP is from X. Li, Y. Grandvalet and F. Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018: fine-tuning with `α/2 ‖w − w⁰‖²` on the pretrained part and `β/2 ‖w‖²` on the new one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torchparams.encodings.companions import refuse
from torchparams.errors import MismatchError, NotReadable, OptionError, UnknownName, nearest
from torchparams.parameters import of
from torchparams.render.tree import human_shape, listed, plural, printable
from torchparams.sources.live.sharded import local_of
from torchparams.sources.live.sharding import is_dtensor
from torchparams.train._live import choose, refuse_codes
from torchparams.train._shards import part_in, refuse_copies, refuse_flat, summed_over_ranks
from torchparams.train.apply import refuse_without_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from torchparams.parameters import Parameters
    from torchparams.train._live import Chosen


def penalty(model: object, selector: object = None, p: int = 2, toward: object = None) -> torch.Tensor:
    """The sum of `|w − toward|ᵖ` over all elements of the selected parameters, to be added to a loss.

    With `p=2` that is a squared norm: weight decay `λ` of plain SGD is `λ/2 · penalty`, and L2-SP is `α/2 · penalty`
    with `toward`. Sums are in float32 at least, whatever the parameters' type. A tied parameter counts once.


    Each call applies the selector and reads `toward`. In a training loop, make a `Penalty` once and call it.

    Of sharded parameters (DTensors), each rank sums up its part: all of their ranks make the call, which meets and
    gathers once (two collectives of torch), and every rank gets the penalty of the whole. With FSDP2, call it before
    the forward pass: the parameters in between are copies, and refused.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        selector: Parameters to penalise, strictly; None selects all of `model`.
        p: 1 or 2.
        toward: Target values: any source with parameters of the same names and shapes, such as the path of a
            checkpoint; None is zero.

    Returns:
        A scalar, differentiable, on the device of the first parameter.

    Raises:
        NoMatch: A part of the selector matches nothing.
        MismatchError: `toward` lacks a selected parameter, or has it in a different shape.
        OptionError: `p` is neither 1 nor 2, or a selected parameter holds integers.
        NotReadable: A selected parameter, or its target, has no values, or holds quantised codes with separate scales.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[3.0, -4.0]]))
    >>> tp.penalty(model, "weight").item(), tp.penalty(model, "weight", p=1).item()
    (25.0, 7.0)
    >>> tp.penalty(model, "weight", toward={"weight": torch.tensor([[3.0, 0.0]])}).item()
    16.0
    """
    return Penalty(model, selector, p, toward, _keep=False)()


class Penalty:
    """Regulariser with a fixed selection and target, to be called at every step.

    The values of `toward` are those at construction: a live model or a mapping of tensors is copied
    (`model.state_dict()` shares the memory of the model), and a file is read when it is needed. They move to the
    parameters' device at the first call. The parameters are looked up at each call, so replaced ones are found.

    Args:
        model: As in `penalty`, with the same errors.
        selector: Parameters to penalise.
        p: 1 or 2.
        toward: Target values; pass `model` for its current values.

    Attributes:
        names: Penalised parameters, by canonical name, in the model's order.
        p: 1 or 2.
        toward: Label of the target; None if it is zero.

    >>> import torch
    >>> import torchparams as tp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> pull = tp.Penalty(model, "0.**", toward=model)
    >>> loss = model(torch.ones(1, 2)).sum() + 0.01 * pull()
    >>> loss.backward()
    >>> pull().item()
    0.0
    >>> pull
    Penalty(2 tensors of Sequential, p=2, toward Sequential)
    """

    def __init__(
        self, model: object, selector: object = None, p: int = 2, toward: object = None, *, _keep: bool = True
    ) -> None:
        if p not in (1, 2):
            raise OptionError(f"`p` must be 1 or 2, not {p!r}")
        chosen = choose(model, selector, "torchparams.penalty")
        selected = chosen.parameters()
        if not selected:
            raise OptionError("there is nothing to penalise", where=chosen.source.label, exists="it has no parameters")
        self.names = tuple(selected)
        self.p = int(p)
        self.toward: str | None = None
        self._source = chosen.source
        self._bases: list[torch.Tensor] | None = None
        refuse_codes(self._source, selected, "penalty")
        refuse_flat(chosen.reading, selected, self._source.label)
        _refuse_unusable(selected, self._source.label)
        if toward is not None:
            table = of(toward)
            self.toward = table.source.label
            matched = _matched(self.names, chosen, table)
            hint = "Leave it out of the selection, or decode the checkpoint first"
            refuse(table.source.coded(), matched.values(), table.source.label, hint, numbers=True)
            self._bases = [
                _base(table, there, selected[name], name, copy=_keep and table.source.borrowed)
                for name, there in matched.items()
            ]

    def __call__(self) -> torch.Tensor:
        """Penalty of the current parameters: a differentiable scalar."""
        tensors = self._source.keys()
        try:
            parameters = [tensors[name] for name in self.names]
        except KeyError as missing:
            raise UnknownName.among(str(missing.args[0]), tensors, self._source.label) from None
        _refuse_unusable(dict(zip(self.names, parameters, strict=True)), self._source.label)
        self._refuse_gathered()
        sharded = [place for place, parameter in enumerate(parameters) if is_dtensor(parameter)]
        if sharded:
            return self._total_of_shards(parameters, sharded)
        if self._bases is not None:
            self._settle(parameters)
        return _total(parameters, self._bases, self.p)

    def _total_of_shards(self, parameters: Sequence[Any], sharded: Sequence[int]) -> torch.Tensor:
        """The penalty where some parameters are DTensors: of this rank's parts, added up over the ranks."""
        import torch

        where = self._source.label
        dtensors = {self.names[place]: parameters[place] for place in sharded}
        here = [each.to_local() if is_dtensor(each) else each for each in parameters]
        if self._bases is not None:
            self._settle(here)  # the targets are parts too
        sums = [
            _total([part], None if self._bases is None else [self._bases[place]], self.p)
            for place, part in enumerate(here)
        ]
        total: torch.Tensor = summed_over_ranks(torch.stack([sums[place] for place in sharded]), dtensors, where)
        for place, part in enumerate(sums):
            if place not in sharded:
                total = total + part.to(total.device, total.dtype)
        return total

    def _refuse_gathered(self) -> None:
        """Refuse parameters in the middle of a step of FSDP: copies, and parts."""
        if "torch.distributed.fsdp" in sys.modules:
            reading = self._source.reading()
            refuse_copies(reading, self.names, self._source.label)
            refuse_flat(reading, self.names, self._source.label)

    def _settle(self, parameters: Sequence[Any]) -> None:
        """Move the targets to the devices of the parameters."""
        assert self._bases is not None
        for place, (name, parameter) in enumerate(zip(self.names, parameters, strict=True)):
            base = self._bases[place]
            if base.shape != parameter.shape:
                raise _other_shape(name, parameter, base.shape, self.toward)
            if base.device != parameter.device:
                self._bases[place] = base.to(parameter.device)

    def __repr__(self) -> str:
        where = "" if self.toward is None else f", toward {self.toward}"
        return printable(f"Penalty({plural(len(self.names), 'tensor')} of {self._source.label}, p={self.p}{where})")


def _total(parameters: Sequence[Any], bases: Sequence[Any] | None, p: int) -> torch.Tensor:
    import torch

    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, parameter in enumerate(parameters):
        groups.setdefault((parameter.device, parameter.dtype), []).append(place)
    sums: list[torch.Tensor] = []
    for (_, dtype), places in groups.items():
        wide = torch.float32 if dtype.itemsize < 4 else dtype
        parts = [parameters[place] for place in places]
        if wide is not dtype:
            parts = [part.to(wide) for part in parts]
        if bases is not None:
            parts = list(torch._foreach_sub(parts, [bases[place].to(wide) for place in places]))
        # The square of the norm, not the sum of squares: one pass, without a temporary of the parameter's size. Its
        # gradient at 0 is 0.
        norms = torch.stack(torch._foreach_norm(parts, p))
        sums.append(norms.square().sum() if p == 2 else norms.sum())
    widest = max((part.dtype for part in sums), key=lambda dtype: dtype.itemsize)
    total = sums[0].to(widest)
    for part in sums[1:]:
        total = total + part.to(total.device, widest)
    return total


def _refuse_unusable(tensors: Mapping[str, Any], where: str) -> None:
    refuse_without_values(tensors, where)
    for name, tensor in tensors.items():
        if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
            raise OptionError(
                f"{name!r} holds integers, which have no gradient", where=where, hint="leave it out of the selection"
            )


def _matched(names: Sequence[str], chosen: Chosen, table: Parameters) -> dict[str, str]:
    """Name in the model → name in the target."""
    reading = table.reading()
    known = list(reading.names)
    spelled = {alias: known[row] for row, alias in reading.aliases} | {name: name for name in known}
    ours: dict[str, list[str]] = {}
    for row, alias in chosen.reading.aliases:
        ours.setdefault(chosen.reading.names[row], []).append(alias)
    found: dict[str, str] = {}
    missing = []
    for name in names:
        there = next((spelled[spelling] for spelling in (name, *ours.get(name, ())) if spelling in spelled), None)
        if there is None:
            missing.append(name)
        else:
            found[name] = there
    if missing:
        near = nearest(missing[0], known, count=1)
        raise MismatchError(
            f"{len(missing):,} of {plural(len(names), 'selected parameter')} are missing: {listed(missing)}",
            where=table.source.label,
            exists=f"the nearest to {missing[0]!r} is {near[0]!r}" if near else None,
            hint="select the parameters it has, and penalise the rest without toward",
        )
    return found


def _base(table: Parameters, there: str, parameter: Any, name: str, *, copy: bool) -> Any:
    """Target tensor of a parameter, with its shape checked."""
    from torch.nn.parameter import is_lazy

    shape = table.source.info(there).shape if not table.source.borrowed else None
    if shape is None:
        value = table.source.value(there)
        if is_lazy(value):
            raise NotReadable(f"{there!r} is lazy: it has no shape or values yet", where=table.source.label)
        shape = tuple(value.shape)
    if tuple(shape) != tuple(parameter.shape):
        raise _other_shape(name, parameter, shape, table.source.label)
    base: Any = table.source.tensor(there).detach()
    if is_dtensor(parameter) or is_dtensor(base):
        if is_dtensor(base) and (not is_dtensor(parameter) or not _alike(base, parameter)):
            base = base.full_tensor()
        if is_dtensor(base):
            base = local_of(base)
        elif is_dtensor(parameter):
            base = part_in(parameter, base, name, table.source.label)
        return base.clone()
    if base.device.type == "meta":
        raise NotReadable(f"{there!r} is on the meta device, which holds no values", where=table.source.label)
    return base.clone() if copy else base


def _alike(a: Any, b: Any) -> bool:
    """Whether two DTensors are sharded alike."""
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def _other_shape(name: str, parameter: Any, shape: Sequence[int], where: str | None) -> MismatchError:
    return MismatchError(
        f"{name!r} has the shape {human_shape(tuple(shape))}",
        where=where,
        exists=f"in the model it has {human_shape(tuple(parameter.shape))}",
        hint="leave it out of the selection",
    )
