"""The page where people compare, in a real browser. Run: pytest tests/test_annotate_browser.py -q

Without Debian's chromium and chromium-driver, or selenium, it is skipped.
"""

import re

import pytest
from annotate_pages import key_on
from annotated import ask, filled
from browser import DESKTOP, PHONE, Browser, needs_browser, served
from selenium.webdriver.common.keys import Keys

from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import Given, add_item, put_answers
from puna.trainers.annotations.people import new_token
from puna.trainers.data.formats import RATINGS

pytestmark = needs_browser
DEGREES = dict(zip("1234", [("left", rating) for rating in RATINGS], strict=True)) | dict(
    zip("0987", [("right", rating) for rating in RATINGS], strict=True)
)


@pytest.fixture(scope="module")
def chromium():
    found = Browser()
    yield found
    found.driver.quit()


@pytest.fixture
def browser(chromium):
    """A browser without a past; after each test nothing was complained about, and nothing asked
    for outside of this machine."""
    chromium.fresh()
    yield chromium
    strangers = [each for each in chromium.requests() if not each.startswith("http://127.0.0.1:")]
    assert not strangers
    # A refused form is answered with status 422 or 409, which the console notes.
    refused = re.compile(r"/(submit|undo|own|continue) - .*status of 4(22|09)")
    assert not [each for each in chromium.complaints() if not refused.search(each)]


@pytest.fixture
def store(tmp_path):
    found = filled(tmp_path / "c.db", 24)
    yield found
    found.close()


def test_twenty_comparisons_by_keyboard_alone(browser, store):
    with served(store) as at:
        browser.get(at)
        keys = "12347890" * 3
        for number in range(20):
            assert f"no. {number}?" in browser.text and f"{number} of 24" in browser.text
            browser.goes_on(keys[number], Keys.ENTER)
        browser.goes_on("u")
        assert "no. 19?" in browser.text
        browser.goes_on("4", Keys.ENTER)
    rows = list(preferences(store))
    assert [(row["chosen_side"], row["rating"]) for row in rows] == [
        DEGREES[key] for key in keys[:19] + "4"
    ]
    assert [row["chosen"] for row in rows[:2]] == ["left 0", "left 1"]
    assert all(0 < row["seconds"] < 30 for row in rows)


def test_safety_labels_by_key_and_the_fourth_case(browser, tmp_path):
    with filled(tmp_path / "s.db", 3, kind="safety") as store, served(store) as at:
        browser.get(at)
        browser.press("2", "s", "s", "s")  # both, only the left, only the right
        browser.goes_on(Keys.ENTER)
        assert "would teach that unsafe is better" in browser.find("[role=alert]").text
        checked = [each.get_attribute("value") for each in browser.all("input:checked")]
        assert checked == ["left better", "right"] and not list(preferences(store))
        browser.goes_on("9", Keys.ENTER)
        browser.press("1", Keys.ENTER)  # without a label nothing is sent
        assert "no. 1?" in browser.text and "1 of 3" in browser.text
        browser.goes_on("s", "s", "s", "s", Keys.ENTER)
        assert [(row["rating"], row["safety"]) for row in preferences(store)] == [
            ("better", "chosen_safe"), ("significantly_better", "both_unsafe")
        ]  # fmt: skip


def test_reload_and_two_tabs_of_one_person(browser, store):
    with served(store) as at:
        browser.get(at)
        browser.press("3")
        browser.goes_on(Keys.F5) if False else browser.get(at)
        key = key_on(browser.driver.page_source)
        first = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        browser.get(at)
        assert key_on(browser.driver.page_source) == key
        browser.goes_on("1", Keys.ENTER)
        assert "no. 1?" in browser.text
        browser.driver.close()
        browser.driver.switch_to.window(first)
        browser.goes_on("9", Keys.ENTER)  # the same item, once more and otherwise
        assert "no. 1?" in browser.text
        browser.driver.back()  # and from the history
        browser.until(lambda: "no. 0?" in browser.text)
        browser.goes_on("8", Keys.ENTER)
        assert [row["chosen"] for row in preferences(store)] == ["left 0"]
