"""Claim: the wheel installs without a compiler into an empty environment in under 10 s, from under 60 MB downloaded.

    python bench/bench_install.py dist

The packages are downloaded first, and their bytes counted; then they are installed from that folder, so that the
seconds are those of the installation and not of the network. `wheel_check.py` tries what was installed. Where other
processes run, the CPU time is what counts: it is shown by step, because pip itself and the compilation of bytecode are
most of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from common import machine

CHECK = Path(__file__).resolve().parents[1] / "scripts" / "wheel_check.py"


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, store = Path(folder, "venv"), Path(folder, "packages")
        venv.create(home, with_pip=True)
        python = str(home / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        # Without a compiler: none is found, and source distributions are refused.
        env = {**os.environ, "CC": "/nonexistent/cc", "PYTHONPATH": ""}
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        binary = ["--only-binary", ":all:"]
        subprocess.run([*pip, "download", *binary, "-d", str(store), str(wheel)], check=True, env=env)
        install = [*pip, "install", "--no-index", *binary, "--find-links", str(store)]
        whole, cpu = _timed([*install, str(wheel)], env)
        _, start = _timed([*pip, "--version"], env)
        again = [*install, "--force-reinstall", "--no-compile"]
        _, unpacked = _timed([*again, str(wheel)], env)
        _, own = _timed([*again, "--no-deps", str(wheel)], env)
        files = [path for path in (home).rglob("*") if path.is_file() and not path.is_symlink()]
        placed = sum(path.stat().st_size for path in files if "pip" not in path.parts)
        subprocess.run([python, str(CHECK)], check=True, env=env, cwd=folder)
        downloads = sorted(store.glob("*"), key=lambda path: -path.stat().st_size)
        print(machine())
        for path in downloads:
            print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
        total = sum(path.stat().st_size for path in downloads)
        print(f"{total / 1e6:8.2f} MB  downloaded; {placed / 1e6:.1f} MB installed")
        print(f"install: {whole:.1f} s, of which {cpu:.1f} s of CPU time")
        print(f"  pip starts: {start:.1f} s; bytecode: {cpu - unpacked:.1f} s; this wheel alone: {own - start:.1f} s")
        assert total < 60e6


def _timed(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Seconds that a command takes, and seconds of CPU time."""
    began, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "dist")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} holds no wheel: `make wheel` builds it")
    main(wheels[-1])
