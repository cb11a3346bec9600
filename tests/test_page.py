"""The page in a real browser and through its API: the shipped model, no stand-ins."""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from iteris_sd import bases, formats, limits, restoring
from tests.browser import CHROMIUM, chromium, running

WAIT = 120_000  # milliseconds: the first request loads the models, and a busy machine is slow
SCORES = r"text \d\.\d\d\s*dog \d\.\d\d\s*barn \d\.\d\d\s*least \d\.\d\d"
DOG = bases.ASSETS / "concepts" / "dog" / "lora.safetensors"

pytestmark = pytest.mark.skipif(
    not (bases.ASSETS / "concepts" / "dog" / "concept.json").exists(),
    reason="the shipped concepts are not there",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app as a person starts it, on a free port."""
    with running(tmp_path_factory.mktemp("app")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    page = opened(browser, address)
    yield page
    page.close()


def opened(browser, address: str, width: int = 1440, height: int = 1000):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.locator(".picker .card").first.wait_for()
    return page


def quick(page, seeds: str, steps: int, *methods: str) -> None:
    """As little work as shows the whole road; of the methods only those named, where some are."""
    page.locator("#seeds textarea, #seeds input").fill(seeds)
    page.get_by_label("number input for Steps").fill(str(steps))
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("number input for Calibration samples").fill("2")
    for name in ("Base model", "Linear", "IterIS") if methods else ():
        if name not in methods:
            page.locator("#methods").get_by_label(name, exact=True).uncheck()


def compose(page) -> None:
    page.locator("#go").click()


def ended(page) -> str:
    """Wait for the end, good or bad, and return what the page says of it."""
    said = page.locator("#progress .ended, #progress .problem")
    said.wait_for()
    return said.inner_text()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def remove(page) -> None:
    """Remove the concept that is chosen; once is not enough."""
    page.get_by_role("button", name="Remove", exact=True).click()
    page.get_by_role("button", name="Remove for good?").click()


def picked(page) -> list[str]:
    return page.locator(".picker .use").evaluate_all("items => items.map(item => item.dataset.name)")


@pytest.mark.browser
def test_eight_concepts_can_be_picked_in_order(page):
    assert page.locator(".picker .card").count() == 8
    assert page.locator(".picker .card[aria-pressed=true] .name").all_inner_texts() == [
        "Lucky the barn",
        "Biscuit the dog",
    ]
    page.locator(".card[data-name=dog]").click()
    page.locator(".card[data-name=flower]").click()
    page.locator(".card[data-name=dog]").press("Enter")
    assert picked(page) == ["barn", "flower", "dog"]
    places = {
        name: page.locator(f".card[data-name={name}] .place").inner_text()
        for name in ("barn", "flower", "dog")
    }
    assert places == {"barn": "{0}", "flower": "{1}", "dog": "{2}"}


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1440, 960), (390, 844)])
def test_cards_say_all_of_it_however_many_there_are(browser, address, size):
    page = opened(browser, address, *size)
    cut = "cards => cards.filter(card => card.scrollHeight > card.clientHeight).length"
    cards = page.locator(".picker .card")
    assert cards.evaluate_all(cut) == 0
    page.locator(".picker .cards").evaluate(
        "cards => { const all = [...cards.children]; for (let k = 0; k < 2; k++) "
        "for (const card of all) cards.append(card.cloneNode(true)); }"
    )
    assert cards.count() == 24 and cards.evaluate_all(cut) == 0
    page.close()


@pytest.mark.browser
def test_concepts_can_be_searched(page):
    page.get_by_label("Search concepts by name, trigger or class").fill("disco glass")
    shown = page.locator(".picker .card:visible")
    assert shown.count() == 1 and "sunglasses" in shown.inner_text().lower()
    assert page.locator(".picker .told").inner_text() == "1 of 8"


@pytest.mark.browser
def test_chips_put_places_into_the_prompt_and_what_is_missing_is_told(page):
    prompt = page.locator("#prompt textarea")
    prompt.fill("")
    page.get_by_role("button", name="{1} Lucky the barn").click()
    assert prompt.input_value() == "{1}"
    page.locator("#read").get_by_text("Not in the prompt: Biscuit the dog.").wait_for()
    prompt.fill("a {0} and a {1} <lora:dog:0.8>")
    page.locator("#read").get_by_text("pick the LoRA as a concept instead").wait_for()


@pytest.mark.browser
def test_a_concept_that_is_switched_off_is_drawn_by_its_class_noun(page):
    page.get_by_label("Use Biscuit the dog").uncheck()
    page.locator("#read").get_by_text(re.compile(r"Reads: a dog next to a <\w+> barn")).wait_for()
    quick(page, "3", 1, "Linear")
    compose(page)
    assert ended(page) == "Done: 1 picture."
    with page.expect_download() as got:
        page.get_by_role("button", name="Recipe (JSON)").click()
    recipe = json.loads(Path(got.value.path()).read_text())
    assert [use["name"] for use in recipe["concepts"]] == ["barn"]
    assert recipe["prompt"].startswith("a dog next to a {0}")


@pytest.mark.browser
def test_weights_and_block_weights_of_a_card_reach_the_recipe(page):
    dog = page.locator(".use[data-name=dog]")
    dog.get_by_label("Weight").first.fill("1.5")
    dog.get_by_text("Block weights").click()
    dog.get_by_label("U-Net, middle").fill("0.5")
    quick(page, "3", 1, "Linear")
    compose(page)
    ended(page)
    with page.expect_download() as got:
        page.get_by_role("button", name="Recipe (JSON)").click()
    use = json.loads(Path(got.value.path()).read_text())["concepts"][0]
    assert use["weight"] == 1.5 and use["blocks"]["mid"] == 0.5 and use["blocks"]["up"] == 1


@pytest.mark.browser
def test_examples_and_sets_fit_the_picked_concepts(page):
    page.locator("#sets").get_by_role("button", name="Dog and sunglasses").click()
    page.locator(".use[data-name=sunglasses]").wait_for()
    assert picked(page) == ["dog", "sunglasses"]
    page.get_by_role("button", name="a {0} wearing {1} on the beach").click()
    read = page.locator("#read")
    read.get_by_text("wearing").wait_for()
    assert re.search(r"a <\w+> dog wearing <\w+> sunglasses on the beach", read.inner_text())


@pytest.mark.browser
def test_a_ticked_method_says_what_it_does_and_shows_its_parameters(page):
    assert page.locator("#told dt").all_inner_texts() == ["Base model", "Linear", "IterIS"]
    assert page.get_by_role("button", name="TIES: parameters").count() == 0
    page.get_by_label("TIES", exact=True).check()
    page.locator("#told").get_by_text("elects a sign").wait_for()
    assert page.locator("#told dt").all_inner_texts() == ["Base model", "Linear", "TIES", "IterIS"]
    page.get_by_role("button", name="TIES: parameters").click()
    page.get_by_label("TIES: density").wait_for()
    look = "label => [getComputedStyle(label).fontWeight, getComputedStyle(label.parentNode).backgroundColor]"
    labels = [page.get_by_text(f"TIES: {name}", exact=True) for name in ("density", "majority_sign")]
    assert labels[0].evaluate(look) == labels[1].evaluate(look)


@pytest.mark.browser
def test_dice_roll_as_many_seeds_as_there_were(page):
    page.get_by_role("button", name="Roll dice").click()
    seeds = page.locator("#seeds textarea, #seeds input")
    for _ in range(100):
        if seeds.input_value() != "0, 1, 2, 3":
            break
        time.sleep(0.1)
    rolled = [int(seed) for seed in seeds.input_value().split(",")]
    assert len(set(rolled)) == 4 and rolled != [0, 1, 2, 3]


@pytest.mark.browser
def test_compose_fills_a_grid_of_seeds_by_methods(page):
    quick(page, "3", 2)
    compose(page)
    assert ended(page) == "Done: 3 pictures."
    assert page.locator("#grid thead th").all_inner_texts() == ["Base model", "Linear", "IterIS"]
    captions = page.locator("#grid figcaption").all_inner_texts()
    assert len(captions) == 3
    assert all("seed 3" in caption and re.search(SCORES, caption) for caption in captions)
    shown = page.locator("#grid td img")
    assert all(shown.nth(k).evaluate("image => image.naturalWidth") == 128 for k in range(3))
    assert "IterIS, seed 3" in shown.nth(2).get_attribute("alt")
    assert page.locator("#summary table").first.locator("tbody tr").count() == 3
    assert "Scored by" in page.locator("#summary").inner_text()
    page.get_by_text("Further scores").click()
    fits = "tables => tables.every(table => table.scrollWidth <= table.clientWidth)"
    assert page.locator("#summary .wide:visible").evaluate_all(fits)
    for layout in ("diffusers", "kohya"):
        with page.expect_download() as download:
            page.locator("#lora-file").click()
        names = zipfile.ZipFile(download.value.path()).namelist()
        assert "dog-barn-iteris.safetensors" in names
        assert sum("dog-barn-iteris.embeddings/" in name for name in names) == 2
        if layout == "diffusers":
            page.get_by_label("File layout", exact=True).click()
            page.get_by_role("option", name="kohya: A1111, Forge, ComfyUI").click()
            page.wait_for_timeout(2000)


@pytest.mark.browser
def test_pictures_are_sorted_filtered_enlarged_and_laid_over_each_other(page):
    quick(page, "3, 4", 1, "Base model", "Linear")
    compose(page)
    assert ended(page) == "Done: 4 pictures."
    page.locator("#grid select").select_option("text")
    captions = page.locator("#grid .sorted figcaption").all_inner_texts()
    text = [float(re.findall(r"text (\d\.\d\d)", caption)[0]) for caption in captions]
    assert len(text) == 4 and text == sorted(text, reverse=True)
    page.locator("#grid fieldset").get_by_label("Linear").uncheck()
    assert page.locator("#grid .sorted figure").count() == 2
    page.locator("#grid .enlarge").first.click()
    dialog = page.get_by_role("dialog")
    assert "Base model" in dialog.inner_text() and "closest part" in dialog.inner_text()
    first = dialog.locator("img").get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert dialog.locator("img").get_attribute("src") != first
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    page.get_by_text("Compare two pictures").click()
    page.locator("#compared img").first.wait_for()
    assert page.locator("#compared img").count() == 2


@pytest.mark.browser
def test_strength_and_retention_are_drawn_without_a_new_merge_and_repeated(page):
    quick(page, "3", 1, "Linear")
    compose(page)
    ended(page)
    page.get_by_text("Strength, and retention").click()
    page.get_by_label("number input for Strength of the merged LoRA").fill("0.5")
    retention = page.get_by_label("number input for Retention")
    assert retention.get_attribute("max") == "1"  # of one seed
    retention.fill("1")
    retention.press("Tab")
    page.wait_for_timeout(500)  # the sliders tell their values
    page.locator("#again").click()
    page.locator("#retained tbody th").first.wait_for()
    page.locator("#progress").get_by_text("Done: 5 pictures.").wait_for()
    assert page.locator("#retained thead th").all_inner_texts() == ["Its own LoRA", "Linear"]
    assert page.locator("#retained tbody th").all_inner_texts() == ["dog, seed 3", "barn, seed 3"]
    assert page.locator("#retained figure").count() == 4
    tab(page, "History")
    newest = page.locator("#past .entry").first
    newest.get_by_text("5 pictures, strength 0.5").wait_for()
    newest.get_by_role("button", name="Repeat").click()
    page.locator("#progress").get_by_text("Done: 5 pictures.").wait_for()
    carried = page.locator("#notice").get_by_text("This recipe also sets strength 0.5, retention 1")
    carried.wait_for()
    assert page.locator("#retained figure").count() == 4
    page.get_by_label("Base model").first.click()
    page.get_by_role("option", name="Stable Diffusion v1.5", exact=True).click()
    carried.wait_for(state="detached")


@pytest.mark.browser
def test_an_empty_prompt_is_told_in_one_sentence(page):
    page.locator("#prompt textarea").fill("  ")
    compose(page)
    assert ended(page) == "The prompt is empty; say what the picture should show."
    assert page.locator("#go").is_enabled()


@pytest.mark.browser
def test_stop_keeps_what_is_finished(page):
    quick(page, "0, 1, 2, 3", 60, "Base model", "Linear")
    compose(page)
    page.locator("#grid figure img").first.wait_for()
    page.locator("#stop").click()
    said = ended(page)
    told = re.fullmatch(r"Stopped\. (\d) of 8 pictures finished\.", said)
    assert told is not None, said
    assert page.locator("#grid figure img").count() == int(told[1]) >= 1
    assert page.locator("#go").is_enabled()


@pytest.mark.browser
def test_a_page_that_is_loaded_anew_says_where_the_finished_pictures_are(page):
    assert not page.locator("#left").is_visible()
    quick(page, "61, 62, 63, 64", 60, "Base model", "Linear")
    compose(page)
    page.locator("#grid figure img").first.wait_for()
    page.reload()
    page.locator("#left").get_by_text("under History").wait_for()
    tab(page, "History")
    page.locator("#past .entry").first.get_by_text("stopped before the end").wait_for()
    page.reload()
    page.locator(".picker .card").first.wait_for()
    assert not page.locator("#left").is_visible()


@pytest.mark.browser
def test_a_link_reopens_the_recipe(page, browser, address):
    quick(page, "7, 8", 1, "Linear")
    page.locator(".card[data-name=cat]").click()
    page.locator("#prompt textarea").fill("a {2} between a {0} and a {1}")
    compose(page)
    ended(page)
    link = page.locator(".recipe-link").get_attribute("href")
    other = opened(browser, f"{address}/{link}")
    other.locator(".use[data-name=cat]").wait_for()
    assert picked(other) == ["dog", "barn", "cat"]
    assert other.locator("#prompt textarea").input_value() == "a {2} between a {0} and a {1}"
    assert other.locator("#seeds textarea, #seeds input").input_value() == "7, 8"
    assert not other.locator("#methods").get_by_label("IterIS", exact=True).is_checked()
    other.goto(f"{address}/?recipe=aNonsense")
    other.locator("#notice").get_by_text("link").wait_for()  # told in a sentence, and the page is there
    other.locator(".picker .card").first.wait_for()
    other.close()


@pytest.mark.browser
def test_a_picture_restores_its_recipe(page, browser, address, tmp_path):
    quick(page, "11", 1, "Linear")
    page.locator("#prompt textarea").fill("a {0} beside a {1} in the snow")
    compose(page)
    ended(page)
    with page.expect_download() as got:
        page.get_by_role("button", name="Pictures (zip)").click()
    with zipfile.ZipFile(got.value.path()) as archive:
        picture = Path(archive.extract("linear_seed11.png", tmp_path))
    assert restoring.from_picture(picture).seeds == (11,)
    other = opened(browser, address)
    tab(other, "History")
    other.locator("#restore input[type=file]").set_input_files(picture)
    other.locator("#prompt textarea").wait_for()
    other.wait_for_function(
        "document.querySelector('#prompt textarea').value === 'a {0} beside a {1} in the snow'"
    )
    assert other.locator("#seeds textarea, #seeds input").input_value() == "11"
    other.close()


@pytest.mark.browser
def test_a_picture_dropped_anywhere_restores_its_recipe_and_a_strange_one_is_told(page, tmp_path):
    strange = tmp_path / "strange.png"
    Image.new("RGB", (8, 8)).save(strange)
    content = list(strange.read_bytes())
    page.evaluate(
        """bytes => {
            const held = new DataTransfer();
            held.items.add(new File([new Uint8Array(bytes)], 'strange.png', { type: 'image/png' }));
            document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: held, bubbles: true, cancelable: true }));
        }""",
        content,
    )
    page.locator("#notice").get_by_text("strange.png carries no recipe").wait_for()


@pytest.mark.browser
def test_the_history_reopens_compares_repeats_and_deletes(page):
    for seed in ("21", "22"):
        page.locator("#seeds textarea, #seeds input").fill(seed)
        if seed == "21":
            quick(page, seed, 1, "Linear")
        compose(page)
        page.wait_for_function("document.querySelector('#progress .progress') !== null")
        ended(page)
    tab(page, "History")
    page.locator("#past .entry").nth(1).wait_for()
    before = page.locator("#past .entry").count()
    page.locator("#past .entry input").nth(0).check()
    page.locator("#past .entry input").nth(1).check()
    page.get_by_role("button", name="Compare the two").click()
    page.locator(".side-by-side section").nth(1).wait_for()
    assert page.locator(".side-by-side img").count() == 2
    page.locator("#past .entry").nth(1).get_by_role("button", name="Open").click()
    page.locator("#progress").get_by_text("From the history: 1 picture.").wait_for()
    assert page.locator("#seeds textarea, #seeds input").input_value() == "21"
    assert page.locator("#grid figure").count() == 1
    tab(page, "History")
    page.locator("#past .entry").first.get_by_role("button", name="Repeat").click()
    page.locator("#progress").get_by_text("Done: 1 picture.").wait_for()
    assert page.locator("#seeds textarea, #seeds input").input_value() == "22"
    tab(page, "History")
    page.wait_for_function(f"document.querySelectorAll('#past .entry').length === {before + 1}")
    page.locator("#past .entry").first.get_by_role("button", name="Delete").click()
    page.get_by_text("Delete for good?").click()
    page.wait_for_function(f"document.querySelectorAll('#past .entry').length === {before}")


@pytest.mark.browser
def test_why_shows_figures_and_tables(page):
    quick(page, "3", 1)
    tab(page, "Why")
    page.get_by_role("button", name="Look inside this merge").click()
    page.locator("#why-told .ended").wait_for()
    assert "have to be merged" in page.locator("#why-told").inner_text()
    for name in ("discrepancy", "balance", "change"):
        image = page.locator(f"#why-{name} img")
        image.wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300
    assert page.locator("#why-tables table").count() == 4


@pytest.mark.browser
def test_two_visitors_neither_see_nor_stop_each_other(browser, address):
    first, second = opened(browser, address), opened(browser, address)
    quick(first, "31, 32", 15, "Base model", "Linear")
    quick(second, "33", 1, "Linear")
    compose(first)
    first.wait_for_function("document.querySelector('#progress .progress') !== null")
    compose(second)
    assert ended(second) == "Done: 1 picture."
    assert ended(first) == "Done: 4 pictures."
    assert "seed 33" in second.locator("#grid figcaption").inner_text()
    assert "seed 33" not in first.locator("#grid").inner_text()
    first.close()
    second.close()


@pytest.mark.browser
def test_what_waits_says_how_many_are_before_and_can_be_stopped(browser, address):
    first, second = opened(browser, address), opened(browser, address)
    quick(first, "51, 52, 53, 54", 60, "Base model", "Linear")
    quick(second, "55", 1, "Linear")
    compose(first)
    first.locator("#progress").get_by_text("Picture 1").wait_for()
    compose(second)
    second.locator("#progress").get_by_text("Waiting for its turn: 1 before you.").wait_for()
    second.locator("#stop").click()
    assert ended(second) == "Stopped. 0 of 1 picture finished."
    tab(first, "History")
    first.locator("#past .entry").first.wait_for()
    first.locator("#past .entry").first.get_by_role("button", name="Open").click()
    first.locator("#past-told").get_by_text("A composition is at work").wait_for()
    tab(first, "Compose")
    first.locator("#stop").click()
    assert "of 8 pictures finished" in ended(first)
    first.close()
    second.close()


@pytest.mark.browser
def test_a_page_that_is_closed_frees_the_work(browser, address):
    first, second = opened(browser, address), opened(browser, address)
    quick(first, ", ".join(str(seed) for seed in range(40, 56)), 100, "Base model", "Linear")
    quick(second, "45", 1, "Linear")
    compose(first)
    first.locator("#progress").get_by_text("Picture 1").wait_for()
    first.close()
    since = time.monotonic()
    compose(second)
    assert ended(second) == "Done: 1 picture."
    assert time.monotonic() - since < 60
    second.close()


@pytest.mark.browser
def test_it_composes_by_keyboard_alone(page):
    quick(page, "3", 1, "Linear")
    page.get_by_label("Search concepts by name, trigger or class").focus()
    for _ in range(12):  # from the search to the card of the cat, and pick it
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.name") == "cat":
            break
    page.keyboard.press("Enter")
    assert picked(page) == ["dog", "barn", "cat"]
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a {2} next to a {0} and a {1}")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    page.keyboard.press("Enter")
    assert ended(page) == "Done: 1 picture."


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_finding_of_axe_in_our_markup(browser, address, theme):
    """Gradio's own markup is scanned too; what is found there is not ours, and only told."""
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, f"{address}/?__theme={theme}")
    quick(page, "3", 1, "Base model", "Linear")
    compose(page)
    ended(page)
    page.get_by_text("Compare two pictures").click()
    ours, theirs = [], set()
    for name in ("Compose", "Why", "History", "Concepts"):
        tab(page, name)
        page.wait_for_timeout(500)
        for finding in Axe().run(page).response["violations"]:
            for node in finding["nodes"]:
                target = " ".join(str(part) for part in node["target"])
                own = page.evaluate(
                    """target => { const node = document.querySelector(target);
                    return !!node && !!node.closest('.picker, .grid, .past, .html-container, .prose, #header'); }""",
                    node["target"][0] if isinstance(node["target"][0], str) else node["target"][0][0],
                )
                if own and finding["impact"] in ("serious", "critical"):
                    ours.append((name, finding["id"], target, node["html"][:120]))
                elif not own:
                    theirs.add((finding["id"], finding["impact"]))
    print("In Gradio's own markup:", sorted(theirs))
    assert ours == []
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("content", ["text", "pointer", "page"])
def test_a_file_that_is_no_lora_is_refused_in_one_sentence(page, tmp_path, content):
    file = tmp_path / "mine.safetensors"
    file.write_bytes(
        {
            "text": b"not a model at all",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n",
            "page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
        }[content]
    )
    tab(page, "Concepts")
    page.locator("#own input[type=file]").first.set_input_files(file)
    page.locator("#own").get_by_text("mine").first.wait_for()
    page.get_by_role("button", name="Keep concept").click()
    page.locator("#own-told .problem").wait_for()
    assert "mine.safetensors" in page.locator("#own-told").inner_text()
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="A new one").click()
    page.locator("#own-told .problem").wait_for(state="detached")
    tab(page, "Compose")
    assert page.locator(".picker .card").count() == 8


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 390, 3840])
def test_the_page_fits_a_phone_and_a_large_screen(browser, address, width):
    page = opened(browser, address, width, 844)
    for name in ("Compose", "Why", "History", "Concepts"):
        page.evaluate(
            "name => [...document.querySelectorAll('[role=tab]')].find(t => t.textContent.trim() === name).click()",
            name,
        )
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.browser
def test_on_a_phone_sliders_stand_below_each_other_and_labels_cover_nothing(browser, address):
    page = opened(browser, address, 390, 844)
    steps, guidance = (
        page.get_by_label(f"number input for {name}").bounding_box() for name in ("Steps", "Guidance")
    )
    assert guidance["y"] > steps["y"] + steps["height"]
    tab(page, "History")
    label = page.locator("#restore label").bounding_box()
    icon = page.locator("#restore [data-testid=upload-icon]").bounding_box()
    assert label["y"] + label["height"] <= icon["y"]
    page.close()


def test_the_api_composes(address):
    grid, archive, loras, summary, recipe = Client(address, verbose=False).predict(
        concepts=["dog", "barn"],
        prompt="a {0} next to a {1} on the beach",
        methods=["base", "linear"],
        seeds="7",
        steps=2,
        api_name="/compose",
    )
    assert Image.open(grid).width > 256
    with zipfile.ZipFile(archive) as packed:
        told = {"recipe.json", "scores.json", "scores.csv"}
        assert set(packed.namelist()) == {"base_seed7.png", "linear_seed7.png", *told}
        assert "iteris_sd" in Image.open(packed.open("linear_seed7.png")).info
    assert [Path(file).name for file in loras] == ["dog-barn-linear-diffusers.zip"]
    assert recipe["seeds"] == [7] and recipe["steps"] == 2
    assert summary["scorer"] and len(summary["pictures"]) == 2


def test_two_calls_of_one_program_do_not_stop_each_other(address):
    client = Client(address, verbose=False)
    given = {"methods": ["base"], "steps": 12, "api_name": "/compose"}
    calls = [client.submit(["dog"], "a {0}", seeds=[seed], **given) for seed in (1, 2)]
    for seed, call in zip((1, 2), calls, strict=True):
        _, archive, _, summary, _ = call.result(120)
        assert [one["seed"] for one in summary["pictures"]] == [seed]
        assert f"base_seed{seed}.png" in zipfile.ZipFile(archive).namelist()


def test_the_api_holds_the_bounds(address):
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match=f"Choose between 1 and {limits.MAX_SEEDS} seeds, not 17"):
        client.predict(["dog"], "a {0}", seeds=list(range(17)), api_name="/compose")
    with pytest.raises(AppError, match="There is no concept 'unicorn'"):
        client.predict(["unicorn"], "a {0}", methods=["base"], seeds=[0], api_name="/compose")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"concepts": None}, "concepts should be names in a list, or with commas between them, not None"),
        ({"concepts": [1]}, "concepts should be names in a list"),
        ({"methods": 3}, "methods should be names in a list"),
        ({"weights": 2}, "as many weights in a list, or none, not 2"),
        ({"weights": [1.0, 2.0]}, "For 1 concepts there should be as many weights"),
        ({"parameters": [1]}, "parameters should be a table, such as .*iteris.*, not"),
        ({"parameters": {"alpha": 1}}, "parameters should be a table, such as .*iteris.*, not 1"),
        ({"parameters": {"iteris": {"alpha": 1}}}, "'iteris', which is not among the methods asked for"),
    ],
)
def test_the_api_says_what_is_wrong_with_what_it_is_given(address, given, message):
    told = {"concepts": "dog", "prompt": "a {0}", "methods": "base", "seeds": 0} | given
    with pytest.raises(AppError, match=message):
        Client(address, verbose=False).predict(**told, api_name="/compose")


def test_no_reference_column_can_be_merged(address):
    with pytest.raises(AppError, match="There is no merging method 'base'"):
        Client(address, verbose=False).predict(["dog", "barn"], method="base", api_name="/merge")


@pytest.mark.browser
def test_a_concept_of_ones_own_is_guessed_kept_picked_changed_and_removed(page, tmp_path):
    file = tmp_path / "my_dog.safetensors"
    shutil.copyfile(DOG, file)
    page.get_by_role("button", name="Add a concept of your own").click()
    page.locator("#own input[type=file]").first.set_input_files(file)
    page.locator("#own-told").get_by_text("guessed from the file").wait_for()
    assert page.locator("#own").get_by_label("Title").input_value() == "my dog"
    page.locator("#own").get_by_label("Trigger").fill("sks dog")
    page.locator("#own").get_by_label("Class noun").fill("dog")
    page.get_by_role("button", name="Keep concept").click()
    page.locator("#own-told").get_by_text("Kept: my dog.").wait_for()
    tab(page, "Compose")
    card = page.locator(".card[data-name=my-dog]")
    card.wait_for()
    assert card.get_attribute("aria-pressed") == "true" and "sks dog" in card.inner_text()

    page.reload()  # it is there next time
    page.locator(".card[data-name=my-dog]").wait_for()
    tab(page, "Concepts")
    page.get_by_label("Concept", exact=True).click()
    page.get_by_role("option", name="my dog (Storybook)").click()
    page.locator("#inside").get_by_text("text_encoder: 18 layers of rank 12").wait_for()
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="my dog", exact=True).click()
    page.get_by_role("button", name="Remove").wait_for()
    assert page.locator("#own").get_by_label("Trigger").input_value() == "sks dog"
    with page.expect_download() as got:
        page.get_by_role("button", name="Export (zip)").click()
    assert "my-dog/lora.safetensors" in zipfile.ZipFile(got.value.path()).namelist()
    page.locator("#own").get_by_label("Trigger").fill("rex dog")
    page.get_by_role("button", name="Keep concept").click()
    page.locator("#own-told").get_by_text("Kept: my dog.").wait_for()
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="my dog", exact=True).click()
    remove(page)
    page.locator("#own-told").get_by_text("Removed: my dog.").wait_for()
    tab(page, "Compose")
    assert page.locator(".picker .card").count() == 8


@pytest.mark.browser
def test_tokens_and_zips_are_brought_and_tokens_added_later(page, tmp_path):
    for name in ("sks", "fur"):
        formats.write_embedding(tmp_path / f"{name}.safetensors", f"<{name}>", torch.ones(1, 128))
    formats.write(tmp_path / "peft", formats.read(DOG).lora, layout="peft")
    shutil.make_archive(str(tmp_path / "wolf"), "zip", tmp_path / "peft")
    lora = Path(shutil.copyfile(DOG, tmp_path / "hound.safetensors"))
    tab(page, "Concepts")

    def keep(title: str, *files: Path) -> None:
        page.locator("#own input[type=file]").first.set_input_files(files)
        page.locator("#own").get_by_text(files[-1].stem).first.wait_for()
        page.get_by_role("button", name="Keep concept").click()
        page.locator("#own-told").get_by_text(f"Kept: {title}").wait_for()

    keep("hound", lora, tmp_path / "sks.safetensors")
    page.get_by_label("Add or change").click()
    page.get_by_role("option", name="hound", exact=True).click()
    page.get_by_role("button", name="Remove").wait_for()
    page.get_by_label("Concept", exact=True).click()
    page.get_by_role("option", name="hound (Storybook)").click()
    page.locator("#inside dd", has_text="sks").wait_for()
    keep("hound", tmp_path / "fur.safetensors")
    page.locator("#inside").get_by_text("fur, sks").wait_for()
    keep("wolf", tmp_path / "wolf.zip")
    for name in ("hound", "wolf"):
        page.get_by_label("Add or change").click()
        page.get_by_role("option", name=name, exact=True).click()
        remove(page)
        page.locator("#own-told").get_by_text(f"Removed: {name}.").wait_for()


@pytest.mark.browser
def test_the_page_begins_with_a_base_model_at_a_path(browser, tmp_path):
    (tmp_path / "mine").symlink_to(bases.ASSETS / "storybook")
    with running(tmp_path / "app", "-m", "iteris_sd", "app", "--base", str(tmp_path / "mine")) as (url, _):
        page = opened(browser, url)
        assert page.get_by_label("Base model").first.input_value() == "mine"
        quick(page, "3", 1, "Linear")
        compose(page)
        assert ended(page) == "Done: 1 picture."
        assert str(tmp_path / "mine") not in page.content()
        page.close()


@pytest.mark.browser
def test_another_base_model_brings_its_own_concepts_and_settings(page):
    page.get_by_label("Base model").first.click()
    page.get_by_role("option", name="Stable Diffusion v1.5", exact=True).click()
    page.locator("#base-told").get_by_text("Not on this machine yet").wait_for()
    assert "2.7 GB" in page.locator("#base-told").inner_text()
    assert page.locator(".picker .card").count() == 0
    assert page.get_by_label("number input for Steps").input_value() == str(bases.find("sd15").steps)
    lacking = page.locator("#sets").get_by_role("button", name="(lacks dog, barn)")
    page.locator("#sets").get_by_text("(lacks ").first.wait_for()
    for _ in range(5):
        if lacking.count():
            break
        page.locator("#sets .paginate button").last.click()
    lacking.first.click()
    page.locator("#notice").get_by_text("needs concepts that you do not have for this base model").wait_for()
