"""report.json and report.md: the numbers, their conditions, and nothing about whose machine it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tensorflow as tf

from vqunet_tf.config import SELECTIONS, Config
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import markdown
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.runs import write_text

SCHEMA = 1
_PACKAGES = ("tensorflow", "keras", "cleverhans", "numpy")


def build(
    config: Config, evaluation: Evaluation, classifier: dict[str, Any], purifier: dict[str, Any], command: str
) -> dict[str, Any]:
    """Returns report.json as a dict.

    classifier, purifier: from `describe`. command: what to type for the same numbers again.
    """
    return {
        "schema": SCHEMA,
        "dataset": Path(config.data.dataset).name,  # of a folder its name: where it lies is nobody's business
        "split": "test",
        "seed": evaluation.seed,
        "objective": config.training.objective,
        "selection": SELECTIONS[config.training.selection],
        "classifier": classifier,
        "purifier": purifier,
        "rows": evaluation.rows,
        "checks": [asdict(check) for check in evaluation.checks],
        "command": command,
        "host": host(),
        "versions": versions(),
    }


def make_folder(folder: Path) -> Path:
    """Makes the folder of a report and its plots, before anything is measured for it."""
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written ({error}): choose another --output_dir") from None
    return folder


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes report.json and report.md; readers see the old files or the new ones."""
    write_text(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(folder / "report.md", markdown.render(report))


def host() -> dict[str, Any]:
    """The kind of machine, without its name, its user or its paths."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "accelerators": [detail.get("device_name", "GPU") for detail in details],
    }


def versions() -> dict[str, str]:
    """Python, this package and what the numbers depend on."""
    own = getattr(sys.modules[__name__.partition(".")[0]], "__version__", "unknown")
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "vqunet_tf": own, **found}


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
