"""The trained baselines: VQUNet without its code books, without its skip connections, or without both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import relpath
from pathlib import Path

import keras

from vqunet_tf.errors import UserError
from vqunet_tf.models import VQUNet, presets
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
        released = folder.path.parent == presets.FOLDER
        elsewhere = f"runs/{folder.path.name}"
        then = f" and give --baselines_dir={elsewhere}" if released else ""
        command = training_command(folder, [name], elsewhere if released else str(folder.path))
        raise UserError(f"{path} is missing: train it with {command}{then}")
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


def training_command(folder: RunFolder, names: Sequence[str], run_dir: str) -> str:
    """What trains these ablations of a run's purifier, in its own folder or, for its classifier, in another one."""
    own = Path(run_dir) == folder.path
    place = Path("vqunet_tf/presets", folder.path.name) if folder.path.parent == presets.FOLDER else folder.path
    shared = place / relpath(folder.classifier, folder.path)  # presets may share one
    classifier = "" if own else f" --classifier={shared}"
    return (
        f"python -m trainers.train --config={place / folder.config.name}{classifier} "
        f"--run_dir={run_dir} --baselines={','.join(names)}"
    )


def _words(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
