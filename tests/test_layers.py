"""The direction of imports: each layer knows only those to its left, and attacks and defenses never know each other."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "unbackdoor"

#: From left to right. What stands in one row may import its neighbours, save for SEPARATE.
LAYERS = (
    ("types", "errors", "rng", "specs", "progress", "files"),
    ("augmentation", "inference", "information"),
    ("data", "models"),
    ("training",),
    ("attacks", "defenses", "analysis"),
    ("evaluation",),
    ("automatic",),
    ("bench",),
    ("report",),
    ("api", "auditing", "forgetting", ""),  # "" is unbackdoor/__init__.py, which re-exports the public names
    ("cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
SEPARATE = ({"attacks", "defenses"},)

#: What `import unbackdoor` must not load: slow to import, or optional.
HEAVY = (
    "PIL",
    "datasets",
    "matplotlib",
    "pyarrow",
    "ray",
    "sklearn",
    "timm",
    "tokenizers",
    "torchvision",
    "transformers",
    "typer",
)


def modules() -> dict[str, Path]:
    """Dotted name -> file, of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["unbackdoor", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, source: str, *, package: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of our own package anywhere in a source, in functions too.

    For ``from a import b``, the name is ``a.b``: whether b is a module or a name in one makes no difference here.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if package else module.split(".")[:-1]
            start = base[: len(base) - node.level + 1] if node.level else []
            whole = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{whole}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant)]
    return [(line, name) for line, name in found if str(name).split(".")[0] == "unbackdoor"]


def layer_of(name: str) -> str:
    """``unbackdoor.models.zoo`` -> ``models``; a public name of the package itself -> ``""``."""
    top = [*name.split("."), ""][1]
    return top if top in RANK else ""


def violations(module: str, source: str, *, package: bool = False) -> list[str]:
    """What a module's imports break, in words."""
    own = [*module.split("."), ""][1]
    if own not in RANK:
        return [f"{module} belongs to no layer: give {own!r} a place in LAYERS"]
    wrong = []
    for line, name in imported(module, source, package=package):
        other = layer_of(name)
        if RANK[other] > RANK[own]:
            wrong.append(f"{module}:{line} imports {name}, which stands to its right")
        elif other != own and {own, other} in SEPARATE:
            wrong.append(f"{module}:{line} imports {name}: {own} and {other} must not know each other")
    return wrong


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=str)
def test_imports_point_left(module: str, path: Path) -> None:
    assert violations(module, path.read_text(encoding="utf-8"), package=path.name == "__init__.py") == []


def test_the_walk_finds_the_package() -> None:
    assert {"types", "training", "attacks", "defenses", ""} <= {layer_of(name) for name in modules()}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unbackdoor.defenses.seam", "from unbackdoor.attacks.poisoning import poison"),
        ("unbackdoor.attacks.image.badnets", "import unbackdoor.defenses.seam as s"),
        ("unbackdoor.attacks.image.badnets", "from ...defenses import seam"),
        ("unbackdoor.models.loading", "def f():\n    from unbackdoor.training import fit"),
        ("unbackdoor.training", "from unbackdoor import report"),
        ("unbackdoor.data.folder", "if TYPE_CHECKING:\n    from unbackdoor.cli import clean"),
        ("unbackdoor.types", "import importlib\nimportlib.import_module('unbackdoor.inference')"),
        ("unbackdoor.evaluation.metrics", "from unbackdoor import clean"),
        ("unbackdoor.evaluation.metrics", "import unbackdoor"),
        ("unbackdoor.mystery", ""),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unbackdoor.defenses.seam", "from unbackdoor.training import Recipe, fit\nfrom unbackdoor import progress"),
        ("unbackdoor.defenses.seam", "from .finetune import FineTune\nfrom ..types import Samples"),
        ("unbackdoor.models.zoo", "from unbackdoor.inference import predict\nimport torch"),
        ("unbackdoor.cli.clean", "from unbackdoor import clean\nfrom unbackdoor.attacks import poisoning"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_relative_import_in_a_package_file_counts_from_that_package() -> None:
    assert imported("unbackdoor.models", "from .zoo import cnn", package=True) == [(1, "unbackdoor.models.zoo.cnn")]
    assert imported("unbackdoor.models", "from ..training import fit", package=True) == [(1, "unbackdoor.training.fit")]


def test_importing_the_package_loads_nothing_heavy() -> None:
    # torch itself may import some of these when they are installed (it does not today); they are not ours then.
    program = """
import json, sys
import torch
before = set(sys.modules)
import unbackdoor
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "unbackdoor" in loaded
    assert set(loaded).isdisjoint(HEAVY)
