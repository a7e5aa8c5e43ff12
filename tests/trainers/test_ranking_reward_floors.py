"""The bag of words in a trainer's records: aligned with the rewards, whatever rows are and whichever were dropped."""

import pytest
from datasets import Dataset
from ranking_helpers import fresh_model, make

from instruct_trl.evaluation import floors
from instruct_trl.evaluation.floors import BagOfWords, TextRanking

ANSWERS = (["a bad one", "a good one", "so so"], ["good as gold", "poor"], ["never", "not good enough", "bad luck"])


def rankings(n, start=0):
    """Rows whose answers with "good" win; all others tie."""
    rows = []
    for number in range(start, start + n):
        answers = list(ANSWERS[number % 3])
        ranks = [1 if "good" in answer else 2 for answer in answers]
        rows.append({"prompt": f"Question {number}? ", "completions": answers, "ranks": ranks})
    return rows


def as_pairs(row):
    ranks = enumerate(row["ranks"])
    pairs = [[i, j] for i, a in ranks for j, b in enumerate(row["ranks"]) if a < b]
    return {"prompt": row["prompt"], "completions": row["completions"], "pairs": pairs}


def as_messages(row):
    completions = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "completions": completions}


def as_chosen(row):
    first = row["ranks"].index(1)
    loser = row["ranks"].index(2)
    texts = {"chosen": row["completions"][first], "rejected": row["completions"][loser]}
    return {side: row["prompt"] + text for side, text in texts.items()}  # TRL's implicit prompt


def unchanged(row):
    return row


@pytest.mark.parametrize("form", [unchanged, as_pairs, as_messages, as_chosen])
def test_the_bag_reads_the_answers_of_every_form_of_data(form, tokenizer, tmp_path):
    train, held_out = [form(row) for row in rankings(24)], [form(row) for row in rankings(9, 100)]
    trainer = make(fresh_model(), tokenizer, tmp_path, rows=train, eval_rows=held_out)
    metrics = trainer.evaluate()
    assert metrics["eval_pair_accuracy_bag_of_words"] == 1
    for record in trainer.evaluation_records:
        assert len(record["bag_of_words"]) == len(record["rewards"])
        assert all(record["bag_of_words"][w] > record["bag_of_words"][x] for w, x in record["pairs"])


def test_dropped_answers_and_rows_do_not_shift_the_scores(tokenizer, tmp_path):
    """The first answer of one row is too long, and so are all of another."""
    held_out, long = rankings(3, 102), "word " * 30
    held_out[0]["completions"][0] = long
    held_out[1]["completions"] = [long, long + "x"]
    held_out[1]["ranks"] = [1, 2]
    trainer = make(fresh_model(), tokenizer, tmp_path, rows=rankings(24), eval_rows=held_out, max_length=60)
    trainer.evaluate()
    kept = [held_out[0]["completions"][1:], held_out[2]["completions"]]
    bag = BagOfWords(TextRanking(row["completions"], as_pairs(row)["pairs"], row["prompt"]) for row in rankings(24))
    found = [record["bag_of_words"] for record in trainer.evaluation_records]
    assert [len(scores) for scores in found] == [2, 3]
    for scores, answers in zip(found, kept, strict=True):
        assert scores == pytest.approx(bag.scores(answers), abs=1e-6)


def test_each_of_several_sets_has_its_own_scores(tokenizer, tmp_path, monkeypatch):
    trained = []
    train = floors.BagOfWords.__init__

    def counted(self, rows):
        trained.append(1)
        train(self, rows)

    monkeypatch.setattr(floors.BagOfWords, "__init__", counted)
    trainer = make(fresh_model(), tokenizer, tmp_path, rows=rankings(24), eval_rows=rankings(3))
    one, other = (trainer._prepare_dataset(Dataset.from_list(rankings(n, 50)), tokenizer, trainer.args, str(n))
                  for n in (4, 5))  # fmt: skip
    trainer.evaluate({"one": one, "other": other})
    assert len(trainer.evaluation_records) == 5
    assert all("bag_of_words" in record for record in trainer.evaluation_records)
    trainer.evaluate(one)
    assert len(trainer.evaluation_records) == 4
    assert trained == [1]  # once for all evaluations


def test_without_training_rankings_or_scikit_learn_evaluation_goes_on(tokenizer, tmp_path, monkeypatch):
    trainer = make(fresh_model(), tokenizer, tmp_path, rows=rankings(5), eval_rows=rankings(3))
    assert "eval_pair_accuracy_bag_of_words" not in trainer.evaluate()  # too few prompts
    monkeypatch.setattr(floors, "find_spec", lambda name: None)
    trainer = make(fresh_model(), tokenizer, tmp_path, rows=rankings(24), eval_rows=rankings(3))
    metrics = trainer.evaluate()
    assert metrics["eval_pair_accuracy_length"] >= 0.5
    assert all("bag_of_words" not in record for record in trainer.evaluation_records)
