"""How a set of answers reads: repetitive, alike, or high in score for its length alone. The usual hacks show here.

Legend: N answers, one per prompt. Words are split at whitespace and compared in lower case, whatever the tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from instruct_trl.evaluation.estimates import Prompts
from instruct_trl.evaluation.win_rate import WinRate, win_rate


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}.")
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all word n-grams of the whole set, 0 to 1.

    Near 1 the answers share little; near 0 they say the same thing. It falls as the set grows, so compare models only
    on the same number of answers of similar length. It is 0 if no text holds n words.

    Raises:
        ValueError: n < 1.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_rate(texts: Sequence[str], n: int = 3) -> float:
    """Share of an answer's word n-grams that occurred before in the same answer, averaged over answers, 0 to 1.

    "good good good good good" with n = 3 gives 2/3. Answers with fewer than n words are left out.

    Raises:
        ValueError: n < 1.
    """
    rates = [1 - len(set(grams)) / len(grams) for text in texts if (grams := _ngrams(text, n))]
    return sum(rates) / len(rates) if rates else 0.0


def like_length_win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    tolerance: float = 0.1,
    prompts: Prompts = None,
) -> WinRate | None:
    """`win_rate` over the prompts whose two answers are about equally long, or None; all arguments (N,).

    If the win rate over all prompts is high and this one is not, the judge pays for length.

    Args:
        tolerance: the longer answer exceeds the shorter by no more than this share of it.
    """
    sizes = zip(lengths, baseline_lengths, strict=True)
    kept = [i for i, pair in enumerate(sizes) if max(pair) <= (1 + tolerance) * min(pair)]
    if not kept:
        return None
    keys = None if prompts is None else [prompts[i] for i in kept]
    return win_rate([scores[i] for i in kept], [baseline_scores[i] for i in kept], prompts=keys)


def duplicate_rate(texts: Sequence[str]) -> float:
    """Share of N answers that repeat, word for word, another prompt's answer before them; 0 without answers."""
    return 1 - len({" ".join(text.lower().split()) for text in texts}) / len(texts) if texts else 0.0


def favourite_word(texts: Sequence[str], baseline: Sequence[str]) -> tuple[str, float, float] | None:
    """The word that gained most against the baseline, and the share of answers that hold it here and there.

    A policy that found a word its judge likes puts it into nearly every answer. None if no word has gained.
    """
    now, before = (Counter(word for text in each for word in set(text.lower().split())) for each in (texts, baseline))
    rises = {word: count / len(texts) - before[word] / len(baseline) for word, count in now.items()}
    word = max(rises, key=lambda word: (rises[word], word), default="")
    return (word, now[word] / len(texts), before[word] / len(baseline)) if word and rises[word] > 0 else None


def common_opening(texts: Sequence[str], words: int = 3) -> tuple[str, float]:
    """The most frequent first `words` words and the share of the N answers that begin with them; ("", 0.0) if none."""
    openings = Counter(" ".join(text.lower().split()[:words]) for text in texts if text.strip())
    opening, count = max(openings.items(), key=lambda item: item[1], default=("", 0))
    return opening, count / max(1, len(texts))
