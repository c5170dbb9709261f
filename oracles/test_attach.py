"""Attached modules compared with plain ones: every module in PyTorch's own tests, and models of libraries."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
import unittest
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _module_db() -> list[Any]:
    """PyTorch's own list of its modules, with arguments and inputs for each."""
    # Its test helpers import expecttest, which the list has no use for.
    expecttest = types.ModuleType("expecttest")
    expecttest.TestCase = unittest.TestCase  # type: ignore[attr-defined]  # a module in name only
    sys.modules.setdefault("expecttest", expecttest)
    from torch.testing._internal.common_modules import module_db

    found: list[Any] = module_db
    return found


MODULES = _module_db()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are computed fastest by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cases(info: Any, training: bool) -> Iterator[tuple[Any, Any, Any]]:
    """Two equal modules, and the arguments to call them with."""
    for case in info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training):
        given = case.constructor_input
        torch.manual_seed(0)
        first = info.module_cls(*given.args, **given.kwargs).train(training)
        torch.manual_seed(0)
        yield first, info.module_cls(*given.args, **given.kwargs).train(training), case.forward_input


def outcome(module: Any, given: Any) -> Any:
    """The output of a call with the gradients of the parameters, or the class of the error that it raises."""
    torch.manual_seed(1)
    args, kwargs = copy.deepcopy((given.args, given.kwargs))
    try:
        out = module(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return type(error), str(error)
    tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    total = sum((x.float().sum() for x in tensors if x.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]  # torch's own is not typed
    return tensors, [p.grad for p in nn.Module.parameters(module)]


def assert_alike(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_every_module_of_pytorch(info: Any, training: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plain, module, given in cases(info, training):
            tp.attach(module, submodules=True)
            again = copy.deepcopy(module)
            read = pickle.loads(pickle.dumps(module))
            expected = outcome(plain, given)
            for one in (module, again, read):
                assert isinstance(one.parameters, tp.Parameters)
                assert one.parameters == tp.of(one)
                assert [id(p) for p in one.parameters()] == [id(p) for _, p in one.named_parameters()]
                result = outcome(one, given)
                if isinstance(expected[0], type):
                    assert result == expected
                else:
                    assert_alike(result, expected)
            assert list(module.state_dict()) == list(plain.state_dict())
            assert repr(module) == repr(plain)
            file = io.BytesIO()
            torch.save(module.state_dict(), file)
            file.seek(0)
            tp.attach(again).load_state_dict(torch.load(file))
            tp.detach(module)
            assert vars(module).keys() == vars(plain).keys()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


TOKENS = torch.arange(8)[None]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_model_of_transformers(tmp_path: Path) -> None:
    plain, model = llama(), tp.attach(llama(), submodules=True)
    names = [name for name, _ in plain.named_parameters()]
    assert model.parameters.names == names
    assert model.model.layers[1].parameters.names == [
        name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")
    ]
    assert model.num_parameters() == plain.num_parameters() == model.parameters.numel
    assert model.device == plain.device
    assert model.dtype == plain.dtype
    assert_alike(model(TOKENS).logits, plain(TOKENS).logits)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3), plain.generate(TOKENS, max_new_tokens=3))
    model.save_pretrained(tmp_path)
    again = tp.attach(type(model).from_pretrained(tmp_path))
    assert again.parameters.names == names
    assert tp.diff(again, plain).same
    assert_alike(copy.deepcopy(model)(TOKENS).logits, plain(TOKENS).logits)
    model.resize_token_embeddings(70)
    assert model.parameters["model.embed_tokens.weight"].shape == (70, 32)
    model.gradient_checkpointing_enable()
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_an_adapter_of_peft_on_it() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    ours: Any = tp.attach(get_peft_model(tp.attach(llama(), submodules=True), config), submodules=True)
    torch.manual_seed(1)
    theirs: Any = get_peft_model(llama(), config)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert ours.parameters == tp.of(ours)
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == len(ours.parameters)
    assert_alike(ours(TOKENS).logits, theirs(TOKENS).logits)
    assert_alike(ours.merge_and_unload()(TOKENS).logits, theirs.merge_and_unload()(TOKENS).logits)
