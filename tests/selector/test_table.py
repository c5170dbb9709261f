"""What each kind of selector matches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from fake_infos import EMBEDDING, LINEAR, MODULE, NORM, live, stored, transformer
from torchparams._selector.candidates import Candidates, class_spellings, is_bias
from torchparams._selector.parser import parse
from torchparams.errors import SelectorError

if TYPE_CHECKING:
    from torchparams.info import ParameterInfo


def hit(text: str, *infos: ParameterInfo) -> list[str]:
    """The names that a selector hits, in the table's order."""
    table = Candidates(infos)
    return [table.names[row] for row in sorted(table.hits(parse(text)))]


# --- names ---------------------------------------------------------------------------------------


def test_a_head_is_no_decode_head() -> None:
    infos = transformer()
    assert hit("head.**", *infos) == ["head.weight", "head.bias"]
    assert hit("**.head.**", *infos) == ["head.weight", "head.bias"]
    assert hit("/head.*/", *infos) == ["head.weight", "head.bias"]
    # Under its alias, lm_head.weight, the embedding is hit by what asks for more.
    assert hit("*head.**", *infos) == ["embeddings.word.weight", "head.weight", "head.bias", "decode_head.weight"]


def test_a_regular_expression_matches_the_whole_name() -> None:
    infos = [live("a.weight"), live("a.weight2"), live("xa.weight"), live("a\nweight")]
    assert hit(r"/a\.weight/", *infos) == ["a.weight"]
    assert hit(r"/a.weight|xa.*/", *infos) == ["a.weight", "xa.weight"]
    assert hit(r"/(?s:a.weight)/", *infos) == ["a.weight", "a\nweight"]


def test_a_slash_in_a_regular_expression_has_a_backslash() -> None:
    assert hit(r"/a\/b|[\/]/", live("a/b"), live("/"), live("ab")) == ["a/b", "/"]


def test_an_alias_is_as_good_as_the_name() -> None:
    tied = live("embed.weight", aliases=("lm_head.weight",))
    for text in ("lm_head.weight", "lm_head.**", "embed.*", r"/lm_.*/", "[name=lm_head.*]", "*.weight"):
        assert hit(text, tied, live("fc.weight"))[:1] == ["embed.weight"]
    assert hit("~lm_head.**", tied, live("fc.weight")) == ["fc.weight"]
    assert hit("[name!=lm_head.**]", tied, live("fc.weight")) == ["fc.weight"]


def test_a_raw_name_is_found_where_it_spells_the_wrapper() -> None:
    wrapped = live("fc.weight", raw="module.fc.weight")
    inner = live("enc.0.weight", raw="module.enc.0._orig_mod.weight")
    for text in ("module.fc.weight", "module.**", "**.module.**", r"/module\.fc.*/", "[name=module.*.*]"):
        assert hit(text, wrapped, inner)[0] == "fc.weight"
    assert hit("**._orig_mod.*", wrapped, inner) == ["enc.0.weight"]
    assert hit("**.{_orig_mod,x}.*", wrapped, inner) == []


def test_wrapping_a_model_changes_no_selection() -> None:
    """Counting components, `*.bias` would hit a top-level `bias` through `module.bias`."""
    plain = [live("bias"), live("fc.bias"), live("a.b.bias")]
    wrapped = [live(info.name, raw=f"module.{info.name}") for info in plain]
    for text in ("*.bias", "*.*.bias", "**.bias", "?*.**", "bias", r"/[a-z]+\.bias/", "~*.bias"):
        assert hit(text, *wrapped) == hit(text, *plain)


def test_the_users_own_module_is_no_wrapper() -> None:
    info = live("module.w", raw="module.module.w")
    assert hit("module.*", info) == ["module.w"]
    assert hit("module.module.w", info) == ["module.w"]


def test_a_canonical_name_comes_before_a_raw_one_of_the_same_text() -> None:
    assert hit("module.w", live("module.w"), live("w", raw="module.w")) == ["module.w"]


def test_a_name_with_characters_of_the_grammar() -> None:
    names = ["my layer.w", "a|b", "x[0]", 'say "hi"', "back\\slash", "/top/w", "", "a..b", "~", "(a)", "**", "k:v"]
    infos = [live(name) for name in names]
    for name in names:
        quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
        assert hit(quoted, *infos) == [name]
        assert hit("".join("\\" + char for char in name) or '""', *infos) == [name]


# --- conditions ----------------------------------------------------------------------------------

ZOO = [
    live("scalar", ()),
    live("vector", (64,), dtype="bfloat16"),
    live("matrix", (64, 3), dtype="float16", device="cuda:0"),
    live("kernel", (64, 3, 7, 7), device="cuda:1"),
    live("lazy", None),
    live("ghost", (2, 2), device="meta"),
    live("count", (), kind="buffer", dtype="int64", requires_grad=False),
    live("empty", (0, 4), requires_grad=False),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[name=*a*]", ["scalar", "matrix", "lazy"]),
        ("[name!=*a*]", ["vector", "kernel", "ghost", "count", "empty"]),
        ("[shape=64x3x7x7]", ["kernel"]),
        ("[shape=64x*]", ["matrix"]),
        ("[shape=*x*]", ["matrix", "ghost", "empty"]),
        ("[shape=()]", ["scalar", "count"]),
        ("[shape=lazy]", ["lazy"]),
        ("[shape!=lazy][ndim!=0][shape!=*x*]", ["vector", "kernel"]),
        ("[ndim=0]", ["scalar", "count"]),
        ("[ndim!=0]", ["vector", "matrix", "kernel", "lazy", "ghost", "empty"]),
        ("[ndim<2]", ["scalar", "vector", "count"]),
        ("[ndim<=2]", ["scalar", "vector", "matrix", "ghost", "count", "empty"]),
        ("[ndim>2]", ["kernel"]),
        ("[ndim>=2]", ["matrix", "kernel", "ghost", "empty"]),
        ("[numel>=1K]", ["kernel"]),
        ("[numel=192]", ["matrix"]),
        ("[numel=0]", ["lazy", "empty"]),
        ("[numel>0][numel<=4]", ["scalar", "ghost", "count"]),
        ("[nbytes=8]", ["count"]),
        ("[nbytes>36KiB]", ["kernel"]),
        ("[nbytes<1KiB][nbytes>100]", ["vector", "matrix"]),
        ("[dtype=bf16]", ["vector"]),
        ("[dtype=F16]", ["matrix"]),
        ("[dtype=torch.int64]", ["count"]),
        ("[dtype!=float32]", ["vector", "matrix", "count"]),
        ("[device=cuda]", ["matrix", "kernel"]),
        ("[device=cuda:1]", ["kernel"]),
        ("[device!=cpu]", ["matrix", "kernel", "ghost"]),
        ("[kind=buffer]", ["count"]),
        ("[kind!=parameter]", ["count"]),
        (":meta", ["ghost"]),
        (":matrix", ["matrix", "kernel", "ghost", "empty"]),
        (":buffer", ["count"]),
        (":frozen", ["empty"]),
        (":trainable", ["scalar", "vector", "matrix", "kernel", "lazy", "ghost"]),
        ("~:trainable", ["count", "empty"]),
        ("*r*[ndim>0]:trainable", ["vector", "matrix", "kernel"]),
    ],
)
def test_a_condition(text: str, names: list[str]) -> None:
    assert hit(text, *ZOO) == names


@pytest.mark.parametrize(
    "condition", ["name=*a*", "shape=64x*", "ndim=2", "numel=4", "nbytes=8", "dtype=bf16", "device=cuda", "kind=buffer"]
)
def test_unequal_is_the_complement_of_equal(condition: str) -> None:
    assert hit(f"[{condition.replace('=', '!=')}]", *ZOO) == hit(f"~[{condition}]", *ZOO)
    assert hit("[module!=Linear]", *transformer()) == hit("~[module=Linear]", *transformer())


# --- owners --------------------------------------------------------------------------------------

OWNERS = [
    live("fc", module=LINEAR),
    live("lora", module="peft.tuners.lora.Linear", bases=("peft.tuners.lora.Linear", "peft.tuners.LoraLayer", MODULE)),
    live("mine", module="__main__.Mine", bases=("__main__.Mine", LINEAR, MODULE)),
    live("ln", module=NORM),
    live(
        "bn",
        module="torch.nn.modules.batchnorm.BatchNorm2d",
        bases=(
            "torch.nn.modules.batchnorm.BatchNorm2d",
            "torch.nn.modules.batchnorm._BatchNorm",
            "torch.nn.modules.batchnorm._NormBase",
            MODULE,
        ),
    ),
    live("llama", module="transformers.models.llama.modeling_llama.LlamaRMSNorm"),
    live("act", module="timm.layers.BatchNormAct2d", bases=("timm.layers.BatchNormAct2d", "x.BatchNorm2d", MODULE)),
    live("cell", module="x.LayerNormLSTMCell"),
    live("normed", module="x.NormalizedLinear"),
    live("spectral", module="torch.nn.utils.parametrizations._SpectralNorm", kind="buffer", requires_grad=False),
    live("emb", module=EMBEDDING),
    live("bag", module="torch.nn.modules.sparse.EmbeddingBag"),
    live("parallel", module="megatron.core.VocabParallelEmbedding"),
    live("patches", module="x.PatchEmbeddings"),
]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (":norm", ["ln", "bn", "llama", "act"]),
        (":embedding", ["emb", "bag", "parallel"]),
        ("[module=Linear]", ["fc", "lora", "mine"]),
        ("[module=torch.nn.Linear]", ["fc", "mine"]),
        ("[module=torch.nn.modules.linear.Linear]", ["fc", "mine"]),
        ("[module=peft.**]", ["lora"]),
        ("[module=*Norm]", ["ln", "bn", "llama", "spectral"]),
        ("[module=_NormBase]", ["bn"]),
        ("[module={Embedding,EmbeddingBag}]", ["emb", "bag"]),
        ("[module=linear]", []),
        ("[module=Norm]", []),
        ("[module=torch.nn.Module]", [info.name for info in OWNERS]),
        ("[module=Module]", [info.name for info in OWNERS]),
        ("[module!=Linear]:embedding", ["emb", "bag", "parallel"]),
    ],
)
def test_the_owner_is_its_class_and_its_bases(text: str, names: list[str]) -> None:
    assert hit(text, *OWNERS) == names


def test_a_class_of_torch_answers_to_its_public_name() -> None:
    assert class_spellings(LINEAR) == (LINEAR, "Linear", "torch.nn.Linear")
    assert class_spellings("a.b.<locals>.Net") == ("a.b.<locals>.Net", "Net")


def test_a_bias_is_known_by_its_last_component() -> None:
    names = {
        "bias": True,
        "fc.bias": True,
        "rnn.bias_ih_l0": True,
        "rnn.bias_hh_l0_reverse": True,
        "attn.in_proj_bias": True,
        "attn.bias_k": True,
        "attn.attention_biases": True,
        "fc.biases": True,
        "fc.parametrizations.bias.original": True,
        "parametrizations.bias.original0": True,
        "fc.parametrizations.weight.original": False,
        "fc.parametrizations.bias.0.scale": False,
        "bias.weight": False,
        "bias.original": False,
        "attn.relative_position_bias_table": False,
        "fc.unbias": False,
        "fc.biased": False,
        "fc.Bias": False,
    }
    assert {name: is_bias(name) for name in names} == names
    infos = [live(name) for name in names]
    assert hit(":bias", *infos) == [name for name, bias in names.items() if bias]
    assert hit(":bias", *(stored(name) for name in names)) == [name for name, bias in names.items() if bias]


def test_tied_is_to_have_several_names() -> None:
    assert hit(":tied", live("a", aliases=("b",)), live("c")) == ["a"]


# --- what a file does not record -----------------------------------------------------------------

FILE = [stored("norm.weight"), stored("norm.bias")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ":norm",
            "m.safetensors: `:norm` cannot be evaluated, because the class of the owner is not recorded. Files "
            "and mappings of arrays record name, shape and dtype. Select by name or shape, as in **.bias or "
            "[ndim<2], or use the live model.",
        ),
        (":embedding", "`:embedding` cannot be evaluated, because the class of the owner is not recorded."),
        (
            "**[module!=Linear]",
            "`[module!=Linear]` cannot be evaluated, because the class of the owner is not recorded.",
        ),
        (":trainable", "`:trainable` cannot be evaluated, because requires_grad is not recorded."),
        ("~:frozen", "Select by name, as in encoder.**, or use the live model."),
        (
            ":buffer",
            "`:buffer` cannot be evaluated, because the distinction of parameters and buffers is not recorded.",
        ),
        ("nothing & :norm", "`:norm` cannot be evaluated"),
        ("nothing:norm", "`:norm` cannot be evaluated"),
    ],
)
def test_what_is_not_recorded_is_an_error_and_not_an_empty_selection(text: str, message: str) -> None:
    with pytest.raises(SelectorError, match=re.escape(message)):
        Candidates(FILE, "m.safetensors").hits(parse(text))


def test_a_file_answers_what_it_records() -> None:
    for text in ("**", "**.weight", "[ndim=1]", "[dtype=F32]", "[kind=tensor]", "[device=file]", "~:meta", "~:tied"):
        assert hit(text, *FILE)


def test_an_empty_table_is_asked_nothing() -> None:
    for text in (":norm", ":trainable", ":buffer", "[module=Linear]", "**", "~**"):
        assert hit(text) == []


# --- work ----------------------------------------------------------------------------------------


def test_a_node_is_found_out_once() -> None:
    calls: list[str] = []

    class Counting(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            calls.append(str(self))
            return str(self) == other

        __hash__ = str.__hash__

    table = Candidates([live("a", device="cpu")._replace(kind=Counting("parameter"))])
    node = parse("[kind=parameter]")
    for _ in range(3):
        assert table.hits(node) == {0}
    assert calls == ["parameter"]


def test_the_class_of_an_owner_is_looked_at_once_for_all_its_parameters() -> None:
    looked: list[str] = []

    class Watched(str):
        __slots__ = ()

        def startswith(self, *args: object) -> bool:
            looked.append(str(self))
            return False

    owner = Watched("x.Linear")
    infos = [live(f"w{n}", module=owner, bases=(owner,)) for n in range(100)]
    assert len(hit("[module=x.Linear]", *infos)) == 100
    assert len(looked) <= 2
