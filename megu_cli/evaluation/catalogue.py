"""The built-in metrics in the order in which they show. A new one is an entry here and its function in `figures`."""

from __future__ import annotations

from megu_cli.evaluation.metric import Metric, Place

# Version of the stage `eval`: raise it when a metric is added, or gives another figure for the same models.
VERSION = 7

_UNPAIRED: tuple[Place, ...] = ("table", "report", "require")
_QUIET: tuple[Place, ...] = ("report", "require")
_CORRECT = "share of images with the correct label"
_CHUNDAWAT = "Chundawat et al. 2023, arXiv:2205.08096"
_SAME = "D_f against test images of the same concepts"
_TWO = "two forgotten images, and two test images of their classes"

BUILT_IN = (
    Metric(
        "retain_train_acc",
        "accuracy, retained training images",
        "figures:retain_train_acc",
        title="Kept training images recognised",
        plain="What it should still know, and was trained on.",
        definition=_CORRECT,
        images="D_r",
        places=_UNPAIRED,
    ),
    Metric(
        "forget_train_acc",
        "accuracy, forget set",
        "figures:forget_train_acc",
        title="Forgotten images recognised",
        plain="How often it still names the forgotten images right.",
        definition=_CORRECT,
        images="D_f",
        column="forgotten",
    ),
    Metric(
        "retain_test_acc",
        "accuracy, retained test images",
        "figures:retain_test_acc",
        title="Kept classes, new images recognised",
        plain="What it should still know, on unseen images.",
        definition=_CORRECT,
        images="test images of concepts that are not wholly forgotten",
        needs="test images of retained classes",
        column="retained",
    ),
    Metric(
        "forget_test_acc",
        "accuracy, forgotten classes' test images",
        "figures:forget_test_acc",
        title="New images of the forgotten classes recognised",
        plain="The same on images that no model has ever seen.",
        definition=_CORRECT,
        images="test images of the wholly forgotten concepts",
        needs="test images of the forgotten classes",
    ),
    Metric(
        "already_train_acc",
        "accuracy, images forgotten before",
        "figures:already_train_acc",
        title="Images forgotten before recognised",
        plain="What earlier requests made it forget, and should stay so.",
        definition=f"{_CORRECT}; only if `forget.already` is set",
        images="training images forgotten by earlier requests",
        places=_UNPAIRED,
    ),
    Metric(
        "mia_entropy_lr",
        "membership inference, entropy",
        "figures:mia_entropy_lr",
        title="Attack by certainty: taken for training images",
        plain="An attacker looks at how certain the model is, and says which forgotten images it was trained on.",
        definition="share of D_f that an attack classifies as members; the attack is a class-balanced logistic "
        "regression on the output entropy, with D_r as members and retained test images as non-members",
        images="D_r, retained test, D_f",
        source=_CHUNDAWAT,
        needs="test images of retained classes",
        column="MIA",
    ),
    Metric(
        "mia_entropy_lr_ssd",
        "membership inference, entropy, all test images",
        "figures:mia_entropy_lr_ssd",
        title="Attack by certainty, against all test images",
        plain="The same attack as some published tables have it; only for comparison with them.",
        definition="`mia_entropy_lr` with the *whole* test set as non-members, forgotten classes included; use it only "
        "to compare with published figures",
        images="D_r, test, D_f",
        source="Foster et al. 2024, arXiv:2308.07707",
        needs="test images",
        places=_QUIET,
    ),
    Metric(
        "mia_confidence_svc",
        "membership inference, confidence (non-members)",
        "figures:mia_confidence_svc",
        title="Attack by confidence: taken for strangers",
        plain="Another attacker looks at the true class's probability; this is the share that it calls unseen.",
        definition="share of D_f that an attack classifies as *non*-members; the attack is an SVC (C = 3, gamma = "
        "auto, RBF) on the true class's probability, rounded to four places, with as many members as non-members (at "
        "most `eval.attack_samples`)",
        images="D_r, retained test, D_f",
        source="Fan et al. 2024, arXiv:2310.12508",
        needs="two test images of retained classes, and eval.attack_samples of at least 2",
        places=_UNPAIRED,
    ),
    Metric(
        "mia_loss_auc",
        "membership inference, loss (50 is chance)",
        "figures:mia_loss_auc",
        title="Attack by loss",
        plain="How well an attacker tells forgotten from unseen images; 50% is chance.",
        definition="area under the ROC curve of the loss itself (at most 50 nats): the probability that a forgotten "
        "image has a smaller loss than an unseen one, equal losses counting half. Above 0.5 the forgotten images look "
        "like training images; below 0.5 their losses are too large. `intervals` holds its 95% interval by bootstrap "
        "(1,000 draws of both sides)",
        images=_SAME,
        source="Yeom et al. 2018, arXiv:1709.01604",
        target_text="the oracle's (about 0.5)",
        needs="forgotten images, and test images of their classes",
        interval="figures:mia_loss_auc_interval",
    ),
    Metric(
        "mia_loss_lr_auc",
        "membership inference, fitted loss attack",
        "figures:mia_loss_lr_auc",
        title="Attack by loss, fitted",
        plain="The same by an attack that learns which losses to accuse; by chance it may learn the wrong direction.",
        definition="area under the ROC curve of a class-balanced logistic regression on the loss; 5-fold stratified "
        "cross-validation, mean of the folds. The attack learns the direction. Where the loss tells nothing, the "
        "direction is chance, and the value may lie well below 0.5: prefer `mia_loss_auc`",
        images=_SAME,
        target_text="the oracle's (about 0.5)",
        needs=_TWO,
        places=_QUIET,
    ),
    Metric(
        "mia_loss_tpr_at_1fpr",
        "membership inference, loss, true positives at 1% false positives",
        "figures:mia_loss_tpr_at_1fpr",
        target=0.01,
        title="Attack by loss, when hardly ever wrong",
        plain="Forgotten images found while at most 1% of unseen ones are accused; 1% is chance.",
        definition="true positive rate of the attack of `mia_loss_lr_auc` at a false positive rate of at most 1%, "
        "folds pooled; `null` with fewer than 100 unseen images",
        images=_SAME,
        source="Carlini et al. 2022, arXiv:2112.03570",
        needs="two forgotten images, and 100 test images of their classes",
        places=_QUIET,
    ),
    Metric(
        "zrf",
        "zero retrain forgetting",
        "figures:zrf",
        title="Likeness to an untrained model",
        plain="How much its answers on forgotten images look like guessing.",
        definition="1 − JS(p, p_random) / ln 2, p_random is the softmax of a randomly initialised model in eval mode",
        images="D_f",
        source="Chundawat et al. 2023",
        places=_UNPAIRED,
    ),
    Metric(
        "probe_acc",
        "linear probe, forgotten classes",
        "figures:probe_acc",
        title="Forgotten classes found in the inner features",
        plain="A small classifier on the model's inner features: what is hidden rather than gone.",
        definition="accuracy of a logistic regression on standardised penultimate features. It is trained on "
        "`eval.probe_samples` training images with the true labels of all classes (of all sub-classes, if the request "
        "names sub-classes). Of more than 200 other classes, 200 are drawn. It finds a class that is hidden and not "
        "forgotten",
        images="test images of the forgotten concepts",
        source="Alain and Bengio 2016, arXiv:1610.01644",
        needs="test images of the forgotten classes, and eval.probe_samples that draws two classes",
        column="probe",
    ),
    Metric(
        "relearn_epochs",
        "epochs to relearn the forget set",
        "figures:relearn_epochs",
        unit="epochs",
        title="Passes to learn it again",
        plain="Few mean that much of it was still there.",
        definition="epochs of SGD (0.01, momentum 0.9) on D_f until a copy of the model has the original's accuracy on "
        "D_f; `null` if it takes more than `eval.relearn_epochs` epochs (`--require` treats `null` as later than any "
        "bound). Measured only if `eval.relearn_epochs` is set, since it trains",
        images="D_f",
        source="Golatkar et al. 2020, arXiv:1911.04933",
    ),
    Metric(
        "js_divergence",
        "JS divergence to retrained, forget set",
        "figures:js_divergence",
        "comparison",
        target=0.0,
        unit="number",
        title="Distance of its answers to retrained (JS, nats)",
        plain="0 would be the same answers on the forgotten images, 0.69 entirely other ones.",
        definition="(KL(p‖m) + KL(q‖m)) / 2, m = (p + q) / 2, in nats, summed over classes, mean over D_f (Lin 1991); "
        "at most ln 2",
        column="JS",
    ),
    Metric(
        "activation_distance",
        "activation distance to retrained, forget set",
        "figures:activation_distance",
        "comparison",
        target=0.0,
        unit="number",
        title="Distance of its answers to retrained (L2)",
        plain="0 would be the same answers, 1.41 entirely other ones.",
        definition="mean Euclidean distance of the softmaxes on D_f (Golatkar et al. 2021, arXiv:2012.13431); at "
        "most √2",
    ),
    Metric(
        "agreement",
        "agreement with retrained, forget set",
        "figures:agreement",
        "comparison",
        target=1.0,
        title="Same answer as retrained",
        plain="How often both name the same class on forgotten images.",
        definition="share of D_f with the same argmax",
        column="agreement",
    ),
    Metric(
        "label_agreement",
        "perturbing labels that retrained agrees with",
        "figures:label_agreement",
        "comparison",
        target=None,
        title="Well-chosen new labels",
        plain="How often an image was led to the class that the retrained model sees in it.",
        definition="share of D_f on which MeGU's perturbing label is the oracle's prediction; for `unlearned` only",
        target_text="agreement of two oracles",
        places=_UNPAIRED,
    ),
    Metric(
        "avg_gap",
        "average gap to retrained",
        "figures:avg_gap",
        "comparison",
        target=0.0,
        title="Average gap to retrained",
        plain="Mean difference of three accuracies and the attack by certainty.",
        definition="mean absolute difference over `retain_train_acc`, `forget_train_acc`, `retain_test_acc`, "
        "`mia_entropy_lr`",
        target_text="the noise floor",
        column="avg gap",
    ),
    Metric(
        "tow",
        "tug of war",
        "figures:tow",
        "comparison",
        target=1.0,
        title="Tug of war",
        plain="Forgetting and keeping in one number; 100% is retrained.",
        definition="(1 − \\|Δforget_train\\|)(1 − \\|Δretain_train\\|)(1 − \\|Δretain_test\\|) of accuracies (Zhao et "
        "al. 2024, arXiv:2406.01257)",
        places=_UNPAIRED,
    ),
    Metric(
        "centroid_cosine",
        "cosine of forgotten and retained class centroids",
        "figures:centroid_cosine",
        "entanglement",
        target=None,
        unit="number",
        title="Forgotten and kept classes point the same way",
        plain="Mean cosine of their centroids; 1 is the same direction.",
        definition="mean cosine between the mean penultimate features of the classes in D_f and those of the retained "
        "classes",
        places=("report",),
    ),
    Metric(
        "cka_forget",
        "features kept from original (CKA), forget set",
        "figures:cka_forget",
        "entanglement",
        target=None,
        unit="number",
        title="Forgotten images lie as in the original",
        plain="Linear CKA; 1 means that nothing moved.",
        definition="linear CKA (Kornblith et al. 2019, arXiv:1905.00414) between a model's features and the original's "
        "on D_f: ‖Y'X‖² / (‖X'X‖ ‖Y'Y‖), columns centred; 1 means unchanged features; on at most `eval.probe_samples` "
        "images",
        places=("table", "report"),
    ),
    Metric(
        "cka_retain",
        "CKA to the original, retained images",
        "figures:cka_retain",
        "entanglement",
        target=None,
        unit="number",
        title="Kept images lie as in the original",
        plain="Linear CKA; 1 means that nothing moved.",
        definition="`cka_forget` on D_r",
        places=("report",),
    ),
    Metric(
        "time_ratio",
        "time, share of retraining",
        group="time",
        target=0.0,
        title="Time as a share of retraining",
        definition="(labels + noise + finetune) / retraining; `null` if they ran on different machines",
        column="time",
        places=("require", "paired"),
    ),
    Metric(
        "time_ratio_total",
        "time with ratings, share of retraining",
        group="time",
        target=0.0,
        definition="`time_ratio` with the similarity ratings added",
        places=("require",),
    ),
    Metric(
        "time_ratio_reached",
        "time, share of the retraining that was needed",
        group="time",
        target=0.0,
        definition="`time_ratio` divided by the fraction of retraining that reaches the final validation accuracy to "
        "within 0.2 points",
        places=("require",),
    ),
)
