"""The labeler of reviews: a sentiment classifier that stands in for people. The reward model sees its ranks alone.

TF-IDF over words, and a logistic regression, both scikit-learn's, trained on movie reviews that no
other stage uses. Its score is the log-odds that a text praises the film: graded, fast, deterministic.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


def score(prompts: list[str], completions: list[str], run_dir: str, **kwargs: Any) -> list[float]:
    """The scores of the labeler that lies in a run's data folder: `labeler` of the YAMLs."""
    return _labeler_in(Path(run_dir, "data", "labeler.npz"))(prompts, completions)


@lru_cache
def _labeler_in(path: Path) -> SentimentLabeler:
    return SentimentLabeler.load(path)


class SentimentLabeler:
    """Scores (prompt, completion) by the log-odds that the whole text is praise. Usable as a TRL reward function.

    Args:
        pipeline: a fitted scikit-learn classifier with `decision_function` on texts.
    """

    __name__ = "labeler"

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return [float(score) for score in self.pipeline.decision_function(texts)]

    @classmethod
    def train(cls, texts: list[str], labels: list[int]) -> SentimentLabeler:
        """Fit on texts and labels (1 praise, 0 not); about 15 seconds for 30,000 reviews."""
        return cls(_untrained().fit(texts, labels))

    def accuracy(self, texts: list[str], labels: list[int]) -> float:
        """Share of `texts` whose sign of score agrees with the label."""
        return float(self.pipeline.score(texts, labels))

    def save(self, path: Path) -> None:
        """Write words and weights as plain arrays, from which nothing is executed when they are read."""
        vectorizer, classifier = self.pipeline[0], self.pipeline[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                words=vectorizer.get_feature_names_out().astype(str),
                idf=vectorizer.idf_,
                weights=classifier.coef_,
                intercept=classifier.intercept_,
                classes=classifier.classes_,
            )

    @classmethod
    def load(cls, path: Path) -> SentimentLabeler:
        """Read what `save` wrote; the scores are the same.

        Raises:
            ValueError: there is no such file, as in the folder of an older version, or it is broken.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            vectorizer, classifier = pipeline = _untrained(vocabulary=arrays["words"].tolist())
            vectorizer.idf_ = arrays["idf"]
            classifier.coef_, classifier.intercept_ = arrays["weights"], arrays["intercept"]
            classifier.classes_ = arrays["classes"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as a labeler ({error}). Older versions kept it as a pickle, which is "
                f"not loaded. Move {path.parent} away and start again: the data are made anew, the same."
            ) from error
        return cls(pipeline)


def _untrained(**kwargs: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(min_df=20, sublinear_tf=True, **kwargs), LogisticRegression(max_iter=300))
