"""A slice of the campaigns of `campaign/faults.py` and `campaign/links.py`: one of two ranks is
killed, stands still or loses its link; the other says so and ends, and the run goes on to the bit.
"""

import shutil
import threading

import pytest
from campaign import links
from campaign.faults import RANKS, Fault, armed, befall, emptied, unarmed
from campaign.kills import differences, finish, starter
from tiny import make_tiny

from puna.core import ranks


@pytest.fixture(scope="module")
def start():
    return starter()


def hit_and_continued(fault: Fault, start, tiny, root) -> None:
    """The fault hits, the others end as they should, and the same command ends as without it."""
    notes, out, whole = root / "notes", root / "run", root / "whole"
    code = unarmed(fault.moment, tiny, out)
    finish(start(code.replace(str(out), str(whole)), RANKS))
    hit, wrong = befall(fault, start, tiny, out, notes)
    assert hit and not wrong
    finish(start(code, RANKS))
    assert differences(out, whole) == []


@pytest.mark.parametrize(
    ("moment", "victim", "harm"),
    [
        ("write", 1, "one"),
        ("rollout", 1, "one"),
        pytest.param("step", 0, "one", marks=pytest.mark.slow),
        pytest.param("writes", 0, "all", marks=pytest.mark.slow),
    ],
)
def test_a_rank_killed_in_the_middle_ends_the_other(moment, victim, harm, start, tiny, tmp_path):
    hit_and_continued(Fault(moment, victim, 2, 0.5, harm), start, tiny, tmp_path)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Models that two ranks can cut."""
    return make_tiny(tmp_path_factory.mktemp("halves"), n_kv_heads=2)


@pytest.mark.parametrize(
    ("moment", "victim", "harm"),
    [
        ("tp-rollout", 1, "one"),
        pytest.param("tp-step", 0, "one", marks=pytest.mark.slow),
        pytest.param("tp-writes", 0, "all", marks=pytest.mark.slow),
    ],
)
def test_of_two_ranks_on_the_same_rows_one_is_killed(moment, victim, harm, start, halves, tmp_path):
    hit_and_continued(Fault(moment, victim, 2, 0.5, harm), start, halves, tmp_path)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_stands_still_is_waited_for_no_longer_than_asked(victim, start, tiny, tmp_path):
    """Rank 0 is the one through which they meet, too."""
    hit_and_continued(Fault("step", victim, 2, 0.5, "stop"), start, tiny, tmp_path)


@pytest.fixture(scope="module")
def link():
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here: install iproute2")
    try:
        with links.laid() as link:
            yield link
    except OSError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "write"])
def test_a_cut_link_ends_both_ranks_and_the_run_goes_on(moment, link, tiny, tmp_path):
    notes, out, whole = tmp_path / "notes", tmp_path / "run", tmp_path / "whole"
    for folder in (whole, out):
        if folder is out:
            fault = Fault(moment, 0, 2, 0.5, "cut")
            hit, _, wrong = links.cut(link, fault, tiny, out, notes, 1)
            assert hit and not wrong
        links.finish(links.start(link, armed(Fault(moment), tiny, folder, emptied(notes))))
    assert differences(out, whole) == []


def test_what_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(ranks, "ANSWER_SECONDS", 0.1)
    with pytest.raises(ranks.NoAnswer):
        ranks.in_time(threading.Event().wait)
    assert ranks.in_time(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="gone"):
        ranks.in_time(lambda: (_ for _ in ()).throw(RuntimeError("gone")))
