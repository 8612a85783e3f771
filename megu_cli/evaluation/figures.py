"""The functions that the registry of metrics names: each selects the images of one metric and computes it.

The mathematics stands in `accuracy`, `distance`, `entanglement`, `membership`, `probe` and `relearning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megu_cli.evaluation import accuracy, distance, entanglement, membership, probe, relearning
from megu_cli.evaluation.registry import NotApplicable

if TYPE_CHECKING:
    from megu_cli.evaluation.measure import Measurement


def _train_acc(m: Measurement, index: Tensor) -> float | None:
    return accuracy.accuracy(m.predictions.train.predicted[index], m.problem.data.train.labels[index])


def _test_acc(m: Measurement, chosen: Tensor) -> float | None:
    return accuracy.accuracy(m.predictions.test.predicted[chosen], m.problem.data.test.labels[chosen])


def retain_train_acc(m: Measurement) -> float | None:
    """Accuracy on D_r."""
    return _train_acc(m, m.problem.request.retain)


def forget_train_acc(m: Measurement) -> float | None:
    """Accuracy on D_f."""
    return _train_acc(m, m.problem.request.forget)


def already_train_acc(m: Measurement) -> float | None:
    """Accuracy on training images that earlier requests have forgotten."""
    if not len(m.problem.request.already):
        raise NotApplicable
    return _train_acc(m, m.problem.request.already)


def retain_test_acc(m: Measurement) -> float | None:
    """Accuracy on test images of concepts that are not wholly forgotten."""
    return _test_acc(m, ~m.problem.forgotten_test)


def forget_test_acc(m: Measurement) -> float | None:
    """Accuracy on test images of the wholly forgotten concepts."""
    return _test_acc(m, m.problem.forgotten_test)


def mia_entropy_lr(m: Measurement) -> float | None:
    """`membership.mia_entropy_lr`, with test images of retained concepts as non-members."""
    train, test, request = m.predictions.train, m.predictions.test, m.problem.request
    return membership.mia_entropy_lr(
        train.entropy[request.retain], test.entropy[~m.problem.forgotten_test], train.entropy[request.forget]
    )


def mia_entropy_lr_ssd(m: Measurement) -> float | None:
    """`membership.mia_entropy_lr_ssd`, with all test images as non-members."""
    train, request = m.predictions.train, m.problem.request
    return membership.mia_entropy_lr_ssd(
        train.entropy[request.retain], m.predictions.test.entropy, train.entropy[request.forget]
    )


def mia_confidence_svc(m: Measurement) -> float | None:
    """`membership.mia_confidence_svc` on the drawn members and non-members."""
    train, test = m.predictions.train, m.predictions.test
    members, others = m.problem.attack_sample
    return membership.mia_confidence_svc(
        train.confidence[members],
        test.confidence[~m.problem.forgotten_test][others],
        train.confidence[m.problem.request.forget],
    )


def _losses(m: Measurement) -> tuple[Tensor, Tensor]:
    """Losses on D_f, and on test images of the same concepts."""
    forget = m.predictions.train.confidence[m.problem.request.forget]
    unseen = m.predictions.test.confidence[m.problem.similar_test]
    return membership.sample_loss(forget), membership.sample_loss(unseen)


def mia_loss_auc(m: Measurement) -> float | None:
    """`membership.mia_loss_auc` on D_f and on test images of the same concepts."""
    return membership.mia_loss_auc(*_losses(m))


def mia_loss_auc_interval(m: Measurement) -> tuple[float, float] | None:
    """`membership.mia_loss_auc_interval` of `mia_loss_auc`."""
    return membership.mia_loss_auc_interval(*_losses(m))


def mia_loss_lr_auc(m: Measurement) -> float | None:
    """`membership.mia_loss_lr_auc` on D_f and on test images of the same concepts."""
    return membership.mia_loss_lr_auc(*_losses(m))


def mia_loss_tpr_at_1fpr(m: Measurement) -> float | None:
    """`membership.mia_loss_tpr_at_1fpr` on D_f and on test images of the same concepts."""
    return membership.mia_loss_tpr_at_1fpr(*_losses(m))


def zrf(m: Measurement) -> float | None:
    """`distance.zrf` on D_f."""
    return distance.zrf(m.probabilities, m.problem.untrained)


def probe_acc(m: Measurement) -> float | None:
    """`probe.probe_acc` on test images of the forgotten concepts."""
    sample, (labels, labels_test) = m.problem.sample, m.problem.probe_labels
    return probe.probe_acc(
        m.predictions.train.features_of(sample.probed),
        labels[sample.probed],
        m.predictions.test.features_of(sample.forgotten_test),
        labels_test[sample.forgotten_test],
    )


def relearn_epochs(m: Measurement) -> int | None:
    """`relearning.relearn_epochs` up to the original's accuracy on D_f, if ``eval.relearn_epochs`` asks for it."""
    problem = m.problem
    if m.model is None or not problem.settings.relearn_epochs:
        raise NotApplicable
    forget, labels = problem.request.forget, problem.data.train.labels
    return relearning.relearn_epochs(
        m.model,
        problem.data.train,
        forget,
        (m.original.train.predicted[forget] == labels[forget]).double().mean().item(),
        limit=problem.settings.relearn_epochs,
        execution=problem.execution,
    )


def _answers(m: Measurement, oracle: Measurement) -> tuple[Tensor, Tensor]:
    """(N_f, K) probabilities of both on D_f."""
    return m.probabilities, oracle.probabilities


def js_divergence(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.js_divergence` to the oracle on D_f."""
    return distance.js_divergence(*_answers(m, oracle))


def activation_distance(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.activation_distance` to the oracle on D_f."""
    return distance.activation_distance(*_answers(m, oracle))


def agreement(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.agreement` with the oracle on D_f."""
    return distance.agreement(*_answers(m, oracle))


def label_agreement(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.label_agreement` of the perturbing labels with the oracle."""
    if not m.unlearned:
        raise NotApplicable
    return None if m.perturbing is None else distance.label_agreement(m.perturbing, oracle.predictions.train.logits)


def avg_gap(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.avg_gap` to the oracle."""
    return distance.avg_gap(m.figures, oracle.figures)


def tow(m: Measurement, oracle: Measurement) -> float | None:
    """`distance.tow` beside the oracle."""
    return distance.tow(m.figures, oracle.figures)


def centroid_cosine(m: Measurement) -> float | None:
    """`entanglement.mean_cosine` of the classes in D_f and the other retained classes."""
    data, request = m.problem.data, m.problem.request
    rows = data.train.labels[request.forget].unique().tolist()
    others = {*range(len(data.classes))} - {*rows, *request.classes}
    return entanglement.mean_cosine(m.predictions.train.sums, rows, sorted(others))


def _cka(m: Measurement, index: Tensor) -> float | None:
    return entanglement.linear_cka(m.predictions.train.features_of(index), m.original.train.features_of(index))


def cka_forget(m: Measurement) -> float | None:
    """`entanglement.linear_cka` with the original's features on D_f."""
    return _cka(m, m.problem.sample.forget)


def cka_retain(m: Measurement) -> float | None:
    """`entanglement.linear_cka` with the original's features on D_r."""
    return _cka(m, m.problem.sample.retain)
