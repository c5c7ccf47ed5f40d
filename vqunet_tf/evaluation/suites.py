"""Which attacks an evaluation runs, with which gradients and by whom, by the name of a suite or one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vqunet_tf import attacks
from vqunet_tf.attacks import Attack
from vqunet_tf.errors import UserError, choice
from vqunet_tf.evaluation.rows import FEW
from vqunet_tf.evaluation.victims import VARIANTS
from vqunet_tf.threat import Threat, ThreatModel

# Attacks that have no gradient of the victim: they see answers, or images of other models, or nothing.
BLACK_BOX = ("square", "hopskipjump", "transfer", "noise")
TRANSFER = "transfer"

_GRADIENT = ("fgsm", "bim", "pgd", "pgd_targeted", "mim", "apgd_ce", "apgd_dlr", "cw_l2", "deepfool")

_ASKING = ("square", "hopskipjump")  # their steps are queries

# Hours for a thousand images: the first few are enough to see whether gradients hide something.
_SLOW = {"square": 200, "hopskipjump": 50}


@dataclass(frozen=True)
class Suite:
    """Names of attacks for each threat model, and how far each goes.

    variants: attack → the gradients with which it is made white-box (see `victims.py`), of which a victim offers some;
        an attack that is not named takes the first one that the victim offers.
    defenses: measured where none are named; None stands for all that can be built.
    limits: attack → the largest number of images it meets.
    """

    gray: tuple[str, ...] = ()
    white: tuple[str, ...] = ()
    black: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defenses: tuple[str, ...] | None = ("none", "vqunet")
    limits: Mapping[str, int] = field(default_factory=dict)

    def names(self, model: ThreatModel) -> tuple[str, ...]:
        """The attacks of one threat model."""
        by_model = (
            (ThreatModel.GRAY_BOX, self.gray),
            (ThreatModel.WHITE_BOX, self.white),
            (ThreatModel.BLACK_BOX, self.black),
        )
        return dict(by_model)[model]

    def models(self) -> list[ThreatModel]:
        """The threat models that have attacks, as reports order them."""
        return [model for model in ThreatModel if self.names(model)]


# A purifier trained on one gradient of its quantizers may hide from it, and not from another.
_APGD = {name: ("straight_through", "soft", "open_gate", "soft_gate") for name in ("apgd_ce", "apgd_dlr")}

_ADAPTIVE = Suite(
    # What is made white-box is made against the bare classifier too: there it must be seen to work.
    gray=("fgsm", "pgd", "pgd_targeted", "apgd_ce", "apgd_dlr"),
    white=("fgsm", "pgd", "pgd_targeted", "apgd_ce", "apgd_dlr"),
    black=BLACK_BOX,
    variants={"pgd": VARIANTS, **_APGD},
    limits=_SLOW,
)

SUITES: dict[str, Suite] = {
    # Minutes on two cores; enough to see a purifier work, not to call it robust.
    "quick": Suite(gray=("fgsm", "pgd", "pgd_targeted"), white=("fgsm", "pgd")),
    "standard": Suite(
        gray=_GRADIENT,
        white=("fgsm", "pgd", "apgd_ce", "apgd_dlr"),
        variants={
            "pgd": ("straight_through", "soft", "own", "smooth", "identity", "unquantized", "open_gate", "soft_gate"),
            **_APGD,
        },
        defenses=None,
    ),
    "adaptive": _ADAPTIVE,
    "full": dataclasses.replace(_ADAPTIVE, gray=_GRADIENT, defenses=None),
}


@dataclass(frozen=True, eq=False)
class Plan:
    """The attacks of one evaluation, each with its budget.

    gray, white: by their order. black: those on the victim's answers. carried: made on surrogates, to be carried over.
    suite: where variants and limits are.
    """

    gray: tuple[Attack, ...]
    white: tuple[Attack, ...]
    black: tuple[Attack, ...] = ()
    carried: tuple[Attack, ...] = ()
    suite: Suite = field(default_factory=Suite)

    @property
    def attacks(self) -> list[Attack]:
        """All of them."""
        return [*self.gray, *self.white, *self.black, *self.carried]

    @property
    def models(self) -> list[ThreatModel]:
        """The threat models that there are attacks for."""
        found = {
            ThreatModel.GRAY_BOX: self.gray,
            ThreatModel.WHITE_BOX: self.white,
            ThreatModel.BLACK_BOX: self.black + self.carried,
        }
        return [model for model, chosen in found.items() if chosen]


def suite(name: str, names: Sequence[str] = (), white: Sequence[str] = ()) -> Suite:
    """Returns the suite `name`, or with `names` one that runs these attacks as that suite would.

    An attack that follows gradients is made gray-box and white-box, another black-box. `white` names those that are made
    white-box, where these are to be others. Unknown names raise a `UserError` that lists the known ones.
    """
    if white:
        followed = tuple(choice("white-box attack", each, _GRADIENT) for each in dict.fromkeys(white))
        return dataclasses.replace(suite(name, names), white=followed)
    found = SUITES[choice("suite", name, SUITES)]
    if not names:
        return found
    chosen = tuple(choice("attack", each, attacks.ATTACKS) for each in dict.fromkeys(names))
    follows = tuple(each for each in chosen if each not in BLACK_BOX)
    return dataclasses.replace(
        found,
        gray=follows,
        white=follows,
        black=tuple(each for each in chosen if each in BLACK_BOX),
        # Asked for by name, a slow attack is still slow: the limits stay, whatever the suite.
        limits=_SLOW if any(each in _SLOW for each in chosen) else found.limits,
    )


def build(
    name: str,
    names: Sequence[str],
    threats: Sequence[Threat],
    steps: int,
    iterated_examples: int | None = None,
    white: Sequence[str] = (),
    queries: int | None = None,
) -> Plan:
    """Returns the attacks of a suite, or those named, each within the threats whose norm it has.

    names: overrides the suite unless empty; `white` its white-box attacks likewise. steps: of the iterated attacks.
    iterated_examples: the largest number of images that attacks of several steps meet; without it all.
    queries: of those that see answers only, for each image; without it their own number.
    threats: of several norms an attack takes the first that it has, linf before l2.

    Unknown names, and a named attack without any of the norms, raise a `UserError`; a suite leaves such an attack out.
    """
    if not threats:
        raise UserError("expected at least one radius to attack within, got none")
    if iterated_examples is not None and iterated_examples < FEW:
        raise UserError(
            f"iterated attacks: expected at least {FEW} images, got {iterated_examples}: fewer would be left out of the worst case"
        )
    chosen = suite(name, names, white)
    if queries is not None:
        _refuse_queries(queries, chosen)
    made: dict[str, list[Attack]] = {
        each: _asking(each, _within(each, threats, steps), queries)
        for each in dict.fromkeys((*chosen.gray, *chosen.white, *chosen.black))
        if names or each in white or any(threat.norm in attacks.ATTACKS[_made(each)].norms for threat in threats)
    }

    if iterated_examples is not None:
        iterated = [each for each, some in made.items() if any(attack.steps > 1 for attack in some)]
        fewer = {each: min(iterated_examples, chosen.limits.get(each, iterated_examples)) for each in iterated}
        chosen = dataclasses.replace(chosen, limits={**chosen.limits, **fewer})

    def of(some: Sequence[str]) -> tuple[Attack, ...]:
        # Radius by radius, so that the first rows of a report are there first.
        ordered = dict.fromkeys(threats)
        return tuple(
            attack for threat in ordered for each in some for attack in made.get(each, ()) if attack.threat == threat
        )

    return Plan(
        gray=of(chosen.gray),
        white=of(chosen.white),
        black=of([each for each in chosen.black if each != TRANSFER]),
        carried=of([each for each in chosen.black if each == TRANSFER]),
        suite=chosen,
    )


def _made(name: str) -> str:
    """What crafts an attack: what is carried over, momentum, which carries over best (Dong et al. 2017, arXiv 1710.06081)."""
    return "mim" if name == TRANSFER else name


def _refuse_queries(queries: int, chosen: Suite) -> None:
    asking = [name for name in _ASKING if name in chosen.black]
    if not asking:
        raise UserError(
            f"queries: expected {' or '.join(_ASKING)} among the attacks, which ask for answers, got neither"
        )
    # HopSkipJump asks some 200 times before it has taken its first step.
    least = 200 if "hopskipjump" in asking else 3
    if queries < least:
        raise UserError(f"queries: expected at least {least} for each image of {' and '.join(asking)}, got {queries}")


def _asking(name: str, made: list[Attack], queries: int | None) -> list[Attack]:
    """The same attacks, with so many queries if they are made of queries."""
    return [dataclasses.replace(attack, steps=queries) for attack in made] if queries and name in _ASKING else made


def _within(name: str, threats: Sequence[Threat], steps: int) -> list[Attack]:
    """One attack for each threat of the first norm that the attack has."""
    made = _made(name)
    for norm in attacks.ATTACKS[made].norms:
        found = [threat for threat in dict.fromkeys(threats) if threat.norm == norm]
        if found:
            return [attacks.build(made, threat, steps) for threat in found]
    return [attacks.build(made, threats[0], steps)]  # raises: it has none of these norms
