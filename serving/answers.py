"""An answer about one image: as a line for people and as a JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SCORE = "adversarial_score"


@dataclass(frozen=True)
class Answer:
    """What a classifying signature says about one image.

    score: how likely the image was tampered with, in [0,1]; None where the model does not tell.
    """

    label: str
    class_id: int
    probability: float
    score: float | None = None


@dataclass(frozen=True)
class Asked:
    """An image, the answer, and what else is known.

    milliseconds: of the call that brought the answer.
    undefended: what the classifier says without the purifier, if it was asked.
    alarm: whether the score is above the user's threshold; None without one.
    """

    image: str
    answer: Answer
    milliseconds: float
    undefended: Answer | None = None
    alarm: bool | None = None

    def as_line(self, width: int) -> str:
        """Columns for a terminal, `width` for the name."""
        parts = [f"{self.image:<{width}}", self.answer.label, f"{self.answer.probability:.4f}"]
        if self.answer.score is not None:
            parts.append(f"score {self.answer.score:.4f}{' ALARM' if self.alarm else ''}")
        if self.undefended is not None:
            differs = " DIFFERS" if self.undefended.class_id != self.answer.class_id else ""
            parts.append(f"undefended {self.undefended.label} {self.undefended.probability:.4f}{differs}")
        parts.append(f"{self.milliseconds:7.1f} ms")
        return "  ".join(parts)

    def as_json(self) -> str:
        """One JSON object on one line."""
        record: dict[str, Any] = {"image": self.image, **_record(self.answer)}
        if self.alarm is not None:
            record["alarm"] = self.alarm
        if self.undefended is not None:
            record["undefended"] = _record(self.undefended)
        record["milliseconds"] = round(self.milliseconds, 3)
        return json.dumps(record, ensure_ascii=False)


def _record(answer: Answer) -> dict[str, Any]:
    record = {"label": answer.label, "class_id": answer.class_id, "probability": answer.probability}
    return record if answer.score is None else {**record, SCORE: answer.score}


def rows(outputs: Mapping[str, np.ndarray]) -> Iterator[Answer]:
    """Takes the outputs of a classifying signature apart, an `Answer` per image."""
    for place, class_id in enumerate(outputs["class_id"].tolist()):
        score = float(outputs[SCORE][place]) if SCORE in outputs else None
        yield Answer(str(outputs["label"][place]), class_id, float(outputs["probabilities"][place, class_id]), score)
