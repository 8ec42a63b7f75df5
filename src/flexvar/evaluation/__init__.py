"""Measuring what models draw."""

from flexvar.evaluation.classifier import (
    Classifier,
    accuracy_interval,
    class_accuracy,
    load_classifier,
    renderings,
    train_classifier,
)
from flexvar.evaluation.lpips import LPIPS, load_lpips
from flexvar.evaluation.quality import psnr, ssim

__all__ = [
    "LPIPS",
    "Classifier",
    "accuracy_interval",
    "class_accuracy",
    "load_classifier",
    "load_lpips",
    "psnr",
    "renderings",
    "ssim",
    "train_classifier",
]
