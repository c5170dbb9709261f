"""Prints the lowest version that pyproject.toml allows of each dependency, as constraints for pip.

python scripts/lowest.py > lowest.txt
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("torch", "arrow", "record")


def lowest(text: str) -> dict[str, str]:
    """Package → lowest version, of what is needed and of the extras in `EXTRAS`."""
    project = tomllib.loads(text)["project"]
    stated = [*project["dependencies"], *(each for name in EXTRAS for each in project["optional-dependencies"][name])]
    found = {}
    for requirement in stated:
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        if match is None:
            raise SystemExit(f"{requirement} has no lower bound, or more than that")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    print("\n".join(f"{name}=={version}" for name, version in lowest(pyproject.read_text()).items()))
