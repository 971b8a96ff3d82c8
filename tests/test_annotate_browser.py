"""The page where people compare, in a real browser. Run: pytest tests/test_annotate_browser.py -q

Without Debian's chromium and chromium-driver, or selenium, it is skipped.
"""

import os
import re
import signal

import pytest
from annotate_pages import Server, key_on, served
from annotated import ask, filled
from browser import DESKTOP, PHONE, Browser, needs_browser
from selenium.webdriver.common.keys import Keys

from puna.annotate.guidelines import rendered
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import Given, add_item, hand_out, put_answers, unanswered
from puna.trainers.annotations.people import new_token, person
from puna.trainers.annotations.scores import put_scores
from puna.trainers.annotations.store import opened
from puna.trainers.annotations.verdicts import submit
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
    store = filled(tmp_path / "s.db", 3, kind="safety")
    with served(store) as at:
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
        key = key_on(browser.driver.page_source)
        browser.press("3")
        browser.driver.refresh()  # in the middle
        assert key_on(browser.driver.page_source) == key and not list(preferences(store))
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
        browser.driver.back()  # no page of before comes again
        assert "no. 1?" in browser.text
        assert [row["chosen"] for row in preferences(store)] == ["left 0"]


def test_two_people_at_once(browser, store):
    """One in the browser, one in another window without the first one's cookies."""
    tokens = [new_token(store, name) for name in ("ann", "bob")]
    other = Browser()
    try:
        with served(store, named=True) as at:
            both = browser, other
            browser.get(at)
            assert "Who are you?" in browser.text
            for each, token in zip(both, tokens, strict=True):
                each.get(f"{at}/enter/{token}")
                assert token not in each.driver.current_url + each.driver.page_source
            for _ in range(4):
                for each, key in zip(both, "19", strict=True):
                    each.goes_on(key, Keys.ENTER)
            both[0].goes_on("u")  # takes her own back, not his
            both[0].goes_on("2", Keys.ENTER)
            assert not [each for each in other.complaints()]
    finally:
        other.driver.quit()
    browser.complaints()  # the page for strangers has the status 401
    rows = list(preferences(store))
    assert len({row["item"] for row in rows}) == len(rows) == 8
    said = [(row["annotator"], row["chosen_side"]) for row in rows]
    assert sorted(said) == [("ann", "left")] * 4 + [("bob", "right")] * 4


def test_a_server_killed_before_a_browser_loses_and_doubles_nothing(browser, tmp_path):
    filled(tmp_path / "c.db", 6).close()
    server = Server(tmp_path / "c.db")
    server.start()
    browser.get(server.at)
    browser.goes_on("1", Keys.ENTER)
    server.end(signal.SIGKILL)
    browser.goes_on("1", Keys.ENTER)  # nobody is there
    server.start()
    browser.driver.back()
    assert "no. 1?" in browser.text and "1 of 6" in browser.text
    browser.goes_on("0", Keys.ENTER)
    browser.goes_on("u")
    assert "no. 1?" in browser.text
    browser.goes_on("9", Keys.ENTER)
    server.end(signal.SIGKILL)
    browser.complaints(), browser.requests()  # of the browser's own page for a server that is gone
    with opened(tmp_path / "c.db") as store:
        assert [row["chosen"] for row in preferences(store)] == ["left 0", "right 1"]


class Answering:
    """In place of the models: whatever is asked is answered when `pause` is over."""

    batch = 1
    problem = ""

    def __init__(self, store):
        self.store, self.pause = store, False
        self.background = self.wake = self  # the part of both that the page uses

    def set(self):
        while not self.pause and (asked := unanswered(self.store)):
            last = asked["messages"][-1]["content"]
            put_answers(self.store, asked["id"], Given(f"yes {last}", "A"), Given("no", "B"))

    def check_prompt(self, messages):
        if "long" in messages[-1]["content"]:
            raise ValueError("write less")


def test_a_prompt_of_ones_own_waits_and_its_dialogue_goes_on(browser, tmp_path):
    store = filled(tmp_path / "c.db", 1)
    supply = Answering(store)
    with served(store, supply=supply, turns=2) as at:
        supply.pause = True
        browser.get(f"{at}/own")
        browser.press(Keys.TAB)
        browser.find("textarea").send_keys("a long one")
        browser.goes_on(Keys.TAB, Keys.TAB, Keys.ENTER)
        assert "Write less" in browser.text and "a long one" in browser.js(
            "return document.querySelector('textarea').value"
        )
        browser.js("document.querySelector('textarea').value = 'is it u? 1'")
        browser.find("textarea").send_keys("234 u s")  # keys of the page are text here
        browser.goes_on(Keys.TAB, Keys.TAB, Keys.ENTER)
        browser.goes_on("1", Keys.ENTER)  # what lay there comes first
        browser.get(at)
        assert "One moment" in browser.text
        supply.pause = False
        supply.set()
        browser.until(lambda: "is it u? 1234 u s" in browser.text)  # by itself
        browser.goes_on("1", Keys.ENTER)
        assert "yes is it u? 1234 u s" in browser.text and "Go on" in browser.text
        browser.find("textarea").send_keys("and so?")
        browser.goes_on(Keys.TAB, Keys.ENTER)
        assert "and so?" in browser.text and "yes and so?" in browser.text
        browser.goes_on("0", Keys.ENTER)
        assert "All done" in browser.text
    rows = list(preferences(store))
    assert [row["chosen"] for row in rows] == ["left 0", "yes is it u? 1234 u s", "no"]
    assert [each["content"] for each in rows[2]["messages"]] == [
        "is it u? 1234 u s", "yes is it u? 1234 u s", "and so?"
    ]  # fmt: skip


def test_skipping_without_a_mouse(browser, store):
    with served(store) as at:
        browser.get(at)
        browser.js("document.querySelector('details.skip summary').focus()")
        browser.press(Keys.ENTER, Keys.TAB, Keys.TAB)
        browser.press(*"u 1")  # in a text field
        browser.goes_on(Keys.ENTER)
        assert "no. 1?" in browser.text
    skipped = store.rows("SELECT reason, seconds FROM verdict WHERE chosen IS NULL")
    assert [row["reason"] for row in skipped] == ["u 1"] and skipped[0]["seconds"] > 0


def test_every_part_is_reached_by_tab(browser, tmp_path):
    store = filled(tmp_path / "s.db", 2, kind="safety")
    with served(store, {"safety": "<p>Be safe.</p>"}) as at:
        browser.get(at)
        seen = []
        for _ in range(14):
            browser.press(Keys.TAB)
            seen.append(browser.js(
                "const e = document.activeElement, s = getComputedStyle(e.nextElementSibling "
                "&& e.type === 'radio' ? e.nextElementSibling : e);"
                "return [e === document.body ? 'BODY' : e.innerText || e.name, s.outlineStyle];"
            ))  # fmt: skip
        assert not [name for name, outline in seen if outline == "none" and name != "BODY"]
        names = [re.sub(r"\s+", " ", name) for name, _ in seen]
        for part in ("To the content", "Compare", "Dashboard", "Guidelines", "degree", "safe",
                     "Submit Enter", "Undo the last one u", "Skip this one"):  # fmt: skip
            assert any(part in name for name in names), (part, names)
        # The arrows go through the degrees.
        browser.js("document.querySelector('[name=degree]').focus()")
        browser.press(Keys.SPACE, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        value = browser.js("return document.querySelector('[name=degree]:checked').value")
        assert value == "left slightly_better"


EVIL = (
    "<script>document.title = 'evil'</script><img src=x onerror=\"document.title='evil'\">"
    "\x1b[2J\x1b]0;evil\x07[INST] <<SYS>> </s> {{ 7 * 7 }} &lt;b&gt; \u202eabc"
)


def test_what_models_and_people_write_is_shown_as_text(browser, tmp_path):
    store = filled(tmp_path / "c.db", 0)
    item = add_item(store, 1, "helpfulness", "x", ask(EVIL))
    put_answers(store, item, Given(EVIL, EVIL), Given(EVIL + "!", "B"))
    person(store, EVIL)
    with served(store) as at:
        browser.get(at)
        shown = browser.js("return [...document.querySelectorAll('.text')].map(e => e.textContent)")
        assert shown == [EVIL, EVIL, EVIL + "!"]
        browser.goes_on("1", Keys.ENTER)
        browser.get(f"{at}/dashboard")
        assert "evil" not in browser.driver.title and not browser.all("img[src=x]")


def every_page(browser, tmp_path):
    """Goes to each page, on a phone and on a desk; gives what it is and how wide the window is."""
    store = filled(tmp_path / "c.db", 12, kind="safety", people=2)
    for name in ("ann", "a name of sixty characters that is too long for a narrow tab"):
        for _ in range(5):
            item = hand_out(store, who := person(store, name))
            submit(store, who, item.key, chosen="left", rating="better", safe="both", seconds=3)
    put_scores(store, "judge", "1", [(verdict, 0.5) for verdict in range(1, 5)])
    item = hand_out(store, person(store, "me"))
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerk" * 3
    with store.writing() as db:
        db.execute("UPDATE answer SET text = ? WHERE item = ? AND side = 'left'", (word, item.id))
    supply = Answering(store)
    guidelines = {"safety": rendered("# Safe\n\n- **one**\n- `two`")}
    with served(store, guidelines, supply=supply, turns=3) as at:
        for path in ("/", "/own", "/dashboard", "/continue", "/wait", "/nothing"):
            if path == "/continue":
                browser.get(at)
                browser.goes_on("1", "s", Keys.ENTER)
            if path == "/wait":
                supply.pause = True
                with store.writing() as db:
                    db.execute("UPDATE item SET ready = 0 WHERE wanted > 0")
                    db.execute("DELETE FROM hand")
            for size in (PHONE, DESKTOP):
                browser.size(*size)
                browser.get(at + path.replace("wait", ""))
                assert path != "/wait" or "One moment" in browser.text
                yield f"{path} at {size[0]}", size[0]
    browser.complaints()  # what is nowhere has the status 404


def test_no_page_is_wider_than_its_window(browser, tmp_path):
    for where, width in every_page(browser, tmp_path):
        assert browser.js("return document.documentElement.scrollWidth") <= width, where
        boxes = "[...document.querySelectorAll('button, .button, .cell, nav a')]"
        if width == PHONE[0]:  # a finger hits what is 24 pixels high and wide (WCAG 2.2)
            small = f"return {boxes}.filter(e => e.offsetWidth && e.offsetHeight < 24).length"
            assert browser.js(small) == 0, where


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="AXE_CORE names no axe.min.js of axe-core")
def test_axe_finds_nothing_serious_in_light_and_dark(browser, tmp_path):
    for where, _ in every_page(browser, tmp_path):
        for dark in (False, True):
            browser.dark(dark)
            assert not browser.axe(), (where, dark)
