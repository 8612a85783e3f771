"""Membership inference: does the model still treat the forget set as training data?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """(N,) entropy in nats of (N, K) probabilities."""
    return -torch.xlogy(probabilities.double(), probabilities.double()).sum(1)


def mia_entropy_lr(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """Share of the forget set that an entropy attack calls members; the oracle's value is the target.

    A class-balanced logistic regression on output entropy tells retained training images (1) from test images of
    retained classes (0). Source: Chundawat et al., 2023, arXiv:2205.08096.

    Args:
        retain: (N_r, K) probabilities on retained training images.
        test: (N_t, K) probabilities on test images of retained classes.
        forget: (N_f, K) probabilities on the forget set.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x = np.concatenate([entropy(retain).numpy(), entropy(test).numpy()])[:, None]
    y = np.concatenate([np.ones(len(retain)), np.zeros(len(test))])
    with threadpool_limits(1):  # see `probe`: a second thread only waits
        attack = LogisticRegression(class_weight="balanced").fit(x, y)
        return float(attack.predict(entropy(forget).numpy()[:, None]).mean())


def mia_confidence_svc(retain: Tensor, test: Tensor, forget: Tensor) -> float:
    """SalUn's MIA-efficacy: share of the forget set called non-member; the oracle's value is the target.

    A support vector classifier (C = 3, gamma = auto, RBF) on the true class's probability tells as many retained
    training images (1) as test images (0). Source: Fan et al., 2024, arXiv:2310.12508.

    Args:
        retain: (N,) true-class probabilities on retained training images.
        test: (N,) the same on test images of retained classes; as many as ``retain``.
        forget: (N_f,) the same on the forget set.

    Raises:
        ValueError: ``retain`` and ``test`` differ in number.
    """
    from sklearn.svm import SVC

    if len(retain) != len(test):
        raise ValueError(f"the attack needs as many members as non-members, not {len(retain)} and {len(test)}")
    x = np.concatenate([retain.double().numpy(), test.double().numpy()])[:, None]
    y = np.concatenate([np.ones(len(retain)), np.zeros(len(test))])
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
    return float(1 - attack.predict(forget.double().numpy()[:, None]).mean())
