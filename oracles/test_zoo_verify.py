"""Models of timm and transformers, their state dicts, and files saved by these libraries verify against each other.

`bench/audit_zoo.py` says how the models are built: small, with random weights.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

import torchparams as tp
from audit_zoo import TIMM, TRANSFORMERS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries

SMALL_TIMM = """
coatnet_pico_rw_224 convit_tiny convnext_atto convnextv2_atto deit_tiny_distilled_patch16_224 edgenext_xx_small
efficientnet_b0 efficientvit_b0 ghostnet_100 levit_128s mobilenetv3_small_100 mobilevit_xxs pit_ti_224 poolformer_s12
pvt_v2_b0 regnetx_002 repvgg_a0 resnet18 seresnet18 tinynet_e vit_tiny_patch16_224 xcit_nano_12_p16_224
"""
TIED_TIMM = "coat_lite_tiny"  # its positional encodings are one module in several places


def test_there_are_sixty_architectures() -> None:
    assert set(SMALL_TIMM.split()) | {TIED_TIMM} <= set(TIMM.split())
    assert len(SMALL_TIMM.split()) + len(TRANSFORMERS) >= 60


def transformer(kind: str) -> Any:
    import transformers

    head, options = TRANSFORMERS[kind]
    torch.manual_seed(0)
    return getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **options))


def agree(model: nn.Module, saved: Path, folder: Path, left_out: set[str]) -> set[str]:
    """Check that all verify against each other; what the library saved may lack some names.

    Returns:
        The names that verify says are there under another name.
    """
    file = folder / "state.pt"
    torch.save(model.state_dict(), file)
    things: dict[str, Any] = {"model": model, "state": model.state_dict(), "file": file, "saved": saved}
    digests = {name: tp.digest(x) for name, x in things.items()}
    assert digests["model"].digest == digests["state"].digest == digests["file"].digest
    tied: set[str] = set()
    for a, x in things.items():
        for b, expected in digests.items():
            found = tp.verify(x, expected)
            names = {name for difference in found.differences for name in difference.names}
            kinds = {difference.kind for difference in found.differences}
            if (a == "saved") == (b == "saved"):
                assert found.ok, found
            else:
                assert names == left_out, found
                assert kinds == ({"missing" if a == "saved" else "unexpected"} if left_out else set())
            tied |= {
                name.partition(" = ")[0] for check in found.checks if check.what == "ties" for name in check.tensors
            }
    assert not tp.of(model).source.coded()  # none is taken for quantised
    return tied


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers(kind: str, tmp_path: Path) -> None:
    model = transformer(kind)
    model.save_pretrained(tmp_path / "saved", save_original_format=False)
    state = model.state_dict()
    ignored = model._keys_to_ignore_on_save or ()  # positions that are computed anew
    left_out = {name for name in state if any(re.search(pattern, name) for pattern in ignored)}
    there = {name for info in tp.of(tmp_path / "saved").infos.values() for name in (info.name, *info.aliases)}
    aliases = {name for info in tp.of(model).infos.values() for name in (info.name, *info.aliases) if info.aliases}
    tied = agree(model, tmp_path / "saved", tmp_path, left_out - there)
    assert tied == state.keys() - there - left_out
    assert tied <= aliases


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_a_checkpoint_under_the_names_of_an_older_version_does_not_pass(kind: str, tmp_path: Path) -> None:
    model = transformer(kind)
    model.save_pretrained(tmp_path / "saved")
    found = tp.verify(tmp_path / "saved", tp.digest(model))
    assert {difference.kind for difference in found.differences} == {"missing", "unexpected"}


@pytest.mark.parametrize("name", SMALL_TIMM.split())
def test_timm(name: str, tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(name)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert not agree(model, tmp_path / "saved", tmp_path, set())


def test_timm_with_ties(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_model

    model = timm.create_model(TIED_TIMM)
    save_model(model, str(tmp_path / "saved.safetensors"))
    assert len(agree(model, tmp_path / "saved.safetensors", tmp_path, set())) > 10
