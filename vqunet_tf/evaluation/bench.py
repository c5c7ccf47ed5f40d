"""The bench an evaluation works on: the victims, the images, and what one attack did to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqunet_tf.attacks import Attack
from vqunet_tf.evaluation import cache as caching
from vqunet_tf.evaluation.cache import Cache
from vqunet_tf.evaluation.rows import CLEAN, Outcome
from vqunet_tf.evaluation.victims import DRAWS, Chain
from vqunet_tf.threat import Threat, ThreatModel

# Called with what is running, the work done and the work in all; one image and one gradient step are 1.
Progress = Callable[[str, int, int], Any]

# Images crafted between two savings. Which generator an image draws from depends on it: it is no setting.
CHUNK = 500

# Work in one of an attack's steps, in gradient steps of PGD; a query is a forward pass.
WEIGHTS = {"square": 0.35, "hopskipjump": 0.35, "noise": 0.35}

_PROBE = 8  # images that tell one defence from another


@dataclass(frozen=True, eq=False)
class Crafted:
    """What an attack made: images `[M,H,W,C]` float32 of the first M, and the seconds it took.

    variant: the gradient, or the surrogate. key: a hash of all that decided the images; empty without a cache.
    """

    attack: Attack
    images: np.ndarray
    seconds: float
    variant: str = ""
    key: str = ""


class Bench:
    """Images, labels and victims by name of their defence; every number of an evaluation is measured here.

    Of adversarial images those of one attack are held at a time; of all others, which were answered right.

    images: `[N,H,W,C]` float32 in [0,1]. labels: `[N]` int32.
    surrogates: victims by name that images are crafted on only, to be carried over.
    keep: how many adversaries an outcome keeps.
    total: the work in all, for the progress bar.
    cache: where adversaries and answers are kept; without one nothing is.
    """

    def __init__(
        self,
        victims: dict[str, Chain],
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        keep: int,
        progress: Progress | None = None,
        total: int = 0,
        cache: Cache | None = None,
        surrogates: Mapping[str, Chain] | None = None,
    ):
        self.victims, self.images, self.labels = victims, images, labels
        self.surrogates = dict(surrogates or {})
        self.batch_size, self.seed, self.keep = batch_size, seed, keep
        self.progress, self.total, self.done = progress, total, 0
        self.cache = cache
        self.seconds = 0.0
        self.clean_logits = {name: victim.logits(images, batch_size) for name, victim in victims.items()}
        few = images[:batch_size]
        # Each victim's answers to the first batch, twice: (logits, logits).
        self.twice = {
            name: (self.clean_logits[name][: len(few)], victim.logits(few, batch_size))
            for name, victim in victims.items()
        }
        for name, (one, two) in self.twice.items():
            victims[name].is_random = not np.allclose(one, two, rtol=1e-3, atol=1e-3, equal_nan=True)
        self._places: dict[str, str] = {}
        if cache is not None:
            found = {
                name: victim.fingerprint(images[:_PROBE]) for name, victim in {**victims, **self.surrogates}.items()
            }
            cache.prune(found)
            self._places = {name: caching.place(name, fingerprint) for name, fingerprint in found.items()}

    def clean(self, defense: str, model: ThreatModel, norm: str) -> Outcome:
        """The outcome of no attack."""
        logits, threat = self.clean_logits[defense], Threat(norm, 0.0)
        return Outcome(defense, CLEAN, threat, 0, model, self._correct(logits), 0.0, 0.0, self.images[: self.keep])

    def count(self, limit: int | None = None) -> int:
        """How many images an attack meets that has this limit."""
        return len(self.images) if limit is None else min(limit, len(self.images))

    def cost(self, attack: Attack, victim: str, limit: int | None = None) -> int:
        """The work of `craft`."""
        chain = self._chain(victim)
        each = attack.steps * WEIGHTS.get(attack.name, 1.0) * (DRAWS if chain.is_random else 1)
        return self.count(limit) * max(1, round(each))

    def craft(self, attack: Attack, victim: str, label: str, variant: str = "", limit: int | None = None) -> Crafted:
        """Attacks one victim, or takes from the cache what it did.

        victim: the name of a defence or of a surrogate. label: says on the progress bar what is running.
        variant: the gradient by which it is attacked, one of `Chain.variants`; the first if empty.
        limit: attack the first images only.
        """
        n, chain = self.count(limit), self._chain(victim)
        target = chain.through(variant)
        images, keys, seconds = np.empty_like(self.images[:n]), [], 0.0
        words = " ".join(filter(None, [label, variant, attack.name, f"{attack.threat.epsilon:.4g}"]))
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            key = self._key(attack, variant or chain.variants[0], start, part)
            work = self.cost(attack, victim, part.stop - part.start)
            found = self._load(victim, key, "images")
            if found is None:
                found = self._attack(attack, target, part, start, words, work)
                self._save(victim, key, found, attack=repr(attack), variant=variant, start=start, name=attack.name)
            else:
                self._skip(words, work)
            images[part] = found["images"]
            seconds += float(found["seconds"])
            self.seconds += float(found["seconds"])
            keys.append(key)
        # Of the victim its weights, not its name: another surrogate may come under the same one.
        key = caching.key(self._places[victim], *keys) if self.cache else ""
        return Crafted(attack, images, seconds, getattr(attack, "surrogate", variant), key)

    def score(self, crafted: Crafted, defense: str, model: ThreatModel) -> Outcome:
        """Shows crafted images to one victim, whomever they were made for."""
        attack, n = crafted.attack, len(crafted.images)
        words = f"{defense} meets {attack.name} {attack.threat.epsilon:.4g}"
        key = f"on-{crafted.key}"
        found = self._load(defense, key, "correct") if crafted.key else None
        if found is not None:
            self._skip(words, n)
        else:
            started = time.perf_counter()
            logits = self.victims[defense].logits(crafted.images, self.batch_size)
            self.advance(words, n)
            found = {
                "correct": self._correct(logits),
                "distance": np.max(attack.threat.distance(crafted.images, self.images[:n])),
                "seconds": time.perf_counter() - started,
            }
            if crafted.key:
                self._save(defense, key, found)
        self.seconds += float(found["seconds"])
        return Outcome(
            defense=defense,
            attack=attack.name,
            threat=attack.threat,
            steps=attack.steps,
            threat_model=model,
            correct=found["correct"],
            distance=float(found["distance"]),
            seconds=crafted.seconds + float(found["seconds"]),
            adversarial=crafted.images[: self.keep].copy(),
            variant=crafted.variant,
        )

    # === Work and cache ===

    def _attack(self, attack: Attack, target: Any, part: slice, start: int, words: str, work: int) -> dict[str, Any]:
        share = work // max(part.stop - part.start, 1)  # of one image

        def on_batch(count: int) -> None:
            self.advance(words, count * share)

        started = time.perf_counter()
        images = attack(
            target,
            self.images[part],
            self.labels[part],
            batch_size=self.batch_size,
            seed=self.seed + (start << 32),  # image i of a chunk draws from (this, i): another chunk, other draws
            on_batch=on_batch,
        )
        return {"images": images, "seconds": time.perf_counter() - started}

    def advance(self, words: str, work: int) -> None:
        """Says what is running, and how much more was done."""
        self.done += work
        if self.progress is not None:
            self.progress(words, self.done, self.total)

    def finish(self) -> None:
        """Says that all is done, which may have been less than was thought."""
        self.total = self.done
        self.advance("done", 0)

    def _skip(self, words: str, work: int) -> None:
        """Takes work off the total that need not be done: the time left is then that of the rest."""
        self.total -= work
        self.advance(words, 0)

    def _chain(self, name: str) -> Chain:
        return self.victims[name] if name in self.victims else self.surrogates[name]

    def _key(self, attack: Attack, variant: str, start: int, part: slice) -> str:
        if self.cache is None:
            return ""
        return caching.key(
            repr(attack), variant, self.seed, start, self.batch_size, self.images[part], self.labels[part]
        )

    def _load(self, victim: str, key: str, needed: str) -> dict[str, Any] | None:
        found = self.cache.load(self._places[victim], key) if self.cache else None
        return found if found is not None and {needed, "seconds"} <= set(found) else None

    def _save(self, victim: str, key: str, found: Mapping[str, Any], **about: Any) -> None:
        if self.cache:
            self.cache.save(self._places[victim], key, {**found, **about})

    def _correct(self, logits: np.ndarray) -> np.ndarray:
        # Logits that are not numbers are no answer: never a success of the defence.
        return (logits.argmax(axis=1) == self.labels[: len(logits)]) & np.isfinite(logits).all(axis=1)
