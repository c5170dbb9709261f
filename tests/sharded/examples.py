"""Examples, each a small training: DDP, FSDP2, mixed precision, expert parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import torchparams as tp
from process_group import check
from sharded.models import even, shared_folder, world
from sharded.training import refused
from torchparams.errors import PlanError

HEADS = ("[ndim>=2]", nn.init.xavier_uniform_)
REST = ("[ndim<2]", nn.init.ones_)


def _data(step: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def _trained(model: nn.Module, steps: int = 3) -> tuple[nn.Module, Any]:
    """Initialise, group, and train; every rank has the same data."""
    tp.init(model, REST, HEADS, seed=0)
    optimizer = torch.optim.AdamW(tp.groups(model, tp.rule(tp.no_decay, weight_decay=0.0), lr=0.01, weight_decay=0.1))
    for step in range(steps):
        model(_data(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@check(2, 4)
def distributed_data_parallel() -> None:
    want, _ = _trained(even())
    model, optimizer = _trained(nn.parallel.DistributedDataParallel(even()))
    assert tp.of(model).names == tp.of(want).names
    for name, row in {row.name: row for row in tp.diff(want, model).rows}.items():
        assert row.compared is None or row.compared.max < 1e-4, name
    assert not [finding for finding in tp.audit(model, optimizer) if finding.id.startswith("D")]
    state = tp.optimizer_state(model, optimizer)
    assert tp.load_optimizer_state(model, optimizer, state).complete


@check(2, 4)
def fully_sharded_training_with_a_checkpoint() -> None:
    want, _ = _trained(even(), steps=4)
    mesh = init_device_mesh("cpu", (world(),))
    with shared_folder() as folder:
        model, optimizer = _trained(fully_shard(even(), mesh=mesh))  # type: ignore[arg-type]  # it is the module
        tp.save(model, f"{folder}/model.safetensors")
        tp.save(tp.optimizer_state(model, optimizer), f"{folder}/optimizer.safetensors")
        assert tp.diff(model, f"{folder}/model.safetensors").same
        # Another run goes on from the files, on an unsharded model.
        again = even()
        after = torch.optim.AdamW(tp.groups(again, tp.rule(tp.no_decay, weight_decay=0.0), lr=0.01, weight_decay=0.1))
        tp.load(again, f"{folder}/model.safetensors")
        assert tp.load_optimizer_state(again, after, f"{folder}/optimizer.safetensors").complete
        again(_data(3)).square().mean().backward()
        after.step()
        for name, value in want.state_dict().items():
            assert torch.allclose(again.state_dict()[name], value, atol=1e-4), name


@check(2)
def mixed_precision_keeps_the_parameters_wide() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model: Any = even()
    fully_shard(model, mesh=init_device_mesh("cpu", (world(),)), mp_policy=policy)
    assert {str(info.dtype) for info in tp.of(model).infos.values()} == {"float32"}
    before = tp.digest(model).digest
    model(_data(0)).float().square().mean().backward()
    assert {str(info.dtype) for info in tp.gradients(model).infos.values()} == {"float32"}
    assert tp.digest(model).digest == before
    model.unshard()
    found = tp.stats(model)  # the copies are bfloat16, and not what is trained
    assert not len(found.rows)
    assert len(found.unread) == len(tp.of(model))
    model.reshard()
    assert len(tp.stats(model).rows) == len(tp.of(model))


class Experts(nn.Module):
    """A router on all ranks, and on each rank experts of its own under the same names."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(8, 4)
        torch.manual_seed(100 + rank)
        self.expert = nn.Linear(8, 8)


@check(2, 4)
def experts_of_one_name_are_told_apart() -> None:
    mesh = init_device_mesh("cpu", (world(),))
    model = Experts(dist.get_rank())
    fully_shard(model.router, mesh=mesh)
    # Each rank reads its own experts, and says so.
    own = tp.stats(model)
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, (own["expert.weight"].mean, own["router.weight"].mean))
    assert len({expert for expert, _ in found}) == world()
    assert len({router for _, router in found}) == 1
    findings = {finding.id: finding for finding in tp.audit(model)}
    assert findings["D102"].names == ("expert.weight", "expert.bias")
    assert not [f for f in tp.audit(model, suppress={"D102": "expert.**"}) if f.id == "D102"]
    # One file cannot hold them under one name; files of each rank can.
    with shared_folder() as folder:
        refused(PlanError, "different values on the ranks", tp.save, model, f"{folder}/all.safetensors")
        tp.save(model, f"{folder}/rank-{dist.get_rank()}.safetensors", "expert.**")
        tp.save(model, f"{folder}/router.safetensors", "router.**")
        assert tp.diff(model, f"{folder}/rank-{dist.get_rank()}.safetensors", "expert.**").same


@check(4)
def experts_on_a_part_of_the_mesh_are_told_apart() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))
    model = Experts(mesh.get_local_rank("ep"))
    fully_shard(model.router, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model.expert, mesh=mesh["dp"])
    weight: Any = model.expert.weight
    assert isinstance(weight, DTensor)
    info = tp.of(model).info("expert.weight")
    assert info.sharding is not None
    assert info.sharding.ranks == ((0, 1), (2, 3))[mesh.get_local_rank("ep")]  # the label
    whole = weight.full_tensor().detach()
    assert tp.stats(model)["expert.weight"].l2 == tp.stats({"w": whole})["w"].l2
    assert tp.digest(model).tensors["expert.weight"].digest == tp.digest({"w": whole}).tensors["w"].digest
    assert tp.diff(model, {"expert.weight": whole}, "expert.weight").same
    with shared_folder() as folder:
        refused(PlanError, "different values on the ranks", tp.save, model, f"{folder}/all.safetensors")
        path = f"{folder}/ep-{mesh.get_local_rank('ep')}.safetensors"
        tp.save(model, path, "expert.**")
        assert tp.diff(model, path, "expert.**").same


@check(2)
def tensor_parallel_embeddings() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 4)
    mesh = init_device_mesh("cpu", (world(),))
    whole = model.weight.detach().clone()
    model.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(whole, mesh, [Shard(1)]))
    assert tp.of(model).select(":embedding & :sharded").names == ["weight"]
    assert tp.diff(model, {"weight": whole}).same
