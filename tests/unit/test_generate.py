"""Text from causal models whose tokens leave early, and from drafts of their first layers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pliant
from pliant import PliantError, rules
from pliant.deploy import Generator, Sample, generate, speculate
from pliant.losses import MultiExit
from pliant.retrofit import causal, exits

transformers = pytest.importorskip("transformers", reason="needs transformers")
WORDS = 60


def llama(attention: str = "sdpa", **more: Any) -> tuple[Any, list[str]]:
    sizes = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **more}, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).eval(), ["model.layers.0", "model.layers.2"]


def gpt2() -> tuple[Any, list[str]]:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=None,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval(), ["transformer.h.0", "transformer.h.2"]


HOSTS = {"Llama": llama, "Llama, eager attention": lambda: llama("eager"), "GPT-2": gpt2}


def prompts(rows: int = 4, length: int = 6, padded: bool = True) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, WORDS, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows if padded else 0):
        mask[row, : (2 * row) % length] = 0
    return ids * mask, mask


def said(host: Any, ids: Tensor, mask: Tensor | None, new: int, **more: Any) -> Tensor:
    """What transformers writes."""
    mask = torch.ones_like(ids) if mask is None else mask
    return host.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **more)


def always(model: Any) -> Any:
    return pliant.bind(model, {"*": rules.Always()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTS)
def test_with_no_token_leaving_the_text_is_the_hosts(name: str, dtype: torch.dtype) -> None:
    host, at = HOSTS[name]()
    host = host.to(dtype)
    model = causal(host, at)
    # Elsewhere the masks that transformers makes for eager attention give NaN for padding.
    padded = name != "Llama, eager attention" or dtype == torch.float32
    for ids, mask in (prompts(4, padded=padded), prompts(4, padded=False), prompts(1, 3)):
        wanted = said(host, ids, mask, 14)
        for full in (always(model), pliant.plain(model), pliant.masked(always(model))):
            assert torch.equal(generate(full, ids, attention_mask=mask, max_new_tokens=14), wanted)
        eos = int(wanted[0, ids.shape[1] + 3])
        ended = said(host, ids, mask, 14, eos_token_id=[eos, 1])
        for full in (always(model), pliant.plain(model), pliant.masked(always(model))):
            assert torch.equal(generate(full, ids, attention_mask=mask, max_new_tokens=14, eos=[eos, 1]), ended)
    assert list(host.state_dict()) == [key for key in model.state_dict() if not key.startswith("exits.")]
    assert "forward" not in vars(host)
    assert not host.get_submodule(at[0])._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HOSTS)
def test_drafted_text_is_the_full_models(name: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        host, at = HOSTS[name]()
        host = host.to(dtype)
        model = pliant.bind(causal(host, at), {"*": rules.Never()})
        padded = name != "Llama, eager attention" or dtype == torch.float32
        for ids, mask in (prompts(4, padded=padded), prompts(1, 5)):
            wanted = said(host, ids, mask, 15)
            for exit_, drafts in ((0, 1), (1, 3), (1, 6)):
                found = speculate(model, ids, attention_mask=mask, max_new_tokens=15, at=exit_, drafts=drafts)
                assert torch.equal(found.ids, wanted)
                assert (found.accepted <= found.drafted).all()
                assert (found.drafted <= found.rounds * drafts).all()
            eos = int(wanted[0, ids.shape[1] + 4])
            found = speculate(model, ids, attention_mask=mask, max_new_tokens=15, at=1, eos=eos)
            assert torch.equal(found.ids, said(host, ids, mask, 15, eos_token_id=eos))


def test_texts_take_their_own_number_of_drafts() -> None:
    host, _ = llama()
    for layer in host.model.layers[2:]:
        layer.self_attn.o_proj.weight.data *= 0.15
        layer.mlp.down_proj.weight.data *= 0.15
    model = pliant.bind(causal(host, ["model.layers.1"]), {"*": rules.Never()})
    ids, mask = prompts(5, 7)
    found = speculate(model, ids, attention_mask=mask, max_new_tokens=24, drafts=4)
    assert torch.equal(found.ids, said(host, ids, mask, 24))
    assert len(set(found.rounds.tolist())) > 1
    assert (found.rounds < 23).all()
    assert (found.rounds + found.accepted >= 23).all()
    # Drafting stops where the site wants to go on for every text: then one draft is all that a round has.
    one = speculate(always(model), ids, attention_mask=mask, max_new_tokens=24, drafts=4)
    assert torch.equal(one.ids, found.ids)
    assert (one.drafted <= one.rounds).all()


@given(
    p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), rows=st.integers(1, 5), new=st.integers(1, 7), seed=st.integers(0, 99),
    padded=st.booleans(), ends=st.booleans(), name=st.sampled_from(["Llama", "GPT-2"]),
)  # fmt: skip
def test_every_pattern_of_exits(
    p: float, rows: int, new: int, seed: int, padded: bool, ends: bool, name: str
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = causal(*HOSTS[name]())
    ids, mask = prompts(rows, 5, padded)
    eos = list(range(2, 12)) if ends else None
    drawn = pliant.bind(Generator(model, new, eos=eos), {"*": rules.Random(p, torch.Generator().manual_seed(seed))})
    with FlopCounterMode(display=False) as counter:
        y, trace = pliant.record(drawn)(ids, mask)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    assert (trace.flops <= trace.dense_flops).all()
    again = pliant.bind(drawn, {"*": rules.Given(trace)})
    assert torch.equal(again(ids, mask), y)
    assert torch.equal(pliant.masked(again)(ids, mask), y)
    with FlopCounterMode(display=False) as counter:
        _, everything = pliant.record(pliant.masked(again))(ids, mask)
    assert int(everything.flops.sum()) == counter.get_total_flops()


def test_position_embeddings_are_looked_up_where_a_table_can_say_them() -> None:
    for name, plain in (("Llama", True), ("GPT-2", False)):
        host, at = HOSTS[name]()
        model = causal(host, at, threshold=0.85)
        assert model.exits.plain_front is plain
        ids, mask = prompts(4)
        wanted = generate(model, ids, attention_mask=mask)
        model.exits.plain_front = False
        assert torch.equal(generate(model, ids, attention_mask=mask), wanted)


def test_rows_that_leave_are_not_run() -> None:
    model = causal(*llama())
    ids, mask = prompts(5)
    ran: list[int] = []
    never = pliant.bind(Generator(model, 8), {"*": rules.Never()})
    never.model.model.layers[3].register_forward_hook(lambda *call: ran.append(call[1][0].shape[0]))
    never(ids, mask)
    assert ran == [5]  # the prompt alone
    # Row 2 goes on at the last step: what its layers lack of the six tokens before comes in one go, for this row alone.
    plan = pliant.bind(Generator(model, 8), {"*": OneRow(2, 6)})
    ran.clear()
    plan.model.model.layers[3].register_forward_pre_hook(lambda _, args: ran.append(tuple(args[0].shape[:2])))
    plan(ids, mask)
    assert ran == [(5, 6), (1, 6), (1, 1)]


class OneRow(rules.Never):
    """Row ``row`` goes on at step ``step``, no other ever."""

    def __init__(self, row: int, step: int) -> None:
        super().__init__()
        self.row, self.step, self.now = row, step, -1

    def at(self, visit: int) -> OneRow:
        twin = OneRow(self.row, self.step)
        twin.now = visit
        return twin

    def forward(self, scores: Tensor) -> Any:
        value = torch.zeros_like(scores)
        if self.now == self.step:
            value[self.row if len(value) > 1 else 0] = 1
        return pliant.core.Outcome(value)


def test_a_batch_is_its_rows_one_by_one() -> None:
    host, at = llama()
    model = causal(host.double(), at, threshold=0.85)
    ids, mask = prompts(5, 7)
    eos = [5, 9, 13]
    y, trace = pliant.record(Generator(model, 12, eos=eos))(ids, mask)
    assert 0 < trace.flops.sum() < trace.dense_flops.sum()
    for row in range(5):
        alone = Generator(model, 12, eos=eos)(ids[row : row + 1, mask[row] == 1])
        assert torch.equal(alone[0], y[row])
    assert torch.equal(Generator(model, 12, eos=eos)(ids[[3, 1]], mask[[3, 1]]), y[[3, 1]])


def test_criteria_with_a_memory_and_heads_of_their_own() -> None:
    host, at = llama()
    heads = [nn.Linear(32, WORDS) for _ in at]
    model = causal(host, at, criterion=pliant.scores.Patience(1), heads=heads)
    ids, mask = prompts(4)
    y = Generator(model, 8)(ids, mask)
    assert torch.equal(pliant.masked(Generator(model, 8))(ids, mask), y)
    assert [k for k in model.state_dict() if k.startswith("exits.heads.")] == [
        "exits.heads.0.weight", "exits.heads.0.bias", "exits.heads.1.weight", "exits.heads.1.bias",
    ]  # fmt: skip
    assert torch.equal(generate(always(model), ids, attention_mask=mask), said(host, ids, mask, 20))


def test_a_recorded_text_trains_the_exits() -> None:
    host, at = llama()
    host.requires_grad_(False)
    model = causal(host, at, heads=[nn.Linear(32, WORDS) for _ in at]).train()
    ids, mask = prompts(3)
    output, trace = pliant.record(model)(ids, attention_mask=mask)
    plain = host.train()(ids, attention_mask=mask)
    assert torch.equal(output.logits, plain.logits)
    assert output.keys() == plain.keys()
    assert [e.logits.shape for e in trace.exits] == [(3, WORDS, 6)] * 3
    with FlopCounterMode(display=False) as counter:
        _, again = pliant.record(model)(ids, attention_mask=mask)
    assert int(again.flops.sum()) == counter.get_total_flops()
    MultiExit()(output.logits.transpose(1, 2), trace, ids, 0.0).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.exits.parameters())
    assert torch.equal(model.eval()(ids).logits, host.eval()(ids).logits)
    assert torch.equal(said(model, ids, mask, 6), said(host, ids, mask, 6))  # transformers' own writes as before


def test_shared_heads_say_what_the_host_says_of_hidden_states() -> None:
    host, at = llama()
    ids, _ = prompts(2, padded=False)
    _, trace = pliant.record(causal(host, at))(ids)
    hidden = host(ids, output_hidden_states=True).hidden_states
    for e, depth in zip(trace.exits, (1, 3), strict=False):
        assert torch.equal(e.logits, host.lm_head(host.model.norm(hidden[depth])).transpose(1, 2))


def test_copies_are_their_own_and_threads_do_not_meet() -> None:
    host, at = llama()
    model = causal(host, at, threshold=0.85)
    ids, mask = prompts(4)
    wanted = generate(model, ids, attention_mask=mask, max_new_tokens=10)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in host.parameters():
            p.zero_()
    assert torch.equal(generate(twin, ids, attention_mask=mask, max_new_tokens=10), wanted)
    found: dict[int, Tensor] = {}

    def write(row: int) -> None:
        found[row] = generate(twin, ids[[row]], attention_mask=mask[[row]], max_new_tokens=10)

    threads = [threading.Thread(target=write, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([found[row] for row in range(4)]), wanted)


def test_drawn_texts_repeat_with_their_generator() -> None:
    model = causal(*llama(), threshold=0.85)
    ids, mask = prompts(3)
    texts = [
        generate(
            model, ids, attention_mask=mask, max_new_tokens=9, choose=Sample(torch.Generator().manual_seed(seed), temperature=2.0)
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    drawn = Generator(model, 5, choose=Sample(torch.Generator().manual_seed(0)))
    with FlopCounterMode(display=False) as counter:
        _, trace = pliant.record(drawn)(ids, mask)
    assert int(trace.flops.sum()) == counter.get_total_flops()
    with pytest.raises(PliantError, match="temperature 0"):
        Sample(temperature=0)


def model_of(kind: str, **more: Any) -> Any:
    sizes = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "pad_token_id": 0,
    }  # fmt: skip
    made = getattr(transformers, kind)
    return made(made.config_class(**{**sizes, **more})).eval()


@pytest.mark.parametrize(
    ("kind", "at", "more", "message"),
    [
        ("LlamaForSequenceClassification", "model.layers.0", {}, "which writes no text.*pliant.retrofit.exits"),
        ("LlamaModel", "layers.0", {}, "which writes no text"),
        ("T5ForConditionalGeneration", "encoder.block.0", {"d_model": 32, "num_layers": 2}, "reads an encoder"),
        ("MistralForCausalLM", "model.layers.0", {"num_key_value_heads": 2}, "SlidingWindow.*sliding_window = None"),
        ("BertLMHeadModel", "bert.encoder.layer.0", {}, "reads ahead"),
        ("BloomForCausalLM", "transformer.h.0", {}, "can't be brought to its first layer"),
        (
            "LlamaForCausalLM",
            "model.layers.0",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "scales all positions",
        ),
        ("CohereForCausalLM", "model.layers.0", {"num_key_value_heads": 2}, "says something else"),
    ],
)
def test_hosts_that_cannot_have_them_are_refused(kind: str, at: str, more: Any, message: str) -> None:
    with pytest.raises(PliantError, match=message):
        causal(model_of(kind, **more), [at])


def test_a_window_longer_than_the_texts_can_be_taken_away() -> None:
    host = model_of("MistralForCausalLM", num_key_value_heads=2, sliding_window=None, initializer_range=0.3)
    ids, mask = prompts(3)
    assert torch.equal(
        generate(always(causal(host, ["model.layers.1"])), ids, attention_mask=mask, max_new_tokens=9),
        said(host, ids, mask, 9),
    )


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ([], r"at=\[\]; expected a list"),
        ("model.layers.0", "expected a list of layer names"),
        (["model.layers.9"], "the name 'model.layers.9'.*model.layers"),
        (["model.layers.0.mlp"], "name whole layers"),
        (["model.layers.3"], "without the last one"),
        (["model.layers.2", "model.layers.0"], "in their order"),
    ],
)
def test_layers_that_no_token_can_leave_at_are_refused(at: Any, message: str) -> None:
    with pytest.raises(PliantError, match=message):
        causal(llama()[0], at)


def test_exits_are_attached_once_and_one_head_for_each() -> None:
    host, at = llama()
    with pytest.raises(PliantError, match="1 heads; expected one for each of 2 layers"):
        causal(host, at, heads=[nn.Linear(32, WORDS)])
    with pytest.raises(PliantError, match="attached once"):
        causal(causal(host, at), at)
    with pytest.raises(PliantError, match=r"pliant\.retrofit\.causal"):
        exits(host, at, example={"input_ids": prompts(3)[0], "use_cache": False})
    host.set_attn_implementation("eager")
    host.config._attn_implementation = "paged|eager"
    with pytest.raises(PliantError, match="attention by"):
        causal(host, at)


def test_what_cannot_be_continued_is_refused() -> None:
    host, at = llama()
    model = causal(host, at)
    ids, mask = prompts(3)
    for write in (generate, speculate):
        with pytest.raises(PliantError, match="without exits for tokens"):
            write(host, ids)
        with pytest.raises(PliantError, match="padding on the left"):
            write(model, ids, attention_mask=mask.flip(1))
        with pytest.raises(PliantError, match="a token in each row"):
            write(model, ids, attention_mask=torch.zeros_like(mask))
        with pytest.raises(PliantError, match="a mask of shape"):
            write(model, ids, attention_mask=mask[:, 1:])
        with pytest.raises(PliantError, match="at least one token"):
            write(model, ids[:, :0])
        with pytest.raises(PliantError, match="max_new_tokens=0"):
            write(model, ids, max_new_tokens=0)
    for more in ({"at": 2}, {"at": -1}, {"drafts": 0}):
        with pytest.raises(PliantError, match="one of 2 exits"):
            speculate(model, ids, **more)
    with pytest.raises(PliantError, match="without exits for tokens"):
        generate(exits(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), ["0"], example=torch.randn(2, 4)), ids)


def test_an_empty_batch_stays_empty() -> None:
    model = causal(*llama())
    ids = torch.zeros(0, 4, dtype=torch.int64)
    assert generate(model, ids, max_new_tokens=3).shape == (0, 7)
    assert speculate(model, ids, max_new_tokens=3).ids.shape == (0, 7)
