"""Jobs and blocks."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchparams.engines import Job, jobs_of, sketches
from torchparams.errors import MismatchError, NotReadable, UnknownName
from torchparams.io.reader import gather
from torchparams.sources.opening import open_source
from torchparams.testing import MemorySource


def test_engines_are_there_before_numpy_is_needed() -> None:
    code = "import sys, torchparams.engines; print([m for m in ('numpy', 'torch', 'rich') if m in sys.modules])"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.stdout.strip() == b"[]"


def test_a_job_is_known_by_its_first_tensor() -> None:
    a, b = MemorySource({"x": np.zeros((2, 3))}), MemorySource({"y": np.zeros(6, np.int8)})
    job = Job.of((a, "x"), (b, "y"))
    assert (job.key, job.numel, job.nbytes, job.dtype) == ("x", 6, 54, "float64")
    assert Job.of((a, "x"), key="pair").key == "pair"


def test_tensors_in_step_have_one_count_of_elements() -> None:
    source = MemorySource({"x": np.zeros((2, 3)), "y": np.zeros(5)}, label="model.safetensors")
    with pytest.raises(MismatchError) as caught:
        Job.of((source, "x"), (source, "y"))
    assert str(caught.value) == (
        "Tensors read in step must have equally many elements: "
        "x of model.safetensors has 6, y of model.safetensors has 5"
    )


def test_names_that_are_not_there() -> None:
    source = MemorySource({"weight": np.zeros(2)})
    for make in (lambda: Job.of((source, "wieght")), lambda: jobs_of(source, ["weight", "wieght"])):
        with pytest.raises(UnknownName, match=r"No parameter is named 'wieght'. Did you mean 'weight'?"):
            make()
    shared = np.zeros(2)
    assert [job.key for job in jobs_of(MemorySource({"a": shared, "b": shared}), ["b"])] == ["a"]


def test_a_lazy_parameter_has_nothing_to_read() -> None:
    source = open_source(torch.nn.LazyLinear(3))
    with pytest.raises(NotReadable, match="'weight' is lazy: it has no shape or values yet"):
        jobs_of(source)


def test_sketches_of_a_live_model() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, 0.5)
    found = dict(sketches(open_source(model), ["weight"]))
    assert found["weight"].mean == 0.5 and found["weight"].constant and found["weight"].numel == 6


def test_what_is_no_number_is_refused_before_it_is_read() -> None:
    source = open_source({"w": torch.zeros(3, dtype=torch.bits8)})
    with pytest.raises(NotReadable, match="The bits of bits8 are not numbers"):
        list(sketches(source))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 1, 3), (2, 3, 4, 5), (1, 1), (6, 1)])
def test_any_range_of_any_layout_is_gathered(shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    for view in (array, array.T, array[::-1], np.moveaxis(array, 0, -1)):
        flat = np.ascontiguousarray(view).reshape(-1)
        for start in range(array.size + 1):
            for stop in range(start, array.size + 1):
                out = np.full(stop - start, -1)
                gather(view, out, start, stop)
                assert out.tolist() == flat[start:stop].tolist()
