"""The task of reviews: each review has one use, no held-out prompt is trained on; its labeler is plain arrays."""

import json
import os
import random

import pytest

from benchmarks import review_labeler as labeler
from benchmarks import reviews as reviews_task


def test_every_review_has_one_use_and_labels_nothing_else(tmp_path, monkeypatch):
    reviews = [
        {
            "text": f"film {source}-{i} has a plot that is {'great' if i % 2 else 'awful'} {i}",
            "label": i % 2,
            "source": source,
        }
        for source, count in (("rotten_tomatoes", 120), ("imdb", 60))
        for i in range(count)
    ]
    trained = {}

    def train(texts, labels):
        trained["texts"] = texts
        return type("L", (), {"save": lambda *_: None, "accuracy": lambda _, texts, labels: texts})()

    monkeypatch.setattr(reviews_task, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(reviews_task, "book_passages", lambda: [f"passage {i}" for i in range(20)])
    monkeypatch.setattr(reviews_task.SentimentLabeler, "train", staticmethod(train))
    sizes = {"n_demonstrations": 8, "n_validation": 4, "n_reward_prompts": 8, "n_reward_test_prompts": 4}
    rest = {"n_rl_prompts": 8, "n_test_prompts": 4, "n_selection_prompts": 4, "n_pretraining_test": 5}
    args = reviews_task.ReviewDataArguments(**sizes, **rest)
    counts = reviews_task.build_review_data(tmp_path, args)
    assert counts["pretraining/train"] == 15
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "test_prompts" / "test.jsonl").read_text().splitlines()]
    assert [" ".join(text.split()[:4]) for text in counts["labeler_accuracy_prompts"]] == asked
    assert len(trained["texts"]) == 126  # 180 reviews less 40 used above, less a tenth of the rest held out
    prompts = "".join(path.read_text() for path in tmp_path.glob("*prompts/*.jsonl"))
    for text in trained["texts"]:
        assert " ".join(text.split()[:4]) + '"' not in prompts


def test_no_held_out_prompt_is_trained_on_though_reviews_begin_alike(tmp_path, monkeypatch):
    reviews = [
        {"text": f"a film of {i % 40} and so on to the end {i}", "label": 1, "source": reviews_task.SENTENCES}
        for i in range(120)
    ]
    monkeypatch.setattr(reviews_task, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(reviews_task, "book_passages", lambda: [])
    monkeypatch.setattr(reviews_task, "_train_labeler", lambda *_: {})
    sizes = {f"n_{name}": 8 for name in ("demonstrations", "validation", "reward_prompts", "reward_test_prompts")}
    sizes |= {f"n_{name}_prompts": 8 for name in ("rl", "test", "selection")} | {"n_pretraining_test": 0}
    reviews_task.build_review_data(tmp_path, reviews_task.ReviewDataArguments(**sizes))
    seen = {"train": set(), "test": set()}
    for path in tmp_path.glob("*/*.jsonl"):
        seen[path.stem] |= {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
    assert len(seen["test"]) >= 8
    assert not seen["train"] & seen["test"]


def test_more_reviews_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews_task, "movie_reviews", lambda: [])
    with pytest.raises(ValueError, match="only 0 left. Lower the sizes"):
        reviews_task.build_review_data(tmp_path, reviews_task.ReviewDataArguments())


def test_the_labeler_comes_back_from_plain_arrays_with_the_scores_of_sklearn(tmp_path):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    draw = random.Random(0)
    words = ["good", "bad", "fine", "awful", "film", "plot", "the", "of", "it's", "naïve", "x1", "GOOD"]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(200)]
    labels = [int(text.count("good") > text.count("bad")) for text in texts]
    ours = labeler.SentimentLabeler.train(texts, labels)
    ours.save(tmp_path / "labeler.npz")
    loaded = labeler.SentimentLabeler.load(tmp_path / "labeler.npz")
    vectorizer = TfidfVectorizer(min_df=20, sublinear_tf=True)
    plain = LogisticRegression(max_iter=300).fit(vectorizer.fit_transform(texts), labels)
    asked = ["", "unknown words", "bad bad bad film"] + [" ".join(draw.choices(words, k=5)) for _ in range(20)]
    expected = plain.decision_function(vectorizer.transform(asked)).tolist()
    assert loaded([""] * 23, asked) == pytest.approx(expected, abs=1e-9)
    assert loaded.accuracy(texts, labels) == ours.accuracy(texts, labels)


def test_a_pickle_in_the_labelers_place_is_not_loaded(tmp_path):
    import joblib

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    joblib.dump(Runs(), tmp_path / "labeler.npz")
    with pytest.raises(ValueError, match=r"labeler\.npz cannot be read as a labeler.*Move .* away"):
        labeler.SentimentLabeler.load(tmp_path / "labeler.npz")
    assert not (tmp_path / "executed").exists()
