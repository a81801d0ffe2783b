"""Text from a causal model: tokens that leave early, and drafts of the first layers, against what transformers offers.

    python benchmarks/generate.py --json benchmarks/results/generate.json

The model is a Llama of 12 layers and 256 features that spells lower-case news: three layers are trained alone, nine more are put on
top with outputs of zero, and all are trained on with a loss after the third and after the last. So the first three layers often
say what all twelve say, as in a model that was trained to have exits; how often is in the table. All calls run in turn on one
thread on the same weights, and their texts are asserted equal first: ``transformers`` is ``generate``, ``its early exit`` is
``generate(assistant_early_exit=3)``, which takes one text at a time, ``drafts`` is ``pliant.deploy.speculate``, both with the same
numbers of drafts, or with up to 20 while each has a probability of 0.4 (transformers' default). ``early exits`` is
``pliant.deploy.generate`` with a threshold; its text may differ, and the table says by how much. Speed-ups are over
``transformers``, medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import ALLOCATORS, CLOCKS, allocator, environment, in_turn, save
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pliant
from pliant.cost.meter import threads
from pliant.data import load
from pliant.deploy import Generator, generate, speculate
from pliant.losses import MultiExit
from pliant.retrofit import causal
from pliant.rules import Always, Never, Threshold

EXIT, LAYERS = 3, 12
LETTERS = "\0 abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-()$%&/"


def spelled(limit: int) -> tuple[Tensor, Tensor]:
    """Training and test texts of AG News as one row of letters each."""
    data = load("ag_news", limit=limit)
    number = {letter: i for i, letter in enumerate(LETTERS)}

    def letters(x: Tensor) -> Tensor:
        text = " ".join(data.vocabulary[int(i)] for i in x[x > 1])
        return torch.tensor([number[letter] for letter in text if letter in number])

    return torch.cat([letters(row) for row in data.train.x]), torch.cat([letters(row) for row in data.test.x[:200]])


def llama(layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model: Any, text: Tensor, steps: int, rate: float) -> float:
    """Teach every exit there is to say the next letter; the last loss of the last exit."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    loss = MultiExit()
    said = torch.zeros(())
    for _ in range(steps):
        start = torch.randint(len(text) - 65, (32, 1))
        block = text[start + torch.arange(65)]
        output, trace = pliant.record(model)(block[:, :-1])
        said = output.logits.transpose(1, 2)
        total = loss(said, trace, block[:, 1:], 0.0) if trace.exits else F.cross_entropy(said, block[:, 1:])
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        said = F.cross_entropy(said.detach(), block[:, 1:])
    return float(said)


def grown(text: Tensor, steps: tuple[int, int]) -> tuple[Any, list[float]]:
    """The model, and its loss in nats a letter after both parts of its training."""
    small, host = llama(EXIT), llama(LAYERS)
    losses = [train(small, text, steps[0], 2e-3)]
    host.load_state_dict(small.state_dict(), strict=False)
    for layer in host.model.layers[EXIT:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model = causal(host, [f"model.layers.{EXIT - 1}"])
    losses.append(train(model, text, steps[1], 1e-3))
    return host.eval(), losses


def prompts(text: Tensor, rows: int, length: int = 32) -> Tensor:
    return text[torch.arange(rows)[:, None] * 200 + torch.arange(length)]


@torch.no_grad()
def measure(
    host: Any, ids: Tensor, new: int, drafts: list[int], thresholds: list[float], rounds: int
) -> dict[str, Any]:
    """All ways to write one batch."""
    rows = len(ids)
    model = causal(host, [f"model.layers.{EXIT - 1}"])
    full, never = (pliant.bind(model, {"*": rule}) for rule in (Always(), Never()))

    def theirs(**more: Any) -> Tensor:
        return host.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **more)

    def early(count: int, sure: float = 0.0) -> Callable[[], Tensor]:
        """Up to ``count`` drafts a round, as long as each has the probability ``sure``."""
        set_ = {
            "num_assistant_tokens": count,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": sure,
        }

        def call() -> Tensor:
            host.generation_config.update(**set_)  # it reads them from there alone
            return theirs(assistant_early_exit=EXIT)

        return call

    calls: dict[str, Callable[[], Any]] = {
        "transformers": theirs,
        "all layers": lambda: generate(full, ids, max_new_tokens=new),
    }
    drafting = {f"{count}": (never, count, early(count)) for count in drafts}
    drafting["while sure"] = (
        pliant.bind(model, {"*": Threshold(0.6)}),
        20,
        early(20, 0.4),
    )  # transformers' own defaults
    for name, (bound, count, call) in drafting.items():
        if rows == 1:
            calls[f"its early exit, {name}"] = call
        calls[f"drafts, {name}"] = lambda bound=bound, count=count: (
            speculate(bound, ids, max_new_tokens=new, drafts=count).ids
        )
    wanted = theirs()
    for name, call in calls.items():
        if not torch.equal(call(), wanted):
            raise RuntimeError(f"{name} writes another text than transformers")
    found: dict[str, Any] = {"rows": rows, "new_tokens": new, "calls": {}}
    if rows > 1:
        found["its_early_exit"] = refusal(early(drafts[0]))
    about: dict[str, dict[str, Any]] = {}
    for name, (bound, count, _) in drafting.items():
        said = speculate(bound, ids, max_new_tokens=new, drafts=count)
        about[f"drafts, {name}"] = {"accepted": float(said.accepted.sum() / said.drafted.sum())}
    for threshold in thresholds:
        bound = pliant.bind(model, {"*": Threshold(threshold)})
        y, trace = pliant.record(Generator(bound, new))(ids)
        if not torch.equal(y, pliant.masked(Generator(bound, new))(ids)):
            raise RuntimeError("the masked form writes another text")
        calls[f"early exits, {threshold}"] = lambda bound=bound: generate(bound, ids, max_new_tokens=new)
        went_on = sum(float(d.value.sum()) for d in trace["model.exits.sites.0"])
        about[f"early exits, {threshold}"] = {
            "left_early": 1 - went_on / (rows * (new - 1)),
            "same_letters": float((y == wanted[:, ids.shape[1] :]).float().mean()),
            "promised": float(trace.dense_flops.sum() / trace.flops.sum()),
        }
    seconds = in_turn(calls, rounds)
    for name in calls:
        entry = about.get(name, {})
        for clock, each in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(each["transformers"], each[name], strict=True))
            entry[clock] = {"speed_up": ratio, "seconds": min(each[name])}
        found["calls"][name] = entry
    return found


def refusal(call: Callable[[], object]) -> str:
    """What transformers says to a batch."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise RuntimeError("transformers' early exit takes batches by now: compare with it")


def best(found: dict[str, Any], clock: str, start: str) -> float:
    return max(entry[clock]["speed_up"] for name, entry in found["calls"].items() if name.startswith(start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--steps", type=int, nargs=2, default=[250, 30], help="of training: three layers, all")
    parser.add_argument("--texts", type=int, default=3000, help="training texts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--new", type=int, default=96, help="letters to write")
    parser.add_argument("--drafts", type=int, nargs="+", default=[3, 7, 11], help="drafts of a round")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.5, 0.7], help="of early exits, on 1 - max probability"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of each call")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="processor", help="whose seconds the table shows; the file has both"
    )
    parser.add_argument("--allocator", choices=ALLOCATORS, default="keep", help="whether glibc keeps freed memory")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    console, start = Console(width=120), time.perf_counter()
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": environment(0, allocator(args.allocator)), "batches": []}
    found["environment"]["transformers"] = transformers.__version__
    with threads(1):
        text, held = spelled(args.texts)
        host, losses = grown(text, tuple(args.steps))
        found["training"] = {
            "letters": len(text),
            "steps": args.steps,
            "nats": losses,
            "seconds": time.perf_counter() - start,
        }
        console.print(found["training"])
        for rows in args.batches:
            here = measure(host, prompts(held, rows), args.new, args.drafts, args.thresholds, args.rounds)
            found["batches"].append(here)
            table = Table(title=f"{rows} texts, one thread, {args.clock} seconds")
            for head in ("", "ms", "speed-up", "of drafts accepted", "left early", "same letters", "promised"):
                table.add_column(head, justify="right" if head else "left")
            for name, entry in here["calls"].items():
                figures = [
                    f"{entry[key]:.2f}" if key in entry else ""
                    for key in ("accepted", "left_early", "same_letters", "promised")
                ]
                table.add_row(
                    name, f"{entry[args.clock]['seconds'] * 1e3:.0f}", f"{entry[args.clock]['speed_up']:.2f}", *figures
                )
            console.print(table)
            if rows == 1:
                ratio = best(here, args.clock, "drafts") / best(here, args.clock, "its early exit")
                here["drafts_over_its_early_exit"] = ratio
                console.print(
                    f"drafts, at their best, over transformers' early exit at its best: {ratio:.2f} times as fast"
                )
    found["seconds"] = round(time.perf_counter() - start, 1)
    save(args.json, found)


if __name__ == "__main__":
    main()
