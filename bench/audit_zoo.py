"""Claim: on 60 and more architectures of timm and transformers, built small, an audit finds no error.

    python bench/audit_zoo.py [NAME …]

It needs timm and transformers beside torch and torchparams, and builds every model with random weights: nothing is
downloaded. Each is audited with an AdamW of two groups (matrices with weight decay, the rest without). What is printed
are the rules that found something; the exit status is 1 where a finding is an error.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

import torchparams as tp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny coatnet_pico_rw_224 convit_tiny convmixer_768_32 convnext_atto
convnextv2_atto crossvit_tiny_240 davit_tiny deit3_small_patch16_224 deit_tiny_distilled_patch16_224 densenet121
dla34 edgenext_xx_small efficientformer_l1 efficientnet_b0 efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8
focalnet_tiny_srf ghostnet_100 hrnet_w18_small inception_v3 levit_128s maxvit_pico_rw_256 mixer_s32_224
mobilenetv3_small_100 mobilevit_xxs nfnet_f0 pit_ti_224 poolformer_s12 pvt_v2_b0 regnetx_002 repvgg_a0 resnet18
resnetblur18 resnetv2_50 rexnet_100 seresnet18 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tinynet_e
tiny_vit_5m_224 twins_svt_small vgg11_bn visformer_tiny vit_relpos_small_patch16_224 vit_tiny_patch16_224
volo_d1_224 xcit_nano_12_p16_224
"""

WIDTH = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "pad_token_id": 0,
}
DECODER = {**WIDTH, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 256,
    "pad_token_id": 0,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256, "pad_token_id": 0}
VISION = {key: value for key, value in WIDTH.items() if key not in ("vocab_size", "pad_token_id")} | {"image_size": 64}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 64}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AutoModelForMaskedLM", {**WIDTH, "embedding_size": 32}),
    "bart": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "bert": ("AutoModelForMaskedLM", WIDTH),
    "blenderbot": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "bloom": ("AutoModelForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}),
    "clip": ("AutoModel", {"text_config": WIDTH, "vision_config": VISION, "projection_dim": 64}),
    "convbert": ("AutoModelForMaskedLM", {**WIDTH, "embedding_size": 64}),
    "deberta-v2": ("AutoModelForMaskedLM", {**WIDTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "deit": ("AutoModel", VISION),
    "dinov2": ("AutoModel", VISION),
    "distilbert": ("AutoModelForMaskedLM", {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}),
    "electra": ("AutoModelForMaskedLM", {**WIDTH, "embedding_size": 32}),
    "falcon": ("AutoModelForCausalLM", WIDTH),
    "gemma2": ("AutoModelForCausalLM", DECODER),
    "gpt2": ("AutoModelForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}),
    "gpt_neo": (
        "AutoModelForCausalLM",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_neox": ("AutoModelForCausalLM", WIDTH),
    "gptj": ("AutoModelForCausalLM", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 256}),
    "llama": ("AutoModelForCausalLM", DECODER),
    "longformer": ("AutoModelForMaskedLM", {**WIDTH, "attention_window": [8, 8]}),
    "mamba": ("AutoModelForCausalLM", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}),
    "marian": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "mbart": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "mistral": ("AutoModelForCausalLM", DECODER),
    "mixtral": ("AutoModelForCausalLM", {**DECODER, **EXPERTS}),
    "mpnet": ("AutoModelForMaskedLM", WIDTH),
    "mt5": ("AutoModelForSeq2SeqLM", T5),
    "olmo2": ("AutoModelForCausalLM", DECODER),
    "opt": ("AutoModelForCausalLM", {**WIDTH, "ffn_dim": 128, "word_embed_proj_dim": 32}),
    "pegasus": ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    "phi": ("AutoModelForCausalLM", WIDTH),
    "qwen2": ("AutoModelForCausalLM", DECODER),
    "qwen3_moe": ("AutoModelForCausalLM", {**DECODER, **EXPERTS, "tie_word_embeddings": True}),
    "roberta": ("AutoModelForMaskedLM", WIDTH),
    "segformer": ("AutoModelForImageClassification", {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}),
    "swin": ("AutoModelForImageClassification", {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}),
    "t5": ("AutoModelForSeq2SeqLM", T5),
    "vit": ("AutoModelForImageClassification", VISION),
    "vit_mae": ("AutoModelForPreTraining", VISION),
    "wav2vec2": ("AutoModelForCTC", {**WIDTH, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}),
    "whisper": ("AutoModelForSpeechSeq2Seq", {**SEQ2SEQ, "bos_token_id": 1, "eos_token_id": 2}),
    "xlm-roberta": ("AutoModelForMaskedLM", WIDTH),
    "xlnet": ("AutoModelForCausalLM", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": 256}),
}


def zoo(wanted: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Name and model, one after the other."""
    import timm
    import transformers

    for name in TIMM.split():
        if not wanted or name in wanted:
            yield f"timm/{name}", timm.create_model(name)
    for kind, (head, options) in TRANSFORMERS.items():
        if not wanted or kind in wanted:
            config = transformers.AutoConfig.for_model(kind, **options)
            yield f"transformers/{kind}", getattr(transformers, head).from_config(config)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What anybody would train it with."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
    )


def main(wanted: list[str]) -> int:
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    models = seconds = 0.0
    torch.manual_seed(0)
    for name, model in zoo(wanted):
        optimizer = adamw(model)
        start = time.perf_counter()
        found = tp.audit(model, optimizer)
        taken = time.perf_counter() - start
        models, seconds = models + 1, seconds + taken
        counts.update(finding.severity for finding in found)
        ids = " ".join(f"{id}×{n}" for id, n in Counter(finding.id for finding in found).items())
        print(f"{name:44} {found.parameters:5} tensors {taken * 1000:6.0f} ms  {ids}", flush=True)
        if found.exit_code or wanted:
            print(found)
    print(f"{models:.0f} architectures, {seconds:.1f} s of audits: {dict(counts) or 'nothing found'}")
    return bool(counts["error"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
