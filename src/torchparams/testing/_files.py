"""The part of the contract of sources that speaks of files: where the bytes lie, and that nothing ever changes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from torchparams.errors import SourceError, TorchParamsError
from torchparams.testing._inputs import few
from torchparams.testing._reference import (
    Array,
    assert_identical,
    element_bytes,
    sample,
    tensor_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.sources.base import Source


class FileTests:
    """What `SourceTests` says of files; of a source in memory most of it is true at once.

    Attributes:
        spans: Whether `span` knows the bytes of a contiguous tensor.
        located: Whether records know them too; a source that looks for them when values are wanted says no.
    """

    spans: bool = False
    located: bool = True

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        """A source of `tensors`, in their order."""
        raise NotImplementedError

    def test_spans(self, tmp_path: Path, dtype: str) -> None:
        """`span` is exactly the bytes of the elements, and they lie in a file that `files` names."""
        tensors = {"a": sample(dtype, (8,), 1), "b": sample(dtype, (4, 6), 2), "none": sample(dtype, (0, 3), 3)}
        source = self.make(tmp_path, tensors)
        for name, array in tensors.items():
            span = source.span(name)
            if self.spans:
                assert span is not None
            if span is None:
                continue
            assert span.file in source.files
            assert span.stop - span.start == source.infos()[name].nbytes
            with open(span.file, "rb") as file:
                file.seek(span.start)
                stored = file.read(span.stop - span.start)
            assert stored == element_bytes(array)
            location = source.infos()[name].location
            assert (location is not None) is self.located
            if location is None:
                continue
            assert location.file == span.file
            assert location.start <= span.start <= span.stop <= location.stop

    def test_locations(self, tmp_path: Path) -> None:
        """Every location lies within its file."""
        source = self.make(tmp_path, few())
        for info in source.infos().values():
            if info.location is not None:
                assert info.location.file in source.files
                assert 0 <= info.location.start <= info.location.stop <= os.path.getsize(info.location.file)

    def test_fingerprint(self, tmp_path: Path) -> None:
        """Writing to a file changes the fingerprint, and nothing else does."""
        source = self.make(tmp_path, few())
        before = source.fingerprint()
        assert before == source.fingerprint()
        assert [path for path, _, _ in before] == list(source.files)
        for path in source.files:
            before = source.fingerprint()
            with open(path, "ab") as file:
                file.write(b"\0")
            assert source.fingerprint() != before
            before = source.fingerprint()
            stat = os.stat(path)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
            assert source.fingerprint() != before

    def test_files_that_were_written_to_since_they_were_listed(self, tmp_path: Path) -> None:
        """Whoever reads bytes by `span` asks first whether they are still those that were listed."""
        source = self.make(tmp_path, few())
        source.check_unchanged()
        for path in source.files:
            if any(info.location is not None and info.location.file == path for info in source.infos().values()):
                stat = os.stat(path)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
                with pytest.raises(SourceError):
                    source.check_unchanged()
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        source.check_unchanged()

    def test_writing_to_values_changes_no_file(self, tmp_path: Path) -> None:
        """Values may be written to or refuse it: the file and the next reading stay as they were."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        if not source.files:
            return
        contents = [Path(path).read_bytes() for path in source.files]
        for name in source.infos():
            values = source.numpy(name)
            if values.flags.writeable and values.size:
                values[...] = values.dtype.type(1)
            tensor = source.tensor(name)
            if tensor.numel():
                tensor.zero_()
        assert [Path(path).read_bytes() for path in source.files] == contents
        for name, array in tensors.items():
            assert_identical(source.numpy(name), array, "reading again gives what the file holds")
            assert tensor_bytes(source.tensor(name)) == array.tobytes()

    def test_closing(self, tmp_path: Path) -> None:
        """Arrays outlive `close`; the source may be closed twice, and then reads again or says why not."""
        tensors = few()
        source = self.make(tmp_path, tensors)
        values = {name: source.numpy(name) for name in source.infos()}
        source.close()
        source.close()
        for name, array in values.items():
            assert_identical(array, tensors[name])
        assert set(source.infos()) == set(tensors)
        for name in tensors:
            try:
                again = source.numpy(name)
            except TorchParamsError:
                continue
            assert_identical(again, tensors[name])
