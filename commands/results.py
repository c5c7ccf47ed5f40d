"""Fills the tables of RESULTS.md from the reports in results/: what stands between `<!-- table: NAME -->` and `<!-- end -->`.

The table `ablations` is what `python -m benchmarks.ablations` wrote, into `results/ablations` and folders whose names begin so.

    python -m commands.results
    python -m commands.results --check      # exit status 1 if the file is not what the reports give

All else in the file is left as it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from absl import flags

import commands.quiet  # noqa: F401  before anything that imports TensorFlow
from commands.run import run
from vqunet_tf.errors import UserError, choice
from vqunet_tf.evaluation import results
from vqunet_tf.runs import write_text

_BLOCK = re.compile(r"(<!-- table: ([^>]+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:table: [^>]+?|end) -->")


def filled(text: str, tables: Mapping[str, Callable[[], str]]) -> tuple[str, list[str], list[str]]:
    """Returns the text with its tables made anew, the names of all of them, and of those that changed.

    Raises a `UserError` for an unknown name and for markers that do not come in pairs.
    """
    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks) or any(_MARKER.search(block[3]) for block in blocks):
        raise UserError("expected pairs of <!-- table: NAME --> and <!-- end -->, each on a line: one has no partner")
    made = {name: f"\n{tables[choice('table', name, tables)]()}\n\n" for name in dict.fromkeys(b[2] for b in blocks)}
    changed = [block[2] for block in blocks if block[3] != made[block[2]]]
    return _BLOCK.sub(lambda block: block[1] + made[block[2]] + block[4], text), list(made), changed


def ablations(folder: Path) -> str:
    """What `benchmarks.ablations` wrote into `<folder>/ablations*`, one below the other, headings two levels deeper."""
    paths = sorted(folder.glob("ablations*/ablations.md"))
    if not paths:
        return "Not measured yet: `python -m benchmarks.ablations` writes them into `results/ablations/`."
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8").strip())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): make it again with benchmarks.ablations") from None
    return re.sub(r"^#", "###", "\n\n".join(texts), flags=re.MULTILINE)


def main(values: flags.FlagValues) -> None:
    file, folder = Path(values.file), Path(values.results_dir)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): expected a text with <!-- table: NAME --> in it") from None
    link = Path(os.path.relpath(folder, file.parent)).as_posix()
    released = results.load(folder, link)
    if not released:
        raise UserError(
            f"{folder} holds no <preset>/report.json: expected reports, or the tables would lose their numbers"
        )
    new, names, changed = filled(text, {**results.tables(released), "ablations": partial(ablations, folder)})
    for each in released:
        if each.report["dataset"] not in names:
            wanted = f"<!-- table: {each.report['dataset']} -->"
            raise UserError(f"{folder / each.preset} is in no table: put {wanted} and <!-- end --> into {file}")
    which = ", ".join(dict.fromkeys(changed))
    if values.check and changed:
        print(f"{file} is not what the reports give ({which}): run python -m commands.results", file=sys.stderr)
        sys.exit(1)
    if changed:
        write_text(file, new)
        print(f"{file}: {len(changed)} of {len(names)} tables changed ({which})")
    else:
        print(f"{file}: all {len(names)} tables are what the reports give")


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    flags.DEFINE_bool("check", False, "write nothing; exit status 1 if a table would change", flag_values=values)
    flags.DEFINE_string("file", "RESULTS.md", "the file with the tables", flag_values=values)
    flags.DEFINE_string("results_dir", "results", "where <preset>/report.json lie", flag_values=values)
    run(main, values, __doc__ or "", argv=argv)


if __name__ == "__main__":
    console()
