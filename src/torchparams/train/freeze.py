"""Freezing: stop `requires_grad`, left-over gradients and running statistics together.

A parameter with `requires_grad=False` can still change: an optimizer steps every parameter that has a gradient, even
an old one. And the running statistics of a normalisation layer are buffers. Its forward pass updates them in training
mode, even if its parameters are frozen. `freeze` stops all three, and can be undone.

**Which statistics stop.** Statistics stop in layers whose parameters are all frozen, at least one by this call. A layer
without parameters (`affine=False`) follows the nearest enclosing module that has some. Half-frozen layers are still
trained: their statistics continue, and the result lists them. Running statistics are those of the BatchNorm and
InstanceNorm families, of any class with a buffer called `running_mean` or `running_var`, and the power iteration of
spectral norm.

**How they stop.** The layer stays in evaluation mode, where it uses its statistics without updating them. A
`StatisticsHold` in the instance replaces its `train`, so that `model.train()` skips it. Copies and pickles of the model
keep the hold. `track_running_stats` is not changed: without it a layer would normalise by the batch. Functions that
replace layers (`convert_sync_batchnorm`, `torch.jit.script`) drop the holds: freeze their result.

**Limit.** LBFGS steps along directions that it keeps for all its parameters together, whatever their gradients. If it
was created before freezing, it continues to move frozen parameters. Create it after freezing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.errors import MismatchError, TorchParamsError, nearest
from torchparams.render.tree import Table, Text, listed, plural
from torchparams.sources.live.tensors import is_leaf
from torchparams.train._change import Change, Steps, shown, which
from torchparams.train._live import Chosen, choose
from torchparams.train._shards import refuse_views
from torchparams.train._statistics import Layers, hold_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def freeze(model: object, selector: object = None, *, statistics: bool = True) -> Frozen:
    """Freeze the selected parameters: stop gradients, clear left-over gradients, stop running statistics.

    The change is in place: the parameters stay the same objects, so an optimizer that holds them needs no change. Only
    LBFGS must be created again: it keeps directions for all its parameters together, and would move frozen ones. Freeze
    before wrapping in `DistributedDataParallel`, whose constructor fixes the gradients it waits for.

    Of sharded parameters, each rank freezes its parts, without communication: make the same call on every rank.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        selector: Parameters to freeze, strictly; None selects all of `model`. A buffer, selected from a table made
            with `buffers=True`, stops the running statistics of its layer, even if its parameters are trained.
        statistics: Also stop the running statistics of normalisation layers whose parameters are all frozen.

    Returns:
        The change; `.undo()`, or leaving a `with` block, reverts it.

    Raises:
        NoMatch: A part of the selector matches nothing.
        TorchParamsError: A selected tensor is not a leaf: it is the result of an operation. Nothing is changed.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> frozen = tp.freeze(model, "0.** | 1.**")
    >>> model.train()[1].training, model[2].training
    (False, True)
    >>> print(frozen)
    Sequential: froze 4 tensors
    name      shape   numel  before
    0.weight  [4, 3]     12  trainable
    0.bias    [4]         4  trainable
    1.weight  [4]         4  trainable
    1.bias    [4]         4  trainable
    running statistics stopped in 1 layer: 1
    10 of 34 parameters are trainable, 29.4%
    >>> frozen.undo()
    >>> model[1].training, model[1].weight.requires_grad
    (True, True)
    """
    return _freeze(choose(model, selector, "torchparams.freeze"), None if statistics else ())


def unfreeze(model: object, selector: object = None) -> Unfrozen:
    """Unfreeze the selected parameters, and resume the running statistics of their layers.

    A layer stopped by `freeze` gets the mode it would have without the freeze. Parameters that cannot have a gradient
    (integers) are not changed, and are listed. Ranks do not communicate: make the same call on every rank.

    Args:
        model: A live `nn.Module`, or a `Parameters` of one.
        selector: Parameters to unfreeze, strictly; None selects all of `model`. Buffers as in `freeze`.

    Returns:
        The change; `.undo()`, or leaving a `with` block, reverts it.

    Raises:
        NoMatch: A part of the selector matches nothing.

    >>> from torch import nn
    >>> import torchparams as tp
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> frozen = tp.freeze(model)
    >>> with tp.unfreeze(model, "1.**"):
    ...     print([name for name, p in model.named_parameters() if p.requires_grad], model[1].training)
    ['1.weight', '1.bias'] True
    >>> tp.of(model).select(":frozen").numel
    24
    """
    chosen = choose(model, selector, "torchparams.unfreeze")
    refuse_views(chosen.parameters(), chosen.source.label, "unfreeze")
    steps = Steps(requires_grad=True)
    changed, cannot = [], []
    try:
        for name, parameter in chosen.parameters().items():
            if not (parameter.dtype.is_floating_point or parameter.dtype.is_complex):
                cannot.append(name)
            elif steps.flip(parameter, parameter.grad):
                changed.append(name)
        layers = Layers(chosen)
        released = []
        for name, layer in layers.by_name.items():
            if hold_on(layer) is not None:
                touched, frozen, _ = layers.state(layer)
                if layers.named(layer) or (touched and not frozen):
                    released.append(name)
        for name in released:
            steps.release(layers.by_name[name])
    except BaseException:
        steps.undo()
        raise
    return Unfrozen(chosen, tuple(changed), tuple(released), steps, tuple(cannot))


def _freeze(chosen: Chosen, statistics: Sequence[str] | None) -> Frozen:
    """Freeze, and stop the statistics of the named layers; None: of all layers whose parameters are all frozen."""
    refuse_views(chosen.parameters(), chosen.source.label, "freeze")
    for name, parameter in chosen.parameters().items():
        if not is_leaf(parameter):
            raise TorchParamsError(
                f"{name!r} is the result of an operation, and only leaf tensors can be frozen",
                where=chosen.source.label,
                hint="freeze the parameters that it is computed from",
            )
    steps = Steps()
    changed, moving = [], []
    try:
        for name, parameter in chosen.parameters().items():
            before = parameter.grad
            if steps.flip(parameter, before):
                changed.append(name)
            if before is not None:
                steps.clear(parameter, before)
        layers = Layers(chosen)
        stopped: list[str] | None = None if statistics is None else list(statistics)
        if stopped is None:
            stopped = []
            for name, layer in layers.by_name.items():
                touched, frozen, own = layers.state(layer)
                if (touched and frozen) or layers.named(layer):
                    stopped.append(name)
                elif touched and own and hold_on(layer) is None:
                    moving.append(name)
        for name in stopped:
            steps.hold(layers.by_name[name])
    except BaseException:
        steps.undo()
        raise
    return Frozen(chosen, tuple(changed), tuple(stopped), steps, tuple(moving))


# --- results --------------------------------------------------------------------------------


class Frozen(Change):
    """Result of `freeze`. It can be printed, undone, saved as JSON, and applied to a different model.

    Attributes:
        label: The model.
        names: Selected parameters, now frozen, by canonical name, in the model's order.
        changed: Selected parameters that were trainable before.
        statistics: Layers whose running statistics are stopped, by canonical name.
        moving: Layers whose running statistics continue, because only some of their parameters are frozen.
        cleared: Number of left-over gradients that were cleared.
        trainable: Number of elements in the model's trainable parameters after the change.
        numel: Number of elements in all parameters of the model.

    >>> import json
    >>> from torch import nn
    >>> import torchparams as tp
    >>> from torchparams.train.freeze import Frozen
    >>> saved = json.dumps(tp.freeze(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "1.**").to_json())
    >>> fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> Frozen.from_json(json.loads(saved)).apply(fresh).statistics
    ('1',)
    >>> fresh.train()[1].training
    False
    """

    did = "froze"
    before = ("trainable", "frozen")
    statistics_did = "stopped"

    def __init__(
        self,
        chosen: Chosen | None,
        changed: tuple[str, ...],
        statistics: tuple[str, ...],
        steps: Steps,
        moving: tuple[str, ...],
    ) -> None:
        super().__init__(chosen, changed, statistics, steps)
        self.moving = moving
        self._found = False
        self.cleared = len(steps.cleared)

    @classmethod
    def of(cls, model: object) -> Frozen:
        """Read the current frozen state of `model`, however it was frozen. Changes nothing; undo does nothing.

        Save it with a checkpoint if a model is frozen in several steps.

        >>> from torch import nn
        >>> from torchparams.train.freeze import Frozen
        >>> model = nn.Linear(3, 2).requires_grad_(False)
        >>> Frozen.of(model).names
        ('weight', 'bias')
        """
        chosen = choose(model, None, "Frozen.of")
        names = tuple(name for name, parameter in chosen.parameters().items() if not parameter.requires_grad)
        chosen = Chosen(chosen.source, chosen.reading, names)
        held = tuple(name for name, layer in Layers(chosen).by_name.items() if hold_on(layer) is not None)
        frozen = cls(chosen, (), held, Steps(), ())
        frozen._found = True
        return frozen

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Frozen:
        """Read the data written by `to_json`. Use `apply` to freeze a model with it.

        Args:
            data: All of the data, or `names` and `statistics` alone.

        Raises:
            MismatchError: The data lacks one of these lists.
        """
        lists = [data.get(key) for key in ("names", "statistics")] if hasattr(data, "get") else [None]
        for given in lists:
            if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
                raise MismatchError(
                    "this is not a saved Frozen",
                    exists="a saved Frozen has the lists 'names' and 'statistics'",
                    hint="pass the result of Frozen.to_json()",
                )
        names, statistics = map(tuple, lists)  # type: ignore[arg-type]  # lists of text, as just seen
        frozen = cls(None, (), statistics, Steps(), ())
        frozen.names = names
        return frozen

    def apply(self, model: object) -> Frozen:
        """Freeze the same parameters, and stop the statistics of the same layers, in `model`.

        Args:
            model: A live `nn.Module`.

        Returns:
            The change of `model`, with its own undo.

        Raises:
            MismatchError: `model` lacks some of the parameters or layers. Nothing is changed.
        """
        chosen = choose(model, None, "Frozen.apply")
        names = _found(self.names, chosen)
        chosen = Chosen(chosen.source, chosen.reading, tuple(name for name in chosen.tensors if name in names))
        layers = Layers(chosen).by_name
        missing = [name for name in self.statistics if name not in layers]
        _refuse_missing(missing, self.statistics, tuple(layers), "layers", chosen)
        return _freeze(chosen, self.statistics)

    def to_json(self) -> dict[str, Any]:
        """The change as JSON data; `from_json` reads it."""
        return {**super().to_json(), "moving": list(self.moving), "cleared": self.cleared}

    def _title(self) -> str:
        if not self._found:
            return super()._title()
        return f"{self.label}: {plural(len(self.names), 'frozen tensor')}"

    def _notes(self) -> list[Text | Table]:
        notes: list[Text | Table] = []
        if self.moving:
            what = "layer that is half frozen", "layers that are half frozen"
            notes.append(Text(f"running statistics go on in {which(self.moving, *what)}", "warn"))
        if self.cleared:
            notes.append(Text(f"cleared {plural(self.cleared, 'left-over gradient')}"))
        if self._ddp:
            notes.append(Text("DistributedDataParallel still waits for gradients of its original parameters", "warn"))
        return notes


class Unfrozen(Change):
    """Result of `unfreeze`.

    Attributes:
        label: The model.
        names: Selected parameters, by canonical name, in the model's order.
        changed: Selected parameters that were frozen before.
        statistics: Layers whose running statistics resumed, by canonical name.
        cannot: Selected parameters that cannot have a gradient: integers.
        trainable: Number of elements in the model's trainable parameters after the change.
        numel: Number of elements in all parameters of the model.
    """

    did = "unfroze"
    before = ("frozen", "trainable")
    statistics_did = "move again"

    def __init__(
        self,
        chosen: Chosen,
        changed: tuple[str, ...],
        statistics: tuple[str, ...],
        steps: Steps,
        cannot: tuple[str, ...],
    ) -> None:
        super().__init__(chosen, changed, statistics, steps)
        self.cannot = cannot
        left = frozenset(cannot)
        self.names = tuple(name for name in self.names if name not in left)

    def to_json(self) -> dict[str, Any]:
        """The change as JSON data."""
        return {**super().to_json(), "cannot": list(self.cannot)}

    def _notes(self) -> list[Text | Table]:
        if not self.cannot:
            return []
        return [Text(f"no gradient is possible for {which(self.cannot, 'parameter')}", "warn")]


def _found(names: Sequence[str], chosen: Chosen) -> frozenset[str]:
    """Canonical names for `names`, which may come from a model with different ties or wrappers."""
    known = list(chosen.tensors)
    other = {spelling: known[row] for row, spelling in (*chosen.reading.aliases, *chosen.reading.raws)}
    found = {name: name if name in chosen.tensors else other.get(name) for name in names}
    _refuse_missing([n for n, hit in found.items() if hit is None], names, known, "parameters", chosen)
    return frozenset(name for name in found.values() if name is not None)


def _refuse_missing(
    missing: Sequence[str], wanted: Sequence[str], known: Sequence[str], what: str, chosen: Chosen
) -> None:
    if not missing:
        return
    near = nearest(missing[0], known, count=1)
    raise MismatchError(
        f"{len(missing):,} of {len(wanted):,} frozen {what} are not in this model: {listed(shown(missing))}",
        where=chosen.source.label,
        exists=f"the nearest to {missing[0]!r} is {near[0]!r}" if near else None,
        hint="freeze by a selector, or remove the missing names",
    )
