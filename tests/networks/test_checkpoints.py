"""Checkpoints as four usual trainers write them answer here as they did there, as teacher and as a student's start."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
from support.networks import SMALL
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from pipeline.networks import models
from pipeline.networks.placed import placed
from pipeline.views import policy as policies

POLICY = policies.POLICIES["cifar10"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """u8 (96, 32, 32, 3) of three noisy colours, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    noise = torch.randint(0, 256, (96, 32, 32, 3), generator=generator)
    return (0.8 * noise + 50 * nn.functional.one_hot(labels, 3)[:, None, None]).to(torch.uint8), labels


@pytest.fixture(scope="module")
def trained(images):
    """A network after a few steps with its optimiser, and its average over them, which is not as far."""
    network = placed(models.create(SMALL, 3, seed=0), CPU, "fp32", POLICY)
    optimizer = torch.optim.SGD(network.module.parameters(), 0.05, momentum=0.9)
    average = AveragedModel(network.module, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    network.module.train()
    for _ in range(8):
        optimizer.zero_grad()
        cross_entropy(network(images[0]), images[1]).backward()
        optimizer.step()
        average.update_parameters(network.module)
    return network.module.eval(), optimizer, average.module.eval()


def by_timm(module, optimizer, average, folder):
    """Its saver, with an average and the options of its script."""
    kept = ModelEmaV3(module)
    kept.module.load_state_dict(average.state_dict())
    options = argparse.Namespace(model="resnet8", lr=0.1, input_size=(3, 32, 32))
    saver = CheckpointSaver(module, optimizer, options, kept, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(epoch=3, metric=75.0)
    return folder / "model_best.pth.tar", average


def by_lightning(module, optimizer, average, folder):
    """Lightning's own trainer goes on for two steps, and its ModelCheckpoint writes."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):
        def __init__(self, lr: float):
            super().__init__()
            self.save_hyperparameters()
            self.model = copy.deepcopy(module)

        def training_step(self, batch, _):
            loss = cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            stepped = torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9)
            return [stepped], [torch.optim.lr_scheduler.StepLR(stepped, 1)]

    generator = torch.Generator().manual_seed(1)
    images = TensorDataset(torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 3)
    keeper = ModelCheckpoint(str(folder), monitor="loss", save_last=True)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer = Trainer(max_epochs=1, callbacks=[keeper], default_root_dir=str(folder), **quiet)
    trainer.fit(trained := Module(lr=1e-4), DataLoader(images, 8))
    return Path(keeper.best_model_path), trained.model.eval()


def by_torchvision(module, optimizer, average, folder):
    """As references/classification/train.py saves, run with --model-ema."""
    kept = AveragedModel(module, use_buffers=True)
    kept.module.load_state_dict(average.state_dict())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    content = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="resnet8", lr=0.1, model_ema=True, norm_weight_decay=None),
        "model_ema": kept.state_dict(),
    }
    torch.save(content, folder / "model_3.pth")
    return folder / "model_3.pth", average


def by_compiled_ddp(module, optimizer, average, folder):
    """torch.compile inside DistributedDataParallel, one process over gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(torch.compile(copy.deepcopy(module), backend="eager"))
        wrapped(torch.zeros(2, 3, 32, 32))
        torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")
    finally:
        torch.distributed.destroy_process_group()
    return folder / "last.pt", module


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("written", [by_timm, by_lightning, by_torchvision, by_compiled_ddp])
@pytest.mark.parametrize("seed", [None, 0], ids=["teacher", "start"])
def test_a_checkpoint_answers_as_it_did_where_it_was_written(tmp_path, trained, images, written, seed):
    path, reference = written(*trained, tmp_path)
    loaded = placed(models.create(f"{SMALL}@{path}", 3, seed=seed), CPU, "fp32", POLICY)
    x = (images[0] / 255 - torch.tensor(POLICY.mean)) / torch.tensor(POLICY.std)
    with torch.inference_mode():
        expected = reference(x.permute(0, 3, 1, 2))
        loaded.module.eval()
        torch.testing.assert_close(loaded(images[0]), expected, rtol=1e-4, atol=1e-4)
    assert (expected.argmax(1) == images[1]).float().mean() > 0.9
    other = trained[0] if reference is trained[2] else trained[2]
    with torch.inference_mode():
        assert not torch.allclose(other(x.permute(0, 3, 1, 2)), expected, atol=0.05)  # which of the two it is, shows
