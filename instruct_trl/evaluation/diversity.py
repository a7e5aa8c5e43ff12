"""How varied and how repetitive a set of answers is: a policy that collapses to one phrase shows here first.

Words are split at whitespace and compared in lower case, so that the numbers do not depend on a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = text.lower().split()
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _check_n(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}.")


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all word n-grams of the whole set, 0 to 1.

    Near 1 the answers share little; near 0 they say the same thing. It falls as the set grows, so compare models on
    the same number of answers of like length only. 0 when no text holds n words.

    Raises:
        ValueError: n < 1.
    """
    _check_n(n)
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_rate(texts: Sequence[str], n: int = 3) -> float:
    """Share of an answer's word n-grams that occurred before in the same answer, averaged over answers, 0 to 1.

    0: nothing is said twice. "good good good good good" with n = 3 gives 2/3. Answers with fewer than n words have no
    n-gram and are left out; 0 when that leaves none.

    Raises:
        ValueError: n < 1.
    """
    _check_n(n)
    rates = []
    for text in texts:
        grams = list(_ngrams(text, n))
        if grams:
            rates.append(1 - len(set(grams)) / len(grams))
    return sum(rates) / len(rates) if rates else 0.0
