"""A callback for the Trainer of transformers."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import TrainerCallback

from torchparams.record.recorder import Recorder


class RecorderCallback(TrainerCallback):  # type: ignore[misc]  # transformers may not be installed
    """Records a training by `transformers.Trainer`.

    Each optimizer step is recorded before its gradients are set to zero; what the trainer logs is kept too.

    The trainer calls no callback after an error. The record is then closed by `close`, at the start of the next
    training, when the callback is deleted, or when Python exits, whichever comes first. To go on in the same directory,
    give the option `resume=True`.

    Args:
        path: The directory of the record.
        options: Options of `tp.Recorder`.
    """

    def __init__(self, path: Any, **options: Any) -> None:
        self._path, self._options = path, options
        self.recorder: Recorder | None = None
        self._after_error: Any = None

    def close(self) -> None:
        """Close the record after an error: write what is buffered, and remove the hooks of the optimizer.

        Without an open record, it does nothing.
        """
        if self.recorder is not None:
            self.recorder = None
            self._after_error()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the record; the record of a training that an error ended is closed first."""
        self.close()
        recorder = Recorder(kwargs["model"], kwargs["optimizer"], self._path, **self._options)
        self.recorder = recorder.__enter__()
        self._after_error = weakref.finalize(self, recorder.__exit__, "the trainer does not say which error")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step."""
        if self.recorder is not None:
            self.recorder.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keep the numbers that are logged."""
        if self.recorder is not None:
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self.recorder.log(**numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the record."""
        if self.recorder is not None:
            self._after_error.detach()
            self.recorder.__exit__()
            self.recorder = None
