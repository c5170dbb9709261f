"""Tests against other libraries. `make oracles` installs these and runs the tests."""

from __future__ import annotations

import os

from hypothesis import settings

from torchvision_import import import_torchvision

# Nothing here may go and look for a model.
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("torchparams", deadline=None)
settings.load_profile("torchparams")


import_torchvision()
