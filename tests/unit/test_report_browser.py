"""The page in a real browser: moving the slider shows what Python computed for those thresholds."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from test_report import evaluation

from pliant.insight.evaluation import Point, random_exits, summary
from pliant.insight.report import write_report

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver, which aren't installed"
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1600",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def value(browser, testid: str) -> float:
    return float(browser.find_element("css selector", f'[data-testid="{testid}"]').get_attribute("data-value"))


def test_slider_recomputes_what_python_computes(browser, tmp_path):
    e = evaluation(rows=500, seed=3)
    e.scores[0, :5] = float("nan")
    g = torch.Generator().manual_seed(1)
    steps = torch.rand(9, 2, generator=g).sort(0, descending=True).values
    curve = [[float("inf")] * 2, *steps.tolist(), [float("-inf")] * 2]
    page = write_report(tmp_path / "page.html", e, [Point("middle", 0.5, tuple(curve[4]))], curve=curve, title="Test")
    browser.get(page.as_uri())
    for position in (0, 1, 5, 9, 10, 3):
        browser.execute_script(
            "const s = document.querySelector('[data-testid=slider]'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input', {bubbles: true}));",
            position,
        )
        expected = summary(e, curve[position])
        # Equal, not close: float32 comparisons, exact sums and one division on both sides.
        assert value(browser, "accuracy") == expected.accuracy
        assert value(browser, "mean-flops") == expected.mean_flops
        assert value(browser, "share") == expected.share_of_dense
        assert value(browser, "random") == random_exits(e, expected.histogram)
        for k, count in enumerate(expected.histogram):
            assert value(browser, f"exit-count-{k}") == count
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_slider_obeys_the_keyboard(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    e = evaluation(rows=200, seed=4)
    curve = [[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]]
    browser.get(
        write_report(tmp_path / "page.html", e, [Point("cheap", 0.3, (1.0, 1.0))], curve=curve, title="Test").as_uri()
    )
    slider = browser.find_element("css selector", "[data-testid=slider]")
    slider.send_keys(Keys.HOME)
    assert value(browser, "mean-flops") == summary(e, curve[0]).mean_flops
    slider.send_keys(Keys.ARROW_RIGHT)
    assert value(browser, "mean-flops") == summary(e, curve[1]).mean_flops
    slider.send_keys(Keys.END)
    assert value(browser, "mean-flops") == summary(e, curve[2]).mean_flops


def test_scores_on_the_threshold_leave_in_the_page_too(browser, tmp_path):
    e = evaluation(rows=100, seed=5)
    tied = tuple(e.scores[:, 7].tolist())  # float32 numbers met exactly
    browser.get(write_report(tmp_path / "page.html", e, [Point("tied", None, tied)], curve=[tied], title="T").as_uri())
    for k, count in enumerate(summary(e, tied).histogram):
        assert value(browser, f"exit-count-{k}") == count


def test_pictures_are_the_extremes_of_their_exit(browser, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    e = evaluation(rows=300, seed=6)
    point = (0.4, 0.6)
    browser.get(write_report(tmp_path / "p.html", e, [Point("p", 0.5, point)], curve=[point], title="T").as_uri())
    first = '[data-testid="easiest-0"] canvas, [data-testid="hardest-0"] canvas'
    shown = WebDriverWait(browser, 30).until(lambda b: b.find_elements("css selector", first))
    named = [int(canvas.get_attribute("aria-label").split(":")[0].removeprefix("Sample ")) for canvas in shown]
    order = [n for n in e.scores[0].argsort().tolist() if e.scores[0, n] <= point[0]]
    assert named == order[:8] + order[:-9:-1]
    colour = browser.execute_script(
        "return [...arguments[0].getContext('2d').getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 === 0)",
        shown[0],
    )
    assert colour == (e.images[order[0], 0] * 255).round().int().flatten().tolist()


def test_every_exit_shows_pictures_all_along_the_dial(browser, tmp_path):
    g = torch.Generator().manual_seed(7)
    wish = torch.rand(5000, generator=g)
    scores = [wish * (1 - 0.1 * k) + 0.1 * torch.randn(5000, generator=g) for k in range(5)]  # fall from exit to exit
    e = replace(evaluation(rows=5000, exits=6, seed=7), scores=torch.stack(scores).clamp(0, 1))
    curve = [[1 - k / 40] * 5 for k in range(1, 40)]
    browser.get(write_report(tmp_path / "p.html", e, [Point("p", 0.5, (0.5,) * 5)], curve=curve, title="T").as_uri())
    for position in range(39):
        browser.execute_script("turn(arguments[0])", position)
        shown = browser.execute_script(
            "return [0, 1, 2, 3, 4, 5].map(k => document.querySelectorAll(`[data-testid$='est-${k}'] canvas`).length)"
        )
        histogram = summary(e, curve[position]).histogram
        assert all(seen >= min(8, count) for seen, count in zip(shown, histogram, strict=True)), (position, shown)


def test_one_exit_and_no_pictures(browser, tmp_path):
    e = evaluation(rows=20, exits=1)
    e = replace(e, images=None)
    browser.get(write_report(tmp_path / "page.html", e, [], curve=[[]], title="T").as_uri())
    assert value(browser, "exit-count-0") == 20
    assert not browser.find_element("id", "pictures").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
