"""LoRA adapters: folding as in PEFT, errors for unsupported ones, and optimal extraction."""

from __future__ import annotations

import errno
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchparams as tp
from torch_files import saved
from torchparams.dtypes import DType
from torchparams.edit.lora import _lowrank
from torchparams.edit.lora._lowrank import Difference, Factors
from torchparams.errors import (
    FileFormatError,
    MismatchError,
    NotReadable,
    OptionError,
    PlanError,
    SourceError,
    WriteError,
)
from torchparams.expressions.base import Stored
from torchparams.expressions.work import ThreadWork, evaluate
from torchparams.testing import MemorySource, to_torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Array = np.ndarray[Any, Any]
PREFIX = "base_model.model."


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(DType.of(dtype).numpy)


def adapter(folder: Path, tensors: Mapping[str, Array], **config: Any) -> str:
    """A directory as PEFT writes it."""
    made = folder / f"adapter{len(list(folder.iterdir()))}"
    made.mkdir()
    (made / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "none", **config})
    )
    tp.convert({PREFIX + name: x for name, x in tensors.items()}, made / "adapter_model.safetensors").run()
    return str(made)


def factors(module: str, rows: int, columns: int, rank: int = 2, **options: Any) -> dict[str, Array]:
    return {
        f"{module}.lora_A.weight": normal(rank, columns, seed=1, **options),
        f"{module}.lora_B.weight": normal(rows, rank, seed=2, **options),
    }


def folded(base: object, adapter: str, folder: Path, **options: Any) -> dict[str, Array]:
    path = folder / "folded.safetensors"
    tp.fold_lora(base, adapter, path, overwrite=True, **options).run()
    table = tp.of(str(path))
    return {name: np.array(table.numpy(name)) for name in table.names}


BASE = {
    "layers.0.q.weight": normal(6, 5),
    "layers.0.q.bias": normal(6),
    "layers.1.q.weight": normal(6, 5, seed=7),
    "embed.weight": normal(9, 4),
    "conv.weight": normal(4, 3, 2, 2),
    "head.weight": normal(3, 6),
}


# --- folding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_weight_becomes_w_plus_scale_b_a_rounded_once(dtype: str, tmp_path: Path) -> None:
    w, both = normal(40, 30, dtype=dtype), factors("fc", 40, 30, dtype="bfloat16")
    made = folded({"fc.weight": w, "fc.bias": w[:, 0].copy()}, adapter(tmp_path, both), tmp_path)
    a, b = (to_torch(both[f"fc.lora_{x}.weight"]).float() for x in "AB")
    exact = to_torch(w).float() + 2 * (b @ a)
    assert str(made["fc.weight"].dtype) == dtype
    ours = made["fc.weight"].astype(np.float64)
    step = 2.0 ** -{"float32": 22, "float64": 22, "float16": 10, "bfloat16": 7}[dtype]
    np.testing.assert_allclose(ours, exact.double().numpy(), rtol=step, atol=1e-6)
    assert made["fc.bias"].tobytes() == w[:, 0].tobytes()
    rounded = exact.to(getattr(torch, dtype)).double().numpy()
    assert np.mean(ours == rounded) > (0.99 if DType.of(dtype).bits == 16 else 0.3)  # but for the order of BLAS's sums


def test_integers_fold_exactly(tmp_path: Path) -> None:
    # Small integers leave no sum to round: whatever the order, the result is this one.
    a, b = (np.random.default_rng(i).integers(-4, 5, shape) for i, shape in enumerate([(2, 700), (900, 2)]))
    w = np.random.default_rng(3).integers(-9, 9, (900, 700))
    tensors = {"fc.lora_A.weight": a.astype(np.float32), "fc.lora_B.weight": b.astype(np.float32)}
    made = folded({"fc.weight": w.astype(np.float32)}, adapter(tmp_path, tensors), tmp_path, scale=3)
    assert np.array_equal(made["fc.weight"], w + 6 * (b @ a))
    small = folded({"fc.weight": w.astype(np.float32)}, adapter(tmp_path, tensors), tmp_path, scale=3, memory="100KB")
    assert np.array_equal(small["fc.weight"], made["fc.weight"])


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    both = {"fc.lora_A.weight": np.full((2, 5), 1e30, np.float32), "fc.lora_B.weight": np.ones((6, 2), np.float32)}
    both["fc.lora_B.weight"][0] = 1e30  # overflows in each of the 5 columns
    both["fc.lora_B.weight"][1] = np.nan  # is no overflow
    given = {"fc.weight": normal(6, 5)}, adapter(tmp_path, both)
    with pytest.raises(PlanError, match=r"5 values are too large for float32\. Nothing was written"):
        folded(*given, tmp_path)
    made = folded(*given, tmp_path, allow_overflow=True)["fc.weight"]
    assert np.isinf(made[0]).all()
    assert np.isnan(made[1]).all()
    assert np.isfinite(made[2:]).all()


def test_tiles_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_lowrank, "_TILE", 64)
    w = normal(33, 20, dtype="bfloat16")
    path = adapter(tmp_path, factors("fc", 33, 20))
    plan = tp.fold_lora({"fc.weight": w}, path, tmp_path / "x.safetensors")
    x = plan.outputs[0].expression
    assert x.granule == 60
    whole = evaluate(x).tobytes()
    for block in (60, 120, 600):
        with ThreadWork() as work:
            work.begin(x, block)
            parts = [x.compute(at, min(at + block, x.numel), work).tobytes() for at in range(0, x.numel, block)]
        assert b"".join(parts) == whole


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"lora_alpha": 1}, 0.5),
        ({"alpha_pattern": {"q": 6}}, 3.0),
        ({"alpha_pattern": {"layers.1.q": 6}}, 2.0),
        ({"alpha_pattern": {"layers.1.q": 6, r"layers\.\d.q": 8, "q": 10}}, 4.0),
        ({"alpha_pattern": {"ayers.0.q": 6}}, 2.0),
        ({"rank_pattern": {"layers.0.q": 2}, "r": 64}, 2.0),
        ({"fan_in_fan_out": False, "inference_mode": True, "target_modules": ["q"], "eva_config": None}, 2.0),
        ({"init_lora_weights": "gaussian", "loftq_config": {}}, 2.0),
    ],
)
def test_scales(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    both = factors("layers.0.q", 6, 5)
    made = folded(BASE, adapter(tmp_path, both, **config), tmp_path)
    change = both["layers.0.q.lora_B.weight"] @ both["layers.0.q.lora_A.weight"]
    np.testing.assert_allclose(
        made["layers.0.q.weight"], BASE["layers.0.q.weight"] + scale * change, rtol=1e-5, atol=1e-5
    )
    for name in BASE.keys() - {"layers.0.q.weight"}:
        assert made[name].tobytes() == BASE[name].tobytes()


def test_every_layout(tmp_path: Path) -> None:
    tensors = {
        "embed.lora_embedding_A": normal(2, 9),
        "embed.lora_embedding_B": normal(4, 2),
        "conv.lora_A.weight": normal(2, 3, 2, 2),
        "conv.lora_B.weight": normal(4, 2, 1, 1),
        "head.weight": normal(3, 6, seed=5, dtype="float16"),
        "layers.0.q.base_layer.bias": normal(6, seed=5),
    }
    path = adapter(tmp_path, tensors, modules_to_save=["head"], bias="all")
    plan = tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    assert plan.notes == (
        f"method: LoRA (Hu et al. 2021, arXiv:2106.09685) of {path}; computed in float32, rounded once; "
        "2 weights changed, of rank 2",
        "replaced by tensors of the adapter: 'head.weight', 'layers.0.q.bias'",
    )
    assert "conv.weight + 2·B·A, rank 2" in str(plan)
    assert json.dumps(plan.to_json())
    made = folded(BASE, path, tmp_path)
    t = {name: torch.from_numpy(array) for name, array in tensors.items()}
    embed = (t["embed.lora_embedding_B"] @ t["embed.lora_embedding_A"]).T
    np.testing.assert_allclose(made["embed.weight"], BASE["embed.weight"] + 2 * embed.numpy(), rtol=1e-5, atol=1e-5)
    conv = torch.nn.functional.conv2d(t["conv.lora_A.weight"].transpose(0, 1), t["conv.lora_B.weight"]).transpose(0, 1)
    np.testing.assert_allclose(made["conv.weight"], BASE["conv.weight"] + 2 * conv.numpy(), rtol=1e-5, atol=1e-5)
    assert made["head.weight"].dtype == np.float32  # the base's type
    assert np.array_equal(made["head.weight"], tensors["head.weight"].astype(np.float32))
    assert np.array_equal(made["layers.0.q.bias"], tensors["layers.0.q.base_layer.bias"])


def test_a_weight_that_is_stored_transposed(tmp_path: Path) -> None:
    both = factors("c_attn", 6, 5)
    made = folded(
        {"c_attn.weight": np.zeros((5, 6), np.float32)}, adapter(tmp_path, both, fan_in_fan_out=True), tmp_path
    )
    change = both["c_attn.lora_B.weight"] @ both["c_attn.lora_A.weight"]
    np.testing.assert_allclose(made["c_attn.weight"], 2 * change.T, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_is_saved_whole_and_changed(tmp_path: Path) -> None:
    tensors = {
        "embed.lora_embedding_A": normal(2, 9),
        "embed.lora_embedding_B": normal(4, 2),
        "embed.base_layer.weight": normal(9, 4, seed=8),
    }
    made = folded(BASE, adapter(tmp_path, tensors), tmp_path)
    change = (tensors["embed.lora_embedding_B"] @ tensors["embed.lora_embedding_A"]).T
    np.testing.assert_allclose(
        made["embed.weight"], tensors["embed.base_layer.weight"] + 2 * change, rtol=1e-5, atol=1e-5
    )


def test_weights_in_a_torch_file(tmp_path: Path) -> None:
    both = factors("layers.0.q", 6, 5)
    path = adapter(tmp_path, both)
    expected = folded(BASE, path, tmp_path)
    weights = tmp_path / path.rpartition("/")[2] / "adapter_model.safetensors"
    (weights.parent / "adapter_model.bin").write_bytes(
        saved({PREFIX + k: torch.from_numpy(x) for k, x in both.items()})
    )
    weights.unlink()
    made = folded(BASE, path, tmp_path)
    assert made.keys() == expected.keys()
    assert all(np.array_equal(made[name], expected[name]) for name in made)


def test_a_tied_name_is_changed_alone_only_on_request(tmp_path: Path) -> None:
    shared = torch.from_numpy(normal(6, 5))
    (tmp_path / "base.pt").write_bytes(saved({"embed.weight": shared, "head.weight": shared}))
    path = adapter(tmp_path, factors("head", 6, 5))
    with pytest.raises(PlanError) as caught:
        tp.fold_lora(str(tmp_path / "base.pt"), path, tmp_path / "out.pt")
    assert str(caught.value).removeprefix(str(tmp_path)) == (
        "/base.pt: 'head.weight' is tied to 'embed.weight', but the adapter changes it alone. PEFT's merge would "
        "change all of them. To write separate tensors, pass shared='clone' (--shared clone)."
    )
    plan = tp.fold_lora(str(tmp_path / "base.pt"), path, tmp_path / "out.pt", shared="clone")
    assert plan.notes[1] == "no longer tied to others: 'head.weight'"
    plan.run()
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(state["embed.weight"], shared)
    assert not torch.equal(state["head.weight"], shared)


# --- what is not understood is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"use_dora": True},
            NotReadable,
            "It uses use_dora=True, which is not supported: it scales rows by learned magnitudes (DoRA). "
            "Merge it with PEFT.",
        ),
        (
            {"alora_invocation_tokens": [1, 2]},
            NotReadable,
            "It uses alora_invocation_tokens=[1, 2], which is not supported: "
            "it acts on some tokens only (aLoRA), which weights cannot express",
        ),
        (
            {"some_new_thing": {"x": 1}, "other": [1]},
            NotReadable,
            "It uses some_new_thing={'x': 1}, other=[1], which is not supported. Merge it with PEFT.",
        ),
        ({"peft_type": "IA3"}, NotReadable, "The adapter type 'IA3' is not supported. The supported type is 'LORA'."),
        (
            {"init_lora_weights": "pissa_niter_4"},
            NotReadable,
            "init_lora_weights='pissa_niter_4': this initialisation changed the weights of the base. "
            "Save it with PEFT's path_initial_model_for_weight_conversion, which writes a plain adapter.",
        ),
    ],
)
def test_configurations_that_are_refused(
    config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = adapter(tmp_path, factors("layers.0.q", 6, 5), **config)
    with pytest.raises(error) as caught:
        tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    assert str(caught.value) == f"{path}/adapter_config.json: {message}"


Q = "layers.0.q"


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        (
            {**factors(Q, 6, 5), f"{Q}.lora_magnitude_vector.weight": normal(6)},
            {},
            NotReadable,
            "{file}: 'base_model.model.layers.0.q.lora_magnitude_vector.weight' is not a supported factor, "
            "of a weight-decomposed adapter (DoRA). Supported are lora_A, lora_B, lora_embedding_A, lora_embedding_B "
            "and whole tensors. Merge it with PEFT.",
        ),
        (
            {**factors(Q, 6, 5), f"{Q}.lora_B.bias": normal(6)},
            {},
            NotReadable,
            "{file}: 'base_model.model.layers.0.q.lora_B.bias' is not a supported factor. Supported are "
            "lora_A, lora_B, lora_embedding_A, lora_embedding_B and whole tensors. Merge it with PEFT.",
        ),
        (
            {f"{Q}.lora_A.weight": normal(2, 5)},
            {},
            PlanError,
            "{file}: 'layers.0.q' has lora_A only. LoRA needs two factors, A and B.",
        ),
        (
            factors(Q, 6, 5, rank=3),
            {},
            PlanError,
            "{file}: The factors of 'layers.0.q' have shapes [3, 5] and [6, 3], but the configuration says r=2",
        ),
        (
            factors(Q, 6, 4),
            {},
            MismatchError,
            "'layers.0.q.weight' has shape [6, 5], which does not match factors of shapes [2, 4] and [6, 2]",
        ),
        (
            factors("layers.0.k", 6, 5),
            {},
            MismatchError,
            "dict: The adapter changes 'layers.0.k.weight', but the base has no such tensor. "
            "Did you mean 'layers.0.q.weight'? Fold into the model that the adapter was trained on.",
        ),
        (
            {"head.weight": normal(4, 6)},
            {},
            MismatchError,
            "'head.weight' has shape [3, 6] in dict and [4, 6] in the adapter. "
            "Fold into the model that the adapter was trained on.",
        ),
        (factors(Q, 6, 5), {"r": 0}, FileFormatError, "{config}: r=0: the rank must be at least 1"),
        (factors(Q, 6, 5), {"lora_alpha": "4"}, FileFormatError, "{config}: lora_alpha='4' is not a number"),
        (
            factors(Q, 6, 5),
            {"lora_alpha": 10**20},
            FileFormatError,
            "{config}: lora_alpha=100000000000000000000 is not a number",
        ),
        (factors(Q, 6, 5), {"lora_alpha": float("nan")}, FileFormatError, "{config}: lora_alpha=nan is not a number"),
        (factors(Q, 6, 5), {"rank_pattern": [1]}, FileFormatError, "{config}: rank_pattern=[1] is not an object"),
        (
            factors(Q, 6, 5),
            {"alpha_pattern": {"(": 1}},
            FileFormatError,
            "{config}: '(' in alpha_pattern is not a regular expression: missing ), unterminated subpattern",
        ),
    ],
)
def test_tensors_that_are_refused(
    tensors: dict[str, Array], config: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = adapter(tmp_path, tensors, **config)
    with pytest.raises(error) as caught:
        tp.fold_lora(BASE, path, tmp_path / "x.safetensors")
    assert str(caught.value) == message.replace("{file}", f"{path}/adapter_model.safetensors").replace(
        "{config}", f"{path}/adapter_config.json"
    )


def test_directories_that_are_no_adapters(tmp_path: Path) -> None:
    def message(error: type[Exception], path: Path, **options: Any) -> str:
        with pytest.raises(error) as caught:
            tp.fold_lora(BASE, path, tmp_path / "x.safetensors", **options)
        return str(caught.value).replace(str(tmp_path), "here")

    assert message(SourceError, tmp_path) == (
        "here/adapter_config.json: No such file or directory. An adapter is a directory saved by PEFT."
    )
    (tmp_path / "adapter_config.json").write_text("{")
    assert message(FileFormatError, tmp_path).startswith("here/adapter_config.json: It is not JSON: ")
    (tmp_path / "adapter_config.json").write_text("[]")
    assert message(FileFormatError, tmp_path) == "here/adapter_config.json: The JSON is not an object"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert message(SourceError, tmp_path) == (
        "here: The directory has no adapter weights. The file name is adapter_model.safetensors."
    )
    path = adapter(tmp_path, factors(Q, 6, 5))
    with pytest.raises(PlanError) as caught:
        tp.fold_lora({f"{Q}.weight": np.zeros((6, 5), np.int8)}, path, tmp_path / "x.safetensors")
    assert str(caught.value) == (
        "dict: Cannot add to 'layers.0.q.weight' of dtype int8. Use a base with floating-point weights."
    )
    with pytest.raises(OptionError, match=r"`compute` must be 'float32' or 'float64', not 'int8'"):
        tp.fold_lora(BASE, path, tmp_path / "x.safetensors", compute="int8")


# --- extracting --------------------------------------------------------------------------------


def tuned(rank: int, scale: float = 0.1, dtype: str = "float32") -> dict[str, Array]:
    """The base, its matrices changed by a rank, and a bias."""
    made = {name: array.copy() for name, array in BASE.items()}
    for name in ("layers.0.q.weight", "embed.weight", "head.weight"):
        rows, columns = made[name].shape
        made[name] += scale * normal(rows, rank, seed=3) @ normal(rank, columns, seed=4)
        made[name] = made[name].astype(DType.of(dtype).numpy)
    made["layers.0.q.bias"] += 1
    return made


def test_there_and_back(tmp_path: Path) -> None:
    after = tuned(2)
    made = tp.extract_lora(BASE, after, tmp_path / "adapter", rank=2).run()
    assert [(change.name, change.rank) for change in made.changes] == [
        ("layers.0.q.weight", 2),
        ("embed.weight", 2),
        ("head.weight", 2),
    ]
    assert all(change.error < 1e-5 for change in made.changes)
    assert made.left == ("layers.0.q.bias",)
    back = folded(BASE, str(tmp_path / "adapter"), tmp_path)
    for name, array in BASE.items():
        np.testing.assert_allclose(back[name], array if name in made.left else after[name], rtol=1e-5, atol=1e-5)


def test_the_rest_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    after = tuned(2)
    with pytest.raises(PlanError) as caught:
        tp.extract_lora(BASE, after, tmp_path / "adapter", rank=2, save_rest=True)
    assert str(caught.value) == (
        f"{tmp_path}/adapter: 'layers.0.q.weight' cannot be written whole: its module already has factors. "
        "Exclude it with a selector, or omit save_rest (--save-rest)."
    )
    after = {**BASE, "head.weight": tuned(1)["head.weight"], "conv.weight": BASE["conv.weight"] + 1}
    plan = tp.extract_lora(BASE, after, tmp_path / "adapter", rank=1, save_rest=True)
    assert plan.config["modules_to_save"] == ["conv"]
    assert plan.run().left == ()
    back = folded(BASE, str(tmp_path / "adapter"), tmp_path)
    assert np.array_equal(back["conv.weight"], after["conv.weight"])
    np.testing.assert_allclose(back["head.weight"], after["head.weight"], rtol=1e-5, atol=1e-5)


def test_what_the_directory_holds(tmp_path: Path) -> None:
    plan = tp.extract_lora(BASE, tuned(3), tmp_path / "adapter", rank=5, dtype="bf16", base_name="me/base")
    assert not (tmp_path / "adapter").exists()
    plan.run()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "me/base",
        "r": 5,
        "lora_alpha": 5,
        "rank_pattern": {"embed": 4, "head": 3},
        "alpha_pattern": {"embed": 4, "head": 3},
        "target_modules": ["layers.0.q", "embed", "head"],
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    table = tp.of(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {name: (list(info.shape or ()), str(info.dtype)) for name, info in table.infos.items()} == {
        "base_model.model.layers.0.q.lora_A.weight": ([5, 5], "bfloat16"),
        "base_model.model.layers.0.q.lora_B.weight": ([6, 5], "bfloat16"),
        "base_model.model.embed.lora_embedding_A": ([4, 9], "bfloat16"),
        "base_model.model.embed.lora_embedding_B": ([4, 4], "bfloat16"),
        "base_model.model.head.lora_A.weight": ([3, 6], "bfloat16"),
        "base_model.model.head.lora_B.weight": ([3, 3], "bfloat16"),
    }
    assert table.metadata == {"format": "pt"}


def computed(after: Array, before: Array, rank: int, dtype: str = "float32") -> tuple[Array, Array, Factors]:
    x, y = (Stored(MemorySource({"w": array}), "w") for array in (after, before))
    both = Factors(Difference(x, y), rank, DType.of(dtype), "w")
    with ThreadWork() as work:
        work.begin(both.difference, 64)
        return both.take("a", work), both.take("b", work), both


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_small_matrices_have_the_truncated_decomposition(rows: int, columns: int, rank: int, seed: int) -> None:
    before, after = normal(rows, columns, seed=seed), normal(rows, columns, seed=seed + 100)
    a, b, both = computed(after, before, rank)
    values = np.linalg.svd((after - before).astype(np.float64), compute_uv=False)
    norm, rest = np.linalg.norm(values), np.linalg.norm(values[rank:])
    assert (a.shape, b.shape) == ((min(rank, rows, columns), columns), (rows, min(rank, rows, columns)))
    assert both.norm == pytest.approx(norm, rel=1e-5)
    assert both.error == pytest.approx(rest / norm, abs=2e-6)
    left = np.linalg.norm(after - before - b @ a)
    assert left == pytest.approx(rest, abs=1e-4)


def test_large_matrices_are_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lowrank, "_EXACT", 16)
    numbers = np.random.default_rng(0)
    u, v = (np.linalg.qr(numbers.standard_normal((size, 90)))[0] for size in (120, 90))
    change = (u * 0.9 ** np.arange(90)) @ v.T
    before = normal(120, 90)
    a, b, both = computed((before + change).astype(np.float32), before, 8)
    assert both.directions == 18
    best = float(np.linalg.norm(0.9 ** np.arange(8, 90)) / np.linalg.norm(0.9 ** np.arange(90)))
    assert best <= (both.error or 0) < 1.001 * best
    again = computed((before + change).astype(np.float32), before, 8)
    assert a.tobytes() == again[0].tobytes()
    assert b.tobytes() == again[1].tobytes()


def test_the_error_is_that_of_what_is_written() -> None:
    before, after = normal(20, 10), normal(20, 10, seed=9)
    a, b, both = computed(after, before, 4, "bfloat16")
    left = np.linalg.norm(after - before - b.astype(np.float32) @ a.astype(np.float32))
    assert both.error == pytest.approx(left / np.linalg.norm(after - before), rel=1e-4)


def test_what_is_held_is_bounded() -> None:
    def directions(rows: int, columns: int, rank: int) -> int:
        x = Stored(MemorySource({"w": np.broadcast_to(np.float32(0), (rows, columns))}), "w")
        return Factors(Difference(x, x), rank, DType.of("float32"), "w").directions

    assert directions(512, 1000, 4) == 512
    assert directions(513, 1000, 4) == 14
    assert directions(512, 100_000, 4) == 14
    assert directions(3, 100_000, 4) == 3


def test_a_difference_that_is_not_finite() -> None:
    before, after = normal(4, 3), normal(4, 3, seed=1)
    after[1, 1] = np.nan
    with pytest.raises(NotReadable) as caught:
        computed(after, before, 1)
    assert str(caught.value) == "The difference of 'w' has non-finite values, so it has no decomposition"


def test_embeddings_are_selected_or_told_by_their_names(tmp_path: Path) -> None:
    base = {
        f"{name}.weight": normal(4, 3)
        for name in ("tokens", "wte", "model.embed_tokens", "embeddings.LayerNorm", "embed_norm", "patch_embed.proj")
    }
    after = {name: array + 1 for name, array in base.items()}

    def embedded(**options: Any) -> list[str]:
        plan = tp.extract_lora(base, after, tmp_path / "a", rank=1, **options)
        return [o.name.split(".lora")[0].removeprefix(PREFIX) for o in plan.outputs if "embedding_A" in o.name]

    assert embedded() == ["wte", "model.embed_tokens"]
    assert embedded(embeddings="tokens.weight") == ["tokens"]


def test_a_live_model(tmp_path: Path) -> None:
    base = torch.nn.ModuleDict({"words": torch.nn.Embedding(5, 3), "norm": torch.nn.BatchNorm1d(3)})
    after = torch.nn.ModuleDict({"words": torch.nn.Embedding(5, 3), "norm": torch.nn.BatchNorm1d(3)})
    plan = tp.extract_lora(base, after, tmp_path / "a", rank=3)
    assert [output.name for output in plan.outputs] == [
        "base_model.model.words.lora_embedding_A",
        "base_model.model.words.lora_embedding_B",
    ]
    plan.run()
    words = folded(base, str(tmp_path / "a"), tmp_path)["words.weight"]
    np.testing.assert_allclose(words, after["words"].weight.detach().numpy(), rtol=1e-5, atol=1e-5)  # type: ignore[operator]  # modules of a dict


def test_what_extracting_refuses(tmp_path: Path) -> None:
    def message(
        error: type[Exception], base: object, after: object, path: Path = tmp_path / "a", **options: Any
    ) -> str:
        with pytest.raises(error) as caught:
            tp.extract_lora(base, after, path, **{"rank": 1, **options})
        return str(caught.value).replace(str(tmp_path), "here")

    w = {"w.weight": np.zeros((2, 2), np.float32)}
    v = {"w.weight": np.ones((2, 2), np.float32)}
    assert message(PlanError, w, w) == "dict and dict: The checkpoints do not differ"
    for rank in (0, 1.5, True):
        assert message(OptionError, w, v, rank=rank) == f"`rank` must be a positive integer, not {rank!r}"
    assert message(OptionError, w, v, dtype="int8") == "The dtype of factors must be floating-point, not int8"
    assert message(MismatchError, {}, v) == (
        "'w.weight' of dict is not in dict. Exclude such tensors with a selector (-s)."
    )
    assert message(MismatchError, {"w.weight": np.zeros(3)}, v) == (
        "'w.weight' has shape [3] in dict and [2, 2] in dict. Exclude such tensors with a selector (-s)."
    )
    assert message(PlanError, {"b": np.zeros(2)}, {"b": np.ones(2)}) == (
        "dict: Only 'b' differ, and only matrices can have factors"
    )
    assert message(PlanError, {"b": np.zeros(2)}, {"b": np.ones(2)}, save_rest=True) == (
        "here/a: 'b' cannot be written whole: it has no module. "
        "Exclude it with a selector, or omit save_rest (--save-rest)."
    )
    assert (
        message(PlanError, w, v, tmp_path / "no" / "a")
        == "here/no: Directory not found. Make it first: mkdir -p here/no."
    )
    (tmp_path / "file").touch()
    assert (
        message(PlanError, w, v, tmp_path / "file")
        == "here/file: An adapter needs a directory, but the target is a file. Choose another target."
    )
    tp.extract_lora(w, v, tmp_path / "a", rank=1).run()
    assert message(PlanError, w, v) == (
        "here/a/adapter_config.json: It exists already. "
        "To replace it once the new one is complete, pass overwrite=True (--force)."
    )
    tp.extract_lora(w, v, tmp_path / "a", rank=1, overwrite=True).run()


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = ({"w.weight": np.full((2, 2), value, np.float32)} for value in (0, np.inf))
    plan = tp.extract_lora(w, v, tmp_path / "a", rank=1)
    with pytest.raises(NotReadable):
        plan.run()
    assert not (tmp_path / "a").exists()
    plan = tp.extract_lora(w, {"w.weight": np.ones((2, 2), np.float32)}, tmp_path / "b", rank=1)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(WriteError):
        patch.setattr("torchparams.edit.lora.extract.replace_file", broken)
        plan.run()
    assert not (tmp_path / "b").exists()
    plan = tp.extract_lora(w, {"w.weight": np.ones((2, 2), np.float32)}, tmp_path / "b", rank=1)

    def full(path: str, *_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device", path)

    monkeypatch.setattr("os.mkdir", full)
    with pytest.raises(WriteError) as caught:
        plan.run()
    assert str(caught.value).startswith(f"{tmp_path}/b: ")


def test_the_report(tmp_path: Path) -> None:
    made = tp.extract_lora(BASE, tuned(2), tmp_path / "adapter", rank=2).run()
    text = str(made)
    assert text.splitlines()[1].split() == ["name", "shape", "rank", "norm", "relative", "error"]
    assert "differ, but are not written, because only matrices have factors: 'layers.0.q.bias'" in text
    told = json.loads(json.dumps(made.to_json()))
    assert told["left"] == ["layers.0.q.bias"]
    assert [change["name"] for change in told["changes"]] == ["layers.0.q.weight", "embed.weight", "head.weight"]
    assert "<table" in made._repr_html_()
