"""Engines: where the work on tensors runs."""

from torchparams.engines.base import Done as Done
from torchparams.engines.base import Engine as Engine
from torchparams.engines.base import Fold as Fold
from torchparams.engines.base import Folding as Folding
from torchparams.engines.base import Job as Job
from torchparams.engines.base import Task as Task
from torchparams.engines.base import Unread as Unread
from torchparams.engines.base import jobs_of as jobs_of
from torchparams.engines.by_name import named as named
from torchparams.engines.distributed import DistributedEngine as DistributedEngine
from torchparams.engines.ray import RayEngine as RayEngine
from torchparams.engines.sketches import SketchTask as SketchTask
from torchparams.engines.sketches import sketches as sketches
from torchparams.engines.threads import ThreadEngine as ThreadEngine
from torchparams.io.blocks import Block as Block

__all__ = [
    "Block", "DistributedEngine", "Done", "Engine", "Fold", "Folding", "Job", "RayEngine", "SketchTask", "Task",
    "ThreadEngine", "Unread", "jobs_of", "named", "sketches",
]  # fmt: skip
