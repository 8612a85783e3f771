"""Training and prediction: the one loop that every training here is, and passes in which nothing is learned."""

from megu_cli.training.loop import Checkpoints, History, fit, masked_gradients, shuffled, train_classifier
from megu_cli.training.prediction import Outputs, accuracy, eval_batch, outputs, predict

__all__ = [
    "Checkpoints", "History", "Outputs", "accuracy", "eval_batch", "fit", "masked_gradients", "outputs", "predict",
    "shuffled", "train_classifier",
]  # fmt: skip
