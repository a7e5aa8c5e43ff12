"""A floor under a reward model's accuracy: a bag of words, trained on the same rankings, asked about the same pairs.

It knows which words and word pairs an answer holds, and neither the prompt nor how the words belong together. A reward
model that is no better has learned no more than that. The other floor, the answers' length, is in `reward_metrics`.

scikit-learn (the extra `report`) is imported where the bag is trained.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from instruct_trl.data.prefix_layout import common_prefix_length
from instruct_trl.data.ranking_batch import comparisons, prompt_key_of

MIN_TRAINING_PROMPTS = 10
"""Fewer training prompts with a pair cannot choose the penalty."""
MOST_PAIRS = 50_000
"""So many training pairs at most, drawn over all prompts: more take minutes and hardly change the floor."""
N_FOLDS = 5
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)

# Runs of letters and digits, and all other characters one by one, since punctuation says something, too. Chinese and
# Japanese have no blanks between words: their characters stand alone, and the pairs of neighbours make up for words.
_TOKEN = r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\s]"
_CONTEXT = 8  # tokens before the first different one, so that its word is read whole


class TextRanking(NamedTuple):
    """The answers to a prompt as text, and the compared `pairs` of them, [winner, loser] each."""

    answers: list[str]
    pairs: list[list[int]]
    prompt: str | None


class NoBagOfWords(ValueError):
    """The rankings are too few for a bag of words, or have no words that two answers share."""


class BagOfWords:
    """Pairwise logistic regression on TF-IDF: P(winner beats loser) = σ(w · (x_winner − x_loser)).

    x is the answer's vector over words and word pairs (1 + log of their counts, weighed by rarity, length 1). Each pair
    is also taken the other way round, so there is no intercept. The penalty of w is chosen by cross-validation over
    the training prompts, by log loss.

    Raises:
        NoBagOfWords: fewer than `MIN_TRAINING_PROMPTS` prompts with a pair, or no word in any two answers.
        ImportError: scikit-learn is missing.
    """

    def __init__(self, rankings: Iterable[TextRanking]):
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, GroupKFold

        answers: list[str] = []
        pairs: list[tuple[int, int]] = []
        prompts: list[str] = []
        for number, ranking in enumerate(rankings):
            pairs += [(len(answers) + winner, len(answers) + loser) for winner, loser in ranking.pairs]
            prompts += [ranking.prompt or str(number)] * len(ranking.pairs)
            answers += ranking.answers
        if len(set(prompts)) < MIN_TRAINING_PROMPTS:
            raise NoBagOfWords(f"A bag of words needs {MIN_TRAINING_PROMPTS} training prompts with a pair or more.")
        winners, losers = np.array(pairs).T
        self._words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=_TOKEN)
        try:
            x = self._words.fit_transform(answers)
        except ValueError as error:  # scikit-learn's "empty vocabulary", or "no terms remain"
            raise NoBagOfWords(f"No word is in two answers: {error}") from error
        differences = x[winners] - x[losers]
        search = GridSearchCV(
            LogisticRegression(fit_intercept=False, max_iter=1_000),
            {"C": INVERSE_PENALTIES},
            scoring="neg_log_loss",
            cv=GroupKFold(N_FOLDS),  # the pairs of a prompt, mirrored ones included, are in one fold
        )
        found = search.fit(
            vstack([differences, -differences]).tocsr(),
            np.repeat([1, 0], len(pairs)),
            groups=np.tile(np.array(prompts), 2),
        )
        self._weights = found.best_estimator_.coef_[0]

    def scores(self, answers: Sequence[str]) -> list[float]:
        """w · x of each answer, higher is better; 0 for an answer without a known word."""
        return (self._words.transform(answers) @ self._weights).tolist() if answers else []


def bag_of_words(rankings: Iterable[TextRanking]) -> BagOfWords | None:
    """The bag trained on `rankings`, or None: without scikit-learn, or where they are too few or have no words."""
    if find_spec("sklearn") is None:
        return None
    try:
        return BagOfWords(rankings)
    except NoBagOfWords:
        return None


def why_missing() -> str:
    """Why there is no bag of words, and what to do; a sentence for a page."""
    if find_spec("sklearn") is None:
        return "The bag of words is missing, since scikit-learn is. Install it: pip install instruct-trl[report]"
    few = f"fewer than {MIN_TRAINING_PROMPTS} prompts with a compared pair"
    return f"The bag of words is missing: training rankings were not at hand, held {few}, or no word in two answers."


def training_texts(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> Iterator[TextRanking]:
    """`text_rankings` of training rows, with `MOST_PAIRS` pairs at most, drawn over all; other answers are not read."""
    kept = [comparisons([row])["pairs"][0].nonzero().tolist() for row in rows]
    total = sum(map(len, kept))
    if total <= MOST_PAIRS:
        yield from text_rankings(rows, tokenizer)
        return
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(0).choice(total, MOST_PAIRS, replace=False)] = True
    draw = iter(chosen)
    kept = [[pair for pair in pairs if next(draw)] for pairs in kept]
    for number, pairs in enumerate(kept):
        if not pairs:
            continue
        (found,) = text_rankings([rows[number]], tokenizer)
        used = sorted({answer for pair in pairs for answer in pair})
        place = {answer: index for index, answer in enumerate(used)}
        ordered = [[place[winner], place[loser]] for winner, loser in pairs]
        yield TextRanking([found.answers[answer] for answer in used], ordered, found.prompt)


def text_rankings(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[TextRanking]:
    """The tokenised rows of a ranking dataset (`prepare_ranking_dataset`) as text, one for one.

    An answer's text begins with the first word in which the answers differ: what they share tells none from another.
    """
    for row in rows:
        tokens = row["input_ids"]
        start = max(0, common_prefix_length(tokens) - _CONTEXT)
        texts = tokenizer.batch_decode([ids[start:] for ids in tokens], skip_special_tokens=True)
        shared = os.path.commonprefix(texts)
        begin = len(shared) - len(shared.split()[-1]) if shared.strip() and not shared[-1].isspace() else len(shared)
        pairs = comparisons([row])["pairs"][0].nonzero().tolist()
        yield TextRanking([text[begin:] for text in texts], pairs, prompt_key_of(row))


def add_bag_of_words(records: Sequence[dict[str, Any]], bag: BagOfWords, rankings: Iterable[TextRanking]) -> None:
    """Give each of the `records` (`RankingRewardTrainer.evaluation_records`) the bag's scores: `bag_of_words` (K)."""
    answers = [ranking.answers for ranking in rankings]
    scores = iter(bag.scores([answer for row in answers for answer in row]))
    for record, row in zip(records, answers, strict=True):
        record["bag_of_words"] = [next(scores) for _ in row]
