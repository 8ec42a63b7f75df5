"""Labelled pictures to train on: folders of pictures, emoji scenes, drawn shapes."""

from flexvar.data.emoji import WELL_KNOWN, EmojiScenes, every_emoji
from flexvar.data.images import ImageFolder, fitted, imagenet_classes, open_picture, upright_rgb
from flexvar.data.shapes import Shapes
from flexvar.data.source import PictureSource, write_pictures

__all__ = [
    "WELL_KNOWN",
    "EmojiScenes",
    "ImageFolder",
    "PictureSource",
    "Shapes",
    "every_emoji",
    "fitted",
    "imagenet_classes",
    "open_picture",
    "upright_rgb",
    "write_pictures",
]
