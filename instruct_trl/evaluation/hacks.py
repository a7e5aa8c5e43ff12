"""The usual ways to a score that is not deserved, measured: length, stock phrases, the same answer for everybody.

Legend: N prompts. Words are split at whitespace, in lower case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from instruct_trl.evaluation.estimates import Prompts
from instruct_trl.evaluation.win_rate import WinRate, win_rate


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's ρ of two lists of N numbers, ties sharing their mean rank; None where one of them is constant.

    Of score and length it says how far longer answers score higher: 1 always, 0 no relation, −1 the other way.

    Raises:
        ValueError: unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"Both lists need one number an answer, got {len(first)} and {len(second)}.")
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def like_length_win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    tolerance: float = 0.1,
    prompts: Prompts = None,
) -> WinRate | None:
    """Win rate over the prompts whose two answers are about equally long; all arguments (N,).

    Where the win rate over all prompts is high and this one is not, the judge pays for length.

    Args:
        tolerance: the longer one exceeds the shorter by no more than this share of it.
        prompts: as in `win_rate`.

    Returns:
        None where no prompt has two such answers.
    """
    kept = [
        i
        for i, (a, b) in enumerate(zip(lengths, baseline_lengths, strict=True))
        if max(a, b) <= (1 + tolerance) * min(a, b)
    ]
    if not kept:
        return None
    keys = None if prompts is None else [prompts[i] for i in kept]
    return win_rate([scores[i] for i in kept], [baseline_scores[i] for i in kept], prompts=keys)


def duplicate_rate(texts: Sequence[str]) -> float:
    """Share of N answers that repeat, word for word, another prompt's answer before them; 0 for none."""
    return 1 - len({" ".join(text.lower().split()) for text in texts}) / len(texts) if texts else 0.0


def favourite_word(texts: Sequence[str], baseline: Sequence[str]) -> tuple[str, float, float] | None:
    """The word that more of the N answers hold than of the baseline's N: the word, and its share of each.

    A policy that found a word its judge likes puts it into nearly every answer. None where no word has gained.
    """
    now, before = (Counter(word for text in each for word in set(text.lower().split())) for each in (texts, baseline))
    rises = {word: count / len(texts) - before[word] / len(baseline) for word, count in now.items()}
    word = max(rises, key=lambda word: (rises[word], word), default="")
    if not word or rises[word] <= 0:
        return None
    return word, now[word] / len(texts), before[word] / len(baseline)


def common_opening(texts: Sequence[str], words: int = 3) -> tuple[str, float]:
    """The most frequent first `words` words, and the share of the N answers that begin with them.

    Answers with fewer words count with what they have; ("", 0.0) without any.
    """
    openings = Counter(" ".join(text.lower().split()[:words]) for text in texts if text.strip())
    if not openings:
        return "", 0.0
    opening, count = openings.most_common(1)[0]
    return opening, count / len(texts)
