"""Attacks the classifier of a run folder with and without its purifier, and writes what is left of its accuracy.

    python -m trainers.evaluate --run_dir=runs/cifar10
    python -m trainers.evaluate --preset=fashion_mnist

Gray-box attackers know the classifier only, white-box attackers the purifier too. Writes report.json, report.md and
plots/ into the run folder (results/<preset> for released weights), or into --output_dir.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from commands.run import run
from vqunet_tf import data
from vqunet_tf.attacks import ATTACKS, Attack
from vqunet_tf.defenses import DEFENSES
from vqunet_tf.errors import UserError
from vqunet_tf.evaluation import Evaluation, describe, evaluate, markdown, plots, report, sample, suites
from vqunet_tf.evaluation.measure import MEASURED
from vqunet_tf.models import classifiers, presets
from vqunet_tf.runs import RunFolder
from vqunet_tf.threat import Threat, parse_epsilon

_THREAT_MODELS = [model.value for model in MEASURED]


def main(values: flags.FlagValues) -> None:
    if bool(values.run_dir) == bool(values.preset):
        raise UserError("expected one of --run_dir and --preset (--help lists the flags)")
    folder = RunFolder(_preset(values.preset) if values.preset else values.run_dir)
    config = folder.load_config()
    settings = config.evaluation
    epsilons = [parse_epsilon(text) for text in values.epsilons] or settings.epsilons
    threats = [Threat("linf", epsilon) for epsilon in epsilons]
    attacks = suites.build(values.suite, values.attacks, threats, settings.pgd_steps)
    classifier, purifier = folder.load_classifier(), folder.load_purifier()

    test = data.load(dataclasses.replace(config.data, data_dir=values.data_dir or config.data.data_dir), "test")
    part = sample(test, settings.num_examples if values.num_examples is None else values.num_examples)
    classifiers.check(
        classifier, test.images.shape[1:], len(test.class_names), part.images[:64], str(folder.classifier)
    )
    beside = Path("results", values.preset) if values.preset else folder.path
    output = report.make_folder(Path(values.output_dir or beside))

    with tqdm(unit="img", unit_scale=True, dynamic_ncols=True, delay=1) as bar:
        evaluation = evaluate(
            classifier,
            purifier,
            part.images,
            part.labels,
            attacks=attacks,
            threat_models=values.threat_models,
            defenses=values.defenses,
            batch_size=settings.batch_size,
            seed=values.seed,
            progress=lambda running, done, total: _show(bar, running, done, total),
        )
    facts = describe(classifier, purifier, test, settings.batch_size)

    # Of an absolute path only its last part: a report is for others to read.
    place = folder.path.name if folder.path.is_absolute() else folder.path
    source = f"--preset={values.preset}" if values.preset else f"--run_dir={place}"
    found = report.build(config, evaluation, *facts, command=_command(source, attacks, evaluation))
    report.write(output, found)
    plots.write(output / "plots", evaluation, classifier, purifier, test.class_names)
    print(markdown.headline(found))
    failed = [check["name"] for check in found["checks"] if not check["passed"]]
    print(f"checks: {len(found['checks']) - len(failed)} passed" + (f", FAILED: {', '.join(failed)}" if failed else ""))
    print(f"done: {output} holds report.json, report.md and plots/")


def _show(bar: tqdm, running: str, done: int, total: int) -> None:
    bar.total = total
    bar.set_description(running, refresh=False)
    bar.update(done - bar.n)


def _preset(name: str) -> Path:
    try:
        return presets.folder(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def _command(source: str, attacks: Sequence[Attack], evaluation: Evaluation) -> str:
    """What gives these numbers again, every default spelled out."""
    lists = {
        "attacks": dict.fromkeys(attack.name for attack in attacks),
        "epsilons": dict.fromkeys(str(attack.threat.epsilon) for attack in attacks),
        "threat_models": [model.value for model in evaluation.threat_models],
        "defenses": dict.fromkeys(outcome.defense for outcome in evaluation.outcomes),
    }
    texts = [f"--{name}={','.join(values)}" for name, values in lists.items()]
    return " ".join(
        [
            f"python -m trainers.evaluate {source}",
            *texts,
            f"--num_examples={evaluation.n} --seed={evaluation.seed}",
        ]
    )


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()
    radii = "radii (linf) on the [0,1] scale, 0.1 or 8/255; without it the run's"
    number = "test images, from a fixed permutation; without it the run's"
    flags.DEFINE_string("run_dir", None, "folder of a finished training run", flag_values=values)
    flags.DEFINE_string("preset", None, "released weights instead of a run folder", flag_values=values)
    flags.DEFINE_string(
        "suite", "quick", f"attacks by the name of a set: {', '.join(suites.SUITES)}", flag_values=values
    )
    flags.DEFINE_list("attacks", [], f"attacks one by one, instead: {','.join(ATTACKS)}", flag_values=values)
    flags.DEFINE_list("epsilons", [], radii, flag_values=values)
    flags.DEFINE_list("threat_models", _THREAT_MODELS, "what the attacker knows", flag_values=values)
    flags.DEFINE_list("defenses", ["none", "vqunet"], f"defences: {','.join(DEFENSES)}", flag_values=values)
    flags.DEFINE_integer("num_examples", None, number, flag_values=values)
    flags.DEFINE_string("output_dir", None, "where to write; without it the run folder", flag_values=values)
    flags.DEFINE_string("data_dir", None, "where prepared TFDS data sets lie; without it the run's", flag_values=values)
    flags.DEFINE_integer("seed", 0, "decides random starts and random targets", flag_values=values)
    run(main, values, str(__doc__), argv=argv)


if __name__ == "__main__":
    console()
