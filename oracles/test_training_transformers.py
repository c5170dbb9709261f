"""Shards that `convert` writes from the distributed checkpoint of a transformers model: transformers loads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ranks import on_ranks

import torchparams as tp
from torchvision_import import import_torchvision


def network(kind: str) -> Any:
    """A small network of transformers, the same in every process."""
    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":  # whose head is its embedding
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )


def save(kind: str, folder: str) -> None:
    """Shard the network by FSDP2, and save it from every rank."""
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dcp: Any = checkpoint  # which does not declare what it exports
    model = network(kind)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save({"model": model.state_dict(), "step": 5}, checkpoint_id=folder)
    dist.barrier()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_the_shards(kind: str, tmp_path: Path) -> None:
    on_ranks(2, save, kind, f"{tmp_path}/step-5")
    want = network(kind).eval()
    out = tmp_path / "hub"
    tp.convert(f"{tmp_path}/step-5#model", f"{out}/", max_shard_size=16 << 10).run()
    assert len(list(out.glob("*.safetensors"))) > 1
    want.config.save_pretrained(out)
    loaded, info = type(want).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for name, value in want.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    words = torch.arange(12).reshape(1, 12)
    assert torch.equal(loaded.eval()(words).logits, want(words).logits)
