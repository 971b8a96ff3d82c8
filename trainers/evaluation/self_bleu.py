"""How alike several answers to one prompt are: Self-BLEU (Zhu et al. 2018; paper section 5.1,
Fig. 21).

BLEU-4 (Papineni et al. 2002) of each answer with all the others as references, averaged. Where no
n-gram of an order is shared, its count is 0.1 instead of 0 (method 1 of Chen and Cherry 2014, as
Zhu et al.'s own code has it); an answer that shares no word at all has 0.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDER = 4
SMALL = 0.1  # stands for a count of no shared n-gram

Grams = list[Counter[tuple[str, ...]]]
"""Of the orders 1 to 4, each n-gram with its count"""


def self_bleu(texts: Sequence[str]) -> float:
    """From 0 (nothing in common) to 100 (all the same), of two or more texts. Texts of less than
    four words stay below 100: they have no n-gram of the higher orders to share."""
    split = [words(text) for text in texts]
    grams = [grams_of(each) for each in split]
    lengths = [len(each) for each in split]
    found = [
        bleu(grams[i], lengths[i], grams[:i] + grams[i + 1 :], lengths[:i] + lengths[i + 1 :])
        for i in range(len(texts))
    ]
    return sum(found) / len(found)


def words(text: str) -> list[str]:
    """The words and marks of a text, in lower case: "Don't!" has don, ', t and !."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def grams_of(tokens: Sequence[str]) -> Grams:
    return [
        Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, ORDER + 1)
    ]


def bleu(answer: Grams, length: int, references: Sequence[Grams], lengths: Sequence[int]) -> float:
    """BLEU-4 of one text of so many words against others, from 0 to 100."""
    logs = 0.0
    for n in range(ORDER):
        shared = sum(
            min(count, max(reference[n][gram] for reference in references))
            for gram, count in answer[n].items()
        )
        if n == 0 and shared == 0:
            return 0.0
        logs += math.log((shared or SMALL) / max(1, sum(answer[n].values()))) / ORDER
    closest = min(lengths, key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return 100 * brevity * math.exp(logs)
