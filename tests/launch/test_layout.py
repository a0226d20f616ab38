"""The house: what stands where, and what files may not do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("trainer", "models", "data", "configs", "launch")
SOURCES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_folder_of_code_is_a_package_without_re_exports(name):
    for folder in {path.parent for path in (ROOT / name).rglob("*.py")}:
        tree = ast.parse((folder / "__init__.py").read_text())
        assert len(tree.body) == 1 and ast.get_docstring(tree), folder


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_are_never_imported_as_objects(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
            assert not names & set(PACKAGES), f"import names from modules of {names & set(PACKAGES)}"


def test_modules_have_no_name_of_a_dependency():
    taken = {"jax", "flax", "optax", "orbax", "grain", "hydra", "wandb", "ray", "numpy", "sentencepiece", "tokenizers"}
    assert not {path.stem for path in SOURCES} & taken


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_stays_short_enough_to_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 500
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 90, node.name
