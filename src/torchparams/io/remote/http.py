"""Byte ranges over HTTP, with checks of every response.

fsspec provides the session with its credentials. The requests are our own, because fsspec accepts any body as the
response to a range: a whole file from a server without ranges, or an endless body.
"""

from __future__ import annotations

import asyncio
import os
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from torchparams import limits
from torchparams.errors import RemoteError
from torchparams.io.remote.transfer import CREDENTIALS, Broken, State, changed, cleaned, loop_of, transferred

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchparams.io.remote.transfer import Transfer

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_BUFFER = 256 << 10  # bytes that may wait in a connection
_SLOWEST = 16 << 10  # bytes per second, below which a server counts as hanging
_AGAIN = (408, 425, 429)  # retried, as are all statuses from 500


class HttpConnection:
    """File behind an HTTP URL.

    If the server redirects to a signed URL, later ranges are requested there until it is refused.

    Args:
        fs: File system of fsspec.
        url: URL of the file.
        name: Public name of the file.
        headers: Headers for this URL only, not for redirect targets.
    """

    def __init__(self, fs: Any, url: str, name: str, headers: Mapping[str, str] | None = None) -> None:
        self.loop = loop_of(fs)
        self._fs = fs
        self.url = url
        self._name = name
        self._headers = dict(headers or {})
        self._direct: Any = None

    async def fill(self, transfer: Transfer) -> State:
        """See `Connection.fill`."""
        import aiohttp

        begin = transfer.start + transfer.done
        options = dict(self._fs.kwargs)
        headers = {**options.pop("headers", {}), "Range": f"bytes={begin}-{transfer.stop - 1}"}
        headers["Accept-Encoding"] = "identity"  # ranges of the file itself, not of a compressed transfer
        direct = self._direct
        if direct is None:
            headers |= self._headers
            known = transfer.known
            if known is not None and known.tag is not None and known.tag.startswith('"'):
                headers["If-Match"] = known.tag
        patience = aiohttp.ClientTimeout(
            total=limits.REMOTE_SECONDS + (transfer.stop - begin) / _SLOWEST,
            sock_connect=limits.REMOTE_SECONDS,
            sock_read=limits.REMOTE_SECONDS,
        )
        session = await self._fs.set_session()
        transferred.count()
        status = None
        try:
            url = self._fs.encode_url(self.url) if direct is None else direct
            async with session.get(url, headers=headers, timeout=patience, read_bufsize=_BUFFER, **options) as answer:
                status = answer.status
                if answer.history:
                    transferred.count(len(answer.history))
                state, stop = self._judge(answer, begin, transfer)
                self.look_at(answer)
                if answer.history and "Authorization" not in session.headers and session.auth is None:
                    self._direct = answer.url
                async for chunk in answer.content.iter_any():
                    if not transfer.take(chunk, stop - transfer.start):
                        raise RemoteError(
                            f"the server sent more than the requested {stop - begin:,} bytes (status {status})",
                            where=self._name,
                            status=status,
                        )
                return state
        except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            if isinstance(error, RemoteError):
                raise
            if isinstance(error, aiohttp.InvalidURL | aiohttp.TooManyRedirects):
                raise RemoteError(f"invalid URL: {type(error).__name__}", where=self._name) from None
            raise Broken(_reason(error, status), status) from None

    def confirm(self, known: State) -> bool:
        """Return True: every response has the state of the file."""
        return True

    def look_at(self, answer: Any) -> None:
        """Hook for subclasses that know more about a server; called for every response."""

    def _judge(self, answer: Any, begin: int, transfer: Transfer) -> tuple[State, int]:
        """State of the file, and end of the range in the response."""
        status = answer.status
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or found[3] == "*":
                given = answer.headers.get("Content-Range", "")[:60]
                raise self._lies(f"sent no size in Content-Range {given!r}", 206)
            first, stop, size = int(found[1]), int(found[2]) + 1, int(found[3])
            if first != begin or not begin < stop <= min(transfer.stop, size):
                raise self._lies(
                    f"sent bytes {first:,} to {stop:,} of {size:,} for bytes {begin:,} to {transfer.stop:,}", 206
                )
        elif status == 200 and answer.headers.get("Accept-Ranges") == "bytes" and begin == 0:
            # A server with ranges may respond so to a range that covers the whole file.
            size = stop = answer.content_length if answer.content_length is not None else transfer.stop + 1
            if stop > transfer.stop:
                raise self._without_ranges()
        elif status == 200:
            raise self._without_ranges()
        elif status == 416 and transfer.known is None and answer.headers.get("Content-Range") == "bytes */0":
            return State(0, tag), begin
        else:
            raise self._refused(answer)
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self._lies(f"sent the bytes in the encoding {encoding[:20]!r}", status)
        if answer.content_length is not None and answer.content_length != stop - begin:
            raise self._lies(f"announced {answer.content_length:,} bytes for a range of {stop - begin:,}", status)
        state = State(size, tag)
        if transfer.known is not None and state != transfer.known:
            raise changed(self._name, status)
        return state, stop

    def _refused(self, answer: Any) -> Exception:
        status = answer.status
        said = f"{status} {phrase(status)}"
        if self._direct is not None and status in (400, 401, 403, 404, 410):
            self._direct = None  # signed URLs expire
            return Broken(f"the server responded {said}", status)
        if status in (412, 416):
            return changed(self._name, status)
        if status in _AGAIN or status >= 500:
            return Broken(f"the server responded {said}", status, _seconds(answer.headers.get("Retry-After", "")))
        hint = None
        if status in (401, 403):
            hint = CREDENTIALS
        return RemoteError(f"the server responded {said}", where=self._name, status=status, hint=hint)

    def _without_ranges(self) -> RemoteError:
        return RemoteError(
            "the server does not support ranges: it responded 200 OK to a range request",
            where=self._name,
            status=200,
            hint="download the file, and pass its path",
        )

    def _lies(self, what: str, status: int) -> RemoteError:
        return RemoteError(f"the server {what} (status {status})", where=self._name, status=status)


def phrase(status: int) -> str:
    """Standard phrase of a status; the server's own phrase is not trusted.

    >>> phrase(404), phrase(599)
    ('Not Found', 'an unknown status')
    """
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "an unknown status"


def _seconds(text: str) -> float:
    return float(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0.0


def _reason(error: BaseException, status: int | None) -> str:
    import aiohttp

    answered = "" if status is None else f"the server responded {status} {phrase(status)}, then "
    if isinstance(error, TimeoutError):
        return f"{answered}timed out"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "host not found"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "the server's certificate is not valid"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno
        return f"cannot connect: {os.strerror(code) if code else cleaned(str(error.os_error))}"
    return f"{answered}the connection broke"
