"""Training and prediction: the one training loop of the program, and passes without learning."""

from megu_cli.training.loop import Duration, History, cut, fit, masked_gradients, shuffled, train_classifier
from megu_cli.training.prediction import Outputs, accuracy, eval_batch, outputs, predict

__all__ = [
    "Duration", "History", "Outputs", "accuracy", "cut", "eval_batch", "fit", "masked_gradients", "outputs", "predict",
    "shuffled", "train_classifier",
]  # fmt: skip
