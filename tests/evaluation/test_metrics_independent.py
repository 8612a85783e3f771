"""Every figure of a real eval.json, derived once more from the files of the run in NumPy, SciPy and scikit-learn.

Only the images, the request and the networks come from megu. The derivation shares no code with `megu_cli.evaluation`.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import euclidean, jensenshannon
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from megu_cli.config import load_config
from megu_cli.evaluation.registry import metrics
from megu_cli.execution.runtime import generator
from megu_cli.pipeline.context import RunContext
from megu_cli.pipeline.steps.problem import fresh
from megu_cli.run import artifacts

PRECISE = 1e-8


class Derived:
    """Logits, features and figures of one model."""

    def __init__(self, model, work):
        data, self.request = work.inputs.data, work.inputs.request
        self.y, self.y_test = data.train.labels.numpy(), data.test.labels.numpy()
        head = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
        sides = []
        for split, number in ((data.train, len(data.train)), (data.test, len(data.test))):
            features = []
            hook = head.register_forward_pre_hook(lambda _, given, into=features: into.append(given[0]))
            with torch.inference_mode():
                x = torch.cat(list(split.batches(list(torch.arange(number).split(work.inputs.eval_batch)))))
                logits = torch.cat([model(part) for part in x.split(work.inputs.eval_batch)])
            hook.remove()
            sides.append((logits.double().numpy(), torch.cat(features).double().numpy()))
        (self.logits, self.features), (self.logits_test, self.features_test) = sides
        self.forget, self.retain = self.request.forget.numpy(), self.request.retain.numpy()
        self.gone = np.isin(self.y_test, self.request.classes)

    def masked(self):
        masked = copy.copy(self)
        masked.logits, masked.logits_test = self.logits.copy(), self.logits_test.copy()
        for logits in (masked.logits, masked.logits_test):
            logits[:, self.request.classes] = -np.inf
        return masked

    @property
    def p(self):
        return softmax(self.logits[self.forget], 1)

    def alone(self, untrained, attack_seed):
        f, r, gone, y, y_test = self.forget, self.retain, self.gone, self.y, self.y_test
        guess, guess_test = self.logits.argmax(1), self.logits_test.argmax(1)
        unsure, unsure_test = entropy(softmax(self.logits, 1), axis=1), entropy(softmax(self.logits_test, 1), axis=1)

        def members(others):
            x = np.concatenate([unsure[r], others])[:, None]
            labels = np.repeat([1, 0], [len(r), len(others)])
            attack = LogisticRegression(class_weight="balanced").fit(x, labels)
            return attack.predict(unsure[f][:, None]).mean()

        loss = np.minimum(-log_softmax(self.logits, 1)[np.arange(len(y)), y], 50)[f]
        unseen = np.minimum(-log_softmax(self.logits_test, 1)[np.arange(len(y_test)), y_test], 50)[gone]
        x, membership = np.concatenate([loss, unseen])[:, None], np.repeat([1, 0], [len(loss), len(unseen)])
        areas = []
        for learn, judge in StratifiedKFold(5, shuffle=True, random_state=0).split(x, membership):
            attack = LogisticRegression(class_weight="balanced").fit(x[learn], membership[learn])
            areas.append(roc_auc_score(membership[judge], attack.decision_function(x[judge])))
        scale = StandardScaler().fit(self.features)
        linear = LogisticRegression(max_iter=1000).fit(scale.transform(self.features), y)
        return {
            "retain_train_acc": accuracy_score(y[r], guess[r]),
            "forget_train_acc": accuracy_score(y[f], guess[f]),
            "retain_test_acc": accuracy_score(y_test[~gone], guess_test[~gone]),
            "forget_test_acc": accuracy_score(y_test[gone], guess_test[gone]),
            "mia_entropy_lr": members(unsure_test[~gone]),
            "mia_entropy_lr_ssd": members(unsure_test),
            "mia_loss_auc": mannwhitneyu(unseen, loss).statistic / (len(loss) * len(unseen)),
            "mia_loss_lr_auc": np.mean(areas),
            "mia_confidence_svc": self.confidence_attack(attack_seed),
            "zrf": 1 - np.mean(jensenshannon(self.p, untrained, axis=1) ** 2) / np.log(2),
            "probe_acc": linear.score(scale.transform(self.features_test[gone]), y_test[gone]),
        }

    def confidence_attack(self, draw):
        """As many members as there are retained test images: the draw is the request's own."""
        known = softmax(self.logits, 1)[np.arange(len(self.y)), self.y]
        known_test = softmax(self.logits_test, 1)[np.arange(len(self.y_test)), self.y_test][~self.gone]
        members, others = (part.numpy() for part in draw)
        x = np.concatenate([known[members], known_test[others]])[:, None].astype(np.float32).astype(float)
        attack = SVC(C=3, gamma="auto").fit(x, np.repeat([1, 0], [len(members), len(others)]))
        return (attack.predict(known[self.forget][:, None].astype(np.float32).astype(float)) == 0).mean()

    def beside(self, figures, oracle, target):
        gap = {name: abs(figures[name] - target[name]) for name in figures}
        return {
            "js_divergence": np.mean(jensenshannon(self.p, oracle.p, axis=1) ** 2),
            "activation_distance": np.mean([euclidean(a, b) for a, b in zip(self.p, oracle.p, strict=True)]),
            "agreement": accuracy_score(oracle.p.argmax(1), self.p.argmax(1)),
            "avg_gap": np.mean([gap[n] for n in ("retain_train_acc", "forget_train_acc", "retain_test_acc",
                                                 "mia_entropy_lr")]),
            "tow": (1 - gap["forget_train_acc"]) * (1 - gap["retain_train_acc"]) * (1 - gap["retain_test_acc"]),
        }  # fmt: skip

    def entangled(self, original):
        means = np.stack([self.features[self.y == c].mean(0) for c in range(10)])
        others = [c for c in range(10) if c not in self.request.classes]

        def cka(index):
            a, b, h = self.features[index], original.features[index], np.eye(len(index)) - 1 / len(index)
            k, m = h @ a @ a.T @ h, h @ b @ b.T @ h
            return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())

        return {
            "centroid_cosine": cosine_similarity(means)[self.request.classes][:, others].mean(),
            "cka_forget": cka(self.forget),
            "cka_retain": cka(self.retain),
        }


def test_every_figure_is_derived_again(finished, megu):
    settings = ["eval.probe_samples=1000", "eval.attack_samples=1000"]
    assert megu("eval", "-c", finished, *(part for setting in settings for part in ("--set", setting))).code == 0
    work = RunContext.open(load_config(finished, settings))
    evaluation = json.loads((work.directory.out / "eval.json").read_text())
    untrained = fresh(work, "zrf").eval()
    models = {"original": work.original(), "unlearned": work.unlearned(), "oracle": work.build().eval()}
    models["oracle"].load_state_dict(artifacts.read(work.directory.out / "oracle.safetensors").tensors)
    derived = {name: Derived(model, work) for name, model in models.items()}
    derived["mask"] = derived["original"].masked()
    random = Derived(untrained, work).p
    retained = int((~derived["original"].gone).sum())
    number, draw = min(len(work.inputs.request.retain), retained), generator(work.config.seed, "eval", "attack")
    members = work.inputs.request.retain[torch.randperm(len(work.inputs.request.retain), generator=draw)[:number]]
    sample = members, torch.randperm(retained, generator=draw)[:number]
    alone = {name: found.alone(random, sample) for name, found in derived.items()}
    labels = artifacts.read(work.directory.out / "labels.safetensors").tensors["perturbing"].numpy()
    agreement = accuracy_score(derived["oracle"].p.argmax(1), labels)
    checked = set()
    for name, found in derived.items():
        told = {**evaluation[name], **evaluation["entanglement"][name], **evaluation["comparison"].get(name, {})}
        expected = {**alone[name], **found.entangled(derived["original"])}
        if name != "oracle":
            expected |= found.beside(alone[name], derived["oracle"], alone["oracle"])
        if name == "unlearned":
            expected["label_agreement"] = agreement
        for figure, value in expected.items():
            assert told[figure] == pytest.approx(value, abs=PRECISE), f"{name}: {figure}"
        checked |= expected.keys()
    # The fixture measures neither a second request, nor relearning, nor 1% of enough unseen images.
    rare = {"already_train_acc", "relearn_epochs", "mia_loss_tpr_at_1fpr"}
    assert {m.name for m in metrics() if m.group != "time"} == checked | rare
