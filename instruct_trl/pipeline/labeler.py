"""The demo's labeler: a sentiment classifier that stands in for people. The reward model never sees it, only its ranks.

TF-IDF over words, and a logistic regression, both scikit-learn's, trained on movie reviews that no
other stage of the demo uses. Its score is the log-odds that a text praises the film: graded, fast, deterministic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        vectorizer = TfidfVectorizer(min_df=20, sublinear_tf=True)
        return cls(make_pipeline(vectorizer, LogisticRegression(max_iter=300)).fit(texts, labels))

    def accuracy(self, texts: list[str], labels: list[int]) -> float:
        """Share of `texts` whose sign of score agrees with the label."""
        return float(self.pipeline.score(texts, labels))

    def save(self, path: Path) -> None:
        import joblib

        path.parent.mkdir(parents=True, exist_ok=True)
        joblib.dump(self.pipeline, path)

    @classmethod
    def load(cls, path: Path) -> SentimentLabeler:
        import joblib

        return cls(joblib.load(path))
