"""Trainings by other libraries' trainers on two ranks; each function runs on every rank and returns on the first."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchparams as tp
from torchvision_import import import_torchvision


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def _loader() -> DataLoader[Any]:
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :4]), batch_size=4)


def _read(model: nn.Module, optimizer: Any, folder: str) -> dict[str, Any]:
    """What the verbs say of a trained model."""
    names = tp.of(_model()).names
    assert tp.of(model).names == names, tp.of(model).names
    digest = tp.digest(model).digest
    path = f"{folder}/rank-{dist.get_rank()}.safetensors"
    tp.save(model, path)
    assert tp.digest(path).digest == digest
    plain = _model()
    assert tp.load(plain, path).complete
    assert tp.diff(plain, model).same
    assert len(tp.stats(model).rows) == len(names)
    found = tp.audit(model, optimizer)
    assert not [finding for finding in found if finding.id.startswith("D")], found
    state = tp.optimizer_state(model, optimizer)
    assert state.shapes["0.weight"] == (16, 8)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest)
    assert len(set(everyone)) == 1, "every rank has the same weights"
    return {"digest": digest, "moved": not tp.diff(_model(), model).same}


def lightning_ddp() -> dict[str, Any]:
    """Lightning with its DDP strategy."""
    import_torchvision()
    import lightning

    class Net(lightning.LightningModule):  # type: ignore[misc]  # it has no types
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            return nn.functional.mse_loss(self.net(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(tp.groups(self.net, lr=0.01))

    os.environ |= {"LOCAL_RANK": os.environ["RANK"], "NODE_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ["TORCHELASTIC_RUN_ID"] = "here"  # the processes are there already
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            use_distributed_sampler=True,
        )
        module = Net()
        trainer.fit(module, _loader())
        assert type(trainer.strategy).__name__ == "DDPStrategy"
        return _read(module.net, trainer.optimizers[0], folder)


def accelerate_ddp() -> dict[str, Any]:
    """accelerate, which wraps the model in DDP on CPUs."""
    import_torchvision()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, loader = _model(), _loader()
    optimizer = torch.optim.AdamW(tp.groups(model, lr=0.01))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    for inputs, targets in loader:
        accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        return _read(model, optimizer, folder)


def transformers_trainer() -> dict[str, Any]:
    """The Trainer of transformers, on CPUs with DDP."""
    import_torchvision()
    from transformers import Trainer, TrainingArguments

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _model()

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            found = self.net(inputs)
            return {"loss": nn.functional.mse_loss(found, labels), "logits": found}

    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    rows: Any = [{"inputs": row, "labels": row[:4]} for row in inputs]
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, max_steps=3, per_device_train_batch_size=4, report_to=[], save_strategy="no"
        )
        model = Net()
        optimizer = torch.optim.AdamW(tp.groups(model, lr=0.01))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
        trainer.train()
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        return _read(model.net, tp_optimizer(model, optimizer), folder)


def tp_optimizer(model: Any, optimizer: Any) -> Any:
    """The optimizer, whose parameters are those of the network inside."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.net.parameters()}
    return optimizer
