"""The evaluation at any thresholds, and the page written from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pliant
from pliant.insight.evaluation import Evaluation, Point, exits_at, random_exits, summary
from pliant.insight.report import write_report


def evaluation(rows: int = 40, exits: int = 3, seed: int = 0, classes: tuple[str, ...] = ("a", "b", "c")) -> Evaluation:
    g = torch.Generator().manual_seed(seed)
    return Evaluation(
        torch.rand(exits - 1, rows, generator=g),
        torch.randint(len(classes), (exits, rows), generator=g),
        torch.randint(len(classes), (rows,), generator=g),
        torch.arange(1, exits + 1) * 1000,
        exits * 1000,
        classes,
        torch.rand(rows, 1, 8, 8, generator=g),
    )


@given(
    st.integers(0, 99),
    st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2),
    st.integers(0, 1),
    st.floats(0, 1, width=32),
)
def test_raising_a_threshold_never_raises_the_cost(seed, thresholds, which, more):
    e = evaluation(seed=seed)
    before = summary(e, thresholds)
    thresholds[which] += more
    after = summary(e, thresholds)
    assert after.mean_flops <= before.mean_flops
    assert sum(after.histogram) == 40


def test_the_ends_of_the_dial_and_nan():
    e = evaluation()
    assert (exits_at(e, [float("-inf")] * 2) == 2).all()
    assert (exits_at(e, [float("inf")] * 2) == 0).all()
    e.scores[0, 0] = float("nan")
    assert exits_at(e, [float("inf")] * 2)[0] == 1
    assert random_exits(e, (40, 0, 0)) == pytest.approx((e.predicted[0] == e.labels).double().mean().item())


def test_mistakes_are_told():
    e = evaluation()
    with pytest.raises(pliant.PliantError, match="threshold"):
        summary(e, [0.5])
    with pytest.raises(pliant.PliantError):
        Evaluation(e.scores, e.predicted[:, :3], e.labels, e.flops, 3000, e.classes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"predicted": torch.zeros(3, 0, dtype=torch.int64)}, "not empty"),
        ({"scores": torch.zeros(2, 39)}, "scores of shape"),
        ({"scores": torch.zeros(2, 40, dtype=torch.float64)}, "float32 or narrower"),
        ({"scores": torch.full((2, 40), 1.5)}, "outside"),
        ({"labels": torch.full((40,), 3)}, "classes 0 to 2"),
        ({"flops": torch.tensor([3, 2, 1])}, "never fall"),
        ({"images": torch.full((40, 1, 8, 8), 2.0)}, "undo the normalisation"),
        ({"images": torch.zeros(40, 4, 8, 8)}, "grey or colour"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(change, match):
    with pytest.raises(pliant.PliantError, match=match):
        replace(evaluation(), **change)


def test_a_threshold_that_is_nan_is_refused():
    with pytest.raises(pliant.PliantError, match="NaN"):
        exits_at(evaluation(), [0.5, float("nan")])


@given(st.integers(0, 99), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_random_exits_is_the_mean_over_assignments(seed, thresholds):
    e = evaluation(seed=seed)
    histogram = summary(e, thresholds).histogram
    exits = torch.repeat_interleave(torch.arange(3), torch.tensor(histogram))
    right = (e.predicted == e.labels).double()
    # Every cyclic shift of one assignment puts every sample once at every place: their mean is the expectation.
    shifts = [right.gather(0, exits.roll(k)[None]).mean() for k in range(40)]
    assert random_exits(e, histogram) == pytest.approx(torch.stack(shifts).mean().item())


def test_page_of_ten_thousand_colour_images_and_many_classes_stays_small(tmp_path):
    g = torch.Generator().manual_seed(0)
    e = Evaluation(
        torch.rand(6, 10_000, generator=g),
        torch.randint(300, (7, 10_000), generator=g),
        torch.randint(300, (10_000,), generator=g),
        torch.arange(1, 8) * 10**7,
        7 * 10**7,
        tuple(f"class {c}" for c in range(300)),
        torch.rand(10_000, 3, 32, 32, generator=g),  # noise: the worst case for PNG
    )
    path = write_report(tmp_path / "page.html", e, [], curve=[[0.9] * 6, [0.5] * 6, [0.1] * 6], title="T")
    assert path.stat().st_size < 3_000_000


def test_page_is_whole_self_contained_and_escaped(tmp_path):
    e = evaluation(classes=("<b>a</b>", "</script>", "c"))
    path = tmp_path / "page.html"
    write_report(
        path,
        e,
        [Point("50% </script><script>alert(1)", 0.5, (0.5, 0.5))],
        curve=[[1.0, 1.0], [0.0, 0.0]],
        title="<i>T</i>",
    )
    page = path.read_text(encoding="utf-8")
    assert "<i>T</i>" not in page
    assert "<script>alert(1)" not in page
    assert page.count("</script>") == page.count("<script")
    for outside in ("http://", "https://", 'src="//', "@import", "url(http"):
        assert outside not in page.replace("http://www.w3.org/2000/svg", "")
    assert list(tmp_path.iterdir()) == [path]


def test_page_refuses_an_empty_dial_and_a_missing_folder(tmp_path):
    with pytest.raises(pliant.PliantError):
        write_report(tmp_path / "page.html", evaluation(), [], curve=[], title="T")
    with pytest.raises(pliant.PliantError):
        write_report(tmp_path / "no" / "page.html", evaluation(), [], curve=[[0.5, 0.5]], title="T")
    assert list(tmp_path.iterdir()) == []
