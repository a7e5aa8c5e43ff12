"""The package as its users meet it: quiet, light to import, complete as a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launch_helpers import run_program

ROOT = Path(__file__).parent.parent


def python(code, **kwargs):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_pulls_nothing_heavy_and_says_nothing():
    result = python(
        "import instruct_trl, sys; print([m for m in ('torch', 'trl', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]"
    assert result.stderr == ""


def test_every_public_name_is_there():
    import instruct_trl

    for name in instruct_trl.__all__:
        assert getattr(instruct_trl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        _ = instruct_trl.PPOTrainer


def test_the_maths_imports_torch_alone():
    code = "import instruct_trl.maths.objectives, instruct_trl.maths.returns, instruct_trl.maths.rankings, sys;"
    result = python(code + "print([m for m in ('trl', 'transformers', 'datasets', 'accelerate') if m in sys.modules])")
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_holds_recipes_yamls_and_py_typed(tmp_path):
    run_program([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT])
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "instruct_trl/py.typed" in names
    for path in [*ROOT.glob("recipes/*.py"), *ROOT.glob("recipes/**/*.yaml")]:
        assert f"instruct_trl/recipes/{path.relative_to(ROOT / 'recipes')}" in names
    for path in ROOT.glob("instruct_trl/**/*.py"):
        assert str(path.relative_to(ROOT)) in names
