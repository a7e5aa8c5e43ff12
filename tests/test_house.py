"""The house stands as docs draw it: arrows go one way, no circle, small files, small functions, light imports."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from launch_helpers import python

ROOT = Path(__file__).parents[1]
CODE = [*ROOT.glob("instruct_trl/**/*.py"), *ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
LIBRARY = ("maths", "data", "models", "evaluation", "trainers")  # each may import those to its left
APPS = ("judges", "report", "memory", "labeling", "pipeline")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("instruct_trl", *parts) if parts[0] == "recipes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def imports_of(tree):
    """Modules of ours that a module imports, also inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


GRAPH = {name: {found for found in imports_of(tree) if found in MODULES} for name, tree in MODULES.items()}


def folder_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "instruct_trl" and len(parts) > 1 else parts[0]


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_module_is_imported_relatively():
    relative = [
        name for name, tree in MODULES.items() for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]  # fmt: skip
    assert relative == []


def test_arrows_go_one_way():
    wrong = []
    for name, found in GRAPH.items():
        folder = folder_of(name)
        for other in map(folder_of, found):
            if folder in LIBRARY:
                allowed = (*LIBRARY[: LIBRARY.index(folder) + 1], "_upstream", "redaction")
            elif folder in APPS:
                allowed = (*LIBRARY, *APPS, "_upstream", "redaction", "instruct_trl")
            elif folder == "instruct_trl":  # __init__: the public names
                allowed = LIBRARY
            else:
                continue
            if other not in allowed:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_nothing_of_the_package_imports_recipes_or_benchmarks():
    upward = [name for name, found in GRAPH.items() if folder_of(name) in (*LIBRARY, *APPS) for other in found
              if folder_of(other) in ("recipes", "benchmarks")]  # fmt: skip
    assert upward == []


def test_the_package_does_not_know_the_demo():
    lines = defaultdict(list)
    for path in ROOT.glob("instruct_trl/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(
                isinstance(part, ast.Constant) and part.value == "demo" for part in (node.left, *node.comparators)
            ):
                lines[str(path)].append(node.lineno)
    assert dict(lines) == {}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("trainer", ["PPOPtxTrainer", "RankingRewardTrainer", "InstructSFTTrainer"])
def test_a_trainer_loads_none_of_the_apps(trainer):
    ours = "[name for name in sys.modules if name.startswith('instruct_trl.')]"
    code = f"import sys, instruct_trl; instruct_trl.{trainer}; print({ours})"
    loaded = ast.literal_eval(python("-c", code).strip().splitlines()[-1])
    assert "instruct_trl.trainers" in loaded
    assert [name for name in loaded if folder_of(name) in (*APPS, "recipes")] == []


def test_every_test_file_says_what_it_guards():
    silent = [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/*.py")
              if not (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip()]  # fmt: skip
    assert silent == []
