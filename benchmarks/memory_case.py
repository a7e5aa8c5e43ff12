"""One case of `memory.py`: its models, its iteration, its figures. Imported in the case's own process."""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from instruct_trl.recipes.demo.prepare import base_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from instruct_trl import PPOPtxConfig, PPOPtxTrainer, RewardScorer
from instruct_trl.memory.plan import MemoryPlan, PPOModels, ppo_plan
from instruct_trl.models.value import ValueModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUANTISATION: dict[str, Any] = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
}  # fmt: skip


def lora(args: Any, task: str) -> LoraConfig:
    """The adapter of every role that has one."""
    targets = ATTENTION if args.targets == "attention" else "all-linear"
    return LoraConfig(task_type=task, r=args.rank, lora_alpha=2 * args.rank, target_modules=targets)


def make_pieces(args: Any) -> dict[str, Any]:
    """Write `base/`, `sft/` and `rm/` (adapters on it) under `args.pieces`; say what the base is."""
    given = Path(args.model) if args.model else base_model()
    if given.suffix == ".json":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given), dtype=torch.float32)
        tokenizer = byte_tokenizer()
    else:
        model = AutoModelForCausalLM.from_pretrained(str(given), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(given))
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = next(t for t in tokenizer.all_special_tokens if t != tokenizer.eos_token)
    model.config.pad_token_id = tokenizer.pad_token_id
    base = args.pieces / "base"
    model.save_pretrained(base)
    for name in ("base", "sft", "rm"):
        tokenizer.save_pretrained(args.pieces / name)
    model.name_or_path = str(base)
    get_peft_model(model, lora(args, "CAUSAL_LM")).save_pretrained(args.pieces / "sft")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    get_peft_model(classifier, lora(args, "SEQ_CLS")).save_pretrained(args.pieces / "rm")
    (args.pieces / "rm" / "reward_config.json").write_text(json.dumps({"reward_bias": 0.0, "dtype": "float32"}))
    bases = {kind: unique_bytes(load_base(base, kind)) for kind in ("fp32", "bf16", "nf4")}
    return {
        "name": given.parent.name if given.suffix == ".json" else given.name,
        "parameters": sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters()),
        "bases": bases,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def byte_tokenizer() -> Any:
    """256 bytes, an EOS and a pad token, for a config without a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|eos|>")


def load_base(path: Path, kind: str) -> Any:
    """The base as causal language model: 'fp32', 'bf16' or 'nf4'."""
    kwargs = base_kwargs(kind)
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def base_kwargs(kind: str) -> dict[str, Any]:
    """Quantisation and dtype with which the base is loaded; 4-bit computes in bf16 on a GPU and in float32 on a CPU."""
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if kind != "nf4":
        return {"dtype": torch.bfloat16 if kind == "bf16" else torch.float32}
    from transformers import BitsAndBytesConfig

    return {"dtype": compute, "quantization_config": BitsAndBytesConfig(**QUANTISATION, bnb_4bit_compute_dtype=compute)}


def unique_bytes(*models: Any) -> int:
    """Bytes of the storages of all parameters, buffers and quantisation tables, each counted once."""
    found: dict[tuple[str, int], int] = {}
    for model in models:
        tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "rotary" not in n)]
        for tensor in list(tensors):
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
                tensors += [state.absmax, state.code, *nested]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[str(storage.device), storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def settings(args: Any, pieces: Path) -> PPOPtxConfig:
    """One iteration of two optimizer steps."""
    return PPOPtxConfig(
        str(pieces / "run"),
        generation_batch_size=args.rollout,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=max(1, args.rollout // 2 // args.micro_batch),
        local_rollout_forward_batch_size=args.chunk,
        total_episodes=args.rollout,
        max_prompt_length=args.prompt,
        max_completion_length=args.completion,
        generation_kwargs={"min_new_tokens": args.completion},  # as long as the prediction takes them to be
        ptx_coef=1.0,
        ptx_ratio=1,
        ptx_max_length=args.ptx_length,
        gradient_checkpointing=args.checkpointing,
        bf16=args.autocast,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def text_of(tokenizer: Any, tokens: int) -> str:
    """A text of exactly so many tokens."""
    text = ""
    while len(tokenizer(text)["input_ids"]) < tokens:
        text += " a"
    while len(tokenizer(text)["input_ids"]) > tokens:
        text = text[:-1]
    return text


def make_trainer(args: Any, base: Path, tokenizer: Any, config: PPOPtxConfig) -> tuple[Any, list[Any]]:
    """(trainer, the modules whose weights count) of a case."""
    prompts = Dataset.from_dict({"prompt": [text_of(tokenizer, args.prompt)] * args.rollout})
    texts = Dataset.from_dict({"text": [text_of(tokenizer, args.ptx_length - 1)] * (2 * args.rollout)})
    shared: dict[str, Any] = {"processing_class": tokenizer, "pretraining_dataset": texts}

    def classifier() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        return model.to(config.device)

    if args.case.startswith("one_base"):
        from instruct_trl import RoleAdapters

        kwargs = base_kwargs(args.case.removeprefix("one_base_"))
        roles = RoleAdapters(str(base), args.pieces / "sft", args.pieces / "rm", **kwargs)
        trainer = PPOPtxTrainer(None, None, config, prompts, role_adapters=roles, **shared)
        return trainer, [trainer.model, trainer.role_adapters.reward, trainer.role_adapters.value]
    policy = load_base(base, "fp32")
    if args.case == "four_lora":
        policy = get_peft_model(policy, lora(args, "CAUSAL_LM"))
        reference = get_peft_model(load_base(base, "fp32"), lora(args, "CAUSAL_LM"))
        reward, value = (get_peft_model(classifier(), lora(args, "SEQ_CLS")) for _ in range(2))
        shared |= {"ref_model": reference.base_model.model, "value_model": ValueModel(value.base_model.model)}
        scorer = RewardScorer(reward.eval(), tokenizer, batch_size=args.chunk)
    else:
        shared["peft_config"] = lora(args, "CAUSAL_LM") if args.case == "policy_lora" else None
        scorer = RewardScorer(classifier().eval(), tokenizer, batch_size=args.chunk)
    trainer = PPOPtxTrainer(policy, scorer, config, prompts, **shared)
    models = [trainer.model, scorer.model, trainer.critic.unwrapped]
    return trainer, models + ([] if trainer.ref_model is None else [trainer.ref_model])


def out_of_the_file(models: list[Any]) -> None:
    """Copy weights that are still pages of the checkpoint's file into memory of the process.

    On a CPU, float32 weights are the mapped file itself. One of them keeps the whole file mapped, also where the others
    were converted, and a page counts as resident only once it is read.
    """
    with torch.no_grad():
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.device.type == "cpu" and getattr(tensor, "quant_state", None) is None:
                    tensor.data = tensor.data.clone()


class Peak:
    """Peak memory between `start` and `read`, above what the process held when this was made."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.base = 0 if self.gpu else self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # no such file outside Linux; macOS counts ru_maxrss in bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def start(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
        except OSError:
            print("VmHWM cannot be reset here: the peak includes loading.", file=sys.stderr)

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.gpu else self._status("VmRSS") - self.base

    def read(self) -> int:
        return torch.cuda.max_memory_allocated() if self.gpu else self._status("VmHWM") - self.base


def measure(args: Any) -> dict[str, Any]:
    """Weights, peak and pace of one iteration."""
    from benchmarks.common import quiet

    quiet()
    config = settings(args, args.pieces)
    base = args.pieces / "base"
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    peak = Peak()
    trainer, models = make_trainer(args, base, tokenizer, config)
    out_of_the_file(models)
    gc.collect()
    loaded = peak.now()
    peak.start()
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    pace = args.rollout / seconds
    return {"peak": peak.read(), "loaded": loaded, "weights": unique_bytes(*models), "episodes_per_second": pace}


def plan_of(args: Any, case: str, pieces: Path) -> MemoryPlan:
    """The dry run's plan of a case."""
    config = AutoConfig.from_pretrained(pieces / "base")
    gpu = torch.cuda.is_available()
    layout, _, kind = ("one_base", "", case.removeprefix("one_base_")) if case.startswith("one") else (case, "", "fp32")
    models = PPOModels(
        config,
        config,
        layout,
        dtype=torch.bfloat16 if kind == "bf16" or (kind == "nf4" and gpu) else torch.float32,
        nf4=True if kind == "nf4" else None,
        peft_config=lora(args, "CAUSAL_LM"),
        autocast=args.autocast,
    )
    return ppo_plan(models, settings(args, pieces), prompt=args.prompt, fused_head=gpu)
