"""Labelled pictures to train on: folders, Hugging Face data sets, tar shards, emoji, shapes; and the cache of their features."""

from collections.abc import Sequence

from flexvar.data.emoji import WELL_KNOWN, EmojiScenes, are_emoji, emoji_aliases, every_emoji
from flexvar.data.features import CacheSettings, CacheWriter, FeatureCache, FixedViews
from flexvar.data.hub import HubPictures
from flexvar.data.images import Augmentation, ImageFolder, fitted, imagenet_classes, open_picture, upright_rgb
from flexvar.data.shapes import Shapes
from flexvar.data.shards import HubStream, Sample, ShardSource, TarShards, shuffled
from flexvar.data.source import PictureSource, write_pictures

__all__ = [
    "WELL_KNOWN",
    "Augmentation",
    "CacheSettings",
    "CacheWriter",
    "EmojiScenes",
    "FeatureCache",
    "FixedViews",
    "HubPictures",
    "HubStream",
    "ImageFolder",
    "PictureSource",
    "Sample",
    "Shapes",
    "ShardSource",
    "TarShards",
    "aliases_of",
    "every_emoji",
    "fitted",
    "imagenet_classes",
    "open_picture",
    "shuffled",
    "upright_rgb",
    "write_pictures",
]


def aliases_of(class_names: Sequence[str]) -> dict[str, str]:
    """Other name -> name, for classes that are emoji ("heart" for "red heart") or ImageNet's (n01440764 for "tench"); none for others."""
    if are_emoji(class_names):
        return emoji_aliases(class_names)
    names = set(class_names)
    return {folder: name for folder, name in imagenet_classes() if name in names}
