"""The house keeps its order: imports run downwards only, and each outside package has its one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vqunet_tf", "commands", "trainers", "serving", "benchmarks")

# Low to high. A unit imports itself and lower layers, never a sibling.
LAYERS = (
    {"errors"},
    {"pixels", "threat", "backend", "config", "checksums"},
    {"models", "data", "runs", "recipes"},
    {"training", "attacks", "defenses"},
    {"evaluation"},
    {"vqunet_tf"},  # the public names
    {"commands"},  # flags and mistakes in one line
    {"trainers", "serving"},
    {"benchmarks"},  # what they measure
)
HELPERS = {"_digits": "data", "_folder": "data", "_probe": "data"}  # files behind the door of a unit

# Outside package → the only places that may import it.
DOORS = {
    "tensorflow_datasets": ("vqunet_tf/data.py",),
    "cleverhans": ("vqunet_tf/attacks/cleverhans.py", "benchmarks/"),
    "art": ("vqunet_tf/attacks/art", "benchmarks/"),  # art.py, art_model.py, art_queries.py, art_until.py
    "skimage": ("vqunet_tf/defenses/classic.py",),
    "absl.flags": ("commands/", "trainers/", "serving/"),
    "jax": ("vqunet_tf/backend.py", "benchmarks/"),
    "torch": ("vqunet_tf/backend.py", "benchmarks/"),
    "tests": (),
}
# Folder → what nothing in it may import.
CLOSED = {"vqunet_tf/models/": ("tensorflow",)}


def _sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(place: str, text: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything the module at `place` imports, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            above = place.split("/")[: -node.level] if node.level else []
            for name in node.names:
                yield node.lineno, ".".join([*above, *filter(None, [node.module]), name.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def _unit(dotted: str) -> str | None:
    """`vqunet_tf.models.vqunet` → `models`, `vqunet_tf.VQUNet` → `vqunet_tf`, outside packages → None."""
    first, *rest = dotted.split(".")
    if first not in PACKAGES:
        return None
    if first != "vqunet_tf" or not rest:
        return first
    is_module = (ROOT / first / f"{rest[0]}.py").exists() or (ROOT / first / rest[0]).is_dir()
    known = is_module or rest[0] in set().union(*LAYERS)
    return HELPERS.get(rest[0], rest[0]) if known else first


def _layer(unit: str) -> int:
    found = [level for level, units in enumerate(LAYERS) if unit in units]
    if not found:
        raise AssertionError(f"{unit} has no layer: give it one in tests/test_imports.py")
    return found[0]


def _within(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(f"{package}.")


def breaches(place: str, text: str) -> list[str]:
    """What the module at `place` (relative, with slashes) imports but may not."""
    unit = _unit(place.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = []
    for line, dotted in _imports(place, text):
        where = f"{place}:{line} imports {dotted}"
        target = _unit(dotted)
        if target not in (None, unit) and _layer(target) >= _layer(unit):
            found.append(f"{where}: {unit} may import lower layers only")
        for package, doors in DOORS.items():
            if _within(dotted, package) and not place.startswith(doors):
                found.append(f"{where}: only {' '.join(doors) or 'nobody'} may import {package}")
        for folder, banned in CLOSED.items():
            if place.startswith(folder) and any(_within(dotted, package) for package in banned):
                found.append(f"{where}: nothing in {folder} may")
    return found


def test_there_is_something_to_walk():
    assert {"vqunet_tf/data.py", "vqunet_tf/config.py"} <= {path.relative_to(ROOT).as_posix() for path in _sources()}


@pytest.mark.parametrize("path", _sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_downwards(path: Path):
    assert breaches(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("vqunet_tf/models/vqunet.py", "from vqunet_tf.training import fit"),
        ("vqunet_tf/models/vqunet.py", "from vqunet_tf import data"),
        ("vqunet_tf/models/vqunet.py", "from .. import evaluation"),
        ("vqunet_tf/models/vqunet.py", "def f():\n    import tensorflow as tf"),
        ("vqunet_tf/models/vqunet.py", "import importlib\nimportlib.import_module('jax.numpy')"),
        ("vqunet_tf/config.py", "import vqunet_tf"),
        ("vqunet_tf/attacks/base.py", "from vqunet_tf.defenses import jpeg"),
        ("vqunet_tf/attacks/base.py", "import cleverhans.tf2.attacks"),
        ("vqunet_tf/evaluation/rows.py", "from art.estimators import classification"),
        ("vqunet_tf/evaluation/rows.py", "from skimage import restoration"),
        ("vqunet_tf/evaluation/rows.py", "from absl import app, flags"),
        ("vqunet_tf/training/fit.py", "import tensorflow_datasets as tfds"),
        ("vqunet_tf/training/fit.py", "import torch"),
        ("vqunet_tf/_folder.py", "from vqunet_tf.models import VQUNet"),
        ("trainers/train.py", "from serving import export"),
        ("serving/export.py", "import trainers.train"),
        ("serving/export.py", "from tests.conftest import ROOT"),
    ],
)
def test_a_planted_breach_is_caught(place: str, text: str):
    assert len(breaches(place, text)) == 1


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (
            "vqunet_tf/models/vqunet.py",
            "import keras\nfrom vqunet_tf import pixels\nfrom vqunet_tf.models import blocks",
        ),
        ("vqunet_tf/data.py", "import tensorflow_datasets as tfds\nfrom vqunet_tf import _folder"),
        ("trainers/train.py", "import vqunet_tf\nfrom absl import flags\nfrom vqunet_tf.errors import UserError"),
        ("vqunet_tf/training/fit.py", "import artistic"),
    ],
)
def test_what_is_allowed_passes(place: str, text: str):
    assert breaches(place, text) == []


@pytest.mark.parametrize("name", ["data", "_digits", "_folder", "_probe"])
def test_data_loads_tensorflow_only_when_a_set_needs_it(name: str):
    """`digits` and folders work on every backend: nothing at the top of these files is TensorFlow's."""
    place = f"vqunet_tf/{name}.py"
    tree = ast.parse((ROOT / place).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert tree.body
    assert [dotted for _, dotted in _imports(place, ast.unparse(tree)) if dotted.startswith("tensorflow")] == []


def test_the_project_names_no_folder_outside_itself():
    """Only the checks look for data beside the checkout."""
    outside, found = "../shared", []
    for path in ROOT.rglob("*"):
        inner = path.relative_to(ROOT).parts
        skipped = any(part.startswith(".") for part in inner) or inner[0] in (
            "tests",
            "runs",
            "exported",
            "build",
            "dist",
        )
        if skipped or not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        if outside.encode() in path.read_bytes():
            found.append("/".join(inner))
    assert found == []
