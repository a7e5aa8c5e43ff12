"""A model folder with files missing or cut short is refused by every loader, before anything of it is loaded."""

import shutil

import pytest
import torch
from conftest import tiny_config
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from instruct_trl.models.loading import load_causal_model
from instruct_trl.models.model_files import check_model_path, check_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    LlamaForCausalLM(tiny_config()).save_pretrained(root / "whole")
    LlamaForCausalLM(tiny_config()).save_pretrained(root / "shards", max_shard_size="20KB")
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(root / "rm")
    return root


@pytest.fixture
def folder(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved / name, tmp_path / name)

    return copy


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("left", [0, 5, 100, 3000, -1])
def test_weights_cut_short_anywhere_are_refused_by_folder_and_file(folder, left):
    model = folder("whole")
    check_model_path(model)
    cut(model / "model.safetensors", left)
    with pytest.raises(ValueError, match=r"whole' (are|have) .*'model.safetensors'.*Download or copy"):
        check_model_path(model)
    check_model_path(model, weights=False)


def test_an_index_that_names_a_missing_or_cut_shard_is_refused(folder):
    model = folder("shards")
    check_model_path(model)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    cut(shards[1], 500)
    with pytest.raises(ValueError, match=shards[1].name):
        check_model_path(model)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lack a file that their index names: '{shards[1].name}'"):
        check_model_path(model)


def test_weights_of_torch_are_checked_as_well_where_they_are_what_is_read(folder):
    model = folder("whole")
    torch.save({"w": torch.zeros(1000)}, model / "pytorch_model.bin")
    cut(model / "pytorch_model.bin", 900)
    check_model_path(model)  # transformers reads the safetensors beside it
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are cut short: 'pytorch_model.bin'"):
        check_model_path(model)
    torch.save({"w": torch.zeros(1000)}, model / "pytorch_model.bin")
    check_model_path(model)
    torch.save({"w": torch.zeros(1000)}, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_model_path(model)


def test_an_adapter_is_looked_at_by_its_own_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="incomplete: its weights are missing"):
        check_model_path(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    check_model_path(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        check_model_path(tmp_path)


def test_a_folder_without_a_model_names_those_inside_it(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no model: neither config.json nor adapter_config.json. Download"):
        check_model_path(tmp_path)
    folder("whole")
    with pytest.raises(ValueError, match="Its folders whole hold one: name one of these"):
        check_model_path(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_json_cut_short_is_refused_by_name(folder, name):
    model = folder("whole")
    cut(model / name, 30)
    with pytest.raises(ValueError, match=f"{name}' is broken or cut short"):
        check_model_path(model)


def test_a_folder_without_a_tokenizer_is_refused_and_a_hub_name_passes(saved, tokenizer, tmp_path):
    check_tokenizer("someone/model")
    with pytest.raises(ValueError, match="whole' has no tokenizer. Save the model's own into it"):
        check_tokenizer(saved / "whole")
    tokenizer.save_pretrained(tmp_path)
    check_tokenizer(tmp_path)


def test_every_way_in_looks_at_the_files_first(folder, tokenizer, tmp_path):
    from instruct_trl import InstructSFTTrainer, RewardScorer, select_checkpoint
    from instruct_trl.models.value import ValueModel
    from instruct_trl.pipeline.sampling import load_causal_lm
    from instruct_trl.trainers.instruct_sft import InstructSFTConfig

    model, reward = folder("whole"), folder("rm")
    for path in (model, reward):
        tokenizer.save_pretrained(path)
        cut(path / "model.safetensors", 2000)
    shutil.copytree(model, tmp_path / "run" / "checkpoint-1")
    args = InstructSFTConfig(str(tmp_path / "out"), report_to="none", eval_strategy="no", bf16=False)
    ways = {
        "RewardScorer": lambda: RewardScorer(reward),
        "ValueModel": lambda: ValueModel.from_pretrained(reward),
        "sampling": lambda: load_causal_lm(str(model)),
        "SFT": lambda: InstructSFTTrainer(str(model), args),
        "selection": lambda: select_checkpoint(tmp_path / "run", lambda **_: [0.0, 1.0], ["a", "b"]),
    }
    for load in ways.values():
        with pytest.raises(ValueError, match=r"are cut short.*'model\.safetensors'"):
            load()


def test_a_model_is_looked_for_where_it_is_loaded_from(folder, tmp_path):
    model = folder("whole")
    with pytest.raises(ValueError, match="holds no model"):
        check_model_path(tmp_path)
    check_model_path(tmp_path, subfolder=model.name)
    cut(model / "model.safetensors", 100)
    with pytest.raises(ValueError, match="model.safetensors"):
        check_model_path(tmp_path, subfolder=model.name)
    check_model_path(tmp_path, gguf_file="model.gguf")
    assert load_causal_model(shutil.copytree(folder("shards"), tmp_path / "a" / "b").parent, subfolder="b")
