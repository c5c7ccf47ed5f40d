"""The trained baselines: VQUNet without its code books, without its skip connections, or without both."""

from __future__ import annotations

from collections.abc import Mapping

import keras

from vqunet_tf.errors import UserError
from vqunet_tf.models import VQUNet
from vqunet_tf.recipes import ABLATIONS
from vqunet_tf.runs import RunFolder

WORDS = {
    "unet": "U-Net without code books, like HGD (Liao et al. 2018, arXiv 1712.02976)",
    "vqvae": "VQ-VAE without skip connections (van den Oord et al. 2017, arXiv 1711.00937)",
    "dae": "denoising autoencoder, like MagNet (Meng & Chen 2017, arXiv 1705.09064) and Defense-VAE (Li & Ji 2018, arXiv 1812.06570)",
}


def load(name: str, folder: RunFolder | None) -> keras.Model:
    """Returns the ablation that was trained beside a run's purifier; a `UserError` says how to train it."""
    if folder is None:
        raise UserError(f"the defense {name!r} is trained beside a purifier: expected a run folder, got none")
    path = folder.baseline(name)
    if not path.exists():
        raise UserError(
            f"{path} is missing: train it with python -m trainers.train --config={folder.config} "
            f"--run_dir={folder.path} --baselines={name}"
        )
    model = folder.load_baseline(name)
    if not isinstance(model, VQUNet):
        raise UserError(f"{path}: expected a {name}, got a {type(model).__name__}: delete it and train it again")
    wanted = {**ABLATIONS[name], "channels": folder.load_config().data.image_shape[-1]}
    found = {key: getattr(model, key) for key in wanted}
    if found != wanted:
        raise UserError(
            f"{path}: expected a {name} with {_words(wanted)}, got {_words(found)}: delete it and train it again"
        )
    return model


def _words(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
