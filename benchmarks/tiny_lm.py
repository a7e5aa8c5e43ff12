"""A small real language model for the reward-model benchmarks, trained once on movie reviews and kept under outputs/.

    python -m benchmarks.tiny_lm [--steps 500]

A Llama of 4.2M parameters (4 layers, hidden 256) with a byte-level BPE of 4,096 tokens. It never saw the sentences
that the benchmarks rank.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.common import OUTPUTS, machine, sentences

VOCABULARY = 4096
BLOCK = 128  # tokens a training row
ROWS = 16  # rows an optimizer step


def tiny_lm(folder: Path = OUTPUTS / "tiny_lm", steps: int = 500, max_words: int = 28, bf16: bool = False) -> Path:
    """The folder of the model and its tokenizer; trained there first unless it holds one of the same settings."""
    settings = {"steps": steps, "max_words": max_words, "bf16": bf16}
    done = folder / "benchmark.json"
    if done.exists() and json.loads(done.read_text(encoding="utf-8"))["settings"] == settings:
        return folder
    texts = [review["text"] for review in sentences(max_words)[1]]
    random.Random(0).shuffle(texts)
    print(f"Training the tiny language model ({steps} steps of {ROWS * BLOCK:,} tokens, once) ...", flush=True)
    tokenizer = _tokenizer(texts)
    begin = time.perf_counter()
    loss = _train(tokenizer, texts, folder, steps, bf16)
    minutes = (time.perf_counter() - begin) / 60
    print(f"... {minutes:.1f} minutes, validation loss {loss:.2f} a token.", flush=True)
    report = {"settings": settings, "validation_loss": loss, "minutes": minutes}
    done.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return folder


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|pad|>")


def _blocks(tokenizer: Any, texts: list[str]) -> list[dict]:
    """The texts, an EOS after each, as rows of `BLOCK` tokens; what is left at the end is dropped."""
    ids = tokenizer([text + tokenizer.eos_token for text in texts])["input_ids"]
    tokens = list(chain.from_iterable(ids))
    return [{"input_ids": tokens[start : start + BLOCK]} for start in range(0, len(tokens) - BLOCK + 1, BLOCK)]


def _config(tokenizer: Any) -> Any:
    """4.2M parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _train(tokenizer: Any, texts: list[str], folder: Path, steps: int, bf16: bool) -> float:
    """Train and save under `folder`; returns the loss a token on texts held out."""
    import datasets
    import torch
    from transformers import (
        DataCollatorForLanguageModeling,
        LlamaForCausalLM,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_callback import PrinterCallback

    datasets.disable_progress_bars()
    set_seed(0)
    args = TrainingArguments(
        str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 4),
        weight_decay=0.01,
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    held_out = min(100, len(texts) // 10, max(10, steps))  # few for few steps: bf16 is slow on some CPUs
    # Tokenising all 33 million characters would take longer than the texts that `steps` reads.
    read = texts[: len(texts) - held_out][: steps * ROWS]
    trainer = Trainer(
        LlamaForCausalLM(_config(tokenizer)),
        args,
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=datasets.Dataset.from_list(_blocks(tokenizer, read)),
        eval_dataset=datasets.Dataset.from_list(_blocks(tokenizer, texts[-held_out:])),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder))
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=500, help="optimizer steps (default: 500, about 4 minutes on 2 cores)"
    )
    parser.add_argument("--folder", type=Path, default=OUTPUTS / "tiny_lm")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast")
    args = parser.parse_args()
    print(tiny_lm(args.folder, args.steps, bf16=args.bf16))
    print(machine())


if __name__ == "__main__":
    main()
