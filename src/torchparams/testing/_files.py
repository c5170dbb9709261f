"""Contract of sources for files: byte ranges are right, and files never change."""

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
    """Tests of `SourceTests` for files; most hold trivially for a source in memory.

    Attributes:
        spans: Whether `span` knows the bytes of a contiguous tensor.
        located: Whether infos know them too; False for sources that find them only when values are read.
    """

    spans: bool = False
    located: bool = True

    def make(self, folder: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Source:
        """Make a source from `tensors`, in order."""
        raise NotImplementedError

    def test_spans(self, tmp_path: Path, dtype: str) -> None:
        """`span` is exactly the bytes of the elements, in a file that `files` lists."""
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
        """Every location is inside its file."""
        source = self.make(tmp_path, few())
        for info in source.infos().values():
            if info.location is not None:
                assert info.location.file in source.files
                assert 0 <= info.location.start <= info.location.stop <= os.path.getsize(info.location.file)

    def test_fingerprint(self, tmp_path: Path) -> None:
        """The fingerprint changes if a file changes, and only then."""
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
        """A file that changed since listing is detected before its bytes are read."""
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
        """Writing to values is either refused, or changes neither the file nor later readings."""
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
        """Arrays outlive `close`. A source may be closed twice; it then reads again, or raises a clear error."""
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
