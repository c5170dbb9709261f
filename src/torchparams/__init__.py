"""Read, select, compare and edit the named parameters of PyTorch networks.

A table of named parameters works the same for an `nn.Module` in memory and a checkpoint on disk:

>>> import numpy as np
>>> import torchparams as tp
>>> params = tp.of({"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)})
>>> params.info("fc.weight").shape
(2, 3)
>>> params.select("**.bias").names
['fc.bias']

Every public name is imported at first use: `import torchparams` is cheap, and never imports torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchparams import errors as errors
    from torchparams import limits as limits
    from torchparams import testing as testing
    from torchparams.edit.convert import convert as convert
    from torchparams.edit.index import repair_index as repair_index
    from torchparams.edit.lora.extract import extract_lora as extract_lora
    from torchparams.edit.lora.fold import fold_lora as fold_lora
    from torchparams.edit.merge.merge import merge as merge
    from torchparams.edit.plan.plan import Plan as Plan
    from torchparams.edit.save import apply_delta as apply_delta
    from torchparams.edit.save import delta as delta
    from torchparams.edit.save import save as save
    from torchparams.errors import TorchParamsError as TorchParamsError
    from torchparams.info import ParameterInfo as ParameterInfo
    from torchparams.lint.audit import audit as audit
    from torchparams.lint.explain import explain as explain
    from torchparams.measure.catalog import catalog as catalog
    from torchparams.measure.describe import show as show
    from torchparams.measure.diff import diff as diff
    from torchparams.measure.digest import digest as digest
    from torchparams.measure.digest import duplicates as duplicates
    from torchparams.measure.listing import ls as ls
    from torchparams.measure.spectra import spectra as spectra
    from torchparams.measure.stats import stats as stats
    from torchparams.measure.verify import verify as verify
    from torchparams.module import Module as Module
    from torchparams.module import attach as attach
    from torchparams.module import detach as detach
    from torchparams.page.report import report as report
    from torchparams.parameters import Parameters as Parameters
    from torchparams.parameters import of as of
    from torchparams.record.diagnose import diagnose as diagnose
    from torchparams.record.history import history as history
    from torchparams.record.recorder import Recorder as Recorder
    from torchparams.selectors import Selector as Selector
    from torchparams.train.apply import apply_ as apply_
    from torchparams.train.freeze import freeze as freeze
    from torchparams.train.freeze import unfreeze as unfreeze
    from torchparams.train.grad_norms import grad_norms as grad_norms
    from torchparams.train.gradients import gradients as gradients
    from torchparams.train.groups import groups as groups
    from torchparams.train.init import init as init
    from torchparams.train.load import coverage as coverage
    from torchparams.train.load import load as load
    from torchparams.train.optimizer import optimizer_state as optimizer_state
    from torchparams.train.optimizer_load import load_optimizer_state as load_optimizer_state
    from torchparams.train.penalty import Penalty as Penalty
    from torchparams.train.penalty import penalty as penalty
    from torchparams.train.rules import no_decay as no_decay
    from torchparams.train.rules import rule as rule

__version__ = "0.1.0"

_HOMES = {
    "Module": "torchparams.module",
    "ParameterInfo": "torchparams.info",
    "Parameters": "torchparams.parameters",
    "Penalty": "torchparams.train.penalty",
    "Plan": "torchparams.edit.plan.plan",
    "Recorder": "torchparams.record.recorder",
    "Selector": "torchparams.selectors",
    "TorchParamsError": "torchparams.errors",
    "apply_": "torchparams.train.apply",
    "apply_delta": "torchparams.edit.save",
    "attach": "torchparams.module",
    "audit": "torchparams.lint.audit",
    "catalog": "torchparams.measure.catalog",
    "convert": "torchparams.edit.convert",
    "coverage": "torchparams.train.load",
    "delta": "torchparams.edit.save",
    "detach": "torchparams.module",
    "diagnose": "torchparams.record.diagnose",
    "diff": "torchparams.measure.diff",
    "digest": "torchparams.measure.digest",
    "duplicates": "torchparams.measure.digest",
    "explain": "torchparams.lint.explain",
    "extract_lora": "torchparams.edit.lora.extract",
    "fold_lora": "torchparams.edit.lora.fold",
    "freeze": "torchparams.train.freeze",
    "grad_norms": "torchparams.train.grad_norms",
    "gradients": "torchparams.train.gradients",
    "groups": "torchparams.train.groups",
    "history": "torchparams.record.history",
    "init": "torchparams.train.init",
    "load": "torchparams.train.load",
    "load_optimizer_state": "torchparams.train.optimizer_load",
    "ls": "torchparams.measure.listing",
    "merge": "torchparams.edit.merge.merge",
    "no_decay": "torchparams.train.rules",
    "of": "torchparams.parameters",
    "optimizer_state": "torchparams.train.optimizer",
    "penalty": "torchparams.train.penalty",
    "repair_index": "torchparams.edit.index",
    "report": "torchparams.page.report",
    "rule": "torchparams.train.rules",
    "save": "torchparams.edit.save",
    "show": "torchparams.measure.describe",
    "spectra": "torchparams.measure.spectra",
    "stats": "torchparams.measure.stats",
    "unfreeze": "torchparams.train.freeze",
    "verify": "torchparams.measure.verify",
}
_MOVED = {
    "Applied": "torchparams.train.apply",
    "Audit": "torchparams.lint.findings",
    "Coverage": "torchparams.train.coverage",
    "DType": "torchparams.dtypes",
    "Diff": "torchparams.measure.diff",
    "Digests": "torchparams.measure.digest",
    "Duplicates": "torchparams.measure.digest",
    "Explained": "torchparams.lint.explain",
    "ExplainedName": "torchparams.lint.explain",
    "Extracted": "torchparams.edit.lora.extract",
    "Finding": "torchparams.lint.findings",
    "Frozen": "torchparams.train.freeze",
    "GradNorms": "torchparams.train.grad_norms",
    "Groups": "torchparams.train.groups",
    "IndexRepair": "torchparams.edit.index",
    "Initialised": "torchparams.train.init",
    "OptimizerState": "torchparams.train.optimizer",
    "Page": "torchparams.page.result",
    "Renames": "torchparams.renames",
    "Rule": "torchparams.train.rules",
    "Stats": "torchparams.measure.stats",
    "Unfrozen": "torchparams.train.freeze",
    "Verification": "torchparams.measure.verify",
    "Written": "torchparams.edit.plan.written",
}
"""Deprecated: result classes under their old names, which will be removed in the next version."""

_MODULES = ("errors", "limits", "testing")

__all__ = [  # built from the table above; a test compares it with the imports
    *_HOMES,
    *_MODULES,
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(_imported(_HOMES[name], name), name)
        globals()[name] = value
        return value
    if name in _MOVED:
        warnings.warn(f"{__name__}.{name} is now {_MOVED[name]}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(_imported(_MOVED[name], name), name)
    if name in _MODULES:
        return _imported(f"{__name__}.{name}", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:  # `Module` needs torch, and `testing` needs pytest
        if error.name is None or error.name.startswith(__name__):
            raise
        from torchparams.errors import MissingDependency

        raise MissingDependency(
            f"{error.name!r} is needed for {__name__}.{name}", hint=f"pip install {error.name}"
        ) from None


def __dir__() -> list[str]:
    return sorted(__all__)
