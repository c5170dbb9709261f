"""Checks of reading: rows, statistics, digests, differences, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import torchparams as tp
from process_group import check
from sharded.models import (
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    dtensor_ways,
    fsdp1,
    fsdp2,
    full,
    plain,
    shared_folder,
    ways,
    world,
)
from sharded.training import refused
from torchparams.engines import ThreadEngine
from torchparams.errors import NotReadable


def _json(result: Any) -> Any:
    return [row.to_json() for row in result.rows]


@check()
def rows_have_the_global_shape() -> None:
    want = tp.of(plain())
    for way, shard in ways().items():
        got = tp.of(shard(plain()))
        assert got.names == want.names, way
        for name, info in want.infos.items():
            here = got.info(name)
            assert (here.shape, here.numel, here.nbytes, here.dtype) == (
                info.shape,
                info.numel,
                info.nbytes,
                info.dtype,
            ), (way, name)
        assert (got.numel, got.nbytes, len(got)) == (want.numel, want.nbytes, len(want)), way


@check(2, 4)
def local_parts_are_in_the_info() -> None:
    info = tp.of(fsdp2(plain())).info("0.weight")
    assert info.sharding is not None
    assert info.sharding.placements == ("Shard(dim=0)",)
    assert info.sharding.ranks == tuple(range(world()))
    counts: list[Any] = [None] * world()
    dist.all_gather_object(counts, info.sharding.local_nbytes)
    assert sum(counts) == info.nbytes
    info = tp.of(fsdp1(plain())).info("0.weight")
    assert info.sharding is not None and info.sharding.kind == "FSDP1"
    dist.all_gather_object(counts, info.sharding.local_nbytes)
    assert sum(counts) == info.nbytes


@check(2)
def the_selector_finds_what_is_split() -> None:
    model = plain()
    model[2] = fsdp2(model[2])
    assert tp.of(model).select(":sharded").names == ["2.weight"]
    assert tp.of(model).select("~:sharded").names == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]


@check()
def statistics_are_those_of_the_whole() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for way, shard in ways().items():
            want = tp.stats(plain(dtype=dtype), quantiles=(0.1, 0.5))
            got = tp.stats(shard(plain(dtype=dtype)), quantiles=(0.1, 0.5))
            assert not got.unread, way
            assert _json(got) == _json(want), way
    want, got = (tp.stats(model, by="module") for model in (plain(), fsdp2(plain())))
    assert _json(got) == _json(want)


@check()
def statistics_are_those_of_full_tensor() -> None:
    for way, shard in dtensor_ways().items():
        model = shard(plain())
        assert _json(tp.stats(model)) == _json(tp.stats(full(model))), way


@check(2)
def spectra_are_those_of_the_whole() -> None:
    for exact in (100, 2):  # estimated then
        want = tp.spectra(plain(), exact=exact)
        assert want.rows
        for way, shard in ways().items():
            got = tp.spectra(shard(plain()), exact=exact)
            assert not got.unread, (way, got.unread)
            for row in want:
                here = got[row.name]
                assert math.isclose(here.spectral_norm, row.spectral_norm, rel_tol=1e-9), (way, row.name)
                assert (here.singular_values is None) == (row.singular_values is None), way


@check()
def digests_are_those_of_the_whole() -> None:
    want = tp.digest(plain()).digest
    for way, shard in ways().items():
        assert tp.digest(shard(plain())).digest == want, way


@check()
def differences_are_those_of_the_whole() -> None:
    other = plain(seed=1)
    want = tp.diff(plain(), other)
    for way, shard in ways().items():
        model = shard(plain())
        assert _json(tp.diff(model, other)) == _json(want), way
        assert tp.diff(model, plain()).same and tp.diff(plain(), model).same, way
        assert tp.diff(model, shard(plain())).same, way
        assert _json(tp.diff(model, shard(plain(seed=1)))) == _json(want), way
        doubles = {name: value.double() for name, value in plain(seed=1).state_dict().items()}
        numeric = tp.diff(plain(), doubles, numeric=True)
        assert _json(tp.diff(model, doubles, numeric=True)) == _json(numeric), way


@check(2, 4)
def models_that_are_sharded_differently_are_compared() -> None:
    known = dtensor_ways()
    one, two = known["fsdp2"](plain()), known["replicated"](plain())
    assert tp.diff(one, two).same
    assert not tp.diff(one, known["replicated"](plain(seed=1))).same


@check()
def files_are_those_of_the_whole() -> None:
    with shared_folder() as folder:
        kinds: list[tuple[str, dict[str, Any]]] = [
            ("w.safetensors", {}),
            ("w.pt", {}),
            ("h.safetensors", {"dtype": "bf16"}),
        ]
        for name, options in kinds:
            want = f"{folder}/want-{dist.get_rank()}-{name}"
            tp.save(plain(), want, **options)
            for way, shard in ways().items():
                path = f"{folder}/{way}-{name}"
                written = tp.save(shard(plain()), path, **options)
                assert written.path == path
                if name.endswith("safetensors"):
                    assert Path(path).read_bytes() == Path(want).read_bytes(), (way, name)
                assert tp.diff(path, want).same, (way, name)
        assert tp.diff(fsdp2(plain()), f"{folder}/want-0-w.safetensors").same
        assert tp.verify(f"{folder}/fsdp2-w.safetensors").ok


@check(2)
def a_plan_over_shards_is_read_before_it_is_written() -> None:
    want = tp.stats(tp.convert(plain(), dtype="bf16"))
    assert _json(tp.stats(tp.convert(fsdp2(plain()), dtype="bf16"))) == _json(want)
    merged = tp.merge([plain(), plain(seed=1)])
    assert tp.diff(tp.merge([fsdp2(plain()), plain(seed=1)]), merged).same


@check()
def state_dicts_of_shards_are_read() -> None:
    want = tp.digest(plain().state_dict()).digest
    assert tp.digest(fsdp2(plain()).state_dict()).digest == want


@check()
def summands_are_added_first() -> None:
    mesh = init_device_mesh("cpu", (world(),))
    torch.manual_seed(dist.get_rank())
    summand = DTensor.from_local(torch.randn(3, 5), mesh, [Partial()])
    want = summand.full_tensor()
    assert _json(tp.stats({"w": summand})) == _json(tp.stats({"w": want}))
    assert tp.digest({"w": summand}).digest == tp.digest({"w": want}).digest
    assert tp.diff({"w": summand}, {"w": want}).same


@check()
def odd_tensors_are_read() -> None:
    mesh = init_device_mesh("cpu", (world(),))
    tensors = {
        "scalar": torch.tensor(3.5),
        "one": torch.ones(1),
        "empty": torch.ones(0, 3),
        "complex": torch.randn(3, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)),
        "int": torch.arange(13),
        "bool": torch.tensor([True, False, True]),
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "large": torch.arange(2.0**21).reshape(1 << 20, 2),
    }
    for placement in (Shard(0), Shard(1), Replicate()):
        whole = {k: v for k, v in tensors.items() if not isinstance(placement, Shard) or v.ndim > placement.dim}
        parts = {k: distribute_tensor(v, mesh, [placement], src_data_rank=None) for k, v in whole.items()}
        assert _json(tp.stats(parts)) == _json(tp.stats(whole)), placement
        assert tp.digest(parts).digest == tp.digest(whole).digest, placement
        assert tp.diff(parts, whole).same, placement


@check(2, 4)
def a_part_is_never_given_for_the_whole() -> None:
    model = fsdp1(plain())
    for read in (tp.of(model).numpy, tp.of(model).source.tensor, tp.of(fsdp2(plain())).numpy):
        try:
            read("0.weight")
        except NotReadable as error:
            assert "0.weight" in str(error) or "DTensor" in str(error)
        else:
            raise AssertionError("a part of 0.weight came as the whole of it")
    found = tp.stats(fsdp2(plain()), engine=ThreadEngine())
    assert len(found.rows) == 0 and "sharded over" in found.unread[0].reason


@check(2)
def gathered_copies_are_refused() -> None:
    model = fsdp2(plain())
    model.unshard()  # type: ignore[operator]
    found = tp.stats(model)
    assert not len(found.rows) and "reshard()" in found.unread[0].reason, found
    refused(NotReadable, "reshard()", tp.digest, model)
    refused(NotReadable, "reshard()", tp.grad_norms, model)
    refused(NotReadable, "reshard()", lambda: tp.gradients(model).names)
    refused(NotReadable, "reshard()", tp.penalty, model)
    refused(NotReadable, "reshard()", tp.apply_, model, "**", nn.init.zeros_)
    model.reshard()  # type: ignore[operator]
    assert _json(tp.stats(model)) == _json(tp.stats(plain()))


@check(2)
def summoned_parameters_are_plain() -> None:
    for way in ("fsdp1", "flat"):
        model = ways()[way](plain())
        with FullyShardedDataParallel.summon_full_params(model):
            assert tp.of(model).info("0.weight").sharding is None
            assert _json(tp.stats(model)) == _json(tp.stats(plain()))
            assert tp.digest(model).digest == tp.digest(plain()).digest


@check(2)
def tied_parameters_of_a_flat_parameter_keep_their_names() -> None:
    def tied() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    want = tp.of(tied())
    for way in ("fsdp1", "flat", "fsdp2"):
        got = tp.of(ways()[way](tied()))
        assert {n: i.aliases for n, i in got.infos.items()} == {n: i.aliases for n, i in want.infos.items()}, way
        assert tp.digest(got.source).digest == tp.digest(want.source).digest, way
