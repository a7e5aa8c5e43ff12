"""The demo's data: each sentence has one use; the labeler judges as a person would; the YAMLs name what is written."""

import json
import os
import random

import numpy as np
import pytest
import yaml
from conftest import tiny_config
from instruct_trl.recipes import EXAMPLE
from instruct_trl.recipes.demo import labeler, prepare
from transformers import LlamaForCausalLM

from instruct_trl.pipeline.arguments import RunArguments
from instruct_trl.pipeline.functions import load_labeler, prepare_data

SIZES = {"n_demonstrations": 16, "n_validation": 8, "n_reward_prompts": 16, "n_reward_test_prompts": 8}
SIZES |= {"n_rl_prompts": 16, "n_test_prompts": 8, "n_selection_prompts": 8, "n_pretraining_test": 5}


def letters(number: int) -> str:
    """A made-up word for a number, of letters that no ending of a word has."""
    return "".join("bcfhjklmpv"[int(digit)] for digit in str(number))


def sentence(number: int) -> str:
    """A sentence with four content words, two of them of its own."""
    draw = random.Random(number)
    form = draw.choice(
        [
            "The {} man sees a {} on the table.",
            "A {} woman puts the {} in the house.",
            "He is at the {} table with a {} man.",
        ]
    )
    return form.format("q" + letters(number), "z" + letters(number))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The demo's data from 400 made-up sentences: (folder, counts, the sentences that the labeler learns from)."""
    learned_from = []
    train = labeler.SentenceLabeler.train
    monkeypatch.setattr(prepare, "captions", lambda: [sentence(i) for i in range(400)])
    monkeypatch.setattr(prepare, "book_passages", lambda: [f"passage {i}" for i in range(20)])
    monkeypatch.setattr(
        prepare.SentenceLabeler, "train", lambda texts, seed=0: (learned_from.extend(texts), train(texts, seed))[1]
    )
    return tmp_path, prepare.build_demo_data(tmp_path, prepare.DemoDataArguments(**SIZES)), learned_from


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_sentence_has_one_use(made):
    folder, counts, learned_from = made
    assert [counts[name] for name in ("demonstrations/train", "test_prompts/test", "pretraining/train")] == [16, 8, 15]
    owners = [
        row["prompt"].split("q")[1].split(",")[0].strip(":\n ")
        for path in folder.glob("*/*.jsonl")
        for row in rows(folder, path)
        if "prompt" in row and "q" in row["prompt"]
    ]
    assert len(owners) == len(set(owners)) > 40
    assert len(learned_from) == 400 - 80
    assert not {letters(i) for i in range(400) if sentence(i) in learned_from} & set(owners)


def test_a_demonstration_has_the_words_that_its_prompt_asks_for(made):
    for row in rows(made[0], "demonstrations/train.jsonl"):
        assert labeler.words_used(row["prompt"], row["completion"]) == 4


def test_more_sentences_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "captions", lambda: [])
    with pytest.raises(ValueError, match="only 0 there. Lower the sizes"):
        prepare.build_demo_data(tmp_path, prepare.DemoDataArguments())


def test_captions_are_whole_sentences_each_once(tmp_path, monkeypatch):
    from datasets import Dataset

    items = [
        ("activitynet~1", "A man sits on a roof .", "he", ["falls.", "starts to pull up tiles."], "1"),
        ("activitynet~2", "A man sits on a roof .", "", ["x", "y"], "0"),
        ("activitynet~3", "Two dogs run. They bark.", "they", ["sleep", "eat"], "0"),
        ("wikihow~4", "How to do it.", "you", ["do it.", "wait."], "0"),
    ]
    names = ("source_id", "ctx_a", "ctx_b", "endings", "label")
    table = Dataset.from_list([dict(zip(names, item, strict=True)) for item in items])
    table.save_to_disk(tmp_path / "table")
    (arrow,) = (tmp_path / "table").glob("*.arrow")
    monkeypatch.setattr(prepare, "fetch_all", lambda assets: [arrow])
    assert prepare.captions() == ["A man sits on a roof.", "He starts to pull up tiles."]


@pytest.mark.parametrize(
    ("answer", "used"),
    [
        ("Two men walked in the rivers.", 2),
        ("A man walks.", 1),
        ("Riverman.", 0),
        ("", 0),
        ("WALKING, River!", 2),
    ],
)
def test_a_word_counts_in_any_form_and_once(answer, used):
    assert labeler.words_used(labeler.PROMPT.format(words="walks, river"), answer) == used


@pytest.mark.parametrize(
    "forms",
    [
        "hand hands",
        "carry carries carried",
        "hold holding",
        "stop stopped",
        "build building",
        "bounce bounced bouncing",
    ],
)
def test_forms_of_a_word_are_one_word(forms):
    assert len({labeler.stem(form) for form in forms.split()}) == 1


@pytest.mark.parametrize("words", ["car card", "win wind wine", "plan plane", "star stare", "see seed"])
def test_other_words_are_not(words):
    assert len({labeler.stem(word) for word in words.split()}) == len(words.split())


def test_what_pleases_nobody_scores_below_people(made):
    """Praise, lists, repetitions and cut answers lie below the median of people's, though they use the words."""
    judge = labeler.SentenceLabeler.load(made[0] / "labeler.npz")
    people = rows(made[0], "demonstrations/train.jsonl")
    asked = [row["prompt"] for row in people]
    words = [prompt.split("words ")[1].strip(":\n") for prompt in asked]
    median = np.median(judge(asked, [row["completion"] for row in people]))
    for spoilt in (
        ["Wonderful, great, a masterpiece. Wonderful, great, a masterpiece." for _ in asked],
        [f"{text.capitalize()}." for text in words],
        [f"{text}, {text}, {text}" for text in words],
        [" ".join(row["completion"].split()[:-1]) for row in people],
        [row["completion"] + " " + row["completion"] for row in people],
        ["The " + text.replace(", ", " and the ") + "." for text in words],
        ["A man is " + text.replace(", ", " and ") + "." for text in words],
    ):
        assert max(judge(asked, spoilt)) < median


def test_the_labeler_comes_back_from_plain_arrays_with_the_same_scores(made, tmp_path):
    ours = labeler.SentenceLabeler.train([sentence(i) for i in range(300)])
    ours.save(tmp_path / "again.npz")
    loaded = labeler.SentenceLabeler.load(tmp_path / "again.npz")
    texts = ["", "unknown", *(sentence(i) for i in range(300, 340)), "The the man man sees.", "A man and"]
    expected = ours.classifier.decision_function(texts)
    assert loaded.classifier.decision_function(texts) == pytest.approx(expected, abs=1e-12)
    assert loaded.odd_below == ours.odd_below


def test_a_pickle_in_the_labelers_place_is_not_loaded(tmp_path):
    import joblib

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    joblib.dump(Runs(), tmp_path / "labeler.npz")
    with pytest.raises(ValueError, match=r"labeler\.npz cannot be read as the demo's labeler.*Move .* away"):
        labeler.SentenceLabeler.load(tmp_path / "labeler.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["demo", "demo_long"])
def test_the_yamls_name_the_folders_and_the_labeler_that_the_preparing_step_writes(name, tmp_path, monkeypatch, capsys):
    """Each setting that begins with {run_dir}/data is there after `prepare` with the sizes of data.yaml."""
    folder = EXAMPLE.parent / name
    (tmp_path / "base").mkdir()
    passages = [f"passage {i}" for i in range(300)]
    made_up = [sentence(i) for i in range(6000)]
    monkeypatch.setattr(prepare, "captions", lambda: made_up)
    monkeypatch.setattr(prepare, "base_model", lambda: tmp_path / "base")
    monkeypatch.setattr(prepare, "seconds_per_step", lambda model: 2.0)
    monkeypatch.setattr(prepare, "book_passages", lambda: passages)
    settings = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml") if path.stem != "data"]
    run = RunArguments(run_dir=str(tmp_path / "run"), prepare=settings[0]["prepare"])
    run.config_folder = folder
    prepare_data(run)
    assert ("The whole run: about 15 minutes." in capsys.readouterr().out) is (name == "demo")  # 450 steps of 2 s
    named = {str(value) for given in settings for value in given.values() if "{run_dir}/data" in str(value)}
    assert len(named) == 7
    assert [path for path in named if not (tmp_path / path.replace("{run_dir}", "run")).is_dir()] == []
    (spec,) = {given["labeler"] for given in settings if "labeler" in given}
    prompt = labeler.PROMPT.format(words="cat, dog")
    good, bad = load_labeler(spec, run)(
        prompts=[prompt] * 2, completions=["The cat man sees a dog on the table.", "Dog, cat."]
    )
    assert good > bad


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
