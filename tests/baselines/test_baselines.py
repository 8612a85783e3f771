"""The defining step of each baseline against a case by hand, and what each does to a small network."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from megu_cli import baselines
from megu_cli.baselines import (
    amnesiac,
    amun,
    bias_shift,
    boundary_shrink,
    ct,
    delete,
    lotus,
    mask,
    msg,
    neggrad_plus,
    new_head,
    salun,
    scrub,
    sfron,
    ssd,
    svd,
    trew,
    unsir,
)
from megu_cli.baselines.task import divergence, hold_statistics, teacher, together
from megu_cli.config import TrainConfig
from megu_cli.errors import ConfigError, MeguError
from megu_cli.training import accuracy, masked_gradients

TRAINABLE = [name for name in baselines.methods() if name not in ("original", "retrain")]
RECIPE = TrainConfig(epochs=2, batch=12, weight_decay=0.0)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    return [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]


# -- the defining step, by hand ----------------------------------------------------------------------------------------


def test_scrub_loss_by_hand():
    student, original = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    # At T = 1: teacher (3/4, 1/4), student (1/4, 3/4): KL = 3/4 ln 3 - 1/4 ln 3 = ln(3) / 2; CE of class 1: ln(4/3).
    kl = math.log(3) / 2
    assert scrub.scrub_loss(student, original, None, 0.5, 2.0, 1.0).item() == pytest.approx(-kl, abs=1e-6)
    retained = scrub.scrub_loss(student, original, torch.tensor([1]), 0.5, 2.0, 1.0)
    assert retained.item() == pytest.approx(0.5 * kl + 2 * math.log(4 / 3), abs=1e-6)
    # At T = 2 the logits are halved (teacher sqrt 3 : 1) and the loss is multiplied by 4.
    root = math.sqrt(3)
    warm = 4 * math.log(root) * (root - 1) / (root + 1)
    assert scrub.scrub_loss(student, original, None, 0.5, 2.0, 2.0).item() == pytest.approx(-warm, abs=1e-6)


def test_scrub_goes_away_from_the_teacher_before_it_comes_back(trained, task):
    original = teacher(trained)
    x = next(task.split.batches([task.forget]))
    scrub.scrub(trained, task, epochs=8, max_epochs=8, lr=0.1, gamma=0.0, alpha=0.0)
    assert divergence(trained(x), original(x)).item() > 0.1


def test_saliency_mask_by_hand():
    gradient = {"a": torch.tensor([[0.5, -4.0], [0.1, 0.0]]), "b": torch.tensor([-2.0, 1.0])}
    chosen = salun.saliency_mask(gradient, 0.5)
    # The three largest magnitudes of all six, over all parameters together: 4, 2 and 1.
    assert chosen["a"].tolist() == [[0, 1], [0, 0]]
    assert chosen["b"].tolist() == [1, 1]


def test_forget_gradient_is_that_of_the_loss_on_the_forget_set(trained, task):
    before = state(trained)
    gradient = salun.forget_gradient(trained, dataclasses.replace(task, batch=7))
    x = next(task.split.batches([task.forget]))
    trained.zero_grad()
    functional.cross_entropy(trained(x), task.labels, reduction="sum").backward()
    for key, parameter in trained.named_parameters():
        assert torch.allclose(gradient[key], parameter.grad, atol=1e-4), key
    assert same(trained, before) == list(before)


def test_salun_moves_salient_weights_only(trained, task):
    before = state(trained)
    chosen = salun.saliency_mask(salun.forget_gradient(trained, task), 0.3)
    salun.salun(trained, task, share=0.3)
    for key, parameter in trained.named_parameters():
        moved = parameter != before[key]
        assert not (moved & (chosen[key] == 0)).any(), key
    assert any((parameter != before[key]).any() for key, parameter in trained.named_parameters())
    assert all(not parameter._backward_hooks for parameter in trained.parameters())


def test_dampening_by_hand():
    whole, forgotten = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0]), torch.tensor([9.0, 11.0, 40.0, 0.0, 100.0])
    factor = ssd.dampening(whole, forgotten, alpha=10.0, lam=1.0)
    # 9 is below 10 * 1; 11 and 40 are above: 1/11 and 1/40; 0 is not above 0; 100 > 20: 2/100.
    assert factor.tolist() == pytest.approx([1, 1 / 11, 1 / 40, 1, 0.02])
    # A large lambda never makes a weight grow.
    assert ssd.dampening(whole, forgotten, alpha=10.0, lam=20.0).tolist() == pytest.approx([1, 1, 0.5, 1, 0.4])


def test_importance_is_the_mean_squared_gradient_of_batches(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    index = task.forget[:5]
    found = ssd.importance(model, dataclasses.replace(task, batch=1), index, "x")
    squares = []
    for position in index:
        x, y = next(task.split.batches([position[None]])).flatten(1), task.split.labels[position]
        error = model[1](x).softmax(1)[0] - functional.one_hot(y, 3)
        squares.append((error[:, None] * x).square())
    assert torch.allclose(found["1.weight"], torch.stack(squares).mean(0), atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ssd_multiplies_weights_by_their_dampening(trained, task):
    before = state(trained)
    whole = ssd.importance(trained, task, torch.cat([task.retain, task.forget]), "whole")
    forgotten = ssd.importance(trained, task, task.forget, "forget")
    ssd.ssd(trained, task, alpha=2.0)
    for key, parameter in trained.named_parameters():
        assert torch.allclose(parameter, before[key] * ssd.dampening(whole[key], forgotten[key], 2.0, 1.0)), key
    assert any((parameter != before[key]).any() for key, parameter in trained.named_parameters())


def test_error_maximising_loss_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1])
    noise = torch.tensor([1.0, 2.0, 0.0, 2.0]).view(1, 1, 2, 2)
    # CE = ln(4/3), squared norm 9.
    loss = unsir.error_maximising_loss(logits, labels, noise, 0.1)
    assert loss.item() == pytest.approx(-math.log(4 / 3) + 0.9, abs=1e-6)
    # The norm is a sum over pixels and a mean over noises.
    two = unsir.error_maximising_loss(logits.repeat(2, 1), labels.repeat(2), torch.cat([noise, 0 * noise]), 0.1)
    assert two.item() == pytest.approx(-math.log(4 / 3) + 0.45, abs=1e-6)


def test_unsir_noise_maximises_the_error_and_leaves_the_model(trained, task):
    before = state(trained)
    labels = torch.zeros(6, dtype=torch.int64)
    start = unsir.train_noise(trained, task, labels, 0, 0.1, 0.01)
    noise = unsir.train_noise(trained, task, labels, 30, 0.1, 0.01)
    assert functional.cross_entropy(trained(noise), labels) > functional.cross_entropy(trained(start), labels) + 1
    # Every place of the batch has a noise of its own.
    assert len(noise.flatten(1).unique(dim=0)) == 6
    assert same(trained, before) == list(before)


def test_ascent_loss_by_hand():
    even = torch.zeros(1, 2)
    sure = torch.tensor([[math.log(3.0), 0.0]])
    loss = neggrad_plus.ascent_loss(even, torch.tensor([0]), sure, torch.tensor([0]), 0.25)
    assert loss.item() == pytest.approx(0.75 * math.log(2) - 0.25 * math.log(4 / 3), abs=1e-6)


def test_wrong_labels_are_wrong_retained_and_even():
    labels = torch.arange(4).repeat(3000)
    wrong = amnesiac.wrong_labels(labels, 4, [3], torch.Generator().manual_seed(0))
    assert not (wrong == labels).any()
    assert not (wrong == 3).any()
    counts = torch.bincount(wrong[labels == 3], minlength=4)[:3] / 3000
    assert counts.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)


def test_nearest_label_of_a_linear_model():
    original = nn.Linear(2, 3, bias=False)
    # Class 0 is right; along -x lies class 1, which is nearer than class 2.
    original.weight.data = torch.tensor([[1.0, 0.0], [0.2, 0.0], [-5.0, 0.0]])
    x, true = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert boundary_shrink.nearest_label(original, x, true, 0.5).tolist() == [1]
    # A longer step crosses into class 2; the true class is never the answer, however short the step.
    assert boundary_shrink.nearest_label(original, x, true, 3.0).tolist() == [2]
    assert boundary_shrink.nearest_label(original, x, true, 0.0).tolist() == [1]


def test_delete_keeps_the_proportions_of_the_other_classes():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    target = delete.erased(logits, torch.tensor([0])).softmax(1)
    assert target[0].tolist() == pytest.approx([0, 0.6, 0.4], abs=1e-6)
    # A student that says exactly this has no loss; one that says what the original did has -ln(1/2).
    assert divergence(target.clamp_min(1e-30).log(), delete.erased(logits, torch.tensor([0]))).item() == pytest.approx(
        0, abs=1e-6
    )
    loss = divergence(logits, delete.erased(logits, torch.tensor([0])))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_svd_leaves_a_layer_alone_that_is_not_called(trained, task):
    trained.spare = nn.Identity()
    trained.spare.head = nn.Linear(4, 2)
    before = state(trained)
    svd.svd(trained, task)
    assert "spare.head.weight" in same(trained, before)
    assert "5.weight" not in same(trained, before)


def test_trew_tilts_the_output_towards_similar_classes():
    logits, scores = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 0.75, 0.25]])
    # 0.3 * 2^1.5 to 0.2 * 2^0.5 is three to one.
    target = trew.tilted(logits, scores, 2 * math.log(2))
    assert target[0].tolist() == pytest.approx([0, 0.75, 0.25], abs=1e-6)
    # Without a tilt the others keep their proportions.
    assert trew.tilted(logits, scores, 0.0)[0].tolist() == pytest.approx([0, 0.6, 0.4], abs=1e-6)


def test_trew_similarity_is_of_centred_rows_without_forgotten_classes():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    # Of class 0 the cosines are 0, -1 and 0: at this temperature 1 to 1/2 to 1. A common offset changes nothing.
    found = trew.similarity(rows * 3 + 5, [0], 1 / math.log(2))
    assert found[0].tolist() == pytest.approx([0, 0.4, 0.2, 0.4], abs=1e-6)
    assert trew.similarity(rows, [0, 1], 1 / math.log(2))[0].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3], abs=1e-6)


def test_svd_scales_directions_by_their_share_of_the_variance():
    # Shares 3/4 and 1/4 at alpha = 3: 2.25 / 2.5 and 0.75 / 1.5.
    matrix = svd.important(torch.diag(torch.tensor([3.0, 1.0])), 3.0)
    assert matrix.flatten().tolist() == pytest.approx([0.9, 0, 0, 0.5], abs=1e-6)


def test_svd_removes_what_is_forgotten_and_not_retained():
    shared, own = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])
    retained = svd.important(shared.outer(shared), 1e6)
    forgotten = svd.important(shared.outer(shared) + own.outer(own), 1e6)
    matrix = svd.projection(retained, forgotten)
    assert (matrix.T @ shared).tolist() == pytest.approx(shared.tolist(), abs=1e-4)
    assert (matrix.T @ own).tolist() == pytest.approx([0, 0, 0], abs=1e-4)


def test_svd_sees_the_patches_that_a_layer_multiplies(task):
    layer, x = nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False), torch.rand(4, 2, 6, 6)
    said = svd.patches(layer, x, torch.Generator()) @ layer.weight.flatten(1).T
    assert torch.allclose(said, layer(x).permute(0, 2, 3, 1).reshape(-1, 5), atol=1e-6)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = svd.second_moments(model, dataclasses.replace(task, batch=7), task.forget, "x")
    a = next(task.split.batches([task.forget])).flatten(1)
    assert torch.allclose(found["1"], a.T @ a, rtol=1e-5)


def test_amun_stops_just_across_the_nearest_boundary():
    def model(x):  # class 0 where the pixel is above 0.6, else class 1
        return torch.cat([10 * x.flatten(1), torch.tensor([[6.0, 5.9]]).expand(len(x), 2)], 1)

    x, labels = torch.tensor([0.9, 0.65, 0.1]).view(3, 1, 1, 1), torch.tensor([0, 0, 1])
    banned = functional.one_hot(labels, 3).bool()
    moved, wrong = amun.nearest_adversarial(model, x, banned, labels, 10)
    assert wrong.tolist() == [1, 1, 0]
    # The radii are 0.04, 0.08, ...; the last step, a tenth of the radius, may lead across the boundary.
    for pixel, low, high in zip(moved.flatten(), (0.6 - 0.032, 0.6 - 0.008, 0.6), (0.6, 0.6, 0.6 + 0.064), strict=True):
        assert low - 1e-5 <= pixel <= high + 1e-5
    # Where there is none, the likeliest of the other classes is the label.
    banned[:] = torch.tensor([True, True, False])
    assert amun.nearest_adversarial(model, x, banned, labels, 2)[1].tolist() == [2, 2, 2]


def test_amun_finds_wrong_labels_that_the_model_gives(trained, task):
    before = state(trained)
    moved, wrong = amun.adversarial_set(trained, task, 10)
    assert (wrong != 0).all()
    assert torch.equal(trained(moved).argmax(1), wrong)
    assert same(trained, before) == list(before)
    near = (moved - next(task.split.batches([task.forget]))).flatten(1).norm(dim=1)
    assert (near > 0).all()


def test_lotus_aims_at_unseen_images_and_at_nothing_of_whole_classes(trained, task):
    assert lotus.target_accuracy(trained, task) == 0
    held_out = task.accuracy(trained)
    assert lotus.target_accuracy(trained, dataclasses.replace(task, forgotten=[])) == held_out
    # Half of D_f is of a forgotten class: half of what a model keeps of the rest.
    half = torch.cat([task.forget[:8], task.retain[:8]])
    assert lotus.target_accuracy(trained, dataclasses.replace(task, forget=half)) == held_out / 2
    nothing = task.validation.view(torch.empty(0, dtype=torch.int64))
    with pytest.raises(MeguError, match="no held-out images"):
        lotus.target_accuracy(trained, dataclasses.replace(task, forgotten=[], validation=nothing))


def test_lotus_ends_when_the_accuracy_is_below_its_target(trained, task, monkeypatch):
    before = state(trained)
    monkeypatch.setattr(lotus, "target_accuracy", lambda model, task: 1.1)
    lotus.lotus(trained, task, lr=0.1)
    assert same(trained, before) == list(before)
    assert not trained.training


def test_sfron_weighs_what_is_known_best_most_and_clips_the_masked_gradient():
    losses = torch.tensor([0.25, 4.0], requires_grad=True)
    # Weights 1 / sqrt(loss): 2 and 1/2, so (0.5 + 2) / 2.5.
    value = sfron.focused(losses, 0.5)
    assert value.item() == pytest.approx(1, abs=1e-6)
    assert torch.autograd.grad(value, losses)[0].tolist() == pytest.approx([0.8, 0.2], abs=1e-6)
    layer, masks = nn.Linear(3, 1, bias=False), {"weight": torch.tensor([[True, True, False]])}
    found = sfron.clipped_gradient(layer, layer(torch.tensor([[3.0, 4.0, 9.0]])).sum(), masks, 1.0)
    assert found["weight"][0].tolist() == pytest.approx([0.6, 0.8, 0], abs=1e-5)
    sfron.with_gradient(layer, found).backward()
    assert torch.equal(layer.weight.grad, found["weight"])


def test_sfron_raises_the_loss_on_what_is_forgotten(trained, task):
    lost = functional.cross_entropy(trained(next(task.split.batches([task.forget]))), task.labels)
    sfron.sfron(trained, task, epochs=2, alpha=1e5)
    after = functional.cross_entropy(trained(next(task.split.batches([task.forget]))), task.labels)
    assert after > lost + 0.1


def test_msg_draws_the_small_gradient_weights_anew_and_slows_the_others(trained, task):
    assert msg.smallest(torch.tensor([[3.0, 1.0], [2.0, 0.5]]), 0.5).tolist() == [[False, True], [False, True]]
    before = state(trained)
    msg.msg(trained, dataclasses.replace(task, samples=12), epochs=1, lr=0.0, share=0.3)
    changed = (trained[0].weight != before["0.weight"]).double().mean().item()
    assert changed == pytest.approx(round(0.3 * 54) / 54)
    assert torch.equal(trained[5].weight, before["5.weight"])


def test_masked_gradients_scale_what_reaches_the_optimizer():
    layer = nn.Linear(2, 1, bias=False)
    with masked_gradients(layer, {"weight": torch.tensor([[0.1, 0.0]])}):
        layer(torch.tensor([[3.0, 5.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [pytest.approx([0.3, 0.0])]
    layer.zero_grad()
    layer(torch.tensor([[3.0, 5.0]])).sum().backward()
    assert layer.weight.grad.tolist() == [[3.0, 5.0]]


def test_ct_transposes_every_square_kernel():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, (1, 3)), nn.Linear(3, 2))
    before = state(model)
    ct.transpose_kernels(model)
    assert torch.equal(model[0].weight, before["0.weight"].transpose(2, 3))
    assert same(model, before) == [key for key in before if key != "0.weight"]


def test_the_mask_hides_a_class_and_touches_nothing_else():
    logits = torch.randn(20, 4)
    before = logits.clone()
    masked = mask.mask(logits, [2])
    assert torch.equal(logits, before)
    assert (masked.softmax(1)[:, 2] == 0).all()
    assert torch.equal(mask.mask(logits, []), logits)


def test_mask_in_the_weights_is_the_mask_on_logits(trained, task):
    x = next(task.split.batches([task.retain]))
    expected = mask.mask(trained(x), [0]).softmax(1)
    mask.mask_classes(trained, task)
    assert torch.allclose(trained(x).softmax(1), expected, atol=1e-6)
    with pytest.raises(MeguError, match="no bias"):
        mask.mask_classes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)), task)


def test_a_new_head_leaves_the_features_and_learns_the_retained_classes(trained, task):
    before = state(trained)
    new_head.new_head(trained, task, epochs=20, lr=0.5)
    assert same(trained, before) == [key for key in before if not key.startswith("5.")]
    assert accuracy(trained, task.split, task.retain) == 1
    assert accuracy(trained, task.split, task.forget) == 0
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_a_bias_shift_is_the_least_that_hides_the_class(trained, task):
    x, kept = (next(task.split.batches([index])) for index in (task.forget, task.retain))
    margin = trained(x)[:, 0] - trained(x)[:, 1:].max(1).values
    before, retained = state(trained), trained(kept)[:, 1:]
    bias_shift.bias_shift(trained, task)
    assert same(trained, before) == [key for key in before if key != "5.bias"]
    assert torch.equal(trained(kept)[:, 1:], retained)
    assert accuracy(trained, task.split, task.forget) == 0
    assert (before["5.bias"] - trained[5].bias)[0].item() == pytest.approx(margin.max().item(), abs=0.002)


def test_a_bias_shift_leaves_a_share_of_the_images_their_class(trained, task):
    bias_shift.bias_shift(trained, task, share=0.5)
    assert accuracy(trained, task.split, task.forget) == 0.5
    # Each of several classes keeps the share of its own images.
    both = dataclasses.replace(task, forgotten=[0, 1], forget=torch.where(task.split.labels < 2)[0])
    bias_shift.bias_shift(trained, both, share=0.25)
    logits = trained(next(both.split.batches([both.forget])))
    above = logits[range(len(both.labels)), both.labels] > logits[:, 2:].max(1).values
    assert [above[both.labels == c].float().mean().item() for c in (0, 1)] == [0.25, 0.25]
    with pytest.raises(MeguError, match="no bias"):
        bias_shift.bias_shift(nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)), task)


def test_the_classes_of_an_earlier_request_do_not_make_a_request_one_of_classes(trained, task):
    assert task.of_classes
    assert not dataclasses.replace(task, forgotten=[]).of_classes
    later = dataclasses.replace(task, forget=task.retain[:8])
    assert not later.of_classes
    before = state(trained)
    bias_shift.bias_shift(trained, later)
    assert same(trained, before) == list(before)


# -- what all share ----------------------------------------------------------------------------------------------------


def test_divergence_is_summed_over_classes():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert divergence(q.log(), p.log()).item() == pytest.approx(expected, abs=1e-6)


def test_teachers_are_frozen_copies_in_eval_mode(trained):
    copied = teacher(trained.train())
    assert not any(module.training for module in copied.modules())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert copied is not trained
    hold_statistics(trained)
    assert not trained[1].training
    assert trained[0].training


def test_together_is_one_pass(trained):
    a, b = torch.rand(3, 1, 4, 4), torch.rand(2, 1, 4, 4)
    parts = together(trained, a, b)
    assert torch.allclose(torch.cat(parts), trained(torch.cat([a, b])))
    assert [len(part) for part in parts] == [3, 2]


def test_batches_hold_what_they_say(task):
    for x, y, gone, slots in task.pairs("test", 0):
        assert len(x) == len(y) == 12
        assert (y != 0).all()
        expected = next(task.split.batches([task.forget[slots]]))
        assert torch.equal(gone, expected)
    assert len(list(task.pairs("test", 0))) == task.steps == 6


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_method_runs_is_repeatable_and_ends_in_eval_mode(name, trained, task):
    method = baselines.methods()[name]
    twin = copy.deepcopy(trained)
    keys, before = list(trained.state_dict()), state(trained)
    for model in (trained, twin):
        method.load()(model, task, **method.settings({}))
    assert list(trained.state_dict()) == keys
    assert not any(module.training for module in trained.modules())
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert same(trained, before) != keys
    assert same(trained, state(twin)) == keys


@pytest.mark.parametrize(
    "name", ["amnesiac", "bad_teacher", "delete", "boundary_shrink", "trew", "svd", "amun", "mask"]
)
def test_methods_made_to_forget_do_forget(name, trained, task):
    method = baselines.methods()[name]
    assert accuracy(trained, task.split, task.forget) == 1
    settings = {"epochs": 5, "lr": 0.1} if name == "bad_teacher" else {}
    if "lr" in method.settings({}) and not settings:
        settings = {"lr": 0.05, "epochs": 10}
    method.load()(trained, task, **settings)
    assert accuracy(trained, task.split, task.forget) < 0.5
    assert accuracy(trained, task.split, task.retain) > 0.5


def test_original_does_nothing(trained, task):
    before = state(trained)
    baselines.methods()["original"].load()(trained, task)
    assert same(trained, before) == list(before)


def test_retrain_keeps_nothing_of_the_model_it_is_given(trained, task):
    other = copy.deepcopy(trained)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    retrain = baselines.methods()["retrain"].load()
    for model in (trained, other):
        retrain(model, task, RECIPE)
    assert same(trained, state(other)) == list(trained.state_dict())


# -- the registry ------------------------------------------------------------------------------------------------------


def test_settings_are_the_functions_own_and_unknown_ones_are_refused():
    method = baselines.methods()["ssd"]
    assert method.settings({"alpha": 3})["alpha"] == 3
    with pytest.raises(ConfigError, match="no setting beta"):
        method.settings({"beta": 1})
    with pytest.raises(ConfigError, match="needs a value for epochs"):
        baselines.Method("x", lambda: lambda model, task, *, epochs: None).settings({})


def test_grids_are_equally_small_and_name_real_settings():
    from megu_cli.compare.methods import OURS
    from megu_cli.compare.tuning import grid

    sizes = set()
    for method in baselines.methods().values():
        for point in method.grid:
            method.settings(point)
        if method.grid:
            sizes.add(len(method.grid))
    sizes |= {len(grid(name, kind)) for name in OURS for kind in ("classes", "subclasses", "random")}
    assert sizes == {baselines.GRID_SIZE}


class _Point:
    def __init__(self, name: str, function: object) -> None:
        self.name, self.value, self.function = name, "own:method", function

    def load(self) -> object:
        if isinstance(self.function, Exception):
            raise self.function
        return self.function


def _halve(model, task, *, factor=0.5):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def test_a_users_method_takes_part(monkeypatch):
    monkeypatch.setattr(baselines, "entry_points", lambda group: [_Point("halve", _halve)])
    method = baselines.methods()["halve"]
    assert method.settings({}) == {"factor": 0.5}
    assert method.load() is _halve
    assert len(method.version) == 64


def test_a_users_method_that_breaks_or_takes_a_name(monkeypatch):
    monkeypatch.setattr(baselines, "entry_points", lambda group: [_Point("broken", ImportError("no torch2"))])
    with pytest.raises(ConfigError, match="broken cannot be loaded from own:method: no torch2"):
        baselines.methods()["broken"].load()
    monkeypatch.setattr(baselines, "entry_points", lambda group: [_Point("ssd", _halve)])
    with pytest.raises(ConfigError, match="taken"):
        baselines.methods()
