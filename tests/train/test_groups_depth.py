from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import torchparams as tp
from torchparams.errors import NoMatch, OptionError, SelectorError
from torchparams.train.depth import blocks_of, number_pattern

if TYPE_CHECKING:
    from collections.abc import Callable


class Mixer(nn.Module):
    """A block with layers in it, in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.fc = nn.Linear(2, 2)


class Deep(nn.Module):
    """A block with a block in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.mixer = Mixer()
        self.mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def module(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def depth_of(model: nn.Module, depth: Any = None) -> dict[str, int]:
    """The depth of every parameter."""
    groups = tp.groups(model, lr=1.0, layer_decay=0.5, depth=depth)
    found = {name: origin.depth for name, origin in groups.origins.items()}
    assert all(at is not None for at in found.values())
    return {name: int(at or 0) for name, at in found.items()}


def first_depths(model: nn.Module, depth: Any = None, components: int = 2) -> dict[str, int]:
    """The depth of what begins with the same components, which has to be one."""
    found: dict[str, int] = {}
    for name, at in depth_of(model, depth).items():
        key = ".".join(name.split(".")[:components])
        assert found.setdefault(key, at) == at
    return found


def transformer(blocks: int = 3, block: Callable[[], nn.Module] = Deep) -> nn.Module:
    model = module(
        embed=nn.Embedding(5, 2),
        blocks=nn.ModuleList(block() for _ in range(blocks)),
        norm=nn.LayerNorm(2),
        head=nn.Linear(2, 5),
    )
    model.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 2)))
    return model


# --- the rate ---------------------------------------------------------------------------------


def test_the_rate_falls_by_the_factor_from_one_depth_to_the_one_before() -> None:
    groups = tp.groups(transformer(), tp.rule("head.**", lr=3.0), lr=1.0, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["cls_token"] == rates["embed.weight"] == 0.5**4
    assert [rates[f"blocks.{n}.norm.weight"] for n in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert rates["norm.weight"] == 1.0
    assert rates["head.weight"] == 3.0
    assert len(groups) == 6


def test_a_factor_of_one_changes_nothing() -> None:
    assert {group["lr"] for group in tp.groups(transformer(), lr=0.1, layer_decay=1)} == {0.1}


def test_freezing_does_not_change_the_rates_of_the_rest() -> None:
    model = transformer()
    rates = {n: g["lr"] for g in tp.groups(model, lr=1.0, layer_decay=0.5) for n in g["param_names"]}
    model.get_submodule("head").requires_grad_(False)
    model.get_submodule("embed").requires_grad_(False)
    left = {n: g["lr"] for g in tp.groups(model, lr=1.0, layer_decay=0.5) for n in g["param_names"]}
    assert left == {name: rate for name, rate in rates.items() if not name.startswith(("head.", "embed."))}


def test_a_selection_has_the_rates_that_it_has_in_the_whole() -> None:
    model = transformer()
    rates = {n: g["lr"] for g in tp.groups(model, lr=1.0, layer_decay=0.5) for n in g["param_names"]}
    blocks = tp.groups(tp.of(model).select("blocks.**"), lr=1.0, layer_decay=0.5)
    assert {n: g["lr"] for g in blocks for n in g["param_names"]} == {
        name: rate for name, rate in rates.items() if name.startswith("blocks.")
    }


def test_buffers_have_no_depth() -> None:
    model = module(blocks=nn.Sequential(Mixer(), Mixer()))
    model.get_submodule("blocks.1").register_buffer("steps", torch.zeros(1))
    model.register_module("count", nn.BatchNorm1d(1, affine=False))
    assert tp.groups(tp.of(model, buffers=True), lr=1.0, layer_decay=0.5) == tp.groups(model, lr=1.0, layer_decay=0.5)
    assert set(first_depths(model).values()) == {1, 2}


def test_a_rate_that_is_a_tensor_stays_one() -> None:
    rate = torch.tensor(1.0)
    groups = tp.groups(transformer(), tp.rule(tp.no_decay, weight_decay=0.0), lr=rate, layer_decay=0.5)
    by_depth: dict[float, set[int]] = {}
    for group in groups:
        assert isinstance(group["lr"], torch.Tensor)
        by_depth.setdefault(group["lr"].item(), set()).add(id(group["lr"]))
    assert sorted(by_depth) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert all(len(tensors) == 1 for tensors in by_depth.values())
    assert rate.item() == 1.0


def test_what_a_layer_decay_needs() -> None:
    with pytest.raises(OptionError) as error:
        tp.groups(transformer(), tp.rule("head.**", lr=1.0), layer_decay=0.5)
    assert str(error.value) == (
        "Module: A layer decay multiplies the lr, and 'cls_token' has none. "
        "Set one for all: torchparams.groups(model, …, lr=1e-3, layer_decay=0.75)."
    )
    with pytest.raises(OptionError) as error:
        tp.groups(transformer(), lr="auto", layer_decay=0.5)
    assert str(error.value) == "Module: A layer decay multiplies the lr, and that of 'cls_token' is 'auto'"
    frozen = transformer()
    frozen.requires_grad_(False).get_submodule("head").requires_grad_(True)
    only_head = tp.groups(frozen, tp.rule("head.**", lr=1.0), layer_decay=0.5)
    assert [(group["lr"], group["param_names"]) for group in only_head] == [(1.0, ["head.weight", "head.bias"])]
    assert only_head.explain("cls_token").depth == 0
    for wrong in (0, -0.5, 1.5, True, "0.5", float("nan")):
        with pytest.raises(OptionError, match="must be a factor above 0 and up to 1"):
            tp.groups(transformer(), lr=1.0, layer_decay=wrong)  # type: ignore[arg-type]  # some of them are wrong
    with pytest.raises(OptionError) as error:
        tp.groups(transformer(), lr=1.0, depth="blocks.{}.**")
    assert str(error.value) == ("`depth` needs a `layer_decay`. Pass layer_decay=0.75 too.")


# --- the modules ------------------------------------------------------------------------------


def test_embeddings_blocks_and_head() -> None:
    assert first_depths(transformer()) == {
        "cls_token": 0,
        "embed.weight": 0,
        "blocks.0": 1,
        "blocks.1": 2,
        "blocks.2": 3,
        "norm.weight": 4,
        "norm.bias": 4,
        "head.weight": 4,
        "head.bias": 4,
    }


def test_wrappers_change_nothing() -> None:
    model = transformer()
    assert depth_of(nn.DataParallel(model)) == depth_of(model)


def test_the_stages_of_a_convolutional_network() -> None:
    model = module(
        conv1=nn.Conv2d(1, 1, 1),
        layer1=nn.Sequential(Mixer(), Mixer()),
        layer2=nn.Sequential(Mixer(), Mixer(), Mixer()),
        fc=nn.Linear(1, 1),
    )
    assert list(first_depths(model).values()) == [0, 0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_stages_of_blocks_and_what_leads_over_to_the_next(kind: Callable[[list[nn.Module]], nn.Module]) -> None:
    stages = [
        module(
            **({"downsample": nn.Linear(2, 2)} if n else {}),
            blocks=kind([Deep() for _ in range(2)]),
        )
        for n in range(2)
    ]
    model = module(stem=nn.Linear(2, 2), stages=nn.ModuleList(stages), head=nn.Linear(2, 2))
    found = first_depths(model, components=4)
    assert found["stem.weight"] == 0
    assert [found[f"stages.{s}.blocks.{b}"] for s in range(2) for b in range(2)] == [1, 2, 3, 4]
    assert found["stages.1.downsample.weight"] == 3
    assert found["head.weight"] == 5
    assert depth_of(model, "stages.{}.blocks.{}.**") == depth_of(model)


def test_a_sequence_of_sequences_is_one_of_stages() -> None:
    model = module(
        stem=nn.Conv2d(1, 1, 1),
        blocks=nn.Sequential(nn.Sequential(Mixer()), nn.Sequential(Mixer(), Mixer()), nn.Sequential(Deep(), Deep())),
        head=nn.Linear(1, 1),
    )
    found = first_depths(model, components=3)
    assert [at for name, at in found.items() if name.startswith("blocks")] == [1, 2, 3, 4, 5]
    assert found["head.weight"] == 6


class Gated(nn.Module):
    """A small block: nothing in it has layers inside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)


class Stage(nn.Module):
    def __init__(self, *blocks: nn.Module, kind: Callable[..., nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        self.downsample = nn.Linear(2, 2)
        self.blocks = kind(*blocks) if kind is nn.Sequential else kind(blocks)


class ConvNorm(nn.Module):
    """A single layer with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)


def number_of_blocks(*members: nn.Module) -> int:
    return len(blocks_of(nn.ModuleList(members)))


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("other", [Mixer, Gated, Deep])
def test_a_stage_may_have_blocks_of_several_classes(kind: Any, other: Callable[[], nn.Module]) -> None:
    class Larger(Deep):
        pass

    stages = [Stage(*(Deep() for _ in range(3)), kind=kind), Stage(*(Larger() for _ in range(8)), other(), kind=kind)]
    assert number_of_blocks(*stages) == 12
    found = first_depths(nn.ModuleList(stages), components=3)
    assert [at for name, at in found.items() if ".blocks" not in name] == [0, 0, 4, 4]
    assert [found[f"0.blocks.{n}"] for n in range(3)] == [1, 2, 3]
    assert [found[f"1.blocks.{n}"] for n in range(9)] == list(range(4, 13))


def test_a_sequence_that_begins_with_another_block_or_layer_is_a_stage() -> None:
    stages = [nn.Sequential(first, *(Mixer() for _ in range(count))) for first, count in ((Deep(), 2), (Deep(), 1))]
    assert number_of_blocks(*stages) == 5
    stages = [nn.Sequential(nn.Linear(2, 2), Deep(), Deep()), nn.Sequential(nn.Linear(2, 2), Mixer())]
    found = first_depths(nn.ModuleList(stages))
    assert list(found.values()) == [0, 1, 2, 3, 3]


def test_a_stage_of_one_block_is_known_by_the_others_of_its_class() -> None:
    assert number_of_blocks(Stage(Deep()), Stage(Deep(), Deep()), Stage(Deep(), Mixer())) == 5
    assert number_of_blocks(Stage(Deep()), Stage(Deep())) == 2


def test_small_blocks_that_are_repeated_as_they_are_make_a_stage() -> None:
    assert number_of_blocks(*(Stage(Gated(), Gated(), Gated(), kind=nn.Sequential) for _ in range(2))) == 6
    # A list of them may be one of experts, and two of different sizes are the two layers of one block.
    assert number_of_blocks(*(Stage(Gated(), Gated(), Gated()) for _ in range(2))) == 2
    assert number_of_blocks(*(Stage(Gated(4), Gated(8), kind=nn.Sequential) for _ in range(2))) == 2


def test_layers_with_their_norms_make_no_stage() -> None:
    assert number_of_blocks(*(Stage(*(ConvNorm(3) for _ in range(3)), kind=nn.Sequential) for _ in range(2))) == 2


def test_lists_of_lists_of_blocks_are_stages_and_pairs_of_layers_are_blocks() -> None:
    assert number_of_blocks(*(nn.ModuleList(Gated() for _ in range(n)) for n in (1, 2, 3))) == 6
    # As many transformers are written: [attention, feed-forward] in each layer.
    assert number_of_blocks(*(nn.ModuleList([Gated(4), Gated(8)]) for _ in range(3))) == 3


def test_a_stage_has_the_larger_of_its_lists() -> None:
    def stage() -> nn.Module:
        return module(
            downsample=nn.Sequential(Gated(2), Gated(2), Gated(2)), blocks=nn.Sequential(Gated(16), Gated(16))
        )

    blocks: list[Any] = blocks_of(nn.ModuleList([stage(), stage()]))
    assert [block.norm.normalized_shape for block in blocks] == [(16,)] * 4


def test_stages_in_stages_in_stages() -> None:
    inner: nn.Module = nn.Sequential(Deep(), Deep())
    for _ in range(1200):
        inner = nn.Sequential(Deep(), Deep(), inner)
    assert number_of_blocks(nn.Sequential(Deep(), Deep()), inner) == 2404


def test_experts_and_heads_are_no_depth() -> None:
    def layer() -> nn.Module:
        return module(
            router=nn.Linear(2, 8),
            experts=nn.ModuleList(Mixer() for _ in range(8)),
            heads=nn.ModuleList(nn.Linear(2, 2) for _ in range(4)),
            mlp=module(experts=nn.ModuleList(Deep() for _ in range(4))),
        )

    assert first_depths(module(layers=nn.ModuleList(layer() for _ in range(3)))) == {
        "layers.0": 1,
        "layers.1": 2,
        "layers.2": 3,
    }


def test_an_encoder_and_a_decoder_follow_one_another() -> None:
    model = module(
        shared=nn.Embedding(3, 2),
        encoder=module(block=nn.ModuleList(Deep() for _ in range(2)), norm=nn.LayerNorm(2)),
        decoder=module(block=nn.ModuleList(Mixer() for _ in range(2)), norm=nn.LayerNorm(2)),
    )
    found = first_depths(model, components=3)
    assert [found[f"encoder.block.{n}"] for n in range(2)] == [1, 2]
    assert [found[f"decoder.block.{n}"] for n in range(2)] == [3, 4]
    assert found["encoder.norm.weight"] == 3  # it stands between two blocks
    assert found["decoder.norm.weight"] == 5


def test_a_stem_in_two_steps_is_no_part_of_the_depth() -> None:
    model = module(
        stem=nn.Sequential(Mixer(), Mixer()),
        blocks=nn.ModuleList(Deep() for _ in range(5)),
        head=nn.Linear(2, 2),
    )
    found = first_depths(model)
    assert found["stem.0"] == found["stem.1"] == 0
    assert found["blocks.4"] == 5


def test_a_plain_sequence_of_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert first_depths(model, components=1) == {"0": 1, "2": 2, "4": 3}


def test_a_block_that_is_used_twice_counts_where_it_is_first() -> None:
    shared = Deep()
    model = module(embed=nn.Embedding(2, 2), blocks=nn.ModuleList([shared, Deep(), shared]), head=nn.Linear(2, 2))
    assert list(first_depths(model).values()) == [0, 1, 2, 3, 3]
    tied = transformer()
    tied.get_submodule("head").weight = tied.get_submodule("embed").weight
    assert depth_of(tied)["embed.weight"] == 0


def test_torchs_own_transformer() -> None:
    model = nn.Transformer(4, 2, 2, 2, 4, batch_first=True)
    blocks = blocks_of(model)
    assert len(blocks) == 4
    assert {type(block).__name__ for block in blocks} == {"TransformerEncoderLayer", "TransformerDecoderLayer"}


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(OptionError) as error:
        tp.groups(module(a=nn.Linear(1, 1), b=nn.Linear(1, 1)), lr=1.0, layer_decay=0.5)
    assert str(error.value) == (
        "Module: No stack of blocks was found, so a layer decay has no depth. "
        "A stack is an nn.ModuleList or nn.Sequential with at least two modules of one class. "
        "Pass a pattern of the blocks' names, as in depth='encoder.layer.{}.**', or a function."
    )
    with pytest.raises(OptionError) as error:
        tp.groups(dict(nn.Linear(1, 1).named_parameters()), lr=1.0, layer_decay=0.5)
    assert "A layer decay needs the modules of a model to find the depth, and this has none" in str(error.value)


def test_a_deep_network_is_no_deep_recursion() -> None:
    model: nn.Module = transformer()
    for _ in range(3000):
        model = module(a=model)
    assert len(blocks_of(model)) == 3


# --- patterns and functions -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "groups"),
    [
        ("**.layer.{}.**", "encoder.layer.11.norm.weight", ("11",)),
        ("layers.{}.blocks.{}.**", "layers.1.blocks.20.w", ("1", "20")),
        ("s{}.b{}.**", "s2.b10.conv.weight", ("2", "10")),
        ("**.h{}_*.w", "x.h3_a.w", ("3",)),
        ("**.{a,b}.{}.w", "x.b.7.w", ("7",)),
        ("layers.{}", "layers.3", ("3",)),
        ("layers.{}.**", "layers.3", ("3",)),
        ("**.layer.{}.**", "layer.x.layer.2.w", ("2",)),
        ("layers.{}.**", "layers.x.w", None),
        ("layers.{}.**", "my.layers.1.w", None),
        ("layers.{}.w", "layers.1.bw", None),
    ],
)
def test_a_pattern_finds_its_numbers(text: str, name: str, groups: tuple[str, ...] | None) -> None:
    found = number_pattern(text)(name)
    assert (None if found is None else found.groups()) == groups


def test_numbers_of_a_pattern_are_ranked() -> None:
    model = module(layers=nn.ModuleDict({"10": Mixer(), "2": Mixer(), "30": Mixer()}), head=nn.Linear(1, 1))
    assert list(first_depths(model, "layers.{}.**").values()) == [2, 1, 3, 4, 4]


def test_a_depth_that_is_a_function() -> None:
    model = transformer()
    found = depth_of(model, lambda info: 7 if info.ndim == 2 else 2)
    assert found["embed.weight"] == 7
    assert found["norm.bias"] == 2
    groups = tp.groups(model, lr=1.0, layer_decay=0.5, depth=lambda info: 7 if info.ndim == 2 else 2)
    assert {group["lr"] for group in groups} == {1.0, 0.5**5}
    for wrong in (-1, 1.5, None, True):
        with pytest.raises(OptionError) as error:
            depth_of(model, lambda info, wrong=wrong: wrong)
        assert str(error.value) == (f"The depth of 'cls_token' is {wrong!r}, not a whole number of at least 0")


def test_a_depth_that_is_wrong() -> None:
    model = transformer()
    with pytest.raises(NoMatch) as error:
        depth_of(model, "layers.{}.**")
    assert str(error.value) == (
        "Module: The depth `layers.{}.**` matches nothing. The names are cls_token to head.bias. "
        "It must match whole names: end it with .** to match everything in a block."
    )
    with pytest.raises(SelectorError, match=r"has no \{\} for the number"):
        depth_of(model, "blocks.*.**")
    for text in ("blocks.{}.** | head.**", "blocks.{}.**[ndim=2]", "/blocks.{}.w/"):
        with pytest.raises(SelectorError, match="is not a plain glob"):
            depth_of(model, text)
    with pytest.raises(OptionError, match="or a function, not a int"):
        depth_of(model, 3)


def test_depth_is_linear_in_the_parameters() -> None:
    class Counting(nn.Module):
        looks = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 1)

        def __getattribute__(self, name: str) -> Any:
            if name in ("_modules", "_parameters"):
                Counting.looks += 1
            return super().__getattribute__(name)

    looks = []
    for count in (10, 400):
        model = nn.Sequential(*[Counting() for _ in range(count)])
        Counting.looks = 0
        tp.groups(model, lr=1.0, layer_decay=0.99)
        looks.append(Counting.looks / count)
    assert looks[1] <= looks[0] + 1
