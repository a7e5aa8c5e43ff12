"""What a run puts on the hub: policy, value model and average, and a card that names method, paper and base.

The hub is a list in memory: `create_repo` and `upload_folder` of huggingface_hub's client, as Trainer calls them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from ppo_helpers import make
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


class Hub:
    """Keeps of each upload its settings and the files as they are then."""

    def __init__(self):
        self.repos, self.uploads = [], []

    def create_repo(self, repo_id, **_):
        self.repos.append(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **settings):
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        files = {name: (folder / name).read_bytes() for name in kept}
        self.uploads.append(SimpleNamespace(repo_id=repo_id, files=files, **settings))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def of(upload, folder, suffix):
    return {name for name in upload.files if name.startswith(folder) and name.endswith(suffix)}


@pytest.mark.parametrize("call", ["save_model", "push_to_hub"])
def test_a_push_has_policy_value_and_average_and_the_policy_at_the_root(tmp_path, policy, scorer, tokenizer, hub, call):
    policy.config._name_or_path = "some-org/some-base"
    trainer = make(
        tmp_path / "run", policy, scorer, tokenizer, push_to_hub=True, hub_model_id="me/my-ppo", hub_strategy="end",
        total_episodes=16, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train()
    assert hub.repos == ["me/my-ppo"]
    assert hub.uploads == []
    getattr(trainer, call)()
    (upload,) = hub.uploads
    assert upload.repo_id == "me/my-ppo"
    weights = of(upload, "", ".safetensors")
    assert weights == {"model.safetensors", *(f"{part}/model.safetensors" for part in ("policy", "value", "ema"))}
    assert not of(upload, "checkpoint-", "")
    head = policy.lm_head.weight
    for name, same in (("model", True), ("policy/model", True), ("ema/model", False)):
        assert torch.equal(load(upload.files[f"{name}.safetensors"])["lm_head.weight"], head) is same
    for folder in ("", "policy/", "value/", "ema/"):
        assert {f"{folder}config.json", f"{folder}tokenizer.json"} <= upload.files.keys()
    where = tmp_path / "clone"
    for name, content in upload.files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(where)
    value = AutoModelForSequenceClassification.from_pretrained(where, subfolder="value")
    torch.testing.assert_close(value.score.weight, trainer.critic.unwrapped.classifier.score.weight)

    card = upload.files["README.md"].decode()
    assert "trained with PPO-ptx, a method introduced in [Training language models to follow instructions" in card
    assert "https://huggingface.co/papers/2203.02155" in card
    assert "base_model: some-org/some-base" in card
    assert "Long Ouyang and Jeffrey Wu" in card
    for tag in ("ppo-ptx", "instruct-trl", "trl"):
        assert f"- {tag}\n" in card
    assert 'model="me/my-ppo"' in card  # the quick start, which reads the root


def test_each_save_is_pushed_without_the_training_state(tmp_path, policy, scorer, tokenizer, hub):
    trainer = make(
        tmp_path / "run", policy, scorer, tokenizer, push_to_hub=True, hub_model_id="me/my-ppo", save_steps=2,
        total_episodes=16, save_strategy="steps", hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    assert [upload.commit_message for upload in hub.uploads] == [
        "Training in progress, step 2",
        "Training in progress, step 4",
    ]
    for upload in hub.uploads:
        assert of(upload, "", ".safetensors") == {"model.safetensors"}
        assert not of(upload, "", ".pt")
        assert "rng_state.pth" not in upload.files
    head = load(hub.uploads[-1].files["model.safetensors"])["lm_head.weight"]
    assert torch.equal(head, policy.lm_head.weight)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
