"""Natural order of names, and the stored order in files and plans."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import torchparams as tp
from torchparams.errors import SelectorError
from torchparams.measure.listing import ls, tree_of
from torchparams.order import in_order, natural, natural_key

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [f"h.{i}.{name}" for i in range(12) for name in ("w", "b")]


def arrays(names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.full(2, i, np.float32) for i, name in enumerate(names)}


def test_numbers_count_by_their_value() -> None:
    assert natural(sorted(LAYERS)) == [f"h.{i}.{name}" for i in range(12) for name in ("b", "w")]
    assert natural(["layer10.w", "layer2.w", "layer1.w"]) == ["layer1.w", "layer2.w", "layer10.w"]
    assert natural(["a.2_10", "a.2_9", "a.1_20"]) == ["a.1_20", "a.2_9", "a.2_10"]
    assert sorted(["a10", "a9", "b", "a.10", "a.9"], key=natural_key) == ["a.9", "a.10", "a9", "a10", "b"]


def test_words_keep_the_order_in_which_they_first_occur() -> None:
    names = ["embed", "h.10.w", "h.2.w", "norm", "h.2.b", "h.10.b", "head"]
    assert natural(names) == ["embed", "h.2.w", "h.2.b", "h.10.w", "h.10.b", "norm", "head"]


COMPONENTS = st.sampled_from(["", "0", "1", "2", "10", "02", "a", "b2", "b10", "#", "²", "w"])


@given(st.lists(st.lists(COMPONENTS, min_size=1, max_size=5).map(".".join), unique=True))
def test_it_is_a_permutation_and_numbers_go_up(names: list[str]) -> None:
    ordered = natural(names)
    assert sorted(ordered) == sorted(names)
    numbers: dict[str, list[list[int]]] = {}
    for name in ordered:
        numbers.setdefault(re.sub("[0-9]+", "\0", name), []).append(list(map(int, re.findall("[0-9]+", name))))
    assert all(each == sorted(each) for each in numbers.values())


def test_in_order_leaves_out_what_is_not_there() -> None:
    assert list(in_order({"b": 1, "a": 2}, "cab")) == ["a", "b"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = str(tmp_path / "model.safetensors")
    save_file(arrays(LAYERS), path)
    return path


WANTED = [f"h.{i}.{name}" for i in range(12) for name in ("b", "w")]


def test_every_look_at_a_file(file: str, tmp_path: Path) -> None:
    params = tp.of(file)
    assert params.names == list(params) == list(params.keys()) == list(params.infos) == WANTED
    assert [name for name, _ in params.items()] == params.reading().names == WANTED
    assert [int(value[0]) for value in params.values()] == [LAYERS.index(name) for name in WANTED]
    assert [name for name, _ in params.named_parameters()] == WANTED
    assert params.select("h.{9,10}.*").names == ["h.9.b", "h.9.w", "h.10.b", "h.10.w"]
    assert [row.name for row in tp.stats(file)] == WANTED
    assert [row.name for row in tp.stats(file, by="layer")] == [f"h.{i}" for i in range(12)]
    assert list(tp.digest(file).tensors) == WANTED
    listed = [line.split()[0] for line in str(ls(file)).splitlines()[2:-1]]
    assert listed == WANTED


def test_the_order_of_the_file_can_be_asked_for(file: str) -> None:
    own = [entry["name"] for entry in ls(file, sort="stored").to_json()["parameters"]]
    assert own == list(tp.of(file).source.infos()) == sorted(LAYERS)
    assert [entry["name"] for entry in ls(file, sort="-stored").to_json()["parameters"]] == own[::-1]
    by_name = [entry["name"] for entry in ls(file, sort="name").to_json()["parameters"]]
    assert by_name == WANTED


def test_a_model_and_a_mapping_keep_theirs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert tp.of(model).names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    shuffled = ["h.10", "h.9"]
    assert tp.of(arrays(shuffled)).names == shuffled
    state = tp.of({name: torch.zeros(1) for name in shuffled})
    assert [entry["name"] for entry in ls(state, sort="stored").to_json()["parameters"]] == shuffled


def test_a_state_dict_in_a_file_has_the_order_of_the_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(12)))
    path = str(tmp_path / "model.pt")
    torch.save(model.state_dict(), path)
    assert tp.of(path).names == list(model.state_dict())


def test_plans_keep_the_order_of_the_file(file: str, tmp_path: Path) -> None:
    plan = tp.convert(file, str(tmp_path / "copy.pt"))
    assert [output.name for output in plan.outputs] == sorted(LAYERS)
    plan.run()
    assert list(torch.load(tmp_path / "copy.pt")) == sorted(LAYERS)
    merged = tp.merge([file, file], str(tmp_path / "merged.safetensors"))
    assert [output.name for output in merged.outputs] == sorted(LAYERS)
    assert tp.of(tp.convert(file)).names == WANTED


def test_digests_do_not_hang_on_the_order(file: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other.pt")
    torch.save({name: torch.from_numpy(value) for name, value in arrays(LAYERS).items()}, other)
    assert tp.digest(file).digest == tp.digest(other).digest == tp.digest(arrays(LAYERS)).digest


def test_a_tree_folds_over_gaps_and_in_any_order() -> None:
    names = [f"h.{i}.w" for i in (0, 10, 2, 3, 4, 1)]
    tree = tree_of(tp.of(arrays(names)).infos.values())
    assert [child.name for child in tree.children] == ["h.{0..4,10}.w"]
    assert tree.children[0].tensors == 6
    assert tp.of(arrays(names)).select("h.{0..4,10}.w").names == names


def test_layers_that_differ_stay_apart() -> None:
    made = {f"h.{i}.w": np.zeros(3 if i == 2 else 2, np.float32) for i in range(5)}
    made["h.05.w"] = np.zeros(2, np.float32)  # a glob of numbers does not hit it
    tree = tree_of(tp.of(made).infos.values())
    assert [child.name for child in tree.children[0].children] == ["{0..1,3..4}.w", "2.w", "05.w"]


def test_sizes_sort_by_size(file: str) -> None:
    made = {"a": np.zeros(3, np.float32), "b": np.zeros(5, np.float32), "c": np.zeros(1, np.float32)}
    assert [each["name"] for each in ls(made, sort="-size").to_json()["parameters"]] == ["b", "a", "c"]
    with pytest.raises(SelectorError, match="Columns are name, numel, nbytes, size, dtype, shape, module, stored"):
        ls(made, sort="length").to_json()
