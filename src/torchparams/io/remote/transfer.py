"""Transfer of a byte range, with retries.

A connection fills the memory of a `Transfer`. If it breaks, received bytes are kept, and the next try continues after
them. Credentials come from fsspec: its configuration, the environment, or the URL.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torchparams.errors import MissingDependency, RemoteError, TorchParamsError, shorten
from torchparams.io.paths import full
from torchparams.render.tree import human_bytes, plural

if TYPE_CHECKING:
    from collections.abc import Awaitable

TRIES = 4
"""Maximum number of consecutive tries without progress."""

DELAYS = (0.2, 0.5, 1.0)
"""Seconds before the second, third and fourth try, unless the server asks for more."""

MOST_DELAY = 20.0
"""Maximum seconds of a delay that a server asks for."""


class State(NamedTuple):
    """State of a file, which each response is checked against.

    Attributes:
        size: Size in bytes.
        tag: ETag, version or date, or None.
    """

    size: int
    tag: str | None


@dataclass
class Transfer:
    """Transfer of a byte range.

    Attributes:
        start, stop: Range; for the first one of a file, the end may be beyond the end of the file.
        known: State of the file; None for the first range.
        memory: Memory for the bytes of the range.
        done: Number of bytes received.
    """

    start: int
    stop: int
    known: State | None
    memory: bytearray = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.memory = bytearray(self.stop - self.start)

    def take(self, chunk: bytes, most: int) -> bool:
        """Add received bytes; returns False if there are more than `most`."""
        if self.done + len(chunk) > most:
            return False
        self.memory[self.done : self.done + len(chunk)] = chunk
        self.done += len(chunk)
        transferred.nbytes += len(chunk)
        return True


@dataclass
class Transferred:
    """Total transfers of this process.

    Attributes:
        requests: Number of requests, including redirects.
        nbytes: Bytes of files received, without headers.
        since: Time of the first request, by `time.perf_counter`.
    """

    requests: int = 0
    nbytes: int = 0
    since: float | None = None

    def count(self, requests: int = 1) -> None:
        """Count requests."""
        if self.since is None:
            self.since = time.perf_counter()
        self.requests += requests

    def summary(self) -> str:
        """Totals since the last call in one line, or an empty text; resets them."""
        if self.since is None:
            return ""
        seconds = time.perf_counter() - self.since
        line = f"transferred {human_bytes(self.nbytes)} in {plural(self.requests, 'request')}, {seconds:.1f} s"
        self.requests = self.nbytes = 0
        self.since = None
        return line


transferred = Transferred()
"""Totals of this process."""


class Broken(Exception):
    """Failed try that may be repeated.

    Args:
        reason: Reason in words.
        status: Status of the response, if any.
        wait: Seconds to wait, as requested by the server.
    """

    def __init__(self, reason: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.status, self.wait = reason, status, wait


class Connection(Protocol):
    """Fetches ranges of one file.

    Attributes:
        loop: Event loop of `fill`.
    """

    loop: Any

    def fill(self, transfer: Transfer) -> Awaitable[State]:
        """Fetch the rest of a range, or a part of it, and return the state of the file.

        Raises:
            Broken: The try failed.
            RemoteError: Another try is useless.
        """

    def confirm(self, known: State) -> bool:
        """Whether the file still has a state, if `fill` does not check it."""


async def fetch(connection: Connection, name: str, start: int, stop: int, known: State | None) -> tuple[Any, State]:
    """Fetch a range; returns a read-only memoryview, and the state of the file.

    Args:
        connection: Connection to the file.
        name: Public name of the file.
        start, stop: Range. If `known` is None, it may extend beyond the end of the file.
        known: State of the file, or None.

    Raises:
        RemoteError: The server or the connection failed.
    """
    transfer = Transfer(start, stop, known)
    failures = 0
    while True:
        before = transfer.done
        try:
            state = await connection.fill(transfer)
        except Broken as broken:
            failures = 1 if transfer.done > before else failures + 1
            if failures >= TRIES:
                raise _given_up(broken, name, transfer) from None
            await asyncio.sleep(max(DELAYS[min(failures, len(DELAYS)) - 1], min(broken.wait, MOST_DELAY)))
            continue
        transfer.known = state
        wanted = min(stop, state.size) - start
        if transfer.done >= wanted:
            return memoryview(transfer.memory)[: transfer.done].toreadonly(), state
        failures = 1 if transfer.done > before else failures + 1
        if failures >= TRIES:
            raise RemoteError(f"the server sent only {transfer.done:,} of {wanted:,} bytes", where=name)


def _given_up(broken: Broken, name: str, transfer: Transfer) -> RemoteError:
    at = f" at byte {transfer.start + transfer.done:,}" if transfer.done else ""
    return RemoteError(f"{broken.reason}{at}, after {TRIES} tries", where=name, status=broken.status)


def filesystem(name: str) -> tuple[Any, str]:
    """fsspec file system for a public name, and the path in it.

    Raises:
        MissingDependency: fsspec, or a package that it needs for this kind of URL, is not installed.
        RemoteError: fsspec does not support this kind of URL.
    """
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise MissingDependency(
            "fsspec is needed to read a URL", where=name, hint="pip install 'torchparams[remote]'"
        ) from None
    try:
        found: tuple[Any, str] = url_to_fs(full(name))
    except ImportError as error:
        raise MissingDependency(
            f"a package is missing to read {name.partition('://')[0]}:// URLs: {cleaned(str(error))}",
            where=name,
            hint="pip install 'torchparams[remote]' for https, s3 and hf; pip install gcsfs for gs",
        ) from None
    except ValueError as error:
        raise RemoteError(cleaned(str(error)), where=name, hint="pass the URL of a checkpoint") from None
    return found


def loop_of(fs: Any) -> Any:
    """The event loop that the transfers of a file system run in: fsspec's, in a thread of its own."""
    from fsspec.asyn import get_loop

    return getattr(fs, "loop", None) if getattr(fs, "async_impl", False) and fs.loop is not None else get_loop()


def cleaned(text: str) -> str:
    r"""Text of a foreign error in one line, without passwords and signatures.

    >>> cleaned("cannot reach https://me:secret@host/a?X-Amz-Signature=1\nat all")
    'cannot reach https://host/a?… at all'
    """
    text = " ".join(text.split())
    return shorten(re.sub(r"\?[^\s'\")]+", "?…", re.sub(r"(?<=://)[^/\s@]*@", "", text)), 200)


def failed(error: BaseException, name: str) -> Exception:
    """Exception to raise for an error of a foreign library: a `Broken`, or a final error."""
    if isinstance(error, TorchParamsError | Broken):
        return error
    status = status_of(error)
    text = cleaned(str(error)) or type(error).__name__
    if status == 404 or isinstance(error, FileNotFoundError):
        return RemoteError("404 Not Found: no such file", where=name, status=404)
    if status in (401, 403) or isinstance(error, PermissionError):
        return RemoteError(f"{status or 403} Forbidden: {text}", where=name, status=status or 403, hint=CREDENTIALS)
    if status in (304, 412):
        return changed(name, 412)
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return RemoteError(text, where=name, hint=CREDENTIALS)
    connecting = type(error).__module__.partition(".")[0] in _CONNECTING and status is None
    if connecting or isinstance(error, OSError | TimeoutError | asyncio.IncompleteReadError) or (status or 0) >= 429:
        return Broken(f"{status}: {text}" if status else text, status)
    return RemoteError(f"{type(error).__name__}: {text}", where=name, status=status)


_CONNECTING = ("aiohttp", "aiobotocore", "botocore", "httpx", "httpx2", "requests", "urllib3")
"""Libraries whose errors without a status are connection errors."""

CREDENTIALS = "set credentials for fsspec: in its configuration, the environment, or the URL"


def status_of(error: BaseException | None) -> int | None:
    """HTTP status of a foreign error, if any."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):  # botocore
            found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(answer, "status_code", None)
        found = found or getattr(error, "status", None)
        if isinstance(found, int):
            return found
        error = error.__cause__
    return None


def changed(name: str, status: int | None) -> RemoteError:
    """Error for a file that changed after it was listed."""
    answered = "" if status is None else f" (status {status})"
    return RemoteError(
        f"the file changed after it was listed{answered}",
        where=name,
        status=status,
        hint="open the file again",
    )
