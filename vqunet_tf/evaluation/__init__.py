"""How much accuracy is left under attack, and whether the answer can be trusted."""

from vqunet_tf.evaluation.checks import Check
from vqunet_tf.evaluation.facts import describe
from vqunet_tf.evaluation.measure import Evaluation, evaluate, sample
from vqunet_tf.evaluation.rows import Outcome

__all__ = ["Check", "Evaluation", "Outcome", "describe", "evaluate", "sample"]
