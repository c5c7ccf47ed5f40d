"""Attacks the classifier of a run folder with and without its purifier, and writes what is left of its accuracy.

    python -m trainers.evaluate --run_dir=runs/cifar10
    python -m trainers.evaluate --run_dir=runs/cifar10 --suite=adaptive --surrogate=runs/cifar10_seed1
    python -m trainers.evaluate --preset=fashion_mnist
    python -m trainers.evaluate --preset=cifar10 --baselines_dir=runs/cifar10
    python -m trainers.evaluate --run_dir=runs/cifar10 --split=validation

Gray-box attackers know the classifier only, white-box attackers the purifier too, black-box ones see answers. Writes
report.json, report.md, report.html and plots/ into the run folder (results/<preset> for released weights), into validation/
there for that split, by which settings are to be chosen, or into --output_dir. What is crafted is kept in adversaries/ beside
the models: the same command again goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from tqdm import tqdm

from commands.run import run
from vqunet_tf import data
from vqunet_tf.attacks import ATTACKS
from vqunet_tf.config import EvaluationConfig
from vqunet_tf.defenses import DEFENSES
from vqunet_tf.errors import Interrupted, UserError
from vqunet_tf.evaluation import (
    Evaluation,
    baselines,
    describe,
    evaluate,
    html,
    inputs,
    markdown,
    plots,
    report,
    sample,
    suites,
)
from vqunet_tf.evaluation.cache import Cache
from vqunet_tf.evaluation.measure import buildable
from vqunet_tf.evaluation.suites import Plan
from vqunet_tf.evaluation.victims import Chain, surrogates
from vqunet_tf.models import classifiers, presets
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder
from vqunet_tf.threat import NORMS, Threat, ThreatModel, parse_epsilon

STRICT = 3  # exit status of --strict where a check failed


def main(values: flags.FlagValues) -> None:
    if bool(values.run_dir) == bool(values.preset):
        raise UserError("expected one of --run_dir and --preset (--help lists the flags)")
    folder = RunFolder(_preset(values.preset) if values.preset else values.run_dir)
    config = folder.load_config()
    settings = config.evaluation
    channels = (config.data.image_shape or (1,))[-1]
    threats = _threats(values, settings, channels)
    chosen = (values.suite, values.attacks, threats, settings.pgd_steps, values.iterated_examples)
    plan = suites.build(*chosen, values.white_box_attacks, values.queries)
    classifier, purifier = folder.load_classifier(), folder.load_purifier()
    inputs.check_agreement(config, classifier, purifier, str(folder.path))

    where = dataclasses.replace(config.data, data_dir=values.data_dir or config.data.data_dir)
    split = data.load(where, values.split)
    part = sample(split, settings.num_examples if values.num_examples is None else values.num_examples)
    classifiers.check(
        classifier, split.images.shape[1:], len(split.class_names), part.images[:64], str(folder.classifier)
    )
    trained = folder
    if values.baselines_dir:
        trained = baselines.beside(values.baselines_dir, folder, config, classifier, part.images[:64])
    carried = _surrogates(values.surrogate, folder, split, part) if plan.carried else {}
    beside = Path("results", values.preset) if values.preset else folder.path
    if values.split != "test":
        beside /= values.split  # never over figures of the test split
    output = report.make_folder(Path(values.output_dir or beside))
    kept = (output if values.preset else folder.path) / "adversaries"

    with tqdm(unit="img", unit_scale=True, dynamic_ncols=True, delay=1) as bar:
        try:
            evaluation = evaluate(
                classifier,
                purifier,
                part.images,
                part.labels,
                attacks=plan,
                threat_models=values.threat_models,
                defenses=_defenses(values, plan, trained),
                surrogates=carried,
                folder=trained,
                cache=Cache(kept, values.fresh),
                batch_size=settings.batch_size,
                seed=values.seed,
                progress=lambda running, done, total: _show(bar, running, done, total),
            )
        except KeyboardInterrupt:
            raise Interrupted("SIGINT") from None  # all that was crafted is kept
    elsewhere = [name for name in evaluation.purifiers if name in ABLATIONS and values.baselines_dir]
    if elsewhere:
        told = baselines.note(elsewhere, folder, str(_public(Path(values.baselines_dir))))
        evaluation = dataclasses.replace(evaluation, notes=(*evaluation.notes, told))
    facts = describe(classifier, purifier, split, settings.batch_size)

    found = report.build(
        config, evaluation, *facts, command=_command(values, folder, plan, evaluation), split=values.split
    )
    report.write(output, found)
    plots.write(output / "plots", evaluation, classifier, purifier, split.class_names, found)
    html.write(output, found, evaluation, classifier, purifier, split.class_names)
    print(markdown.headline(found))
    failed = [check for check in found["checks"] if not check["passed"]]
    names = ", ".join(check["name"] for check in failed)
    print(f"checks: {len(found['checks']) - len(failed)} passed" + (f", FAILED: {names}" if failed else ""))
    print(f"done: {output} holds report.json, report.md, report.html and plots/")
    for note in evaluation.notes:
        print(f"note: {note}", file=sys.stderr)
    for check in failed:
        print(f"check failed: {check['name']}: {check['detail']}", file=sys.stderr)
    if failed and values.strict:
        sys.exit(STRICT)


def _threats(values: flags.FlagValues, settings: EvaluationConfig, channels: int) -> list[Threat]:
    """The balls to attack in: linf ones, and l2 ones for attacks that know no other, unless --norm names one."""
    given = [parse_epsilon(text) for text in values.epsilons]
    # 0.5 is what CIFAR-10 is attacked with; of 28x28 gray images it would leave most of the digits alone.
    longer = [parse_epsilon(text) for text in values.l2_epsilons] or list(settings.l2_epsilons)
    longer = longer or [2.0 if channels == 1 else 0.5]
    if values.norm == "l2":
        return [Threat("l2", epsilon) for epsilon in given or longer]
    found = [Threat("linf", epsilon) for epsilon in given or settings.epsilons]
    return found if values.norm else found + [Threat("l2", epsilon) for epsilon in longer]


def _defenses(values: flags.FlagValues, plan: Plan, trained: RunFolder) -> Sequence[str]:
    """Those named, or those of the suite; ablations of another run are there to be measured."""
    found = values.defenses or plan.suite.defenses or buildable(trained)
    return found if values.defenses or not values.baselines_dir else [*found, *baselines.trained(trained)]


def _surrogates(folders: Sequence[str], own: RunFolder, split: data.Split, part: data.Split) -> dict[str, Chain]:
    """The models of other runs, each alone and behind its purifier."""
    found: dict[str, Chain] = {}
    by_name: dict[str, str] = {}
    for path in folders:
        other = RunFolder(path)
        name = other.path.resolve().name
        if name in by_name:
            raise UserError(
                f"--surrogate={path}: expected folders of different names, got {name!r} for {by_name[name]} too: rename one"
            )
        by_name[name] = path
        if other.path.resolve() == own.path.resolve():
            raise UserError(f"--surrogate={path} is the evaluated run itself: expected one with another seed")
        other.load_config()  # refuses what is no run folder
        classifier, purifier = other.load_classifier(), other.load_purifier()
        shape = split.images.shape[1:]
        classifiers.check(classifier, shape, len(split.class_names), part.images[:64], str(other.classifier))
        found |= surrogates(name, classifier, purifier)
    return found


def _show(bar: tqdm, running: str, done: int, total: int) -> None:
    bar.total = total
    bar.set_description(running, refresh=False)
    bar.update(done - bar.n)


def _preset(name: str) -> Path:
    try:
        return presets.folder(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def _command(values: flags.FlagValues, folder: RunFolder, plan: Plan, evaluation: Evaluation) -> str:
    """What gives these numbers again, every default spelled out."""
    run = f"--preset={values.preset}" if values.preset else f"--run_dir={_public(folder.path)}"
    radii = {norm: [a.threat.epsilon for a in plan.attacks if a.threat.norm == norm] for norm in NORMS}
    lists = {
        "attacks": values.attacks,
        "white_box_attacks": values.white_box_attacks,
        "norm": [values.norm] if values.norm else [],
        "epsilons": radii["l2"] if values.norm == "l2" else radii["linf"],
        "l2_epsilons": [] if values.norm == "l2" else radii["l2"],
        "threat_models": [model.value for model in evaluation.threat_models],
        "defenses": [outcome.defense for outcome in evaluation.outcomes],
    }
    texts = [f"--{name}={','.join(dict.fromkeys(map(str, several)))}" for name, several in lists.items() if several]
    if values.baselines_dir:
        texts.append(f"--baselines_dir={_public(Path(values.baselines_dir))}")
    if values.split != "test":
        texts.append(f"--split={values.split}")
    if values.output_dir:
        texts.append(f"--output_dir={_public(Path(values.output_dir))}")
    texts += [f"--surrogate={_public(Path(path))}" for path in values.surrogate if plan.carried]
    if values.iterated_examples is not None:
        texts.append(f"--iterated_examples={values.iterated_examples}")
    if values.queries is not None:
        texts.append(f"--queries={values.queries}")
    numbers = f"--num_examples={evaluation.n} --seed={evaluation.seed}"
    return " ".join(["python -m trainers.evaluate", run, f"--suite={values.suite}", *texts, numbers])


def _public(path: Path) -> Path | str:
    """Of an absolute path only its last part: a report is for others to read."""
    return path.name if path.is_absolute() else path


def console(argv: Sequence[str] | None = None) -> None:
    """The command line; `argv` starts with the program's name, as `sys.argv` does."""
    values = flags.FlagValues()

    def text(name: str, default: str | None, words: str) -> None:
        flags.DEFINE_string(name, default, words, flag_values=values)

    def several(name: str, words: str) -> None:
        flags.DEFINE_list(name, [], words, flag_values=values)

    text("run_dir", None, "folder of a finished training run")
    text("preset", None, "released weights instead of a run folder")
    text("suite", "quick", f"attacks by the name of a set: {', '.join(suites.SUITES)}")
    several("attacks", f"attacks one by one, instead: {','.join(ATTACKS)}")
    several("white_box_attacks", "those of attackers who know the purifier, where they are to be others")
    several("epsilons", "radii on the [0,1] scale, 0.1 or 8/255; without it the run's")
    several("l2_epsilons", "l2 radii of the attacks that know no other norm; without it the run's")
    flags.DEFINE_enum("norm", None, NORMS, "attack in this norm only", flag_values=values)
    models = ",".join(model.value for model in ThreatModel)
    several("threat_models", f"what the attacker knows: {models}; without it those of the suite")
    several("defenses", f"defences: {','.join(DEFENSES)}; without it those of the suite")
    flags.DEFINE_multi_string(
        "surrogate", [], "another run, whose models images are carried over from; may be repeated", flag_values=values
    )
    which = "images of this split; settings are chosen by validation, figures told of test"
    flags.DEFINE_enum("split", "test", ("test", "validation"), which, flag_values=values)
    number = "images, from a fixed permutation; without it the run's"
    flags.DEFINE_integer("num_examples", None, number, flag_values=values)
    fewer = "at most so many of these, the first ones, for attacks of several steps; without it all"
    flags.DEFINE_integer("iterated_examples", None, fewer, flag_values=values)
    asked = "of attacks that see answers only, for each image; without it 1000"
    flags.DEFINE_integer("queries", None, asked, flag_values=values)
    text("baselines_dir", None, "another run, whose trained unet, vqvae and dae are measured; without it the run's own")
    text("output_dir", None, "where to write; without it the run folder")
    text("data_dir", None, "where prepared TFDS data sets lie; without it the run's")
    flags.DEFINE_integer("seed", 0, "decides random starts and random targets", 0, flag_values=values)
    flags.DEFINE_bool("fresh", False, "craft and measure all anew, whatever is kept", flag_values=values)
    flags.DEFINE_bool("strict", False, f"exit with status {STRICT} if a check failed", flag_values=values)
    run(main, values, str(__doc__), argv=argv)


if __name__ == "__main__":
    console()
