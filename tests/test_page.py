"""The page in a real browser and through its API: the shipped model, no stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from iteris_sd import bases, limits

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
WAIT = 180_000  # milliseconds: the first request loads the models, and a busy machine is slow
SCORES = r"text \d\.\d\d\s+dog \d\.\d\d\s+barn \d\.\d\d"

pytestmark = pytest.mark.skipif(
    not (bases.ASSETS / "concepts" / "dog" / "concept.json").exists(),
    reason="the shipped concepts are not there",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app as a person starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tmp_path_factory.mktemp("app") / "said.txt"
    surroundings = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "ITERIS_SD_DATA": str(said.parent / "data"),
    }
    with said.open("wb") as output:
        app = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=surroundings, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(url, timeout=5)
                break
            except OSError:
                assert app.poll() is None, said.read_text()
                time.sleep(0.2)
        yield url
    finally:
        app.terminate()
        app.wait(30)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator(".picker .card").first.wait_for()
    yield page
    page.close()


def quick(page, seeds: str, steps: int) -> None:
    """As little work as shows the whole road."""
    page.get_by_label("Seeds").fill(seeds)
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("number input for Calibration samples").fill("2")


def compose(page) -> None:
    page.get_by_role("button", name="Compose").click()


def ended(page) -> str:
    """Wait for the end, good or bad, and return what the page says of it."""
    said = page.locator("#progress .ended, #progress .problem")
    said.wait_for()
    return said.inner_text()


@pytest.mark.browser
def test_eight_concepts_can_be_picked_in_order(page):
    cards = page.locator(".picker .card")
    assert cards.count() == 8
    assert page.locator(".picker .card[aria-pressed=true] .name").all_inner_texts() == ["barn", "dog"]
    page.locator(".card[data-name=dog]").click()
    page.locator(".card[data-name=flower]").click()
    page.locator(".card[data-name=dog]").press("Enter")
    places = {
        name: page.locator(f".card[data-name={name}] .place").inner_text()
        for name in ("barn", "flower", "dog")
    }
    assert places == {"barn": "{0}", "flower": "{1}", "dog": "{2}"}


@pytest.mark.browser
def test_examples_fit_the_picked_concepts(page):
    page.locator(".card[data-name=barn]").click()
    page.locator(".card[data-name=sunglasses]").click()
    page.get_by_role("button", name="a {0} wearing {1} on the beach").click()
    read = page.locator("#read")
    read.get_by_text("wearing").wait_for()
    assert re.search(r"a <\w+> dog wearing <\w+> sunglasses on the beach", read.inner_text())


@pytest.mark.browser
def test_a_ticked_method_says_what_it_does(page):
    assert page.locator("#told dt").all_inner_texts() == ["Base model", "Linear", "IterIS"]
    page.get_by_label("TIES", exact=True).check()
    page.locator("#told").get_by_text("elects a sign").wait_for()
    assert page.locator("#told dt").all_inner_texts() == ["Base model", "Linear", "TIES", "IterIS"]


@pytest.mark.browser
def test_compose_fills_a_grid_of_seeds_by_methods(page):
    quick(page, "3", 2)
    compose(page)
    assert ended(page) == "Done: 3 pictures."
    assert page.locator("table.pictures thead th").all_inner_texts() == ["Base model", "Linear", "IterIS"]
    captions = page.locator("table.pictures figcaption").all_inner_texts()
    assert len(captions) == 3
    assert all("seed 3" in caption and re.search(SCORES, caption) for caption in captions)
    shown = page.locator("table.pictures img")
    assert all(shown.nth(k).evaluate("image => image.naturalWidth") == 128 for k in range(3))
    assert "IterIS, seed 3" in shown.nth(2).get_attribute("alt")
    assert page.locator("table.summary tbody tr").count() == 3
    assert "Scored by" in page.locator("#summary").inner_text()
    with page.expect_download() as download:
        page.get_by_role("link", name="LoRA merged by IterIS").or_(
            page.get_by_role("button", name="LoRA merged by IterIS")
        ).first.click()
    names = zipfile.ZipFile(download.value.path()).namelist()
    assert "dog-barn-iteris.safetensors" in names
    assert sum("dog-barn-iteris.embeddings/" in name for name in names) == 2


@pytest.mark.browser
def test_an_empty_prompt_is_told_in_one_sentence(page):
    page.locator("#prompt textarea").fill("  ")
    compose(page)
    assert ended(page) == "The prompt is empty; say what the picture should show."
    assert page.get_by_role("button", name="Compose").is_enabled()


@pytest.mark.browser
def test_stop_keeps_what_is_finished(page):
    quick(page, "0, 1, 2, 3", 25)
    page.get_by_label("IterIS").first.uncheck()
    compose(page)
    page.locator("table.pictures img").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    told = re.fullmatch(r"Stopped\. (\d) of 8 pictures finished\.", ended(page))
    assert told is not None
    assert page.locator("table.pictures img").count() == int(told[1]) >= 1
    assert page.get_by_role("button", name="Compose").is_enabled()


@pytest.mark.browser
def test_a_file_that_is_no_lora_is_refused_in_one_sentence(page, tmp_path):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"not a model at all")
    page.get_by_text("Your own concepts").click()
    page.locator("#own input[type=file]").first.set_input_files(file)
    page.locator("#own").get_by_text("mine").first.wait_for()
    page.get_by_role("button", name="Keep concept").click()
    page.locator("#own-told .problem").wait_for()
    assert "mine.safetensors" in page.locator("#own-told").inner_text()
    assert page.locator(".picker .card").count() == 8


@pytest.mark.browser
def test_the_page_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_api_composes(address):
    files, summary, recipe = Client(address, verbose=False).predict(
        concepts=["dog", "barn"],
        prompt="a {0} next to a {1} on the beach",
        methods=["base", "linear"],
        seeds="7",
        steps=2,
        api_name="/compose",
    )
    names = {Path(file).name: file for file in files}
    assert {"base_seed7.png", "linear_seed7.png", "grid.png", "recipe.json", "pictures.zip"} <= set(names)
    assert "iteris_sd" in Image.open(names["linear_seed7.png"]).info
    assert recipe["seeds"] == [7] and recipe["steps"] == 2
    assert summary["scorer"] and len(summary["pictures"]) == 2


def test_the_api_holds_the_bounds(address):
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match=f"Choose between 1 and {limits.MAX_SEEDS} seeds, not 17"):
        client.predict(["dog"], "a {0}", seeds=list(range(17)), api_name="/compose")
    with pytest.raises(AppError, match="There is no concept 'unicorn'"):
        client.predict(["unicorn"], "a {0}", methods=["base"], seeds=[0], api_name="/compose")


@pytest.mark.browser
def test_a_concept_of_ones_own_is_guessed_kept_picked_changed_and_removed(page, tmp_path):
    file = tmp_path / "my_dog.safetensors"
    shutil.copyfile(bases.ASSETS / "concepts" / "dog" / "lora.safetensors", file)
    page.get_by_text("Your own concepts").click()
    page.locator("#own input[type=file]").first.set_input_files(file)
    page.locator("#own-told").get_by_text("guessed from the file").wait_for()
    assert page.get_by_label("Title").input_value() == "my dog"
    page.get_by_label("Trigger").fill("sks dog")
    page.get_by_label("Class noun").fill("dog")
    page.get_by_role("button", name="Keep concept").click()
    card = page.locator(".card[data-name=my-dog]")
    card.wait_for()
    assert card.get_attribute("aria-pressed") == "true" and "sks dog" in card.inner_text()

    page.reload()  # it is there next time
    page.locator(".card[data-name=my-dog]").wait_for()
    page.get_by_text("Your own concepts").click()
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="my dog").click()
    page.get_by_role("button", name="Remove").wait_for()
    assert page.get_by_label("Trigger").input_value() == "sks dog"
    with page.expect_download() as got:
        page.get_by_role("button", name="Export (zip)").click()
    assert "my-dog/lora.safetensors" in zipfile.ZipFile(got.value.path()).namelist()
    page.get_by_label("Trigger").fill("rex dog")
    page.get_by_role("button", name="Keep concept").click()
    page.locator(".card[data-name=my-dog]").get_by_text("rex dog").wait_for()
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="my dog").click()
    page.get_by_role("button", name="Remove").click()
    page.locator("#own-told").get_by_text("Removed: my-dog.").wait_for()
    assert page.locator(".picker .card").count() == 8


@pytest.mark.browser
def test_another_base_model_brings_its_own_concepts_and_settings(page):
    page.get_by_label("Base model").first.click()
    page.get_by_role("option", name="Stable Diffusion v1.5", exact=True).click()
    page.locator("#base-told").get_by_text("Not on this machine yet").wait_for()
    assert "2.7 GB" in page.locator("#base-told").inner_text()
    assert page.locator(".picker .card").count() == 0
    assert page.get_by_label("number input for Steps").input_value() == str(bases.find("sd15").steps)
    page.get_by_label("Or take a ready-made set").click()
    assert "(lacks dog, barn)" in " ".join(page.get_by_role("option").all_inner_texts())
