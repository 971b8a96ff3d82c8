"""The page where people compare. Run: python -m pytest tests/test_annotate.py -q

Without the extra `annotate` it is skipped. No browser takes part: what one would send is sent.
"""

import re
import sqlite3

import pytest
from annotate_pages import Elements, key_on, visitor
from annotated import ask, filled

from puna.annotate.agreement import ac2
from puna.annotate.guidelines import rendered
from puna.annotate.statistics import seen
from puna.trainers.annotations.exchange import preferences
from puna.trainers.annotations.items import Given, add_item, hand_out, put_answers
from puna.trainers.annotations.people import new_token, person
from puna.trainers.annotations.verdicts import submit


@pytest.fixture
def store(tmp_path):
    found = filled(tmp_path / "c.db", 24)
    yield found
    found.close()


def test_twenty_comparisons(store):
    client = visitor(store)
    for number in range(20):
        page = client.get("/").text
        assert f"no. {number}?" in page and f"left {number}" in page
        sent = {"key": key_on(page), "degree": "right slightly_better", "seconds": "2.5"}
        assert client.post("/submit", data=sent).url.path == "/"
    rows = list(preferences(store))
    assert [row["chosen"] for row in rows] == [f"right {number}" for number in range(20)]
    assert {row["rating"] for row in rows} == {"slightly_better"}
    assert {row["seconds"] for row in rows} == {2.5}
    assert 'value="20" max="24"' in client.get("/").text


def test_reload_two_tabs_and_undo(store):
    client = visitor(store)
    page = client.get("/").text
    assert key_on(client.get("/").text) == key_on(page)
    sent = {"key": key_on(page), "degree": "left better"}
    other = {**sent, "degree": "right better"}  # of another tab
    for form in (sent, sent, other):
        assert client.post("/submit", data=form).status_code == 200
    assert [row["chosen"] for row in preferences(store)] == ["left 0"]
    again = client.post("/undo").text
    assert "no. 0?" in again and key_on(again) != sent["key"] and not list(preferences(store))
    client.post("/submit", data=sent)  # sent once more, from the history
    assert not list(preferences(store))
    client.post("/submit", data={**other, "key": key_on(again)})
    assert [row["chosen"] for row in preferences(store)] == ["right 0"]


def test_two_people_at_once_get_different_items(store):
    ann, bob = (new_token(store, name) for name in ("ann", "bob"))
    first, second = visitor(store, named=True), visitor(store, named=True)
    pages = [first.get(f"/enter/{ann}").text, second.get(f"/enter/{bob}").text]
    assert key_on(pages[0]) != key_on(pages[1])
    stolen = first.post("/submit", data={"key": key_on(pages[1]), "degree": "left better"})
    assert stolen.status_code == 409 and "no longer lies before you" in stolen.text
    assert not list(preferences(store))


def test_the_fourth_case_is_explained_and_the_choice_stays(tmp_path):
    store = filled(tmp_path / "c.db", 2, kind="safety")
    client = visitor(store)
    key = key_on(client.get("/").text)
    form = {"key": key, "degree": "left better"}
    assert client.post("/submit", data=form).status_code == 422  # safety is asked for
    refused = client.post("/submit", data={**form, "safe": "right"})
    assert refused.status_code == 422 and "would teach that unsafe is better" in refused.text
    elements = Elements(refused.text).found
    chosen = [each["value"] for _, each, _ in elements if "checked" in each]
    assert chosen == ["left better", "right"] and key_on(refused.text) == key
    client.post("/submit", data={**form, "safe": "left"})
    assert [row["safety"] for row in preferences(store)] == ["chosen_safe"]


def test_skipping_needs_a_reason(store):
    client = visitor(store)
    key = key_on(client.get("/").text)
    assert client.post("/skip", data={"key": key}).status_code == 400
    client.post("/skip", data={"key": key, "reason": "both are wrong", "other": " odd "})
    assert "no. 1?" in client.get("/").text and dict(seen(store).reasons) == {"odd": 1}


EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> &amp; {{ 7*7 }}\x1b[2J"


def test_models_and_prompts_are_text_and_never_markup(tmp_path):
    store = filled(tmp_path / "c.db", 0)
    item = add_item(store, 1, "helpfulness", "x", ask(EVIL))
    put_answers(store, item, Given(EVIL, EVIL), Given(EVIL + "!", "B"))
    client = visitor(store)
    page = client.get("/").text
    assert page.count("&lt;script&gt;alert(1)") == 3 and "&amp;amp; {{ 7*7 }}" in page
    client.post("/submit", data={"key": key_on(page), "degree": "left better"})
    client.post("/skip", data={"key": "x", "reason": EVIL})
    for shown in (page, client.get("/dashboard").text):
        elements = Elements(shown).found
        assert "iframe" not in {tag for tag, _, _ in elements}
        images = [each for tag, each, _ in elements if tag == "img"]
        assert [each["src"].split("?")[0] for each in images] == ["/static/icon.svg"]
        assert all("src" in each for tag, each, _ in elements if tag == "script")
        assert not [each for _, each, _ in elements for name in each if name.startswith("on")]
        assert not [each for _, each, _ in elements if "style" in each]
    assert next(iter(preferences(store)))["chosen"] == EVIL  # the export escapes nothing


def test_headers_forbid_what_the_page_does_not_need(store):
    client = visitor(store)
    for path in ("/", "/static/annotate.js", "/nowhere"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert ("no-store" in headers["cache-control"]) == ("static" not in path)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 421), ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "[::1"}, 421), ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
        ({"origin": ""}, 403), ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "file://127.0.0.1:8765"}, 403), ({"origin": "http://[::1"}, 403),
    ],
)  # fmt: skip
def test_other_sites_read_and_change_nothing(store, headers, status):
    client = visitor(store)
    key = key_on(client.get("/").text)
    form = {"key": key, "degree": "left better"}
    answer = client.post("/submit", data=form, headers=headers)
    assert answer.status_code == status and key not in answer.text
    assert not list(preferences(store))
    assert "content-security-policy" in answer.headers


def test_a_post_without_an_origin_is_refused(store):
    client = visitor(store, origin=None)
    form = {"key": key_on(client.get("/").text), "degree": "left better"}
    assert client.post("/submit", data=form).status_code == 403 and not list(preferences(store))


def test_tokens(store):
    token, owner = new_token(store, "ann"), new_token(store, "owner", owner=True)
    client = visitor(store, named=True)
    assert client.get("/").status_code == client.get("/dashboard").status_code == 401
    assert client.get("/enter/wrong").status_code == 401
    entered = client.get(f"/enter/{token}", follow_redirects=False)
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and entered.headers["location"] == "/"
    assert token not in client.get("/").text and client.get("/dashboard").status_code == 409
    mine = visitor(store, named=True)
    assert mine.get(f"/enter/{owner}").status_code == mine.get("/dashboard").status_code == 200
    new_token(store, "ann", renew=True)
    assert client.get("/").status_code == 401


def test_a_locked_file_is_said_and_the_form_can_be_sent_again(store):
    client = visitor(store)
    form = {"key": key_on(client.get("/").text), "degree": "left better"}
    store.connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answer = client.post("/submit", data=form)
    assert answer.status_code == 503 and "locked by another program" in answer.text
    other.execute("ROLLBACK")
    other.close()
    assert client.post("/submit", data=form).status_code == 200
    assert [row["chosen"] for row in preferences(store)] == ["left 0"]


def test_what_is_no_form_is_refused(store):
    client = visitor(store)
    wrong = {b"\xff\xfe": "no form", b"key=%ff": "no form", b"x" * 200_000: "longer"}
    for body, said in wrong.items():
        answer = client.post("/submit", content=body)
        assert answer.status_code == 400 and said in answer.text


def test_pages_can_be_used_without_eyes_or_mouse(tmp_path, store):
    safety = filled(tmp_path / "s.db", 1, kind="safety")
    empty = filled(tmp_path / "e.db", 0)
    pages = [visitor(store).get("/"), visitor(safety).get("/"), visitor(empty).get("/"),
             visitor(store).get("/dashboard"), visitor(store, named=True).get("/")]  # fmt: skip
    for page in pages:
        elements = Elements(page.text).found
        assert [each["lang"] for tag, each, _ in elements if tag == "html"] == ["en"]
        assert [tag for tag, _, _ in elements].count("h1") == 1
        for tag, each, labelled in elements:
            if tag in ("input", "select", "textarea") and each.get("type") != "hidden":
                assert labelled, each
            if tag in ("svg", "progress"):
                assert each["aria-label"]
        identities = [each["id"] for _, each, _ in elements if "id" in each]
        assert len(identities) == len(set(identities))
    keys = [each["data-key"] for _, each, _ in Elements(pages[0].text).found if "data-key" in each]
    assert keys == list("12347890")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_in_light_and_dark(store):
    """WCAG 2.1, contrast of text: 4.5 to 1."""
    css = visitor(store).get("/static/annotate.css").text
    named = re.compile(r"--([\w-]+): (#[0-9a-f]{6})")
    themes = [dict(named.findall(part)) for part in css.split("@media")[:2]]
    for theme in themes:
        pairs = [(ink, ground) for ink in ("ink", "muted", "accent", "alert")
                 for ground in ("ground", "paper")]  # fmt: skip
        for one, other in [*pairs, ("ink", "chosen"), ("on-accent", "accent")]:
            dark, light = sorted((luminance(theme[one]), luminance(theme[other])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (one, other, theme)


def test_guidelines_show_markup_and_obey_none():
    text = "# Help\n\nBe **kind** and `x<y`.\nStill.\n\n- one\n- *two*\n\n1. first\n<b>no</b>"
    html = rendered(text)
    assert html.splitlines() == [
        "<h3>Help</h3>", "<p>Be <strong>kind</strong> and <code>x&lt;y</code>. Still.</p>",
        "<ul><li>one</li><li><em>two</em></li></ul>", "<ol><li>first</li></ol>",
        "<p>&lt;b&gt;no&lt;/b&gt;</p>",
    ]  # fmt: skip
    assert "<script" not in rendered("[x](javascript:alert(1)) `<script>` **<script>**")


def test_agreement_of_a_hand_made_example():
    """Three categories: weights 1, 2/3, 0. Agreement (1 + 2/3 + 1 + 2/3) / 4 = 160/192; shares 3/8,
    1/4, 3/8, so chance is (17/3) / 6 * 21/32 = 119/192; (160 - 119) / (192 - 119) = 41/73."""
    assert ac2([[0, 0], [0, 1], [2, 2], [1, 2]], 3) == pytest.approx(41 / 73)
    assert ac2([[0, 0], [2, 2]], 3) == 1 and ac2([[1]], 3) is None
    # an item of one person counts among the shares alone
    shares = [1.5 / 3, 0.5 / 3, 1 / 3]
    chance = 17 / 18 * sum(share * (1 - share) for share in shares)
    assert ac2([[0, 0], [0, 1], [2]], 3) == pytest.approx((5 / 6 - chance) / (1 - chance))


def test_the_dashboard_counts_what_was_said(tmp_path):
    store = filled(tmp_path / "c.db", 6, people=2)
    said = {"ann": ["left better"] * 6, "bob": ["left better"] * 4 + ["right better"] * 2}
    for name, verdicts in said.items():
        who = person(store, name)
        for verdict in verdicts:
            chosen, rating = verdict.split()
            submit(store, who, hand_out(store, who).key, chosen=chosen, rating=rating, seconds=4)
    found = seen(store)
    assert [(each.name, each.made, each.seconds) for each in found.people] == [
        ("ann", 6, 4), ("bob", 6, 4)
    ]  # fmt: skip
    shares = dict(found.biases + found.duels)
    assert shares["left answer chosen"].share == pytest.approx(10 / 12)
    assert shares["longer answer chosen"].share == pytest.approx(2 / 12)  # "right 0", "left 0"
    assert shares["A (1) preferred to B (2)"].share == pytest.approx(10 / 12)
    narrow, wide = shares["left answer chosen"], shares["A (1) preferred to B (2)"]
    assert wide.high - wide.low > narrow.high - narrow.low  # an item counts once
    items = [[1, 1]] * 4 + [[1, 6]] * 2
    assert found.agreement == pytest.approx(ac2(items, 8)) and found.shared == 6
    page = visitor(store).get("/dashboard").text
    assert "83%" in page and f"{found.agreement:.2f}" in page
    assert page.count("<svg") == 1 + 4 + 3 + 2  # ratings, their legend, shares, times
