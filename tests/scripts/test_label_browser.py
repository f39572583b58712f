"""The page of `mbrl label` in a real browser: what is pressed is what is on the disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbrl.spaces import box
from mbrl.text_rows import TextRow
from mbrl.training.answer_store import AnswerStore
from mbrl.training.text_data import write_text
from tests.scripts.test_label import TOKEN, Page, make_store, segments, serve

pytest.importorskip("selenium", reason='needs selenium, of the extra "dev"')
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs the Debian packages chromium and chromium-driver"
)
SCREENSHOTS = os.environ.get("MBRL_SCREENSHOTS", "")
HOSTILE = (
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu",
        "window-size=1200,820", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
        "disable-background-networking", "disable-component-update", "no-first-run",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


class Person:
    """Looks at the page and presses what is on it."""

    def __init__(self, browser: webdriver.Chrome, page: Page) -> None:
        self.browser, self.page = browser, page
        browser.get_log("browser")  # those of the test before
        browser.get(f"http://127.0.0.1:{page.port}/?token={TOKEN}")

    def until(self, fact: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, 20, 0.02).until(lambda _: fact())

    def sees(self, query: str) -> None:
        """Wait until a question is shown and takes an answer."""
        body = self.browser.find_element(By.TAG_NAME, "body")
        self.until(
            lambda: (
                body.get_attribute("data-query") == query
                and (body.get_attribute("data-ready") == "yes" or not query)
            )
        )

    def press(self, key: str) -> None:
        ActionChains(self.browser).send_keys(key).perform()

    def click(self, text: str) -> None:
        self.button(text).click()

    def button(self, text: str) -> Any:
        found = [
            x for x in self.browser.find_elements(By.TAG_NAME, "button")
            if x.is_displayed() and x.text.startswith(text)
        ]  # fmt: skip
        assert len(found) == 1, text
        return found[0]

    def text(self, name: str) -> str:
        return self.browser.find_element(By.ID, name).text

    def ranks(self) -> dict[str, Any]:
        return {label.query: label.rank for label in self.page.store.read_labels().labels}

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def complaints(self) -> list[Any]:
        return [x for x in self.browser.get_log("browser") if x["level"] == "SEVERE"]


def films(seed: int = 0, options: int = 2, size: int = 64) -> np.ndarray:
    """A square that moves over a background, in frames [K, T, H, W, 3]."""
    frames = np.full((options, 20, size, size, 3), (40, 60, 90), np.uint8)
    for k in range(options):
        for t in range(20):
            x = (t * 2 + 9 * (k + seed)) % (size - 12)
            frames[k, t, 20 : 32, x : x + 12] = (250, 200, 60 + 60 * k)  # fmt: skip
    return frames


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    store = make_store(tmp_path / "run" / "comparisons")
    for seed in range(4):
        store.add_query(segments(seed), films(seed))
    with serve(store, "ada <b>") as served:
        yield served


@pytest.fixture
def person(browser: webdriver.Chrome, page: Page) -> Person:
    return Person(browser, page)


def test_keys_and_buttons(person):
    person.sees("00000000")
    person.screenshot("films")
    person.press(Keys.ARROW_LEFT)
    person.sees("00000001")
    assert person.ranks() == {"00000000": (0, 1)}
    assert person.text("progress") == "1 of 4 answered"
    person.click("Right is better")
    person.sees("00000002")
    assert person.ranks()["00000001"] == (1, 0)
    assert person.page.store.labels()[-1].by == "ada <b>"
    person.click("Undo")
    person.sees("00000001")
    assert "00000001" not in person.ranks()
    person.press(Keys.SPACE)  # not the button that was clicked before
    person.sees("00000002")
    assert person.ranks()["00000001"] == (0, 0)
    person.press("s")
    person.sees("00000003")
    assert person.ranks()["00000002"] is None
    assert person.text("progress") == "3 of 4 answered, 1 of them skipped"
    person.press("z")
    person.sees("00000002")
    person.press("t")
    person.sees("00000003")
    assert person.ranks()["00000002"] == (0, 0)
    person.press(Keys.BACKSPACE)
    person.sees("00000002")
    person.press(Keys.ARROW_RIGHT)
    person.sees("00000003")
    person.click("Equally good")
    person.sees("")
    assert person.ranks() == {
        "00000000": (0, 1), "00000001": (0, 0), "00000002": (1, 0), "00000003": (0, 0),
    }  # fmt: skip
    assert "waits for the next question" in person.text("waiting")
    person.screenshot("waiting")
    person.page.store.add_query(segments(4))
    person.sees("00000004")
    person.click("Skip")
    person.sees("")
    assert person.ranks()["00000004"] is None
    assert person.complaints() == []


def test_a_double_click_or_a_held_key_answers_once(person):
    person.sees("00000000")
    ActionChains(person.browser).double_click(person.button("Left is better")).perform()
    person.sees("00000001")
    assert person.ranks() == {"00000000": (0, 1)}
    # What is pressed when a question has just appeared was meant for the one before.
    early = "new MutationObserver(() => setTimeout(() => document.body.dispatchEvent(new "
    early += "KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true})), 100)).observe("
    early += "document.body, {attributeFilter: ['data-query']})"
    person.browser.execute_script(early)
    person.press(Keys.ARROW_LEFT)
    person.sees("00000002")
    assert person.ranks() == {"00000000": (0, 1), "00000001": (0, 1)}
    held = "for (let i = 0; i < 9; i++) document.body.dispatchEvent(new KeyboardEvent('keydown', "
    held += "{key: 'ArrowRight', bubbles: true, repeat: true}))"
    person.browser.execute_script(held)
    time.sleep(0.3)
    assert len(person.ranks()) == 2


def test_what_somebody_else_has_answered_is_not_answered_again(person):
    person.sees("00000000")
    person.page.store.add_label("00000000", [1, 0], by="bob")
    person.press(Keys.ARROW_LEFT)
    person.sees("00000001")
    assert person.ranks() == {"00000000": (1, 0)}


def test_a_moment_without_the_server_loses_nothing(browser, tmp_path):
    store = make_store(tmp_path / "store")
    store.add_query(segments())
    with serve(store) as page:
        person = Person(browser, page)
        person.sees("00000000")
    person.press(Keys.ARROW_LEFT)
    person.until(lambda: "does not answer" in person.text("message"))
    assert store.labels() == []


def test_text_is_shown_as_text(browser, tmp_path):
    name = "<b>x</b><script>document.title='broken'</script>"
    space = {name: box(-1, 1, (2,)), "speed": box(-1, 1, (2,))}
    store = make_store(tmp_path / "a <i>b", space=space)
    store.add_query(segments(space=space), captions=[HOSTILE, "second\nline"])
    with serve(store, "<script>document.title='broken'</script>") as page:
        person = Person(browser, page)
        person.sees("00000000")
        person.screenshot("lines")
        captions = browser.find_elements(By.TAG_NAME, "figcaption")
        assert [x.text for x in captions] == [HOSTILE, "second\nline"]
        assert "<i>b" in person.text("footer") and "<script>" in person.text("footer")
        assert browser.title == "Which is better?"
        assert len(browser.find_elements(By.CSS_SELECTOR, "script, img, b, i")) == 1
        # A script that gets into the page all the same is not run.
        inject = "const s = document.createElement('script'); s.textContent = arguments[0]; "
        browser.execute_script(inject + "document.body.append(s)", "document.title = 'broken'")
        assert browser.title == "Which is better?"
        assert any("Content Security Policy" in x["message"] for x in person.complaints())


def test_three_are_put_in_order(browser, tmp_path):
    store = make_store(tmp_path / "store", options=3)
    for seed in range(3):
        store.add_query(segments(seed, 3), films(seed, 3))
    with serve(store) as page:
        person = Person(browser, page)
        person.sees("00000000")
        person.press("2")
        person.until(lambda: person.button("Place 1"))
        person.screenshot("order")
        person.press("2")  # is picked already
        person.press("z")  # not that one, after all
        assert len(browser.find_elements(By.CSS_SELECTOR, "figure.picked")) == 0
        person.press("3")
        person.press("1")
        person.sees("00000001")
        assert person.ranks() == {"00000000": (1, 2, 0)}
        buttons = browser.find_elements(By.CSS_SELECTOR, "button.choice")
        buttons[1].click()
        buttons[0].click()
        person.sees("00000002")
        assert person.ranks()["00000001"] == (1, 0, 2)
        person.press("t")
        person.sees("")
        assert person.ranks()["00000002"] == (0, 0, 0)


def test_answers_are_ranked_with_every_kind_of_tie(browser, tmp_path):
    questions = tmp_path / "questions.jsonl"
    answers = (HOSTILE, "two\nlines", "", " ".join(["fourth"] * 60))
    rows = [TextRow(f"say {i} {HOSTILE}", answers) for i in range(5)]
    write_text(questions, "questions", rows)
    with serve(AnswerStore(questions)) as page:
        person = Person(browser, page)
        keys = {
            "21=3": (1, 0, 1, 2),  # the second, then two alike, then what is left
            "4=1t": (0, 1, 1, 0),  # two alike, and so is the rest
            "3t": (1, 1, 0, 1),
            "3==14": (1, 3, 0, 2),  # "=" twice is none
            "1=z2=43": (2, 0, 1, 0),
        }
        for i, (pressed, rank) in enumerate(keys.items()):
            person.sees(f"{i:08d}")
            assert person.text("prompt") == f"say {i} {HOSTILE}"
            if i == 0:
                captions = browser.find_elements(By.TAG_NAME, "figcaption")
                assert [x.text for x in captions] == [*answers]
                assert browser.find_elements(By.TAG_NAME, "canvas") == []
                person.screenshot("answers")
            for key in pressed:
                person.press(key)
            person.sees(f"{i + 1:08d}" if i < 4 else "")
            assert person.ranks()[f"{i:08d}"] == rank
        person.click("Undo")
        person.sees("00000004")
        buttons = browser.find_elements(By.CSS_SELECTOR, "button.choice")
        buttons[0].click()
        person.click("The next is as good")
        assert [x.text for x in buttons] == ["Place 11", "As good2", "As good3", "As good4"]
        buttons[1].click()
        person.click("The rest are equally good")
        person.sees("")
        assert person.ranks()["00000004"] == (0, 0, 1, 1)
        assert person.complaints() == []
