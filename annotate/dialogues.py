"""Dialogues that go on, and prompts of one's own: the paper's annotators wrote theirs."""

import secrets

from starlette.responses import Response

from puna.annotate.supply import Supply
from puna.annotate.visits import Visit, sentence, to
from puna.core.errors import UserError
from puna.core.text.chat import Message, check_dialogue
from puna.trainers.annotations.items import KINDS, add_item, dialogue_in
from puna.trainers.annotations.verdicts import last_verdict


def ask_own(visit: Visit, problem: str = "") -> Response:
    """The page on which a prompt is written; its nonce makes that a second send adds nothing."""
    supply_of(visit)
    said = visit.form or {"nonce": secrets.token_urlsafe(16)}
    return visit.page("own.html", 422 if problem else 200, said=said, kinds=KINDS, problem=problem)


def own(visit: Visit) -> Response:
    """A prompt of one's own becomes an item for who wrote it."""
    kind, nonce = visit.form.get("kind", ""), visit.form.get("nonce", "")
    if kind not in KINDS or not nonce:
        raise ValueError("what was sent is no form of this page")
    try:
        add(visit, kind, f"own:{visit.who}:{nonce}", [asked(visit)])
    except ValueError as error:
        return ask_own(visit, sentence(error))
    return to("/")


def asked(visit: Visit) -> Message:
    return {"role": "user", "content": visit.form.get("text", "").strip()}


def may_go_on(visit: Visit) -> bool:
    """Whether the dialogue that was judged last can be replied to."""
    return chosen_dialogue(visit) is not None


def chosen_dialogue(visit: Visit) -> tuple[int, str, list[Message], int] | None:
    """(verdict, kind, dialogue with the chosen answer, item) of this person's last verdict; None
    where it was skipped, is long enough, or nobody answers."""
    last = last_verdict(visit.desk.store, visit.who)
    if visit.desk.supply is None or last is None or last["chosen"] is None:
        return None
    item = visit.desk.store.row("SELECT kind, messages FROM item WHERE id = ?", last["item"])
    answer = visit.desk.store.row(
        "SELECT text FROM answer WHERE item = ? AND side = ?", last["item"], last["chosen"]
    )
    assert item is not None and answer is not None  # what was judged is there
    messages = dialogue_in(item)
    if sum(message["role"] == "user" for message in messages) >= visit.desk.turns:
        return None
    said: Message = {"role": "assistant", "content": answer["text"]}
    return last["id"], item["kind"], [*messages, said], last["item"]


def ask_more(visit: Visit, problem: str = "") -> Response:
    """The dialogue with the chosen answer, and room for a reply."""
    found = chosen_dialogue(visit)
    if found is None:
        return to("/")
    verdict, _, messages, _ = found
    return visit.page(
        "continue.html",
        422 if problem else 200,
        messages=messages,
        verdict=verdict,
        said=visit.form,
        problem=problem,
    )


def go_on(visit: Visit) -> Response:
    """The reply makes the dialogue's next item, for the same person; once for a verdict."""
    found = chosen_dialogue(visit)
    if found is None or visit.form.get("verdict") != str(found[0]):
        raise UserError("this dialogue was left or undone in another tab; here is the next one")
    verdict, kind, messages, item = found
    try:
        add(visit, kind, f"continue:{verdict}", [*messages, asked(visit)], parent=item)
    except ValueError as error:
        return ask_more(visit, sentence(error))
    return to("/")


def add(
    visit: Visit, kind: str, source: str, messages: list[Message], parent: int | None = None
) -> None:
    """An item that this person waits for; raises ValueError where it cannot be answered."""
    supply = supply_of(visit)
    check_dialogue(messages)
    supply.check_prompt(messages)
    store = visit.desk.store
    with store.writing() as db:
        made = add_item(
            store, supply.batch, kind, source, messages, reserved=visit.who, parent=parent
        )
        if made is not None:
            db.execute("UPDATE batch SET expected = expected + 1 WHERE number = ?", (supply.batch,))
    visit.prod()


def supply_of(visit: Visit) -> Supply:
    if visit.desk.supply is None:
        raise UserError("no model answers here; the server is started with --models to have some")
    return visit.desk.supply
