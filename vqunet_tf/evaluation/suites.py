"""Which attacks an evaluation runs, by the name of a suite or one by one."""

from __future__ import annotations

from collections.abc import Sequence

from vqunet_tf import attacks
from vqunet_tf.attacks import Attack
from vqunet_tf.errors import choice
from vqunet_tf.threat import Threat

# Suite → names of attacks.
SUITES: dict[str, tuple[str, ...]] = {
    # Minutes on two cores; enough to see a purifier work, not to call it robust.
    "quick": ("fgsm", "pgd", "pgd_targeted"),
}


def build(suite: str, names: Sequence[str], threats: Sequence[Threat], steps: int) -> list[Attack]:
    """Returns the attacks of a suite, or those named, within each threat.

    names: overrides the suite unless empty. steps: of the iterated attacks.
    Unknown names raise a `UserError` that lists the known ones.
    """
    chosen = names or SUITES[choice("suite", suite, SUITES)]
    return [attacks.build(name, threat, steps) for threat in dict.fromkeys(threats) for name in dict.fromkeys(chosen)]
