"""Byte ranges of objects in buckets, and of files of other fsspec file systems."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from torchparams.errors import RemoteError
from torchparams.io.remote.transfer import State, changed, failed, loop_of, status_of, transferred

if TYPE_CHECKING:
    from torchparams.io.remote.transfer import Transfer

_TAGS = ("ETag", "etag", "versionId", "generation", "mtime", "LastModified", "last_modified", "modified", "created")
"""Keys under which file systems describe the state of a file."""


class StoreConnection:
    """File of an fsspec file system.

    Args:
        fs: The file system.
        path: Path in the file system.
        name: Public name of the file.
    """

    def __init__(self, fs: Any, path: str, name: str) -> None:
        self._fs, self._path, self._name = fs, path, name
        self._asynchronous = bool(getattr(fs, "async_impl", False))
        self.loop = loop_of(fs)

    async def fill(self, transfer: Transfer) -> State:
        """See `Connection.fill`."""
        try:
            state = transfer.known or await self._state()
            begin, stop = transfer.start + transfer.done, min(transfer.stop, state.size)
            if begin < stop:
                transferred.count()
                chunk = await self._call("cat_file", self._path, start=begin, end=stop)
                if not transfer.take(chunk, stop - transfer.start):
                    raise RemoteError(
                        f"received {len(chunk):,} bytes for a range of {stop - begin:,}", where=self._name
                    )
        except Exception as error:  # file systems raise the errors of their libraries
            raise failed(error, self._name) from None
        return state

    def confirm(self, known: State) -> bool:
        """Whether the file still has a state: requests its size and date again."""
        if known.tag is None:
            return True
        from fsspec.asyn import sync

        try:
            return bool(sync(self.loop, self._state) == known)
        except Exception as error:  # as above
            raise RemoteError(str(failed(error, self._name)), where=self._name) from None

    async def _state(self) -> State:
        transferred.count()
        await self._call("invalidate_cache", self._path) if not self._asynchronous else self._fs.invalidate_cache()
        about = await self._call("info", self._path)
        if about.get("type") == "directory":
            raise RemoteError("404 Not Found: it is a directory", where=self._name, status=404)
        size = about.get("size")
        if not isinstance(size, int):
            raise RemoteError("the server does not report the size of the file", where=self._name)
        found = [f"{key}={about[key]}" for key in _TAGS if about.get(key) is not None]
        return State(size, " ".join(found) or None)

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if self._asynchronous:
            return await getattr(self._fs, f"_{method}")(*arguments, **options)
        return await asyncio.to_thread(getattr(self._fs, method), *arguments, **options)


class S3Connection(StoreConnection):
    """Object in an S3 bucket: one request per range, which fails if the object changed."""

    async def fill(self, transfer: Transfer) -> State:
        """See `Connection.fill`."""
        fs, known = self._fs, transfer.known
        begin = transfer.start + transfer.done
        bucket, key, version = fs.split_path(self._path)
        options = {} if version is None else {"VersionId": version}
        if known is not None and known.tag is not None:
            options["IfMatch"] = known.tag
        transferred.count()
        try:
            if not key:
                raise RemoteError("404 Not Found: it is a bucket", where=self._name, status=404)
            answer = await fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={begin}-{transfer.stop - 1}", **options
            )
            size = _size(answer.get("ContentRange"), answer["ContentLength"])
            stop = min(transfer.stop, size)
            async with answer["Body"] as body:
                while chunk := await body.read(1 << 20):
                    if not transfer.take(chunk, stop - transfer.start):
                        raise RemoteError(f"received more bytes than the range of {stop - begin:,}", where=self._name)
            state = State(size, answer.get("ETag"))
        except Exception as error:  # of botocore, aiohttp or s3fs
            if status_of(error) == 416:  # an empty object has no ranges
                if known is None:
                    return State(0, None)
                raise changed(self._name, 416) from None
            raise failed(error, self._name) from None
        if known is not None and state != known:
            raise changed(self._name, None)
        return state

    def confirm(self, known: State) -> bool:
        """Return True: every response is for the listed object."""
        return True


def _size(content_range: str | None, length: int) -> int:
    """Size of an object: the total in Content-Range, or the length of the response."""
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdecimal() else length
