"""Obtains the demo's checkpoint: out of the package that it is published in, which is downloaded and not installed.

python scripts/demo_checkpoint.py demo/silero_vad_16k.safetensors
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "silero-vad==6.2.3"
MEMBER = "silero_vad/data/silero_vad_16k.safetensors"


def main(target: Path) -> None:
    folder = target.parent
    download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    subprocess.run([*download, "--only-binary", ":all:", "-d", str(folder), PACKAGE], check=True)
    [wheel] = folder.glob("silero_vad-*.whl")
    target.write_bytes(zipfile.ZipFile(wheel).read(MEMBER))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
