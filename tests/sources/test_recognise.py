"""Files that are not checkpoints get a one-line error with the next step."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest
import torch

import torchparams as tp
from command import command
from torch_files import saved, written, zipped
from torchparams.testing import safetensors_bytes, sample

if TYPE_CHECKING:
    from pathlib import Path

Captured = pytest.CaptureFixture[str]

WEIGHTS = {"w": sample("float32", (2, 3))}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5368709120\n"
ONNX = b"\x08\x07\x12\x07pytorch\x1a\x052.4.0:\xee\x01\x0a\x10"
WHOLE = safetensors_bytes(WEIGHTS)


def tar(name: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return made.getvalue()


FILES = {
    "lfs": (LFS, "A Git LFS pointer to 5,368,709,120 bytes, not the file itself. Run git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s1--0.bin\n", "A git-annex pointer, not the file itself. Run git annex get"),
    "html": (
        b"\n<!DOCTYPE html>\n<html><head><title>Sign in\n to X</title></head>" + b"<p>" * 400,
        "An HTML page (Sign in to X), not a checkpoint. The URL leads to a web page, or needs a login; download",
    ),
    "script": (b"<script>{}</script>" + b" " * 900, "An HTML page, not a checkpoint"),
    "message": (b"Entry not found", "A text, not a checkpoint: 'Entry not found'. Download or copy the file again"),
    "gguf": (
        b"GGUF\3\0\0\0" + bytes(600),
        "A GGUF file of llama.cpp, which is not supported. Load it with transformers",
    ),
    "onnx": (
        ONNX + bytes(600),
        "An ONNX model, which is not supported. Load it with the onnx package: torchparams.of({",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "An HDF5 file, which is not supported. Read it with h5py"),
    "npy": (b"\x93NUMPY\1\0" + bytes(600), "A numpy array, which is not supported. Pass it under a name"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "Compressed by gzip, which is not supported. Unpack it first"),
    "zeros": (bytes(4096), "The file starts with 512 zero bytes, like an unfinished download. Download or copy"),
    "cut header": (WHOLE[:20], "The file ends at byte 20, within the header"),
    "cut tensors": (WHOLE[:-5], "Download or copy the file again."),
    "cut zip": (saved({"w": torch.ones(99)})[:700], "The zip is cut off"),
    "cut legacy": (saved({"w": torch.ones(99)}, legacy=True)[:-9], "Download or copy the file again."),
    "empty": (b"", "The file is empty. Download or copy the file again."),
    "tar of torch 0.1": (
        tar("storages"),
        "A tar archive of torch 0.1, which is not supported. Load it with torch.load",
    ),
    "caffe2 archive": (
        zipped({"net/version": b"1", "net/model.json": b"{}", "net/tensors/0": b"1234"}),
        "it is a TorchScript archive of torch before 1.4, in caffe2's layout. It holds net/version, net/model.json",
    ),
    "caffe2 network": (zipped({"init_net.pb": b"1", "predict_net.pb": b"2"}), "it is a network of caffe2"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".onnx", ""])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_named_with_the_next_step(tmp_path: Path, capsys: Captured, kind: str, suffix: str) -> None:
    contents, message = FILES[kind]
    path = written(tmp_path, contents, f"model{suffix}")
    ran = command(capsys, "ls", path)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.startswith(f"torchparams: {path}: ")
    assert ran.err.count("\n") == 1


def test_a_file_that_only_begins_like_another_is_read(tmp_path: Path) -> None:
    assert tp.of(written(tmp_path, WHOLE, "model.onnx")).names == ["w"]
    assert tp.of(written(tmp_path, saved({"w": torch.ones(2)}), "model.gguf")).names == ["w"]


def folder_of(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "run"
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = WEIGHTS if "model" in name else {"other": WEIGHTS["w"]}
        path.write_bytes(safetensors_bytes(weights) if name.endswith(".safetensors") else saved({"state": {}, "n": 1}))
    return folder


DIRECTORIES = {
    "dcp without its metadata": (("__0_0.distcp",), "A distributed checkpoint (DCP) without .metadata"),
    "zero": (
        ("latest", "zero_to_fp32.py", "training_args.bin", "global_step5/mp_rank_00_model_states.pt"),
        "which is not in the directory. There are global_step5. Choose one: ",
    ),
    "within zero": (
        ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt: Its optimizer_state_dict is None, not a dict",
    ),
    "steps": (("step-100.pt", "step-20.pt"), "in this directory: step-20.pt, step-100.pt. Choose one"),
    "a record": (
        ("record.json", "parameters-000000.parquet"),
        "The record of a training, not a checkpoint. torchparams history ",
    ),
    "several": (("a.pt", "b.pt", "c.pth"), "3 checkpoints are in this directory: a.pt, b.pt, c.pth. Choose one"),
    "runs": (
        ("config.json", "checkpoint-90/model.safetensors", "checkpoint-100/model.safetensors"),
        "no checkpoint in this directory. There are checkpoint-100/, checkpoint-90/, config.json. Did you mean",
    ),
}


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_a_directory_is_named_with_the_next_step(tmp_path: Path, capsys: Captured, kind: str) -> None:
    names, message = DIRECTORIES[kind]
    folder = folder_of(tmp_path, *names)
    ran = command(capsys, "ls", folder)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    if kind == "runs":
        assert ran.err.endswith(f"{folder}/checkpoint-100?\n")


def test_a_part_of_a_distributed_checkpoint(tmp_path: Path, capsys: Captured) -> None:
    folder = folder_of(tmp_path, ".metadata", "__0_0.distcp")
    ran = command(capsys, "ls", folder / "__0_0.distcp")
    assert ran.status == 2
    assert ran.err.endswith(
        f"__0_0.distcp: One part of a distributed checkpoint (DCP). Pass the directory: {folder}.\n"
    )


@pytest.mark.parametrize(
    "beside",
    [
        ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin", "scaler.pt"),
        ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin", "scaler.pt"),
        ("latest", "zero_to_fp32.py", "training_args.bin", "global_step5/mp_rank_00_model_states.pt"),
    ],
    ids=["trainer", "accelerate", "deepspeed"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_trainers_directory_is_its_model(tmp_path: Path, beside: tuple[str, ...], name: str) -> None:
    assert tp.of(folder_of(tmp_path, name, *beside)).names == ["w"]


def test_several_models_of_accelerate_are_not_chosen_from(tmp_path: Path, capsys: Captured) -> None:
    folder = folder_of(tmp_path, "model.safetensors", "model_1.safetensors", "optimizer.bin")
    assert "2 checkpoints are in this directory" in command(capsys, "ls", folder).err
