"""A linear probe: what is hidden in the features rather than forgotten."""

from __future__ import annotations

from torch import Tensor


def probe_acc(features: Tensor, labels: Tensor, forgotten_features: Tensor, forgotten_labels: Tensor) -> float | None:
    """Accuracy, on test images of the forgotten classes, of a linear probe on penultimate features.

    The probe, a logistic regression on standardised features, is trained with the true labels of all classes, the
    forgotten ones included: where it tells a forgotten class apart better than on the oracle's features, the class is
    hidden rather than forgotten. The oracle's value is the target. Source: linear classifier probes, Alain and
    Bengio, 2016, arXiv:1610.01644.

    Args:
        features: (N, D) on training images of all classes.
        labels: (N,) their true labels.
        forgotten_features: (M, D) on test images of the forgotten classes; with M = 0, or one class
            in ``labels``, the result is ``None``.
        forgotten_labels: (M,) their true labels.
    """
    if not len(forgotten_labels) or len(labels.unique()) < 2:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    # One thread: at this size a second one only waits, and on a busy machine it waits long.
    with threadpool_limits(1):
        probe.fit(features.double().numpy(), labels.numpy())
        return float(probe.score(forgotten_features.double().numpy(), forgotten_labels.numpy()))
