"""Write a report: one HTML file that shows a checkpoint or a model, the difference of two, or a history."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torchparams.errors import OptionError
from torchparams.measure.beside import as_json
from torchparams.page import findings as found_of
from torchparams.page import payload
from torchparams.page.measured import DETAILED
from torchparams.page.measuring import measure, pictures_of
from torchparams.page.over_steps import history_of, over_steps
from torchparams.page.result import Page, page_of
from torchparams.parameters import of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchparams.engines.base import Engine, Progress
    from torchparams.info import ParameterInfo
    from torchparams.measure.diff import Diff
    from torchparams.measure.spectra_tree import Spectrum
    from torchparams.page.measuring import Target
    from torchparams.parameters import Parameters


def report(
    x: object,
    path: str | os.PathLike[str] | None = None,
    selector: object = None,
    *,
    other: object = None,
    rename: object = "auto",
    spectra: object = None,
    pictures: object = None,
    buffers: bool = False,
    strict: bool = True,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Page:
    """Show all parameters in one HTML file that needs no network, or inline in a notebook.

    All values are read once; with a second target, both are read once more to compare them. The numbers are those of
    `stats` and `diff`, rounded to float32. With more than 5,000 tensors, histograms have 12 intervals instead of 64,
    and counts by power of two and the kurtosis of small tensors are left out.

    Of the record of a training or a `History`, the page shows the numbers over the steps, with a slider.

    Of sharded parameters, all their ranks make the call, with paths of their own: they make the collectives of `stats`,
    `digest`, and with a second target of `diff`.

    Args:
        x: Model, checkpoint, mapping of tensors, or `Parameters`; the directory of a record, or a `History`.
        path: HTML file to write; an existing file is replaced. None for a report in memory, which a notebook shows.
        selector: Tensors to show; None for all.
        other: Second target, to show how its values differ from `x`.
        rename: Names of `other` in `x`; see `diff`.
        spectra: Selector of matrices whose singular values are computed, or a result of `tp.spectra`.
        pictures: Selector of tensors to show as pictures, with minimum, maximum and root mean square of each tile; they
            are read once more.
        buffers: Include the buffers of a live model.
        strict: Raise if any branch of a selector matches nothing.
        engine: Engine to run on; by default, a `ThreadEngine` that memory-maps files.
        progress: Callback with the bytes read so far and in total; of a training, with the number of checkpoints.

    Raises:
        NoMatch: A branch of a selector matches nothing.
        OptionError: The path does not end in `.html`; or an option is not one of a report over steps.
        SourceError: A source cannot be read.
        WriteError: Writing failed; an existing file is unchanged.

    >>> import numpy as np
    >>> import torchparams as tp
    >>> found = tp.report({"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)})
    >>> found.tensors, found.path, found.html[:15]
    (2, None, b'<!doctype html>')
    """
    target = None if path is None else _target(path)
    history = history_of(x, selector, strict=strict, engine=engine, progress=progress)
    if history is not None:
        asked = {"other": other, "spectra": spectra, "pictures": pictures, "buffers": buffers or None}
        asked["rename"] = None if rename == "auto" else rename
        for option, value in asked.items():
            if value is not None:
                raise OptionError(f"A report over steps takes no {option}", where=history.label)
        return _written(over_steps(history, selector), target)
    params = _chosen(of(x, buffers=buffers), selector, strict)
    a = measure(params, engine=engine, progress=progress)
    compared = b = None
    if other is not None:
        compared, b = _compare(params, other, selector, rename, buffers, engine, progress)
    form = _payload(a, b, compared, spectra, pictures, strict=strict, engine=engine)
    return _written(form, target)


def _written(form: dict[str, Any], target: str | None) -> Page:
    """The page of some data, written if there is a path."""
    html = page_of(form)
    notes: tuple[str, ...] = ()
    if target is not None:
        from torchparams.io.write import write_file

        notes = write_file(target, html)
    return Page(
        label=form["source"]["label"],
        other=form["other"]["label"] if "other" in form else None,
        tensors=len(form["table"]["names"]),
        findings=len(form["findings"]),
        path=target,
        html=html,
        notes=notes,
    )


def _target(path: str | os.PathLike[str]) -> str:
    from torchparams.io.write import check_target

    text = os.fspath(path)
    if not text.lower().endswith((".html", ".htm")):
        raise OptionError(f"a report is an HTML file, not {text!r}", hint="choose a name that ends in .html")
    check_target(text)
    return text


def _chosen(params: Parameters, selector: object, strict: bool) -> Parameters:
    return params if selector is None else params.select(selector, strict=strict)


def _compare(
    params: Parameters,
    other: object,
    selector: object,
    rename: object,
    buffers: bool,
    engine: Engine | None,
    progress: Progress | None,
) -> tuple[Diff, Target]:
    from torchparams.measure.diff import diff

    second = of(other, buffers=buffers)
    # Values decide, so that a quantised model can be compared with its original.
    compared = diff(params, second, selector, rename=rename, numeric=True, engine=engine, progress=progress)
    names = {row.b.name for row in compared.rows if row.b is not None}
    if len(names) < len(second):
        second = second.select(sorted(names), strict=False)
    detailed = max(len(params), len(second)) <= DETAILED
    return compared, measure(second, detailed=detailed, engine=engine, progress=progress)


def _payload(
    a: Target,
    b: Target | None,
    compared: Diff | None,
    spectra: object,
    pictures: object,
    *,
    strict: bool,
    engine: Engine | None,
) -> dict[str, Any]:
    """Data of the page."""
    infos: Sequence[ParameterInfo] = list(a.infos.values())
    mine: Sequence[str | None] = [info.name for info in infos]
    form: dict[str, Any] = {"version": payload.VERSION, "source": _source(a), "dtypes": payload.dtypes()}
    if b is not None and compared is not None:
        infos = [row.info for row in compared.rows]
        mine = [None if row.a is None else row.a.name for row in compared.rows]
        yours = [None if row.b is None else row.b.name for row in compared.rows]
        names = [row.name for row in compared.rows]
        form |= {
            "other": _source(b),
            "b": payload.statistics(b, yours),
            "difference": payload.difference(compared),
            "rename": None if compared.rename is None else str(compared.rename),
        }
    else:
        names = [info.name for info in infos]
    places = {name: i for i, name in enumerate(names)}
    table = payload.listing(infos)
    table["names"] = names
    audit = found_of.audit_of(a.params) if a.params.selector is None else None
    form |= {
        "table": table,
        "a": payload.statistics(a, mine),
        "unread": {str(places[name]): reason for name, reason in a.unread.items() if name in places},
        "findings": [
            *found_of.of_flags([flag for flag in a.flags if flag.name in places], places),
            *([] if audit is None else found_of.of_audit(audit, places)),
        ],
        "spectra": payload.spectra(_spectra(a.params, spectra, strict=strict, engine=engine), places),
        "pictures": {}
        if pictures is None
        else payload.pictures(pictures_of(a.params, pictures, strict=strict, engine=engine), places),
    }
    form["findings"].sort(key=lambda finding: ("error", "warning", "note").index(finding["severity"]))
    return form


def _spectra(params: Parameters, wanted: object, *, strict: bool, engine: Engine | None) -> Iterable[Spectrum]:
    if wanted is None:
        return ()
    from torchparams.measure.spectra import spectra
    from torchparams.measure.spectra_tree import Spectra

    return wanted if isinstance(wanted, Spectra) else spectra(params, wanted, strict=strict, engine=engine)


def _source(target: Target) -> dict[str, Any]:
    params = target.params
    return {
        "label": params.source.label,
        "format": params.source.format,
        "selector": None if params.selector is None else str(params.selector),
        "live": params.source.live,
        "detailed": target.detailed,
        "metadata": payload.metadata(as_json(dict(params.metadata))),
        "tensors": len(target.infos),
        "numel": sum(info.numel for info in target.infos.values()),
        "nbytes": sum(info.nbytes for info in target.infos.values()),
        "left_out": [each.to_json() for each in params.left_out],
        "lost": len(target.lost),
    }
