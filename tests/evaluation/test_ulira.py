"""U-LiRA on confidences whose distributions are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from megu_cli.evaluation.ulira import _auc, _rate, attacks, control, likelihood_ratios, scaled, ulira

SEEDS, IMAGES = 16, 400


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr("megu_cli.evaluation.ulira._DRAWS", 60)


def confidences(shift: float, seed: int, spread: float = 1.0) -> np.ndarray:
    """(S, N) scaled confidences that are Gaussian around each image's own mean, moved by ``shift``."""
    centre = np.random.default_rng(99).normal(0, 2, IMAGES)
    return np.random.default_rng(seed).normal(centre + shift, spread, (SEEDS, IMAGES))


def test_equal_distributions_are_a_coins_toss():
    found = ulira(confidences(0.0, 1), confidences(0.0, 2))
    low, high = found.accuracy_interval
    assert low < 0.5 < high
    assert found.auc == pytest.approx(0.5, abs=0.02)
    assert found.tpr_at_1fpr < 0.03


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_planted_shift_has_the_auc_that_the_formula_gives(shift):
    """Two Gaussians at a distance d in standard deviations: the best attack has the AUC Phi(d / sqrt(2)).

    The means are estimated from 15 other seeds, which costs a little.
    """
    found = ulira(confidences(shift, 1), confidences(0.0, 2))
    assert found.auc == pytest.approx(stats.norm.cdf(shift / np.sqrt(2)), abs=0.03)
    assert found.accuracy == pytest.approx(stats.norm.cdf(shift / 2), abs=0.03)


def test_the_image_that_is_told_apart_best_comes_first():
    unlearned = confidences(0.0, 1)
    unlearned[:, 7] = 14.0
    found = ulira(unlearned, confidences(0.0, 2))
    assert found.most_told_apart[0] == 7


def test_the_seed_itself_is_left_out():
    """A model that differs from all others is not known by its own confidence."""
    unlearned, oracle = np.zeros((3, 1)), np.zeros((3, 1))
    unlearned[0] = 50.0
    ours, _ = likelihood_ratios(unlearned, oracle)
    assert ours[0, 0] == 0.0  # both Gaussians are those of the other seeds, which are equal
    assert ours[1, 0] != 0.0


def test_scaled_is_the_logit_of_the_true_class_and_finite_at_the_edges():
    loss = -np.log([0.5, 0.8, 1e-9])
    assert scaled(loss) == pytest.approx([0.0, np.log(4), np.log(1e-9 / (1 - 1e-9))])
    assert np.isfinite(scaled(np.array([0.0, np.inf]))).all()


def test_the_oracle_is_held_against_the_oracle_and_too_few_seeds_say_nothing():
    unlearned, oracle = confidences(2.0, 1), confidences(0.0, 2)
    by_seed = {name: {str(i): list(row) for i, row in enumerate(side)} for name, side in
               (("retrain", oracle), ("megu", unlearned), ("few", unlearned[:7]))}  # fmt: skip
    found = attacks(by_seed, "retrain")
    assert set(found) == {"retrain", "megu"}
    low, high = found["retrain"]["auc_chance"]
    assert low < 0.5 < high
    assert found["retrain"]["auc_interval"] is None
    assert found["retrain"]["seeds"] == 8
    assert found["megu"]["auc"] > 0.9
    assert "retrain" not in attacks({"retrain": dict(list(by_seed["retrain"].items())[:15])}, "retrain")


def test_images_of_one_model_count_as_one_model():
    """Each model has a level that its images share: of equal distributions, 16 models and 400 images are 16 draws."""
    oracle, same = (
        confidences(0.0, seed) + np.random.default_rng(10 + seed).normal(0, 2, (SEEDS, 1)) for seed in (1, 2)
    )
    found = ulira(same, oracle)
    low, high = found.auc_chance
    assert low <= found.auc <= high
    assert high - low > 0.1
    assert found.auc_interval[1] - found.auc_interval[0] > 0.1
    other = ulira(same + 4.0, oracle)
    assert other.auc > other.auc_chance[1]
    of_oracles = control(oracle)
    assert of_oracles.auc == pytest.approx(0.5, abs=0.1)
    assert of_oracles.auc_chance[0] < 0.5 < of_oracles.auc_chance[1]


def test_the_interval_covers_what_other_seeds_give(monkeypatch):
    """Eight seeds whose models have levels of their own: a 95% interval holds the mean of many such studies."""
    monkeypatch.setattr("megu_cli.evaluation.ulira._DRAWS", 1)
    draw = np.random.default_rng(5)

    def side(shift: float) -> np.ndarray:
        return draw.normal(shift, 1, (8, 1)) + draw.normal(0, 1, (8, 40))

    studies = [ulira(side(1.5), side(0.0)) for _ in range(60)]
    mean = np.mean([study.auc for study in studies])
    assert sum(study.auc_interval[0] <= mean <= study.auc_interval[1] for study in studies) >= 51


def test_auc_and_rate_beside_scikit_learn():
    draw = np.random.default_rng(0)
    positive, negative = draw.integers(0, 9, 200).astype(float), draw.integers(-2, 7, 300).astype(float)
    y = np.r_[np.ones(200), np.zeros(300)]
    assert _auc(positive, negative) == pytest.approx(roc_auc_score(y, np.r_[positive, negative]), abs=1e-12)
    threshold = np.sort(negative)[::-1][3]
    assert _rate(positive, negative, 0.01) == (positive > threshold).mean()
    assert (negative > threshold).mean() <= 0.01


def test_too_few_seeds_or_other_images_are_refused():
    with pytest.raises(ValueError, match="three seeds"):
        likelihood_ratios(np.zeros((2, 4)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="same"):
        likelihood_ratios(np.zeros((4, 4)), np.zeros((4, 5)))
