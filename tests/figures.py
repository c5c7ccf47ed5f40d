"""Reports that were made up, their figures easily recognised, and a reader of the tables made of them."""

from vqunet_tf.threat import ThreatModel

GRAY, WHITE, BLACK = ThreatModel.GRAY_BOX, ThreatModel.WHITE_BOX, ThreatModel.BLACK_BOX


def row(defense, attack, share, model="gray_box", epsilon=0.1, n=1000, norm="linf", steps=40):
    """A row as in a report; its interval is 10 points to each side, to be recognised."""
    return {
        "defense": defense,
        "attack": attack,
        "norm": norm,
        "epsilon": 0.0 if attack == "none" else epsilon,
        "steps": 0 if attack == "none" else 1 if attack == "fgsm" else steps,
        "threat_model": model,
        "n": n,
        "accuracy": share,
        "interval": [max(0.0, share - 0.1), min(1.0, share + 0.1)],
        "worst_case": attack == "worst",
        "seconds": 1.0,
    }


def report(rows, dataset="fashion_mnist", bare=0.94, purified=0.93, **more):
    """A report with these rows."""
    return {
        "schema": 1,
        "split": "test",
        "dataset": dataset,
        "seed": 3,
        "objective": "gray_box",
        "classifier": {"name": "fast", "params": 1234, "accuracy": bare, "n": 10000},
        "purifier": {"name": "vqunet", "params": 5678, "clean_accuracy": purified, "n": 10000},
        "rows": rows,
        "checks": [{"name": "budget_held", "passed": True, "detail": "fine"}],
        "command": "python -m trainers.evaluate --preset=fashion_mnist",
        "host": {"processor": "Abacus", "cores": 2, "accelerators": []},
        "versions": {"tensorflow": "2.21.0"},
        **more,
    }


GRAY_ROWS = [
    row("none", "none", 0.94),
    row("none", "fgsm", 0.2),
    row("none", "worst", 0.0),
    row("vqunet", "none", 0.92),
    row("vqunet", "fgsm", 0.9),
    row("vqunet", "pgd", 0.88),
    row("vqunet", "worst", 0.85),
    row("jpeg", "none", 0.8),
    row("jpeg", "fgsm", 0.5),
    row("jpeg", "worst", 0.4),
]
ADAPTIVE_ROWS = [
    row("none", "none", 0.95, n=500),
    row("none", "worst", 0.01, n=500),
    row("vqunet", "none", 0.89, n=500),
    row("vqunet", "pgd", 0.8, "white_box", n=500),
    row("vqunet", "worst", 0.79, "white_box", n=500),
    row("vqunet", "square", 0.83, "black_box", n=200, steps=1000),
    row("vqunet", "hopskipjump", 0.88, "black_box", n=50, steps=1000),
    row("vqunet", "worst", 0.82, "black_box", n=200),
]


def cells(text):
    """The lines of a table, each as its cells, without the rule."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
