"""Accuracy of a network on the central crop of every sample."""

from pathlib import Path

import numpy as np
import torch

from pipeline.config import Evaluate, Machine
from pipeline.data.index import Index, matched, open_data, require_labels
from pipeline.labels.agreement import Agreement
from pipeline.networks import models
from pipeline.networks.placed import Placed, placed
from pipeline.system import device as devices
from pipeline.system import ranks
from pipeline.system.terminal import progress, summary
from pipeline.views import plan
from pipeline.views import policy as policies
from pipeline.views.loader import Loader
from pipeline.views.policy import Policy


def run(config: Evaluate) -> None:
    """Print the accuracy of a network."""
    device = devices.pick(config)
    index = open_data(config, config.data, "val")
    require_labels(index, "--data")
    policy = policies.load(config.policy)
    network = models.trained(config.model, index.classes)
    index = matched(index, config, network.class_list or index.class_list, "--data", f"--model {config.model}")
    there = placed(network, device, devices.arithmetic(config.precision, device), policy)
    result = evaluate(there, index, policy, config.batch_size, config)
    seen = f"{policy.base.size} pixels, as policy {policy.name} has them"
    summary("evaluation", {"model": config.model, "data": Path(config.data), "images": seen, **shown(result)})
    present = len(np.unique(index.records["label"][index.good]))
    Agreement(result["top1"], result["samples"], present).warn(config.model)


def shown(result: dict) -> dict:
    """The result as a person wants to read it."""
    return {
        "top-1": f"{100 * result['top1']:.2f} %",
        "top-5": f"{100 * result['top5']:.2f} %",
        "cross-entropy": f"{result['loss']:.4f} nats",
        "samples": result["samples"],
    }


@torch.inference_mode()
def evaluate(network: Placed, index: Index, policy: Policy, batch_size: int, machine: Machine) -> dict:
    """{"top1", "top5": shares, "loss": mean cross-entropy in nats, "samples"}; leaves the network in eval mode.

    The processes of a job share the samples; all get the result.
    """
    network.module.eval()
    device = network.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, samples
    loader = Loader(
        index,
        policy,
        threads=devices.threads(machine),
        decoder=devices.decoder("auto", device),
        max_bad=machine.max_bad,
    )
    mine: np.ndarray = np.array_split(index.good, ranks.world())[ranks.rank()]
    batches = loader.batches(plan.requests(index, policy, 0, plan.cut(None, mine, batch_size)), pairs=False)
    with progress("evaluate", len(index.good) // ranks.world(), "images", show=ranks.rank() == 0) as advance:
        for batch in batches:
            if not len(batch.rows):
                continue
            labels = devices.put(batch.labels, device)
            logits = network(batch.original).float()
            hits = logits.topk(min(5, index.classes), dim=1).indices == labels[:, None]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.full_like(loss, len(labels))])
            advance(len(labels))
    top1, top5, loss, samples = ranks.total(sums).tolist()
    return {"top1": top1 / samples, "top5": top5 / samples, "loss": loss / samples, "samples": int(samples)}
