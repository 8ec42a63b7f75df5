"""Measuring what models draw."""

from flexvar.evaluation.classifier import (
    UNSEEN_SEED,
    Classifier,
    accuracy_interval,
    class_accuracy,
    load_classifier,
    renderings,
    train_classifier,
)
from flexvar.evaluation.drawn import DrawnPictures
from flexvar.evaluation.extractors import Extractor, Features, load_extractor
from flexvar.evaluation.lpips import LPIPS, load_lpips
from flexvar.evaluation.quality import psnr, ssim
from flexvar.evaluation.references import Reference, read_reference, write_reference
from flexvar.evaluation.runner import evaluate
from flexvar.evaluation.scores import Report, score
from flexvar.evaluation.stored import PictureSet, open_pictures

__all__ = [
    "LPIPS",
    "UNSEEN_SEED",
    "Classifier",
    "DrawnPictures",
    "Extractor",
    "Features",
    "PictureSet",
    "Reference",
    "Report",
    "accuracy_interval",
    "class_accuracy",
    "evaluate",
    "load_classifier",
    "load_extractor",
    "load_lpips",
    "open_pictures",
    "psnr",
    "read_reference",
    "renderings",
    "score",
    "ssim",
    "train_classifier",
    "write_reference",
]
