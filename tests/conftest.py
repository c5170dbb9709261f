"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# No timing decides a test: a busy machine is slow.
settings.register_profile("torchparams", deadline=None)
settings.load_profile("torchparams")
