"""Measuring what models draw."""

from flexvar.evaluation.classifier import (
    Classifier,
    accuracy_interval,
    class_accuracy,
    load_classifier,
    renderings,
    train_classifier,
)

__all__ = ["Classifier", "accuracy_interval", "class_accuracy", "load_classifier", "renderings", "train_classifier"]
