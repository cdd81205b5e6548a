"""Keeps an installed mmpretrain from taking mmseg and mmdet down with it."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ['skip_broken_multimodal']


def skip_broken_multimodal() -> None:
    """Switches mmpretrain's multimodal models off where they cannot be imported.

    mmpretrain 1.2.0 imports them when transformers is installed, they derive from classes that transformers 5 no longer
    has, and mmdet imports mmpretrain: with all three installed, ``import mmseg.models`` raises a TypeError.
    """
    try:
        broken = version('mmpretrain') <= '1.2.0' and int(version('transformers').split('.')[0]) >= 5
    except PackageNotFoundError:
        return
    if broken:
        from mmpretrain.utils import dependency

        dependency.WITH_MULTIMODAL = False
