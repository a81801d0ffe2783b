"""Train gates on a timm model inside Lightning: half the FLOPs as a term of the loss, mixed precision as a setting.

    python examples/lightning_skips.py

Half a minute on one CPU core, on scikit-learn's handwritten digits. One seed and 359 test images.
"""

from __future__ import annotations

import lightning
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant.data import load
from pliant.losses import CrossEntropy, FlopsBudget, Scheduled, Total
from pliant.retrofit import skips


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, size=32, mode="bilinear")


class Gated(lightning.LightningModule):
    """Nothing here is special but ``record``: the trace holds what the gates decided."""

    def __init__(self, model: nn.Module, share: float, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        budget = Scheduled(FlopsBudget(share), lambda p: float(p > 0.4))  # the network learns first
        self.loss = Total({"task": (1.0, CrossEntropy()), "budget": (4.0, budget)})

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        logits, trace = pliant.record(self.model)(x)
        terms = self.loss(logits, trace, y, self.global_step / self.steps)
        self.log_dict(terms)
        return sum(terms.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs: int = 8) -> None:
    lightning.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    data = load("digits")
    x, y = enlarged(data.test.x), data.test.y
    host = timm.create_model("resnet18", in_chans=1, num_classes=10)
    model = skips(host, ["layer*.1"], example=x[:4])
    batches = DataLoader(TensorDataset(enlarged(data.train.x), data.train.y), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Gated(model, 0.7, epochs * len(batches)), batches)
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits, trace = pliant.record(model)(x)
    print("open gates:", {site: round(float(trace.dense(site).mean()), 2) for site in trace})
    print(f"accuracy: {100 * (logits.argmax(1) == y).float().mean():.1f} % of {len(x)} test digits")
    agrees = int(trace.flops.sum()) == counter.get_total_flops()
    print(f"FLOPs: {trace.flops.sum() / trace.dense_flops.sum():.1%} of dense; the counter agrees: {agrees}")


if __name__ == "__main__":
    main()
