"""Parts of a run, made as ``conf/`` says."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig


def made(part: DictConfig, **given: Any) -> Any:
    """Make what a configuration describes.

    Containers in it become dicts and lists: classes that are named in ``conf/`` may know nothing of
    Hydra, and may hand what they are given on, to a JSON encoder, say.

    Args:
        part: with a ``_target_``, or a group of such parts.
        given: further arguments.
    """
    return instantiate(part, _convert_="all", **given)
