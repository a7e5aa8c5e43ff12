"""`--dry_run` of every recipe: it fits or says what to do, from configs alone, and nothing is made."""

import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl import ModelConfig

from instruct_trl.memory import arithmetic as arithmetic
from instruct_trl.memory import dry_run
from instruct_trl.memory import plan as memory_plan
from instruct_trl.memory.plan import MemoryPlan, Phase, RoleModel, total
from instruct_trl.memory.ppo import LAYOUTS, PPOModels, PPOSizes, ppo_plan, ppo_roles
from instruct_trl.memory.report import ACCUMULATION, GB, ROWS, Device, Stage, report, this_device
from instruct_trl.memory.shapes import ModelShape
from instruct_trl.memory.trace import Precision, trace_pass

RECIPES = Path(__file__).parents[2] / "recipes"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoraConfig(r=2, target_modules=ATTENTION)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the configs of a tiny model and of a 7B one, and no weights anywhere."""
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "tiny")
    tiny_config(num_labels=1).save_pretrained(tmp_path / "rm")
    seven().save_pretrained(tmp_path / "7b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seven():
    """The sizes of Llama 2 7B."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip


def run(capsys, recipe, *arguments):
    """What the recipe prints before it stops."""
    main = importlib.import_module(f"instruct_trl.recipes.{recipe}").main
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in (*arguments, "--dry_run", "--cpu_threads", 1)])
    assert stop.value.code == 0
    return capsys.readouterr().out


OWN = {
    "sft": ("--model_name_or_path", "tiny"),
    "sample": ("--model_name_or_path", "tiny", "--max_completion_length", 16),
    "reward_model": ("--model_name_or_path", "tiny", "--max_length", 64),
    "select_sft": ("--sft_path", "tiny", "--reward_model_path", "rm", "--max_completion_length", 16),
    "ppo_ptx": ("--model_name_or_path", "tiny", "--reward_model_path", "rm"),
    "evaluate": ("--sft_model", "tiny", "--reward_model_path", "rm", "--max_completion_length", 16),
}


@pytest.mark.parametrize("recipe", OWN)
def test_every_recipe_prints_its_plan_and_makes_nothing(recipe, home, capsys):
    before = sorted(home.rglob("*"))
    out = run(capsys, recipe, *OWN[recipe], "--dataset_name", "not_there.jsonl", "--run_dir", "run")
    assert out.startswith(f"Dry run of recipes/{recipe}.py")
    assert re.search(r"^fits: ", out.splitlines()[-1])
    assert not re.search(r" -\d", out)  # no negative size
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.slow) if r == "ppo_ptx" else r for r in OWN])
def test_the_demo_is_planned_without_its_model(recipe, home, capsys, monkeypatch):
    """Its model is not there and would be downloaded: the plan knows its shape."""
    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(home / "empty"))
    out = run(capsys, recipe, "--run_dir", home / "run", "--device_memory_gb", 80)
    assert "538" in out or "0.54 GB" in out  # 134.5 M float32 weights
    assert not (home / "empty").exists()


def test_the_shape_of_the_demo_is_that_of_its_model(home, monkeypatch):
    monkeypatch.setenv("INSTRUCT_TRL_CACHE", str(home / "empty"))
    assert ModelShape(dry_run.demo_config()).parameters == 134_515_008  # as SmolLM2-135M's card says: 135M


def test_a_missing_model_is_an_error(home, capsys):
    from instruct_trl.recipes.sft import main

    with pytest.raises(ValueError, match=r"no model folder './gone'"):
        main(["--dry_run", "--model_name_or_path", "./gone", "--cpu_threads", "1"])


def test_ppo_of_a_tiny_model_in_numbers(home, capsys):
    """Against counts of a real model."""
    config = tiny_config()
    real = LlamaForCausalLM(config)
    policy = sum(p.numel() for p in real.parameters())
    value = sum(p.numel() for p in real.model.parameters()) + 16
    plan = ppo_plan(PPOModels(config, config), PPOSizes(rollout=4, chunk=4, micro_batch=2, prompt=8, completion=8))
    assert total(plan.resident, kinds=["weights"]) == 4 * (2 * policy + 2 * value)
    assert total(plan.resident, "policy", ["optimizer"]) == 8 * policy
    assert total(plan.resident, "policy", ["average"]) == 4 * policy
    assert total(plan.resident, "value", ["optimizer"]) == 8 * value
    assert total(plan.resident, "reward", ["optimizer"]) == 0
    (step,) = [phase for phase in plan.phases if phase.name == "optimizer step"]
    assert step.size == 4 * (policy + value)


def test_layouts_hold_what_their_names_say():
    config = tiny_config()
    adapter = sum(p.numel() for p in get_peft_model(LlamaForCausalLM(config), LORA).parameters() if p.requires_grad)
    base = ModelShape(config).parameters
    classifier = ModelShape(config, score=True).parameters
    weights = {}
    for layout in LAYOUTS:
        roles = ppo_roles(PPOModels(config, config, layout, peft_config=LORA))
        weights[layout] = sum(total(role.resident(), kinds=["weights", "adapters"]) for role in roles.values())
    assert weights["four_full"] == 4 * (2 * base + 2 * classifier)
    assert weights["policy_lora"] == 4 * (base + adapter + 2 * classifier)
    assert weights["four_lora"] == 4 * (2 * base + 2 * classifier + 4 * adapter)
    assert weights["one_base"] == 4 * (base + 4 * adapter + 2 * 16)  # two scalar heads
    trained = ppo_roles(PPOModels(config, config, "one_base", peft_config=LORA))
    assert [role.trainable for role in trained.values()] == [0, adapter, 0, adapter + 16, 0]


def test_adapters_are_refused_where_they_are_missing():
    config = tiny_config()
    with pytest.raises(ValueError, match="needs a peft_config"):
        ppo_roles(PPOModels(config, config, "one_base"))
    with pytest.raises(ValueError, match="layout must be one of"):
        ppo_roles(PPOModels(config, config, "two_bases"))


@pytest.mark.slow
def test_a_7b_in_4_bit_fits_16_gb():
    """Prompts 512 + answers 256, rollout micro-batch 8; the base alone is about half a byte a parameter."""
    config = seven()
    lora = LoraConfig(r=16, target_modules=ATTENTION)
    models = PPOModels(
        config, config, "one_base", dtype=torch.bfloat16, nf4=True, peft_config=lora, autocast=True
    )  # fmt: skip
    sizes = PPOSizes(
        rollout=128, chunk=8, reward_chunk=8, micro_batch=2, accumulation=16, prompt=512, completion=256,
        ptx_length=512, ptx_ratio=1, fused_head=True,
    )  # fmt: skip
    plan = ppo_plan(models, sizes)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    plain = 2 * 32000 * 4096 + 65 * 4096
    expected = (0.5 + 1 / 64 + 4 / (64 * 256)) * linear + 2 * plain
    assert total(plan.resident, "base") == pytest.approx(expected, rel=1e-3)
    cache = 2 * 32 * 8 * 768 * 4096 * 2
    assert total(plan.phases[0].items, kinds=["KV cache"]) == cache
    assert plan.resident_size + cache < plan.peak < 16e9
    four = [role.resident() for role in ppo_roles(PPOModels(config, config)).values()]
    assert sum(total(items) for items in four) > 100e9  # four full float32 models with AdamW


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_ptx_qlora_16gb", "ppo_ptx_qlora_24gb", "ppo_ptx_lora_small"])
def test_the_yamls_of_one_base_fit_their_cards(name, home, capsys):
    model = "tiny" if "small" in name else "7b"
    models = ("--model_name_or_path", model, "--dataset_name", "prompts.jsonl")
    out = run(capsys, "ppo_ptx", "--config", RECIPES / f"{name}.yaml", *models)
    card = {"ppo_ptx_qlora_16gb": 16, "ppo_ptx_qlora_24gb": 24, "ppo_ptx_lora_small": 8}[name]
    assert f"a GPU with {card} GB" in out
    assert out.splitlines()[-1].startswith("fits: ")
    assert re.search(r"^base ", out, flags=re.MULTILINE)


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_to_do(home, capsys):
    """The advice is taken, and then it fits."""
    settings = [
        "--model_name_or_path",
        "tiny",
        "--reward_model_path",
        "rm",
        "--dataset_name",
        "x",
        "--config",
        "p.yaml",
    ]
    (home / "p.yaml").write_text(
        "generation_batch_size: 512\nper_device_train_batch_size: 64\ngradient_accumulation_steps: 8\n"
        "local_rollout_forward_batch_size: 512\nmax_prompt_length: 4000\nmax_completion_length: 4000\n"
        "gradient_checkpointing: false\nptx_max_length: 64\n"
    )
    out = run(capsys, "ppo_ptx", *settings, "--device_memory_gb", 2)
    last = out.splitlines()[-1]
    advice = re.match(r"does not fit: .* Do this: (.*); the peak is then", last).group(1)
    assert "--gradient_checkpointing true" in advice
    taken = dict(change.split(" ") for change in advice.split(", "))
    rows, accumulation = (int(taken[f"--{name}"]) for name in (ROWS, ACCUMULATION))
    assert rows * accumulation == 64 * 8  # the minibatch, and with it the steps an iteration, are the user's
    changes = [part for change in advice.split(", ") for part in change.split(" ")]
    out = run(capsys, "ppo_ptx", *settings, "--device_memory_gb", 2, *changes)
    assert out.splitlines()[-1].startswith("fits: ")


@pytest.mark.slow
def test_models_that_are_too_large_by_themselves_are_sent_to_one_base(home, capsys):
    out = run(capsys, "ppo_ptx", "--model_name_or_path", "7b", "--dataset_name", "x", "--device_memory_gb", 24)
    assert "the models alone are too large. Do this: hold the four roles on one frozen base" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("one_base", "model", "advice"),
    [
        (False, {}, "hold the four roles on one frozen base (see recipes/ppo_ptx_qlora_16gb.yaml)"),
        (True, {}, "load the base in 4 bits (--load_in_4bit)"),
        (True, {"load_in_4bit": True, "lora_modules_to_save": ["lm_head"]}, "leave --lora_modules_to_save out"),
        (None, {}, "train an adapter (--use_peft)"),
        (None, {"use_peft": True}, "load the base in 4 bits (--load_in_4bit)"),
        (None, {"use_peft": True, "load_in_4bit": True}, None),
    ],
)
def test_the_last_resort_is_one_that_the_run_has_not_taken(one_base, model, advice):
    run = SimpleNamespace() if one_base is None else SimpleNamespace(one_base=one_base)
    expected = "take a smaller model" if advice is None else f"{advice}, or take a smaller model"
    assert dry_run.last_resort(run, ModelConfig(**model)) == expected
    assert dry_run.last_resort(run, object()) == "take a smaller model"


def fixed(size, phase="update"):
    item = memory_plan.Item("model", "weights", size)
    return MemoryPlan((item,), (Phase(phase, (memory_plan.Item("model", "activations", 10 * GB),)),))


def test_the_verdict_leaves_room_for_the_driver():
    device = Device("a card", 20 * GB, True)  # 5 % and half a GB stay free
    assert device.usable == 18.5 * GB
    ok = report(Stage("x", lambda _: fixed(int(8.5 * GB)), {}, {}), device)
    assert ok.splitlines()[-1] == "fits: 0.0 MB to spare"
    bad = report(Stage("x", lambda _: fixed(int(8.5 * GB) + 1), {}, {}), device)
    assert bad.splitlines()[-1].startswith("does not fit: ")


def test_the_device_is_a_card_of_that_size_or_what_is_there():
    assert this_device(16) == Device("a GPU with 16 GB", 16 * GB, True)
    assert this_device().memory > GB


def test_the_head_decides_between_full_logits_and_tiles():
    config = tiny_config(vocab_size=8000)
    sizes = {
        "rollout": 4,
        "chunk": 4,
        "reward_chunk": 4,
        "micro_batch": 4,
        "prompt": 8,
        "completion": 8,
        "ptx_ratio": 0,
    }
    for fused in (False, True):
        plan = ppo_plan(PPOModels(config, config), PPOSizes(**sizes, fused_head=fused))
        (scores,) = [phase for phase in plan.phases if phase.name == "log-probs"]
        logits = total(scores.items, kinds=["logits"])
        expected = arithmetic.fused_head_bytes(32, 16, 8000) if fused else arithmetic.logps_bytes(32, 8000)
        assert logits == expected


def test_gradients_wait_for_each_other_when_they_accumulate():
    config = tiny_config()
    sizes = {"rollout": 4, "chunk": 4, "micro_batch": 2, "prompt": 8, "completion": 8, "ptx_ratio": 0}

    def gradients(accumulation, role):
        plan = ppo_plan(PPOModels(config, config), PPOSizes(**sizes, accumulation=accumulation))
        (update,) = [phase for phase in plan.phases if phase.name == "policy update"]
        return total(update.items, role, ["gradients"])

    assert gradients(1, "value") == 0
    assert gradients(2, "value") == 4 * ModelShape(config, score=True).parameters


def test_4_bit_leaves_embeddings_norms_and_head_as_they_are():
    config = tiny_config(hidden_size=64, intermediate_size=128)
    shape = ModelShape(config)
    role = RoleModel("base", shape, Precision(torch.bfloat16), nf4=True)
    real = LlamaForCausalLM(config)
    packed = [m.weight.numel() for n, m in real.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    plain = sum(p.numel() for p in real.parameters()) - sum(packed)
    assert role.base_bytes() == 2 * plain + arithmetic.nf4_bytes(packed)


def test_settings_of_a_dry_run_do_not_make_another_run(home):
    from instruct_trl.pipeline.arguments import RunArguments, settings_of

    assert settings_of(RunArguments(dry_run=True, device_memory_gb=3.0, cpu_threads=1)) == {}


def test_an_adapter_folder_gives_base_and_rank(home):
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=3))
    model.save_pretrained(home / "base")
    model.name_or_path = str(home / "base")
    get_peft_model(model, LORA).save_pretrained(home / "sft")
    shutil.rmtree(home / "base")
    tiny_config(num_hidden_layers=3).save_pretrained(home / "base")  # the config alone
    assert dry_run.config_of(str(home / "sft")).num_hidden_layers == 3
    assert dry_run.adapter_of(str(home / "sft")).r == 2
    assert dry_run.adapter_of(str(home / "base")) is None


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_saved_adapter_is_planned_as_one_that_trains(home, task_type, checkpointing):
    """PEFT saves `inference_mode: true`, which would freeze it."""
    kind = LlamaForCausalLM if task_type == "CAUSAL_LM" else LlamaForSequenceClassification
    lora = LoraConfig(r=2, target_modules=ATTENTION, task_type=task_type)
    model = get_peft_model(kind(tiny_config(num_labels=1)), lora)
    model.save_pretrained(home / "saved")
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    peft_config = dry_run.adapter_of(str(home / "saved"))
    found = trace_pass(tiny_config(), 2, 8, peft_config=peft_config, train=True, checkpointing=checkpointing)
    assert found.gradients == 4 * adapter


@pytest.mark.parametrize("kind", ["rotated", "absolute", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_a_generation_under_bf16_is_that_of_a_real_one(kind, dtype):
    """With autocast where accelerate puts it: on the forward of what was prepared."""
    if kind == "absolute":
        config = GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=256)
        model = GPT2LMHeadModel(config).to(dtype)
    else:
        config = tiny_config()
        model = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=2, target_modules=ATTENTION, task_type="CAUSAL_LM") if kind == "adapter" else None
    if lora is not None:
        model = get_peft_model(model, lora)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ids = torch.ones(3, 5, dtype=torch.long)
    cache = model.eval().generate(
        input_ids=ids, attention_mask=ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True,
        pad_token_id=257,
    ).past_key_values  # fmt: skip
    found = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    role = RoleModel("policy", ModelShape(config), Precision(dtype, autocast=True), lora)
    assert role.kv_cache(3, 5 + 4 - 1) == found  # nothing follows the last token
    if lora is not None:
        without = RoleModel("policy", role.shape, Precision(dtype), lora)
        assert memory_plan.generation_phase(role, 3, 5, 4) == memory_plan.generation_phase(without, 3, 5, 4)
