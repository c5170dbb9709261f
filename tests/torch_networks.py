"""Networks with ties and with odd members, and what their tables have in common with PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import torchparams as tp
from torchparams.sources.live.module import ModuleSource


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.LSTM(4, 4, num_layers=2, bidirectional=True)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight


class Odd(nn.Module):
    """Everything that a module may hold besides plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("nothing", None)
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.add_module("gone", None)
        self.table = nn.ParameterDict({"b": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.ones(1))})
        self.list = nn.ParameterList([torch.ones(1), torch.ones(2)])
        self.same = self.scale
        self.module = nn.Linear(2, 2, bias=False)  # a name that wrappers use, and none of theirs
        self.empty = nn.Sequential()
        self.norm = nn.BatchNorm2d(3)


def agrees_with_torch(model: nn.Module) -> None:
    source = ModuleSource(model)
    params = tp.of(model)
    listed = list(model.named_parameters())
    everywhere = list(model.named_parameters(remove_duplicate=False))
    direct = list(model.named_parameters(recurse=False))
    assert same(list(params.items()), listed)
    assert same(list(params.named_parameters()), listed)
    assert same([(n, t) for n, _, t in source.walk()], listed)
    assert same(list(params.named_parameters(remove_duplicate=False)), everywhere)
    assert same(list(params.named_parameters(recurse=False)), direct)
    assert same(list(params.named_parameters(prefix="p")), list(model.named_parameters(prefix="p")))
    assert same_objects(list(params()), list(model.parameters()))
    assert same_objects(list(params(recurse=False)), list(model.parameters(recurse=False)))
    assert same_objects(list(params.values()), list(model.parameters()))
    assert params.names == list(params) == [name for name, _ in listed]
    assert len(params) == len(listed)
    infos = source.infos()
    assert list(infos) == params.names
    names: dict[int, list[str]] = {}
    for name, tensor in everywhere:
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in listed:
        info = infos[name]
        assert source.info(name) == info == params.info(name)
        assert [name, *info.aliases] == names[id(tensor)]
        assert info.raw_name == name
        assert info.kind == "parameter"
        assert info.requires_grad == tensor.requires_grad
        assert info.dtype == str(tensor.dtype).removeprefix("torch.")
        assert info.device == str(tensor.device)
        for spelling in (name, *info.aliases):
            assert params[spelling] is tensor
            assert spelling in params
            assert source.find(spelling) == name
    # Each module's buffers follow its parameters, as in a state dict.
    both = tp.of(model, buffers=True)
    kinds = {name: info.kind for name, info in both.infos.items()}
    assert [name for name, kind in kinds.items() if kind == "parameter"] == params.names
    buffers = dict(model.named_buffers())
    assert {name for name, kind in kinds.items() if kind == "buffer"} == buffers.keys()
    assert all(both[name] is tensor for name, tensor in buffers.items())
    assert same_objects(list(both()), list(model.parameters()))
    saved = [name for name in model.state_dict() if name in kinds]
    assert saved == [name for name, info in both.infos.items() if info.persistent]


def same(ours: list[tuple[str, Any]], theirs: list[tuple[str, Any]]) -> bool:
    return [name for name, _ in ours] == [name for name, _ in theirs] and same_objects(
        [tensor for _, tensor in ours], [tensor for _, tensor in theirs]
    )


def same_objects(ours: list[Any], theirs: list[Any]) -> bool:
    return list(map(id, ours)) == list(map(id, theirs))
