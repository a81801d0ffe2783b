"""A BERT classifier with early exits, trained by the Trainer of transformers; texts that are done stop being computed.

    python examples/bert_exits_trainer.py

Half a minute on one CPU core. The texts are scikit-learn's handwritten digits, each read as 64 words: the shade of every pixel,
of five. Any model for sequence classification and any tokenised data will do instead. One seed and 359 test images.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pliant
from pliant.cost import interleaved
from pliant.data import load
from pliant.losses import MultiExit, Total
from pliant.retrofit import exits

LOSS = Total({"exits": (1.0, MultiExit())})


def call_of(words: Tensor) -> dict[str, Tensor]:
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def words_of(x: Tensor) -> Tensor:
    return ((x - x.min()) / (x.max() - x.min()) * 4).long().flatten(1) + 1  # 0 is the padding


class ExitTrainer(Trainer):
    """The loss of all exits in place of the host's: the only change that a Trainer needs."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        output, trace = pliant.record(model)(**inputs)
        loss = sum(LOSS(output.logits, trace, labels, self.state.epoch / self.args.num_train_epochs).values())
        return (loss, output) if return_outputs else loss


def main(epochs: int = 10) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load("digits")
    train, val, test = (words_of(part.x) for part in (data.train, data.val, data.test))
    config = BertConfig(
        vocab_size=6, num_labels=10, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.1, max_position_embeddings=64,
    )  # fmt: skip
    at = [f"bert.encoder.layer.{i}" for i in range(3)]
    model = exits(BertForSequenceClassification(config), at=at, example=call_of(train[:4]))
    texts = [call_of(words) | {"labels": y} for words, y in zip(train, data.train.y, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=3e-3, warmup_steps=0.1, report_to=[],
            lr_scheduler_type="cosine", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        ExitTrainer(model=model, args=arguments, train_dataset=texts).train()
    model.eval()
    pliant.tune(model, [(call_of(val), data.val.y)], budget=0.6)
    call, whole = call_of(test), pliant.plain(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(model)(**call)
    right = [100 * float((m(**call).logits.argmax(1) == data.test.y).float().mean()) for m in (whole, model)]
    print(f"accuracy: {right[0]:.1f} % with all layers, {right[1]:.1f} % with exits, {len(test)} test digits")
    print(
        f"FLOPs: {trace.flops.sum() / trace.dense_flops.sum():.1%} of dense, of {counter.get_total_flops():,} counted"
    )
    seconds = interleaved({"whole": lambda: whole(**call), "exits": lambda: model(**call)}, rounds=5)
    print(f"seconds: {seconds['exits'].minimum / seconds['whole'].minimum:.1%} of the whole model's")


if __name__ == "__main__":
    main()
