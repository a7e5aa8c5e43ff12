"""The demo's labeler: a program that stands in for people. The reward model never sees it, only its ranks.

The task is "Write a sentence with the words boat, river, man, red". A person who judges an answer asks three things,
and so does the labeler: how many of the words are there, is it one whole sentence, and does it read like one?

The last is a classifier (scikit-learn's TF-IDF and logistic regression). It tells sentences that people wrote from the
same sentences spoilt: words in disorder, bare lists, repeated phrases, halves.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

ARTICLES = frozenset({"a", "an", "another", "her", "his", "its", "one", "some", "the", "their", "this", "two"})
PROMPT = "Write a sentence with the words {words}:\n"
N_WORDS_KEPT = 150
"""The classifier sees this many words as they are, beside function words, and of others only the ending."""
ODD = 0.05
"""A text reads oddly if the classifier likes it less than all but this share of people's sentences."""


def score(prompts: list[str], completions: list[str], run_dir: str, **kwargs: Any) -> list[float]:
    """The labeler's scores: `labeler` of the demo's YAMLs. It lies in the run's data folder."""
    return _labeler_in(Path(run_dir, "data", "labeler.npz"))(prompts, completions)


@lru_cache
def _labeler_in(path: Path) -> SentenceLabeler:
    return SentenceLabeler.load(path)


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[a-z']+", text.lower())


@lru_cache
def function_words() -> frozenset[str]:
    """Words that no prompt asks for, such as `the`: scikit-learn's list, and what it leaves of `isn't`."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS | {"does", "doing", "s", "t"}


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """The word without its ending (Snowball's English stemmer), so that `walks` and `walked` count as `walk`."""
    from snowballstemmer import stemmer

    return stemmer("english").stemWord(word)


def content_words(sentence: str) -> list[str]:
    """Words of a sentence that a prompt may ask for: no function words, each stem once."""
    found: dict[str, str] = {}
    for word in words_of(sentence):
        if word not in function_words() and len(word) > 2 and word.isalpha():
            found.setdefault(stem(word), word)
    return list(found.values())


def words_used(prompt: str, completion: str) -> int:
    """How many of the words that the prompt asks for are in the completion, in any form."""
    asked = words_of(prompt.split("the words", 1)[-1])
    said = {stem(word) for word in words_of(completion)}
    return sum(stem(word) in said for word in asked)


def is_one_sentence(text: str) -> bool:
    """Whether a text begins with a capital letter and ends with its first full stop."""
    return re.fullmatch(r"[\"']?[A-Z][^.!?]*[.!?][\"']?", text.strip()) is not None


class SentenceLabeler:
    """Scores (prompt, completion): a point per word used, and two less unless it is one sentence that reads like one.

    Usable as a TRL reward function. The scores are whole numbers, so many answers tie.

    Args:
        classifier: a fitted scikit-learn pipeline with `decision_function` on texts; higher reads better.
        odd_below: the lowest value that still reads like a sentence.
    """

    __name__ = "labeler"

    def __init__(self, classifier: Any, odd_below: float):
        self.classifier, self.odd_below = classifier, odd_below

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        odd = self.classifier.decision_function(completions) < self.odd_below
        return [
            float(words_used(prompt, completion) - 2 * (strange or not is_one_sentence(completion)))
            for prompt, completion, strange in zip(prompts, completions, odd, strict=True)
        ]

    @classmethod
    def train(cls, sentences: list[str], seed: int = 0) -> SentenceLabeler:
        """Fit on sentences that people wrote; a few seconds for 2,000. Every tenth sets the limit of what is odd."""
        rng = random.Random(seed)
        fitted = [sentence for index, sentence in enumerate(sentences) if index % 10]
        spoilt = [text for sentence in fitted for text in spoil(sentence, rng.choice(fitted), rng)]
        classifier = _untrained(Patterns.of(fitted)).fit(fitted + spoilt, [1] * len(fitted) + [0] * len(spoilt))
        return cls(classifier, float(np.quantile(classifier.decision_function(sentences[::10]), ODD)))

    def save(self, path: Path) -> None:
        """Write words and weights as plain arrays, from which nothing is executed when they are read."""
        vectorizer, regression = self.classifier
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                kept=np.array(sorted(vectorizer.analyzer.kept)),
                things=np.array(sorted(vectorizer.analyzer.things)),
                doings=np.array(sorted(vectorizer.analyzer.doings)),
                patterns=vectorizer.get_feature_names_out().astype(str),
                idf=vectorizer.idf_,
                weights=regression.coef_,
                intercept=regression.intercept_,
                classes=regression.classes_,
                odd_below=self.odd_below,
            )

    @classmethod
    def load(cls, path: Path) -> SentenceLabeler:
        """Read what `save` wrote; the scores are the same.

        Raises:
            ValueError: there is no such file, as in the folder of an older version, or it is broken.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            vectorizer, regression = pipeline = _untrained(
                Patterns(*(arrays[name].tolist() for name in ("kept", "things", "doings"))), arrays["patterns"].tolist()
            )
            vectorizer.idf_ = arrays["idf"]
            regression.coef_, regression.intercept_ = arrays["weights"], arrays["intercept"]
            regression.classes_ = arrays["classes"]
            return cls(pipeline, float(arrays["odd_below"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as the demo's labeler ({error}). Another version may have made it. "
                f"Move {path.parent.parent} away and start again."
            ) from error


class Patterns:
    """What the classifier sees of a text: runs of one to three words; of rare words only how people use them.

    So it judges how a text is built, not what it is about.

    Args:
        kept: words that it sees as they are.
        things: words that people often put behind an article, as in `the boat`.
        doings: other words that people use.
    """

    def __init__(self, kept: Iterable[str], things: Iterable[str], doings: Iterable[str]):
        self.kept, self.things, self.doings = frozenset(kept), frozenset(things), frozenset(doings)

    @classmethod
    def of(cls, sentences: list[str]) -> Patterns:
        """Those of sentences that people wrote."""
        pairs = Counter(pair for sentence in sentences for pair in pairwise(["", *words_of(sentence)]))
        counts = Counter(word for _, word in pairs.elements())
        behind_article = Counter(word for before, word in pairs.elements() if before in ARTICLES)
        kept = function_words().union(word for word, _ in counts.most_common(N_WORDS_KEPT))
        things = {word for word in counts if behind_article[word] >= counts[word] / 4} - kept
        return cls(kept, things, set(counts) - kept - things)

    def __call__(self, text: str) -> list[str]:
        shapes = ["^", *map(self._shape, re.findall(r"[a-z']+|[.,!?;:]", text.lower())), "$"]
        return [" ".join(shapes[i : i + n]) for n in (1, 2, 3) for i in range(len(shapes) - n + 1)]

    def _shape(self, word: str) -> str:
        if word in self.kept or not word.isalpha():
            return word
        use = "thing" if word in self.things else "doing" if word in self.doings else "new"
        return f"{use}-{next((ending for ending in ('ing', 'ed', 'ly', 's') if word.endswith(ending)), '')}"


def spoil(sentence: str, other: str, rng: random.Random) -> list[str]:
    """Three texts that nobody would write: a sentence spoilt in two of eight ways, and its words in another's frame."""
    ways = rng.sample((_shuffled, _swapped, _bare, _listed, _repeated, _halved, _strewn, _gapped), 2)
    spoilt = [" ".join(way(sentence.rstrip(".").split(), rng)) for way in ways]
    spoilt.append(_framed(sentence, rng.choice((other, *FRAMES)), rng))
    return [text[:1].upper() + text[1:] + "." for text in spoilt if text + "." != sentence]


FRAMES = (
    "the _ and the _ and the _ and the _",
    "a _ is _ and _ and _",
    "a man is seen with a _ and a _ while the _ is in the _",
    "a man is holding a _, a _ and a _",
    "a _ _ is _ _",
    "there is a _ and a _ with a _ and a _",
)
"""Frames that take any words. A labeler that liked one of them would be easily pleased."""


def _framed(sentence: str, frame: str, rng: random.Random) -> str:
    """The content words of a sentence, in any order, in the places of another's."""
    words = [word for word in words_of(sentence) if word not in function_words()] or ["thing"]
    places = (word.strip(".,") if word.strip(".,").lower() in function_words() else "_" for word in frame.split())
    return " ".join(rng.choice(words) if place == "_" else place for place in places)


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    return rng.sample(words, len(words))


def _swapped(words: list[str], rng: random.Random) -> list[str]:
    for i in rng.choices(range(len(words) - 1), k=2):
        words[i], words[i + 1] = words[i + 1], words[i]
    return words


def _bare(words: list[str], rng: random.Random) -> list[str]:
    return [word for word in words if word.lower() not in function_words() or rng.random() < 0.3] or words[:1]


def _listed(words: list[str], rng: random.Random) -> list[str]:
    bare = [word.strip(",") for word in words if word.lower() not in function_words()]
    return ", ".join(rng.sample(bare, min(4, len(bare)))).split()


def _repeated(words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(len(words))
    return words[: i + 1] + 2 * words[max(0, i - 2) : i + 1] + words[i + 1 :]


def _halved(words: list[str], rng: random.Random) -> list[str]:
    return words[: max(2, len(words) // 2)]


def _strewn(words: list[str], rng: random.Random) -> list[str]:
    for word in rng.choices(words, k=2):
        words.insert(rng.randrange(len(words)), word)
    return words


def _gapped(words: list[str], rng: random.Random) -> list[str]:
    i = rng.randrange(max(1, len(words) - 4))
    return words[:i] + words[i + 3 :]


def _untrained(analyzer: Patterns, patterns: list[str] | None = None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    seen_often = {"min_df": 3} if patterns is None else {"vocabulary": patterns}
    vectorizer = TfidfVectorizer(analyzer=analyzer, sublinear_tf=True, **seen_often)
    return make_pipeline(vectorizer, LogisticRegression(C=10, max_iter=500, class_weight="balanced"))
