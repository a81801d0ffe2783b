"""What fit and Phase refuse, and that the message says what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pliant import PliantError
from pliant.train import Fit, Phase, fit


def points(rows=16):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(x=x, y=x.sum(1, keepdim=True))


def square(y, trace, target, progress):
    return {"square": (y - target).square().mean()}


def run(model=None, data=None, loss=square, phases=None, **kwargs):
    options = Fit(**{"batch_size": 8, "accelerator": "cpu", **kwargs})
    return fit(
        model or nn.Linear(3, 1),
        data or points(),
        loss,
        [Phase("all", 1)] if phases is None else phases,
        options=options,
    )


@pytest.mark.parametrize("kwargs", [
    {"epochs": 0}, {"optimizer": "lion"}, {"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1.0},
    {"optimizer": "adam", "momentum": 0.9}, {"nesterov": True}, {"schedule": "linear"}, {"milestones": (1,)},
    {"schedule": "multistep"}, {"warmup": 5.0}, {"warmup": -1.0}, {"train": "*"}, {"train": ()}, {"clip": 0.0},
])  # fmt: skip
def test_a_phase_that_makes_no_sense(kwargs):
    with pytest.raises(PliantError, match="mend phase 'p'"):
        Phase(**{"name": "p", "epochs": 5, **kwargs})


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"every": 0}])
def test_options_that_make_no_sense(kwargs):
    with pytest.raises(PliantError, match="at least 1"):
        Fit(**kwargs)


def test_empty_or_uneven_data():
    with pytest.raises(PliantError, match="got 0 inputs"):
        run(data=points(0))
    with pytest.raises(PliantError, match="got 2 inputs and 3 targets"):
        run(data=SimpleNamespace(x=torch.zeros(2, 3), y=torch.zeros(3, 1)))


def test_one_row_for_a_batch_norm():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(PliantError, match="batch norm that trains"):
        run(model, points(1))
    run(model, points(1), phases=[Phase("last", 1, train=("2.*",))])


def test_patterns_that_match_nothing():
    with pytest.raises(PliantError, match=r"pattern 'head\.\*'.*'all'.*weight, bias"):
        run(phases=[Phase("all", 1, train=("head.*",))])
    with pytest.raises(PliantError, match="buffer of the model: it has none"):
        run(phases=[Phase("all", 1, anneal={"*.temperature": (5, 1)})])
    with pytest.raises(PliantError, match="no phases"):
        run(phases=[])


@pytest.mark.parametrize("terms", [{}, {"a": torch.zeros(2)}, torch.zeros(()), {"a": 1.0}, None])
def test_a_loss_that_returns_something_else(terms):
    with pytest.raises(PliantError, match="mapping from names to scalar tensors"):
        run(loss=lambda *_: terms)


def test_a_term_with_a_name_of_the_history():
    with pytest.raises(PliantError, match="got a loss term named 'lr'"):
        run(loss=lambda y, *_: {"lr": y.mean()})


def test_a_loss_without_a_gradient():
    with pytest.raises(PliantError, match="no trained parameter changes"):
        run(loss=lambda y, *_: {"a": y.mean().detach()})


def test_a_loss_with_parameters_of_its_own():
    class Loss(nn.Linear):
        def forward(self, y, *_):
            return {"a": super().forward(y).mean()}

    with pytest.raises(PliantError, match="loss with parameters"):
        run(loss=Loss(1, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_is_named_and_the_checkpoint_stays(tmp_path, bad):
    path, calls = tmp_path / "run.ckpt", []

    def loss(y, trace, target, progress):
        calls.append(progress)
        return {"fine": y.mean(), "sick": y.mean() * (bad if len(calls) > 4 else 1.0)}

    with pytest.raises(
        PliantError, match=r"loss term 'sick' in epoch 3 of phase 'all'; the last good state is kept in"
    ):
        run(loss=loss, phases=[Phase("all", 5)], checkpoint=path)
    saved = torch.load(path, weights_only=True)
    assert len(saved["history"]) == 2
    assert torch.isfinite(saved["model"]["state_dict"]["weight"]).all()


def test_a_gradient_that_is_not_finite_in_the_last_step_writes_no_checkpoint(tmp_path):
    def loss(y, trace, target, progress):
        return {"root": ((y - y.detach()).sum()).sqrt()}  # 0, with an infinite slope

    with pytest.raises(PliantError, match="the parameter 'weight' in epoch 1"):
        run(loss=loss, checkpoint=tmp_path / "run.ckpt", batch_size=16)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_found_after_an_error():
    model = nn.Sequential(nn.Linear(3, 1)).eval()
    with pytest.raises(PliantError):
        run(model, loss=lambda y, *_: {"a": y.mean() * float("nan")}, phases=[Phase("all", 1, train=("0.bias",))])
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_precisions_and_devices_that_are_not_here():
    with pytest.raises(PliantError, match="one of auto"):
        run(precision="8-bit")
    if not torch.cuda.is_available():
        with pytest.raises(PliantError, match="without CUDA"):
            run(precision="16-mixed")
        with pytest.raises(PliantError, match="hardware that is here"):
            run(accelerator="cuda")


def test_without_lightning_fabric_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightning_fabric", None)
    with pytest.raises(PliantError, match=r"pip install 'pliant\[train\]'"):
        run()
