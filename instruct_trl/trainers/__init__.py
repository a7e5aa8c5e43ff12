"""The three trainers, each a subclass of TRL's, and the paper as their model cards cite it."""

from dataclasses import field
from typing import Any

PAPER = {
    "title": "Training language models to follow instructions with human feedback",
    "id": "2203.02155",
    "citation": """\
@inproceedings{ouyang2022training,
    title     = {{Training language models to follow instructions with human feedback}},
    author    = {Long Ouyang and Jeffrey Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and others},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2022,
    eprint    = {2203.02155},
}""",
}


def setting(default: Any, text: str) -> Any:
    """A field of a trainer's config, with its help text."""
    return field(default=default, metadata={"help": text})
