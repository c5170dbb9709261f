"""Checks of what verbs communicate: the collectives that docs/sharded.md counts, and calls that some ranks make."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import torchparams as tp
from process_group import check
from sharded.models import dtensor_ways, even, fsdp2, shared_folder
from sharded.training import refused
from torchparams import limits
from torchparams.errors import RanksError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded.md"


class Verb(NamedTuple):
    """A verb as the page names it, and a call of it."""

    label: str
    call: Callable[[], Any]


def _verbs(folder: str) -> Iterator[Verb]:
    """A call for every row of the page."""
    model, other, alike = fsdp2(even()), fsdp2(even()), fsdp2(even())
    columns = dtensor_ways()["columns"](even())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(6, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    state = tp.optimizer_state(model, optimizer)
    there = torch.optim.SGD(columns.parameters(), lr=0.1, momentum=0.9)
    file, state_file = f"{folder}/w.safetensors", f"{folder}/state.safetensors"
    tp.save(model, file)
    tp.save(state, state_file)
    whole = {name: value.double() for name, value in even().state_dict().items()}
    manifest = f"{folder}/manifest.json"
    if dist.get_rank() == 0:
        tp.digest(file).write(manifest)
    dist.barrier()
    here = f"{folder}/{dist.get_rank()}"
    yield Verb("of", lambda: tp.of(model).infos)
    yield Verb("ls", lambda: str(tp.ls(model)))
    yield Verb("selectors", lambda: tp.of(model).select(":sharded"))
    yield Verb("explain", lambda: tp.explain(model))
    yield Verb("coverage", lambda: tp.coverage(model, file))
    yield Verb("gradients", lambda: tp.gradients(model).infos)
    yield Verb("freeze", lambda: tp.freeze(other))
    yield Verb("unfreeze", lambda: tp.unfreeze(other))
    yield Verb("groups", lambda: tp.groups(model, lr=0.1))
    yield Verb("init", lambda: tp.init(alike, ("**", nn.init.ones_), seed=0))
    yield Verb("optimizer_state", lambda: tp.optimizer_state(model, optimizer))
    yield Verb("stats", lambda: tp.stats(model))
    yield Verb("diff", lambda: tp.diff(model, other))
    yield Verb("digest", lambda: tp.digest(model))
    yield Verb("duplicates", lambda: tp.duplicates(model))
    yield Verb("verify against a manifest", lambda: tp.verify(model, manifest))
    yield Verb("spectra", lambda: tp.spectra(model))
    yield Verb("report", lambda: tp.report(model, f"{here}.html"))
    yield Verb("save", lambda: tp.save(model, f"{folder}/again.safetensors"))
    yield Verb("run of a plan", lambda: tp.convert(model, f"{folder}/half.pt", dtype="bf16", overwrite=True).run())
    yield Verb("grad_norms", lambda: tp.grad_norms(model))
    yield Verb("penalty", lambda: tp.penalty(model))
    yield Verb("apply_", lambda: tp.apply_(alike, "0.bias", nn.init.zeros_))
    yield Verb("load from files and plain tensors", lambda: tp.load(alike, file))
    yield Verb("load with casts that can lose values", lambda: tp.load(alike, whole))
    yield Verb("load from a model that is sharded differently", lambda: tp.load(alike, columns))
    called = "load_optimizer_state from files and plain tensors"
    yield Verb(called, lambda: tp.load_optimizer_state(model, optimizer, state_file))
    called = "load_optimizer_state of DTensors that are sharded differently"
    yield Verb(called, lambda: tp.load_optimizer_state(columns, there, state))
    yield Verb("audit", lambda: tp.audit(model, optimizer))


def _rows() -> dict[str, tuple[bool, str]]:
    """Verb → whether ranks meet, and the text about collectives, from the page."""
    text = PAGE.read_text()
    found = {}
    for line in text[text.index("| verb | meet |") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        verbs, meets, collectives = (cell.strip() for cell in line.strip("|").split(" | "))
        for verb in verbs.replace("`", "").split(", "):
            found[verb] = meets == "yes", collectives.strip(" |")
    return found


@check(2)
def verbs_make_the_collectives_that_are_documented() -> None:
    rows = _rows()
    with shared_folder() as folder:
        verbs = list(_verbs(folder))
        assert {verb.label for verb in verbs} == set(rows)
        for label, call in verbs:
            with CommDebugMode() as mode:  # type: ignore[no-untyped-call]  # torch's own
                call()
            text = rows[label][1]
            more = 1 if label == "apply_" else 0  # of one parameter
            want = 0 if text.startswith("none") else int(re.match(r"\d+", text)[0]) + more  # type: ignore[index]
            assert mode.get_total_counts() == want, (label, mode.get_comm_counts(), want)
            name = label.split()[0]
            verb = tp.Plan.run if name == "run" else getattr(tp, name, None)
            if verb is not None:
                assert re.search(r"[Rr]anks|communicat", inspect.getdoc(verb) or ""), (
                    f"{name} does not say what ranks do"
                )


@check(2)
def calls_that_a_rank_does_not_make_end() -> None:
    rows = _rows()
    before = limits.RANKS_SECONDS
    with shared_folder() as folder:
        for label, call in _verbs(folder):
            if not rows[label][0]:
                continue
            if dist.get_rank() == 0:
                limits.RANKS_SECONDS = 0.05
                refused(RanksError, "did not make this call within 0.05 s", call)
                limits.RANKS_SECONDS = before
            dist.barrier()
            if dist.get_rank() != 0:
                refused(RanksError, "gave up waiting for this rank", call)
            dist.barrier()
