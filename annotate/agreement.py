"""How far people agree: Gwet's AC2 with ordinal weights, as the paper uses it (section 3.4.2).

Gwet, Handbook of Inter-Rater Reliability, 4th edition, chapters 3 and 5.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations


def weights(categories: int) -> list[list[float]]:
    """Ordinal weights w[one][other]: 1 for the same category, less the further apart they are, 0 at
    the ends of the scale."""
    most = math.comb(categories, 2)
    return [
        [1 - math.comb(abs(one - other) + 1, 2) / most for other in range(categories)]
        for one in range(categories)
    ]


def ac2(items: Sequence[Sequence[int]], categories: int) -> float | None:
    """Gwet's AC2 of ratings 0 .. categories - 1: for each item those that it was given, one or
    more. None where no item has two."""
    weight = weights(categories)
    agreed = [
        sum(weight[one][other] for one, other in permutations(given, 2))
        / (len(given) * (len(given) - 1))
        for given in items
        if len(given) > 1
    ]
    if not agreed:
        return None
    shares = [0.0] * categories
    for given in items:
        for category, count in Counter(given).items():
            shares[category] += count / len(given) / len(items)
    spread = sum(share * (1 - share) for share in shares)
    chance = sum(map(sum, weight)) / (categories * (categories - 1)) * spread
    return (sum(agreed) / len(agreed) - chance) / (1 - chance)
