"""The paper, as model cards cite it."""

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
