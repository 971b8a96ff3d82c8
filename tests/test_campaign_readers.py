"""A slice of the mutation campaign of `campaign/readers.py`, which runs as long as one likes."""

from random import Random

import pytest
from campaign import mutations
from campaign.readers import campaign
from campaign.targets import make_targets


def test_a_slice_of_the_campaign() -> None:
    """Every damaged file is refused in one sentence or taken for a reason that is written down."""
    counts, findings = campaign(seed=1, cases=30, seconds=1000)
    assert findings == []
    assert len(counts) == 24 and all(count.total() >= 30 for count in counts.values())
    assert sum(count["refused"] for count in counts.values()) > 250


def test_a_case_is_a_function_of_its_number(tmp_path) -> None:
    (target,) = (each for each in make_targets(tmp_path) if each.name == "dialogues")
    one, other = (target.mutate(target.data, Random("0/dialogues/7")) for _ in range(2))
    assert one == other != target.data
    drawn = {target.mutate(target.data, Random(f"0/dialogues/{n}")) for n in range(200)}
    assert len(drawn) > 190


@pytest.mark.parametrize("mutate", [mutations.damaged, mutations.text_file])
def test_damage_ends_with_nothing_left(mutate) -> None:
    data = b"a = 1\n"
    for number in range(300):
        data = mutate(data, Random(number)) or b"a = 1\n"
    assert isinstance(data, bytes)
