"""A callback for Lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback

from torchparams.record.recorder import Recorder


class RecorderCallback(Callback):  # type: ignore[misc]  # Lightning may not be installed
    """Records a Lightning training.

    `trainer.fit` opens the record and closes it, also after an error. Metrics that the module logs are kept with the
    step.

    Args:
        path: The directory of the record.
        options: Options of `tp.Recorder`.
    """

    def __init__(self, path: Any, **options: Any) -> None:
        self._path, self._options = path, options
        self.recorder: Recorder | None = None
        self._global_step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the record."""
        self.recorder = Recorder(pl_module, trainer.optimizers, self._path, **self._options).__enter__()
        self._global_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the step, if the batch completed one: Lightning sets gradients to zero in the next batch."""
        self._step(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the record."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the record."""
        self._close(exception)

    def _step(self, trainer: Any) -> None:
        if self.recorder is None or trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        for name, value in trainer.logged_metrics.items():
            self.recorder.log(**{str(name): float(value)})
        self.recorder.step()

    def _close(self, error: BaseException | None = None) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(error)
            self.recorder = None
