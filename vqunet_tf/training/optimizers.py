"""How weights move: AdamW, and for convolution kernels, if asked for, Muon."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

# The layers that touch the image, or give one number: their kernels are not maps between features, and keep AdamW.
_BORDER = ("stem", "head", "gate_0", "gate_logit")
_NOT_DECAYED = ["bias", "gamma", "beta"]


def build(schedule: Any, weight_decay: float, muon: float = 0.0, accumulate: int = 1) -> keras.optimizers.Optimizer:
    """AdamW, or Muon with AdamW for what is no inner convolution.

    Args:
        schedule: the learning rate by step; with Muon, of the kernels that it moves.
        muon: how many times that of all other weights this rate is; 0 is AdamW for all.
        accumulate: batches to a step.
    """
    shared = {"gradient_accumulation_steps": accumulate if accumulate > 1 else None}
    if muon:
        optimizer = Muon(
            schedule,
            weight_decay=weight_decay / muon,  # Keras decays by rate times this
            adam_weight_decay=weight_decay / muon,
            adam_lr_ratio=1.0 / muon,
            exclude_layers=list(_BORDER),
            **shared,
        )
    else:
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay, **shared)
    optimizer.exclude_from_weight_decay(var_names=_NOT_DECAYED)
    return optimizer


class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon` for convolution kernels [h, w, C, D], taken as matrices [h w C, D].

        M <- 0.95 M + G,  W <- W - rate * 0.2 sqrt(max(h w C, D)) * orthogonal(G + 0.95 M)

    where `orthogonal` sets all singular values to about 1 by five Newton-Schulz steps (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon); the scale gives the step the size of one of AdamW's (Liu et al. 2025,
    arXiv 2502.16982). Keras itself does so for dense kernels only. Everything else takes AdamW's step: biases, scales, code
    books, and layers named in `exclude_layers`.
    """

    def _should_use_adamw(self, variable: Any) -> bool:
        return len(variable.shape) != 4 or any(name in variable.path for name in self.exclude_layers)

    def _muon_update_step(self, gradient: Any, variable: Any, lr: Any, m: Any) -> None:
        self.assign_add(m, ops.add(gradient, m * (self.momentum - 1)))
        ahead = ops.add(gradient, self.momentum * m) if self.nesterov else m
        matrix = ops.reshape(ahead, (-1, variable.shape[-1]))
        update = self.lr_adjust(self.zeropower_via_newtonschulz5(matrix, self.ns_steps))
        self.assign_sub(variable, ops.reshape(ops.cast(lr, variable.dtype) * update, variable.shape))
