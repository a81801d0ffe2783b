"""The page in a real browser: moving the slider shows what Python computed for those thresholds."""

from __future__ import annotations

import shutil

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
        assert value(browser, "accuracy") == pytest.approx(expected.accuracy, abs=1e-12)
        assert value(browser, "mean-flops") == pytest.approx(expected.mean_flops, abs=1e-6)
        assert value(browser, "share") == pytest.approx(expected.share_of_dense, abs=1e-12)
        assert value(browser, "random") == pytest.approx(random_exits(e, expected.histogram), abs=1e-12)
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
    assert value(browser, "mean-flops") == pytest.approx(summary(e, curve[1]).mean_flops)
    slider.send_keys(Keys.END)
    assert value(browser, "mean-flops") == pytest.approx(summary(e, curve[2]).mean_flops)
