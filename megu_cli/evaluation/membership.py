"""Membership inference: does the model still treat the forget set as training data?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Decimal places of the probabilities in `mia_confidence_svc`.
_PLACES = 4


def entropy(probabilities: Tensor) -> Tensor:
    """(N,) entropy in nats of (N, K) probabilities."""
    return -torch.xlogy(probabilities.double(), probabilities.double()).sum(1)


def mia_entropy_lr(retain: Tensor, test: Tensor, forget: Tensor) -> float | None:
    """Share of the forget set that an entropy attack calls members; the oracle's value is the target.

    A class-balanced logistic regression on output entropy tells retained training images (1) from test images of
    retained classes (0). Source: Chundawat et al., 2023, arXiv:2205.08096.

    Args:
        retain: (N_r,) entropies, from `entropy`, on retained training images.
        test: (N_t,) entropies on test images of retained classes; with none of them the result is ``None``.
        forget: (N_f,) entropies on the forget set.
    """
    if not (len(retain) and len(test)):
        return None
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    x = np.concatenate([retain.double().numpy(), test.double().numpy()])[:, None]
    y = np.concatenate([np.ones(len(retain)), np.zeros(len(test))])
    with threadpool_limits(1):  # see `probe`: a second thread only waits
        attack = LogisticRegression(class_weight="balanced").fit(x, y)
        return float(attack.predict(forget.double().numpy()[:, None]).mean())


def mia_confidence_svc(retain: Tensor, test: Tensor, forget: Tensor) -> float | None:
    """SalUn's MIA-efficacy: share of the forget set called non-member; the oracle's value is the target.

    A support vector classifier (C = 3, gamma = auto, RBF) on the true class's probability tells as many retained
    training images (1) as test images (0). Source: Fan et al., 2024, arXiv:2310.12508.

    Probabilities are rounded to four places, and equal ones of a side become one with their number as its weight, which
    is the same problem. The kernel changes by less than the solver's tolerance. The fit is quadratic in the different
    probabilities, and a model is sure of most images: its probabilities are few.

    Args:
        retain: (N,) true-class probabilities on retained training images.
        test: (N,) the same on test images of retained classes; as many as ``retain``.
        forget: (N_f,) the same on the forget set.

    Returns:
        From 0 to 1; ``None`` with fewer than two members and non-members.

    Raises:
        ValueError: ``retain`` and ``test`` differ in number.
    """
    from sklearn.svm import SVC

    if len(retain) != len(test):
        raise ValueError(f"the attack needs as many members as non-members, not {len(retain)} and {len(test)}")
    if len(retain) < 2:
        return None
    members, others, asked = (side.double().numpy().round(_PLACES) for side in (retain, test, forget))
    (one, ones), (zero, zeros) = (np.unique(side, return_counts=True) for side in (members, others))
    x, number = np.concatenate([one, zero])[:, None], np.concatenate([ones, zeros]).astype(float)
    y = np.concatenate([np.ones(len(one)), np.zeros(len(zero))])
    # The cache, in MB, changes the time it takes and the memory, not the result.
    attack = SVC(C=3, gamma="auto", kernel="rbf", cache_size=40).fit(x, y, sample_weight=number)
    return float(1 - attack.predict(asked[:, None]).mean())


def mia_entropy_lr_ssd(retain: Tensor, test: Tensor, forget: Tensor) -> float | None:
    """`mia_entropy_lr` as the SSD code computes it: the non-members are the whole test set.

    Test images of the forgotten classes are among the non-members, which makes forgetting look better than it is;
    it is here to compare with published figures. The oracle's value is the target. Source: Foster et al., 2024,
    arXiv:2308.07707.

    Args:
        retain: (N_r,) entropies on retained training images.
        test: (N_t,) entropies on all test images.
        forget: (N_f,) entropies on the forget set.
    """
    return mia_entropy_lr(retain, test, forget)


def sample_loss(sure: Tensor) -> Tensor:
    """(N,) cross-entropy in nats of (N,) true-class probabilities, at most 50 (one of 0 would give infinity)."""
    return -sure.double().log().clamp_min(-50)


def mia_loss_auc(forget: Tensor, unseen: Tensor) -> float | None:
    """Area under the ROC curve of the loss itself: 0.5 is chance, and about the oracle's value.

    The attack calls the images with the smaller losses members: the area is the probability that a forgotten image has
    a smaller loss than an unseen one of the same classes. Nothing is fitted. Source: loss attack, Yeom et al., 2018,
    arXiv:1709.01604.

    Args:
        forget: (N_f,) losses of the forget set, from `sample_loss`.
        unseen: (N_u,) losses of test images of the same classes.

    Returns:
        From 0 to 1: above 0.5 where forgotten images have smaller losses, below where they have larger ones; ``None``
        without images on a side.
    """
    if not (len(forget) and len(unseen)):
        return None
    from sklearn.metrics import roc_auc_score

    y = np.concatenate([np.ones(len(forget)), np.zeros(len(unseen))])
    return float(roc_auc_score(y, -torch.cat([forget, unseen]).double().numpy()))


def mia_loss_auc_interval(forget: Tensor, unseen: Tensor, resamples: int = 1000) -> tuple[float, float] | None:
    """95% interval of `mia_loss_auc`: percentiles of a bootstrap that draws both sides anew.

    Args:
        forget: (N_f,) losses of the forget set.
        unseen: (N_u,) losses of test images of the same classes.
        resamples: Draws of the bootstrap.

    Returns:
        (low, high); ``None`` with fewer than two images on a side.
    """
    if len(forget) < 2 or len(unseen) < 2:
        return None
    draw = np.random.default_rng(0)
    values, place = np.unique(torch.cat([forget, unseen]).double().numpy(), return_inverse=True)
    sides = place[: len(forget)], place[len(forget) :]
    areas = np.empty(resamples)
    for i in range(resamples):
        member, other = (
            np.bincount(side[draw.integers(len(side), size=len(side))], minlength=len(values)) for side in sides
        )
        larger = len(unseen) - np.cumsum(other)  # unseen images with a larger loss; equal losses count half
        areas[i] = (member * (larger + other / 2)).sum()
    low, high = np.percentile(areas / (len(forget) * len(unseen)), [2.5, 97.5])
    return float(low), float(high)


def mia_loss_lr_auc(forget: Tensor, unseen: Tensor) -> float | None:
    """Area under the ROC curve of an attack that is fitted to the loss.

    A class-balanced logistic regression on the loss tells forgotten training images (1) from unseen images of the
    same classes (0). Each image is scored by an attack that was not trained on it (5-fold stratified
    cross-validation); the mean of the folds' areas. The attack learns the direction. Where the loss tells nothing, the
    direction is chance, and the area may lie well below 0.5.

    Args:
        forget: (N_f,) losses of the forget set, from `sample_loss`.
        unseen: (N_u,) losses of test images of the same classes.

    Returns:
        From 0 to 1; ``None`` with fewer than two images on a side.
    """
    from sklearn.metrics import roc_auc_score

    scored = _out_of_fold(forget, unseen)
    if scored is None:
        return None
    y, score, fold = scored
    return float(np.mean([roc_auc_score(y[fold == f], score[fold == f]) for f in np.unique(fold)]))


def mia_loss_tpr_at_1fpr(forget: Tensor, unseen: Tensor) -> float | None:
    """True positive rate of the attack of `mia_loss_lr_auc` where at most 1% of the unseen images are accused.

    0.01 is chance, and the target. The scores of all folds are pooled. Source: Carlini et al., 2022,
    arXiv:2112.03570.

    Args:
        forget: (N_f,) losses of the forget set.
        unseen: (N_u,) losses of test images of the same classes.

    Returns:
        From 0 to 1; ``None`` under 100 unseen images, where 1% of them is less than one.
    """
    scored = _out_of_fold(forget, unseen) if len(unseen) >= 100 else None
    if scored is None:
        return None
    y, score, _ = scored
    innocent = np.sort(score[y == 0])[::-1]
    return float((score[y == 1] > innocent[len(innocent) // 100]).mean())


_Scores = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _out_of_fold(forget: Tensor, unseen: Tensor) -> _Scores | None:
    """Membership, score by an attack that did not see the sample, and fold; ``None`` where nothing can be folded."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    folds = min(5, len(forget), len(unseen))
    if folds < 2:
        return None
    x = np.concatenate([forget.double().numpy(), unseen.double().numpy()])[:, None]
    y = np.concatenate([np.ones(len(forget), int), np.zeros(len(unseen), int)])
    score, fold = np.zeros(len(y)), np.zeros(len(y), int)
    cuts = StratifiedKFold(folds, shuffle=True, random_state=0).split(x, y)
    with threadpool_limits(1):  # see `probe`
        for number, (learn, judge) in enumerate(cuts):
            attack = LogisticRegression(class_weight="balanced").fit(x[learn], y[learn])
            score[judge], fold[judge] = attack.decision_function(x[judge]), number
    return y, score, fold
