"""The table of the ablations: mean and standard deviation over seeds, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqunet_tf import runs
from vqunet_tf.config import FAMILIES, Config

# Heading of a group of variants, and what the unchanged purifier is called there.
GROUPS = {
    "levels": ("Levels that reach the decoder", ""),  # what the preset has: `coarsest`
    "codes": ("Code-book size", "as the preset"),
    "gradient": ("Gradient through the quantizers", "straight-through"),
    "codebook": ("How code books learn", "moving averages"),
    "guidance": ("Guidance by the classifier", "on"),
    "families": ("Training adversaries", "all families"),
}
COLUMNS = {"clean": "clean", "pgd_untargeted": "PGD", "pgd_targeted": "PGD, targeted", "worst": "worst of these"}
SEEN = {f"family_{family}": family for family in FAMILIES}


def coarsest(kept: int, depth: int) -> str:
    """The levels that reach the decoder, in words."""
    few = f"the coarsest {kept}, no other skip connections" if kept > 1 else "the bottleneck, no skip connections"
    return "all" if kept == depth else few


class Table:
    """Collects the accuracies of each variant, seed by seed.

    Args:
        variants: in the order of the table, the unchanged one first; each has name, group, what and changes.
        config: of the unchanged one. options: of the command line.
    """

    def __init__(self, variants: Sequence[Any], config: Config, options: argparse.Namespace):
        self.variants, self.config, self.options = variants, config, options
        self.found: dict[str, dict[int, Mapping[str, float]]] = {variant.name: {} for variant in variants}
        self.n = 0

    def add(self, variant: Any, seed: int, measured: Mapping[str, Any]) -> None:
        """measured: `accuracy` by what was done to the `n` images."""
        self.found[variant.name][seed], self.n = measured["accuracy"], measured["n"]

    def rows(self) -> list[dict[str, Any]]:
        """One for each variant that has been measured; `std` is the sample's, None for a single seed."""
        result = []
        for variant in self.variants:
            seeds = self.found[variant.name]
            if not seeds:
                continue
            kinds = next(iter(seeds.values()))
            accuracy = {kind: _spread([values[kind] for values in seeds.values()]) for kind in kinds}
            known = {"variant": variant.name, "group": variant.group, "what": variant.what, "changes": variant.changes}
            result.append({**known, "seeds": list(seeds), "accuracy": accuracy})
        return result

    def write(self, folder: Path) -> None:
        """Writes ablations.json and ablations.md."""
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_text(folder / "ablations.json", json.dumps({**self._facts(), "rows": self.rows()}, indent=1) + "\n")
        runs.write_text(folder / "ablations.md", self.markdown())

    def markdown(self) -> str:
        rows, facts = self.rows(), self._facts()
        base, depth = rows[0], len(self.config.purifier.widths)
        kept = f"{facts['limit']:,} training images" if facts["limit"] else "all training images"
        lines = [
            f"# {facts['dataset']}: what each part of the purifier is worth",
            "",
            f"Accuracy in % of the classifier behind the purifier, mean ± standard deviation over the seeds "
            f"{', '.join(map(str, base['seeds']))}, on {facts['n']:,} validation images. {kept.capitalize()}, "
            f"{facts['epochs']} epochs, the last one kept. Gray-box: made against the classifier alone, linf "
            f"ε = {facts['epsilon']:.4g}, PGD with {facts['steps']} steps. All purifiers of a seed share its classifier and, "
            "but for those trained without a family, its training adversaries. Gray-box accuracy is not robustness.",
            "",
            f"    {facts['command']}",
        ]
        for group, (heading, unchanged) in GROUPS.items():
            own = [row for row in rows if row["group"] == group]
            if own:
                columns = COLUMNS if group != "families" else {**COLUMNS, **SEEN}
                what = unchanged or coarsest(depth - self.config.purifier.finest_skip, depth)
                lines += ["", f"## {heading}", "", *_table([{**base, "what": what}, *own], columns)]
        if len(rows) == 1:
            lines += ["", *_table([base], COLUMNS)]
        if any(row["group"] == "families" for row in rows):
            lines += [
                "",
                "The columns after the worst case are the families of training adversaries, each at the full radius on the same "
                "images: the one that a row was trained without is in bold.",
            ]
        return "\n".join(lines) + "\n"

    def _facts(self) -> dict[str, Any]:
        options, config = self.options, self.config
        texts = [f"--dataset={options.dataset}", *([f"--preset={options.preset}"] if options.preset else [])]
        texts += [f"--seeds={options.seeds}", *([f"--variants={options.variants}"] if options.variants else [])]
        texts += [f"--limit={config.data.limit}", f"--epochs={config.training.epochs}"]
        texts += [f"--set={each}" for each in options.set]
        texts += [f"--num_examples={options.num_examples}", f"--steps={options.steps}"]
        return {
            "dataset": config.data.dataset,
            "split": "validation",
            "n": self.n,
            "epsilon": config.evaluation.epsilons[0],
            "steps": options.steps,
            "limit": config.data.limit,
            "epochs": config.training.epochs,
            "command": f"python -m benchmarks.ablations {' '.join(texts)}",
        }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _table(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> list[str]:
    lines = [f"| | {' | '.join(columns.values())} |", f"|---|{'---:|' * len(columns)}"]
    for row in rows:
        cells = []
        for kind in columns:
            text = _cell(row["accuracy"][kind])
            left_out = kind in SEEN and SEEN[kind] in row["changes"].get("attack.leave_out", ())
            cells.append(f"**{text}**" if left_out else text)
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return lines


def _cell(spread: Mapping[str, Any]) -> str:
    mean = f"{100 * spread['mean']:.1f}"
    return mean if spread["std"] is None else f"{mean} ± {100 * spread['std']:.1f}"
