"""State keys that an optimizer needs to continue: a table for torch's own, observed for any that has stepped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchparams.render.tree import listed
from torchparams.train._optimizers import Own, leaf_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_ADAM = frozenset(("step", "exp_avg", "exp_avg_sq"))

TORCH: Mapping[str, tuple[frozenset[str], Mapping[str, str]]] = {
    "ASGD": (frozenset(("step", "eta", "mu", "ax")), {}),
    "Adadelta": (frozenset(("step", "square_avg", "acc_delta")), {}),
    "Adafactor": (frozenset(("step",)), {}),
    "Adagrad": (frozenset(("step", "sum")), {}),
    "Adam": (_ADAM, {"amsgrad": "max_exp_avg_sq"}),
    "AdamW": (_ADAM, {"amsgrad": "max_exp_avg_sq"}),
    "Adamax": (frozenset(("step", "exp_avg", "exp_inf")), {}),
    "LBFGS": (frozenset(), {}),
    "Muon": (frozenset(("momentum_buffer",)), {}),
    "NAdam": (_ADAM | {"mu_product"}, {}),
    "RAdam": (_ADAM, {}),
    "RMSprop": (frozenset(("step", "square_avg")), {"momentum": "momentum_buffer", "centered": "grad_avg"}),
    "Rprop": (frozenset(("step", "prev", "step_size")), {}),
    "SGD": (frozenset(), {}),
    "SparseAdam": (_ADAM, {}),
}
"""Class → keys it needs for a parameter it has stepped, and option → additional key that the option needs."""

OPTIONAL = {
    "SGD": frozenset(("momentum_buffer",)),
    "Adafactor": frozenset(("row_var", "col_var", "variance")),
    "LBFGS": frozenset(("d", "prev_flat_grad", "old_dirs", "old_stps")),
}
"""Class → optional keys that it uses."""

BY_OPTION = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg", "momentum": "momentum_buffer"}
"""Option → key that it needs, for an unknown optimizer class."""


class Needs:
    """State keys that an optimizer accepts.

    Args:
        own: The optimizer.
        named: True if the state names its optimizer class.

    Attributes:
        known: True if there is a table or a stepped optimizer to compare with.
    """

    def __init__(self, own: Own, named: bool) -> None:
        self._own = own
        self._named = named
        kind = type(own.kind)
        self._torch = kind.__name__ if kind.__module__.startswith("torch.optim") and kind.__name__ in TORCH else None
        self.needed: frozenset[str]
        self._options: Mapping[str, str] = BY_OPTION
        if self._torch is not None:
            self.needed, self._options = TORCH[self._torch]
            self._takes = self.needed | OPTIONAL.get(self._torch, frozenset()) | frozenset(self._options.values())
        else:
            seen = [keys for keys in map(leaf_keys, own.state().values()) if keys]
            self.needed = frozenset.intersection(*seen) if seen else frozenset()
            self._takes = frozenset.union(*seen) if seen else frozenset()
        self.known = bool(self.needed or self._takes)

    def problem(
        self,
        state: Mapping[Any, Any],
        parameter: torch.Tensor,
        options: Mapping[str, Any],
        saved_with: Mapping[str, Any],
    ) -> str:
        """Reason why an optimizer cannot continue from the saved state of a parameter; empty if it can.

        Args:
            state: Saved state of the parameter.
            parameter: The parameter.
            options: Options of its group after the load.
            saved_with: Options of its group when it was saved.
        """
        keys = leaf_keys(state)
        label = type(self._own.kind).__name__
        if not keys and self._torch != "Adagrad":
            return ""  # not stepped yet: the first step makes the state (Adagrad's constructor does)
        for option, key in self._options.items():
            switched_on = options.get(option) and (self._torch is not None or not saved_with.get(option))
            if switched_on and key not in keys and self.needed <= keys and self._torch != "SGD":
                return f"saved without {option}, which needs {key}"
        needed = self.needed
        if self._torch == "Adafactor":
            needed = needed | ({"row_var", "col_var"} if parameter.dim() > 1 else {"variance"})
        if needed - keys:
            kept = f"it has {listed(sorted(keys))}" if keys else "it has no state"
            return f"{kept}, and {label} needs {listed(sorted(needed - keys))}"
        strange = keys - self._takes
        # A wrapper may keep further keys. So may a class outside torch, at other times, if the state is of that class;
        # in state that names no class, strange keys mean a different class.
        closed = not self._own.wrapped and not (self._torch is None and self._named)
        if self.known and strange and (closed or strange == keys):
            return f"it has {listed(sorted(strange))}, which {label} does not use"
        return ""
