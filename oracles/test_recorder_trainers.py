"""The recorder in the trainers of other libraries: a row for each optimizer step, with the gradients of that step."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchparams as tp

ROWS, BATCH = 24, 4


def data() -> TensorDataset:
    torch.manual_seed(0)
    x = torch.randn(ROWS, 6)
    return TensorDataset(x, x.sum(dim=1, keepdim=True))


def plain(model: nn.Module, accumulate: int, lr: float) -> list[dict[str, tuple[float, float]]]:
    """Norms of gradient and update of each step of a plain loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    found: list[dict[str, tuple[float, float]]] = []
    for i, (x, y) in enumerate(DataLoader(data(), BATCH)):
        ((model(x) - y).square().mean() / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        found.append({})
        for name, p in model.named_parameters():
            assert p.grad is not None
            found[-1][name] = (p.grad.norm().item(), (p.detach() - before[name]).norm().item())
        optimizer.zero_grad()
    return found


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))


def check(folder: Path, expected: list[dict[str, tuple[float, float]]], prefix: str) -> None:
    found = tp.history(folder)
    assert found.steps == tuple(range(len(expected)))
    for name in expected[0]:
        rows = found[prefix + name]
        assert rows["grad_norm"].tolist() == pytest.approx([step[name][0] for step in expected], rel=1e-4)
        assert rows["update_norm"].tolist() == pytest.approx([step[name][1] for step in expected], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accelerate(tmp_path: Path, accumulate: int) -> None:
    from accelerate import Accelerator

    expected = plain(net(), accumulate, 0.05)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = net()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), DataLoader(data(), BATCH)
    )
    with tp.Recorder(model, optimizer, tmp_path, every=1) as recorder:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward((model(x) - y).square().mean())
                optimizer.step()
                recorder.step()
                optimizer.zero_grad()
    check(tmp_path, expected, "")


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path, accumulate: int) -> None:
    import lightning

    from torchparams.record.callbacks.lightning import RecorderCallback

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            loss: torch.Tensor = (self.net(x) - y).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    expected = plain(net(), accumulate, 0.05)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        callbacks=[RecorderCallback(tmp_path / "run", every=1)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(Module(), DataLoader(data(), BATCH))
    check(tmp_path / "run", expected, "net.")
    assert len(tp.history(tmp_path / "run").numbers["loss"]) == len(expected)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.net(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def trainer_of(model: nn.Module, callback: Any, out: Path, accumulate: int = 1) -> Any:
    """A trainer of transformers that takes the rows in their order."""
    from transformers import Trainer, TrainingArguments

    x, y = data().tensors
    rows = [{"x": x[i], "labels": y[i]} for i in range(ROWS)]
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=rows,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[callback],
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path, accumulate: int) -> None:
    from torchparams.record.callbacks.transformers import RecorderCallback

    expected = plain(net(), accumulate, 0.05)
    trainer_of(WithLoss(), RecorderCallback(tmp_path / "run", every=1), tmp_path / "out", accumulate).train()
    check(tmp_path / "run", expected, "net.")
    losses = tp.history(tmp_path / "run").numbers["loss"]
    assert len(losses) == len(expected) and all(math.isfinite(value) for value in losses.values())


class Failing(WithLoss):
    """Raises an error in the fourth forward pass of its life."""

    calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == 4:
            raise RuntimeError("out of luck")
        return super().forward(x, labels)


def failed(folder: Path, **options: Any) -> tuple[Any, Any]:
    """A trainer of transformers after an error in its fourth step, and its callback."""
    from torchparams.record.callbacks.transformers import RecorderCallback

    callback = RecorderCallback(folder / "run", every=1, watchdogs=(), **options)  # a finding would flush
    trainer = trainer_of(Failing(), callback, folder / "out")
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    return trainer, callback


def hooks(optimizer: Any) -> int:
    inner = optimizer.optimizer  # that of torch, in the wrapper of accelerate
    return len(inner._optimizer_step_pre_hooks) + len(inner._optimizer_step_post_hooks)


@pytest.mark.filterwarnings("ignore")
def test_transformers_after_an_error_is_closed_by_hand(tmp_path: Path) -> None:
    expected = plain(net(), 1, 0.05)[:3]
    trainer, callback = failed(tmp_path)
    assert hooks(trainer.optimizer) and not [*(tmp_path / "run").glob("parameters-*")]
    for _ in range(2):  # the second call does nothing
        callback.close()
        assert callback.recorder is None and not hooks(trainer.optimizer)
        check(tmp_path / "run", expected, "net.")


@pytest.mark.filterwarnings("ignore")
def test_transformers_after_an_error_is_closed_by_the_next_training(tmp_path: Path) -> None:
    trainer, _ = failed(tmp_path, resume=True)
    trainer.train()
    assert not hooks(trainer.optimizer)
    assert tp.history(tmp_path / "run").steps == tuple(range(3 + ROWS // BATCH))


@pytest.mark.filterwarnings("ignore")
def test_transformers_after_an_error_is_closed_with_the_trainer(tmp_path: Path) -> None:
    optimizer = failed(tmp_path)[0].optimizer  # the trainer and the callback are gone
    gc.collect()
    check(tmp_path / "run", plain(net(), 1, 0.05)[:3], "net.")
    assert not hooks(optimizer)


def test_transformers_after_an_error_is_closed_when_python_exits(tmp_path: Path) -> None:
    program = f"""if True:
        import sys
        from pathlib import Path
        sys.path = {[str(Path(__file__).parent), *sys.path]!r}
        from torchvision_import import import_torchvision
        import_torchvision()
        from test_recorder_trainers import failed
        kept = failed(Path({str(tmp_path)!r}))
        raise SystemExit
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run", plain(net(), 1, 0.05)[:3], "net.")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from torchparams.record.sinks import tensorboard

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        SummaryWriter(tmp_path / "board") as writer,
        tp.Recorder(model, optimizer, tmp_path / "run", every=1, sinks=[tensorboard(writer)]) as recorder,
    ):
        for x, y in DataLoader(data(), BATCH):
            (model(x) - y).square().mean().backward()
            optimizer.step()
            recorder.step()
            optimizer.zero_grad()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    shown = [event.value for event in events.Scalars("weight_norm/0.weight")]
    np.testing.assert_allclose(shown, tp.history(tmp_path / "run")["0.weight"]["weight_norm"], rtol=1e-6)
