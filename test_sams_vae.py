"""What the project claims, proved: the mathematics first, then files, training and evaluation.

    pip install pytest && python -m pytest

Every test is a sentence. None needs a network, a GPU or a file from elsewhere. Tests against
anndata and scikit-learn run where these are installed, those against a GPU where there is one.
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import train
from sams_vae import (CPAVAE, EFFECTS, MASKS, MLP, NONE, SAMSVAE, BetaBernoulliSAMSVAE,
                      ConditionalVAE, SVAEPlus, average_treatment_effects, begin_masks,
                      common_axes, continue_from, elbo, expected_expression, iwelbo, kl_bernoulli,
                      kl_normal, learn_others_only, mask_log_odds, mean_log_of_poisson,
                      nb_log_likelihood, perturbation_dims, sample_counts, sample_frequencies,
                      sparsest_axes, straight_through_bernoulli, sum_effects)

torch.set_num_threads(1)  # small tensors: threads would cost more than they bring
HERE = os.path.dirname(os.path.abspath(__file__))
GUIDES = list(itertools.product([False, True], repeat=2))  # correlated_basal, correlated_effects
MODELS = [(kind, *guide) for kind in (SAMSVAE, CPAVAE) for guide in GUIDES] + [
    (BetaBernoulliSAMSVAE, True, True), (SVAEPlus, False, False), (ConditionalVAE, False, False)]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def no_gpu_unless_asked_for(monkeypatch):
    """Where there is a GPU, too, a test runs on the CPU unless it names a device."""
    choose = train.choose_device
    monkeypatch.setattr(train, "choose_device", lambda name=None: choose(name or "cpu"))


def small_model(kind=SAMSVAE, n_cells=(5, 3, 2), n_genes=6, n_latent=3, basal=True, effects=True,
                alpha=0.2, beta=1.0, mask_a=1.0, mask_b=2.0, seed=0, turned=False,
                n_covariates=0):
    """A model with random parameters everywhere, so that no term is at its optimum by accident, and
    with random axes if turned."""
    torch.manual_seed(seed)
    model = kind(torch.tensor(n_cells), torch.zeros(n_genes), torch.ones(n_genes), n_latent,
                 n_hidden=8, effect_hidden=8, correlated_basal=basal, correlated_effects=effects,
                 alpha=alpha, beta=beta, mask_a=mask_a, mask_b=mask_b, n_covariates=n_covariates)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if turned:
            model.axes.copy_(torch.linalg.qr(torch.randn(n_latent, n_latent))[0])
    return model


def small_batch(n=10, n_genes=6, seed=1):
    """Counts, dosages in which 5, 3 and 2 cells hold perturbations 0, 1 and 2, no covariates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.poisson(torch.full((n, n_genes), 4.0), generator)
    d = torch.tensor([[0, 1], [0, NONE], [0, 2], [0, NONE], [0, NONE], [1, 2], [NONE, 1],
                      [NONE, NONE], [NONE, NONE], [NONE, NONE]])
    return x, d[:n], no_covariates(n)


def no_covariates(n):
    """c of n cells."""
    return torch.zeros(n, 0, dtype=torch.int64)


def multi_hot(d, n):
    """Dosages (..., P) of n perturbations as ones and zeros, (..., n)."""
    return (d.unsqueeze(-1) == torch.arange(n)).any(-2).float()


def assert_close_to_mean(samples, expected, sigmas=4.5):
    """The mean of independent samples (n, ...) lies within so many standard errors."""
    samples = torch.as_tensor(samples, dtype=torch.float64)
    error = samples.std(0) / math.sqrt(len(samples)) + 1e-9
    assert ((samples.mean(0) - torch.as_tensor(expected)).abs() <= sigmas * error).all(), (
        samples.mean(0), expected, error)


# ============================================================================================
# The likelihood (2.2)
# ============================================================================================


@pytest.mark.parametrize("shape, particles", [((), ()), ((4,), (6, 2))])  # of log_theta; of rho
@pytest.mark.parametrize("theta", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize("n_counts", [1, 1000, 1_000_000])
def test_nb_log_likelihood_has_the_value_and_gradients_of_torch_distributions(
        n_counts, theta, shape, particles):
    torch.manual_seed(0)
    p = torch.tensor([1e-5, 0.1, 0.3, 0.6], dtype=torch.float64)
    x = torch.distributions.Multinomial(n_counts, p).sample((3,))
    noise = torch.randn(*particles, 3, 4, dtype=torch.float64)
    log_rho = (p.log() + noise).requires_grad_()
    log_theta = (math.log(theta) + 0.1 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    library = x.sum(-1, keepdim=True).log()
    ours = nb_log_likelihood(x.long(), log_rho, log_theta, library)
    trusted = torch.distributions.NegativeBinomial(
        log_theta.exp(), logits=log_rho + library - log_theta).log_prob(x).sum(-1)
    digits = 1e-9 if theta < 1e5 else 1e-7
    torch.testing.assert_close(ours, trusted, rtol=digits, atol=10 * digits)
    weights = torch.randn_like(ours)  # every cell has its own gradient
    torch.testing.assert_close(*(torch.autograd.grad((weights * value).sum(), (log_rho, log_theta))
                                 for value in (ours, trusted)), rtol=1e-5, atol=1e-3)


def test_nb_probabilities_sum_to_one_and_have_the_stated_mean_and_variance():
    x = torch.arange(4000.0, dtype=torch.float64)[:, None]
    for mean, theta in ((0.3, 0.5), (5.0, 2.0), (40.0, 10.0)):
        log_mean, log_theta = torch.tensor([[mean], [theta]], dtype=torch.float64).log()
        p = nb_log_likelihood(x, log_mean, log_theta).exp()
        assert abs(p.sum() - 1) < 1e-9
        assert abs((p * x[:, 0]).sum() - mean) < 1e-8
        assert abs((p * (x[:, 0] - mean) ** 2).sum() - (mean + mean**2 / theta)) < 1e-6


@pytest.mark.parametrize("n_cells, n_genes, n_counts, log_thetas, within, in_training", [
    (8, 2000, 10_000, (-2, 8, 20), 0.005, 0.1), (8, 2000, 1_000_000, (-2, 8, 20), 0.2, 3),
    (200, 10, 100_000, (math.log(1e-6), -7, math.log(0.1)), 1e-4, 0.05)])
def test_nb_in_single_precision_is_exact_for_deep_cells_and_every_theta(
        n_cells, n_genes, n_counts, log_thetas, within, in_training):
    torch.manual_seed(0)
    logits = 1.5 * torch.randn(n_cells, n_genes)
    x = torch.poisson(n_counts * logits.softmax(-1))
    log_rho = (logits + 0.05 * torch.randn(3, n_cells, n_genes)).log_softmax(-1)
    library = x.sum(-1, keepdim=True).log()
    for log_theta in log_thetas:
        found = []
        for kind in (torch.float32, torch.float64):
            rho = log_rho.to(kind, copy=True).requires_grad_()
            theta = torch.full((n_genes,), log_theta, dtype=kind).requires_grad_()
            value = nb_log_likelihood(x, rho, theta, library.to(kind))
            found.append([value, *torch.autograd.grad(value.sum(), (rho, theta))])
        (single, *gradients), (exact, *exact_gradients) = found
        with torch.no_grad():  # as in evaluation
            in_evaluation = nb_log_likelihood(x, log_rho, torch.tensor(float(log_theta)), library)
        assert (in_evaluation - exact).abs().max() < within
        assert (single - exact).abs().max() < in_training  # sums are in single precision there
        for ours, trusted in zip(gradients, exact_gradients):
            torch.testing.assert_close(ours.double(), trusted, rtol=1e-3, atol=3e-6 * n_counts)


def test_nb_is_finite_with_finite_gradients_for_every_theta():
    log_theta = torch.tensor([-120.0, -20, 0, 20, 40, 120], requires_grad=True)
    log_mean = torch.linspace(-30, 8, 6).requires_grad_()
    value = nb_log_likelihood(torch.tensor([[0.0, 1, 2, 3, 10, 2000]]), log_mean, log_theta)
    gradients = torch.autograd.grad(value.sum(), [log_mean, log_theta])
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)


# ============================================================================================
# The pieces of the guide (2.3)
# ============================================================================================


def test_mask_samples_are_exactly_0_or_1_with_mean_sigmoid_of_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([-7.0, -2.0, 0.0, 0.5, 4.0])
    samples = straight_through_bernoulli(logits.expand(200_000, 5))
    assert ((samples == 0) | (samples == 1)).all()
    assert_close_to_mean(samples, torch.sigmoid(logits))


def test_mask_gradient_is_that_of_the_relaxed_sample():
    logits = torch.linspace(-3, 3, 7, requires_grad=True)
    torch.manual_seed(3)
    (gradient,) = torch.autograd.grad(straight_through_bernoulli(logits, 0.7).sum(), logits)
    torch.manual_seed(3)
    u = torch.rand_like(logits)
    relaxed = torch.sigmoid((logits + u.log() - (-u).log1p()) / 0.7)
    (expected,) = torch.autograd.grad(relaxed.sum(), logits)
    torch.testing.assert_close(gradient, expected)
    assert (gradient > 0).all()


def test_kl_terms_equal_torch_distributions():
    logits, alpha = torch.tensor([-30.0, -3.0, 0.0, 2.0, 30.0]), 0.03
    q, p = (torch.distributions.Bernoulli(logits=logits.double()),
            torch.distributions.Bernoulli(torch.tensor(alpha).double()))
    torch.testing.assert_close(kl_bernoulli(logits, alpha).double(),
                               torch.distributions.kl_divergence(q, p), rtol=1e-4, atol=1e-6)
    loc, var, beta = torch.tensor([0.0, 1.5, -2.0]), torch.tensor([1.0, 0.3, 4.0]), 2.0
    q, p = torch.distributions.Normal(loc, var.sqrt()), torch.distributions.Normal(0, beta**0.5)
    torch.testing.assert_close(kl_normal(loc, var, beta), torch.distributions.kl_divergence(q, p))


@pytest.mark.parametrize("kind", [SAMSVAE, CPAVAE])
@pytest.mark.parametrize("effects", [False, True])
def test_kl_of_mask_and_effect_is_the_mean_of_their_log_ratio_under_the_joint_guide(kind, effects):
    model, t = small_model(kind, effects=effects, beta=1.7), torch.arange(3)
    with torch.no_grad():
        mask, effect, kl_mask, kl_effect = model.sample_globals(t, 20_000)
        log_q_over_p = -model.log_global_ratio(mask, effect)
    assert_close_to_mean(log_q_over_p, (kl_mask + kl_effect.mean(0)).double(), 6)


def of_concatenation(net, *inputs):
    """What a network (`MLP`) makes of the concatenation of its inputs."""
    h = F.leaky_relu(net.first(torch.cat(inputs, dim=-1)))
    for layer in net.residual:
        h = h + F.leaky_relu(layer(h))
    return net.last(h)


def test_a_network_of_parts_equals_the_network_of_their_concatenation():
    torch.manual_seed(0)
    net, x, z = MLP([4, 3, 5], 7, 3, 2), torch.randn(6, 4), torch.randn(2, 6, 3)
    d = torch.tensor([[0, NONE], [4, 0], [NONE, NONE], [2, 1], [1, NONE], [NONE, 3]])
    expected = of_concatenation(net, x.expand(2, 6, 4), z, multi_hot(d, 5).expand(2, 6, 5))
    torch.testing.assert_close(net(x, z, d), expected)
    torch.testing.assert_close(net(x, z, d[:, :0]), net(x, z, torch.full_like(d, NONE)))


# ============================================================================================
# SAMS-VAE and CPA-VAE (2.1, 2.4)
# ============================================================================================


def test_eq_1_adds_perturbations_turned_by_the_axes_and_nothing_for_the_control():
    torch.manual_seed(0)
    mask, effect = (torch.rand(4, 3, 50) > 0.5).float(), torch.randn(4, 3, 50)
    d = torch.tensor([[0, NONE], [2, 1], [0, 2], [NONE, NONE]])
    as_printed = torch.einsum("bt,ktl->kbl", multi_hot(d, 3), effect * mask)
    R = torch.linalg.qr(torch.randn(50, 50))[0]
    torch.testing.assert_close(sum_effects(mask, effect, d, R), as_printed @ R.T)
    with torch.autocast("cpu", torch.bfloat16):  # axes that are the identity change no bit
        assert torch.equal(sum_effects(mask, effect, d, torch.eye(50)), as_printed)
    assert torch.equal(SAMSVAE([1], [0.0], [1.0], 3).axes, torch.eye(3))


def test_a_sparse_matrix_in_random_axes_is_recovered_up_to_order_and_signs():
    torch.manual_seed(0)
    mask = torch.rand(200, 20) < 0.065
    sparse = mask * (3 + torch.randn(mask.shape)) * torch.randn(mask.shape).sign()
    turned = sparse @ torch.linalg.qr(torch.randn(20, 20))[0] + 0.1 * torch.randn(mask.shape)
    R = sparsest_axes(turned)
    torch.testing.assert_close(R @ R.T, torch.eye(20), atol=1e-5, rtol=0)
    found = turned @ R
    similarity = F.normalize(sparse, dim=0).T @ F.normalize(found, dim=0)  # (L, L)
    order = similarity.abs().argmax(1)
    assert sorted(order.tolist()) == list(range(20))
    signs = similarity.gather(1, order[:, None]).sign().T
    assert (found[:, order] * signs - sparse).abs().max() < 0.7


def test_with_masks_of_one_turned_effects_are_the_same_model_as_cpa_vae():
    model, cpa = small_model(effects=False, turned=True), small_model(CPAVAE, effects=False)
    model.masks_of_one = True
    cpa.load_state_dict(model.state_dict(), strict=False)
    turned, R = copy.deepcopy(model), torch.linalg.qr(torch.randn(3, 3))[0]
    turned.turn(R)
    covariance = torch.einsum("li,tl,lj->tij", R, model.effect_log_var.exp(), R)
    torch.testing.assert_close(turned.effect_log_var.exp(), covariance.diagonal(dim1=1, dim2=2))
    results = []
    with torch.no_grad():
        for m in (cpa, model, turned):
            m.effect_log_var.fill_(-40.0)  # the same in all directions: turns exactly
            torch.manual_seed(1)
            value, terms = elbo(m, *small_batch(), 50)
            ate = average_treatment_effects(m, torch.tensor([[0, 1], [2, NONE]]), 50)
            results.append([value, *terms.values(), *ate.values()])
    for of_cpa, of_model, of_turned in zip(*results, strict=True):
        assert torch.equal(of_cpa, of_model)
        torch.testing.assert_close(of_model, of_turned, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("misfit", [0.0, 0.5])
def test_the_mask_log_odds_are_the_posterior_of_a_gaussian_spike_and_slab(misfit):
    # y ~ N(m e, s^2), e ~ N(0, beta), m ~ Bern(alpha): everything in closed form. q(e), with m = 1,
    # has seen the part s2 of s^2 alone, and not that y is wrong by some of its largest entry.
    alpha, beta, s2 = 0.1, 2.0, 0.3
    y = torch.tensor([[0.0, 0.5, -1.0, 2.0], [0.1, -3.0, 0.0, 0.2]], dtype=torch.float64)
    loc, var = y * beta / (beta + s2), torch.full_like(y, beta * s2 / (beta + s2))
    s = (s2 + (misfit * loc.abs().amax(1, keepdim=True)).square()).sqrt()
    density, prior = torch.distributions.Normal, math.log(alpha / (1 - alpha))
    expected = prior + density(0, (beta + s**2).sqrt()).log_prob(y) - density(0, s).log_prob(y)
    largest = loc.abs().amax(1, keepdim=True)
    torch.testing.assert_close(mask_log_odds(loc, var, prior, beta, largest, misfit), expected)
    zero = torch.zeros(1, 1)
    without_cells = mask_log_odds(zero, torch.full((1, 1), beta), prior, beta, zero)
    assert without_cells.item() == pytest.approx(prior, abs=0.01)


@pytest.mark.parametrize("kind", [SAMSVAE, BetaBernoulliSAMSVAE, SVAEPlus])
def test_masks_begin_where_offsets_are_clear_and_perturbations_without_cells_say_nothing(kind):
    mask = torch.eye(4).repeat(10, 1)
    model = small_model(kind, n_cells=[50] * 39 + [0], n_latent=4, effects=False)
    model.masks_of_one = True
    with torch.no_grad():
        model.effect_loc.copy_(2 * mask @ torch.linalg.qr(torch.randn(4, 4))[0])
        model.effect_loc[-1] = 1e6  # not trained: whatever it is
        if kind is not SVAEPlus:
            model.effect_log_var.fill_(-4.0)
    _, _, before, after = begin_masks([model])
    assert before > 1.5 and after == pytest.approx(1, abs=0.05) and not model.masks_of_one
    found = model.mask_probability()[:-1].numpy(force=True) > 0.5
    assert evaluate.mask_recovery(mask[:-1].numpy() > 0, found)["f1"] == 1


def warm_starts(mask, noise, rotations, log_var=-4.0):
    """A model for each rotation: its offsets are 2 mask plus noise, (N, T, L), turned by it."""
    models = []
    for own_noise, rotation in zip(noise, rotations):
        models.append(small_model(n_cells=[50] * len(mask), n_latent=mask.shape[1], effects=False))
        models[-1].masks_of_one = True
        with torch.no_grad():
            models[-1].effect_loc.copy_((2 * mask + own_noise) @ rotation)
            models[-1].effect_log_var.fill_(log_var)
    return models


def test_warm_starts_are_brought_together_and_noise_in_other_directions_is_not_made_sparse():
    torch.manual_seed(0)
    # With 16 perturbations and latents, of which 4 are in use, noise could be made sparse as well.
    mask, variance = F.pad(torch.eye(4).repeat(4, 1), (0, 12)), math.exp(-3.0)
    noise = math.sqrt(variance) * torch.randn(3, 16, 16)
    offsets = (2 * mask + noise) @ torch.linalg.qr(torch.randn(3, 16, 16))[0]
    axes = common_axes(offsets, torch.full_like(offsets, variance))
    torch.testing.assert_close(axes @ axes.mT, torch.eye(16).expand(3, -1, -1), atol=1e-4, rtol=0)
    together = offsets @ axes
    turned = together.mean(0)
    assert (turned[:, 4:].abs().max() < 0.8) and turned[:, 4:].abs().mean() > 0.05
    assert torch.equal(turned[:, :4].abs() > 1, mask[:, :4][:, (
        turned[:4, :4].abs().argmax(0))] > 0)
    assert (together - turned).square().mean() < 1.1 * (noise - noise.mean(0)).square().mean()
    # No further rotation of one brings it nearer to the mean: these products are symmetric.
    products = together.mT @ turned
    torch.testing.assert_close(products, products.mT, atol=1e-3, rtol=0)


def test_a_direction_is_occupied_beyond_the_noise_that_it_has_itself():
    torch.manual_seed(0)
    mask = F.pad(torch.eye(4).repeat(4, 1), (12, 0))  # the last four latents, with little noise
    variance = torch.full((3, 16, 16), 0.1)
    variance[..., 12:] = 0.001
    axes = common_axes(mask + variance.sqrt() * torch.randn(3, 16, 16), variance)
    assert (axes[0][12:, :4].abs().amax(0) > 0.8).all()


def test_support_is_the_share_of_warm_starts_with_an_entry_and_the_nearest_to_the_mean_goes_on():
    torch.manual_seed(0)
    mask = torch.eye(4).repeat(10, 1)
    noise = torch.tensor([0.1, 0.01, 0.1, 0.1])[:, None, None] * torch.randn(4, 40, 4)
    noise[:3, 0, 1] += 2  # an entry that the last warm start alone does not have,
    noise[3, 1, 2] += 2  # and one that it alone has
    models = warm_starts(mask, noise, torch.linalg.qr(torch.randn(4, 4, 4))[0])
    nearest, support, before, after = begin_masks(models)
    column = [support[t].argmax() for t in (2, 3)]  # where latents 2 and 3 have come
    other = support[0].argmax(), support[1].argmax()
    assert nearest == 1 and before > 1.5 > after
    assert [support[0, other[1]], support[1, column[0]]] == [0.75, 0.25]
    assert sorted(support[4:].flatten().tolist()) == [0] * 108 + [1] * 36
    for model in models[1:]:  # masks begin alike, the mean of four
        assert torch.equal(model.mask_logits, models[0].mask_logits)
    assert -4 < models[0].mask_logits[1, column[0]] < 0 < models[0].mask_logits[0, other[1]] < 4


def test_what_is_common_to_all_values_begins_as_the_effect_of_the_perturbation_itself():
    # The sums of six perturbations for each of three values, and where masks should be: rows of the
    # perturbation itself, then of its values.
    cases = [([[3, 0, 0, 0]] * 3, [1, 0, 0, 0]),                            # a common effect
             ([[0, 3, 0, 0]] + [[0, 0, 0, 0]] * 2, [0, 1, 0, 0]),           # of one value alone
             ([[0, 0, 3, 0]] * 2 + [[0, 0, 3, 2]], [1, 0, 0, 1]),           # both
             ([[0, 0, 0, 3]] * 2 + [[0.5, 0, 0, 3]], [1, 0, 0, 0]),         # too small beside 3
             ([[3, 0, 0, 0], [2.5, 0, 0, 0], [0, 0, 0, 0]], [0, 1, 1, 0]),  # two of three alike,
             ([[-3, 0, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 0]], [0, 1, 1, 0])]  # whatever their sign
    torch.manual_seed(0)
    sums = torch.tensor([case for case, _ in cases])  # (6, V, L)
    own = sums.sum(1, keepdim=True) / 4  # as N(0, 1) would have it
    offsets = torch.cat([torch.cat([own, sums - own], 1).flatten(0, 1),
                         3 * torch.eye(4).repeat(8, 1)])
    rotation = torch.linalg.qr(torch.randn(1, 4, 4))[0]
    model, = warm_starts(offsets / 2, torch.zeros(1, *offsets.shape), rotation)
    begin_masks([model], {4 * t: dict(zip("abc", range(4 * t + 1, 4 * t + 4))) for t in range(6)})
    found = (model.mask_probability() > 0.5)[:24].sum(1).unflatten(0, (6, 4))
    assert found.tolist() == [expected for _, expected in cases]
    size = model.effect_loc.abs().amax(1)[[0, 5, 8, 11, 12, 17, 18]]
    assert size.tolist() == pytest.approx([3, 3, 3, 2, 3, 3, 2.5], abs=0.1)
    torch.testing.assert_close(model.effect_loc[16:20], -model.effect_loc[20:24])


@pytest.mark.parametrize("basal, effects", GUIDES)
def test_the_guide_has_the_two_correlations_its_switches_say(basal, effects):
    model, (x, d, c) = small_model(basal=basal, effects=effects), small_batch()
    z_pert, mask = torch.randn(2, 10, 3), torch.ones(2, 3, 3)
    of_basal = [model.encode(x, z, d, c)[0] for z in (z_pert, z_pert + 1)]
    of_effects = [model.effect_posterior(m, torch.arange(3))[0] for m in (mask, 0 * mask)]
    assert [torch.equal(*of_basal), torch.equal(*of_effects)] == [not basal, not effects]


def test_the_likelihood_of_the_model_has_mean_library_times_softmax_of_the_decoder():
    model, (x, d, c) = small_model(), small_batch()
    z = torch.randn(2, 10, 3)
    mean = x.sum(-1, keepdim=True) * torch.softmax(model.decoder(z), dim=-1)
    trusted = torch.distributions.NegativeBinomial(
        model.log_theta.exp(), logits=mean.log() - model.log_theta)
    torch.testing.assert_close(model.log_likelihood(x, z, d, c), trusted.log_prob(x).sum(-1))


def test_the_encoder_sees_log1p_counts_standardised_by_the_training_cells():
    mean, std = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.7]), torch.tensor([0.1, 1.0, 3.0, 0.0, 1e-9])
    torch.manual_seed(0)
    model = SAMSVAE(torch.ones(2), mean, std, 4, 8, correlated_basal=False)
    x = torch.tensor([[0.0, 3, 20, 3, 1]])
    std[3:] = 1  # a gene that is constant in training does not divide by zero
    loc, log_var = model.encoder(((1 + x).log() - mean) / std).chunk(2, -1)
    torch.testing.assert_close(model.encode(x, None, None, no_covariates(1)),
                               (loc, log_var.exp() + 1e-4))


@pytest.mark.parametrize("kind", [SAMSVAE, CPAVAE])
@pytest.mark.parametrize("basal, effects", GUIDES)
def test_the_posterior_of_an_unseen_perturbation_is_its_prior(kind, basal, effects):
    model = small_model(kind, n_cells=(5, 0, 2), basal=basal, effects=effects, beta=2.0)
    mask, effect, kl_mask, kl_effect = model.sample_globals(torch.tensor([1]), 50_000)
    assert kl_mask.abs().max() < 1e-6 and kl_effect.abs().max() < 1e-6
    assert_close_to_mean(effect[:, 0].detach() ** 2, torch.full((3,), 2.0))
    if kind is SAMSVAE:
        assert_close_to_mean(mask[:, 0].detach(), torch.full((3,), model.alpha))
        torch.testing.assert_close(model.mask_probability()[1], torch.full((3,), model.alpha))


# ============================================================================================
# The other models (2.1, 4)
# ============================================================================================


def test_beta_bernoulli_kl_equals_monte_carlo_and_the_mask_has_the_mean_of_its_beta():
    model, n = small_model(BetaBernoulliSAMSVAE, mask_a=0.7, mask_b=3.0), 20_000
    beta, bernoulli = torch.distributions.Beta, torch.distributions.Bernoulli
    with torch.no_grad():
        mask, kl = model.sample_mask(torch.arange(3), n)
        q = beta(model.mask_log_a.exp(), model.mask_log_b.exp())
        p = q.sample((n,))
        m = bernoulli(p).sample()  # the joint KL of (p, m): the term of m cancels
        log_q = q.log_prob(p) + bernoulli(p).log_prob(m)
        log_p = beta(0.7, 3.0).log_prob(p) + bernoulli(p).log_prob(m)
    assert ((mask == 0) | (mask == 1)).all()
    assert_close_to_mean((log_q - log_p).sum(-1), kl.double())
    assert_close_to_mean(mask, q.mean.detach())
    torch.testing.assert_close(model.mask_probability(), q.mean)


def test_svae_plus_is_z_around_mask_times_mu_and_a_guide_of_z_that_does_not_see_the_label():
    model, (x, d, c) = small_model(SVAEPlus, n_cells=(5, 0, 2), mask_b=2.7), small_batch()
    mask, effect, kl_mask, kl_effect = model.sample_globals(torch.arange(3), 5)
    minus_log_beta = -torch.distributions.Beta(1.0, 2.7).log_prob(model.mask_probability())
    torch.testing.assert_close(kl_mask, minus_log_beta.sum(-1))
    assert (kl_effect == 0).all()
    assert (mask[:, 1] == 0).all() and (effect[:, 1] == 0).all()  # a label without training cells
    z_pert = sum_effects(mask, effect, d[:, :1], model.axes)
    torch.testing.assert_close(z_pert[:, 0], mask[:, 0] * model.effect_loc[0])
    loc, var = model.encode(x, z_pert, d[:, :1], c)
    of_z = model.encode(x, torch.zeros_like(z_pert), None, c)[0]  # mean of q(z | x)
    normal = torch.distributions.Normal  # KL(q(z | x) || p(z | m, mu)) is the one of z_basal
    trusted = torch.distributions.kl_divergence(normal(of_z, var.sqrt()), normal(z_pert, 1.0))
    torch.testing.assert_close(kl_normal(loc, var), trusted)


@pytest.mark.parametrize("kind", [SAMSVAE, SVAEPlus, ConditionalVAE])
def test_covariates_shift_the_first_bias_of_encoder_and_decoder_and_nothing_else(kind):
    (x, d, without), c = small_batch(), torch.tensor([[0, 2]]).expand(10, 2)
    model = small_model(kind, n_covariates=4)
    shifted, results = copy.deepcopy(model), []
    with torch.no_grad():
        for network in (shifted.encoder, shifted.decoder):  # covariates are their second part
            of_covariates = network.first.weight.split(network.part_sizes, 1)[1]
            network.first.bias += of_covariates[:, 0] + of_covariates[:, 2]
    for m, covariates in ((model, c), (shifted, without)):
        torch.manual_seed(0)
        predictive, joint, _ = iwelbo(m, [(x, d, covariates)], 20)
        results.append([elbo(m, x, d, covariates)[0], predictive, torch.tensor(joint)])
    torch.testing.assert_close(*results)


def test_the_dosages_of_the_conditional_vae_enter_both_networks():
    model, (x, d, c) = small_model(ConditionalVAE, n_cells=(5, 0, 2)), small_batch()
    dosages = multi_hot(d, 3) * torch.tensor([1, 0, 1])  # 1 has no training cells: left out
    z = torch.randn(4, 10, 3)
    rho = torch.softmax(of_concatenation(model.decoder, z, dosages.expand(4, 10, 3)), dim=-1)
    torch.testing.assert_close(model.log_rho(z, d, c).exp(), rho)
    loc, _ = of_concatenation(model.encoder, torch.log1p(x), dosages).chunk(2, -1)
    torch.testing.assert_close(model.encode(x, None, d, c)[0], loc)
    mask, effect, kl_mask, kl_effect = model.sample_globals(torch.arange(3), 2)
    z_pert = sum_effects(mask, effect, d, model.axes)
    assert all((v == 0).all() for v in (z_pert, kl_mask, kl_effect))


def test_gradients_of_the_elbo_equal_differences_in_double_precision():
    model, (x, d, c) = small_model().double(), small_batch()
    model.masks_of_one = True  # the gradient of masks is the straight-through one, no derivative
    parameters = [p for name, p in model.named_parameters() if name not in MASKS]
    direction = [torch.randn_like(p) for p in parameters]

    def value_after(step):
        """The ELBO a step further in this direction, always with the same random numbers."""
        torch.manual_seed(4)
        with torch.no_grad():
            for p, v in zip(parameters, direction):
                p.add_(v, alpha=step)
        return elbo(model, x.double(), d, c, 3)[0]

    gradient = torch.autograd.grad(value_after(0.0), parameters)
    along = sum((g * v).sum() for g, v in zip(gradient, direction)).item()
    ahead, behind = value_after(1e-5), value_after(-2e-5)
    assert (ahead - behind).item() / 2e-5 == pytest.approx(along, rel=1e-4)


@pytest.mark.parametrize("kind, basal, effects", MODELS)
def test_every_parameter_of_every_model_has_a_finite_gradient(kind, basal, effects):
    model = small_model(kind, n_cells=(5, 0, 2), basal=basal, effects=effects)
    value, terms = elbo(model, *small_batch(), 50)  # with cells of one without training cells
    value.backward()
    assert value.isfinite() and all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in model.parameters())


# ============================================================================================
# The objective (eq. 3, A.1)
# ============================================================================================


@pytest.mark.parametrize("n_absent", [1, 40])  # 40: more perturbations than places in a batch
def test_each_perturbation_pays_its_kl_exactly_once_per_epoch(n_absent):
    batch = small_batch()
    model = small_model(n_cells=(5, 3, 2) + (0,) * n_absent, effects=False)
    for batches in ([range(10)], [range(4), range(4, 10)], [[i] for i in range(10)]):
        terms = [elbo(model, *(part[list(cells)] for part in batch))[1] for cells in batches]
        _, _, kl_mask, kl_effect = model.sample_globals(torch.arange(3 + n_absent), 1)
        # The sum over all T: an absent perturbation's KL is zero, and so is what is paid for it.
        for name, kl in (("kl_mask", kl_mask), ("kl_effect", kl_effect)):
            paid = sum(len(cells) * of_batch[name] for cells, of_batch in zip(batches, terms))
            assert paid.item() == pytest.approx(kl.sum().item(), rel=1e-5)


@pytest.mark.parametrize("kind, basal, effects", MODELS)
def test_minibatches_sum_to_the_full_data_elbo_in_expectation(kind, basal, effects):
    model, (x, d, c) = small_model(kind, basal=basal, effects=effects), small_batch()
    full, batches, n = [], [], 100
    with torch.no_grad():
        for _ in range(n):
            # Full data: one draw of (M, E) for all cells, every KL once, scored by hand.
            mask, effect, kl_mask, kl_effect = model.sample_globals(torch.arange(3), 50)
            z_pert = torch.einsum("nt,ktl->knl", multi_hot(d, 3), mask * effect)
            loc, var = model.encode(x, z_pert, d, c)
            z_basal = loc + var.sqrt() * torch.randn_like(z_pert)
            local = model.log_likelihood(x, z_basal + z_pert, d, c) - kl_normal(loc, var).sum(-1)
            full.append(local.mean() - (kl_mask.sum() + kl_effect.sum(1).mean()) / 10)
            batches.append(sum(
                len(x[cells]) / 10 * elbo(model, x[cells], d[cells], c[cells], n_particles)[0]
                for n_particles, cells in ((40, slice(2)), (45, slice(2, 9)), (50, slice(9, 10)))))
    full, batches = torch.stack(full).double(), torch.stack(batches).double()
    error = math.sqrt((full.var() + batches.var()) / n)
    assert abs(full.mean() - batches.mean()) < 4.5 * error


# ============================================================================================
# Marginal likelihood (3.1)
# ============================================================================================


def tiny_problem(kind, basal, effects):
    """A model with one latent dimension and four cells: what follows can be integrated on a line.

    Returns model, (x, d, c), whether each cell has each perturbation (4, 2), a grid of z (n,), and
    p(x | z) of each cell on it, (n, 4).
    """
    model = small_model(kind, n_cells=(5, 3), n_genes=4, n_latent=1, basal=basal, effects=effects)
    x = torch.poisson(torch.full((4, 4), 3.0), torch.Generator().manual_seed(2))
    d, c = torch.tensor([[NONE, NONE], [0, NONE], [1, NONE], [0, 1]]), no_covariates(4)
    z = torch.linspace(-12, 12, 4001)
    with torch.no_grad():
        # Wide q(z_basal) and q(e) near their priors, so that few particles suffice.
        for name, p in model.named_parameters():
            if name.startswith(("encoder", "f_emb", "effect")):
                p.mul_(0.3)
        model.encoder.last.bias[1] += 1
        if kind is not SVAEPlus and kind is not ConditionalVAE:
            (model.f_emb.last.bias[1:] if effects else model.effect_log_var).add_(1)
        likelihood = model.log_likelihood(x, z[:, None, None].expand(-1, 4, 1), d, c).double().exp()
    return model, (x, d, c), multi_hot(d, 2), z, likelihood


@pytest.mark.parametrize("kind, basal, effects", MODELS)
def test_predictive_iwelbo_converges_to_the_exact_log_marginal(kind, basal, effects):
    # z = z_basal + sum of m e. Enumerate the masks; given them z is Gaussian, and p(x) an integral.
    model, batch, has, z, likelihood = tiny_problem(kind, basal, effects)
    with torch.no_grad():
        t, exact = torch.arange(2), torch.zeros(4, dtype=torch.float64)
        p = model.mask_probability()[:, 0] if model.has_effects else torch.ones(2)
        for m in torch.tensor(list(itertools.product([0.0, 1.0], repeat=2))):
            loc = var = torch.zeros(2)
            if model.has_effects:
                loc, var = (v.flatten() for v in model.effect_posterior(m[None, :, None], t))
            center, spread = has @ (m * loc), 1 + has @ (m * var) * (kind is not SVAEPlus)
            density = torch.distributions.Normal(center, spread.sqrt()).log_prob(z[:, None]).exp()
            q_m = torch.where(m == 1, p, 1 - p).prod()
            exact += q_m * (likelihood * density).sum(0) * (z[1] - z[0])
    estimate, joint, ess = iwelbo(model, [batch], 100_000, chunk=50_000)
    torch.testing.assert_close(estimate.double(), exact.log(), rtol=0, atol=0.02)
    if kind is ConditionalVAE:  # without global latents, both are the same
        assert joint == pytest.approx(estimate.sum().item(), rel=1e-6) and math.isnan(ess)


@pytest.mark.parametrize("kind, basal, effects", MODELS[:6] + MODELS[8:9])
def test_joint_iwelbo_converges_to_the_exact_log_marginal_of_all_cells(kind, basal, effects):
    # log p(X) = log sum over masks, integral over both effects, of their priors times the product
    # over cells of p(x_i | offset), each an integral over z.
    model, batch, has, z, likelihood = tiny_problem(kind, basal, effects)
    log_normal = torch.distributions.Normal(0.0, 1.0).log_prob
    place = torch.arange(161)  # of an effect on a grid; offsets have the same spacing
    e, offset = (torch.linspace(-end, end, n).double() for end, n in ((4, 161), (8, 321)))
    weight = log_normal(e).exp() * (e[1] - e[0])
    of_offset = log_normal(z - offset[:, None]).exp() @ likelihood * (z[1] - z[0])  # (321, 4)
    p_one = {CPAVAE: 1.0, SAMSVAE: 0.2, BetaBernoulliSAMSVAE: 1 / 3}[kind]
    total = 0.0
    for m in itertools.product([0, 1], repeat=2):
        product = 1.0  # over cells, for every pair of effects
        for i, (first, second) in enumerate(has.long() * torch.tensor(m)):
            where = 160 + first * (place[:, None] - 80) + second * (place - 80)
            product = product * of_offset[where, i]
        total += math.prod(p_one if one else 1 - p_one for one in m) * (weight @ product @ weight)
    in_two = zip(*(part.split(3) for part in batch))
    _, joint, ess = iwelbo(model, in_two, 300_000, chunk=50_000)
    assert 2000 < ess < 300_000  # the standard error of log mean w is about 1 / sqrt(ess)
    assert joint == pytest.approx(math.log(total), abs=4.5 / math.sqrt(ess))


@pytest.mark.parametrize("kind", [SAMSVAE, CPAVAE, BetaBernoulliSAMSVAE])
def test_both_iwelbos_are_equations_6_and_7_of_the_same_draws(kind):
    model = small_model(kind, turned=True)
    x, d, c = (part[[0, 1, 3, 6, 7]] for part in small_batch())  # none has the last perturbation
    torch.manual_seed(5)
    predictive, joint, ess = iwelbo(model, [(x, d, c)], 4)
    torch.manual_seed(5)
    normal, t = torch.distributions.Normal, torch.arange(3)
    with torch.no_grad():
        mask, effect, _, _ = model.sample_globals(t, 4)
        loc_e, var_e = model.effect_posterior(mask, t)
        log_p_global = normal(0.0, 1.0).log_prob(effect)
        log_p_global -= normal(loc_e, var_e.sqrt()).log_prob(effect)
        if kind is not CPAVAE:
            q = model.mask_probability()
            p = torch.full_like(q, 0.2 if kind is SAMSVAE else 1 / 3)
            log_p_global += (mask * p + (1 - mask) * (1 - p)).log()
            log_p_global -= (mask * q + (1 - mask) * (1 - q)).log()
        z_pert = sum_effects(mask, effect, d, model.axes)
        loc, var = model.encode(x, z_pert, d, c)
        z_basal = loc + var.sqrt() * torch.randn_like(z_pert)
        local = model.log_likelihood(x, z_basal + z_pert, d, c) + (
            normal(0.0, 1.0).log_prob(z_basal) - normal(loc, var.sqrt()).log_prob(z_basal)).sum(-1)
    w = (log_p_global[:, :2].sum((1, 2)) + local.sum(1)).double()
    assert joint == pytest.approx(torch.logsumexp(w, 0).item() - math.log(4), abs=1e-3)
    w = (w - w.max()).exp()
    assert ess == pytest.approx((w.sum() ** 2 / (w**2).sum()).item(), rel=1e-3)
    torch.testing.assert_close(predictive, torch.logsumexp(local, 0) - math.log(4))


# ============================================================================================
# Average treatment effects (3.2)
# ============================================================================================


@torch.no_grad()
def sampled_effects(model, dosages, n, library=1e4):
    """The definition of effects by plain sampling: n cells of each row of dosages (C, P) and n
    controls, all latents shared. Differences of each cell and its control, {scale: (n, C, G)}."""
    mask, effect, _, _ = model.sample_globals(torch.arange(3), n)
    z_pert = torch.einsum("ct,ktl->kcl", multi_hot(dosages, 3), mask * effect) @ model.axes.T
    z = torch.randn(n, 1, 3) + F.pad(z_pert, (0, 0, 1, 0))  # the first is the control
    log_mean = math.log(library) + torch.log_softmax(model.decoder(z), -1)
    x = torch.distributions.NegativeBinomial(
        model.log_theta.exp(), logits=log_mean - model.log_theta).sample()
    per_10k = 1e4 * x / x.sum(-1, keepdim=True).clamp(min=1)
    return {scale: y[:, 1:] - y[:, :1] for scale, y in (
        ("counts", x), ("per_10k", per_10k), ("log_normalised", torch.log2(1 + per_10k)))}


@pytest.mark.parametrize("log_theta", [-1.5, 3.0])  # much and little noise in the counts
def test_effects_on_every_scale_equal_plain_sampling(log_theta):
    model = small_model(n_genes=5, turned=True)
    with torch.no_grad():
        model.log_theta += log_theta
        model.f_emb.last.bias[:3] += 2
    dosages, n = torch.tensor([[0, NONE], [1, 2]]), 60_000
    ours = average_treatment_effects(model, dosages, n, chunk=50_000)
    for scale, samples in sampled_effects(model, dosages, n).items():
        # our own noise is no larger than that of plain sampling
        assert_close_to_mean(samples, ours[scale].double(), sigmas=4.5 * 2**0.5)
        assert (ours[scale].abs() > 15 * samples.std(0) / math.sqrt(n)).any(1).all()


@pytest.mark.parametrize("library", [500, 2])  # 2: many cells have no counts, and are left out
@pytest.mark.parametrize("kind", [SAMSVAE, ConditionalVAE])
def test_simulated_cells_have_the_expected_expression_as_their_mean(kind, library):
    model, d, n = small_model(kind, turned=True), torch.tensor([0, 2]), 40_000
    torch.manual_seed(0)
    log_rho = sample_frequencies(model, d, no_covariates(n), torch.randn(n, 3))
    x = sample_counts(model, log_rho, torch.full((n,), float(library)))
    ours = [expected_expression(model, d[None], no_covariates(1), 2500, library)
            for _ in range(8)]  # several, to know their error, too
    per_10k = 1e4 * (x / x.sum(1, keepdim=True))[x.sum(1) > 0]
    for scale, y in (("counts", x), ("per_10k", per_10k),
                     ("log_normalised", torch.log2(1 + per_10k))):
        expected = torch.stack([values[scale][0] for values in ours])  # (8, G)
        error = (y.var(0) / len(y) + expected.var(0).mean() / 8).sqrt()
        assert ((y.mean(0) - expected.mean(0)).abs() < 5 * error).all()


def test_expected_expression_of_given_basal_states_is_the_mean_over_these():
    model = small_model(CPAVAE, n_cells=(5, 3), effects=False, n_covariates=2)
    basal, c, d = torch.randn(7, 3), torch.arange(7)[:, None] % 2, torch.tensor([[0, 1]])
    with torch.no_grad():
        model.effect_log_var -= 20  # effects are certain
        by_hand = model.log_rho(basal + model.effect_loc.sum(0), d[0], c).exp().mean(0)
    rho = expected_expression(model, d, c[None], library=1, basal=basal)["counts"][0]
    torch.testing.assert_close(rho.float(), by_hand, rtol=1e-3, atol=1e-6)


def test_the_mean_log_of_a_poisson_count_equals_the_sum_over_its_distribution():
    rate = torch.tensor([1e-6, 0.01, 0.3, 1, 4.7, 60, 400, 998, 1003, 5000], dtype=torch.float64)
    x = torch.arange(12_000, dtype=torch.float64)
    p = torch.distributions.Poisson(rate[:, None]).log_prob(x).exp()
    for library in (100.0, 1e4, 3e5):
        exact = (p * torch.log2(1 + 1e4 * x / library)).sum(1)
        ours = mean_log_of_poisson(library, "cpu")(rate.log().float())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("kind, nothing", [(SAMSVAE, NONE), (CPAVAE, NONE), (SVAEPlus, 1)])
def test_shared_latents_make_the_effect_of_what_moves_none_of_them_exactly_zero(kind, nothing):
    model = small_model(kind, n_cells=(5, 0, 2))  # SVAE+ predicts the control for an unseen label
    effects = average_treatment_effects(model, torch.tensor([[nothing], [0]]), 50, chunk=100)
    assert all((of_none == 0).all() and (of_one != 0).all() for of_none, of_one in effects.values())


# ============================================================================================
# Unseen perturbations
# ============================================================================================


def weights_of(model):
    """{name: value} of all parameters and buffers, copies."""
    return {name: value.detach().clone() for name, value in (
        *model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("kind, basal, effects", MODELS)
def test_a_continued_model_learns_new_perturbations_and_says_of_others_what_the_trained_one_says(
        kind, basal, effects):
    trained = small_model(kind, basal=basal, effects=effects, n_covariates=2, turned=True)
    model = small_model(kind, (7, 7, 4, 3), basal=basal, effects=effects, n_covariates=2, seed=9)
    known = torch.tensor([2, 0])
    continue_from(model, trained, known)
    learn_others_only(model, 2)
    if model.has_mask:  # masks become certain; nothing is known of the others
        p = model.mask_probability()
        assert torch.equal(p[:2].round(), trained.mask_probability()[known].round())
        assert (p[:2] - 0.5).abs().min() > 0.4999999 and (p[2:] == 0.5).all()
    x, c, before = small_batch(4)[0], torch.tensor([[0], [1], [NONE], [1]]), weights_of(model)
    d = torch.tensor([[2, 0], [3, NONE], [2, 3], [1, 3]])  # new ones, with known ones, too
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (-elbo(model, x, d, c, 3)[0]).backward()
        optimizer.step()
    for name, value in weights_of(model).items():
        dim, changed = perturbation_dims(model).get(name), value != before[name]
        if dim is None or name == "n_cells":
            assert not changed.any(), name
        else:  # the last two places on dim are of the new ones, and all of these learn
            others, new = changed.split([value.shape[dim] - 2, 2], dim)
            assert new.all() and not others.any(), name
    assert torch.equal(model.axes, trained.axes) and model.n_cells.tolist() == [2, 5, 4, 3]
    z, mask = torch.randn(4, 4, 3), torch.randint(0, 2, (4, 2, 3)).float()
    said = [[m.log_likelihood(x, z, d, c), *m.encode(x, z, d, c)] for m, d in (
        (trained, torch.tensor([[0], [2], [NONE], [0]])),
        (model, torch.tensor([[1], [0], [NONE], [1]])))]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*said))
    if model.has_effects:
        torch.testing.assert_close(model.effect_posterior(mask, torch.arange(2)),
                                   trained.effect_posterior(mask, known))


# ============================================================================================
# On a GPU
# ============================================================================================


@on_a_gpu
@pytest.mark.parametrize("kind, basal, effects", MODELS)
def test_gpu_and_cpu_agree(kind, basal, effects):
    (x, d, c), model = small_batch(), small_model(kind, basal=basal, effects=effects)
    z = torch.randn(2, 10, 3)
    on_cpu = [model.log_likelihood(x, z, d, c), *model.encode(x, z, d, c)]
    on_gpu = model.cuda()
    x, d, c, z = x.cuda(), d.cuda(), c.cuda(), z.cuda()
    for a, b in zip(on_cpu, [on_gpu.log_likelihood(x, z, d, c), *on_gpu.encode(x, z, d, c)]):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)
    elbo(on_gpu, x, d, c)[0].backward()
    assert iwelbo(on_gpu, [(x, d, c)], 20)[0].isfinite().all()
    effects = average_treatment_effects(on_gpu, torch.tensor([[NONE], [1]]).cuda(), 50)
    assert (effects["log_normalised"][0] == 0).all() and (effects["counts"][1] != 0).all()


@on_a_gpu
@pytest.mark.parametrize("kind, guide, precision, masks_begin", [
    (SAMSVAE, False, "float32", True), (BetaBernoulliSAMSVAE, True, "float32", False),
    (SVAEPlus, False, "bf16", False)])
def test_steps_that_a_gpu_plays_from_a_record_equal_plain_ones_to_the_last_bit(
        kind, guide, precision, masks_begin):
    # No perturbation is in more than two places: more gradients would add up in random order.
    d = torch.tensor([[0, 1], [2, NONE], [NONE, 1], [0, NONE], [NONE, NONE], [NONE, 2]])
    batches = [[part.cuda() for part in (small_batch(6, seed=seed)[0], d.roll(seed, 0),
                                         no_covariates(6))] for seed in range(8)]

    def trained(launcher):
        """Weights, Adam's moments and the generator's state, a list of tensors for each step; and
        how often Python ran a step."""
        model, n_calls = small_model(kind, basal=guide, effects=guide).cuda(), 0
        model.masks_of_one, states = masks_begin, []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True, capturable=True)
        torch.manual_seed(1)

        def step(x, d, c):
            nonlocal n_calls
            n_calls += 1
            optimizer.zero_grad(set_to_none=True)
            value, _ = train.objective(model, x, d, c, {"precision": precision, "particles": 3})
            (-value).backward()
            optimizer.step()

        for begins in (False, True)[:1 + masks_begin]:
            if begins:
                begin_masks([model])
                for parameter in train.parameters_of(model, MASKS + EFFECTS):
                    optimizer.state.pop(parameter, None)
            launch = launcher(step)
            for batch in batches:
                launch(*batch)
                moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
                states.append([*weights_of(model).values(), *moments, torch.cuda.get_rng_state()])
        return states, n_calls

    plain, n_plain = trained(lambda step: step)
    played, n_played = trained(lambda step: train.launch_once(step, torch.device("cuda")))
    assert (n_plain, n_played) == ((16, 8) if masks_begin else (8, 4))
    for states in zip(plain, played, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ============================================================================================
# Reading .h5ad files
# ============================================================================================

# A small screen, which the functions below write in every form. It has a cell without counts, a
# gene name that occurs twice, a count above 255, and a missing label.
MATRIX = np.array([[0, 3, 0, 1], [2, 0, 0, 0], [0, 0, 0, 0], [1, 300, 0, 4], [0, 0, 5, 0]])
CELLS, GENES = [f"cell{i}" for i in range(5)], ["A", "B", "B", "D"]
LABELS, CODES = ["ctrl", "X+ctrl", "X+Y", None, "Y+X"], np.array([3, 1, 0, -1, 2])
CATEGORIES = sorted(filter(None, LABELS))
text = functools.partial(np.array, dtype=object)


def write_sparse(file, name, x=MATRIX, by_row=True, index_type=np.int32, zeros=False,
                 scramble=False):
    """A sparse matrix; `zeros`: with an entry for each; `scramble`: also unsorted, and every entry
    in two parts, which add up."""
    x, kind = (x, "csr") if by_row else (x.T, "csc")
    rows, columns = np.nonzero((x != 0) | zeros | scramble)
    if scramble:
        rows, columns = rows.repeat(2), columns[::-1].repeat(2)
    values, group = x[rows, columns], file.create_group(name)
    if scramble:
        values[::2] -= values[1::2] // 2
        values[1::2] //= 2
    group.attrs.update({"encoding-type": f"{kind}_matrix", "shape": x.shape if by_row else
                        x.shape[::-1]})
    group.update({"data": values.astype(np.float64), "indices": columns.astype(index_type),
                  "indptr": np.searchsorted(rows, np.arange(len(x) + 1)).astype(index_type)})


def dense(dtype, x=MATRIX, **storage):
    return lambda file: file.create_dataset("X", data=x.astype(dtype), **storage)


def write_modern(path, write_x):
    """A file since anndata 0.8, with what write_x(file) adds."""
    with h5py.File(path, "w") as file:
        file.update({"obs/_index": CELLS, "obs/condition/codes": CODES,
                     "obs/condition/categories": CATEGORIES, "var/_index": GENES})
        write_x(file)
    return str(path)


def write_legacy(path):
    """A file until anndata 0.6: compound tables, whose first field is the index, with text of fixed
    and of variable length; categories in uns, a single one as a scalar; raw has its own genes."""
    obs = np.zeros(5, [("index", "S8"), ("condition", "i1"), ("n", ">f4"), ("one", "i1")])
    obs["index"], obs["condition"], obs["n"] = CELLS, CODES, np.arange(5)
    var = np.array([(gene,) for gene in GENES], [("index", h5py.string_dtype())])
    with h5py.File(path, "w") as file:
        file.update({"obs": obs, "var": var, "raw.X": np.tile(MATRIX, 2), "raw.var": np.tile(
            var, 2), "uns/condition_categories": CATEGORIES, "uns/one_categories": "only"})
        write_sparse(file, "X")
        file["X"].attrs.clear()
        file["X"].attrs.update({"h5sparse_format": np.bytes_("csr"), "h5sparse_shape": (5, 4)})
    return str(path)


INDICES = {  # of sparse matrices
    "uint8": dict(index_type="u1"), "int64 scrambled": dict(index_type="i8", scramble=True),
    "with zeros": dict(zeros=True)}
FORMS = {  # of a matrix: functions that write it
    "dense f4": dense("f4"), "dense >i2": dense(">i2"),
    "dense chunked by column": dense("f8", chunks=(5, 1)),
    "dense gzip": dense("f4", chunks=(2, 4), compression="gzip", shuffle=True),
    **{f"{form} {name}": functools.partial(write_sparse, name="X", by_row=form == "csr", **options)
       for form in ("csr", "csc") for name, options in INDICES.items()}}


def assert_counts(counts, expected):
    """A Counts of this array: genes rise within a cell, no zeros, the narrowest types."""
    assert counts.shape == expected.shape and counts.dense().tolist() == expected.tolist()
    assert counts.values.tolist() == expected[expected > 0].tolist()
    assert counts.columns.tolist() == np.nonzero(expected)[1].tolist()
    assert counts.indptr.tolist() == [0, *np.cumsum((expected > 0).sum(1))]
    assert counts.values.dtype == np.min_scalar_type(int(expected.max(initial=0)))
    assert counts.columns.dtype == np.uint8 and counts.indptr.dtype == np.int64


@pytest.mark.parametrize("form", FORMS)
def test_any_cells_and_genes_of_every_form_of_a_matrix_are_the_same_counts_in_memory_or_stored(
        form, tmp_path, monkeypatch):
    read = data.read_h5ad(write_modern(tmp_path / "x.h5ad", FORMS[form]))
    everything, some, none = slice(None), np.array([1, 0, 1, 0, 1], bool), np.zeros(5, bool)
    for block, rows, genes in ((3, everything, everything), (2**20, some, [2, 0]),
                               (3, [4, 0, 1, 3], [3, 0, 1]), (3, none, some[:4])):
        monkeypatch.setattr(data, "BLOCK", block)
        x = MATRIX[rows][:, genes]
        counts, stored = read.counts(rows, genes), read.counts(rows, genes, stored=True)
        assert_counts(counts, x)
        for cells in ([-1, 0, -1] if len(x) else [], x.sum(1) > 1):
            assert (counts.dense(cells) == x[cells]).all()
        for c in (counts, stored):
            assert_counts(c.take(np.arange(len(x))[::-1]), x[::-1])
            assert (data.cell_sums(c) == data.cell_sums(data.from_dense(x.astype("u2")))).all()
            kept = c.without_empty(x.any(1))
            assert sum((part.dense().tolist() for part in kept.parts()), []) == x[x.any(1)].tolist()


@pytest.mark.parametrize("top", [1, 255, 256, 2**32 - 1])
def test_counts_are_rounded_within_1e_6_and_kept_in_the_narrowest_type(top, tmp_path):
    x = MATRIX.clip(max=1)
    x[4, 2] = top
    for write in (dense("f8", x), dense("f8", x + 4e-7), dense("f8", x - 4e-7),
                  lambda file: write_sparse(file, "X", x, scramble=True)):
        assert_counts(data.read_h5ad(write_modern(tmp_path / "x.h5ad", write)).counts(), x)


def test_cells_have_the_same_hash_where_they_have_the_same_counts():
    totals, hashes = data.cell_sums(data.from_dense(np.array([[1, 2], [2, 1], [1, 2]], "u1")))
    assert totals.tolist() == [3, 3, 3] and hashes[0] == hashes[2] != hashes[1]


def test_files_of_anndata_until_0_6_with_compound_tables_read_the_same(tmp_path):
    read = data.read_h5ad(write_legacy(tmp_path / "x.h5ad"))
    assert_counts(read.counts(), MATRIX)
    assert read.cell_names.tolist() == CELLS and read.gene_names.tolist() == GENES
    assert [(column, read.obs(column).tolist()) for column in read.obs_columns] == [
        ("condition", LABELS), ("n", [0, 1, 2, 3, 4]), ("one", ["only"] * 5)]
    raw = data.read_h5ad(read.path, layer="raw")
    assert raw.gene_names.tolist() == 2 * GENES and raw.found == "raw.X, dense int64"


OBS = {  # how versions of anndata, and R, write the same labels, and other columns
    "0.8/codes": CODES, "0.8/categories": CATEGORIES,
    "0.7": CODES.astype(np.int8), "__categories/0.7": CATEGORIES,
    "R": np.where(CODES < 0, -2**31, CODES), "__categories/R": CATEGORIES,
    "0.13/values": [label or "" for label in LABELS], "0.13/mask": CODES < 0,
    "text": np.array(list("abcde"), "S1"), "number": np.arange(5, dtype=">i4"),
    "flag": CODES > 1, "maybe/values": [1, 2, 0, 4, 5], "maybe/mask": np.arange(5) == 2,
    "numbered/codes": CODES, "numbered/categories": [10, 20, 30, 40],
    # No UTF-8; and control characters, which could command a terminal.
    "odd": np.array([b"\xff", b"\x1b[2J", b"\n\x7f", b"\xc3\xa9", b"a b"])}
READ = dict.fromkeys(["0.8", "0.7", "R", "0.13"], LABELS) | {
    "text": list("abcde"), "number": [0, 1, 2, 3, 4], "flag": [True, False, False, False, True],
    "maybe": [1, 2, None, 4, 5], "numbered": [40, 20, 10, None, 30],
    "odd": ["\ufffd", "\ufffd[2J", "\ufffd\ufffd", "é", "a b"]}


@pytest.mark.parametrize("index", [
    {"_index": [7, 8, 9, 0, 1]}, {"index": np.array(list("78901"), "S1")},
    {"_index/codes": [2, 3, 4, 0, 1], "_index/categories": list("01789")},
    {"_index/values": list("78901"), "_index/mask": [False] * 5}])
def test_every_form_of_an_index_reads_as_names_and_of_a_column_as_text_numbers_bools_and_none(
        index, tmp_path):
    def write(file):
        del file["obs"]
        file.create_group("obs").update(index | OBS)
        dense("f4")(file)

    read = data.read_h5ad(write_modern(tmp_path / "x.h5ad", write))
    assert read.cell_names.tolist() == list("78901") and read.gene_names.tolist() == GENES
    assert {name: read.obs(name).tolist() for name in read.obs_columns} == READ
    assert read.obs("number").dtype.isnative and read.obs("flag").dtype == bool
    with pytest.raises(data.DataError, match="obs has no column 'no'; its columns are: 0"):
        read.obs("no")


LOG, COUNTS = {"X": np.log1p(MATRIX)}, {"layers/counts": MATRIX}
RAW = {"raw/X": np.tile(MATRIX, 2), "raw/var/_index": list("QRSTUVWX"),
       "raw/var/id": np.arange(8)}


@pytest.mark.parametrize("contents, layer, place, why", [
    ({"X": MATRIX} | RAW, None, "X", None), (LOG | COUNTS | RAW, "raw", "raw/X", None),
    (LOG | COUNTS | RAW, None, "layers/counts", "there are no counts in X"),
    (LOG | RAW, None, "raw/X", "there are no counts in X"),
    (COUNTS, None, "layers/counts", "there is no X")])
def test_counts_are_found_in_x_in_a_layer_or_in_raw_and_a_line_says_so(
        contents, layer, place, why, tmp_path, capsys):
    path = write_modern(tmp_path / "x.h5ad", lambda file: file.update(contents))
    read, raw = data.read_h5ad(path, layer), place == "raw/X"
    line = f"{path}: {why}; the counts are taken from {place}\n" if why else ""
    assert capsys.readouterr().out == line and read.found == f"{place}, dense int64"
    assert_counts(read.counts(), np.tile(MATRIX, 2) if raw else MATRIX)
    assert read.gene_names.tolist() == (list("QRSTUVWX") if raw else GENES)
    assert not raw or read.var("id").tolist() == list(range(8))
    with pytest.raises(data.DataError, match=f"^{path}: has no no; --layer can be: "):
        data.read_h5ad(path, "no")


def with_value(v):
    """The matrix with this value for cell3 and the first gene B."""
    x = MATRIX.astype(float)
    x[3, 1] = v
    return x


FAR = dict(shape=(2**60,), dtype="f4", chunks=(2**20,), compression="gzip")  # 4 EiB
INDPTR, COLUMN = [0, 2, 3, 3, 6, 7], [1, 3, 0, 0, 1, 3, 2]  # of MATRIX by rows
REFUSED = [  # what is replaced in a good file; values, or a function that writes; words about it
    *(("X", with_value(v), "^X holds .* for cell 'cell3', gene 'B', which is no count: not a whol")
      for v in (2e-6, 0.5, -1, np.nan, np.inf, 2**32)),
    *(("X", lambda f, by_row=by_row: write_sparse(f, "X", with_value(0.5), by_row),
       "^X holds 0.5 for cell 'cell3', gene 'B', .* start from the raw counts .--layer can be: X")
      for by_row in (True, False)),
    ("X", np.full((5, 4), b"1"), r"^X holds values of type \|S1, not counts"),
    ("X", None, "^has no X, counts or raw; --layer can be"),
    ("X", MATRIX[:4], r"^X has the shape \(4, 4\), but obs and var say \(5, 4\)"),
    ("X/indptr", None, "^X/indptr is missing; beside it: data, indices"),
    *(("X/indptr", wrong, "^X/indptr must rise from 0 to 7, and does not$")
      for wrong in ([1, *INDPTR[1:]], [0, 3, 2, 3, 6, 7], [*INDPTR[:-1], 9])),
    ("X/indptr", [0, 2, 3, 3, -2**31, 7], "does not: it has overflowed 32 bits"),
    *((name, wrong, "^X is inconsistent: .* and indptr 6; .* must be integers") for name, wrong in (
        ("X/indptr", INDPTR[:-1]), ("X/data", np.ones(6)), ("X/indices", np.ones(7)))),
    *(("X/indices", [wrong, *COLUMN[1:]], "^X/indices must be at least 0 and below 4, and are not")
      for wrong in (-1, 4)),
    # What the file does not hold.
    *(("X", link, "^X is behind a link, which is not followed: copy the data to its place")
      for link in (h5py.ExternalLink("other.h5", "/"), h5py.SoftLink("/X"))),
    ("X", lambda f: f.create_dataset("X", (5, 4), "f4", external=[("other", 0, 80)]),
     "^X keeps its values in other files"),
    ("X", lambda f: f.create_dataset("X", (5, 4), "f4"), r"^X declares \(5, 4\) .* 80 bytes, and "),
    ("X/data", lambda f: f.create_dataset("X/data", **FAR), "4,611,686,018,427,387,904 bytes, and"),
    # Tables.
    ("var", None, "^var is missing; beside it: X, obs"),
    ("obs/_index", None, "^obs has no index; it holds: condition"),
    ("obs/condition/codes", [0, 1, 2, -1, 4], r"the category code \[4\], but only 4 categories"),
    ("obs/condition", [1, 2], "^obs/condition has 2 values for 5 rows"),
    ("obs/condition", lambda f: f.create_dataset("obs/condition", (5,), h5py.vlen_dtype("i4")),
     "^obs.* holds values that are neither text nor numbers")]  # HDF5 can crash on damaged ones


@pytest.mark.parametrize("name, new, words", REFUSED)
def test_what_is_no_screen_of_counts_is_refused_in_one_sentence(
        name, new, words, tmp_path, monkeypatch):
    def write(file):
        write_sparse(file, "X")
        del file[name]
        new(file) if callable(new) else file.update({} if new is None else {name: new})

    monkeypatch.setattr(data, "BLOCK", 3)  # a first block, which is read at once, holds counts
    path = write_modern(tmp_path / "bad.h5ad", write)
    with warnings.catch_warnings(), pytest.raises(data.DataError) as error:
        warnings.simplefilter("error")
        read = data.read_h5ad(path)
        read.counts([4, 3, 0], [1, 3, 2]), [read.obs(column) for column in read.obs_columns]
    file, _, sentence = str(error.value).partition(": ")
    assert file == path and re.search(words, sentence) and sentence.isprintable()


def test_what_is_no_h5ad_file_is_refused_in_one_sentence(tmp_path):
    good = open(write_modern(tmp_path / "good", dense("f4")), "rb").read()
    for name, content in (("empty", b""), ("text", b"a,b\n1,2\n"), ("half", good[:len(good) // 2])):
        (tmp_path / name).write_bytes(content)
    with h5py.File(tmp_path / "tenx", "w") as tenx, h5py.File(tmp_path / "mudata", "w") as mudata:
        tenx["matrix/barcodes"], mudata["mod/rna/X"], mudata["obs/n"] = 1, 1, 1
    for name, words in {
            "none": "No such file", "empty": "cannot be read: .*signature not found",
            "text": "cannot be read: .*signature not found", "half": "cannot be read: truncated",
            "tenx": "looks like a 10x .h5 matrix", "mudata": "looks like an .h5mu file"}.items():
        with pytest.raises(data.DataError, match=f"^{tmp_path / name}: {words}") as error:
            data.read_h5ad(tmp_path / name)
        assert str(error.value).isprintable()
    fcntl = pytest.importorskip("fcntl")  # not on Windows
    with open(tmp_path / "good") as file, pytest.raises(data.DataError, match="another program"):
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does for a program that writes
        data.read_h5ad(tmp_path / "good")


def test_the_reader_can_be_cut_out_and_used_with_h5py_and_numpy_alone(tmp_path):
    with open(os.path.join(HERE, "data.py"), encoding="utf-8") as file:
        above, cut, below = file.read().partition("\n# Cut here: ")
    assert cut and "import torch" in below
    (tmp_path / "reader.py").write_text(above, encoding="utf-8")
    # None: importing it is an ImportError. -I: the folder and PYTHONPATH are not searched.
    subprocess.run([sys.executable, "-I", "-c", """
import sys
sys.modules.update(dict.fromkeys(["torch", "data", "sams_vae"]))
sys.path.insert(0, ".")
import reader, numpy as np
reader.write_h5ad("y.h5ad", np.eye(2), {"cell": ["a", "b"], "label": ["p", "q"]}, {"gene": [1, 2]})
file = reader.read_h5ad("y.h5ad")
assert (file.counts().dense() == np.eye(2)).all() and list(file.obs("label")) == ["p", "q"]
assert file.counts([1], stored=True).take().dense().tolist() == [[0, 1]]
for rows in ([1, 1], None):  # not once each, and no list
    try:
        file.counts(rows)
    except reader.DataError:
        continue
    raise AssertionError(rows)"""],
        cwd=tmp_path, check=True)


WRITTEN = {  # columns: values, the type in anndata
    "a/b": (["a", None, "a", "b", "b"], "category"), "n": ([1.5, 2, 3, 4, 5], "float64"),
    "some": ([1, None, 3, 4, 5], "float64"), "is": ([True, False, True, False, True], "bool")}


def test_what_is_written_is_opened_by_anndata_and_reads_the_same_as_what_anndata_writes(
        tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 2)
    parts = (data.from_dense(MATRIX[a:b].astype(t)) for a, b, t in (
        (0, 3, "u1"), (3, 5, "u2")))  # which has to be made wider on the way
    ours, theirs = tmp_path / "ours.h5ad", tmp_path / "theirs.h5ad"
    data.write_h5ad(
        ours, X=parts, var={"gene": GENES}, layers={"counts": MATRIX}, obsm={"Z": MATRIX[:, :2]},
        obs={"cell": CELLS} | {name: values for name, (values, _) in WRITTEN.items()},
        uns={"a": {"names": ["p", "q"], "values": np.eye(2)}, "s": "word", "n": 3})
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anndata
        import scipy.sparse
        opened = anndata.read_h5ad(ours)
        assert (opened.to_df() == MATRIX).all(None) and (opened.layers["counts"] == MATRIX).all()
        assert list(opened.obs_names) == CELLS and list(opened.var_names) == GENES
        assert opened.obs.dtypes.tolist() == [kind for _, kind in WRITTEN.values()]
        for name, (values, _) in zip(opened.obs, WRITTEN.values()):
            assert opened.obs[name].isna().tolist() == [v is None for v in values]
        assert list(opened.uns["a"]["names"]) == ["p", "q"] and opened.uns["s"] == "word"
        assert opened.uns["n"] == 3 and (opened.obsm["Z"] == MATRIX[:, :2]).all()
        opened.layers["counts"] = scipy.sparse.csc_matrix(MATRIX.astype("f4"))
        opened.write_h5ad(theirs)
    for path in filter(os.path.exists, (ours, theirs)):
        for read in (data.read_h5ad(path), data.read_h5ad(path, "counts")):
            assert_counts(read.counts(), MATRIX)
        assert read.cell_names.tolist() == CELLS and read.gene_names.tolist() == GENES
        assert read.obs_columns == ["a_b", *[*WRITTEN][1:]]
        for name, (values, kind) in zip(read.obs_columns, WRITTEN.values()):
            np.testing.assert_equal(read.obs(name).tolist(), [
                math.nan if v is None and kind == "float64" else v for v in values])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path):
    def write(name, error=None):
        def parts():
            yield data.from_dense(np.ones((1, 2), np.uint8))
            if error:
                raise error

        data.write_h5ad(tmp_path / name, parts(), {"cell": ["a"]}, {"gene": ["g", "h"]})

    (tmp_path / "x.h5ad").write_text("old")
    for name, error, sentence in (
            ("x.h5ad", data.NotCounts("in.h5ad: X holds 0.5"), "^in.h5ad: X holds 0.5$"),
            ("x.h5ad", OSError(28, "full"), "x.h5ad: cannot be written: No space"),
            ("no/x.h5ad", None, "x.h5ad: cannot be written: .*No such file")):
        with pytest.raises(data.DataError, match=sentence):
            write(name, error)
        assert (tmp_path / "x.h5ad").read_text() == "old" and os.listdir(tmp_path) == ["x.h5ad"]
    (tmp_path / "x.h5ad.writing").write_text("of a run that was killed")
    write("x.h5ad")
    assert data.read_h5ad(tmp_path / "x.h5ad").shape == (1, 2)
    assert os.listdir(tmp_path) == ["x.h5ad"]


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_ends_writing_in_a_sentence_and_not_in_a_crash_of_hdf5(tmp_path):
    done = subprocess.run([sys.executable, "-c", """
import resource, sys, numpy as np, data
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    data.write_h5ad(sys.argv[1], iter([data.from_dense(np.ones((1000, 500), "u1"))]),
                    {"cell": range(1000)}, {"gene": range(500)})
except data.DataError as error:
    print("cannot be written" in str(error))""", tmp_path / "x.h5ad"],
        cwd=HERE, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert not os.listdir(tmp_path)


# ============================================================================================
# Labels, splits, batches, simulation
# ============================================================================================


def write_obs(path, var=None, **columns):
    """A small file with these obs (and var) columns: each cell has 1 a, 2 b and 3 c."""
    n = len(next(iter(columns.values())))
    data.write_h5ad(path, X=np.tile([1, 2, 3], (n, 1)), var={"gene": list("abc")} | (var or {}),
                    obs={"cell": [f"c{i}" for i in range(n)]} | columns)
    return str(path)


@pytest.fixture
def read(tmp_path):
    """A function that writes a file with these columns and reads it by these options."""
    return lambda columns, **options: data.read_screen(
        write_obs(tmp_path / "x.h5ad", **columns), **options)


def case(sentence, columns, expected, **options):
    """The file has these columns ("name: value, value" is one); what is expected of reading it."""
    if isinstance(columns, str):
        columns = {columns.split(": ")[0]: columns.split(": ")[1].split(", ")}
    return pytest.param(columns, expected, options, id=sentence)


HOT = dict(g_A=[1, 0, 1, 0, 0, np.nan], g_N1=[0, 1, 1, 1, 0, 0],
           g_N2=[False, False, True, True, False, True], g_identity=["x"] * 6)  # no guide's


@pytest.mark.parametrize("columns, expected, options", [
    case("order and a control in a combination do not matter",
         "condition: ctrl, B+A, A+B, A+ctrl, ctrl+B, B", "control, A+B, A+B, A, B, B"),
    case("nothing is split that nobody asked to split", "gene: NT, ZAP70_1, ZAP70+B",
         "control, ZAP70_1, ZAP70+B"),
    case("what is asked for is split", "gene: NT, ZAP70_B", "control, B+ZAP70",
         combination_separator="_"),
    case("names with a + are joined by one between spaces", "gene: NT, CD4+, CD4+|B",
         "control, CD4+, B + CD4+", combination_separator="|"),
    case("a missing or empty label is none", dict(gene=["A", None, "NT", ""]), "A, control"),
    case("or, where that is said, a control", dict(gene=["A", None, "NT", ""]),
         "A, control, NT, control", control=""),
    case("labels that name no perturbation or that are excluded are left out, in combinations too",
         "condition: ctrl, Multiplet, A, negative, C1+A, A+B", "control, A, A+B", exclude=["C*"]),
    case("once the cells of B and D are gone, A has too few cells, too",
         "condition: ctrl, A, A+B, C, B, A+C, C+D, C, C", "control, C, C, C", min_cells=3),
    case("the first group of a label pattern names the perturbation in each part of a label",
         "condition: ctrl_g1, A_g1, A_g23+B_g2, A_g2+ctrl_g3, B", "control, A, A+B, A, B",
         label_pattern="(.+)_g[0-9]+"),
    case("cells that have none of the one-hot columns are controls, a missing value is no label",
         HOT, "A, N1, A+N1+N2, N1+N2, control", one_hot_prefix="g_"),
    case("or those that have the columns named as controls alone, and the first have no label",
         HOT, "A, control, A, control", one_hot_prefix="g_", control="N*"),
    *(case(f"labels are found in {column}", column, "control, A_x|A_y") for column in (
        "sgID_AB: non-targeting_1|non-targeting_2, A_x|A_y", "perturbation: CONTROL, A_x|A_y",
        "target_gene: non-targeting, A_x|A_y", "grna_target: negCtrl10, A_x|A_y")),
    case("the first of the known columns with the control that was named holds the labels",
         dict(perturbation=["A", "control"], gene=["NT", "C"]), "control, C", control="NT")])
def test_the_conditions_that_labels_mean(columns, expected, options, read):
    assert ", ".join(read(columns, **options).conditions) == expected


def test_conditions_are_rows_of_dosages_and_perturbations_are_sorted(read):
    screen = read(dict(condition=["ctrl", "B+A", "A+B", "ctrl+B", "C+A"]))
    assert screen.perturbations == ["A", "B", "C"] and screen.label_column == "condition"
    assert screen.d.tolist() == [[NONE, NONE], [0, 1], [0, 1], [1, NONE], [0, 2]]
    assert data.renumbered(screen, ["C", "x", "B", "A"]).d.tolist() == [
        [NONE, NONE], [3, 2], [3, 2], [2, NONE], [3, 0]]
    labels = data.one_label_per_cell(screen)  # every combination a perturbation, as SVAE+ needs it
    assert labels.perturbations == ["A+B", "A+C", "B"]
    assert labels.d.tolist() == [[NONE], [0], [0], [2], [1]]
    assert data.targets(["KLF1", "klf1_2", "Klf1|KLF1", "NKX2-1_g1", "KLF"],
                        ["NKX2-1", "Klf1", "KLF1"]) == [1, 1, 1, 0, None]


DAYS = dict(condition=["ctrl", "A", "B", "A"] * 10, day=[1, 1, 2, 1] * 10,
            other=[1, 2, 2, 2] * 10, barcode=range(40))
TYPES = {"feature_types": ["Gene Expression", "CRISPR Guide Capture", "Gene Expression"]}
TWO = dict(gene=["NT", "A"])


@pytest.mark.parametrize("columns, expected, options", [
    case("an empty part", "condition: ctrl, A+", "'A+', split at '+', has an empty part"),
    case("a perturbation called like a combination", "gene: NT, A + B, A_B",
         "a perturbation is called 'A + B'", combination_separator="_"),
    case("one-hot columns of other values", dict(g_A=[0, np.nan, 2]),
         "'g_A' holds other values than 0 and 1", one_hot_prefix="g_"),
    case("no column of a known name", "mine: A, control", "no obs column has a well-known name"),
    case("a column without a control", "mine: A, B, B", "the labels are B (2), A (1)",
         perturbation_column="mine"),
    case("nothing but controls", "gene: NT, NT", "2 of 2 cells"),
    case("a subset without cells", DAYS, "its values are 1 (30)", subset="day=9"),
    case("genes that are not there", TWO, "1 of the 2 genes wanted are not there",
         genes_of=["c", "q"]),
    case("a covariate of each cell", DAYS, "has 40 values for 40 cells", covariate="barcode"),
    case("a covariate that leaves nothing to compare", DAYS,
         "no perturbed cell has the covariates of a control", covariate="other"),
    case("a split of training cells alone", dict(condition=["ctrl", "A"], s=["Train", "x"]),
         "it says Train (1), x (1); words: train", split_column="s")])
def test_what_cannot_be_meant_is_refused_with_a_sentence(columns, expected, options, read):
    with pytest.raises(data.DataError) as error:
        read(columns, **options)
    assert expected in str(error.value)


@pytest.mark.parametrize("columns, expected, options", [
    case("where labels might have been split", "gene: NT, ZAP70_1", "'_', nothing was split"),
    case("totals that are all equal", TWO, "warning: nearly all cells have the same total, 6"),
    case("covariates without controls", DAYS, "warning: 10 cells have covariates that no control",
         covariate="day")])
def test_what_is_not_obvious_is_said_in_a_note(columns, expected, options, read):
    assert expected in "\n".join(read(columns, **options).notes)


@pytest.mark.parametrize("columns, expected, options", [
    *(case(f"where a column of {type(values[0]).__name__} is true", {"v": values}, "a:1 c:3",
           gene_column="v")
      for values in ([True, False, True], [1.0, 0.0, 1.0], ["True", "no", "true"])),
    case("of all features the genes", TYPES, "a:1 c:3"),
    case("unless others are asked for", TYPES, "b:2",
         gene_column="feature_types=CRISPR Guide Capture"),
    case("called by a column or, where it is empty, by the index", {"symbol": ["x", None, ""]},
         "x:1 b:2 c:3", gene_names="symbol"),
    case("exactly those asked for, in this order", {}, "c:3 a:1", genes_of=["c", "a"])])
def test_the_genes_of_a_screen_are_those(columns, expected, options, read):
    screen = read(TWO | dict(var=columns), **options)
    assert " ".join(map("{}:{}".format, screen.gene_names, screen.counts.dense()[1])) == expected


@pytest.mark.parametrize("options, kept, genes, n_empty", [
    (dict(subset="line=k"), [0, 1], [0, 1, 2, 3], 1),
    (dict(control="X+ctrl", combination_separator="", gene_column="good"), [1, 4], [0, 2], 2)])
def test_a_screen_is_the_cells_with_a_label_and_counts_of_kept_genes_and_notes_count_the_others(
        options, kept, genes, n_empty, tmp_path):
    def with_columns(file):
        write_sparse(file, "X", scramble=True)
        file["obs/line"], file["var/good"] = np.array([b"k"] * 4 + [b"j"]), [1, 0, 1, 0]

    screen, x = (data.read_screen(write_modern(tmp_path / "x.h5ad", with_columns), **options),
                 MATRIX[np.ix_(kept, genes)])
    assert screen.rows.tolist() == kept and screen.counts.dense().tolist() == x.tolist()
    assert len(screen.d) == len(kept) and screen.library.tolist() == x.sum(1).tolist()
    assert list(screen.cell_names) == [CELLS[i] for i in kept]
    assert list(screen.obs("line")) == ["kkkkj"[i] for i in kept]
    assert [note for note in screen.notes if "dropped" in note] == [
        "dropped 1 cells whose label is missing or left out: '' (1)",
        f"dropped {n_empty} cells without any count"]


def test_covariates_are_positions_among_all_values_and_a_missing_one_is_none(read):
    columns = dict(condition=["ctrl", "A", "ctrl", "A", "ctrl"] * 8, day=[1, 1, 2, 2, 1] * 8,
                   donor=["b", "a", "a", "", "a"] * 8)
    screen, plain = read(columns, covariate=["donor", "day"]), read(columns)
    assert screen.covariates == ["donor=a", "donor=b", "day=1", "day=2"]
    assert screen.c[:4].tolist() == [[1, 2], [0, 2], [0, 3], [NONE, 3]]
    assert plain.c.shape == (40, 0) and plain.fingerprint() != screen.fingerprint()


def test_a_column_over_which_controls_and_perturbed_cells_are_spread_unlike_is_named(read):
    rng, is_control = np.random.default_rng(0), np.arange(1000) < 200
    columns = {"condition": np.where(is_control, "ctrl", "A").tolist(),
               "by_chance": rng.choice(["x", "y", "z"], 1000).tolist(),
               "nperts": np.where(is_control, 0, 1),  # which describes the perturbation
               "donor": rng.binomial(1, np.where(is_control, 0.7, 0.5))}
    line, = data.unbalanced(read(columns), ["condition"])
    assert "of the controls and " in line and "perturbed cells have donor=1" in line
    assert data.unbalanced(read(columns, covariate="donor")) == []


def test_splits_equal_those_of_scikit_learn():
    # Numbers printed once by sklearn.model_selection.train_test_split(train_size=0.8).
    a, b = data.train_test_split(23, 0.8, seed=3)
    assert a.tolist() == [16, 1, 2, 20, 13, 4, 19, 6, 7, 5, 18, 9, 11, 22, 0, 8, 3, 10]
    assert b.tolist() == [21, 12, 17, 15, 14]
    rest, test = data.train_test_split(118_461, 0.8, seed=0)  # the Replogle file's size
    train, validation = (rest[i] for i in data.train_test_split(len(rest), 0.8, seed=0))
    assert [len(train), len(validation), len(test)] == [75814, 18954, 23693]
    assert train[:5].tolist() == [46495, 49576, 41989, 29502, 93607] and train[-1] == 42146
    assert validation[:5].tolist() == [11862, 55685, 8090, 102566, 98446]


NAMES = ["control", "A", "B", "C", "D", "A+B", "B+C", "C+D", "A+D", "B+D"]
COMBINATIONS = dict(condition=[NAMES[(7 * i + i // 10) % 10] for i in range(200)])


# Numbers of cells, their sums and sums of squares in train, validation and test, computed once with
# pandas.DataFrame selections and sklearn.model_selection.train_test_split(train_size=0.8).
@pytest.mark.parametrize("split, seed, fraction, expected", [
    ("norman-ood", 0, 0.0, [(80, 8067, 1067893), (20, 1883, 257957), (7, 569, 71273)]),
    ("norman-ood", 1, 0.5, [(106, 10075, 1337237), (25, 2934, 408532), (7, 933, 147197)]),
    ("norman-data-efficiency", 2, 0.25, [(96, 10056, 1354128), (36, 3223, 398421),
                                         (20, 1564, 198712)])])
def test_the_norman_splits_equal_those_of_scikit_learn_and_pandas(
        split, seed, fraction, expected, read):
    parts = data.split_cells(read(COMBINATIONS), seed, split, fraction).values()
    assert [(len(cells), int(cells.sum()), int((cells**2).sum())) for cells in parts] == expected


def test_the_ood_split_tests_on_combinations_in_the_spelling_of_guide_identity(read):
    identity = dict(zip(NAMES, NAMES[:5] + ["z", "y", "x", "w", "v"]))
    screen = read(COMBINATIONS | dict(guide_identity=[identity[name] for name in
                                                      COMBINATIONS["condition"]]))
    order = ["v", "w", "x", "y", "z"]
    np.random.default_rng(2).shuffle(order)
    cells = data.split_cells(screen, 2, "norman-ood", 0.6)
    trained, tested = ({identity[name] for name in screen.conditions[cells[part]] if "+" in name}
                       for part in ("train", "test"))
    assert (trained, tested) == (set(order[:3]), set(order[3:]))


def test_a_column_can_say_the_split_and_validation_cells_are_taken_from_training_cells(read):
    words = [*data.SPLIT_WORDS, "Train", "TEST", "x"]
    columns = dict(condition=["ctrl", "A"] * len(words), s=np.repeat(words, 2).tolist())
    screen = read(columns, split_column="s")
    expected = [*data.SPLIT_WORDS.values(), "train", "test", None]
    assert screen.split.tolist() == np.repeat(text(expected), 2).tolist()
    for part, cells in data.split_cells(screen).items():
        assert cells.tolist() == np.flatnonzero(screen.split == part).tolist()
    screen = read(dict(condition=["ctrl", "A"] * 40, s=["train", "train", "test", "test"] * 20),
                  split_column="s")
    train, parts = np.flatnonzero(screen.split == "train"), data.split_cells(screen, seed=3)
    for name, places in zip(parts, data.train_test_split(40, 0.8, seed=3)):
        assert parts[name].tolist() == train[places].tolist()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
def test_batches_are_rows_of_the_counts_with_their_dosages_and_covariates(
        device, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 2)
    screen = data.read_screen(write_modern(tmp_path / "x.h5ad", FORMS["csr uint8"]), stream)
    screen = dataclasses.replace(screen, c=np.array([[5], [NONE], [7]]))
    batches = data.Batches(screen, device)
    ordered = list(batches.in_order(np.array([2, 0, 1]), size=2))
    assert [len(x) for x, _, _ in ordered] == [2, 1]  # the same whatever the pieces
    for cells, (x, d, c) in (([2, 0, 2], batches(np.array([2, 0, 2]))),
                             ([2, 0, 1], map(torch.cat, zip(*ordered)))):
        assert x.tolist() == MATRIX[[0, 1, 4]][cells].tolist() and x.dtype == torch.float32
        assert d.tolist() == screen.d[cells].tolist() and c.tolist() == screen.c[cells].tolist()


def test_a_gpu_makes_the_same_batches_of_counts_as_a_cpu_whatever_their_type():
    for dtype in (np.uint8, np.uint16, np.uint32):
        x = MATRIX.astype(dtype)
        x[3, 1] = np.iinfo(dtype).max  # beyond the signed range
        counts, cells = data.from_dense(x), np.array([3, 0, 3, 2, 4])
        values, columns, indptr = (data._tensor(v, "cpu") for v in (
            counts.values, counts.columns, counts.indptr))
        made = data.dense_rows(values, columns, indptr, torch.arange(3), torch.tensor(cells), 4)
        assert torch.equal(made, torch.tensor(counts.dense(cells).astype(np.float32)))


def test_a_screen_streams_where_it_may_take_a_third_of_the_memory_or_where_that_is_asked_for(
        tmp_path, monkeypatch):
    by_row, by_column = (write_modern(tmp_path / name, FORMS[name])
                         for name in ("csr uint8", "csc uint8"))
    n_bytes = data.read_h5ad(by_row).counts(np.arange(5) != 3, stored=True).n_bytes
    for memory, asked, expected in (
            (3 * n_bytes, None, False), (3 * n_bytes - 1, None, True), (0, False, False)):
        monkeypatch.setattr(data, "memory", lambda memory=memory: memory)
        assert data.Batches(data.read_screen(by_row, asked)).from_file == expected
    with pytest.raises(data.DataError, match="is not stored cell by cell.*data.py prepare"):
        data.read_screen(by_column, stream=True)


@pytest.fixture(params=["in memory", "from the file"])
def numbered(request, tmp_path, monkeypatch):
    """Batches of 50 cells of one gene, of which cell i has the count i + 1."""
    monkeypatch.setattr(data, "PIECE", 8)
    monkeypatch.setattr(data, "STRIP", 4)
    data.write_h5ad(tmp_path / "x.h5ad", X=np.arange(1, 51)[:, None], var={"gene": ["A"]},
                    obs={"cell": range(50), "condition": ["ctrl"] + ["A"] * 49})
    return data.Batches(data.read_screen(tmp_path / "x.h5ad", stream="file" in request.param))


def test_every_epoch_visits_every_cell_once_also_across_batches_and_after_a_resume(numbered):
    def visits(shuffle, n):
        """The cells of the next n batches."""
        return (torch.cat([next(shuffle)[0] for _ in range(n)])[:, 0].long() - 1).tolist()

    cells = np.arange(10, 31)
    for size in (4, 30):
        all_of_it = visits(data.Shuffle(numbered, cells, size, seed=1), 42)
        epochs = [all_of_it[i:i + 21] for i in range(0, 42 * size - 20, 21)]
        assert all(sorted(epoch) == cells.tolist() for epoch in epochs)
        assert epochs[0] != epochs[1] and epochs[0] != cells.tolist()
        shuffle = data.Shuffle(numbered, cells, size, seed=1)
        for n in range(9):  # every position in an epoch, and in a piece
            again = data.Shuffle(numbered, cells, size, 1, shuffle.epoch, shuffle.position)
            assert visits(again, 3) == all_of_it[n * size:(n + 3) * size]
            next(shuffle)


def test_training_statistics_are_of_log1p_and_find_the_parameters_of_negative_binomial_counts():
    rng = np.random.default_rng(0)
    # A few genes among many, so that the library does not depend on the counts of one.
    frequency = np.array([0.002, 0.004, 0.004, 0.0] + [0.99 / 60] * 60)
    theta = np.array([0.02, 0.5, 3.0] + [100.0] * 61)
    mean = rng.lognormal(7, 0.5, (40_000, 1)) * frequency
    x = rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.uint16)
    x[::2] = 0  # of cells that are not asked for
    none = np.zeros((len(x), 0), int)
    batches = data.Batches(types.SimpleNamespace(counts=data.from_dense(x), d=none, c=none))
    log_mean, log_std, log_frequency, log_theta = data.training_statistics(
        batches, np.arange(1, len(x), 2))
    log = np.log1p(x[1::2].astype(float))
    np.testing.assert_allclose(log_mean, log.mean(0), rtol=1e-6)
    np.testing.assert_allclose(log_std, log.std(0), rtol=1e-6)
    np.testing.assert_allclose(log_frequency.exp()[[0, 1, 2, 4]], frequency[[0, 1, 2, 4]], rtol=0.1)
    np.testing.assert_allclose(log_theta.exp()[:3], theta[:3], rtol=0.2)
    assert log_frequency[3] < -15 and log_theta[3] == 6  # never seen: Poisson, and finite


def test_the_simulated_screen_is_what_it_says(tmp_path):
    path, same = tmp_path / "s.h5ad", dict(seed=3, perturbations=8, cells=30, pairs=6, n_genes=50)
    data.simulate(path, **same)
    screen = data.read_screen(path, split_column="split")
    names, mask, effect, z, _ = data.read_simulation(path)
    assert names == screen.perturbations and mask.shape == effect.shape == (8, 6)
    assert mask.any(1).all() and (np.abs(effect) > 1.5).all() and z.shape == (520, 6)
    sizes = dict(zip(*np.unique(screen.conditions.astype(str), return_counts=True)))
    assert sizes.pop("control") == 100 and set(sizes.values()) == {30} and len(sizes) == 14
    split = {c: set(screen.split[screen.conditions == c]) for c in sizes}
    held_out = [c for c in sizes if split[c] == {"test"}]
    assert len(held_out) == 3 and all("+" in c for c in held_out)
    assert all("train" in split[c] for c in sizes if c not in held_out)
    assert abs(np.log(screen.library).mean() - np.log(5000)) < 0.1
    data.simulate(path, **same)
    assert data.read_screen(path).fingerprint() == screen.fingerprint()


def test_the_sparse_shift_screen_has_the_moments_that_its_paper_states(tmp_path):
    data.simulate(tmp_path / "s.h5ad", **data.SPARSE_SHIFT, seed=1)
    screen = data.read_screen(tmp_path / "s.h5ad")
    _, mask, effect, z, z_basal = data.read_simulation(tmp_path / "s.h5ad")
    x, d = screen.counts.dense().astype(float), screen.d[:, 0]
    assert x.shape[1] == 100 and z.shape == (len(x), 15) and mask.shape == (100, 15)
    n = np.bincount(d[d >= 0])
    assert len(n) == 100 and 250 <= n.min() < 265 and 485 < n.max() <= 500
    # Targets: 1, 2 or 3 of 15 with replacement, so of 2 and 3 some are the same.
    expected = np.mean([15 * (1 - (14 / 15) ** k) for k in (1, 2, 3)])
    assert abs(mask.sum(1).mean() - expected) < 4 * 0.8 / 10 and {*mask.sum(1)} == {1, 2, 3}
    shift = effect[mask]
    assert abs(np.abs(shift).mean() - 5) < 4 * 0.5 / len(shift)**0.5
    assert abs(np.abs(shift).std() - 0.5) < 0.12 and 0.3 < (shift > 0).mean() < 0.7
    basal = z - np.append(mask * effect, np.zeros((1, 15)), axis=0)[d]  # the last row: controls
    assert np.abs(basal.mean(0)).max() < 5 / len(z)**0.5
    np.testing.assert_allclose(np.cov(basal.T), np.eye(15), atol=6 / len(z)**0.5)
    np.testing.assert_allclose(basal, z_basal, atol=1e-9)
    with h5py.File(tmp_path / "s.h5ad") as file:
        decoder = [[file[f"uns/simulation/{part}_{i}"][()] for part in ("weight", "bias")]
                   for i in (1, 2, 3, 4)]
    logits = data.decode(z, decoder)
    mean = 1e6 * np.exp(logits) / np.exp(logits).sum(0)  # over cells
    assert logits.std() == pytest.approx(1)
    assert abs(((x - mean) ** 2 / mean).mean() - 1) < 0.01 and abs(x.sum(0) - 1e6).max() < 5e3


def test_in_simulated_contexts_every_other_perturbation_has_an_effect_of_its_own(tmp_path):
    path, same = tmp_path / "s.h5ad", dict(perturbations=4, cells=60, pairs=2, n_genes=20)
    data.simulate(path, **same, contexts=2)
    names, mask, effect, z, z_basal = data.read_simulation(path)
    assert names[3:7] == ["P004", "P001 @ 0", "P001 @ 1", "P002 @ 0"] and len(names) == 12
    assert mask.any(1).tolist() == [True] * 4 + [False, False, True, True] * 2
    screen = data.read_screen(path, covariate="context")
    pairs = data.interactions_of(screen, 0, np.arange(len(screen.d)), 1)
    screen = data.with_interactions(screen, 0, pairs)
    assert screen.perturbations == names  # each was seen in both contexts
    offset = np.append(mask * effect, np.zeros((1, 6)), axis=0)
    np.testing.assert_allclose((z - z_basal)[screen.rows], offset[screen.d].sum(1), atol=1e-9)


def test_interactions_are_of_perturbations_with_enough_cells_of_two_or_more_values(tmp_path):
    labels = ["A"] * 5 + ["B"] * 4 + ["A+B"] * 2 + ["ctrl"] * 3
    values = [["x", "u"], ["x", "u"], ["y", "u"], ["y", "u"], ["z", "u"],
              ["x", "u"], ["x", "v"], ["x", "v"], ["y", "v"], ["y", "v"], [None, "v"],
              ["x", "u"], ["y", "v"], ["z", "v"]]
    data.write_h5ad(tmp_path / "s.h5ad", X=np.ones((42, 2), np.uint8), obs={
        "cell": [str(i) for i in range(42)], "condition": 3 * labels, "one": [
            v[1] for v in 3 * values], "two": [v[0] for v in 3 * values]}, var={"gene": ["g", "h"]})
    screen = data.read_screen(tmp_path / "s.h5ad", covariate=["one", "two"])
    pairs = data.interactions_of(screen, 1, np.arange(42), 6)  # A has z three times
    found = data.with_interactions(screen, 1, pairs)
    assert found.perturbations == ["A", "B", "A @ x", "A @ y", "B @ x", "B @ y"]
    assert found.d[:14].tolist() == [
        [0, NONE, i, NONE] for i in (2, 2, 3, 3, NONE)] + [
        [1, NONE, i, NONE] for i in (4, 4, 4, 5)] + [
        [0, 1, 3, 5], [0, 1, NONE, NONE]] + [[NONE] * 4] * 3
    assert data.interactions_of(screen, 1, np.arange(5), 3) == []
    assert [t for t, _ in data.interactions_of(screen, 1, np.arange(5), 2)] == [0, 0]  # of A alone


def test_pathways_come_from_the_file_or_from_json(tmp_path):
    data.simulate(tmp_path / "s.h5ad", perturbations=60, cells=1, n_genes=5)
    names, mask, *_ = data.read_simulation(tmp_path / "s.h5ad")
    for genes in data.read_pathways(tmp_path / "s.h5ad").values():  # a pathway shares one mask
        assert len(np.unique(mask[[names.index(g) for g in genes]], axis=0)) == 1
    assert data.read_pathways(write_obs(tmp_path / "x.h5ad", a=["b"])) is None
    (tmp_path / "p.json").write_text('{"source": "x", "pathways": {"P": ["A", "B"]}}')
    assert data.read_pathways(tmp_path / "p.json") == {"P": ["A", "B"]}
    (tmp_path / "p.json").write_text('{"P": "A"}')
    with pytest.raises(data.DataError, match="p.json"):
        data.read_pathways(tmp_path / "p.json")


def prepare(*arguments):
    data.main(["prepare", *map(str, arguments)])


@pytest.mark.parametrize("by_row", [True, False])
def test_prepare_keeps_the_wanted_cells_and_genes_in_their_order_with_all_columns(
        by_row, tmp_path, monkeypatch, capsys):
    rng, source, out = np.random.default_rng(0), tmp_path / "x.h5ad", tmp_path / "y.h5ad"
    x = rng.poisson(rng.gamma(0.3, 3, (300, 20)))
    x[150, 3] = 70_000  # the type of what is written becomes wider on the way
    labels, lines = (text(rng.choice(w, 300)) for w in (["ctrl", "A", "B"], ["k", "l"]))
    labels[:3], labels[3:7] = None, "C"  # too few
    data.write_h5ad(
        source, X=None, uns={"pathways": {"p": ["A", "B"]}},
        obs={"cell": range(300), "condition": labels, "line": lines, "n": np.arange(300)},
        var={"gene": [f"E{g}" for g in range(20)], "symbol": [f"S{g}" for g in range(20)]})
    with h5py.File(source, "a") as file:
        write_sparse(file, "X", x, by_row)
    (tmp_path / "genes.txt").write_text("S2\n\nS16\nS4\nnowhere\n")
    monkeypatch.setattr(data, "BLOCK", 64)
    prepare(source, out, "--subset", "line=k", "--min-cells", 5, "--controls", 20,
            "--genes", tmp_path / "genes.txt", "--gene-names", "symbol")
    controls = np.flatnonzero((labels == "ctrl") & (lines == "k"))
    np.random.RandomState(0).shuffle(controls)  # as in the paper's recipe (4.1)
    kept = np.union1d(np.flatnonzero((lines == "k") & np.isin(labels, ["A", "B"])), controls[:20])
    read = data.read_h5ad(out)
    assert read.gene_names.tolist() == ["E2", "E4", "E16"] and read.var("symbol")[0] == "S2"
    assert (read.counts().dense() == x[kept][:, [2, 4, 16]]).all() and read.found == "X, sparse CSR"
    assert read.obs("condition").tolist() == labels[kept].tolist()
    assert read.obs("n").tolist() == kept.tolist() and data.read_pathways(out) == {"p": ["A", "B"]}
    assert "3 of the 4 listed genes are there" in capsys.readouterr().out
    prepare(source, out)  # without an option, all of it
    assert (data.read_h5ad(out).counts().dense() == x).all()
    theirs = pytest.importorskip("anndata").read_h5ad(out)
    assert (theirs.X.toarray() == x).all() and theirs.obs["condition"].isna().sum() == 3


def test_the_recipe_of_the_paper_s_first_data_set(tmp_path):
    with open(os.path.join(HERE, data.RECIPE_FILE)) as file:
        lists = json.load(file)
    wanted, genes = lists["perturbation_genes"], lists["measured_gene_names"]
    assert (len(wanted), len(genes)) == (681, 1186)
    rng, out = np.random.default_rng(0), tmp_path / "y.h5ad"
    targets = text(rng.choice([*wanted[:5], "OTHER"], 3000))
    targets[rng.random(3000) < 0.8] = "non-targeting"
    x = rng.poisson(5, (3000, 5))
    data.write_h5ad(tmp_path / "raw.h5ad", X=x.astype("f4"), obs={
        "cell": range(3000), "gene": targets, "sgID_AB": [f"{t}_1|{t}_9" for t in targets]},
        var={"gene_id": list("abcde"), "gene_name": [*genes[:3], "X", genes[1]]})
    prepare(tmp_path / "raw.h5ad", out, "--recipe", "replogle-filtered")
    controls = np.flatnonzero(targets == "non-targeting")
    assert len(controls) > 2000
    np.random.RandomState(0).shuffle(controls)
    kept = np.union1d(controls[:2000], np.flatnonzero(np.isin(targets, wanted)))
    screen = data.read_screen(out)
    assert (screen.counts.dense() == x[kept][:, [0, 1, 2, 4]]).all()
    assert screen.obs("gene").tolist() == targets[kept].tolist()
    assert data.read_pathways(out) == lists["pathways"]


def test_prepare_leaves_nothing_behind_where_it_fails(tmp_path, monkeypatch):
    source, out, x = tmp_path / "x.h5ad", tmp_path / "y.h5ad", np.ones((200, 3))
    x[150, 1] = 0.5
    data.write_h5ad(source, X=x, obs={"cell": np.arange(200)}, var={"gene": list("abc")})
    monkeypatch.setattr(data, "BLOCK", 64)
    for target, words in ((source, "is the file that is read"), (out, "0.5 for cell '150'")):
        with pytest.raises(data.DataError, match=words):
            prepare(source, target)
    assert os.listdir(tmp_path) == ["x.h5ad"]


# ============================================================================================
# Evaluation
# ============================================================================================


def test_the_matching_of_latents_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (2, 5), (4, 4), (5, 6), (4, 2)):
        for _ in range(20):
            score = rng.integers(0, 6, (n, m)) if rng.random() < 0.5 else rng.normal(size=(n, m))
            rows, columns = evaluate.best_matching(score)
            assert len(set(rows)) == len(set(columns)) == min(n, m)
            wide = score if n <= m else score.T
            best = max(wide[range(len(wide)), list(p)].sum()
                       for p in itertools.permutations(range(max(n, m)), min(n, m)))
            assert score[rows, columns].sum() == pytest.approx(best)


def test_permuted_and_rescaled_latents_are_found_whole_and_noise_as_well_as_by_chance():
    rng = np.random.default_rng(0)
    true, order, scale = rng.normal(size=(2000, 5)), rng.permutation(5), rng.choice([-3.0, 0.5], 5)
    found = evaluate.latent_recovery(true, true[:, order] * scale + 7)
    assert found == pytest.approx({"mcc": 1, "r_squared": 1})
    mixed = evaluate.latent_recovery(true, true @ rng.normal(size=(5, 5)))
    assert mixed["r_squared"] == pytest.approx(1) and mixed["mcc"] < 0.9
    # By chance: |r| of 2,000 pairs has the mean sqrt(2 / (pi 2000)), the best matching a bit more.
    noise = evaluate.latent_recovery(true, rng.normal(size=(2000, 5)))
    chance = math.sqrt(2 / math.pi / 2000)
    assert chance < noise["mcc"] < 3 * chance and abs(noise["r_squared"]) < 0.02
    # True latents without a partner count as not found.
    assert evaluate.latent_recovery(true, true[:, :2])["mcc"] == pytest.approx(0.4, abs=0.02)


def test_mask_recovery_does_not_depend_on_the_order_of_latents_and_counts_every_error():
    true = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0]], bool)
    found = np.insert(true, 1, False, axis=1)[:, [2, 3, 1, 0]]
    assert evaluate.mask_recovery(true, found) == {"precision": 1, "recall": 1, "f1": 1}
    found[3, 2] = True  # one false entry, in a latent without partner
    found[:2] = False  # two missed
    assert evaluate.mask_recovery(true, found) == pytest.approx(
        {"precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3})
    # Between runs, whose masks are texts:
    runs = [dict(zip("abcd", texts)) for texts in (
        ["0", "1 12", "", "12"], ["3", "0 1", "", "1"], ["0", "0", "", "0"])]
    runs[0]["e"] = "7"  # which the others do not have
    assert evaluate.mask_agreement(runs)[0] == pytest.approx((1 + 4 / 7 + 4 / 7) / 3)


def test_pearson_equals_numpy_and_r_squared_and_the_weighted_one_are_so_by_hand():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert evaluate.pearson(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert math.isnan(evaluate.pearson(a, np.zeros_like(b)))
    observed, predicted = np.array([[0.0, 2], [4, 6]]), np.array([[0.0, 1], [3, 2]])
    assert evaluate.r_squared(predicted, observed) == pytest.approx(1 - (1 + 1 + 16) / 20)
    # |t| of 5, 3 and 1 reach from 0 to 1 as 1, 1/2 and 0: squared 1, 1/4 and 0.
    weights = evaluate.response_weights(np.array([[-5.0, 3, 1], [2, 2, 2]]))
    np.testing.assert_allclose(weights, [[0.8, 0.2, 0], [1 / 3, 1 / 3, 1 / 3]])
    observed, predicted = np.array([[3.0, -1, 9], [0, 1, 2]]), np.array([[2.0, -1, 0], [0, 1, 1]])
    mean = 0.8 * 3 - 0.2  # weighted
    first = 1 - 0.8 / (0.8 * (3 - mean) ** 2 + 0.2 * (-1 - mean) ** 2)
    squares = (predicted - observed) ** 2
    value = evaluate.weighted_r_squared(squares, observed, weights)
    assert value == pytest.approx((first + 1 - 1 / 2) / 2)
    weights[1] = 0  # a condition without weights does not count
    assert evaluate.weighted_r_squared(squares, observed, weights) == pytest.approx(first)


def test_the_discrimination_scores_by_hand():
    observed = np.array([[0.0, 0], [1, 0], [0, 5]])
    # Distances to the observed 0: 3, .5, 1, own rank 2; to 1: 2, 1.5, 0, own 1; to 2: 8, 4.5, 6: 1.
    # Of prediction 0 to the observed: 3, 2, 8, own rank 1; of 1: .5, 1.5, 4.5: 1; of 2: 1, 0, 6: 2.
    predicted = np.array([[3.0, 0], [0, 0.5], [1, 0]])
    found = evaluate.discrimination_scores(predicted, observed)
    assert found.tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]
    tied = evaluate.discrimination_scores(np.ones((3, 2)), observed)
    assert tied[0].tolist() == [0.5, 0.5, 0.5]


def test_the_noise_limit_is_what_the_true_effects_score():
    rng, differences = np.random.default_rng(0), []
    for scale in np.repeat([0.2, 0.5, 1.0, 3.0], 30):
        truth = scale * rng.normal(size=(40, 60)) * rng.lognormal(size=(40, 1))
        of_condition = rng.uniform(0.2, 1.8, truth.shape)
        of_control = rng.uniform(0.2, 1.8, 60)  # the same cells for all conditions
        without_control = truth + of_condition**0.5 * rng.normal(size=truth.shape)
        said = evaluate.Said(without_control + of_control**0.5 * rng.normal(size=60),
                             of_condition + of_control, without_control - truth.mean(0),
                             of_condition, truth)
        weights = evaluate.response_weights(truth)
        of_truth = evaluate.Prediction(truth, truth - truth.mean(0))
        scores = evaluate.effect_metrics(of_truth, said, weights)
        limit = evaluate.noise_limit(said, weights)
        differences.append([scores[k] - limit[k] for k in ("pearson", "r_squared", "from_mean")])
    for values, at_most in zip(zip(*differences), (0.02, 0.01, 0.02)):
        assert abs(np.mean(values)) < at_most and np.std(values) < 0.08


def test_differences_of_iwelbo_are_cell_by_cell_also_of_cells_with_equal_names(tmp_path):
    runs = []
    for i, values in enumerate(([-5.0, -9.0, -1.0], [-6.0, -9.5, -3.0])):
        (tmp_path / str(i)).mkdir()
        rows = "".join(f"same,A,{value}\n" for value in values)
        (tmp_path / str(i) / "iwelbo.csv").write_text(f"cell,condition,iwelbo\n{rows}")
        runs.append({"folder": tmp_path / str(i), "fingerprint": "x", "config": {"split_seed": 0},
                     "iwelbo_monte_carlo_error": 0.3 + 0.1 * i})
    mean, error, noise = evaluate.iwelbo_difference(runs[:1], runs[1:])
    assert mean == pytest.approx(3.5 / 3) and noise == pytest.approx(0.5)
    assert error == pytest.approx(np.std([1, 0.5, 2], ddof=1) / 3**0.5)


def test_names_of_perturbations_say_which_genes_they_target_and_which_pathway_they_are_in():
    genes = ["KLF1", "HLA-A", "Trp53", "A", "KLF1"]
    names = ["KLF1", "HLA-A_2", "sgTRP53", "TRP53 g1", "klf1|A", "DMSO_A", "HLA-A"]
    found = evaluate.own_targets(np.array([[t, NONE] for t in range(7)] + [[1, 3]]), names, genes)
    assert [np.flatnonzero(row).tolist() for row in found] == [
        [0], [1], [], [2], [0], [], [1], [1, 2]]
    pathways = {"P": ["A", "B"], "Q": ["B"]}
    assert evaluate.pathway_of(["A_P1P2", "C", "B"], pathways).tolist() == ["P", "", "P"]


def test_test_cells_are_compared_with_controls_that_no_training_cell_is():
    is_control = np.arange(10) < 5
    for cells, trained, expected in (([8, 0, 1, 9], [2, 3, 7], [0, 1, 8, 9]),
                                     ([8, 9], [0, 1, 2], [3, 4, 8, 9]),  # validation controls
                                     ([8, 9], [0, 1, 2, 3], [0, 1, 2, 3, 4, 8, 9])):
        found = evaluate.with_controls(np.array(cells), np.array(trained), is_control)
        assert found.tolist() == expected


def test_baseline_effects_by_hand():
    dosages = np.array([[0, -1], [1, -1], [0, 1], [0, 2]])
    effect = np.array([[2.0, 0], [0, 1], [8, 8], [0, 0]])
    seen = np.array([True, True, True, False])
    found = evaluate.baseline_effects(effect, 0 * effect, seen, dosages)
    mean = [[4, 4.5], [5, 4], [1, 0.5], [10 / 3, 3]]  # of the others
    own = [[2, 0], [0, 1], [8, 8], [2, 0]]  # without noise there is nothing to shrink
    for row, expected, of_others in (
            ("no_change", [[0, 0]] * 4, [[0, 0]] * 4), ("perturbed_mean", mean, mean),
            ("additive", [[2, 0], [0, 1], [2, 1], [2, 0]],
             [[1, 1], [2, 0.5], [1, 0.5], [4 / 3, 2 / 3]]),
            ("matching_mean", [[2, 0], [0, 1], [1, 0.5], [8 / 3, 1.5]], mean),
            ("own_mean", own, mean), ("shrunken_mean", own, mean)):
        np.testing.assert_allclose(found[row].effect, expected)
        np.testing.assert_allclose(found[row].from_mean, np.subtract(expected, of_others))


def test_shrunken_effects_are_nearest_to_the_true_ones_and_shrink_as_known_variances_say():
    rng = np.random.default_rng(0)
    s = np.outer(rng.lognormal(size=200), rng.lognormal(size=300))  # variances of true effects
    variance, seen = rng.uniform(0.5, 2, s.shape), np.arange(200) > 0
    truth = s**0.5 * rng.normal(size=s.shape)
    effect = truth + variance**0.5 * rng.normal(size=s.shape)
    error = {name: ((v - truth)[1:] ** 2).mean() for name, v in (
        ("found", evaluate.shrunken(effect, variance, seen)), ("own", effect),
        ("best", effect * s / (s + variance)),
        ("one factor", effect * s.mean() / (s.mean() + variance.mean())))}
    assert error["best"] < error["found"] < 1.05 * error["best"]
    assert error["found"] < 0.8 * error["one factor"] < 0.8 * error["own"]


def screen_of(tmp_path, x, label, **obs):
    """Arms and batches of a screen with these counts (N, G) and labels (N,)."""
    path = tmp_path / "own.h5ad"
    data.write_h5ad(path, X=np.asarray(x), obs={
        "cell": [str(i) for i in range(len(x))], "condition": np.array(label, object), **obs},
        var={"gene": [f"g{g}" for g in range(len(x[0]))]})
    screen = data.read_screen(path, covariate=list(obs))
    batches = data.Batches(screen)
    return evaluate.Arms(types.SimpleNamespace(
        screen=screen, model_screen=screen, device=batches.device)), batches


def test_conditions_are_compared_with_controls_of_the_same_covariates_by_hand(tmp_path):
    # Condition a has cells in three batches, b in the second; batch v has no control.
    arms, _ = screen_of(tmp_path, np.ones((70, 2), int), 10 * [
        "a", "a", "b", "control", "control", "a", "b"], batch=10 * list("uwwuwvw"))
    assert arms.names.tolist() == ["a", "b"] and arms.n_controls == 3
    assert arms.d[:, 0].tolist() == [-1, -1, -1, 0, 0, 0, 1]  # controls, a in u, v, w; b in w
    assert arms.c[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert arms.of_cell.tolist() == 10 * [3, 5, 6, 0, 2, 4, 6]
    assert arms.dosages.tolist() == [[0], [1]]
    share = arms.shares(np.array([9, 0, 4, 3, 8, 1, 2]))  # those of a in batch v do not count
    assert share.tolist() == [[0.75], [0], [0.25], [1]]
    treated, control = arms.compared(np.array([[1.0], [2], [3], [4], [5], [6], [7]]), share)
    assert treated.tolist() == [[0.75 * 4 + 0.25 * 6], [7]]
    assert control.tolist() == [[0.75 * 1 + 0.25 * 3], [3]]
    nowhere = arms.shares(np.array([0, 5, 0, 3, 0, 1, 2]))
    assert nowhere.tolist() == [[0]] * 4 and not arms.have_some(nowhere).any()


def test_effects_from_the_mean_of_others_have_no_noise_of_controls_by_hand(tmp_path):
    # Two conditions and the control, one gene; the second has no training cells.
    arms, _ = screen_of(tmp_path, np.ones((3, 1), int), ["a", "b", "control"])
    observed = evaluate.Means(np.array([[1.0], [4], [7]]), np.array([[0.5], [0.3], [0.4]]),
                              np.array([9, 9, 9]))
    trained = evaluate.Means(np.array([[2.0], [5], [0]]), np.array([[0.2], [0.1], [0]]),
                             np.array([5, 5, 0]))
    said, baselines = evaluate.effects_by_data(arms, observed, trained, np.array([True, False]))
    assert said.effect.tolist() == [[3], [6]]
    assert baselines["perturbed_mean"].effect.tolist() == [[0], [3]]
    np.testing.assert_allclose(said.variance, [[0.8], [0.9]])
    # a has no other training condition: from the controls; b from the mean of a.
    assert said.from_mean.tolist() == [[4 - 2], [7 - 5]]
    np.testing.assert_allclose(said.variance_from_mean, [[0.3 + 0.2], [0.4 + 0.1]])
    assert baselines["own_mean"].effect.tolist() == [[3], [0]]


def test_expression_its_error_and_t_against_other_perturbed_cells_are_so_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    label = np.repeat(["control", "A", "B", "C"], [20, 12, 15, 30])
    x = rng.poisson(rng.uniform(1, 6, (4, 9)).repeat([20, 12, 15, 30], 0)) + 1
    arms, batches = screen_of(tmp_path, x, label)
    means = evaluate.mean_expression(batches, np.arange(1, 77), arms)  # without the first cell
    y = {"counts": 1e4 * x / x.sum(1, keepdims=True)}
    y["log_normalised"] = np.log2(1 + y["counts"])
    for scale, values in y.items():
        mean, variance, n = means[scale]
        assert n.tolist() == [19, 12, 15, 30]
        for k, name in enumerate(("control", "A", "B", "C")):
            own = values[1:][label[1:] == name]
            np.testing.assert_allclose(mean[k], own.mean(0), rtol=1e-5)
            np.testing.assert_allclose(variance[k], own.var(0, ddof=1) / len(own), rtol=1e-4)
        t = evaluate.t_against_others(arms, means[scale])
        for k, name in enumerate("ABC"):
            own, rest = values[label == name], values[np.isin(label, [*{*"ABC"} - {name}])]
            welch = (own.mean(0) - rest.mean(0)) / (
                own.var(0, ddof=1) / len(own) + rest.var(0, ddof=1) / len(rest)) ** 0.5
            np.testing.assert_allclose(t[k], welch, rtol=1e-3)


def test_entries_that_do_not_count_are_zero_and_a_broken_prediction_is_not_hidden():
    rng = np.random.default_rng(0)
    predicted, effect, from_mean, t = rng.normal(size=(4, 5, 30))
    variance, is_left_out = rng.uniform(0.5, 2, (5, 30)), np.eye(5, 30, dtype=bool)
    known = np.array([True, True, True, False, True])

    def scores(of_model):
        """The metrics of this prediction."""
        return evaluate.scores({"all": known}, {"model": of_model}, evaluate.Said(
            effect, variance, from_mean, variance, t), known, is_left_out, "cpu")[0]

    of_model = evaluate.prediction(predicted, known)
    found = scores(of_model)
    a, b, c, d = (np.where(is_left_out, 0, v)[known] for v in (*of_model, effect, from_mean))
    assert found["n_conditions"] == 4
    assert found["pearson"] == pytest.approx(evaluate.pearson(a, c))
    assert found["from_mean"] == pytest.approx(evaluate.pearson(b, d))
    assert found["discrimination"] == pytest.approx(evaluate.discrimination_scores(a, c)[0].mean())
    of_model.effect[1, 9] = np.nan
    assert math.isnan(scores(of_model)["pearson"])
# ============================================================================================
# The commands
# ============================================================================================

TINY = ["--simulated-perturbations", "12", "--simulated-cells", "20", "--n-hidden", "16",
        "--effect-hidden", "8", "--n-latent", "4", "--batch-size", "64", "--validate-every", "5",
        "--log-every", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a tiny simulated screen in screen.h5ad."""
    monkeypatch.chdir(tmp_path)
    data.simulate("screen.h5ad", perturbations=12, cells=20, pairs=10, n_genes=40)
    return tmp_path


def train_on_screen(name, *options):
    assert train.main(["--data", "screen.h5ad", "--split-column", "split", "--name", name,
                       "--warm-starts", "1", *TINY[4:], *options]) == f"runs/{name}"


def evaluation(name, iwelbo_particles=2, ate_particles=2, **options):
    """The metrics of runs/NAME."""
    return evaluate.evaluate(evaluate.open_run(f"runs/{name}"), iwelbo_particles=iwelbo_particles,
                             ate_particles=ate_particles, **options)


def last(name):
    """What last.pt of runs/NAME holds."""
    return train.load_checkpoint(f"runs/{name}", "last.pt")


def outcome(folder):
    """What training has come to: what its checkpoints hold, and log.jsonl without the times."""
    states = [train.load_checkpoint(folder, name) for name in ("best.pt", "last.pt")]
    log = [line | {"cells_per_second": 0} for line in train.read_log(folder)]
    return [{k: state[k] for k in ("progress", "model", "optimizer")} for state in states], log


def assert_same(one, other):
    """To the last bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def dying(monkeypatch, is_due, died):
    """Let training die, as by Ctrl-C, wherever it draws, validates, writes or turns, the first time
    that it comes there: of these moments, added to the set `died`, those that are due."""
    run = []

    def or_die(name, plain, *arguments):
        """What `plain` does, the second time."""
        if name == "new_optimizer":
            run[:] = arguments
        elif run and (name != "elbo" or torch.is_grad_enabled()):
            moment = name, run[0].progress.step, *arguments[1:2] * (name == "save")
            place = *moment, run[0].progress.phase
            if place not in died and is_due(moment):
                died.add(place)
                raise KeyboardInterrupt
        return plain(*arguments)

    for name in ("new_optimizer", "elbo", "validation_loss", "begin_masks"):
        monkeypatch.setattr(train, name, functools.partial(or_die, name, getattr(train, name)))
    monkeypatch.setattr(train.Run, "save", functools.partialmethod(
        lambda run, plain, *arguments: or_die("save", plain, run, *arguments), train.Run.save))


@pytest.mark.parametrize("options", [
    [], ["--stream"], ["--patience", "5"], ["--axes", "learned", "--correlated-effects"],
    ["--warm-starts", "3"], ["--warm-starts", "2", "--patience", "5"],
    ["--model", "sams-vae-beta-bernoulli"], ["--model", "svae+"], ["--model", "cvae"]])
def test_a_run_killed_at_any_step_and_resumed_is_bit_identical_to_one_that_was_not(
        folder, options, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)  # an epoch has 268 cells
    few = functools.partial(sparsest_axes, n_steps=30)
    monkeypatch.setattr(sys.modules["sams_vae"], "sparsest_axes", few)  # faster
    options = ["--steps", "16", "--log-every", "3", *options]
    train_on_screen("whole", *options)
    codes, died = [], set()  # the axes turn after step 8
    dying(monkeypatch, lambda moment: len(options) == 4 or moment[1] in (3, 7, 8, 13), died)
    while codes[-1:] != [0]:
        try:
            train.main(["--resume", "runs/parts"]) if codes else train_on_screen("parts", *options)
            codes.append(0)
        except SystemExit as stopped:
            codes.append(stopped.code)
    assert codes == [130] * len(died) + [0] and len(died) > 3
    assert_same(*(outcome(f"runs/{name}") for name in ("whole", "parts")))
    state = last("parts")
    turned = not {"learned", "cvae"} & {*options}
    assert turned == (state["progress"]["masks_from"] == 8)
    assert turned == (not torch.equal(state["model"]["axes"], torch.eye(4)))


def new_screen(batch=1):
    """new.h5ad: the cells of screen.h5ad with its genes in another order, two more of one name,
    and one value of batch."""
    file = data.read_h5ad("screen.h5ad")
    genes, x = np.random.default_rng(1).permutation(40), file.counts().dense()
    obs = {name: file.obs(name) for name in ("condition", "split")}
    data.write_h5ad("new.h5ad", X=np.column_stack([x[:, genes], x[:, [0, 0]]]),
                    obs={"cell": file.cell_names, "batch": np.full(len(x), batch)} | obs,
                    var={"gene": [*file.gene_names[genes], "twice", "twice"]})


@pytest.mark.parametrize("options", [
    [], ["--axes", "learned"], ["--model", "svae+"], ["--model", "cvae"]])
def test_a_run_is_adapted_to_new_perturbations_and_what_it_knew_stays_as_it_was(folder, options):
    train_on_screen("base", "--exclude", "P002", "--exclude", "P011", "--steps", "100", "--lr",
                    "0.01", "--validate-every", "50", *options)
    new_screen()
    train.main(["--adapt", "runs/base", "--data", "new.h5ad", "--name", "new", "--split-column",
                "split", "--validate-every", "50", "--steps", "100"])
    base, new = (train.load_checkpoint(f"runs/{name}", "best.pt") for name in ("base", "new"))
    known = [t for t, n in enumerate(base["model"]["n_cells"]) if n]
    names, n_known = new["fixed"]["perturbations"], new["fixed"]["n_known"]
    assert new["fixed"]["gene_names"] == base["fixed"]["gene_names"]  # in the file others' order
    assert names[:n_known] == [base["fixed"]["perturbations"][t] for t in known]
    assert "P002" in names[n_known:]
    for name in ("log_theta", "decoder.last.weight", "axes"):
        assert torch.equal(new["model"][name], base["model"][name])
    for name in {"effect_loc", "n_cells"} & base["model"].keys():
        assert torch.equal(new["model"][name][:n_known], base["model"][name][known])
    metrics = evaluation("new", 10, 20)
    assert metrics["iwelbo_new"] > metrics["iwelbo_new_before"] + 0.2


def test_an_adapted_run_is_resumed_bit_identically_and_needs_the_covariates_of_its_base(folder):
    data.simulate("screen.h5ad", perturbations=12, cells=20, pairs=10, n_genes=40, batch=2.0)
    train_on_screen("base", "--exclude", "P002", "--steps", "40", "--covariate", "batch")
    new_screen()
    command = ["--adapt", "runs/base", "--data", "new.h5ad", "--validate-every", "10"]
    train.main([*command, "--name", "whole", "--steps", "40"])
    train.main([*command, "--name", "parts", "--steps", "20"])
    train.main(["--resume", "runs/parts", "--steps", "40"])
    assert_same(*(outcome(f"runs/{name}") for name in ("whole", "parts")))
    screen = evaluate.open_run("runs/whole").screen
    assert screen.covariates == ["batch=0", "batch=1"] and (screen.c == 1).all()
    new_screen(batch=7)
    with pytest.raises(data.DataError, match="batch=7, and the run was trained on batch=0, batch"):
        train.main(command)


def test_the_checkpoint_describes_the_run_and_loads_without_unpickling(folder):
    train_on_screen("run", "--steps", "4")
    run = torch.load("runs/run/best.pt", weights_only=True)
    screen = data.read_screen("screen.h5ad", split_column="split")
    fixed, train_cells = run["fixed"], run["split"]["train"].numpy()
    assert fixed["gene_names"] == list(screen.gene_names)
    assert fixed["perturbations"] == screen.perturbations
    assert fixed["arguments"]["n_cells"][0] == (screen.d[train_cells] == 0).sum() > 0
    assert json.load(open("runs/run/config.json")) == run["config"]
    first, *_, end = train.read_log("runs/run")
    assert first.keys() == {"phase", "step", "epoch", "loss", "log_likelihood", "kl_basal",
                            "kl_mask", "kl_effect", "cells_per_second", "validation_loss"}
    assert end.keys() - first.keys() == {"mask_probability", "mask_size"}  # there are masks now
    assert end["validation_loss"] == pytest.approx(run["progress"]["best"], abs=1e-3)


def test_masks_begin_from_the_best_weights_and_training_ends_where_validation_does_not_improve(
        folder, monkeypatch):
    # Of validations every 5 steps. With masks of one: the best is at step 10, and 10 steps later
    # masks begin, at step 20, after which the best is at step 30, though worse than the other.
    values, weights, plain = iter([5.0, 1.0, 4.0, 3.5, 9.0, 2.0, 6.0, 7.0]), [], train.begin_masks
    monkeypatch.setattr(train, "begin_masks", lambda models, *rows: (
        weights.append(copy.deepcopy(models[0].state_dict())), plain(models, *rows))[1])
    monkeypatch.setattr(train, "validation_loss", lambda run: (
        weights.append(copy.deepcopy(run.model.state_dict())), next(values))[1])
    train_on_screen("run", "--steps", "80", "--patience", "10")
    assert next(values, None) is None
    assert_same(weights[1], weights[4])  # of the second validation; after four
    best, warm = (train.load_checkpoint("runs/run", name) for name in ("best.pt", "warm0.pt"))
    assert best["progress"]["best"] == last("run")["progress"]["best"] == 2
    assert [state["progress"][name] for state in (best, last("run"))
            for name in ("step", "masks_from")] == [30, 20, 40, 20]
    # The weights alone say whether masks are of one.
    assert (train.build_model(warm).mask_probability() == 1).all()
    assert (train.build_model(best).mask_probability() < 1).all()
    # A run that has ended by patience is as complete as one that made all of its steps.
    assert evaluation("run")["done"]


@pytest.mark.parametrize("patience", [[], ["--patience", "10"]])
def test_warm_starts_are_runs_of_the_next_seeds_and_the_nearest_to_their_mean_goes_on(
        folder, patience, capsys, monkeypatch):
    few = functools.partial(sparsest_axes, n_steps=30)
    monkeypatch.setattr(sys.modules["sams_vae"], "sparsest_axes", few)  # faster
    options = ["--steps", "40", "--lr", "0.01", *patience]
    train_on_screen("run", "--warm-starts", "3", "--seed", "4", *options)
    kept = [train.load_checkpoint("runs/run", f"warm{n}.pt") for n in range(3)]
    for n, checkpoint in enumerate(kept):
        train_on_screen(f"alone{n}", "--seed", str(4 + n), *options)
        alone = train.load_checkpoint(f"runs/alone{n}", "warm0.pt")
        assert_same(*([c[name] for name in ("model", "optimizer")] for c in (checkpoint, alone)))
    models, state = [train.build_model(checkpoint) for checkpoint in kept], last("run")
    torch.manual_seed(4)
    nearest, support, _, _ = begin_masks(models)
    assert state["progress"]["start"] == nearest
    assert_same(state["support"], support)
    assert torch.equal(state["model"]["axes"], models[nearest].axes)
    assert state["progress"]["masks_from"] == last(f"alone{nearest}")["progress"]["masks_from"]
    # What it says of its masks.
    capsys.readouterr()
    evaluate.main(["runs/run", "--iwelbo-particles", "2", "--ate-particles", "2", "--latents"])
    evaluate.main(["runs/run", "--iwelbo-particles", "2", "--ate-particles", "2"])
    run = evaluate.open_run("runs/run")
    names = run.model_screen.perturbations
    mask = run.model.mask_probability() > 0.5
    assert (f"of all {mask.sum()} mask entries, {(mask & (support >= 0.8)).sum()} have a support "
            "of at least 0.8 by 3 warm starts") in capsys.readouterr().out
    for row in csv.DictReader(open("runs/run/masks.csv")):
        t, latent = names.index(row["perturbation"]), int(row["latent"])
        assert float(row["support"]) == pytest.approx(support[t, latent].item(), abs=1e-5)
    with h5py.File("runs/run/latents.h5ad") as file:
        assert np.array_equal(file["uns/mask_support"][()], support.numpy())


def test_with_interactions_effects_and_predictions_depend_on_the_context(
        folder, capsys, monkeypatch):
    few = functools.partial(sparsest_axes, n_steps=30)
    monkeypatch.setattr(sys.modules["sams_vae"], "sparsest_axes", few)  # faster
    data.simulate("screen.h5ad", perturbations=12, cells=40, pairs=10, n_genes=40, contexts=2)
    options = ["--covariate", "context", "--interactions", "context", "--min-cells", "5"]
    train_on_screen("run", "--subset", "context=0", "--subset", "context=1", *options, "--exclude",
                    "P012", "--steps", "60", "--lr", "0.01")
    run = evaluate.open_run("runs/run")
    names, arms = run.model_screen.perturbations, evaluate.Arms(run)
    assert {"P002 @ 0", "P002 @ 1"} < {*names} and len(names) == 11 * 3
    for arm in (0, 5, 9):
        value = run.screen.covariates[arms.c[arms.n_controls + arm, 0]].split("=")[1]
        received = {names[t] for t in arms.d[arms.n_controls + arm].tolist() if t != NONE}
        own = {*arms.names[arms.condition[arm]].split("+")}
        assert received == own | {f"{name} @ {value}" for name in own}
    metrics = evaluation("run", 4, 20)
    assert {"mask_f1", "latent_mcc"} <= metrics.keys()
    model, layer = run.model, "effect_log_normalised"
    with torch.no_grad():  # P001 acts in context 1 alone, P002 alike in both
        model.set_masks(torch.full((33, 4), -20.0))
        for name in ("P001 @ 1", "P002"):
            model.mask_logits[names.index(name)] = 20
            model.effect_loc[names.index(name)] = 3
    conditions = ["P001", "P002", "P001+P002", "control"]
    text = evaluate.predict(run, conditions, ate_particles=50, basal="prior")
    with h5py.File("runs/run/predictions.h5ad") as file:
        found = data._names(file, "obs").tolist()
    labels = [f"{name} @ {v}" for name in conditions for v in (0, 1)]
    assert found == labels
    size = dict(zip(labels, np.abs(data.read_layers("runs/run/predictions.h5ad")[layer]).sum(1)))
    assert size["P001 @ 0"] < 1e-3 < 0.1 < size["P001 @ 1"] and size["control @ 1"] < 1e-6
    assert size["P002 @ 0"] > 0.1 and size["P001+P002 @ 1"] > 1.2 * size["P001+P002 @ 0"]
    assert "; P001 was seen with context=0, context=1\n" in text
    evaluate.sample(run, ["P001"], 5)
    assert data.read_h5ad("runs/run/samples.h5ad").obs("context").tolist() == ["0"] * 5 + ["1"] * 5

    # A perturbation that was seen in one context alone has no effect of its own there, and in the
    # other context the same.
    x = data.read_h5ad("screen.h5ad")
    kept = ~((x.obs("condition") == "P001") & (x.obs("context") == 1))
    kept &= ~np.array(["P001+" in label for label in x.obs("condition")])
    obs = {"cell": x.cell_names[kept]} | {
        column: x.obs(column)[kept] for column in ("condition", "split", "context")}
    data.write_h5ad("screen.h5ad", X=x.counts(kept).dense(), obs=obs, var={"gene": x.gene_names})
    train_on_screen("one", *options, "--steps", "10")
    train_on_screen("two", *options[:4], "--min-cells", "12", "--steps", "10")  # other interactions
    evaluate.main(["runs/one", "runs/two", "--iwelbo-particles", "2", "--ate-particles", "2"])
    assert [row["runs"] for row in rows_of(capsys.readouterr().out, "model")[:2]] == ["1", "1"]
    one = evaluate.open_run("runs/one")
    assert not [name for name in one.model_screen.perturbations if name.startswith("P001 @")]
    text = evaluate.predict(one, ["P001"], 20)
    assert "P001 @ 1: no training cells of its own; P001 has " in text and (
        "P001 was seen with context=0, and has no effect of its own here; 100% of its cells have "
        "covariates unseen with P001") in text
    for wrong in (["--interactions", "context"], [*options, "--model", "svae+"]):
        with pytest.raises(data.DataError, match="needs the same --covariate and a model that"):
            train_on_screen("wrong", *wrong)
    with pytest.raises(data.DataError, match="cannot be adapted"):
        train.main(["--adapt", "runs/one", "--data", "screen.h5ad"])


def test_a_run_that_has_ended_says_so_and_goes_on_if_it_is_given_more_steps(folder, capsys):
    train_on_screen("run", "--steps", "12")
    capsys.readouterr()
    train.main(["--resume", "runs/run"])
    assert "runs/run has ended, at step 12;" in capsys.readouterr().out
    os.rename("screen.h5ad", "moved.h5ad")
    with pytest.raises(data.DataError, match="not there any more; --data says where"):
        train.main(["--resume", "runs/run"])
    train.main(["--resume", "runs/run", "--steps", "20", "--data", "moved.h5ad"])
    assert last("run")["progress"]["step"] == 20 and last("run")["progress"]["masks_from"] == 6
    config = json.load(open("runs/run/config.json"))
    assert config["steps"] == 20 and os.path.samefile(config["data"], "moved.h5ad")
    with pytest.raises(data.DataError, match="only --steps, --precision, --device and --data"):
        train.main(["--resume", "runs/run", "--seed", "1"])


def test_a_file_without_a_preset_has_settings_of_its_own_that_flags_override(folder):
    def config(*options):
        """The configuration of a run that is begun with these options."""
        arguments = train.parse_arguments(["--data", "screen.h5ad", *options])
        return train.new_run(*arguments, torch.device("cpu")).config

    own, flags = config(), config("--n-latent", "10", "--lr", "0.1")
    assert own.items() >= train.own_settings(0.64 * 540, 12).items()
    assert (own["n_latent"], own["alpha"]) == (30, 0.1)
    assert (flags["n_latent"], flags["alpha"], flags["lr"]) == (10, 0.3, 0.1)


def test_options_reach_the_model_and_the_optimizer_and_turned_effects_get_new_moments(folder):
    train_on_screen("run", "--steps", "2", "--alpha", "0.3", "--beta", "2.5", "--n-layers", "3",
                    "--effect-layers", "4", "--lr", "0.125", "--mask-lr", "0.5")
    model, (groups, state) = train.build_model(last("run")), (
        last("run")["optimizer"][name] for name in ("param_groups", "state"))
    assert (model.alpha, model.beta) == (0.3, 2.5)
    assert len(model.encoder.residual) == len(model.decoder.residual) == 2
    assert [group["lr"] for group in groups] == [0.125, 0.5, 0.01]  # masks, effects: the last ones
    # After the first step the axes turned.
    assert [{int(state[i]["step"]) for i in group["params"]} for group in groups] == [{2}, {1}, {1}]


def test_a_run_has_a_folder_of_its_own(folder):
    for _ in range(2):
        train.main(["--data", "screen.h5ad", *TINY[4:], "--steps", "1"])
    names = ["screen-sams-vae-basal-sparsest-seed0", "screen-sams-vae-basal-sparsest-seed0-2"]
    assert sorted(os.listdir("runs")) == names
    with pytest.raises(data.DataError, match="runs/screen-sams-vae-basal-sparsest-seed0 exists"):
        train_on_screen(names[0])


def test_the_lines_for_a_notebook_in_the_readme_run(folder, capsys):
    blocks = open(os.path.join(HERE, "README.md"), encoding="utf-8").read().split("```python\n")
    lines = next(block.split("```")[0] for block in blocks if "train.main(" in block)
    exec(lines, {})
    out = capsys.readouterr().out.splitlines()
    assert sum("tensor([" in line for line in out) == 6 and out[-1].startswith("P001 tensor([")


def test_the_fingerprint_depends_on_every_count_and_not_on_how_they_are_stored(folder):
    def fingerprints(x):
        """Of these counts in the file's cells and genes, in memory and in the file."""
        data.write_h5ad("other.h5ad", X=x, var={"gene": file.gene_names}, obs={
            "cell": file.cell_names, "condition": file.obs("condition"),
            "split": file.obs("split")})
        return {data.read_screen("other.h5ad", stream=stream).fingerprint()
                for stream in (False, True)}

    train_on_screen("run", "--steps", "2")
    file = data.read_h5ad("screen.h5ad")
    x, own = file.counts().dense(), {last("run")["fixed"]["fingerprint"]}
    assert fingerprints(x.astype(float)) == fingerprints(iter([file.counts()])) == own
    swapped, same_library = x.copy(), x.copy()
    swapped[7, [0, 1, 2]] += np.array([1, 0, 1], np.uint16)
    same_library[7, 1] += 2  # as many in all, at other genes
    others = swapped, same_library, x[:, ::-1], np.roll(x, 1, axis=0)
    assert len(own.union(*map(fingerprints, others))) == 5
    for main, command in ((train.main, ["--resume", "runs/run"]), (evaluate.main, ["runs/run"])):
        with pytest.raises(data.DataError, match="another order, than the run was trained on"):
            main([*command, "--data", "other.h5ad"])


def test_no_bit_of_a_checkpoint_flips_without_a_word(folder):
    train_on_screen("run", "--steps", "2")
    content, rng = open("runs/run/last.pt", "rb").read(), np.random.default_rng(0)
    for position in rng.integers(0, 8 * len(content), 100).tolist():
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        with open("runs/run/last.pt", "wb") as file:
            file.write(damaged)
        with pytest.raises(data.DataError, match="runs/run/last.pt: is damaged"):
            last("run")


def test_metrics_of_other_weights_and_half_a_line_of_the_log_are_not_believed(folder):
    train_on_screen("run", "--steps", "4")
    evaluate.main(["runs/run", "--iwelbo-particles", "2", "--ate-particles", "2"])
    assert evaluate.evaluated("runs/run", {"ate_particles": 2})
    train_on_screen("other", "--steps", "4", "--seed", "1")  # as many steps, other weights
    os.replace("runs/other/best.pt", "runs/run/best.pt")
    assert evaluate.evaluated("runs/run", {}) is None
    with open("runs/run/log.jsonl", "ab") as file:
        file.write(b'\0\0\n{"step": 5')  # as kills leave it
    assert [line["step"] for line in train.read_log("runs/run")] == [2, 4]
    train.main(["--resume", "runs/run", "--steps", "6"])
    assert [line["step"] for line in train.read_log("runs/run")] == [2, 4, 5, 6]


@pytest.mark.parametrize("error, words", [
    (PermissionError(13, "Permission denied", "runs"), "runs: Permission denied"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
    (data.DataError("a\x1b[2J\n" + "b" * 10**6), "a\ufffd[2J\ufffdbbb")])
def test_what_the_machine_refuses_is_one_sentence_and_status_2(error, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        data.run(main)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1 and len(errors) < 2100


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """A folder with a run of each of three models, on a screen with two batches."""
    folder, here = tmp_path_factory.mktemp("three"), os.getcwd()
    os.chdir(folder)
    data.simulate("screen.h5ad", perturbations=12, cells=20, pairs=10, n_genes=40, batch=1.0)
    for model in ("sams-vae", "svae+", "cvae"):
        train_on_screen(model, "--steps", "40", "--lr", "0.02", "--model", model, "--covariate",
                        "batch", "--device", "cpu", *["--axes", "learned"] * (model != "cvae"))
    os.chdir(here)
    return folder


@pytest.fixture(params=["sams-vae", "svae+", "cvae"])
def three(three_runs, monkeypatch, request):
    """One of these runs: its folder, opened."""
    monkeypatch.chdir(three_runs)
    return evaluate.open_run(f"runs/{request.param}")


@pytest.fixture
def one(three_runs, monkeypatch):
    """The run of SAMS-VAE."""
    monkeypatch.chdir(three_runs)
    return evaluate.open_run("runs/sams-vae")


def layers_of(run, name):
    return data.read_layers(f"{run.folder}/{name}.h5ad")


@pytest.mark.parametrize("effects_from", ["all", "test"])
def test_a_model_with_the_effects_of_the_data_has_an_ate_pearson_of_one(
        folder, effects_from, monkeypatch):
    train_on_screen("run", "--steps", "2")
    screen = data.read_screen("screen.h5ad", split_column="split")
    chosen = (screen.split == "test") | (effects_from == "all")
    x = screen.counts.dense().astype(float)
    y = {"per_10k": 1e4 * x / x.sum(1, keepdims=True)}
    y["log_normalised"] = np.log2(1 + y["per_10k"])

    def of_the_data(model, arms, *arguments, **options):
        """The means of the chosen cells, where `expected_expression` has those of a model."""
        has = [chosen & (screen.d == d).all(1) for d in arms.numpy()]
        return {scale: torch.from_numpy(np.stack([
            values[cells].mean(0) + 1e-9 if cells.any() else np.ones(40) for cells in has]))
            for scale, values in y.items()}

    monkeypatch.setattr(evaluate, "expected_expression", of_the_data)
    monkeypatch.setattr(evaluate, "write_top_genes", lambda *_: None)
    metrics = evaluation("run", effects_from=effects_from)
    for scale, part in itertools.product(evaluate.SCALES, ("all", "pairs", "held_out", "test")):
        model, mean, none, limit = (evaluate.score(metrics, scale, part, row) for row in (
            "model", "perturbed_mean", "no_change", "noise_limit"))
        for name in ("pearson", "r_squared", "discrimination", "discrimination_by_prediction"):
            assert model[name] == pytest.approx(1, abs=1e-5)
        # Its control is the data's; the other side has the control of the training cells.
        assert model["from_mean"] > 0.97 and model["weighted_r_squared"] > 0.9
        assert mean["pearson"] < 0.99 and limit["pearson"] < 1 and none["pearson"] is None


@pytest.mark.parametrize("depth", [100, 10_000])
def test_the_true_model_agrees_with_cells_of_any_depth_as_well_as_their_noise_allows(
        folder, depth):
    # A model with clear effects, whose own cells take the place of the screen's. Only with many of
    # them, and many particles, is there little noise: that takes seconds.
    data.simulate("screen.h5ad", perturbations=8, cells=400, n_controls=1500, pairs=6, n_genes=40)
    train_on_screen("run", "--steps", "1", "--axes", "learned", "--min-cells", "0")
    run = train.Run.load("runs/run", "last.pt")
    torch.manual_seed(0)
    for name, values in run.model.state_dict().items():
        if name.startswith("decoder") and name.endswith("weight"):
            values *= 3
        elif name == "mask_logits":
            values[:] = torch.where(torch.rand_like(values) < 0.3, 20.0, -20.0)
        elif name.startswith(("f_emb", "effect")):
            values += torch.randn_like(values)
        elif name == "log_theta":
            values[:] = 1.0
    log_rho, c = torch.empty(len(run.screen.d), 40), torch.from_numpy(run.screen.c)
    for d in np.unique(run.screen.d, axis=0):
        cells = np.flatnonzero((run.screen.d == d).all(1))
        log_rho[cells] = sample_frequencies(run.model, torch.from_numpy(d), c[cells],
                                            torch.randn(len(cells), 4))
    library = depth * torch.randn(len(log_rho)).mul(0.6).exp()
    with h5py.File("screen.h5ad", "a") as file:
        file["X"][...] = sample_counts(run.model, log_rho, library).numpy().clip(0, 65535)
    run.fixed["fingerprint"] = data.read_screen("screen.h5ad", split_column="split").fingerprint()
    run.save("best.pt"), run.save("last.pt")
    for cells in ("all", "test"):
        metrics = evaluation("run", 2, 2000, effects_from=cells, basal="prior")
        for scale in evaluate.SCALES:
            model, limit = (evaluate.score(metrics, scale, "all", row)["pearson"]
                            for row in ("model", "noise_limit"))
            assert model == pytest.approx(limit, abs=0.02) and (cells == "test" or model > 0.99)
    # Cells of another depth have other logarithms.
    metrics = evaluation("run", 2, 2000, library=10**6 // depth, effects_from="all", basal="prior")
    assert evaluate.score(metrics, "log_normalised", "all", "model")["pearson"] < 0.97


def test_users_are_warned_of_what_is_not_to_be_believed():
    def effects(model, limit=0.8):
        """Rows of a model with this R2, where the own mean has 0.5 and the other ones 0.4."""
        rows = dict.fromkeys(evaluate.BASELINES, {"r_squared": 0.4}) | {
            "model": {"r_squared": model}, "own_mean": {"r_squared": 0.5},
            "noise_limit": {"pearson": limit}}
        return [{"scale": scale, "group": "all", "row": row, **values}
                for scale in evaluate.SCALES for row, values in rows.items()]

    good = {"mask": {}, "config": {"axes": "sparsest", "adapt": None}, "masks_from": 500,
            "step": 900, "mask_mean_probability": 0.1, "n_trained_perturbations": 10,
            "n_empty_masks": 3, "effects": effects(0.6), "options": {"effects_from": "test"}}
    assert evaluate.warnings_of(good) == []
    for changed, words in (({"step": 550}, "hardly been trained, in 50 steps"),
                           ({"n_empty_masks": 6}, "6 of 10 perturbations are empty"),
                           ({"effects": effects(0.6, 0.0)}, "do not stand out of their noise"),
                           ({"effects": effects(0.45)}, "no better than own mean (0.500)")):
        assert words in evaluate.warnings_of(good | changed)[0]


FEW = ["--iwelbo-particles", "5", "--ate-particles", "20"]


def rows_of(out, *first):
    """The rows of a Markdown table whose header begins with these columns, as dicts."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    start = next(i for i, cells in enumerate(lines) if cells[:len(first)] == list(first))
    return [dict(zip(lines[start], cells)) for cells in itertools.takewhile(
        bool, lines[start + 2:])]


def metrics_of(runs):
    return [json.load(open(f"{run}/metrics.json")) | {"folder": run} for run in runs]


def test_runs_become_rows_of_one_table_and_are_not_evaluated_twice_unless_asked(
        folder, capsys, monkeypatch):
    for seed in "01":
        train_on_screen(f"sams{seed}", "--steps", "4", "--seed", seed, "--axes", "learned")
    train_on_screen("cvae", "--steps", "4", "--model", "cvae")
    runs = ["runs/cvae", "runs/sams0", "runs/sams1"]
    counted, plain = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda run, **options: (
        counted.append(run.folder), plain(run, **options))[1])
    evaluate.main([*runs, *FEW])
    sams, cvae = rows_of(capsys.readouterr().out, "model")[:2]
    metrics = metrics_of(runs[1:])
    values = [m["iwelbo"] for m in metrics]
    assert sams["test IWELBO"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert (sams["model"], sams["runs"], cvae["model"]) == ("sams-vae", "2", "cvae")
    agreement, chance = evaluate.mask_agreement([m["mask"] for m in metrics])
    assert sams["masks agree"] == f"{agreement:.3f} (chance {chance:.3f})"
    evaluate.main([*runs, runs[1]])  # without options: whatever is there; a run twice is one
    assert counted == runs
    assert rows_of(capsys.readouterr().out, "model")[0]["runs"] == "2"
    evaluate.main([runs[0], "--again", *FEW])
    assert len(counted) == 4
    # A damaged run does not keep others from the table.
    shutil.copy("screen.h5ad", "runs/cvae/best.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(runs)
    out, errors = capsys.readouterr()
    assert "error: runs/cvae" in errors and "| sams-vae" in out


def test_runs_are_averaged_only_over_seeds_and_never_over_data_or_settings():
    def run(*options, **changed):
        """What tables know of a run."""
        return {"config": configuration("--data", "x.h5ad", *options), "fingerprint": "x",
                "options": {"library": 9}, "done": True, "last_step": 4} | changed

    runs = [run(), run("--seed", "1", "--split-seed", "2", "--log-every", "3"), run("--beta", "2"),
            run("--covariate", "batch"),  # of a simulated screen no fingerprint has this
            run(done=False), run(fingerprint="y"), run(options={"library": 7}),
            run("--split", "norman-ood")]
    assert [[len(row) for row in evaluate.grouped(members, evaluate.settings)]
            for members in evaluate.tables_of(runs)] == [[2, 1, 1, 1], [1], [1], [1]]


def test_norman_runs_are_compared_with_sams_vae_without_combinations_and_every_figure_is_drawn(
        folder, capsys):
    for model, fraction in (("cvae", "0"), ("cvae", "1"), ("sams-vae", "0")):
        train.main(["--data", "screen.h5ad", "--preset", "norman-ood", "--layer", "X",
                    "--gene-column", "", "--perturbation-column", "condition", *TINY[4:],
                    "--effect-layers", "1", "--steps", "2", "--model", model,
                    "--train-combinations", fraction])
    runs = sorted(f"runs/{name}" for name in os.listdir("runs"))
    evaluate.main([*runs, *FEW])
    rows = {(row["model"], row["f"]): row
            for row in rows_of(capsys.readouterr().out, "model", "guide", "f")}
    of_cvae, _, of_sams = (m["iwelbo"] for m in metrics_of(runs))
    assert rows["sams-vae", "0"]["difference"] == "reference"
    assert float(rows["cvae", "0"]["difference"].split()[0]) == pytest.approx(
        of_cvae - of_sams, abs=0.006)
    pytest.importorskip("matplotlib")
    evaluate.main([*runs[1:], "--figures"])
    for name in (*(f"{runs[2]}/{figure}.png" for figure in ("training", "effects", "masks")),
                 f"{runs[1]}/effects.png", "runs/norman-ood.png"):
        assert open(name, "rb").read(4) == b"\x89PNG"


def test_predictions_are_the_effects_of_any_set_of_known_perturbations(three, capsys):
    run, model = three, three.config["model"]
    seen = next(c for c, part in zip(run.screen.conditions, run.screen.split)
                if "+" in c and part == "train")
    names = ["P001", "+".join(reversed(seen.split("+"))), "P001+P002+P003", "control"]
    options = ["--ate-particles", "5000", "--basal", "prior"]
    evaluate.main([run.folder, "--predict", *names, *options])
    out, predicted = capsys.readouterr().out, layers_of(run, "predictions")
    effect, expected = predicted["effect_counts"], predicted["expected_counts"]
    # By each batch, and averaged as often as real cells of the condition are in it.
    by_batch = [evaluate.expected(run, evaluate.dosages_of(run, names)[0],
                                  torch.full((4, 1), batch), torch.randn(5000, 4),
                                  evaluate.library_of(run)) for batch in (0, 1)]
    for i, name in enumerate(names[:1] + [seen] + names[2:]):
        share = evaluate.population(run, name, 5000, "prior", 0)[2].numpy().mean()
        for scale in evaluate.SCALES:
            without, treated = ((1 - share) * by_batch[0][scale][j] + share * by_batch[1][scale][j]
                                for j in (3, i))
            np.testing.assert_allclose(predicted[f"expected_{scale}"][i], treated, rtol=0.15,
                                       atol=0.2)
            found = predicted[f"effect_{scale}"][i]
            assert (found == 0).all() or evaluate.pearson(found, treated - without) > 0.97
    assert (effect[3] == 0).all() and (effect[0] != 0).any()
    np.testing.assert_allclose(predicted["log2_fold_change"],
                               np.log2(expected / (expected - effect)), atol=1e-3)
    n = ((run.screen.conditions == seen) & (run.screen.split == "train")).sum()
    assert f"{seen}: {n} training cells" in out
    # Three at once are no label of the data.
    assert (effect[2] == 0).all() == (model == "svae+")
    assert ("P003 WAS NEVER SEEN: IT HAS NO EFFECT OF ITS OWN" in out) == (model == "svae+")
    # The same whatever else is asked for.
    evaluate.main([run.folder, "--predict", *names[1:3], *options])
    alone = layers_of(run, "predictions")
    assert all((alone[name] == values[1:3]).all() for name, values in predicted.items())
    with pytest.raises(data.DataError, match="these come near: P0"):
        evaluate.main([run.folder, "--predict", "P01"])


def test_basal_states_of_an_arm_are_draws_of_q_moved_to_the_mean_of_its_own_kind_of_cells(
        one, monkeypatch):
    run, screen, train_cells = one, one.screen, one.split["train"]
    is_treated = screen.conditions != "control"

    def encode(x, z_pert, d, c):
        """q: treated cells are 1.5 away in the first latent, and none in others, up to noise."""
        torch.manual_seed(0)
        loc = torch.randn(len(x), 4) + torch.tensor([1.5, 0, 0, 0]) * (d != NONE).any(1)[:, None]
        return loc, torch.full_like(loc, 0.25)

    monkeypatch.setattr(run.model, "encode", encode)
    c = np.repeat([[0], [1]], 5000, axis=0)
    treated, control = evaluate.basal_states(run, c, "aggregated")
    for batch in (0, 1):
        cells = train_cells[screen.c[train_cells, 0] == batch]
        n_treated, n_control = is_treated[cells].sum(), (~is_treated[cells]).sum()
        se = math.sqrt(1 / n_treated + 1 / n_control)
        # The same draws, apart by the difference of means; what is chance in it is taken away.
        difference = treated[c[:, 0] == batch] - control[c[:, 0] == batch]
        assert difference.std(0).max() < 1e-5 and abs(difference[0, 0] - 1.5) < 3 * se
        assert (difference[0, 1:].abs() < 2 * se).all() and (difference[0, 1:] == 0).any()
        both = (n_treated * treated + n_control * control)[c[:, 0] == batch] / len(cells)
        assert both[:, 0].mean() == pytest.approx(1.5 * n_treated / len(cells), abs=0.2)
        # Around their mean, noise of cells (1) and of q (0.25).
        assert treated[c[:, 0] == batch].var(0).numpy() == pytest.approx(1.25, rel=0.2)
    # Values of covariates that no training cell has, and both arms of the prior: draws of N(0, I).
    for states in (evaluate.basal_states(run, c + 7, "aggregated"),
                   evaluate.basal_states(run, c, "prior")):
        assert torch.equal(*states) and abs(states[0].mean()) < 0.01
    assert [evaluate.basal_of(types.SimpleNamespace(config={"preset": preset}))
            for preset in (None, "replogle", "simulated")] == ["aggregated", "prior", "prior"]
    # So a difference that all treated cells share is in their effects, or is not.
    monkeypatch.setattr(run.model, "mask_probability", lambda: torch.zeros(12, 4))
    monkeypatch.setattr(run.model, "sample_mask", lambda t, n: (
        torch.zeros(n, len(t), 4), torch.zeros(len(t))))
    options = evaluate.DEFAULTS | {"effects_from": "all", "library": 5000, "ate_particles": 500,
                                   "own_targets": True}
    for basal, is_there in (("prior", False), ("aggregated", True)):
        evaluate.effects(run, options | {"basal": basal})
        effect = layers_of(run, "effects")["model_counts"]
        assert (np.abs(effect).max(1) > 10).all() == is_there and (effect != 0).any() == is_there


def test_the_interval_of_an_effect_holds_nine_of_ten_cells_and_moves_with_basal_states(one):
    model, (d,) = one.model, evaluate.dosages_of(one, ["P001"])[0]
    treated, c = torch.randn(1000, 4), torch.zeros(1000, 1, dtype=torch.long)
    rho = {name: model.log_rho(z, torch.full_like(d, NONE), c).exp().detach()
           for name, z in (("treated", treated), ("control", treated - 1))}
    low, high = [], []
    for control in (treated, treated - 1):
        torch.manual_seed(0)
        for ends, end in zip((low, high), evaluate.interval_of_effect(model, d, treated, control,
                                                                      c)):
            ends.append(end)
    torch.manual_seed(0)
    effect = 1e4 * (sample_frequencies(model, d, c, treated).exp() - rho["treated"]).numpy()
    inside = (effect >= low[0]) & (effect <= high[0])
    assert inside.mean(0) == pytest.approx(0.9, abs=0.003)
    shift = 1e4 * (rho["treated"] - rho["control"]).mean(0).numpy()
    for ends in (low, high):
        np.testing.assert_allclose(ends[1] - ends[0], shift, atol=0.01)


def test_effects_beside_predictions_are_those_of_the_data_with_their_standard_error(one):
    x, (labels, batch) = one.screen.counts.dense().astype(float), (
        one.screen.conditions, one.screen.c[:, 0])
    y, effect, variance = 1e4 * x / x.sum(1, keepdims=True), 0, 0
    for v in (0, 1):  # within batches, weighted by the condition's cells
        cells, controls = (y[(labels == name) & (batch == v)] for name in ("P003", "control"))
        share = len(cells) / (labels == "P003").sum()
        effect += share * (cells.mean(0) - controls.mean(0))
        variance += share**2 * sum(some.var(0, ddof=1) / len(some) for some in (cells, controls))
    found = evaluate.effects_of_data(one, ["P003", "control", "P001+P002+P003"])
    np.testing.assert_allclose(found.pop("P003"), [effect, variance**0.5], rtol=1e-3, atol=1e-2)
    assert not found.keys() & {"control", "P001+P002+P003"}


def write_controls(name, x, genes, batch):
    """A file of unperturbed cells alone."""
    data.write_h5ad(name, X=x, var={"gene": genes}, obs={
        "cell": [f"c{i}" for i in range(len(x))], "condition": ["control"] * len(x),
        "batch": np.full(len(x), batch)})


def test_predictions_for_another_file_are_what_its_control_cells_would_become(one):
    run, genes = one, one.screen.gene_names
    x = run.screen.counts.dense()[(run.screen.conditions == "control") & (run.screen.c[:, 0] == 0)]
    # The controls of one batch, genes in another order and one more.
    order = np.random.default_rng(0).permutation(40)
    write_controls("other.h5ad", np.column_stack([x[:, order], np.ones(len(x), int)]),
                   [*genes[order], "more"], 0)
    # Basal states are draws from the cells' posterior.
    basal, _, c, library = evaluate.population(run, "P001", 200 * len(x), "", 0,
                                               evaluate.controls_of_file(run, "other.h5ad"))
    with torch.no_grad():
        loc, var = run.model.encode(torch.from_numpy(x[:1].astype("f4")), torch.zeros(1, 1, 4),
                                    torch.full((1, 1), NONE), c[:1])
    draws = basal[library == x[0].sum()]  # of the first cell
    torch.testing.assert_close(draws.mean(0), loc.reshape(4), rtol=0, atol=0.3)
    torch.testing.assert_close(draws.var(0), var.reshape(4), rtol=0.5, atol=0)
    # Depth and batch are the other file's.
    write_controls("thin.h5ad", x // 10, genes, 1)
    predict = [run.folder, "--predict", "control", "P001", "--sample", "50"]
    evaluate.main([*predict, "--data", "thin.h5ad"])
    assert (layers_of(run, "predictions")["effect_counts"] == 0).all(1).tolist() == [True, False]
    samples = data.read_h5ad(f"{run.folder}/samples.h5ad")
    assert (samples.obs("batch").astype(int) == 1).all()
    assert samples.counts().dense().sum(1).mean() == pytest.approx((x // 10).sum(1).mean(), rel=0.2)
    write_controls("other.h5ad", x, ["new", *genes[1:]], 0)
    with pytest.raises(data.DataError, match="1 of the 40 genes wanted.*G001"):
        evaluate.main([*predict, "--data", "other.h5ad"])


def test_a_perturbation_s_own_gene_is_left_out_of_its_metrics_and_reported(folder):
    # Twelve perturbations of the names of genes, each of which lowers its own to a tenth.
    data.simulate("screen.h5ad", perturbations=12, cells=60, pairs=0, n_genes=40)
    file = data.read_h5ad("screen.h5ad")
    names, x = file.obs("condition"), file.counts().dense()
    for g in range(12):
        x[names == f"P{g + 1:03d}", g] //= 10
    data.write_h5ad("screen.h5ad", X=x, var={"gene": file.gene_names}, obs={
        "cell": file.cell_names, "split": file.obs("split"),
        "condition": [n.replace("P", "G") + "_1" * (n != "control") for n in names]})
    train_on_screen("run", "--steps", "2")
    metrics = [evaluation("run", 2, 50, own_targets=counted) for counted in (None, True)]
    change = metrics[0]["on_target"]
    assert metrics[0]["n_targets"] == 12 and change["data"] < -0.7 and abs(change["model"]) < 0.2
    without, counted = (evaluate.score(m, "counts", "all", "own_mean") for m in metrics)
    assert without["r_squared"] < counted["r_squared"]


def test_tables_name_the_genes_of_conditions_and_the_latents_of_masks(folder):
    train_on_screen("run", "--steps", "10")
    evaluate.main(["runs/run", *FEW])
    run = evaluate.open_run("runs/run")
    rows = list(csv.DictReader(open("runs/run/top_genes.csv")))
    assert len(rows) == 20 * (22 + 4)  # conditions and latents
    layers, genes = layers_of(run, "effects"), list(run.screen.gene_names)
    strongest = np.argsort(-np.abs(layers["model_log_normalised"][0]))
    for row, g in zip(rows[:20], strongest):
        assert (row["name"], row["gene"]) == ("P001", genes[g])
        for column, layer in (("effect_log_normalised", "model_log_normalised"),
                              ("data_effect_log_normalised", "data_log_normalised"),
                              ("data_standard_error", "data_se_log_normalised")):
            assert float(row[column]) == pytest.approx(layers[layer][0, g], rel=1e-4)
    masks, probability = list(csv.DictReader(open("runs/run/masks.csv"))), (
        run.model.mask_probability())
    assert len(masks) == int((probability > 0.01).sum())
    t, latent = run.screen.perturbations.index(masks[5]["perturbation"]), int(masks[5]["latent"])
    assert float(masks[5]["probability"]) == pytest.approx(probability[t, latent].item(), rel=1e-4)


def test_latents_are_written_for_every_cell_with_its_name_and_labels(three):
    evaluate.main([three.folder, "--latents"])
    with h5py.File(f"{three.folder}/latents.h5ad") as file:
        z, z_basal = file["obsm/X_z"][()], file["obsm/X_z_basal"][()]
        offset = file["uns/offset"][()] if "offset" in file["uns"] else np.zeros((12, 4))
        condition, split = (data._column(file, "obs", name) for name in (
            "condition", "sams_vae_split"))
    assert condition.tolist() == three.screen.obs("condition").tolist()
    assert split.tolist() == three.screen.split.tolist()
    control = three.screen.conditions == "control"
    np.testing.assert_allclose(z[control], z_basal[control], atol=1e-5)
    assert (np.abs(z - z_basal).max() < 1e-6) == (three.config["model"] == "cvae")
    d = three.model_screen.d[~control][0]
    np.testing.assert_allclose((z - z_basal)[~control][0], offset[d[d != NONE]].sum(0), atol=1e-5)


def test_a_loss_that_is_not_finite_stops_training_with_a_sentence_and_is_not_saved(folder):
    with pytest.raises(data.DataError, match="the loss was not finite before step 2:"):
        train_on_screen("bad", "--steps", "50", "--lr", "4e9")
    assert last("bad")["progress"]["step"] == 0


def test_training_starts_from_the_training_cells_unless_a_preset_says_otherwise(folder):
    train_on_screen("run", "--steps", "1", "--lr", "1e-9", "--weight-decay", "0")
    model, split = last("run")["model"], last("run")["split"]
    batches = data.Batches(data.read_screen("screen.h5ad"))
    *_, log_frequency, log_theta = data.training_statistics(batches, split["train"].numpy())
    torch.testing.assert_close(model["decoder.last.bias"], log_frequency)
    torch.testing.assert_close(model["log_theta"], log_theta)
    train_on_screen("zero", "--steps", "1", "--lr", "1e-9", "--start", "zero")
    assert last("zero")["model"]["log_theta"].abs().max() < 1e-6


def test_the_main_job_simulates_trains_evaluates_and_writes_its_results(folder, capfd):
    train.main(["--steps", "30", "--name", "demo", *TINY])
    out = capfd.readouterr().out
    for words in ("test IWELBO, predictive", "test IWELBO, joint", "true masks: precision",
                  "of 30 conditions held out of training", "shrunken mean", "noise limit"):
        assert words in out
    metrics = json.load(open("runs/demo/metrics.json"))
    for key in ("iwelbo", "iwelbo_joint_per_cell", "iwelbo_se", "mask_f1", "latent_mcc"):
        assert isinstance(metrics[key], float), key
    cells = list(csv.DictReader(open("runs/demo/iwelbo.csv")))
    assert np.mean([float(row["iwelbo"]) for row in cells]) == pytest.approx(metrics["iwelbo"])
    assert {group: evaluate.score(metrics, "counts", group, "model")["n_conditions"]
            for group in ("all", "pairs", "held_out", "test")} == {
        "all": 72, "pairs": 60, "held_out": 30, "test": 72}
    assert {*os.listdir("runs/demo")} == {
        "best.pt", "config.json", "effects.h5ad", "iwelbo.csv", "last.pt", "log.jsonl", "masks.csv",
        "metrics.json", "simulated.h5ad", "top_genes.csv", "warm0.pt"}


def configuration(*arguments):
    """The configuration that these arguments of train.py give."""
    return train.configuration(*train.parse_arguments(arguments))


def test_presets_hold_the_settings_of_the_paper_and_flags_override_them():
    common = dict(lr=3e-4, weight_decay=1e-6, batch_size=512, particles=5, n_layers=1, n_hidden=400,
                  mask_b=2.0, axes="learned", start="zero", min_cells=0, correlated_basal=True,
                  correlated_effects=True)
    replogle = common | dict(steps=150_000, clip=0.0, n_latent=100, effect_layers=2,
                             effect_hidden=200, alpha=0.001, split="random", split_seed=0,
                             perturbation_column="sgID_AB", control=["*non-targeting*"])
    norman = common | dict(steps=30_000, clip=100.0, n_latent=200, effect_layers=4,
                           effect_hidden=400, alpha=0.01, layer="counts",
                           gene_column="highly_variable", one_hot_prefix="guide_")

    def of_preset(name, *arguments):
        """The configuration of a file with this preset."""
        return configuration("--data", "x", "--preset", name, *arguments)

    assert of_preset("replogle").items() >= replogle.items()
    for name in ("norman-ood", "norman-data-efficiency"):
        assert of_preset(name).items() >= (norman | {"split": name}).items()
    assert of_preset("norman-ood", "--n-latent", "7")["n_latent"] == 7
    # A file's own split, and other labels, take the place of what the preset says.
    changed = of_preset("norman-ood", "--split-column", "fold", "--perturbation-column", "y")
    assert (changed["split"], changed["split_column"]) == ("random", "fold")
    assert (changed["perturbation_column"], changed["one_hot_prefix"]) == ("y", None)


@pytest.mark.parametrize("arguments, words", [
    (["--axes", "sparsest", "--correlated-effects"], "needs --axes learned"),
    (["--preset", "norman-ood"], "needs --data"),
    (["--lr", "nan"], "--lr: must be positive and below 2^32, not nan"),
    (["--adapt", "runs/x", "--data", "x", "--n-latent", "3"], "come from runs/x")])
def test_options_that_cannot_be_or_exclude_each_other_are_refused(arguments, words, capsys):
    with pytest.raises((SystemExit, data.DataError)) as refused:
        configuration(*arguments)
    assert words in capsys.readouterr().err + str(refused.value)


@pytest.mark.parametrize("arguments, axes, basal, effects", [
    (["--data", "x"], "sparsest", True, False),
    (["--data", "x", "--preset", "replogle"], "learned", True, True),
    (["--data", "x", "--preset", "replogle", "--axes", "sparsest"], "sparsest", True, False),
    (["--model", "cvae", "--correlated-effects"], "learned", False, False)])
def test_masks_are_in_the_sparsest_axes_unless_the_paper_the_user_or_the_model_says_otherwise(
        arguments, axes, basal, effects):
    assert configuration(*arguments).items() >= dict(
        axes=axes, correlated_basal=basal, correlated_effects=effects).items()


def test_wrong_files_and_options_end_with_one_sentence_status_2_and_no_folder(
        folder, monkeypatch, capsys):
    log = write_modern(folder / "log.h5ad", lambda f: f.create_dataset("X", data=np.log1p(MATRIX)))
    for main, *arguments in (
            (data.main, log), (train.main, "--data", log), (evaluate.main, "runs/none"),
            (train.main, "--data", "screen.h5ad", "--perturbation-column", "split"),
            (train.main, "--resume", "runs/none")):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as stopped:
            data.run(main)
        errors = capsys.readouterr().err
        assert stopped.value.code == 2 and errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
    assert os.listdir("runs") == []
    for arguments, status in ((["train.py", "--data", log], 2), (["data.py", "screen.h5ad"], 0)):
        done = subprocess.run([sys.executable, os.path.join(HERE, arguments[0]), *arguments[1:]],
                              capture_output=True, text=True)  # as a user does
        assert (done.returncode, done.stderr.count("\n")) == (status, status // 2), done.stderr


def test_a_streamed_run_is_evaluated_as_one_in_memory(folder, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 512)
    train_on_screen("run", "--steps", "4", "--stream")
    found = []
    for stream in (True, False):
        for name in ("last.pt", "best.pt"):
            run = train.Run.load("runs/run", name)
            run.config["stream"] = stream
            run.save(name)
        run = evaluate.open_run("runs/run")
        assert isinstance(run.screen.counts, data.StoredCounts if stream else data.Counts)
        metrics = evaluate.evaluate(run, iwelbo_particles=4, ate_particles=20)
        evaluate.write_latents(run)
        with h5py.File("runs/run/latents.h5ad") as file:
            found.append([metrics["iwelbo"], metrics["effects"], file["obsm/X_z"][()].tolist()])
    assert found[0] == found[1]


def test_random_numbers_differ_between_seeds_and_steps():
    draws = set()
    for seed, step in itertools.product(range(4), repeat=2):
        train.seed_from_here(types.SimpleNamespace(
            seed=seed, progress=train.Progress(step)))
        draws.add(torch.randn(1).item())
    assert len(draws) == 16


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_a_line_that_says_how(folder):
    running = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "train.py"), "--data", "screen.h5ad", "--name", "run",
         "--steps", "1000000", *TINY[4:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job may ignore it
    deadline = time.time() + 120
    while not train.read_log("runs/run") and time.time() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, errors = running.communicate(timeout=120)
    assert (running.returncode, errors) == (130, "")
    assert out.splitlines()[-1] == (
        "stopped; to go on from the last validation: python train.py --resume runs/run")
    step = last("run")["progress"]["step"]
    train.main(["--resume", "runs/run", "--steps", str(step + 3)])
    assert last("run")["progress"]["step"] == step + 3


# ============================================================================================
# Damaged files and killed runs, some; many of them, and the speed, with python -m pytest -m slow
# ============================================================================================


@pytest.fixture(autouse=True)
def slow_only_on_request(request):
    if request.node.get_closest_marker("slow") and not request.config.getoption("-m"):
        pytest.skip("takes long: python -m pytest -m slow")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a marker that no configuration file names
    SLOW = pytest.mark.slow


def in_child(function):
    """How function() ends in a child process with limits of time and memory: "read", "refused",
    "endless" (which HDF5 itself is in some damaged text), or worse."""
    import resource  # not on Windows

    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (2, resource.RLIM_INFINITY))
            resource.setrlimit(resource.RLIMIT_DATA, (2**33, resource.RLIM_INFINITY))
            function()
            os._exit(0)
        except data.DataError as error:
            os._exit(1 if str(error).isprintable() else 2)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    return {0: "read", 256: "refused", signal.SIGXCPU: "endless"}.get(status, f"status {status}")


def damage(content, rng):
    """A copy of the bytes with a defect, as of disks, downloads and attackers."""
    start, part = int(rng.integers(9, len(content))), rng.bytes(2 ** rng.integers(10))
    if rng.integers(2):  # a number, at a place where numbers are
        number = (0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1)[rng.integers(6)]
        start, part = start // 8 * 8, number.to_bytes(8, "little")
    rest = part + content[start + len(part):]
    return content[:start] + (rest if rng.integers(4) else b"")


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
@pytest.mark.parametrize("n", [60, pytest.param(20_000, marks=SLOW)])  # 60: some 10 seconds
def test_every_damaged_file_is_read_or_refused_in_a_sentence(n, tmp_path):
    def use():
        """Read all that can be read; the rest may be refused."""
        for read in (data.read_pathways, data.read_simulation, lambda path: data.prepare(
                path, tmp_path / "out.h5ad")):
            with contextlib.suppress(data.DataError):
                read(path)
        data.read_screen(path, perturbation_column="condition", control="c*",
                         combination_separator="+")

    path, rng, outcomes = tmp_path / "x.h5ad", np.random.default_rng(n), collections.Counter()
    data.simulate(path, perturbations=4, cells=5, n_genes=12, n_controls=9, pairs=2)
    files = [path, write_legacy(tmp_path / "legacy")] + [
        write_modern(tmp_path / form, FORMS[form])
        for form in ("dense f4", "dense gzip", "csr int64 scrambled", "csc uint8")]
    whole = [open(file, "rb").read() for file in files]
    for i in range(-len(whole), n):
        content = whole[i % len(whole)]
        path.write_bytes(content if i < 0 else damage(content, rng))
        ended = in_child(use)
        outcomes[ended] += 1
        assert ended == "read" or i >= 0 and ended in ("refused", "endless"), (i, ended)
    assert min(outcomes["read"], outcomes["refused"]) > n / 5 > 4 * outcomes["endless"], outcomes


@pytest.mark.skipif(os.name != "posix", reason="kills")
@pytest.mark.parametrize("n", [1, pytest.param(100, marks=SLOW)])
def test_a_run_that_is_killed_at_any_time_goes_on_as_if_it_had_not_been(n, folder):
    def ends(*arguments, log="", size=math.inf):
        """Whether a process that trains ends before its log has this size; if not, it is killed."""
        running = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "train.py"), *arguments],
            stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while running.poll() is None and not (os.path.exists(log) and os.path.getsize(log) > size):
            time.sleep(rng.uniform(0, 0.01))
        running.kill()
        return running.wait() == 0

    rng, options = np.random.default_rng(n), [
        "--data", "screen.h5ad", "--split-column", "split", "--warm-starts", "1", *TINY[4:],
        "--steps", "200", "--validate-every", "2", "--log-every", "1", "--name"]
    assert ends(*options, "whole")
    whole, size = outcome("runs/whole"), os.path.getsize("runs/whole/log.jsonl")
    for i in map(str, range(n)):
        assert not ends(*options, i, log=f"runs/{i}/log.jsonl", size=rng.uniform(0.1, 0.8) * size)
        assert ends("--resume", f"runs/{i}")
        assert_same(outcome(f"runs/{i}"), whole)
        assert not [file for file in os.listdir(f"runs/{i}") if file.endswith(".writing")]


def products_of(function):
    """A function that repeats the matrix products of function() alone, of random numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode  # undocumented

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                pairs.append([torch.rand_like(matrix) for matrix in arguments[-2:]])
            return operation(*arguments, **(options or {}))

    def repeat():
        for a, b in pairs:
            a @ b

    pairs = []
    with Products():
        function()
    return repeat


@SLOW
def test_speed_of_a_step_and_of_the_iwelbo_beside_their_own_matrix_products():
    # As in the preset replogle, on random counts, none 0, as sparse ones are slowest; each beside
    # the matrix products of its layers alone, in the same minutes: no code can be faster.
    threads = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    torch.set_num_threads(int(subprocess.check_output(threads)))
    device = train.choose_device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration("--data", "random", "--preset", "replogle")
    rng, n_cells, n_genes, n_perturbations = np.random.default_rng(0), 118_461, 1187, 722
    counts = data.from_dense(rng.integers(1, 9, (n_cells, n_genes), np.uint8))
    d, c = rng.integers(0, n_perturbations, (n_cells, 1)), np.zeros((n_cells, 0), np.int64)
    batches = data.Batches(types.SimpleNamespace(counts=counts, d=d, c=c), device)
    shuffle = data.Shuffle(batches, np.arange(n_cells), config["batch_size"], 0)
    model = train.MODELS[config["model"]](
        np.bincount(d.ravel()), np.full(n_genes, 1.5), np.full(n_genes, 0.7),
        **{data.option_name(flag): config[data.option_name(flag)]
           for flag, *_ in train.MODEL_OPTIONS}).to(device)
    optimizer = train.new_optimizer(types.SimpleNamespace(
        config=config, device=device, model=model, n_known=None, optimizer_state=None))

    def step(*batch):
        optimizer.zero_grad()
        (-train.objective(model, *batch, config)[0]).backward()
        optimizer.step()

    def iwelbo_of_4000_cells():
        iwelbo(model, batches.in_order(np.arange(4000)), 100)

    launch, times = train.launch_once(step, device), collections.defaultdict(list)
    for _ in range(5):  # on a GPU, the fifth is the first as in training
        launch(*next(shuffle))
    for repeats, functions in (
            (30, {"step": lambda: launch(*next(shuffle)),
                  "products": products_of(lambda: step(*next(shuffle)))}),
            (3, {"iwelbo": iwelbo_of_4000_cells,
                 "iwelbo_products": products_of(iwelbo_of_4000_cells)})):
        for name, function in [*functions.items()] * repeats:  # in turn, as machines are noisy
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    result = {name: float(np.median(seconds)) for name, seconds in times.items()}
    result["step_ratio"] = result["step"] / result["products"]
    result["iwelbo_ratio"] = result["iwelbo"] / result["iwelbo_products"]
    print(f"\nIn seconds, on {device}:", json.dumps(result, indent=2))
    with open("benchmark.json", "w") as file:
        json.dump({"config": config, "device": str(device)} | result, file, indent=2)
    torch.set_num_threads(1)
