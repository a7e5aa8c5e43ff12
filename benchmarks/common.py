"""What the benchmarks share: the line about the machine, tables, and the reviews that no model was trained on.

Nothing heavy is imported before it is needed: `reward_ranking` and `memory` measure memory in small processes.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"


def machine(threads: int | str | None = None, device: str = "cpu") -> str:
    """One line: device, cores, threads, and the versions that the figures depend on."""
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Machine: {device}, {platform.machine()}, {cores} cores, {threads} torch threads; {packages}."


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """'mean ± sd', the sd of the sample; the mean alone for one value."""
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def quiet() -> None:
    """No progress bars, and not transformers' warnings about names that TRL still uses."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def sentences(max_words: int) -> tuple[list[str], list[dict]]:
    """(sentences to rank, other reviews): one-sentence reviews of 8 to `max_words` words, and all that is left.

    The language model and the labeler are trained on what is left, so that no ranked sentence was seen by either.
    """
    from benchmarks.reviews import SENTENCES, movie_reviews

    ranked, rest = [], []
    for review in movie_reviews():
        if review["source"] == SENTENCES and 8 <= len(review["text"].split()) <= max_words:
            ranked.append(review["text"])
        else:
            rest.append(review)
    return ranked, rest
