"""Run: python -m pytest tests/test_sampling.py -q"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.core.generation.sampling import row_keys, step_seeds
from puna.core.ops import sample

numbers = st.integers(0, 2**40)


def key(seed, round_index, prompt, k):
    return int(row_keys(seed, round_index, torch.tensor([prompt]), torch.tensor([k]))[0])


def test_keys_of_every_combination_differ():
    """2,401 small (seed, round, prompt, sample) and 7 steps each: no two draws are the same."""
    prompts, samples = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    keys = torch.cat(
        [
            row_keys(seed, round_index, prompts.flatten(), samples.flatten())
            for seed in range(7)
            for round_index in range(7)
        ]
    )
    seeds = torch.cat([step_seeds(keys, t) for t in range(7)])
    assert len(keys.unique()) == 7**4 and len(seeds.unique()) == 7**5


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), numbers, numbers)
def test_a_key_is_a_function_of_its_own_row(rows, seed, round_index):
    prompts, samples = torch.tensor(rows).unbind(1)
    together = row_keys(seed, round_index, prompts, samples)
    assert together.dtype == torch.int64
    assert together.tolist() == [key(seed, round_index, i, k) for i, k in rows]
    for t in (0, 5):
        seeds = step_seeds(together, t).tolist()
        assert seeds == [int(step_seeds(together[r : r + 1], t)[0]) for r in range(len(rows))]


def test_order_matters():
    """Prompt 1, sample 2 is not prompt 2, sample 1; nor are seed and round alike."""
    assert len({key(0, 0, 1, 2), key(0, 0, 2, 1), key(1, 2, 0, 0), key(2, 1, 0, 0)}) == 4


def test_a_step_may_differ_by_row():
    keys = row_keys(0, 0, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    mixed = step_seeds(keys, torch.tensor([4, 0, 9]))
    assert mixed.tolist() == [int(step_seeds(keys, t)[r]) for r, t in enumerate((4, 0, 9))]


def test_draws_along_an_answer_and_across_samples_match_the_distribution():
    """Chi-square at the 99.9% quantile, over steps of one row and over samples of one prompt."""
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    one = row_keys(3, 1, torch.tensor([7]), torch.tensor([0]))
    along = torch.cat([step_seeds(one, t) for t in range(4000)])
    many = row_keys(3, 1, torch.full((4000,), 7), torch.arange(4000))
    for seeds in (along, step_seeds(many, 0)):
        tokens, _ = sample(probs.log().expand(4000, 4), seeds=seeds)
        counts = tokens.bincount(minlength=4)
        assert ((counts - 4000 * probs) ** 2 / (4000 * probs)).sum() < 16.27
