"""The routes of `reward_ranking.py`: what one of its processes does, one optimizer step a turn."""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

ROUTES = ("a", "b", "c", "floor")
MANY_PAIRS = 20  # from here on a step of route (a) takes one prompt by default, being long enough


@dataclass(frozen=True)
class Case:
    """K completions a prompt; tokens of the prompt, and of each answer with its EOS."""

    completions: int
    prompt: int
    answer: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """'9:128+128' as a case. Raises ValueError for anything else."""
        completions, lengths = text.split(":")
        prompt, answer = lengths.split("+")
        return cls(int(completions), int(prompt), int(answer))

    def __str__(self) -> str:
        return f"{self.completions}:{self.prompt}+{self.answer}"


def work(pipe: Any, route: str, case: Case, rows: list[dict], options: dict[str, Any]) -> None:
    """Sends 0.0 when set up, and again after the warm-up step; then, each time it is told to, seconds of a step.

    It ends with a summary, or with the text of an error.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        build = _floor if route == "floor" else _trainer
        pipe.send(build(pipe, route, case, rows, options))
    except Exception as error:  # the parent goes on with the other routes and prints this
        frame = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})")


def _summary(prompts: int, positions: float) -> dict[str, Any]:
    """Positions are those of one prompt. Peak memory: of the process on CPU, of tensors on GPU; in MB of 10^6 bytes."""
    import resource

    import torch

    cuda = torch.cuda.is_available()
    # Linux gives KiB. The parent never imports torch, so that what a child inherits of its peak is small.
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.get_device_name() if cuda else "cpu"
    summary = {"prompts": prompts, "positions": positions, "peak_mb": peak / 1e6}
    return {**summary, "threads": torch.get_num_threads(), "device": device}


def _clock() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Positions:
    """Counts the positions, padding included, that enter the backbone: what its token embedding looks up."""

    def __init__(self, backbone: Any):
        self.total = 0
        backbone.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, module: Any, args: Any, output: Any) -> None:
        self.total += output.shape[:-1].numel()


def _config(options: dict[str, Any], longest: int) -> Any:
    from transformers import LlamaConfig

    arguments: dict[str, Any] = {"num_labels": 1}
    return LlamaConfig(
        vocab_size=options["vocabulary"],
        hidden_size=options["hidden"],
        intermediate_size=options["hidden"] * 8 // 3,
        num_hidden_layers=options["layers"],
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=longest,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **arguments,
    )


def _tokenizer(vocabulary: int) -> Any:
    """One token a word: `<pad>` 0, `<eos>` 1, `<unk>` 2, then w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(vocabulary - 3))]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _trainer(pipe: Any, route: str, case: Case, rows: list[dict], options: dict[str, Any]) -> dict[str, Any]:
    """Routes (a), (b) and (c): one epoch is one optimizer step, so that each step sees the same prompts."""
    import datasets
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    from instruct_trl import RankingRewardConfig, RankingRewardTrainer

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(
        _config(options, 2 * (case.prompt + case.answer)), attn_implementation=options["attention"]
    )
    positions = _Positions(model)
    steps, begin = 0, 0.0

    class Turns(TrainerCallback):
        """Clocks from the end of a step to the end of the next, and waits for the parent in between."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pipe.send(0.0)
            pipe.recv()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal steps, begin
            steps = state.global_step
            pipe.send(_clock() - begin if steps > 1 else 0.0)
            if steps == 1:
                positions.total = 0  # a trainer may try its route on something small first
            control.should_training_stop = not pipe.recv()
            begin = _clock()

    arguments, data, prompts = _settings(route, case, rows, options)
    trainer_class: Any = RewardTrainer if route == "a" else RankingRewardTrainer
    config_class: Any = RewardConfig if route == "a" else RankingRewardConfig
    missing = set(arguments) - {field.name for field in fields(config_class)}
    if missing:
        raise RuntimeError(f"{config_class.__name__} of this version has no {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = trainer_class(
            model,
            config_class(folder, **arguments),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=_tokenizer(options["vocabulary"]),
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {**_summary(prompts, positions.total / (max(1, steps - 1) * prompts)), **_reported(trainer, steps * prompts)}


def _reported(trainer: Any, prompts: int) -> dict[str, float]:
    """`tokens_computed` of the trainer's own log, a prompt, to compare with what was counted here."""
    logged = [entry["tokens_computed"] for entry in trainer.state.log_history if "tokens_computed" in entry]
    return {"tokens_computed_logged": logged[-1] / prompts} if logged else {}


def _settings(
    route: str, case: Case, rows: list[dict], options: dict[str, Any]
) -> tuple[dict[str, Any], list[dict], int]:
    """(trainer arguments, dataset, prompts an optimizer step) of a route."""
    import torch

    per_forward = options["prompts_per_forward"] or max(1, 8 // case.completions)
    accelerated = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "max_steps": options["rounds"] + 2,  # never reached: the parent ends the run
        "optim": "sgd",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "bf16": options["bf16"],
        "use_cpu": not accelerated,
        "dataloader_pin_memory": accelerated,
        "gradient_checkpointing": options["gradient_checkpointing"],
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if route == "a":
        pairs = case.completions * (case.completions - 1) // 2
        few = pairs >= MANY_PAIRS and not options["ragged"]
        prompts = min(options["pair_prompts"] or (1 if few else len(rows)), len(rows))
        data = [pair for row in rows[:prompts] for pair in _pairs(row)]
        # As many rows a forward as (b) has, or the next number below that divides the step evenly.
        size = _divisor(len(data), per_forward * case.completions // 2)
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": len(data) // size}
        return arguments, data, prompts
    size = _divisor(len(rows), per_forward)
    arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": len(rows) // size}
    names = {field.name for field in fields(_ranking_config())}
    if route == "c" or "prefix_sharing" in names:  # without the field, one row a completion is all there is
        arguments["prefix_sharing"] = "on" if route == "c" else "off"
    if options["max_tokens_per_batch"]:
        arguments["max_tokens_per_batch"] = options["max_tokens_per_batch"]
    if options["two_pass"] and route == "c":
        arguments["two_pass"] = True
    return arguments, rows, len(rows)


def _ranking_config() -> Any:
    from instruct_trl import RankingRewardConfig

    return RankingRewardConfig


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, at least 1."""
    return max(size for size in range(1, max(1, limit) + 1) if number % size == 0)


def _pairs(row: dict) -> list[dict]:
    """All pairs of a prompt; its ranks have no ties."""
    ordered = [text for _, text in sorted(zip(row["ranks"], row["completions"], strict=True))]
    return [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for chosen, rejected in combinations(ordered, 2)
    ]


def _floor(pipe: Any, route: str, case: Case, rows: list[dict], options: dict[str, Any]) -> dict[str, Any]:
    """A bare forward and backward of P + ΣC tokens a prompt, in rows of length P + C and one shorter for the rest.

    A forward has about as many tokens as one of route (c).
    """
    import torch
    from transformers import AutoModel

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = case.prompt + case.answer
    backbone: Any = AutoModel.from_config(_config(options, 2 * length), attn_implementation=options["attention"])
    backbone.to(device).train()
    if options["gradient_checkpointing"]:
        backbone.gradient_checkpointing_enable()
    positions = _Positions(backbone)
    tokens = sum(len(row["prompt"].split()) + sum(len(c.split()) + 1 for c in row["completions"]) for row in rows)
    forwards = -(-len(rows) // (options["prompts_per_forward"] or max(1, 8 // case.completions)))
    size = max(1, round(tokens / forwards / length))
    full, rest = divmod(tokens, length)
    shapes = [(min(size, full - start), length) for start in range(0, full, size)] + ([(1, rest)] if rest else [])
    batches = [torch.randint(3, options["vocabulary"], shape, device=device) for shape in shapes]

    def step() -> None:
        backbone.zero_grad()
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=options["bf16"]):
                states = backbone(input_ids=batch, use_cache=False).last_hidden_state
            states[:, -1].float().mean().backward()

    pipe.send(0.0)
    pipe.recv()
    step()
    pipe.send(0.0)
    steps = 1
    while pipe.recv():
        begin = _clock()
        step()
        pipe.send(_clock() - begin)
        steps += 1
    return _summary(len(rows), positions.total / (steps * len(rows)))
