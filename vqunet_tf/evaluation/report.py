"""report.json and report.md: the numbers, their conditions, and nothing about whose machine it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tensorflow as tf

from vqunet_tf.config import SELECTIONS, Config
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import classes, markdown
from vqunet_tf.evaluation.measure import Evaluation
from vqunet_tf.evaluation.rows import UNDEFENDED
from vqunet_tf.evaluation.summary import without_paths
from vqunet_tf.runs import write_text
from vqunet_tf.threat import ThreatModel

SCHEMA = 1
_PACKAGES = ("tensorflow", "keras", "cleverhans", "numpy")


def build(
    config: Config,
    evaluation: Evaluation,
    classifier: dict[str, Any],
    purifier: dict[str, Any],
    command: str,
    split: str = "test",
) -> dict[str, Any]:
    """Returns report.json as a dict.

    classifier, purifier: from `describe`. command: what to type for the same numbers again.
    split: which images these are, `test` or `validation`.
    `per_class` is there if the evaluation kept all true classes.
    """
    truth = classes.truth(evaluation)
    known = len(config.data.class_names)
    extra = {}
    if truth is not None:
        extra["per_class"] = classes.per_class(evaluation.outcomes, truth, evaluation.threat_models, known)
    return {
        "schema": SCHEMA,
        "dataset": Path(config.data.dataset).name,  # of a folder its name: where it lies is nobody's business
        "split": split,
        "seed": evaluation.seed,
        "objective": config.training.objective,
        "selection": SELECTIONS[config.training.selection],
        "classifier": classifier,
        "purifier": purifier,
        "rows": evaluation.rows,
        "checks": [{**asdict(check), "passed": bool(check.passed)} for check in evaluation.checks],  # or NumPy's
        "notes": list(getattr(evaluation, "notes", ())),
        **extra,
        "command": command,
        "config": without_paths(asdict(config)),
        "seconds": round(_seconds(evaluation), 1),
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
    write_text(folder / "report.json", _on_lines(report) + "\n")
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


def _seconds(evaluation: Evaluation) -> float:
    """How long it took; where the evaluation did not say, what its attacks took, each counted once."""
    told = getattr(evaluation, "seconds", None)
    if told is not None:
        return float(told)
    spent: dict[Any, float] = {}
    for o in evaluation.outcomes:
        # Images that were made for the bare classifier are shown to every defence.
        victim = o.defense if o.threat_model is ThreatModel.WHITE_BOX else UNDEFENDED
        key = (o.attack, o.threat, o.threat_model, victim)
        spent[key] = max(spent.get(key, 0.0), o.seconds)
    return sum(spent.values())


def _on_lines(report: dict[str, Any]) -> str:
    """Indented JSON, each list of numbers on one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    number = r"(?:-?\d[-+.eE\d]*|null)"
    return re.sub(rf"\[\n\s+({number}(?:,\s+{number})*)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
