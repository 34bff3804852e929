"""Evaluate and use trained runs: likelihood, treatment effects, masks, tables, figures.

    python evaluate.py runs/NAME                          one run
    python evaluate.py runs/*                             a table: models and guides, over seeds
    python evaluate.py runs/NAME --ate-particles 10000    as in the paper's Table 1
    python evaluate.py runs/NAME --figures                PNG files (needs matplotlib)
    python evaluate.py runs/NAME --predict "A+B" C        what these perturbations would do
    python evaluate.py runs/NAME --predict C --sample 99  and as many simulated cells, for scanpy
    python evaluate.py runs/NAME --latents                latent states of all cells, for scanpy

Writes, beside the checkpoint, metrics.json (`evaluate` describes it), effects.h5ad (condition x
gene effects by the model and by the data), and the tables top_genes.csv, masks.csv and iwelbo.csv.
In reading order: one function a metric; what the data say, and baselines; the evaluation of a run;
tables; use of a trained model; figures; the command line.

A condition is a set of perturbations that some cell received; C conditions beside the control, G
genes. "Effect" means average treatment effect (3.2), a difference from control, (C, G); the latent
e_t of eq. 1 is called `effect` where it is drawn, as in sams_vae.py.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import sys
import typing

import data  # before torch: it sets what makes a CPU fast
import numpy as np
import torch

import train
from data import AT_LEAST_0, AT_LEAST_1, DataError, add_options, number_within, option_name
from sams_vae import (MODELS, expected_expression, iwelbo, sample_counts, sample_frequencies,
                      sobol_normal, sum_effects)

FORMAT = 9  # of metrics.json; a file of another format is not read
SCALES = {"log_normalised": "log_normalised", "counts": "per_10k"}  # by `expected_expression`
BASELINES = {"no_change": "no change", "perturbed_mean": "perturbed mean", "additive": "additive",
             "matching_mean": "matching mean", "own_mean": "own mean",
             "shrunken_mean": "shrunken mean"}


# ============================================================================================
# Metrics of effects: predicted and observed (C, G)
# ============================================================================================


def pearson(a, b):
    """Pearson correlation of two equally shaped arrays, flattened; NaN if one is constant or empty.

    ATE-Pearson (3.2) is this for (condition, gene) matrices of model and data effects, pooled as in
    the paper's Figure 3. Conditions are not scaled before, so those with strong effects dominate.
    """
    if np.size(a) == 0:
        return math.nan
    a, b = (np.asarray(v, np.float64).ravel() - np.mean(v, dtype=np.float64) for v in (a, b))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def r_squared(predicted, observed):
    """1 - sum (observed - predicted)^2 / sum (observed - mean observed)^2, over all entries."""
    total = float(((observed - np.mean(observed)) ** 2).sum()) if np.size(observed) else 0.0
    return 1 - float(((observed - predicted) ** 2).sum()) / total if total > 0 else math.nan


def response_weights(t):
    """How clearly genes respond to conditions: weights (C, G) that sum to 1 for each condition.

    t (C, G) are t statistics of the condition's cells against all other perturbed cells. Their
    absolute values are scaled to reach from 0 to 1 in each condition and squared (Mejia et al.
    2025, "Diversity by Design"): most genes do not respond, and weigh next to nothing.
    """
    size = np.abs(t) - np.abs(t).min(1, keepdims=True)
    weight = (size / np.maximum(size.max(1, keepdims=True), 1e-300)) ** 2
    total = weight.sum(1, keepdims=True)
    return np.where(total > 0, weight / np.maximum(total, 1e-300), 1 / t.shape[1])


def weighted_r_squared(squared_error, observed, weights):
    """R2 of each condition over genes, weighted, and then averaged over conditions:
    1 - sum w (observed - predicted)^2 / sum w (observed - its weighted mean)^2.

    All (C, G). With effects from the mean of the other conditions this is the R2_w(delta) of Mejia
    et al. (2025), weighted_r2_pert_exp2 in scPertEval: predicting that mean for all gets 0 or less.
    """
    mean = (weights * observed).sum(1, keepdims=True)
    total = (weights * (observed - mean) ** 2).sum(1)
    error = (weights * squared_error).sum(1)[total > 0] / total[total > 0]
    return float(np.mean(1 - error)) if len(error) else math.nan


def discrimination_scores(predicted, observed, left_out, device="cpu", most=1000):
    """How well a predicted effect is told from those of other conditions, in both orientations.

    predicted, observed (C, G); left_out (C, G) bool, genes that do not count for a condition.
    Distances are L1, over the genes that count for it. Of each condition:

        first    all predictions are ranked by their distance to its observed effect: the rank of
                 its own
        second   all observed effects are ranked by their distance to its prediction, likewise (the
                 perturbation discrimination score of the Virtual Cell Challenge, 2025, which
                 divides by C in place of C - 1 and leaves targets out)

    A rank goes from 0 (nearest) to C - 1, ties at half, is divided by C - 1 and taken from one: 1
    is perfect, 1/2 is chance. Of more than `most` conditions, so many, drawn at random, are the
    rivals of each: all would take hours. Returns (2, C).
    """
    predicted, observed = (torch.as_tensor(v, dtype=torch.float32, device=device)
                           for v in (predicted, observed))
    n, scores = len(observed), []
    rivals = torch.from_numpy(np.random.default_rng(0).permutation(n)[:most]).to(device)
    condition, gene = (torch.from_numpy(v).to(device) for v in np.nonzero(left_out))
    is_other = rivals != torch.arange(n, device=device)[:, None]  # (C, rivals)
    for own, others in ((observed, predicted), (predicted, observed)):
        distance = torch.cdist(own, others[rivals], p=1)
        distance.index_add_(0, condition, alpha=-1, source=(
            own[condition, gene, None] - others[rivals][:, gene].T).abs())
        mine = (own - others).abs()
        mine[condition, gene] = 0
        mine = mine.sum(1, keepdim=True)
        is_tie = (distance - mine).abs() <= 1e-5 * mine
        rank = torch.where(is_tie, 0.5, (distance < mine).float()) * is_other
        scores.append(1 - rank.sum(1) / is_other.sum(1))  # a single condition has no rival: NaN
    return torch.stack(scores).double().cpu().numpy()


def effect_metrics(predicted, from_mean, said):
    """Metrics of predicted effects, a dict; said is what the data say of them (`Said`).

    from_mean (C, G) are the same effects minus what the data say of the mean effect of the other
    conditions. That takes away the shift that all perturbations share, which makes trivial
    predictions look good (Vinas Torne et al. 2025, "Systema")."""
    return {"n_conditions": len(predicted),
            "from_mean": pearson(from_mean, said.from_mean),
            "weighted_r_squared": weighted_r_squared(
                (from_mean - said.from_mean) ** 2, said.from_mean, said.weights),
            "pearson": pearson(predicted, said.effect),
            "r_squared": r_squared(predicted, said.effect)}


def noise_limit(said, independent):
    """What `effect_metrics` would say of a perfect prediction, estimated: a dict.

    The data's effects are the true ones plus noise. V is their variance over all entries, N the
    noise's, the mean of squared standard errors; V - N is left for the true effects. So these have
    R2 = 1 - N / V with the data's, and r = sqrt(1 - N / V), 0 where that is negative. (It is the
    sqrt(2 r / (1 + r)) of two halves' correlation r, without the noise of halving.) pearson_se is
    one standard error of 1 - N / V further up in the root: a jackknife over conditions and one over
    genes, since what the control cells add is shared by all conditions. The weighted R2 is an
    average over the conditions whose weights are independent of the noise, (C,) bool. Ranks have no
    such estimate.

    In screens simulated from trained models (33 and 90 conditions, of 8 to 2,000 cells of 100 to
    10,000 counts; r from 0.3 to 1), with hundreds of controls, r was within 0.01 of the true
    effects' r, and 0.00 to 0.05 below it where conditions had 8 cells; with 8 control cells 0.05 to
    0.08 below it, and where there are no effects 0.03 to 0.07 above. The standard error was 1 to 4
    times the spread of the difference.
    """
    def sums(effect, variance, axis=None):
        """Number, sum, sum of squares and noise of the entries, along an axis."""
        return [np.sum(v, axis, dtype=np.float64) for v in (
            np.ones_like(effect), effect, effect**2, variance)]

    def share(n, total, squares, noise):
        """1 - N / V, from these."""
        v = squares - total**2 / np.maximum(n, 1)
        return 1 - noise / np.where(v > 0, v, math.nan)

    def root(value):
        """The square root, 0 for what is negative."""
        return math.sqrt(max(value, 0))

    total, squared_error = sums(said.effect, said.variance), 0.0
    of_all = float(share(*total))
    for axis in np.flatnonzero(np.array(said.effect.shape[::-1]) > 1):
        without_one = share(*(a - b for a, b in zip(total, sums(*said[:2], axis))))
        squared_error += (len(without_one) - 1) * without_one.var()
    return {"n_conditions": len(said.effect), "pearson": root(of_all), "r_squared": of_all,
            "pearson_se": root(max(of_all, 0) + math.sqrt(squared_error)) - root(of_all),
            "from_mean": root(share(*sums(said.from_mean, said.variance_from_mean))),
            "weighted_r_squared": weighted_r_squared(*(v[independent] for v in (
                said.variance_from_mean, said.from_mean, said.weights)))}


# ============================================================================================
# Metrics of masks and latents
# ============================================================================================


def best_matching(score):
    """For each row of score (n, m), n <= m, a column of its own: the matching of largest total.

    The Hungarian method with potentials: rows enter one by one, each along the shortest path that
    re-matches earlier rows where needed. Exact, O(n^2 m). Returns columns (n,).
    """
    cost = -np.asarray(score, np.float64)
    n, m = cost.shape
    row_of = np.full(m, -1)  # the row matched to each column
    u, v = np.zeros(n), np.zeros(m)  # potentials: cost - u - v >= 0, and 0 on matched pairs
    for new_row in range(n):
        # Dijkstra from the new row to the nearest free column. Each step settles a column, and if
        # that is taken goes on from the row that has it, at no cost.
        distance, before = np.full(m, np.inf), np.full(m, -1)
        done = np.zeros(m, bool)
        row, column, length = new_row, -1, 0.0
        while row != -1:
            reach = length + cost[row] - u[row] - v
            closer = ~done & (reach < distance)
            distance[closer], before[closer] = reach[closer], column
            column = int(np.argmin(np.where(done, np.inf, distance)))
            done[column], length, row = True, distance[column], row_of[column]
        # New potentials: the path's edges become tight, and no other goes below zero.
        u[new_row] += length
        for c in np.flatnonzero(done):
            if row_of[c] != -1:
                u[row_of[c]] += length - distance[c]
            v[c] -= length - distance[c]
        while column != -1:  # shift the matches along the path
            previous = before[column]
            row_of[column] = new_row if previous == -1 else row_of[previous]
            column = previous
    matched = np.flatnonzero(row_of != -1)
    result = np.empty(n, int)
    result[row_of[matched]] = matched
    return result


def mask_recovery(true_mask, mask, score=None):
    """Precision, recall and F1 of masks, (T, L) and (T, L') bool, under a matching of latents.

    Latents have no names, so each true one is matched with at most one of the model's: to the
    largest sum of score (L, L') or, by default, to the largest number of entries that agree on 1,
    which is the matching of the best F1. Entries of latents that found no partner count as errors.
    NaN where there is nothing to find or nothing found.
    """
    agree = true_mask.T.astype(float) @ mask  # (L, L'): perturbations that both touch
    score = agree if score is None else score
    if len(agree) > len(agree.T):
        agree, score = agree.T, score.T
    hits = agree[np.arange(len(agree)), best_matching(score)].sum()
    n_true, n_found = int(true_mask.sum()), int(mask.sum())
    return {name: float(hits / n) if n else math.nan for name, n in (
        ("precision", n_found), ("recall", n_true), ("f1", (n_true + n_found) / 2))}


def mask_agreement(masks, n_permutations=10):
    """Do several runs find the same masks? F1 between each two, under the best matching of their
    latents: the mean, and what chance gives, the mean after the perturbations of one are permuted.

    A mask is, as in metrics.json, a list of T texts such as "0 3", the latents that a perturbation
    touches.
    """
    n_latent = 1 + max((int(word) for mask in masks for row in mask for word in row.split()),
                       default=0)
    arrays = [np.array([[str(latent) in row.split() for latent in range(n_latent)] for row in mask])
              for mask in masks]
    pairs, rng = list(itertools.combinations(arrays, 2)), np.random.default_rng(0)
    return [np.mean([mask_recovery(a, b)["f1"] for a, b in some] or math.nan) for some in (
        pairs, [(a, rng.permutation(b)) for a, b in pairs for _ in range(n_permutations)])]


def correlations(a, b):
    """|Pearson's r| of columns of a (N, L) and b (N, L'), (L, L'); 0 where one is constant."""
    a, b = (v - v.mean(0) for v in (a, b))
    size = np.sqrt(np.outer((a**2).sum(0), (b**2).sum(0)))
    return np.abs(a.T @ b) / np.where(size > 0, size, 1)


def latent_recovery(true, learned):
    """How well latent states of simulated cells are found, true (N, L) and learned (N, L'), as
    Lopez et al. (2023) ask: a dict.

    mcc         mean over true latents of the absolute correlation with a learned one of its own,
                matched to the largest sum; 0 for one without a partner, where L' < L
    mcc_ranks   the same of ranks (Spearman)
    r_squared   R2 of true latents by a linear map of all learned ones, fitted to every other cell,
                in the others: the mean over true ones. NaN where these are too few
    """
    def ranks(column):
        """Ranks of its values, a mean where some are the same."""
        _, place, n = np.unique(column, return_inverse=True, return_counts=True)
        return (np.cumsum(n) - n / 2)[place]

    def mcc(a, b):
        """The mean over columns of a."""
        score = correlations(a, b)
        score = score if len(score) <= len(score.T) else score.T
        return float(score[np.arange(len(score)), best_matching(score)].sum() / a.shape[1])

    found = {"mcc": mcc(true, learned), "r_squared": math.nan,
             "mcc_ranks": mcc(*(np.apply_along_axis(ranks, 0, v) for v in (true, learned)))}
    inputs = np.column_stack([learned, np.ones(len(learned))])
    if len(inputs) > 2 * inputs.shape[1]:
        weight, *_ = np.linalg.lstsq(inputs[::2], true[::2], rcond=None)
        error = ((true[1::2] - inputs[1::2] @ weight) ** 2).mean(0)
        found["r_squared"] = float((1 - error / true[1::2].var(0)).mean())
    return found


def mask_pathway_accuracy(mask, pathway, n_splits=10):
    """Accuracy of predicting a perturbation's pathway from its mask (4.1.1): mean and sd.

    mask (T, L) of 0 and 1, that is mask probabilities thresholded at 0.5; pathway (T,) names. A
    random forest (scikit-learn's defaults) is fitted to 70 % of the perturbations and scored on the
    other 30 %, for n_splits random splits. Needs scikit-learn, raises ImportError without.
    """
    from sklearn.ensemble import RandomForestClassifier

    accuracy = []
    for seed in range(n_splits):
        train, test = data.train_test_split(len(mask), 0.7, seed)
        forest = RandomForestClassifier(random_state=seed).fit(mask[train], pathway[train])
        accuracy.append(forest.score(mask[test], pathway[test]))
    return float(np.mean(accuracy)), float(np.std(accuracy, ddof=1))


def pathway_of(perturbations, pathways):
    """The pathway of each perturbation, (T,), None where it has none.

    pathways {pathway: genes}; a perturbation's gene is its name up to the first "_". A gene that is
    in several pathways counts for the first.
    """
    of_gene = {}
    for pathway, genes in (pathways or {}).items():
        for gene in genes:
            of_gene.setdefault(gene, pathway)
    return np.array([of_gene.get(name.split("_")[0]) for name in perturbations], dtype=object)


# ============================================================================================
# What the data say, and what needs no model
# ============================================================================================


@dataclasses.dataclass
class Arms:
    """Pairs (condition, covariates) that some cell of a screen has, A arms.

    The first S are the controls, with each of the S sets of covariate values that occur (one set,
    of nothing, where there are no covariates). Every other, treated, arm is compared with the
    control cells of the same covariates, and a condition's effect is the mean over its arms,
    weighted by its cells.
    """

    names: np.ndarray      # (C,) conditions beside the control, sorted
    condition: np.ndarray  # (A - S,) of each treated arm; those of a condition stand together
    control: np.ndarray    # (A - S,) its control arm
    d: np.ndarray          # (A, P) dosages,
    d_model: torch.Tensor  # and as the model knows them (SVAE+ knows labels)
    c: torch.Tensor        # (A, columns) covariates
    of_cell: np.ndarray    # (N,) the arm of every cell of the screen

    @classmethod
    def of(cls, run):
        """The arms of a run's screen."""
        screen = run.screen
        strata, stratum = np.unique(screen.c, axis=0, return_inverse=True)
        label = np.where(screen.conditions == "control", "", screen.conditions).astype(str)
        names, condition = np.unique(label, return_inverse=True)  # "" comes first
        pairs, cell, arm = np.unique(np.column_stack([condition, stratum.reshape(-1)]), axis=0,
                                     return_index=True, return_inverse=True)
        is_control = pairs[:, 0] == 0
        treated, cell = pairs[~is_control], cell[~is_control]
        of_arm = np.where(is_control, pairs[:, 1], np.arange(len(pairs)) - is_control.sum()
                          + len(strata))

        def with_controls(d):
            """Dosages of all arms; the controls have none."""
            return np.pad(d[cell], ((len(strata), 0), (0, 0)), constant_values=data.NONE)

        return cls(names[1:], treated[:, 0] - 1, treated[:, 1], with_controls(screen.d),
                   torch.from_numpy(with_controls(run.model_screen.d)).to(run.device),
                   torch.from_numpy(strata[np.append(np.arange(len(strata)), treated[:, 1])]).to(
                       run.device), of_arm[arm.reshape(-1)])

    @property
    def n_controls(self):
        """S."""
        return len(self.d) - len(self.condition)

    @property
    def first(self):
        """The first treated arm of each condition, (C,)."""
        return np.flatnonzero(np.diff(self.condition, prepend=-1))

    @property
    def dosages(self):
        """Dosages of the conditions, (C, P)."""
        return self.d[self.n_controls:][self.first]

    def of_condition(self, n):
        """Sums over each condition of n (A - S, ...), (C, ...)."""
        return np.add.reduceat(n, self.first, axis=0)

    def shares(self, n):
        """The weight of each treated arm in its condition, (A - S, 1), from the numbers of cells
        n (A,): its part of the condition's cells, where there are control cells to compare with."""
        n = n[self.n_controls:] * (n[self.control] > 0)
        return (n / np.maximum(self.of_condition(n), 1)[self.condition])[:, None]

    def compared(self, y, share):
        """Means of conditions, and of the controls that each is compared with, from y (A, G):
        (C, G) each."""
        return (self.of_condition(share * y[self.n_controls:]),
                self.of_condition(share * y[self.control]))


class Means(typing.NamedTuple):
    """Mean expression of some cells by arm, (A, G); its squared standard error, (A, G); their
    number, (A,)."""

    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray


def mean_expression(batches, cells, arms):
    """Mean expression of cells, positions (n,), by arm, for cells of a library of 10,000: {scale:
    Means}. counts: 1e4 x / sum x. log_normalised: log2(1 + 1e4 x / sum x). (3.2 compares means of
    x, the counts; the second scale and its logarithm to base 2 are what the authors' code takes for
    Table 1.)

    An arm without cells has zeros; one of a single cell has the variance within all arms.
    """
    group = torch.from_numpy(arms.of_cell[cells])
    n = np.bincount(group, minlength=len(arms.d))[:, None].astype(float)
    total = {scale: torch.zeros(2, len(n), batches.n_genes, dtype=torch.float64,
                                device=batches.device) for scale in SCALES}
    group = group.to(batches.device)
    for x, *_ in batches.in_order(cells):
        part, group = group[:len(x)], group[len(x):]
        per_10k = (1e4 * x / x.sum(-1, keepdim=True)).double()  # (B, G)
        for scale, y in (("counts", per_10k), ("log_normalised", torch.log2(1 + per_10k))):
            total[scale][0].index_add_(0, part, y)
            total[scale][1].index_add_(0, part, y**2)
    means = {}
    for scale in SCALES:
        y, y2 = total.pop(scale).cpu().numpy()
        mean = y / np.maximum(n, 1)
        squares = np.maximum(y2 - n * mean**2, 0)  # around the mean
        pooled = squares.sum(0) / max(1, np.maximum(n - 1, 0).sum())
        variance = np.where(n > 1, squares / np.maximum(n - 1, 1), pooled) / np.maximum(n, 1)
        means[scale] = Means(mean.astype(np.float32), variance.astype(np.float32), n[:, 0])
    return means


def with_controls(cells, train, is_control):
    """Test cells, which in the Norman splits have no controls, with some in any case: those that
    are not among the cells of `train`, or, if there are none, all. is_control (N,) bool."""
    controls = np.flatnonzero(is_control)
    for chosen in (np.intersect1d(cells, controls), np.setdiff1d(controls, train), controls):
        if len(chosen) > 1:
            break
    return np.union1d(cells, chosen)


def own_targets(dosages, perturbations, gene_names):
    """The genes that perturbations of dosages (C, P) target, by their names: (C, G) bool."""
    is_target = np.zeros((len(dosages), len(gene_names)), bool)
    for t, gene in enumerate(data.targets(perturbations, gene_names)):
        if gene is not None:
            is_target[(dosages == t).any(1), gene] = True
    return is_target


def mean_of_others(effect, seen):
    """For each of C conditions the mean effect (C, G) of the others that training has seen, (C,)
    bool; 0 where there are none."""
    own = np.where(seen[:, None], effect, 0)
    return (own.sum(0) - own) / np.maximum(seen.sum() - seen, 1)[:, None]


def t_against_others(arms, means):
    """Welch's t of each condition's cells against all other perturbed cells, (C, G), compared
    within covariates; 0 for a gene that does not vary."""
    n, mean = means.n[arms.n_controls:, None], means.mean[arms.n_controls:].astype(float)
    variance = means.variance[arms.n_controls:]
    squares = np.maximum(n - 1, 0) * n * variance + n * mean**2  # sums of y^2
    same = (arms.control == np.arange(arms.n_controls)[:, None]).astype(float)  # (S, A - S)

    def others(v):
        """Sums over the other perturbed cells of the same covariates."""
        return (same @ v)[arms.control] - v

    n_others = np.maximum(others(n), 1)
    mean_others = others(n * mean) / n_others
    variance_others = np.maximum(others(squares) / n_others - mean_others**2, 0) / np.maximum(
        n_others - 1, 1)
    share = n * (others(n) > 1)
    share = share / np.maximum(arms.of_condition(share), 1)[arms.condition]
    error = np.sqrt(arms.of_condition(share**2 * (variance + variance_others)))
    return np.divide(arms.of_condition(share * (mean - mean_others)), error,
                     out=np.zeros_like(error), where=error > 0)


class Said(typing.NamedTuple):
    """What the data say of C conditions on one scale, (C, G) each: effects with their squared
    standard errors, the same from the mean of the other training conditions, and the genes'
    weights (`response_weights`)."""

    effect: np.ndarray
    variance: np.ndarray
    from_mean: np.ndarray
    variance_from_mean: np.ndarray
    weights: np.ndarray


def effects_by_data(arms, observed, trained, is_left_out, n_enough=10):
    """On one scale, what predictions are compared with (`Said`) and by how many baselines.

    observed, trained    Means of the cells to compare with, and of the training cells
    is_left_out (C, G)   entries that do not count, zero on both sides

    Weights are from the training cells of conditions that have n_enough of them, so that no noise
    of the compared cells chooses genes; the others' are from the compared cells. Returns Said; the
    mean effects (C, G) of the other training conditions in training cells; the baselines {name:
    (C, G)}; and the conditions whose weights are independent, (C,) bool.
    """
    S = arms.n_controls
    share, share_trained = arms.shares(observed.n), arms.shares(trained.n)
    treated, control = arms.compared(observed.mean, share)
    noise, noise_of_control = arms.compared(observed.variance, share**2)
    seen = arms.of_condition(share_trained)[:, 0] > 0
    own = np.subtract(*arms.compared(trained.mean, share_trained))
    noise_trained, of_control = arms.compared(trained.variance, share_trained**2)
    others = mean_of_others(own, seen)

    # From the mean of others: with the same control cells on both sides, the training cells' where
    # there are some, so that their noise matters only as far as covariates differ.
    has_control = trained.n[:S, None] > 0
    controls = np.where(has_control, trained.mean[:S], observed.mean[:S])
    noise_of_controls = np.where(has_control, trained.variance[:S], observed.variance[:S])
    which = arms.control[:, None] == np.arange(S)
    differ = arms.of_condition(share * which) - mean_of_others(
        arms.of_condition(share_trained * which), seen)  # (C, S)
    n_others = np.maximum(seen.sum() - seen, 1)[:, None]

    independent = arms.of_condition(trained.n[S:]) >= n_enough
    t = np.where(independent[:, None], t_against_others(arms, trained),
                 t_against_others(arms, observed))
    said = Said(effect=treated - control, variance=noise + noise_of_control,
                from_mean=treated - arms.of_condition(share * controls[arms.control]) - others,
                variance_from_mean=(noise + mean_of_others(noise_trained, seen) / n_others
                                    + differ**2 @ noise_of_controls),
                weights=response_weights(np.where(is_left_out, 0, t)))
    return said, others, baseline_effects(own, noise_trained + of_control, seen, others,
                                          arms.dosages), independent


def shrunken(effect, variance, seen):
    """Effects (C, G) shrunken towards zero, as far as they are noise (empirical Bayes).

    Each is multiplied by S / (S + N), the posterior mean if true effects are N(0, S). N is its
    squared standard error, `variance`. S follows from the mean squares that are left when noise is
    taken away: S_tg = S_t S_g / S_0, the mean of effect^2 - N over the condition's genes, over the
    gene's conditions, and over all, no less than 0, of the conditions in seen, (C,) bool."""
    signal = np.where(seen[:, None], effect**2 - variance, 0)
    of_condition, of_gene = (np.maximum(signal.sum(axis, keepdims=True), 0) for axis in (1, 0))
    s = of_condition * of_gene / max(signal.sum(), 1e-300)
    return effect * np.divide(s, s + variance, out=np.zeros_like(s), where=s > 0)


def baseline_effects(effect, variance, seen, others, dosages):
    """Effects that need no model, from training cells on one scale: six baselines {name: (C, G)}.

    effect, variance (C, G), of conditions that training has seen, (C,) bool; others (C, G), see
    `mean_of_others`; dosages (C, P).

        no_change       0: the prediction is the control
        perturbed_mean  the mean effect of the other training conditions
        additive        sum over the condition's perturbations g of the effect of cells with g
                        alone; 0 for a g that no training cell has alone
        matching_mean   the mean of the same, in place of their sum, perturbed_mean for a g that no
                        training cell has alone (after Vinas Torne et al. 2025, "Systema")
        own_mean        the effect in the condition's own training cells; additive without these
        shrunken_mean   the same of `shrunken` effects
    """
    is_single = (dosages != data.NONE).sum(1) == 1
    alone = np.full(dosages.max() + 2, -1)  # the condition of a perturbation alone; NONE has none
    alone[dosages[is_single].max(1)] = np.where(seen[is_single], np.flatnonzero(is_single), -1)
    parts = alone[dosages]  # (C, P)
    n_parts = (dosages != data.NONE).sum(1)[:, None]

    def additive(effect):
        """The sum over parts."""
        return sum(np.where(part[:, None] >= 0, effect[part], 0) for part in parts.T)

    n_known = (parts >= 0).sum(1)[:, None]
    of_parts, shrunk = additive(effect), shrunken(effect, variance, seen)
    return {"no_change": np.zeros_like(effect), "perturbed_mean": others, "additive": of_parts,
            "matching_mean": (of_parts + (n_parts - n_known) * others) / n_parts,
            "own_mean": np.where(seen[:, None], effect, of_parts),
            "shrunken_mean": np.where(seen[:, None], shrunk, additive(shrunk))}


# ============================================================================================
# The evaluation of a run: likelihood, effects, masks
# ============================================================================================

OPTIONS = [  # name, default, what is allowed, what it is and where the default comes from
    ("--iwelbo-particles", 100, AT_LEAST_1, "K of 3.1 (paper: 100, for Norman)"),
    ("--ate-particles", 2500, AT_LEAST_1, "K of 3.2 (paper: Replogle 10,000, Norman 2,500)"),
    ("--library", None, AT_LEAST_1, "total counts of simulated cells (authors' code, and with a "
     "preset of the paper: 10,000; else the median of the data's cells)"),
    ("--effects-from", None, ["all", "test"], "cells that data effects are taken from (the paper "
     "does not say; authors' code for Table 1, and with a preset of the paper: all; else test)"),
    ("--own-targets", None, bool, "count the gene that a perturbation targets among those of its "
     "effect (with a preset of the paper; else not)"),
    ("--evaluation-seed", 0, AT_LEAST_0, "of IWELBO and effects (ours)"),
]


def open_run(folder, device=None, data_path=None):
    """The run of runs/NAME as best.pt has it; data_path says where its data are, if they moved."""
    config = train.load_checkpoint(folder, "last.pt")["config"]  # --resume may have changed it
    changes = {name: config[name] for name in ("data", "steps", "precision")}
    if data_path:
        changes["data"] = os.path.abspath(data_path)
    return train.Run.load(folder, "best.pt", device, **changes)


def of_paper(run):
    """Whether a run has a preset of the paper's experiments."""
    return run.config["preset"] not in (None, "simulated", "sparse-shift")


def library_of(run):
    """Total counts of simulated cells: 10,000, as in the authors' code, or without a preset of the
    paper the median of the data's cells, so that logarithms of model and data are alike. (With the
    median the true effects had r = 0.9995 with those of cells of all depths, 40 to 600 counts, and
    with a mean over eight quantiles 0.9998, with 10,000 counts 0.90.)"""
    return 10_000 if of_paper(run) else int(np.median(run.screen.library))


def evaluate(run, pathways=None, **options):
    """Evaluate a run, write its metrics.json and tables, and return the metrics, a flat dict:

        config, options     of the run, and of this evaluation (OPTIONS)
        step, masks_from    where best.pt was, and where masks began; last_step, done: how far
                            training has come, and whether it has ended
        iwelbo ...          see `likelihood`
        effects             a list of rows: scale, group of conditions, what predicts, and its
                            `effect_metrics`, or `noise_limit`; see `effects`
        mask ...            see `masks`; latent ..., see `latents`, of simulated screens
        warnings            sentences

    pathways is a .json file for data.read_pathways, by default the data. NaN becomes null.
    """
    last = train.load_checkpoint(run.folder, "last.pt")["progress"]
    options = {option_name(flag): default for flag, default, *_ in OPTIONS} | options
    for name, default in (("library", library_of(run)), ("own_targets", of_paper(run)),
                          ("effects_from", "all" if of_paper(run) else "test")):
        options[name] = default if options[name] is None else options[name]
    known_pathways = data.read_pathways(pathways or run.config["data"])  # it may be wrong
    metrics = {"format": FORMAT, "checkpoints": checkpoints(run.folder), "config": run.config,
               "fingerprint": run.fixed["fingerprint"], "options": options | {"pathways": pathways},
               "step": run.progress.step, "masks_from": run.progress.masks_from,
               "validation_loss": run.progress.best, "last_step": last["step"],
               "done": run.has_ended(train.Progress(**last))}
    torch.manual_seed(options["evaluation_seed"])
    truth = data.read_simulation(run.config["data"])
    metrics |= likelihood(run, options) | effects(run, options)
    metrics |= masks(run, known_pathways, truth) | (latents(run, truth) if truth else {})
    metrics["warnings"] = warnings_of(metrics)
    metrics = without_nan(metrics)
    with data.replacing(os.path.join(run.folder, "metrics.json")) as path, open(path, "w") as file:
        json.dump(metrics, file, indent=2)
    return metrics


def checkpoints(folder):
    """The hashes at the end of best.pt and last.pt, which tell whether metrics are still theirs."""
    found = {}
    for name in ("best.pt", "last.pt"):
        with open(os.path.join(folder, name), "rb") as file:
            file.seek(-64, os.SEEK_END)
            found[name] = file.read().decode(errors="replace")
    return found


def without_nan(value):
    """The value with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(run, name, header, rows):
    """Write a table into the run's folder, numbers to six digits."""
    with data.replacing(os.path.join(run.folder, name)) as path, open(
            path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(
            [f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row]
            for row in rows)])


def likelihood(run, options):
    """Marginal likelihood of the test cells (3.1): both IWELBOs, in nats. Writes iwelbo.csv, the
    predictive one of each test cell.

    Both are lower bounds: with K = 100 the predictive one stood up to 0.8 nats per cell below
    K = 4,000, differences between models much less."""
    test, n_particles = run.split["test"], options["iwelbo_particles"]
    predictive, joint, effective_sample_size = iwelbo(
        run.model, run.batches.in_order(test), n_particles)
    predictive, n = predictive.double().cpu().numpy(), len(test)
    write_csv(run, "iwelbo.csv", ["cell", "condition", "iwelbo"], zip(
        run.screen.cell_names[test], run.screen.conditions[test], predictive))
    metrics = {"iwelbo": predictive.mean(),
               "iwelbo_se": predictive.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
               "iwelbo_monte_carlo_error": monte_carlo_error(run, test, n_particles),
               "n_test_cells": n, "iwelbo_joint_per_cell": joint / n,
               "iwelbo_joint_effective_sample_size": effective_sample_size}
    return metrics | (of_new_perturbations(run, predictive, n_particles)
                      if run.config["adapt"] else {})


def monte_carlo_error(run, cells, n_particles, n_repeats=8, n_cells=500):
    """How much the mean predictive IWELBO of cells varies with the draws of latents: its standard
    deviation over independent repeats, with n_cells of the cells. (Of more cells it varies less,
    as far as the noise is each cell's own. Weights within one repeat do not tell: their delta
    method gave half of this in trained models.)"""
    some = np.sort(np.random.default_rng(0).permutation(cells)[:n_cells])
    means = [iwelbo(run.model, run.batches.in_order(some), n_particles)[0].double().mean().item()
             for _ in range(n_repeats)]
    return float(np.std(means, ddof=1))


def of_new_perturbations(run, predictive, n_particles):
    """Of a run that adapts another (--adapt): the mean predictive IWELBO of test cells with one of
    the perturbations that it has learned, after that, of `predictive` (N,), all test cells' IWELBO,
    and before, when the prior is all that is known of them (SVAE+ and the conditional VAE, which
    have none, take these cells for controls). And their conditions, to find them in another run."""
    test, n_cells, n_known = run.split["test"], run.model.n_cells, run.n_known
    learned = np.flatnonzero(n_cells.cpu().numpy() > 0)
    learned = learned[learned >= n_known]
    is_new = np.isin(run.model_screen.d[test], learned).any(1)
    found = {"n_new_perturbations": len(learned), "n_new_cells": int(is_new.sum()),
             "new_conditions": sorted(set(run.screen.conditions[test[is_new]]))}
    if is_new.any():
        trained = n_cells.clone()
        n_cells[n_known:] = 0
        before, *_ = iwelbo(run.model, run.batches.in_order(test[is_new]), n_particles)
        n_cells.copy_(trained)
        found |= {"iwelbo_new_before": before.double().mean().item(),
                  "iwelbo_new": float(predictive[is_new].mean())}
    return found


def effects(run, options):
    """Average treatment effects of all conditions (3.2), by the model, the baselines and the data.

    Writes effects.h5ad and top_genes.csv. Returns metrics. Rows of ["effects"] are {scale, group,
    row, metrics}: of the conditions in a group, all that can be compared, pairs, held_out (no
    training cells), or test (with test cells), and by a row: the model, a baseline or noise_limit.
    ["n_pairs"]: how many pairs have training cells, and of how many both parts have some alone.
    ["on_target"]: see `on_target`. ["n_not_compared"]: conditions without controls of their
    covariates.
    """
    screen, split, library = run.screen, run.split, options["library"]
    arms = Arms.of(run)
    S, dosages = arms.n_controls, arms.dosages
    cells = np.arange(len(screen.d))
    if options["effects_from"] == "test":
        cells = with_controls(split["test"], split["train"], screen.conditions == "control")
    observed = mean_expression(run.batches, cells, arms)
    trained = mean_expression(run.batches, split["train"], arms)
    n_cells, n_trained = (arms.of_condition(m["counts"].n[S:]).astype(int)
                          for m in (observed, trained))

    # By the model: where the data say nothing, the arms count by the cells of all the screen.
    expected = {scale: y.cpu().numpy() for scale, y in expected_expression(
        run.model, arms.d_model, arms.c, options["ate_particles"], library).items()}
    share = arms.shares(observed["counts"].n)
    known = arms.of_condition(share)[:, 0] > 0
    n_all = np.bincount(arms.of_cell, minlength=len(arms.d))[S:]
    share = np.where(known[arms.condition, None], share, (n_all / np.maximum(
        arms.of_condition(n_all), 1)[arms.condition])[:, None])

    n_parts, in_test = (dosages != data.NONE).sum(1), np.bincount(
        arms.of_cell[split["test"]], minlength=len(arms.d))[S:]
    groups = {"all": known, "pairs": known & (n_parts == 2), "held_out": known & (n_trained == 0),
              "test": known & (arms.of_condition(in_test) > 0)}
    is_target = own_targets(dosages, screen.perturbations, screen.gene_names)
    is_left_out = np.zeros_like(is_target) if options["own_targets"] else is_target
    rows, layers = [], {}
    for scale, of_model in SCALES.items():
        said, others, baselines, independent = effects_by_data(
            arms, observed[scale], trained[scale], is_left_out)
        model = np.subtract(*arms.compared(expected[of_model], share))
        rows += scores(scale, groups, {"model": model, **baselines}, said, others, independent,
                       is_left_out, run.device)
        for name, values in (("model", model), ("data", said.effect),
                             ("data_se", np.sqrt(said.variance))):
            whole = values if name == "model" else np.where(known[:, None], values, np.nan)
            layers[f"{name}_{scale}"] = whole.astype(np.float32)

    data.write_h5ad(os.path.join(run.folder, "effects.h5ad"), X=layers["model_log_normalised"],
                    obs={"condition": arms.names.astype(object), "n_cells": n_cells,
                         "n_training_cells": n_trained, "n_perturbations": n_parts},
                    var={"gene": screen.gene_names}, layers=layers,
                    uns={"effects_from": options["effects_from"], "library": library})
    treated, control = arms.compared(expected["per_10k"], share)
    write_top_genes(run, arms, np.log2(treated / control), layers, library)
    _, control = arms.compared(observed["counts"].mean, share)
    of_parts = dosages[(n_parts == 1) & (n_trained > 0)].max(1)
    return {"effects": rows, "n_not_compared": int((~known & (n_cells > 0)).sum()),
            "n_pairs": [int((groups["pairs"] & so).sum()) for so in (
                n_trained > 0, np.isin(dosages, np.append(of_parts, data.NONE)).all(1))],
            "on_target": on_target(is_target & known[:, None], control, {
                "data": layers["data_counts"], "model": model, **baselines})}


def mean_of(values):
    """The mean, NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def scores(scale, groups, predictions, said, others, independent, is_left_out, device):
    """Rows of metrics, dicts, of predictions {row: (C, G)} in groups of conditions {name: (C,)
    bool}; the other arguments are as `effects_by_data` returns them. Discrimination ranks all
    conditions that can be compared, whatever their group."""
    known, rows = groups["all"], []
    nothing = np.full((2, int(known.sum())), math.nan)  # to rank, where all are alike
    ranked = {row: nothing if row in ("no_change", "perturbed_mean") else discrimination_scores(
        v[known], said.effect[known], is_left_out[known], device) for row, v in predictions.items()}
    # The one place where entries that do not count become zero, for everyone.
    said, others = Said(*(np.where(is_left_out, 0, v) for v in said)), np.where(
        is_left_out, 0, others)
    predictions = {row: np.where(is_left_out, 0, v) for row, v in predictions.items()}
    for group, chosen in groups.items():
        by_data = Said(*(v[chosen] for v in said))
        for row, predicted in predictions.items():
            first, second = ranked[row][:, chosen[known]]
            rows.append({"scale": scale, "group": group, "row": row, **effect_metrics(
                predicted[chosen], (predicted - others)[chosen], by_data),
                "discrimination": mean_of(first), "discrimination_by_prediction": mean_of(second)})
        if chosen.any():
            rows.append({"scale": scale, "group": group, "row": "noise_limit",
                         **noise_limit(by_data, independent[chosen])})
    return rows


def on_target(is_target, control, effects):
    """How much the genes that perturbations target change, in all: the sum of their effects on
    counts by that of the controls' means, -0.6 for a fall by 60 %.

    is_target (C, G) bool, control (C, G), effects {row: (C, G)}. Returns {row: change} and the
    number of targets, "n".
    """
    before = float(control[is_target].sum()) or math.nan
    return {"n": int(is_target.sum())} | {row: float(effect[is_target].sum()) / before
                                          for row, effect in effects.items()}


def write_top_genes(run, arms, log2_fold_change, layers, library, n_top=20, n_particles=500):
    """Write top_genes.csv: the n_top genes of largest effect on log-normalised expression, by the
    model, of each condition and of each latent dimension.

    Of a condition beside the effect by the data with its standard error. Of latent dimension l it
    is the effect of moving the basal state by +1, its standard deviation a priori, along l, in the
    axes of the masks. Fold changes are by the model.
    """
    model, genes, rows = run.model, run.screen.gene_names, []

    def add(kind, name, effect, fold_change, *by_data):
        """The rows of one condition or latent dimension, of arrays (G,)."""
        for rank, g in enumerate(np.argsort(-np.abs(effect), kind="stable")[:n_top]):
            if effect[g] != 0:
                rows.append([kind, name, rank + 1, genes[g], effect[g], fold_change[g],
                             *([v[g] for v in by_data] or ["", ""])])

    for row in zip(arms.names, layers["model_log_normalised"], log2_fold_change,
                   layers["data_log_normalised"], layers["data_se_log_normalised"]):
        add("condition", *row)
    if model.has_effects:
        nothing = torch.full((1, 1), data.NONE, device=run.device)
        cells = np.resize(np.random.default_rng(0).permutation(len(run.screen.c)), n_particles)
        c = torch.from_numpy(run.screen.c[cells][None]).to(run.device)
        basal = sobol_normal(n_particles, model.n_latent, run.device)
        expected = []
        for move in torch.cat([torch.zeros_like(model.axes[:1]), model.axes.T]):
            torch.manual_seed(0)  # the same noise for all
            of_move = expected_expression(model, nothing, c, library=library, basal=basal + move)
            expected.append({scale: y[0].cpu().numpy() for scale, y in of_move.items()})
        for latent, moved in enumerate(expected[1:]):
            add("latent", latent, moved["log_normalised"] - expected[0]["log_normalised"],
                np.log2(moved["per_10k"] / expected[0]["per_10k"]))
    write_csv(run, "top_genes.csv", [
        "kind", "name", "rank", "gene", "effect_log_normalised", "log2_fold_change",
        "data_effect_log_normalised", "data_standard_error"], rows)


@torch.no_grad()
def probability_and_offset(model, n_draws=50):
    """Mask probabilities, and mean offsets E[m e] over n_draws, (T, L) each."""
    torch.manual_seed(0)
    mask, effect = model.sample_many_globals(model.all_perturbations(), n_draws)
    return model.mask_probability().numpy(force=True), (mask * effect).mean(0).numpy(force=True)


def masks(run, pathways, truth=None):
    """What the masks say: the mean mask probability of perturbations with training cells and the
    number of these that touch no latent dimension, `mask_recovery` where the screen is simulated,
    `mask_pathway_accuracy` where there are pathways (10 annotated perturbations or more). Writes
    masks.csv: entries of probability above 0.01, the likeliest of a perturbation first, with their
    mean offset E[m e]. Empty for a model without effects."""
    model, names = run.model, run.model_screen.perturbations
    if not model.has_effects:
        return {}
    probability, offset = probability_and_offset(model)
    write_csv(run, "masks.csv", ["perturbation", "latent", "probability", "offset"], (
        [names[t], latent, probability[t, latent], offset[t, latent]]
        for t, row in enumerate(probability) for latent in np.argsort(-row, kind="stable")
        if row[latent] > 0.01))
    if not model.has_mask:
        return {}
    trained, mask = model.n_cells.numpy(force=True) > 0, probability > 0.5
    metrics = {"mask_mean_probability": float(probability[trained].mean()),
               "n_trained_perturbations": int(trained.sum()),
               "n_empty_masks": int((~mask[trained].any(1)).sum()),
               "mask_mean_size": float(mask[trained].sum(1).mean()),
               "mask": [" ".join(map(str, np.flatnonzero(row))) for row in mask]}
    true_mask = true_mask_of(names, truth)
    if true_mask is not None:
        metrics |= with_prefix("mask_", mask_recovery(true_mask, mask))
    pathway = pathway_of(names, pathways)
    known = np.array([p is not None for p in pathway])
    if pathways and known.sum() < 10:
        print(f"mask pathway accuracy is left out: {known.sum()} of {len(names):,} perturbations "
              "are in a pathway, and 10 are needed")
    elif pathways:
        pathway = pathway[known].astype(str)
        try:
            accuracy, sd = mask_pathway_accuracy(mask[known], pathway)
        except ImportError:
            print("mask pathway accuracy is left out: pip install scikit-learn")
        else:
            commonest = np.unique(pathway, return_counts=True)[1].max()
            metrics |= {"mask_pathway_accuracy": accuracy, "mask_pathway_accuracy_sd": sd,
                        "mask_pathway_chance": float(commonest / len(pathway)),
                        "n_annotated": len(pathway)}
    return metrics


def with_prefix(prefix, metrics):
    """The same dict with a prefix before each name."""
    return {prefix + name: value for name, value in metrics.items()}


def true_mask_of(names, truth):
    """The true masks of perturbations of these names, (T, L) bool, of `data.read_simulation`; None
    where there is no truth, or other names."""
    row = {name: t for t, name in enumerate(truth[0])} if truth else {}
    return truth[1][[row[name] for name in names]] if row.keys() >= set(names) else None


def latents(run, truth):
    """`latent_recovery` in the test cells of a simulated screen, of posterior means in the axes of
    the masks: latent_* of z (as Lopez et al. have it), label_* of z by the label alone, E[z_pert],
    which supplies most of that, and basal_* of z_basal.

    target_*: `mask_recovery` by the matching of latent_mcc. A perturbation with training cells
    touches the latents of mask probability above 0.5 or, where there are no masks, the two of
    largest offset (as in Lopez et al.).
    """
    model, test = run.model, run.split["test"]
    names, true_mask, true_effect, z = truth
    z = z[run.screen.rows[test]].astype(float)
    row = {name: t for t, name in enumerate(names)}
    offsets = np.concatenate([true_mask * true_effect, np.zeros((1, z.shape[1]))])
    place = [row.get(name, len(names)) for name in run.screen.perturbations] + [len(names)]
    z_basal = z - offsets[np.array(place)[run.screen.d[test]]].sum(1)

    torch.manual_seed(0)
    draws = model.sample_many_globals(model.all_perturbations(), 50)
    means = zip(*posterior_means(run, test, *draws))
    basal, total = (np.concatenate(parts).astype(float) for parts in means)
    metrics = (with_prefix("latent_", latent_recovery(z, total))
               | with_prefix("label_", latent_recovery(z, total - basal))
               | with_prefix("basal_", latent_recovery(z_basal, basal)))
    true_mask = true_mask_of(run.model_screen.perturbations, truth)
    if true_mask is None or not model.has_effects:
        return metrics
    probability, offset = probability_and_offset(model)
    third = np.sort(np.pad(np.abs(offset), ((0, 0), (3, 0))), axis=1)[:, [-3]]
    touches = probability > 0.5 if model.has_mask else np.abs(offset) > third
    trained = model.n_cells.numpy(force=True) > 0
    return metrics | with_prefix("target_", mask_recovery(
        true_mask[trained], touches[trained], correlations(z, total)))


@torch.no_grad()
def posterior_means(run, cells, mask, effect):
    """Yield posterior means of z_basal and of z = z_basal + z_pert, (B, L) each, of some cells in
    order, over draws of all masks and effects, (K, T, L), in the axes of the masks: column l of
    `model.axes` is latent l of masks and effects."""
    model = run.model
    for x, d, c in run.batches.in_order(cells):
        z_pert = sum_effects(mask, effect, d, model.axes)  # (draws, B, L)
        loc, _ = model.encode(x, z_pert, d, c)
        yield [(z.mean(0) @ model.axes).numpy(force=True)
               for z in (loc.expand_as(z_pert), loc + z_pert)]


def warnings_of(m):
    """Sentences on what a user should know before believing anything of metrics m: a list."""
    found = []
    if "mask" in m and not m["config"]["adapt"]:
        steps = m["step"] - m["masks_from"]
        if m["config"]["axes"] == "sparsest" and steps < 100:
            found.append("masks have hardly been trained and are a first guess: the lowest "
                         f"validation loss was {steps:,} steps after they began, at step "
                         f"{m['masks_from']:,}" + (
                             ", and rose from there: the training cells may be too few to say "
                             "which latent dimensions a perturbation touches"
                             if m["step"] < m["last_step"] else ", where training ended"))
        elif m["config"]["axes"] == "learned" and m["mask_mean_probability"] > 0.45:
            found.append(f"masks have hardly been trained: their mean probability is "
                         f"{m['mask_mean_probability']:.3f}, where training starts at 0.5, so "
                         "that effects mean little yet: more --steps, or a higher --lr")
        elif m["n_empty_masks"] > 0.5 * m["n_trained_perturbations"]:
            found.append(f"the masks of {m['n_empty_masks']:,} of {m['n_trained_perturbations']:,} "
                         "perturbations are empty: the model sees no effect of these. They have "
                         "none, too few cells for it, or --alpha is too small")
    # Baselines of cells that they are compared with are no rivals.
    rivals = [row for row in BASELINES if m["options"]["effects_from"] == "test"
              or row in ("no_change", "perturbed_mean")]
    for scale in SCALES:
        r2 = {row: score(m, scale, "all", row)["r_squared"] for row in ("model", *rivals)}
        limit, words = score(m, scale, "all", "noise_limit"), f"effects ({scale.replace('_', '-')})"
        better = [f"{BASELINES[row]} ({r2[row]:.3f})" for row in rivals if r2[row] >= r2["model"]]
        if limit.get("pearson", 1) <= limit.get("pearson_se", 0):
            found.append(f"{words} by the data in {m['options']['effects_from']} cells do not "
                         "stand out of their noise: nothing can be learnt from comparing with them")
        elif better:
            found.append(f"predicted {words} have an R2 of {r2['model']:.3f} with the data's, no "
                         f"better than {', '.join(better)}, which need no model")
    return found


def score(metrics, scale, group, row):
    """The metrics of one row of ["effects"], a dict; empty where there is none."""
    return next((m for m in metrics["effects"] if (m["scale"], m["group"], m["row"]) == (
        scale, group, row)), {})


# ============================================================================================
# Tables
# ============================================================================================

COLUMNS = {"from_mean": "from mean", "weighted_r_squared": "weighted R2",
           "discrimination": "discrim.", "discrimination_by_prediction": "VCC",
           "pearson": "ATE-Pearson", "r_squared": "R2"}
ROWS = BASELINES | {"noise_limit": "noise limit"}  # what stands below a model
CAUTION = ("(ATE-Pearson and R2, the paper's, take the control as reference, and what all "
           "conditions share flatters them: the columns before tell conditions apart)")


def markdown(header, rows):
    """A Markdown table that is aligned in a terminal, too."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def in_words(values, digits=3):
    """Text of a number, of several as mean ± sd; "-" for one that is undefined."""
    values = np.atleast_1d(np.array(values, float))  # None is NaN
    values = values[~np.isnan(values)]
    text = f"{round(np.mean(values), digits) + 0.0:.{digits}f}" if len(values) else "-"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def options_line(options):
    """How the numbers below were made."""
    return (f"(IWELBO with {options['iwelbo_particles']:,} particles; effects with "
            f"{options['ate_particles']:,} particles, cells of {options['library']:,} counts)")


def guide_of(config):
    """The name of a run's guide in Table 1."""
    correlated = [name for name, on in (("z_basal", config["correlated_basal"]),
                                        ("E", config["correlated_effects"])) if on]
    return "corr. " + " and ".join(correlated) if correlated else "mean-field"


def model_of(config):
    """A run's model in the rows of a table."""
    return config["model"] + ", sparsest axes" * (config["axes"] == "sparsest") + (
        ", adapted" if config["adapt"] else "")


def table(m, scale="log_normalised"):
    """The metrics of one run as text: likelihood, masks, effects beside baselines, warnings."""
    m = {name: math.nan if value is None else value for name, value in m.items()}
    lines = [options_line(m["options"]),
             f"test IWELBO, predictive: {m['iwelbo']:.2f} per cell, standard error "
             f"{m['iwelbo_se']:.2f} over {m['n_test_cells']:,} cells, "
             f"{m['iwelbo_monte_carlo_error']:.2f} by Monte Carlo",
             f"test IWELBO, joint:      {m['iwelbo_joint_per_cell']:.2f} per cell, "
             f"effective sample size {m['iwelbo_joint_effective_sample_size']:.2f}"]
    if "iwelbo_new" in m:
        lines.append(f"{m['n_new_cells']:,} of them with the {m['n_new_perturbations']:,} new "
                     f"perturbations: predictive {m['iwelbo_new_before']:.2f} before these were "
                     f"learned, {m['iwelbo_new']:.2f} after")
    if "mask" in m:
        lines.append(f"masks: {m['mask_mean_size']:.2f} latent dimensions per perturbation; "
                     f"{m['n_empty_masks']:,} of {m['n_trained_perturbations']:,} are empty")
    if "latent_mcc" in m:
        lines += [f"{words} MCC {m[of + '_mcc']:.3f}, of ranks {m[of + '_mcc_ranks']:.3f}, R2 "
                  f"{m[of + '_r_squared']:.3f}" for words, of in (
                      ("latents z:         ", "latent"), ("by the label alone:", "label"),
                      ("basal states:      ", "basal"))]
    for of, words in (("mask", "true masks"), ("target", "true targets, matched by latents")):
        if of + "_f1" in m:
            lines.append(f"{words}: precision {m[of + '_precision']:.3f}, recall "
                         f"{m[of + '_recall']:.3f}, F1 {m[of + '_f1']:.3f}")
    if "mask_pathway_accuracy" in m:
        lines.append(f"mask pathway accuracy: {m['mask_pathway_accuracy']:.3f}, sd over splits "
                     f"{m['mask_pathway_accuracy_sd']:.3f} ({m['n_annotated']:,} annotated; the "
                     f"commonest pathway for all: {m['mask_pathway_chance']:.3f})")
    if m["on_target"]["n"]:
        lines.append(f"targeted genes ({m['on_target']['n']:,}): counts change by " + ", ".join(
            f"{100 * m['on_target'][row]:+.0f} % ({row.replace('_', ' ')})"
            for row in ("data", "model", "own_mean") if m["on_target"][row] is not None)
            + "; not counted below" * (not m["options"]["own_targets"]))
    if m["n_not_compared"]:
        lines.append(f"{m['n_not_compared']:,} conditions have no control cell with their "
                     "covariates: they are compared with nothing")
    for group, words, without in (
            ("all", "conditions", "matching_mean"),
            ("held_out", "conditions held out of training", "own_mean"),
            ("pairs", "pairs, {:,} of them in training, {:,} with both parts alone there".format(
                *m["n_pairs"]), "")):
        n = score(m, scale, group, "model")["n_conditions"]
        if not n:
            continue
        rows = [[label, *(in_words(score(m, scale, group, row).get(column)) for column in COLUMNS)]
                for row, label in {"model": f"**{m['config']['model']}**", **ROWS}.items()
                if row != without]
        rows[-1][1 + list(COLUMNS).index("pearson")] += (
            f" ± {in_words(score(m, scale, group, 'noise_limit')['pearson_se'])}")
        lines += ["", f"effects of {n:,} {words}, {scale.replace('_', '-')}, by the data in "
                      f"{m['options']['effects_from']} cells", "",
                  markdown(["predicted by", *COLUMNS.values()], rows)]
    lines += ["", CAUTION]
    if m["options"]["effects_from"] == "all":
        lines.append("(predictions were trained on most of these cells, with their noise: they may "
                     "exceed its limit)")
    if m["config"]["adapt"]:
        lines.append("(in this file the model has learned from the training cells with new "
                     f"perturbations; cells that {m['config']['adapt']} was trained on are no test "
                     "of it)")
    return "\n".join(lines + [""] * bool(m["warnings"]) + [f"warning: {w}" for w in m["warnings"]])


SEEDS = ("seed", "split_seed", "simulated_seed", "base_seed")  # a row is a mean over these
IN_COLUMNS = ("model", "axes", "correlated_basal", "correlated_effects", "train_combinations")
NO_MATTER = ("data", "name", "preset", "adapt", "simulated", "log_every", "validate_every",
             "precision", "stream")


def settings(m):
    """What runs of one row of a table have in common, a dict: all options of training but the
    seeds. (How a file was read is in its fingerprint, or does not change the numbers.)"""
    left_out = {*SEEDS, *NO_MATTER, *data.READING} - {"covariate", "split_column"}
    config = {k: v for k, v in m["config"].items() if k not in left_out}
    if "base" in config:  # with --adapt: how the other run was trained
        config["base"] = {k: v for k, v in config["base"].items() if k not in left_out}
    return config | ({} if m["done"] else {"stopped at step": m["last_step"]})


def key(*values):
    """The same values as text, to compare and to sort."""
    return json.dumps(values, sort_keys=True)


def tables_of(runs):
    """Runs in lists, one for each table, in the order of Table 1: those of one screen (simulated
    ones differ by their seeds) and split, evaluated alike. Of runs that differ in nothing the first
    stays, and a line names the others: the same seed twice would be a spread of zero."""
    def of_table(m):
        """What a table has in common."""
        screen = {k: v for k, v in m["config"].items()
                  if k.startswith("simulated_") and k not in SEEDS}
        return key(screen if m["config"]["simulated"] else m["fingerprint"],
                   m["config"]["split"], m["options"])

    different, tables = {}, {}
    for m in runs:
        same = key(of_table(m), settings(m), [m["config"].get(k) for k in SEEDS])
        if different.setdefault(same, m) is not m:
            print(f"{m['folder']} is {different[same]['folder']} once more, with the same data, "
                  "options and seeds: it is left out of the tables")
    for m in sorted(different.values(), key=lambda m: (
            of_table(m), list(MODELS).index(m["config"]["model"]),
            [m["config"][k] for k in (*IN_COLUMNS[1:], "split_seed", "seed")])):
        tables.setdefault(of_table(m), []).append(m)
    return list(tables.values())


def of_reference(m):
    """Whether a run is what the paper's Figure 4 compares with: SAMS-VAE with the correlated guide,
    and no combinations in training."""
    return (m["config"]["model"] == "sams-vae" and not m["config"]["train_combinations"]
            and guide_of(m["config"]) == "corr. z_basal and E")


def iwelbo_of_cells(runs, conditions=None):
    """{(screen, seed of the split, test cell): predictive IWELBO, a mean over runs} of the runs'
    iwelbo.csv; of all conditions or of some."""
    values = {}
    for m in runs:
        with open(os.path.join(m["folder"], "iwelbo.csv"), encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if conditions is None or row["condition"] in conditions:
                    values.setdefault((m["fingerprint"], m["config"]["split_seed"], row["cell"]),
                                      []).append(float(row["iwelbo"]))
    return {cell: np.mean(of_cell) for cell, of_cell in values.items()}


def iwelbo_difference(runs, others):
    """Predictive IWELBO of some runs minus that of others: the mean over cells, its standard error,
    and the part of that by Monte Carlo. NaN where they have no test cell in common.

    Cells differ much more than two models on the same cell do: differences are taken cell by cell.
    How training with other seeds would change them is not in these errors.
    """
    a, b = iwelbo_of_cells(runs), iwelbo_of_cells(others)
    difference = np.array([a[cell] - b[cell] for cell in a if cell in b])
    if not len(difference):
        return math.nan, math.nan, math.nan
    noise = [sum((m["iwelbo_monte_carlo_error"] or 0) ** 2 for m in some) / len(some) ** 2
             for some in (runs, others)]
    return (difference.mean(), difference.std() / math.sqrt(max(1, len(difference) - 1)),
            math.sqrt(sum(noise)))


def one_of_each_split(members, f):
    """Baselines depend on data, split and fraction f, not on the model: one run of each split."""
    return list({(m["config"]["split_seed"], m["config"].get("simulated_seed")): m
                 for m in members if m["config"]["train_combinations"] == f}.values())


OF_MODELS = {"iwelbo": ("test IWELBO", 2), "iwelbo_joint_per_cell": ("joint IWELBO", 2),
             "mask_pathway_accuracy": ("mask pathway acc.", 3), "mask_f1": ("mask F1", 3),
             "latent_mcc": ("MCC", 3), "label_mcc": ("by label", 3), "basal_mcc": ("basal", 3),
             "latent_r_squared": ("R2 of z", 3), "target_f1": ("target F1", 3)}


def table_of_runs(runs, scale="log_normalised"):
    """Markdown of the metrics of many runs: a row per model and settings, mean ± sd over seeds.

    Each screen, split and way of evaluating has a table of its own; a column says in which options
    of training its rows differ. In the Norman splits, effects are those of conditions with test
    cells. "difference" is that of test IWELBO from a reference row, the best one, or in the Norman
    splits that of Figure 4, with its two errors: see `iwelbo_difference`.
    """
    tables = []
    for members in tables_of(runs):
        config, options = members[0]["config"], members[0]["options"]
        norman = config["split"] != "random"
        group = "test" if norman else "all"
        by_settings = {}
        for m in members:
            by_settings.setdefault(key(settings(m)), []).append(m)
        rows_of = list(by_settings.values())
        differing = [k for k in settings(members[0]) | {"stopped at step": 0} if k not in IN_COLUMNS
                     and len({key(settings(same[0]).get(k)) for same in rows_of}) > 1]
        reference = ([same for same in rows_of if norman and of_reference(same[0])] or [max(
            rows_of, key=lambda same: np.mean([m["iwelbo"] or -math.inf for m in same]))])[0]

        def of_effects(same, label, prediction):
            """A row of what is known of baselines, too."""
            return {"model": label, "f": f"{same[0]['config']['train_combinations']:g}"} | {
                title: in_words([score(m, scale, group, prediction).get(column) for m in same])
                for column, title in COLUMNS.items()}

        rows = []
        for same in rows_of:
            own = settings(same[0])
            difference, *errors = iwelbo_difference(same, reference)
            agreement, chance = mask_agreement([m["mask"] for m in same if "mask" in m]) if len(
                {m["fingerprint"] for m in same}) == 1 else (math.nan, math.nan)
            rows.append(of_effects(same, model_of(same[0]["config"]), "model") | {
                title: in_words([m.get(name) for m in same], digits)
                for name, (title, digits) in OF_MODELS.items()} | {
                "guide": guide_of(own), "runs": str(len(same)),
                "settings": ", ".join(f"{k} {own[k]}" for k in differing if k in own),
                "difference": "reference" if same is reference else
                f"{difference:+.2f} ({', '.join(in_words(e, 2) for e in errors)})",
                "masks agree": "-" if math.isnan(agreement) else
                f"{agreement:.3f} (chance {chance:.3f})"})
        rows += [of_effects(one_of_each_split(members, f), label, name)
                 for name, label in ROWS.items() if norman or name != "matching_mean"
                 for f in sorted({m["config"]["train_combinations"] for m in members})]
        first, *others = (title for title, _ in OF_MODELS.values())
        header = [title for title in (
            "model", "guide", "settings", *["f"] * norman, "runs", first,
            *["difference"] * (len(rows_of) > 1), *others, "masks agree", *COLUMNS.values())
            if any(cells.get(title, "-") not in ("-", "") for cells in rows)]
        tables.append("\n".join([
            f"{os.path.basename(config['data'])}, split {config['split']}; effects of {group} "
            f"conditions, {scale.replace('_', '-')}, by the data in {options['effects_from']} "
            "cells", options_line(options), "",
            markdown(header, [[cells.get(title, "") for title in header] for cells in rows])]))
    return "\n\n".join([*tables, CAUTION])


def table_of_adapted(runs):
    """Markdown of runs that adapt others: predictive IWELBO of test cells with new perturbations,
    before, after, and, of the same cells, by a run among these that was trained on all of the same
    file, with the same model, guide and seed. Empty without runs that adapt others."""
    def alike(m):
        """What it must have in common."""
        config = m["config"] | {"adapt": None}
        return m["fingerprint"], model_of(config), guide_of(config), config["seed"]

    rows = []
    for m in (m for m in runs if m.get("iwelbo_new") is not None):
        cells = iwelbo_of_cells([m], m["new_conditions"]).keys()
        of_all = {other["folder"]: iwelbo_of_cells([other], m["new_conditions"]) for other in runs
                  if not other["config"]["adapt"] and alike(other) == alike(m)}
        by, values = next(((by, [*v.values()]) for by, v in of_all.items() if v.keys() == cells),
                          ("-", math.nan))
        rows.append([m["folder"], f"{m['n_new_cells']:,}", *(in_words(v, 2) for v in (
            m["iwelbo_new_before"], m["iwelbo_new"], np.mean(values))), by])
    return markdown(["adapted", "cells", "before", "after", "trained on all", "by"],
                    rows) if rows else ""


# ============================================================================================
# Use of a trained model
# ============================================================================================


def dosages_of(run, conditions):
    """Dosages (C, P), for the run's model, of conditions such as "B+A" or "control", each once; and
    how the screen spells them, "A+B".

    Raises DataError for names that the screen does not have, with those that come near.
    """
    screen, index = run.screen, {name: t for t, name in enumerate(run.model_screen.perturbations)}
    known = {name.upper(): name for name in [*screen.perturbations, *index]}
    rows = {}
    for condition in conditions:
        names = [condition] if condition in known.values() else sorted(
            {name.strip() for name in condition.split(screen.joiner)} - {"control"})
        for name in names:
            if name not in known.values():
                near = difflib.get_close_matches(name.upper(), known, 5, 0.5) or list(known)[:5]
                raise DataError(
                    f"{run.folder}: no perturbation is called {name!r}; of {len(known):,}, these "
                    f"come near: {', '.join(known[n] for n in near)} (the control is called "
                    f"control, a combination A{screen.joiner}B)")
        spelled = screen.joiner.join(names) or "control"
        if names and not run.model.adds_effects:  # one label per cell
            names = [spelled] if spelled in index else []
            if not names:
                print(f"{spelled}: not in the data, and {run.config['model']} cannot add effects "
                      "up: no effect")
        rows[spelled] = [index[name] for name in names]
    longest = max(1, *map(len, rows.values()))
    return torch.tensor([row + [data.NONE] * (longest - len(row)) for row in rows.values()],
                        device=run.device), list(rows)


def controls_of_file(run, path):
    """The control cells of another file: a Screen, with genes and c as in the run. It is read like
    the run's, but for --subset and --exclude.

    Raises DataError where the run's genes are not there, once each, or no value of a covariate.
    """
    options = {k: run.config.get(k) for k in ("control", "one_hot_prefix", "combination_separator",
                                              "label_pattern", "layer")}
    column = run.screen.label_column
    if column and column not in data.read_h5ad(path, options["layer"]).obs_columns:
        raise DataError(f"{path}: has no obs column {column!r}, which says in the run's data what "
                        "is a control: add one, if need be with control in all cells")
    screen = data.read_screen(path, perturbation_column=column, **options, only_controls=True,
                              genes_of=run.screen.gene_names)
    if run.config["covariate"]:
        screen.c = train.known_covariates(screen, run.config["covariate"], run.screen.covariates)
    return screen


@torch.no_grad()
def population(run, d, condition, n, seed, other=None):
    """n cells to receive d (P,): basal states (n, L), covariates (n, columns), and library sizes
    (n,). The same for the same arguments.

    Basal states are from the prior, covariates and library sizes are real: from the screen's cells
    of the condition; if there are none, of those that received one of its perturbations, or of all.
    With `other`, from `controls_of_file`, they are from its control cells, and basal states from
    q(z_basal | x).
    """
    torch.manual_seed(seed)
    rng, model, screen = np.random.default_rng(seed), run.model, other or run.screen
    parts = [t for t, name in enumerate(screen.perturbations)
             if name in condition.split(screen.joiner)]
    every = np.ones(len(screen.d), bool)
    chosen = next(cells for cells in (screen.conditions == condition, np.isin(
        screen.d, parts).any(1), every) if cells.any()) if other is None else every
    cells = np.resize(rng.permutation(np.flatnonzero(chosen)), n)
    c = torch.from_numpy(screen.c[cells]).to(run.device)
    if other is None:
        return sobol_normal(n, model.n_latent, run.device), c, screen.library[cells]
    basal = []
    for few in np.array_split(np.arange(n), math.ceil(n / 512)):
        x = torch.from_numpy(screen.counts.dense(cells[few]).astype(np.float32)).to(run.device)
        loc, var = model.encode(x, x.new_zeros(1, len(few), model.n_latent), torch.full_like(
            d, data.NONE).expand(len(few), -1), c[few])
        basal.append((loc + var.sqrt() * torch.randn_like(loc)).reshape(-1, model.n_latent))
    return torch.cat(basal), c, screen.library[cells]


@torch.no_grad()
def spread_of_effect(model, d, basal, c):
    """How far the effects of d (P,) on expected counts per 10,000, 1e4 rho, lie from their mean in
    cells: 5 % and 95 % quantiles over particles, (2, G).

    A particle is a basal state, of basal (K, L), with its covariates c (K, columns) and a draw of
    (M, E): so many of the population's cells lie between, by what the model knows of the effects.
    It is no standard error.
    """
    control = model.log_rho(basal, torch.full_like(d, data.NONE), c).exp()
    difference = 1e4 * (sample_frequencies(model, d, c, basal).exp() - control)  # (K, G)
    return torch.quantile(difference, torch.tensor([0.05, 0.95], device=d.device),
                          dim=0) - difference.mean(0)


def predict(run, conditions, ate_particles=2500, library=None, evaluation_seed=0, other=None,
            n_rows=10):
    """Write predictions.h5ad: expression and effects, (condition, gene), by the model.

    X and the layer expected_log_normalised, expected_counts; effect_log_normalised and
    effect_counts, differences from control cells; effect_counts_low and _high, between which 90 %
    of cells lie, see `spread_of_effect`; log2_fold_change, of expected counts. Counts are per
    10,000, and both are of cells of the given library, see `library_of`. `other`, from
    `controls_of_file`: of that file's control cells. Each condition's numbers depend on no other
    one. Returns lines on what is known of each, and a table of its n_rows strongest effects.
    """
    dosages, spelled = dosages_of(run, conditions)
    lines, rows, layers = [], [], {}
    for d, name in zip(dosages, spelled):
        basal, c, libraries = population(run, d, name, ate_particles, evaluation_seed, other)
        depth = library or (library_of(run) if other is None else int(np.median(libraries)))
        arms = torch.stack([torch.full_like(d, data.NONE), d])
        expected = {scale: y.cpu().numpy() for scale, y in expected_expression(
            run.model, arms, c.expand(2, -1, -1), library=depth, basal=basal).items()}
        control, counts = expected["per_10k"]
        low, high = (counts - control
                     + spread_of_effect(run.model, d, basal[:1000], c[:1000]).cpu().numpy())
        fold_change = np.log2(counts / control)
        of_condition = {"effect_counts_low": low, "effect_counts_high": high,
                        "log2_fold_change": fold_change}
        for scale, of_model in SCALES.items():
            without, treated = expected[of_model]
            of_condition |= {f"expected_{scale}": treated, f"effect_{scale}": treated - without}
        for layer, values in of_condition.items():
            layers.setdefault(layer, []).append(values.astype(np.float32))
        lines.append(f"{name}: {known_of(run, d, name, c)}")
        by_data, error = effect_by_data(run, name) if other is None else (None, None)
        effect = of_condition["effect_log_normalised"]
        for g in np.argsort(-np.abs(effect), kind="stable")[:n_rows]:
            if effect[g] != 0:
                rows.append([
                    name, str(run.screen.gene_names[g]), f"{control[g]:.2f}",
                    f"{counts[g] - control[g]:+.2f}", f"{low[g]:+.2f} to {high[g]:+.2f}",
                    "-" if by_data is None else f"{by_data[g]:+.2f} ± {error[g]:.2f}",
                    f"{fold_change[g]:+.2f}"])
    trained_on = run.screen.conditions[run.taught_by["train"]]
    data.write_h5ad(
        os.path.join(run.folder, "predictions.h5ad"),
        X=np.stack(layers["expected_log_normalised"]),
        obs={"condition": spelled,
             "n_training_cells": np.array([(trained_on == name).sum() for name in spelled])},
        var={"gene": run.screen.gene_names},
        layers={layer: np.stack(values) for layer, values in layers.items()},
        uns={"library": depth, "basal_states": "prior" if other is None else other.path})
    lines.append("\ncounts per 10,000, of the genes of largest effect on log-normalised expression "
                 f"(cells of {depth:,})" + "; data: all cells, those trained on, too, ± standard "
                 "error" * (other is None) + "\n")
    return "\n".join([*lines, markdown(["condition", "gene", "control", "effect",
                                        "5 % to 95 % of cells", "effect by the data",
                                        "log2 fold change"], rows)])


def known_of(run, d, condition, c):
    """What is known of a condition with dosages d (P,), in words: training cells of it and of its
    parts, masks that are empty, and whether covariates c (K, columns) were seen."""
    cells, model = run.taught_by["train"], run.model
    n = int((run.screen.conditions[cells] == condition).sum())
    words = [f"{n:,} training cells" if n else "no training cells of its own"
             + f" since {run.config['adapt']}" * bool(run.config["adapt"])]
    for t in d[d != data.NONE].tolist():
        name, n_own = run.model_screen.perturbations[t], int(model.n_cells[t])
        if not n:
            words.append(f"{name} has {n_own:,}, alone and in combinations")
        if not n_own:
            words.append(f"WHAT IS PREDICTED FOR {name} IS THE PRIOR'S, NOT THE DATA'S"
                         if model.has_effects and model.adds_effects else
                         f"{name} HAS NO EFFECT IN THE MODEL")
        elif model.has_mask and model.mask_probability()[t].max() <= 0.5:
            words.append(f"the mask of {name} is empty: hardly any effect")
        received = cells[(run.model_screen.d[cells] == t).any(1)]
        seen = (c.cpu().numpy()[:, None] == np.unique(run.screen.c[received], axis=0)).all(2)
        if len(received) and not seen.any(1).all():
            words.append(f"{1 - seen.any(1).mean():.0%} of the cells that it is predicted for have "
                         f"covariates that no training cell of {name} has: EXTRAPOLATED")
    return "; ".join(words)


def effect_by_data(run, condition):
    """The effect of a condition on counts per 10,000 by all cells of the data, and its standard
    error, (G,) each; None twice where there is nothing to compare."""
    arms = Arms.of(run)
    place = np.flatnonzero(arms.names == condition)
    cells = np.flatnonzero(np.isin(run.screen.conditions, [condition, "control"]))
    means = mean_expression(run.batches, cells, arms)["counts"]
    share = arms.shares(means.n)
    if not len(place) or not share[arms.condition == place[0]].any():
        return None, None
    effect = np.subtract(*arms.compared(means.mean, share))[place[0]]
    return effect, np.sqrt(np.add(*arms.compared(means.variance, share**2))[place[0]])


def sample(run, conditions, n, library=None, evaluation_seed=0, other=None):
    """Write samples.h5ad: counts of n simulated cells of each condition, for scanpy and others.

    Basal states, covariates and library sizes as in `population` (`library` for all, if given),
    each cell with a draw of (M, E) of its own. obs has the columns of the data's labels, spelled as
    there, and of its covariates.
    """
    screen, (dosages, spelled) = run.screen, dosages_of(run, conditions)
    covariates = run.config["covariate"] or []
    column = screen.label_column or data.free("condition", covariates)
    index = data.free("cell", [column, *covariates])
    labels = screen.obs(column) if screen.label_column else screen.conditions
    x, obs = [], {name: [] for name in (index, column, *covariates)}
    for d, name in zip(dosages, spelled):
        basal, c, libraries = population(run, d, name, n, evaluation_seed, other)
        sizes = torch.as_tensor(np.full(n, library) if library else libraries,
                                dtype=torch.float32, device=run.device)
        for few in torch.arange(n).split(1000):
            log_rho = sample_frequencies(run.model, d, c[few], basal[few])
            counts = sample_counts(run.model, log_rho, sizes[few])
            x.append(counts.cpu().numpy().astype(np.uint32))
        same = np.flatnonzero(screen.conditions == name)
        obs[index] += [f"{name}-{i + 1}" for i in range(n)]
        obs[column] += [str(labels[same[0]]) if len(same) else name] * n
        for j, covariate in enumerate(covariates):
            obs[covariate] += ["" if v == data.NONE else screen.covariates[v].split("=", 1)[1]
                               for v in c[:, j].tolist()]
    x = np.concatenate(x)
    data.write_h5ad(os.path.join(run.folder, "samples.h5ad"),
                    X=x.astype(np.uint16) if x.max() < 2**16 else x, obs=obs,
                    var={"gene": screen.gene_names})


@torch.no_grad()
def write_latents(run, n_draws=50, evaluation_seed=0):
    """Write latents.h5ad: the screen's cells and genes without counts, and latent states.

    obsm X_z_basal and X_z = z_basal + z_pert (N, L), posterior means, in the axes of the masks
    (column l of `model.axes` is latent l of masks and effects); all columns of obs, and
    sams_vae_condition and sams_vae_split; uns: perturbations, mask_probability, effect = E[e_t] and
    offset = E[m_t * e_t] (T, L), where the model has them.
    """
    model, screen = run.model, run.screen
    torch.manual_seed(evaluation_seed)
    mask, effect = model.sample_many_globals(model.all_perturbations(), n_draws)
    basal, total = map(np.concatenate, zip(*posterior_means(
        run, np.arange(len(screen.d)), mask, effect)))

    columns = {name: functools.partial(screen.obs, name) for name in screen.file.obs_columns}
    split = np.full(len(screen.d), "", dtype=object)
    for name, cells in run.split.items():
        split[cells] = name
    obs = {data.free("cell", columns): screen.cell_names, **columns,
           data.free("sams_vae_condition", columns): screen.conditions,
           data.free("sams_vae_split", columns): split}
    uns = {"perturbations": list(run.model_screen.perturbations)}
    if model.has_mask:
        uns["mask_probability"] = model.mask_probability().cpu().numpy()
    if model.has_effects:
        uns |= {"effect": effect.mean(0).cpu().numpy(),
                "offset": (mask * effect).mean(0).cpu().numpy()}
    data.write_h5ad(os.path.join(run.folder, "latents.h5ad"), X=None, obs=obs,
                    var={"gene": screen.gene_names}, obsm={"X_z_basal": basal, "X_z": total},
                    uns=uns)


# ============================================================================================
# Figures (matplotlib is imported here only)
# ============================================================================================


def pyplot():
    """matplotlib.pyplot, drawing into files. Raises DataError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise DataError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save_figure(figure, title, path):
    """Write a PNG file, or nothing."""
    figure.suptitle(title)
    with data.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    pyplot().close(figure)
    return path


def heat_map(axis, values, limit, title, **labels):
    """Values (rows, columns) from -limit, blue, or from 0, white, to limit. Returns the image."""
    axis.set(title=title, xticks=[], yticks=[], **labels)
    signed = values.min() < 0
    return axis.imshow(values, aspect="auto", cmap="RdBu_r" if signed else "Greys",
                       vmin=-limit if signed else 0, vmax=limit, interpolation="nearest")


def in_order_of_angle(matrix):
    """An order of the rows, neighbours alike: by angle in the first two principal components."""
    u, s, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    first, second = np.pad(u * s, ((0, 0), (0, 1)))[:, :2].T
    return np.argsort(np.arctan2(second, first), kind="stable")


def figure_of_training(folder, step):
    """Loss, KL terms and masks over the steps of log.jsonl; a line at the step of best.pt."""
    log = train.read_log(folder)
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3), layout="constrained", sharex=True)
    for axis, unit, names in (
            (axes[0], "nats per cell", ("loss", "validation_loss")),
            (axes[1], "nats per cell", ("kl_basal", "kl_mask", "kl_effect")),
            (axes[2], "mean probability", ("mask_probability",)),
            (axes[3], "latents of probability > 0.5", ("mask_size",))):
        for name in names:
            lines = [line for line in log if name in line]
            axis.plot([line["step"] for line in lines], [line[name] for line in lines],
                      label=name.replace("_", " "), marker="." * (name == "validation_loss"))
        axis.set(xlabel=f"step (line: the best, {step:,})", ylabel=unit)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
        axis.axvline(step, color="0.6", linewidth=0.8)
    losses = [line[name] for line in log for name in ("loss", "validation_loss") if name in line]
    if losses:  # the first ones would hide the others
        axes[0].set_ylim(min(losses) - 1, np.quantile(losses, 0.95) + 1)
    axes[1].set_yscale("symlog", linthresh=0.01)
    return save_figure(figure, os.path.basename(folder), os.path.join(folder, "training.png"))


def figure_of_masks(run, pathways=None):
    """Figure 2: mask probabilities and mean offsets of perturbations, ordered by pathway; with
    turned axes also the offsets as encoder and decoder see them."""
    model, names = run.model, np.array(run.model_screen.perturbations)
    probability, offset = probability_and_offset(model)
    pathway = pathway_of(names, data.read_pathways(
        pathways or run.config["data"]))
    if not any(pathway):
        pathway[:] = "all perturbations"
    groups = sorted(set(pathway) - {None})
    members = [np.flatnonzero(pathway == group) for group in groups]
    rows = np.concatenate([m[in_order_of_angle(offset[m])] for m in members])
    # Latents have no order of their own: each stands where the pathway stands that it matters most
    # to, so that a mask that follows pathways shows as blocks along the diagonal. Those that no
    # perturbation touches are left out.
    strength = np.stack([np.abs(offset[m]).mean(0) for m in members])
    latents = np.lexsort((-strength.max(0), strength.argmax(0)))
    touched = (probability > 0.5).any(0)
    latents = latents[touched[latents]] if touched.any() else latents

    limit = max(1e-6, np.quantile(np.abs(offset), 0.99))
    panels = [("mask probability", probability[:, latents], 1, latents)] * model.has_mask + [
        ("mean offset E[m e]", offset[:, latents], limit, latents)]
    if run.config["axes"] == "sparsest":
        panels.append(("offset in the networks' axes", offset @ model.axes.numpy(force=True).T,
                       limit, np.arange(model.n_latent)))
    figure, axes = pyplot().subplots(1, len(panels), squeeze=False, layout="constrained",
                                     sharey=True, figsize=(2 + 5 * len(panels), 9))
    edges = np.cumsum([0, *map(len, members)])
    for axis, (title, values, limit, which) in zip(axes[0], panels):
        image = heat_map(axis, values[rows], limit, title, xlabel=f"{len(which)} of "
                         f"{model.n_latent} latent dimensions")
        if len(which) <= 40:
            axis.set_xticks(np.arange(len(which)), which, fontsize=7)
        figure.colorbar(image, ax=axis, shrink=0.5, extend="neither" if limit == 1 else "both")
        for edge in edges[1:-1]:
            axis.axhline(edge - 0.5, color="0.3", linewidth=0.5)
    axes[0, 0].set_yticks((edges[1:] + edges[:-1] - 1) / 2, [
        f"{group[:28]} ({len(m)})" for group, m in zip(groups, members)])
    if len(groups) == 1 and len(rows) <= 80:
        axes[0, 0].set_yticks(np.arange(len(rows)), names[rows], fontsize=7)
    return save_figure(figure, f"{os.path.basename(run.folder)}: {len(rows):,} of {len(names):,} "
                       "perturbations", os.path.join(run.folder, "masks.png"))


def figure_of_effects(run, metrics):
    """Figure 3: effects by the data and by the model, as heat maps and as a density of points. With
    60 conditions or fewer the maps have names, and the 50 genes of largest effect by the data."""
    layers = data.read_layers(os.path.join(run.folder, "effects.h5ad"))
    kept = np.isfinite(layers["data_log_normalised"]).all(1)
    observed, predicted = (layers[f"{name}_log_normalised"][kept] for name in ("data", "model"))
    if not len(observed):
        raise DataError(f"{run.folder}: no condition has cells that effects could be taken from")
    rows, columns = in_order_of_angle(observed), in_order_of_angle(observed.T)
    by_name = len(rows) <= 60
    if by_name:
        columns = columns[np.isin(columns, np.argsort(-np.abs(observed).mean(0))[:50])]
    limit = max(1e-6, np.quantile(np.abs(observed[:, columns]), 0.99))
    figure, axes = pyplot().subplots(1, 3, layout="constrained", width_ratios=(1, 1, 0.8),
                                     figsize=(18, 12) if by_name else (14, 4.8))
    for axis, values, title in ((axes[0], observed, "data"), (axes[1], predicted, "model")):
        image = heat_map(axis, values[rows][:, columns], limit, f"effects by the {title}",
                         xlabel=f"{len(columns):,} of {observed.shape[1]:,} genes",
                         ylabel=f"{len(values):,} conditions")
        if by_name:
            axis.set_xticks(np.arange(len(columns)), run.screen.gene_names[columns], rotation=90,
                            fontsize=6)
            axis.set_yticks(np.arange(len(rows)), Arms.of(run).names[kept][rows], fontsize=7)
    figure.colorbar(image, ax=axes[:2], shrink=0.6, extend="both",
                    label="difference from control of log2(1 + counts per 10,000)")
    hexagons = axes[2].hexbin(observed.ravel(), predicted.ravel(), gridsize=70, bins="log",
                              mincnt=1, cmap="viridis")
    figure.colorbar(hexagons, ax=axes[2], label="condition-gene pairs")
    axes[2].axline((0, 0), slope=1, color="C3", linewidth=0.8)
    axes[2].set(xlabel="effect by the data", ylabel="effect by the model",
                title=f"all genes: Pearson r = {pearson(predicted, observed):.3f}",
                aspect="equal", adjustable="datalim")
    return save_figure(figure, f"{os.path.basename(run.folder)}, data effects from "
                       f"{metrics['options']['effects_from']} cells, log-normalised",
                       os.path.join(run.folder, "effects.png"))


def figure_of_combinations(runs, folder):
    """Figure 4: relative IWELBO and ATE-Pearson of the Norman runs over f, mean and sd over splits.

    One file for each table of the runs. Returns their paths.
    """
    paths = []
    for members in tables_of(runs):
        split = members[0]["config"]["split"]
        if split == "random":
            continue
        fractions = sorted({m["config"]["train_combinations"] for m in members})
        reference, models = [m for m in members if of_reference(m)], {}
        for m in members:
            models.setdefault(f"{model_of(m['config'])}, {guide_of(m['config'])}", []).append(m)

        def relative_iwelbo(m):
            """To the reference, on the same split."""
            return iwelbo_difference([m], reference)[0]

        def test_pearson(row):
            """A function of a run: ATE-Pearson of the conditions with test cells."""
            return lambda m: score(m, "log_normalised", "test", row)["pearson"]

        figure, axes = pyplot().subplots(1, 2, figsize=(12, 4), layout="constrained")
        for axis, title, bars in (
                (axes[0], "test IWELBO relative to\nSAMS-VAE (correlated), f = 0",
                 [(name, same, relative_iwelbo) for name, same in models.items()]),
                (axes[1], "ATE-Pearson, test conditions",
                 [(name, same, test_pearson("model")) for name, same in models.items()]
                 + [(BASELINES[name], [m for f in fractions for m in one_of_each_split(members, f)],
                     test_pearson(name)) for name in ("perturbed_mean", "additive")])):
            for i, (name, same, value) in enumerate(bars):
                values = [np.array([value(m) for m in same if f == m["config"][
                    "train_combinations"]], float) for f in fractions]
                values = [v[np.isfinite(v)] for v in values]
                axis.bar(np.arange(len(fractions)) + 0.85 * ((i + 0.5) / len(bars) - 0.5),
                         [v.mean() if len(v) else math.nan for v in values], 0.8 / len(bars),
                         yerr=[v.std(ddof=1) if len(v) > 1 else math.nan for v in values],
                         color=f"C{i}", capsize=2, label=name)
            axis.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
            axis.set(xlabel="fraction f of training combinations", ylabel=title)
            axis.axhline(0, color="0.3", linewidth=0.8)
        if not reference:
            axes[0].set_title("needs the run of SAMS-VAE with f = 0 on the same split")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        name = split + f"-{len(paths) + 1}" * bool(paths)
        screen = os.path.basename(members[0]["config"]["data"])
        paths.append(save_figure(figure, f"{split}, {screen}", os.path.join(folder, f"{name}.png")))
    return paths


# ============================================================================================
# The command line
# ============================================================================================


def main(arguments=None):
    """Evaluate or use runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+")
    add_options(parser, OPTIONS)
    parser.add_argument("--pathways", metavar="FILE.json", type=os.path.abspath,
                        default=argparse.SUPPRESS,
                        help="pathway -> list of genes (default: uns/pathways of the data)")
    parser.add_argument("--again", action="store_true", help="evaluate what is evaluated already")
    parser.add_argument("--scale", choices=SCALES, default="log_normalised", help="of effects in "
                        "tables", type=lambda text: text.replace("-", "_"))
    parser.add_argument("--figures", action="store_true", help="draw PNG files (needs matplotlib)")
    parser.add_argument("--predict", nargs="+", metavar="CONDITION",
                        help='such as "A+B" C: write predictions.h5ad')
    parser.add_argument("--sample", type=number_within(int, *AT_LEAST_1), metavar="N",
                        help="with --predict: also write samples.h5ad, N simulated cells of each")
    parser.add_argument("--latents", action="store_true", help="write latents.h5ad")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--data", metavar="FILE.h5ad", help="the data, if they have moved; with "
                        "--predict also another file, for whose control cells to predict")
    args = parser.parse_args(arguments)
    if args.figures and (args.predict or args.latents):
        parser.error("--figures evaluates, --predict and --latents do not: use two commands")
    if args.sample and not args.predict:
        parser.error("--sample N needs --predict CONDITION ..., the conditions to sample")
    if args.figures:
        pyplot()
    names = [*(option_name(flag) for flag, *_ in OPTIONS), "pathways"]
    options = {name: v for name, v in vars(args).items() if name in names}

    folders, evaluations, failed = [folder.rstrip("/") for folder in args.runs], [], False
    if len(folders) > 1:  # runs/* holds runs that have only begun, and figures
        unfinished = [f for f in folders if not os.path.isfile(os.path.join(f, "best.pt"))]
        print(*(f"{folder}: passed over, it has no best.pt" for folder in unfinished), sep="\n")
        folders = [f for f in folders if f not in unfinished]
    for folder in folders:
        try:
            if args.predict or args.latents:
                use_run(folder, args, options)
            else:
                evaluations.append(evaluate_run(folder, args, options, len(folders) == 1))
        except DataError as error:  # of several runs, the others go on
            if len(folders) == 1:
                raise
            print(f"error: {folder}: {error}", file=sys.stderr)
            failed = True
    if len(evaluations) > 1:
        print(f"\n{table_of_runs(evaluations, args.scale)}")
        adapted = table_of_adapted(evaluations)
        if adapted:
            print("\ntest cells with new perturbations, predictive IWELBO\n\n" + adapted)
        warned = [m["folder"] for m in evaluations if m["warnings"]]
        if warned:
            print("\nwith warnings, which python evaluate.py runs/NAME shows: " + ", ".join(warned))
    if evaluations and args.figures:
        for path in figure_of_combinations(evaluations, os.path.dirname(folders[0]) or "."):
            print(f"written: {path}")
    if failed or not folders:
        sys.exit(2)


def use_run(folder, args, options):
    """--predict and --latents of one run."""
    own_data, other = train.load_checkpoint(folder, "last.pt")["config"]["data"], None
    if args.predict and args.data and os.path.exists(own_data) and not (
            os.path.exists(args.data) and os.path.samefile(own_data, args.data)):
        if args.latents:
            raise DataError("--latents writes those of the run's own data: leave out --data")
        run = open_run(folder, args.device)
        other = controls_of_file(run, args.data)
        print(f"of the {len(other.d):,} control cells of {args.data}:")
    else:
        run = open_run(folder, args.device, args.data)
    own = {k: options[k] for k in ("library", "evaluation_seed") if k in options}
    if args.predict:
        particles = {k: options[k] for k in ["ate_particles"] if k in options}
        print(f"{predict(run, args.predict, other=other, **particles, **own)}\n\n"
              f"written: {folder}/predictions.h5ad")
    if args.sample:
        sample(run, args.predict, args.sample, other=other, **own)
        print(f"written: {folder}/samples.h5ad")
    if args.latents:
        write_latents(run, evaluation_seed=own.get("evaluation_seed", 0))
        print(f"written: {folder}/latents.h5ad")


def evaluate_run(folder, args, options, alone):
    """Evaluate one run unless that was done before, and draw its figures. Returns its metrics."""
    metrics = None if args.again else evaluated(folder, options)
    run = None if metrics and not (args.figures or args.data) else open_run(
        folder, args.device, args.data)
    if metrics is None:
        metrics = evaluate(run, **options)
        print(f"\n{folder}\n{table(metrics, args.scale)}\n\nwritten: {folder}/metrics.json, "
              "effects.h5ad, iwelbo.csv, top_genes.csv" + ", masks.csv" * run.model.has_effects)
    elif alone:
        print(f"\n{folder}, as evaluated before (--again evaluates anew)\n"
              f"{table(metrics, args.scale)}")
    if args.figures:
        figures = [figure_of_training(folder, metrics["step"]), figure_of_effects(run, metrics)]
        if run.model.has_effects:
            figures.append(figure_of_masks(run, metrics["options"]["pathways"]))
        print("written: " + ", ".join(figures))
    return metrics | {"folder": folder}


def evaluated(folder, options):
    """The metrics of metrics.json, if they are of these checkpoints and options; else None."""
    with contextlib.suppress(OSError, ValueError):
        with open(os.path.join(folder, "metrics.json")) as file:
            metrics = json.load(file)
        if metrics["format"] == FORMAT and metrics["checkpoints"] == checkpoints(folder) and (
                metrics["options"].items() >= options.items()):
            return metrics
    return None


if __name__ == "__main__":
    data.run(main)
