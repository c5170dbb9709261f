"""Claim: statistics of a remote file run at half the rate, or more, at which the same library downloads it.

    python bench/bench_remote.py [rounds, 3 by default]

Whole processes, over loopback, on a file of 750 MB in bfloat16: `torchparams stats URL`, and a program that has fsspec
download the file in parallel ranges of 4 MiB and drops them. The server is a process of its own and sends with
`sendfile`. Then requests and bytes of both formats, and the memory of `torchparams stats` on a remote file of 20 GB,
which is sparse.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

from bench_stats import sparse_file
from common import DATA, llama_file, machine, paired, print_pairs, process, torchparams

if TYPE_CHECKING:
    from collections.abc import Iterator

DOWNLOAD = """
import asyncio, sys
import fsspec
from fsspec.asyn import sync

fs, url = fsspec.core.url_to_fs(sys.argv[1])
size, piece = fs.size(url), 4 << 20

async def download():
    places = asyncio.Semaphore(16)

    async def one(start):
        async with places:
            return len(await fs._cat_file(url, start, min(start + piece, size)))

    return sum(await asyncio.gather(*map(one, range(0, size, piece))))

assert sync(fs.loop, download) == size
"""


class _Sending(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with open(DATA / self.path.lstrip("/"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(found[1]), min(int(found[2]) + 1, size)) if found else (0, size)
            self.send_response(206 if found else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(stop - start))
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            self.wfile.flush()
            while start < stop and self.command == "GET":
                start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)


def serve() -> None:
    """Serve the files of the benches, and print the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sending)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def served() -> Iterator[str]:
    """The address of a server in a process of its own."""
    with subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        finally:
            server.terminate()


def main(rounds: int = 3) -> None:
    """Measure, and print."""
    print(machine())
    path = llama_file()
    with served() as url:
        address = f"{url}/{path.name}"
        runs = {
            "torchparams stats URL": partial(process, torchparams("stats", address)),
            "download": partial(process, [sys.executable, "-c", DOWNLOAD, address]),
            "torchparams stats FILE": partial(process, torchparams("stats", path)),
        }
        print_pairs(paired(runs, rounds), "download")
        for file in (path, llama_file(suffix=".pt")):
            for verb in (["ls"], ["stats"], ["show", "model.norm.weight"]):
                command = torchparams(verb[0], f"{url}/{file.name}", *verb[1:])
                ran = subprocess.run(command, capture_output=True, text=True, check=True)
                size = Path(file).stat().st_size
                print(f"{verb[0]:6} {file.suffix:13} {ran.stderr.strip()} (file: {size / 2**20:,.0f} MiB)")
        large = sparse_file(20) if rounds > 1 else sparse_file(10)
        seconds, peak = process(torchparams("stats", f"{url}/{large.name}"))
        print(f"stats of a remote file of 20 GB: {seconds:.1f} s, {peak / 1e6:.0f} MB at most")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(*map(int, sys.argv[1:]))
