"""Train in two processes on the CPU, and see that both end with the same weights.

    fabric run --accelerator=cpu --strategy=ddp --devices=2 examples/fabric_two_processes.py

(or: torchrun --nproc_per_node=2 examples/fabric_two_processes.py). Nothing in the script says how many processes there
are: every batch of 32 images is dealt out to however many were started, one included.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

import pliant
from pliant.train import Fit, Phase, fit, plan


def images(rows: int = 256) -> SimpleNamespace:
    """Four kinds of noisy 8 x 8 gratings."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % 4
    u, v = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    kinds = torch.stack([torch.sin(u), torch.sin(v), torch.sin(u + v), torch.sin(u - v)])
    return SimpleNamespace(x=(kinds[y] + torch.randn(rows, 8, 8, generator=generator)).unsqueeze(1), y=y)


def main() -> None:
    torch.manual_seed(0)
    model = pliant.create_model(
        "msdnet", num_classes=4, in_chans=1, exits=3, base=1, step=1, channels=4, factors=(1, 2), bottlenecks=(1, 2)
    )
    loss = pliant.losses.Total({"exits": (1.0, pliant.losses.MultiExit())})
    phases = [Phase("joint", epochs=3, lr=0.1, momentum=0.9, schedule="cosine")]
    history = fit(model, images(), loss, phases, options=Fit(batch_size=32))

    state = torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])
    several = dist.is_initialized()
    states = [torch.empty_like(state) for _ in range(dist.get_world_size() if several else 1)]
    if several:
        dist.all_gather(states, state)
    else:
        states = [state]
    if not several or dist.get_rank() == 0:
        print(plan(phases))
        print("loss per epoch:", " ".join(f"{row['exits']:.3f}" for row in history))
        same = all(torch.equal(s, states[0]) for s in states)
        print(f"processes: {len(states)}; weights identical in all of them: {'yes' if same else 'NO'}")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
