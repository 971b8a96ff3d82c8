"""Self-BLEU against examples worked out by hand and a second, slower implementation.
Run: python -m pytest tests/test_self_bleu.py -q"""

import math
import random

import pytest

from puna.trainers.evaluation.self_bleu import self_bleu, words


def test_an_example_by_hand():
    """Shared n-grams of six words each: 5 of 6 words, 3 of 5 pairs (the cat, on the, the mat), 1 of
    4 triples (on the mat), no four of 3; both texts are as long as the other."""
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** (1 / 4)
    found = self_bleu(["the cat sat on the mat", "The cat is on the mat"])
    assert found == pytest.approx(expected) and round(found, 2) == 25.41


def test_counts_are_clipped_and_short_texts_pay():
    """Of "a a" beside "a b c", one a of two counts, there is no pair, and 2 words stand beside 3.
    The other way: 1 of 3 words, and nothing is paid for being longer."""
    short = math.exp(1 - 3 / 2) * (1 / 2 * 0.1 / 1 * 0.1 / 1 * 0.1 / 1) ** 0.25
    long = (1 / 3 * 0.1 / 2 * 0.1 / 1 * 0.1 / 1) ** 0.25
    assert self_bleu(["a a", "a b c"]) == pytest.approx(100 * (short + long) / 2)


def test_ends_of_the_scale():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(100)
    assert self_bleu(["one two", "three four"]) == 0
    assert self_bleu(["", "three four"]) == 0
    assert words("Don't, 3 times!") == ["don", "'", "t", ",", "3", "times", "!"]


def slow(texts: list[str]) -> float:
    total = 0.0
    for i, text in enumerate(texts):
        hypothesis = text.split()
        others = [other.split() for k, other in enumerate(texts) if k != i]
        product = 1.0
        for n in (1, 2, 3, 4):
            grams = [" ".join(hypothesis[j : j + n]) for j in range(len(hypothesis) - n + 1)]
            hits = 0
            for gram in set(grams):
                counts = []
                for other in others:
                    there = [" ".join(other[j : j + n]) for j in range(len(other) - n + 1)]
                    counts.append(there.count(gram))
                hits += min(grams.count(gram), max(counts))
            if n == 1 and not hits:
                product = 0.0
                break
            product *= (hits or 0.1) / max(1, len(grams))
        distance, closest = min((abs(len(o) - len(hypothesis)), len(o)) for o in others)
        penalty = min(1.0, math.exp(1 - closest / max(1, len(hypothesis))))
        total += penalty * product**0.25
    return 100 * total / len(texts)


@pytest.mark.parametrize("seed", range(6))
def test_a_second_implementation(seed):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices("abcd", k=draw.randint(1, 12))) for _ in range(7)]
    assert self_bleu(texts) == pytest.approx(slow(texts))
