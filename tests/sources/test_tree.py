from __future__ import annotations

from typing import Any

import pytest

from torchparams import limits
from torchparams.dtypes import DType
from torchparams.errors import LimitExceeded, SourceError, UnknownName
from torchparams.sources.torchfile._describe import describe
from torchparams.sources.torchfile._pickle_values import Blob, Global, OddKey, Reduced
from torchparams.sources.torchfile._refs import ArrayRef, NumpyType, StorageRef, TensorRef
from torchparams.sources.torchfile._tree import Contents

FLOAT = DType.of("float32")


def tensor(key: str = "0", offset: int = 0, shape: tuple[int, ...] = (2,)) -> TensorRef:
    return TensorRef(StorageRef(key, FLOAT, 100), FLOAT, offset, shape, (1,) * len(shape))


def instance(module: str, name: str, state: Any = None, args: tuple[Any, ...] = ()) -> Reduced:
    made = Reduced(Global(module, name), args)
    made.state = state
    return made


def names(root: Any, inner: str | None = None) -> dict[str, tuple[str, ...]]:
    """First names and their aliases."""
    listing = Contents(root, inner, "a.pt")
    return {entry.name: tuple(entry.aliases) for name, entry in listing.names.items() if name == entry.name}


def metadata(root: Any, inner: str | None = None) -> dict[str, Any]:
    return Contents(root, inner, "a.pt").metadata


# --- names -------------------------------------------------------------------------------------------


def test_a_flat_mapping_keeps_its_names() -> None:
    keys = ["a.b", "", ".", "a..b", "x y", "layers.0.weight"]
    assert list(names({key: tensor(str(i)) for i, key in enumerate(keys)})) == keys


def test_nested_names_are_joined_by_dots() -> None:
    root: dict[str, Any] = {
        "model": {"fc": {"w": tensor("0")}},
        "list": [tensor("1"), (tensor("2"), 5)],
        "": {"x": tensor("3")},
    }
    assert list(names(root)) == ["model.fc.w", "list.0", "list.1.0", ".x"]


def test_keys_that_are_no_text_are_spelled() -> None:
    keys = [0, -1, True, None, 1.5, b"ab", OddKey((1, 2))]
    spelled = ["0", "-1", "True", "None", "1.5", "ab", "a tuple of 2 items"]
    assert list(names({key: tensor(str(i)) for i, key in enumerate(keys)})) == spelled


def test_a_single_tensor_is_named_tensor() -> None:
    assert names(tensor()) == {"tensor": ()}
    assert names({"a": {"b": tensor()}}, "a.b") == {"tensor": ()}


def test_a_list_of_tensors_is_numbered() -> None:
    assert names([tensor("0"), tensor("1")]) == {"0": (), "1": ()}


@pytest.mark.parametrize("root", [{}, [], None, 5, "text"])
def test_nothing_is_a_table_of_nothing(root: object) -> None:
    assert names(root) == {}


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(SourceError) as caught:
        names({"a.b": tensor("0"), "a": {"b": tensor("1")}})
    assert str(caught.value) == (
        "a.pt: Two tensors have the name 'a.b' when nested names are joined with dots. "
        "List a part of the file, as in 'a.pt#a'."
    )
    assert names({"a.b": tensor("0"), "a": {"b": tensor("1")}}, "a") == {"b": ()}
    one = tensor("0")
    assert names({"a.b": one, "a": {"b": one}}) == {"a.b": ()}


def test_tied_tensors_are_one_entry() -> None:
    one = tensor("0")
    root = {"a": one, "b": one, "same": tensor("0"), "other": tensor("0", 1), "wider": tensor("0", 0, (2, 1))}
    assert names(root) == {"a": ("b", "same"), "other": (), "wider": ()}
    assert names([tensor("0", i % 3) for i in range(9)]) == {
        "0": ("3", "6"),
        "1": ("4", "7"),
        "2": ("5", "8"),
    }


def test_a_tied_parameter_is_a_parameter() -> None:
    parameter = tensor("0").replaced(is_parameter=True, requires_grad=True)
    listing = Contents({"plain": tensor("0"), "parameter": parameter}, None, "a.pt")
    entry = listing.names["plain"]
    assert (entry.kind, entry.tensor.requires_grad, entry.aliases) == ("parameter", True, ["parameter"])


def test_shared_parts_are_listed_once_for_each_path() -> None:
    shared = {"w": tensor()}
    assert names({"a": shared, "b": [shared]}) == {"a.w": ("b.0.w",)}


# --- objects -----------------------------------------------------------------------------------------


def module(parameters: Any = None, buffers: Any = None, modules: Any = None, **others: Any) -> Reduced:
    state = {"_parameters": parameters or {}, "_buffers": buffers or {}, "_modules": modules or {}, **others}
    return instance("lib", "Net", state)


def test_a_module_lists_as_its_state_dict() -> None:
    inside = module({"w": tensor("1"), "bias": None}, {"running": tensor("2"), "tmp": tensor("3")})
    inside.state["_non_persistent_buffers_set"] = ["tmp", 5]
    root = module({"scale": tensor("0")}, None, {"fc": inside, "gone": None}, mask=tensor("4"), n=3)
    listing = Contents(root, None, "a.pt")
    assert {name: (entry.kind, entry.module, entry.persistent) for name, entry in listing.names.items()} == {
        "scale": ("parameter", "lib.Net", True),
        "fc.w": ("parameter", "lib.Net", True),
        "fc.running": ("buffer", "lib.Net", True),
        "fc.tmp": ("buffer", "lib.Net", False),
    }
    assert listing.metadata == {
        "(top)": "a module of class lib.Net, not built",
        "mask": "in no state_dict, an attribute of lib.Net: a tensor, float32 2",
    }


def test_a_module_in_a_checkpoint() -> None:
    assert list(names({"model": module({"w": tensor()}), "epoch": 1})) == ["model.w"]
    assert metadata({"model": module({"w": tensor()}), "epoch": 1}) == {"epoch": 1}


def test_objects_list_their_attributes() -> None:
    root = instance("lib", "State", {"model": {"w": tensor()}, "step": 3})
    assert list(names(root)) == ["model.w"]
    assert metadata(root) == {"(top)": "an object of lib.State, not built", "step": 3}
    slotted = instance("lib", "State", ({"a": tensor("0")}, {"b": tensor("1")}))
    assert list(names({"x": slotted})) == ["x.a", "x.b"]
    assert list(names(instance("lib", "State", (None, {"b": tensor("1")})))) == ["b"]


def test_objects_list_whatever_they_were_given() -> None:
    made = instance("os", "system", [tensor("0")], (tensor("1"), {"k": tensor("2")}))
    made.items = [tensor("3")]
    made.pairs = {"x": tensor("4")}
    assert list(names(made)) == ["state.0", "x", "0", "args.0", "args.1.k"]
    nested = Reduced(Reduced(Global("a", "b"), (tensor("0"),)), ())
    assert list(names({"x": nested})) == ["x.func.args.0"]
    assert metadata({"x": nested}) == {
        "x": "an object of something that was to be called, not built",
        "x.func": "an object of a.b, not built",
    }


def test_a_storage_or_an_array_is_a_tensor() -> None:
    storage = StorageRef("0", FLOAT, 3)
    array, none = ArrayRef(), ArrayRef()
    array.tensor = tensor("1")
    listing = Contents({"s": storage, "again": storage, "a": array, "none": none}, None, "a.pt")
    assert {name: entry.tensor.shape for name, entry in listing.names.items()} == {"s": (3,), "again": (3,), "a": (2,)}
    assert listing.names["s"].aliases == ["again"]
    assert listing.metadata == {"none": "a numpy array that is not numeric"}


# --- metadata ----------------------------------------------------------------------------------------


def test_plain_values_are_kept() -> None:
    root = {"w": tensor(), "epoch": 3, "lr": 0.5, "name": "x", "none": None, "config": {"a": [1, (2, 3)], 4: True}}
    assert metadata(root) == {
        "epoch": 3,
        "lr": 0.5,
        "name": "x",
        "none": None,
        "config": {"a": [1, [2, 3]], "4": True},
    }


def test_other_values_are_described() -> None:
    root: dict[str, Any] = {
        "bytes": b"abc",
        "long": Blob(None, 0, 5000),
        "complex": 1j,
        "huge": 1 << 5000,
        "dtype": Global("torch", "bfloat16"),
        "call": instance("os", "system", None, ("rm -rf /",)),
        "args": instance("argparse", "Namespace", {"lr": 0.1, "layers": [1, 2]}),
        "type": NumpyType(None, "U3"),
        "large": list(range(100_000)),
        "w": tensor(),
    }
    assert metadata(root) == {
        "bytes": "3 bytes",
        "long": "5,000 bytes",
        "complex": "1j",
        "huge": "an integer of 5,001 bits",
        "dtype": "torch.bfloat16",
        "call": "os.system('rm -rf /')",
        "args": "argparse.Namespace(lr=0.1, layers=a list of 2 items)",
        "type": "numpy.dtype('U3')",
        "large": "a list of 100,000 items",
    }


def test_what_has_no_tensors_is_metadata() -> None:
    assert metadata({"a": 1, "b": [2]}) == {"a": 1, "b": [2]}
    assert metadata([1, 2]) == {"(top)": [1, 2]}
    assert metadata(instance("os", "system", None, ("ls",))) == {"(top)": "os.system('ls')"}


def test_metadata_of_one_name_are_both_kept() -> None:
    assert metadata({"a.b": 1, "a": {"b": 2, "w": tensor()}}) == {"a.b": 1, "a.b (2)": 2}


def test_descriptions_are_short_whatever_they_describe() -> None:
    long = "x" * 1_000_000
    deep: Any = instance(long, long)
    for _ in range(1000):
        deep = instance(long, long, {long: deep}, (deep, long, [long]))
    assert len(describe(deep)) <= 200
    assert len(describe(OddKey(deep))) <= 200
    assert len(describe(long)) <= 100
    wide = TensorRef(None, FLOAT, 0, tuple(range(64)), tuple(range(64)))
    assert len(describe(wide)) < 120


# --- #inner ------------------------------------------------------------------------------------------


def test_inner_paths() -> None:
    root: dict[str, Any] = {
        "state.model": {"a.b": {"c": tensor("0")}},
        "state": {"model": {"x": tensor("1")}, "ema": [module({"w": tensor("2")})]},
    }
    assert list(names(root, "state.model")) == ["a.b.c"]
    assert list(names(root, "state.model.a.b")) == ["c"]
    assert list(names(root, "state.model.x")) == ["tensor"]  # through the other key, as the longest has no x
    assert list(names(root, "state.ema.0")) == ["w"]
    assert list(names(root, "state")) == ["model.x", "ema.0.w"]


def test_an_inner_that_is_not_there() -> None:
    root = {"model": {"w": tensor("0"), "b": tensor("1")}, "epoch": 3, "optimizer": {"lr": 0.1}, "x": tensor("2")}
    with pytest.raises(UnknownName) as caught:
        names(root, "modle")
    assert str(caught.value) == (
        "a.pt: There is no 'modle' in the file. There are model (2 tensors), epoch (3), optimizer (a dict of 1 item), "
        "x (a tensor, float32 2). Did you mean '#model'?"
    )
    with pytest.raises(UnknownName) as caught:
        names(root, "model.q")
    assert str(caught.value).startswith(
        "a.pt: There is no 'q' in 'model'. There are w (a tensor, float32 2), b (a tensor, float32 2)"
    )
    with pytest.raises(UnknownName) as caught:
        names(root, "x.y")
    assert "There is no 'y' in 'x'. 'x' is a tensor, float32 2" in str(caught.value)


@pytest.mark.parametrize(
    ("root", "inner", "said"),
    [
        (
            {"a.w": tensor(), "a.b": tensor(), "c": tensor()},
            "a",
            "a.pt: There is no 'a' in the file. There are 2 names with this prefix, but no nested mapping. "
            "Leave #a out, and select by name: a.**.",
        ),
        (
            {"model": {"a.0.w": tensor()}},
            "model.a.0",
            "a.pt: There is no 'a.0' in 'model'. There is 1 name with this prefix, but no nested mapping. "
            "Use '#model', and select by name: a.0.**.",
        ),
    ],
)
def test_a_part_of_a_flat_mapping_is_selected(root: Any, inner: str, said: str) -> None:
    with pytest.raises(UnknownName) as caught:
        names(root, inner)
    assert str(caught.value) == said
    many: dict[str, Any] = {f"part{i}": {} for i in range(100)}
    with pytest.raises(UnknownName, match="and 92 more"):
        names(many, "q")


def test_an_inner_without_tensors() -> None:
    with pytest.raises(SourceError) as caught:
        names({"epoch": 3, "w": tensor()}, "epoch")
    assert str(caught.value) == (
        "a.pt: 'epoch' contains no tensors: it is 3. Leave out the part after # to list the whole file."
    )


# --- what holds itself, or one thing many times ---------------------------------------------------------


def test_a_mapping_that_holds_itself() -> None:
    root: dict[str, Any] = {"w": tensor()}
    root["self"] = root
    root["list"] = [root]
    assert names(root) == {"w": ()}
    assert metadata(root) == {"self": "refers back to the top", "list.0": "refers back to the top"}
    inner: dict[str, Any] = {"w": tensor()}
    inner["up"] = {"again": inner}
    assert metadata({"a": inner}) == {"a.up.again": "refers back to a"}
    loop: list[Any] = []
    loop.append(loop)
    assert names(loop) == {}
    with pytest.raises(UnknownName):
        names(root, "self.list.0.self.self.nothing")
    assert names(root, "self.list.0.self") == {"w": ()}


def test_doubling_without_tensors_costs_nothing() -> None:
    part: Any = [1]
    for _ in range(200):
        part = [part, part]
    assert names({"w": tensor(), "laughs": part}) == {"w": ()}
    assert names({"laughs": part}) == {}
    with pytest.raises(UnknownName, match="laughs"):
        names({"laughs": part}, "x")


def test_doubling_with_a_tensor_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    part: Any = [tensor()]
    for _ in range(200):
        part = [part, part]
    monkeypatch.setattr(limits, "ALIASES", 1000)
    with pytest.raises(LimitExceeded) as caught:
        names(part)
    assert str(caught.value).startswith("a.pt: Shared parts give its tensors too many or too long names. ")
    assert str(caught.value).endswith("List a part of it with #path, or raise torchparams.limits.ALIASES.")
    few: Any = [tensor()]
    for _ in range(8):
        few = [few, few]
    assert len(next(iter(names(few).values()))) == 255


def test_the_length_of_names_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NAME_CHARACTERS", 10_000)
    with pytest.raises(LimitExceeded, match=r"raise torchparams\.limits\.NAME_CHARACTERS"):
        names({"x" * 500: {str(i): tensor(str(i)) for i in range(100)}})


def test_depth_is_limited_where_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NESTING", 50)

    def nested(depth: int, bottom: Any) -> Any:
        for _ in range(depth):
            bottom = [bottom]
        return bottom

    assert names(nested(50, tensor())) == {".".join(["0"] * 50): ()}
    with pytest.raises(LimitExceeded) as caught:
        names(nested(51, tensor()))
    assert str(caught.value) == (
        "a.pt: Tensors are nested deeper than 50 levels. If you trust the file, raise torchparams.limits.NESTING."
    )
    assert names({"w": tensor(), "deep": nested(100_000, 1)}) == {"w": ()}


def test_a_module_shared_by_many_with_a_long_list_is_limited() -> None:
    shared = module({"w": tensor()}, {"b": tensor("1")}, _non_persistent_buffers_set=["x"] * 200_000)
    with pytest.raises(LimitExceeded):
        names([shared] * 10)
