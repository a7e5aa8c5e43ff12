"""The demo's data: each review has one use, no held-out prompt is trained on; the YAMLs name what is written."""

import json
import os
import random

import pytest
import yaml
from conftest import tiny_config
from instruct_trl.recipes import EXAMPLE
from instruct_trl.recipes.demo import labeler, prepare
from transformers import LlamaForCausalLM

from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.functions import load_labeler, prepare_data


def test_every_review_of_the_demo_has_one_use_and_labels_nothing_else(tmp_path, monkeypatch):
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

    monkeypatch.setattr(prepare, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(prepare, "book_passages", lambda: [f"passage {i}" for i in range(20)])
    monkeypatch.setattr(prepare.SentimentLabeler, "train", staticmethod(train))
    sizes = {"n_demonstrations": 8, "n_validation": 4, "n_reward_prompts": 8, "n_reward_test_prompts": 4}
    rest = {"n_rl_prompts": 8, "n_test_prompts": 4, "n_selection_prompts": 4, "n_pretraining_test": 5}
    args = prepare.DemoDataArguments(**sizes, **rest)
    counts = prepare.build_demo_data(tmp_path, args)
    assert counts["pretraining/train"] == 15
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "test_prompts" / "test.jsonl").read_text().splitlines()]
    assert [" ".join(text.split()[:4]) for text in counts["labeler_accuracy_prompts"]] == asked
    assert len(trained["texts"]) == 126  # 180 reviews less 40 used above, less a tenth of the rest held out
    prompts = "".join(path.read_text() for path in tmp_path.glob("*prompts/*.jsonl"))
    for text in trained["texts"]:
        assert " ".join(text.split()[:4]) + '"' not in prompts


def test_no_held_out_prompt_is_trained_on_though_reviews_begin_alike(tmp_path, monkeypatch):
    reviews = [
        {"text": f"a film of {i % 40} and so on to the end {i}", "label": 1, "source": prepare.SENTENCES}
        for i in range(120)
    ]
    monkeypatch.setattr(prepare, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(prepare, "book_passages", lambda: [])
    monkeypatch.setattr(prepare, "_train_labeler", lambda *_: {})
    sizes = {f"n_{name}": 8 for name in ("demonstrations", "validation", "reward_prompts", "reward_test_prompts")}
    sizes |= {f"n_{name}_prompts": 8 for name in ("rl", "test", "selection")} | {"n_pretraining_test": 0}
    prepare.build_demo_data(tmp_path, prepare.DemoDataArguments(**sizes))
    seen = {"train": set(), "test": set()}
    for path in tmp_path.glob("*/*.jsonl"):
        seen[path.stem] |= {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
    assert len(seen["test"]) >= 8
    assert not seen["train"] & seen["test"]


def test_more_reviews_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "movie_reviews", lambda: [])
    with pytest.raises(ValueError, match="only 0 left. Lower the sizes"):
        prepare.build_demo_data(tmp_path, prepare.DemoDataArguments())


@pytest.mark.parametrize("name", ["demo", "demo_long"])
def test_the_yamls_name_the_folders_and_the_labeler_that_the_preparing_step_writes(name, tmp_path, monkeypatch):
    """Each setting that begins with {run_dir}/data is there after `prepare` with the sizes of data.yaml."""
    folder = EXAMPLE.parent / name
    (tmp_path / "base").mkdir()
    passages = [f"passage {i}" for i in range(300)]
    reviews = [
        {
            "text": f"p{i} has some plot that is {'great' if i % 4 else 'awful'} now",
            "label": int(i % 4 > 0),
            "source": source,
        }
        for source, count in ((prepare.SENTENCES, 4800), ("imdb", 400))
        for i in range(count)
    ]
    monkeypatch.setattr(prepare, "base_model", lambda: tmp_path / "base")
    monkeypatch.setattr(prepare, "movie_reviews", lambda: reviews)
    monkeypatch.setattr(prepare, "book_passages", lambda: passages)
    settings = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml") if path.stem != "data"]
    run = RunArguments(run_dir=str(tmp_path / "run"), prepare=settings[0]["prepare"])
    run.config_folder = folder
    prepare_data(run)
    named = {str(value) for given in settings for value in given.values() if "{run_dir}/data" in str(value)}
    assert len(named) == 7
    assert [path for path in named if not (tmp_path / path.replace("{run_dir}", "run")).is_dir()] == []
    (spec,) = {given["labeler"] for given in settings if "labeler" in given}
    good, bad = load_labeler(spec, run)(prompts=["it has", "it has"], completions=[" great now", " awful now"])
    assert good > bad


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
    with pytest.raises(ValueError, match=r"labeler\.npz cannot be read as the demo's labeler.*Move .* away"):
        labeler.SentimentLabeler.load(tmp_path / "labeler.npz")
    assert not (tmp_path / "executed").exists()


def test_the_demos_model_in_the_cache_is_looked_at_before_it_is_used(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(tmp_path))
    cached = tmp_path / "smollm2-135m-instruct"
    LlamaForCausalLM(tiny_config()).save_pretrained(cached)
    with pytest.raises(ValueError, match="in the cache, .* is incomplete: .*no tokenizer.*Delete this folder"):
        prepare.base_model()
    tokenizer.save_pretrained(cached)
    assert prepare.base_model() == cached
    (cached / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights are missing.* Delete this folder and start again"):
        prepare.base_model()
