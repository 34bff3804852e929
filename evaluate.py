"""Evaluate and use trained runs: likelihood, treatment effects, masks, tables, figures.

    python evaluate.py runs/NAME                          one run
    python evaluate.py runs/*                             a table: models and guides, over seeds
    python evaluate.py runs/NAME --ate-particles 10000    as in the paper's Table 1
    python evaluate.py runs/NAME --figures                PNG files (needs matplotlib)
    python evaluate.py runs/NAME --predict "A+B" C        what these perturbations would do
    python evaluate.py runs/NAME --predict C --sample 99  and as many simulated cells, for scanpy
    python evaluate.py runs/NAME --latents                latent states of all cells, for scanpy

Writes, beside the checkpoint, metrics.json, effects.h5ad (condition x gene effects of the model and
of the data), and the tables top_genes.csv, masks.csv and iwelbo.csv. In reading order: one function
a metric; what the data say, and baselines; a run and its evaluations; tables; use of a trained
model; figures; the command line.

A condition is a set of perturbations that some cell received; C conditions beside the control, G
genes. "Effect" means average treatment effect (3.2), a difference from control, (C, G); the latent
e_t of eq. 1 is called `effect` where it is drawn, as in sams_vae.py.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import functools
import io
import itertools
import json
import math
import os
import sys
import tempfile

import data  # before torch: it sets what makes a CPU fast
import numpy as np
import torch

import train
from data import AT_LEAST_0, AT_LEAST_1, DataError, add_options, number_within, option_name
from sams_vae import (MODELS, expected_expression, iwelbo, sample_counts, sample_frequencies,
                      sobol_normal, sum_effects)

FORMAT = 8  # of metrics.json; a file of another format is not read
SCALES = ("log_normalised", "counts")
BASELINES = {"no_change": "no change", "perturbed_mean": "perturbed mean", "additive": "additive",
             "matching_mean": "matching mean"}


# ============================================================================================
# Metrics: one function each
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


def pearson_per_condition(predicted, observed, counted):
    """Pearson correlation over the counted genes of each row, averaged; 0 where it is undefined, as
    it is for a constant prediction: that says nothing of the condition."""
    values = [pearson(p[k], o[k]) for p, o, k in zip(predicted, observed, counted)]
    return float(np.mean([0 if math.isnan(r) else r for r in values])) if values else math.nan


def r_squared(predicted, observed):
    """1 - sum (observed - predicted)^2 / sum (observed - mean observed)^2, over all entries."""
    total = float(((observed - np.mean(observed)) ** 2).sum()) if np.size(observed) else 0.0
    return 1 - float(((observed - predicted) ** 2).sum()) / total if total > 0 else math.nan


def discrimination_scores(predicted, observed, counted, device="cpu", most=1000):
    """How well a predicted effect is told from those of other conditions, in both orientations.

    predicted, observed (C, G), counted (C, G) bool. Distances are L1. Of each condition:

        first    all predictions are ranked by their distance to its observed effect: the rank of
                 its own, over the genes that count for the condition
        second   all observed effects are ranked by their distance to its prediction, likewise (the
                 perturbation discrimination score of the Virtual Cell Challenge, 2025)

    A rank goes from 0 (nearest) to C - 1, ties at half, is divided by C - 1 and taken from one:
    1 is perfect; 1/2 is chance and what a constant prediction gets, in the mean over all C. Of more
    than `most` conditions, so many, drawn at random, are the rivals of each: all would take hours.
    Returns (2, C).
    """
    predicted, observed = (torch.as_tensor(v, dtype=torch.float32, device=device)
                           for v in (predicted, observed))
    n, scores = len(observed), [torch.empty(0, device=device)]
    rivals = torch.from_numpy(np.random.default_rng(0).permutation(n)[:most]).to(device)
    left_out = [torch.from_numpy(v).to(device) for v in np.nonzero(~np.asarray(counted))]
    for own, others in ((observed, predicted), (predicted, observed)):
        for block in torch.arange(n, device=device).split(most) if n else ():
            ranked = torch.cat([rivals, block]).unique()
            candidates = others[ranked]
            distance = torch.cdist(own[block], candidates, p=1)  # (block, ranked)
            here = (left_out[0] >= block[0]) & (left_out[0] <= block[-1])
            for condition, gene in zip(*(v[here].split(4096) for v in left_out)):
                part = (own[condition, gene, None] - candidates[:, gene].T).abs()
                distance.index_add_(0, condition - block[0], part, alpha=-1)
            mine = distance.gather(1, torch.searchsorted(ranked, block)[:, None])
            is_rival = torch.isin(ranked, rivals) & (ranked != block[:, None])
            rank = ((distance < mine) + 0.5 * (distance == mine)) * is_rival
            scores.append(1 - rank.sum(1) / is_rival.sum(1))  # a single condition has none: NaN
    return torch.cat(scores).reshape(2, n).double().cpu().numpy()


def response_weights(effect, variance):
    """How clearly genes respond to conditions, (C, G): squared t statistics of their effects.

    variance are squared standard errors. That of few cells is itself a guess, and 0 where no cell
    has a count of the gene: it is taken to be no less than one expects by condition and by gene,
    the product of their means over the mean of all.
    """
    known = variance[np.isfinite(variance).all(1)]
    usual = variance.mean(1, keepdims=True) * known.mean(0) / max(known.mean(), 1e-300) if len(
        known) else 0.0
    return effect**2 / np.maximum(np.maximum(variance, usual), 1e-300)


def effect_metrics(predicted, predicted_from_mean, effect, from_mean, weight, counted, **_):
    """All metrics but discrimination of predicted effects (C, G): a dict.

    effect              by the data
    counted             bool, the genes that count for each condition: its own targets may not
    *_from_mean         effects by model and by data minus the mean effect of training conditions,
                        by the model and in training cells: without the shift that all perturbations
                        share, which makes trivial predictions look good, and without the noise of
                        the controls. pearson_from_perturbed_mean is their Pearson's r

    Names that end in _top20 are restricted to the 20 genes of largest absolute effect by the data
    of each condition. overlap_top20 is the share of these that are also among the 20 of largest
    predicted effect, direction_top20 the share whose predicted effect has the right sign (both 0
    where no effect is predicted; as in cell-eval's overlap_at_N and de_direction_match).

    weighted_r_squared is 1 - sum w (effect - predicted)^2 / sum w effect^2: 0 for "no change". w is
    weight, `response_weights`, divided by its sum for each condition: large for genes that clearly
    respond, which are few beside those that do not (after Mejia et al. 2025, "Diversity by Design",
    who weight squared errors by squared t statistics).
    """
    predicted, effect = np.asarray(predicted, np.float64), np.asarray(effect, np.float64)
    p, o = predicted[counted], effect[counted]
    # The genes are chosen by the data, the same for every prediction.
    n_top = min(20, int(counted.sum(1).min(initial=20)))
    top, top_predicted = (np.argpartition(-np.where(counted, np.abs(v), -1), n_top - 1, axis=1)
                          [:, :n_top] for v in (effect, predicted))
    a, b = (np.take_along_axis(v, top, axis=1) for v in (predicted, effect))
    found = (top[:, :, None] == top_predicted[:, None]).any(1) & (
        np.take_along_axis(predicted, top_predicted, axis=1) != 0)
    w = np.where(counted, weight, 0)
    w = w / np.maximum(w.sum(1, keepdims=True), 1e-300)
    total = float((w * effect**2).sum())
    return {
        "n_conditions": len(effect),
        "pearson": pearson(p, o),
        "pearson_per_condition": pearson_per_condition(predicted, effect, counted),
        "r_squared": r_squared(p, o),
        "pearson_top20": pearson(a, b),
        "pearson_per_condition_top20": pearson_per_condition(a, b, np.ones(a.shape, bool)),
        "r_squared_top20": r_squared(a, b),
        "overlap_top20": float(found.mean()) if found.size else math.nan,
        "direction_top20": float((a * b > 0).mean()) if found.size else math.nan,
        "weighted_r_squared": (1 - float((w * (effect - predicted) ** 2).sum()) / total
                               if total > 0 else math.nan),
        "pearson_from_perturbed_mean": pearson(predicted_from_mean[counted], from_mean[counted]),
        "rmse": math.sqrt(((p - o) ** 2).mean()) if len(o) else math.nan,
    }


def noise_limit(effect, variance, from_mean, variance_from_mean, counted, **_):
    """What `effect_metrics` would say of a perfect prediction, estimated: a dict, of some of them.

    The data's effects are the true ones plus noise of known variance, the squared standard error of
    each entry, which averages to N over all entries; theirs is V, that of the true ones V - N. So
    the true effects have R2 = 1 - N / V with those of the data, r = sqrt(1 - N / V) and an RMSE of
    sqrt(N). This is the sqrt(2 r / (1 + r)) of two halves' correlation r, whose expectation is
    (V - N) / (V + N), without the noise of halving. pearson_se is one standard error of 1 - N / V
    further up in the root: that of a jackknife over conditions and of one over genes, since what
    the control cells add is shared by all conditions. A negative 1 - N / V counts as 0 in a root;
    the mean over conditions is therefore a rough one. What the choice of genes by the same noise
    enters (top 20, weights), and ranks, have no such estimate. Arguments as in `effect_metrics`;
    variances are squared standard errors, see `within_strata`.

    In screens simulated from trained models (33 and 90 conditions, of 8 to 2,000 cells of 100 to
    10,000 counts; r from 0.3 to 1) pearson and that from the mean were 0.00 to 0.05 below those of
    the true effects where conditions had 8 cells, and within 0.01 otherwise; per condition within
    0.05. The standard error was 1 to 4 times the spread of the difference.
    """
    def share(n, total, squares, noise):
        """1 - N / V of entries of which these are number and sums."""
        v = squares - total**2 / np.maximum(n, 1)
        return 1 - noise / np.where(v > 0, v, math.nan)

    def root(value):
        """The square root, 0 for what is negative."""
        return np.sqrt(np.maximum(value, 0))

    def sums(effect, variance, axis=None):
        """Number, sum, sum of squares and noise of the entries, along an axis."""
        return [np.where(counted, v, 0).sum(axis) for v in (1, effect, effect**2, variance)]

    total, each = sums(effect, variance), sums(effect, variance, 1)
    if not total[0]:
        return {"n_conditions": 0}
    of_all, squared_error = share(*total), 0.0
    for axis in (1, 0):
        if effect.shape[1 - axis] > 1:
            without_one = share(*(a - b for a, b in zip(total, sums(effect, variance, axis))))
            squared_error += (len(without_one) - 1) * without_one.var()
    error = float(root(max(of_all, 0) + math.sqrt(squared_error)) - root(of_all))
    return {
        "n_conditions": len(effect),
        "pearson": float(root(of_all)),
        "pearson_se": error if math.isfinite(squared_error) else math.nan,
        "pearson_per_condition": float(np.nan_to_num(root(share(*each))).mean()),
        "r_squared": float(of_all),
        "pearson_from_perturbed_mean": float(root(share(*sums(from_mean, variance_from_mean)))),
        "rmse": math.sqrt(total[3] / total[0]),
    }


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


def mask_recovery(true_mask, probability):
    """Precision, recall and F1 of the mask, thresholded at 0.5, under the best matching of latents.

    true_mask (T, L), probability (T, L'). Latents have no names, so each true one is matched with
    at most one of the model's, to the largest number of entries that agree on 1 (true positives).
    The numbers of true and of predicted entries do not depend on the matching, so this is also the
    matching of the best F1. Entries of latents that found no partner count as errors.
    """
    true_mask, predicted = np.asarray(true_mask, bool), np.asarray(probability) > 0.5
    agree = true_mask.T.astype(float) @ predicted  # (L, L'): perturbations that both touch
    agree = agree if len(agree) <= len(agree.T) else agree.T
    hits = agree[np.arange(len(agree)), best_matching(agree)].sum()
    n_true, n_predicted = int(true_mask.sum()), int(predicted.sum())
    return {"mask_precision": hits / n_predicted if n_predicted else 0.0,
            "mask_recall": hits / n_true if n_true else 0.0,
            "mask_f1": 2 * hits / max(1, n_true + n_predicted)}


def latent_recovery(true, learned, true_mask=None, touches=None):
    """How well the latents of simulated cells are found, as Lopez et al. (2023) ask: a dict.

    true (N, L), learned (N, L')     latent states of the same cells
    true_mask (T, L), touches (T, L')    bool, the latents that perturbations touch, if known

    mcc_pearson, mcc_spearman   absolute correlation of each true latent with a learned one of its
                                own, matched to the largest sum: the mean over true ones. 0 for one
                                without a partner, where L' < L
    latent_r_squared            R2 of true latents by a linear map of all learned ones, fitted to
                                every other cell, in the others: the mean over true ones. NaN where
                                these are too few
    target_precision, _recall and _f1    of touches, by the matching of mcc_pearson (that of
                                `mask_recovery` is to the masks' best agreement)
    """
    def correlation(a, b):
        """|Pearson's r| of columns, (L, L') or, with further columns of zeros, (L, L)."""
        a, b = (v - v.mean(0) for v in (a, b))
        size = np.sqrt(np.outer((a**2).sum(0), (b**2).sum(0)))
        r = np.abs(a.T @ b) / np.where(size > 0, size, 1)
        return np.pad(r, ((0, 0), (0, max(0, a.shape[1] - b.shape[1]))))

    def ranks(column):
        """Those of its values, a mean where some are the same."""
        _, place, n = np.unique(column, return_inverse=True, return_counts=True)
        return (np.cumsum(n) - n / 2)[place]

    of_values = correlation(true, learned)
    of_ranks = correlation(*(np.apply_along_axis(ranks, 0, v) for v in (true, learned)))
    matched, by_rank = best_matching(of_values), best_matching(of_ranks)
    each = np.arange(true.shape[1])
    found = {"mcc_pearson": float(of_values[each, matched].mean()),
             "mcc_spearman": float(of_ranks[each, by_rank].mean()), "latent_r_squared": math.nan}
    inputs = np.column_stack([learned, np.ones(len(learned))])
    if len(inputs) > 2 * inputs.shape[1]:
        weight, *_ = np.linalg.lstsq(inputs[::2], true[::2], rcond=None)
        error = ((true[1::2] - inputs[1::2] @ weight) ** 2).mean(0)
        found["latent_r_squared"] = float((1 - error / true[1::2].var(0)).mean())
    if true_mask is None:
        return found
    touches = np.pad(touches, ((0, 0), (0, max(0, len(each) - touches.shape[1]))))
    n_true, n_found = int(true_mask.sum()), int(touches.sum())
    hits = int((true_mask & touches[:, matched]).sum())
    return found | {
        "target_precision": hits / max(1, n_found), "target_recall": hits / max(1, n_true),
        "target_f1": 2 * hits / max(1, n_true + n_found)}


def mask_agreement(masks):
    """F1 between the masks of each two runs under the best matching of their latents, a list.

    Do two seeds find the same? A mask is, as in metrics.json, a list of T texts such as "0 3", the
    latents that a perturbation touches.
    """
    n_latent = 1 + max((int(word) for mask in masks for row in mask for word in row.split()),
                       default=0)
    arrays = [np.array([[str(latent) in row.split() for latent in range(n_latent)] for row in mask])
              for mask in masks]
    return [mask_recovery(a, b)["mask_f1"] for a, b in itertools.combinations(arrays, 2)]


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


def conditions_of(screen):
    """The C conditions other than the control: their sorted names (C,), a cell of each (C,), and
    the condition of every cell (N,), where C stands for the control."""
    label = np.where(screen.conditions == "control", "", screen.conditions).astype(str)
    names, first, group = np.unique(label, return_index=True, return_inverse=True)
    return names[1:], first[1:], np.where(group == 0, len(names) - 1, group - 1)  # "" sorts first


def strata_of(screen):
    """The S sets of covariate values that occur among the cells, (S, columns), and that of every
    cell, (N,): one set, of nothing, where there are no covariates."""
    if not screen.covariates:
        return screen.c[:1], np.zeros(len(screen.c), int)
    strata, stratum = np.unique(screen.c, axis=0, return_inverse=True)
    return strata, stratum.reshape(-1)


def own_targets(dosages, perturbations, gene_names):
    """The genes that perturbations of dosages (C, P) target, by their names: (C, G) bool."""
    is_target = np.zeros((len(dosages), len(gene_names)), bool)
    for t, gene in enumerate(data.targets(perturbations, gene_names)):
        if gene is not None:
            is_target[(dosages == t).any(1), gene] = True
    return is_target


def mean_expression(batches, cells, group, n_groups):
    """Mean expression of groups of cells, on both scales, for cells of a library of 10,000.

    cells (n,) positions, group (n,) their groups. Returns {scale: (means, their squared standard
    errors)}, (n_groups, G) each, and the number of cells of each group (n_groups,). counts:
    1e4 x / sum x. log_normalised: log2(1 + 1e4 x / sum x). (3.2 compares means of x, the counts;
    the second scale and its logarithm to base 2 are what the authors' code takes for Table 1.)

    A group without cells has NaN; one of a single cell has the variance within all groups.
    """
    n_cells = np.bincount(group, minlength=n_groups)
    total = {scale: torch.zeros(2, n_groups, batches.n_genes, dtype=torch.float64,
                                device=batches.device) for scale in SCALES}
    group = torch.from_numpy(group).to(batches.device)
    for x, *_ in batches.in_order(cells):
        part, group = group[:len(x)], group[len(x):]
        per_10k = (1e4 * x / x.sum(-1, keepdim=True)).double()  # (B, G)
        for scale, y in (("counts", per_10k), ("log_normalised", torch.log2(1 + per_10k))):
            total[scale][0].index_add_(0, part, y)
            total[scale][1].index_add_(0, part, y**2)
    results = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        n = n_cells[:, None].astype(float)
        for scale, (y, y2) in total.items():
            mean = y.cpu().numpy() / n
            squares = np.maximum(y2.cpu().numpy() - n * mean**2, 0)  # around the mean
            pooled = np.nansum(squares, 0) / max(1, np.maximum(n - 1, 0).sum())
            results[scale] = mean, np.where(n > 1, squares / (n - 1), pooled) / n
    return results, n_cells


def within_strata(mean, variance, n_cells):
    """Means of conditions, and of the control cells that each is compared with.

    mean and its squared standard error (C + 1, S, G), n_cells (C + 1, S), by condition, the control
    last, and covariates. A condition is compared with control cells of the same covariates:
    averages over the S sets of values that have both, weighted by the condition's cells. Returns
    both means and their squared standard errors, (C, G) each, and the weights (C, S). NaN for a
    condition that can be compared nowhere, whose weights are zero.
    """
    n = n_cells[:-1] * (n_cells[-1] > 0)
    total = n.sum(1, keepdims=True)
    weight = n / np.maximum(total, 1)
    nowhere = np.where(total > 0, 0.0, np.nan)
    return *(nowhere + of_strata for of_strata in (
        np.einsum("cs,csg->cg", weight, np.nan_to_num(mean[:-1])),
        weight @ np.nan_to_num(mean[-1]),
        np.einsum("cs,csg->cg", weight**2, np.nan_to_num(variance[:-1])),
        weight**2 @ np.nan_to_num(variance[-1]))), weight


def baseline_effects(effect, dosages):
    """Effects that need no model, from those of training cells on one scale (four baselines).

    effect (C, G), NaN for conditions without training cells; dosages (C, P). Returns a dict of
    (C, G):

        no_change       0: the prediction is the control
        perturbed_mean  the mean over training conditions of their effects, for every condition
        additive        sum over the condition's perturbations g of the effect of cells with g
                        alone; 0 for a g that no training cell has alone
        matching_mean   the mean of the same, in place of their sum, perturbed_mean for a g that no
                        training cell has alone (after Vinas Torne et al. 2025, "Systema")
    """
    seen = np.isfinite(effect).all(1)
    effect = np.where(seen[:, None], effect, 0.0)
    perturbed_mean = effect[seen].mean(0) if seen.any() else np.zeros(effect.shape[1])
    # The last row is that of NONE, which adds nothing.
    alone = np.zeros((int(dosages.max()) + 2, effect.shape[1]))
    known = np.zeros(len(alone), bool)
    is_single = (dosages != data.NONE).sum(1) == 1
    alone[dosages[is_single].max(1)] = effect[is_single]
    known[dosages[is_single].max(1)] = seen[is_single]
    matching = np.where(known[:, None], alone, perturbed_mean)
    matching[data.NONE] = 0
    return {"no_change": np.zeros_like(effect),
            "perturbed_mean": np.broadcast_to(perturbed_mean, effect.shape),
            "additive": alone[dosages].sum(1),
            "matching_mean": matching[dosages].sum(1) / (dosages != data.NONE).sum(1)[:, None]}


def effects_by_data(observed, n_cells, trained, n_train, dosages):
    """On one scale, from two kinds of cells: what predictions are compared with, and baselines.

    observed, trained    mean expression and its squared standard error, (C + 1, S, G) each, of the
                         cells to compare with and of the training cells
    n_cells, n_train     their numbers (C + 1, S)
    dosages              (C, P)

    Returns by the data {name: (C, G)} as `effect_metrics` and `noise_limit` take them; the mean of
    the controls (C, G); effects by the baselines {name: (C, G)}; and which conditions have training
    cells, (C,) bool.
    """
    mean, control, variance, variance_of_control, weight = within_strata(*observed, n_cells)
    mean_of_training, control_of_training, variance_of_training, _, weight_of_training = (
        within_strata(*trained, n_train))
    baselines = baseline_effects(mean_of_training - control_of_training, dosages)
    seen = np.isfinite(mean_of_training).all(1)
    # From the mean of training conditions: with the same control cells on both sides, which matter
    # only as far as covariates differ. (G) each, for the S covariates; NaN where they have no cell.
    controls, their_variance = (np.nan_to_num(np.where(n_train[-1, :, None] > 0, t[-1], o[-1]))
                                for t, o in zip(trained, observed))
    n_seen = max(1, seen.sum())
    differ = weight - weight_of_training[seen].sum(0) / n_seen
    return {"effect": mean - control, "variance": variance + variance_of_control,
            "from_mean": mean - weight @ controls - baselines["perturbed_mean"],
            "variance_from_mean": (variance + differ**2 @ their_variance
                                   + variance_of_training[seen].sum(0) / n_seen**2),
            "weight": response_weights(mean - control, variance + variance_of_control),
            }, control, baselines, seen


def with_controls(cells, train, is_control):
    """Test cells, which in the Norman splits have no controls, with some in any case: those that
    are not among the cells of `train`, or, if there are none, all. is_control (N,) bool."""
    controls = np.flatnonzero(is_control)
    for chosen in (np.intersect1d(cells, controls), np.setdiff1d(controls, train), controls):
        if len(chosen) > 1:
            break
    return np.union1d(cells, chosen)


# ============================================================================================
# A run, as a folder holds it
# ============================================================================================


def hash_of(file):
    """A hash of what is left of an open file, 64 bytes."""
    return train.hash_of(file.read())


def hashes_of(folder, names):
    """{name: hash} of files."""
    found = {}
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = hash_of(file).decode()
    return found


class Run(train.Run):
    """A trained run as best.pt has it, and how far its training has come."""

    @classmethod
    def load(cls, folder, device=None, data_path=None):
        """Open runs/NAME; data_path says where its data are, if they have moved."""
        names = [name for name in ("best.pt", "last.pt") if os.path.isfile(f"{folder}/{name}")]
        hashes = hashes_of(folder, names)  # before they are read: training may go on
        last = train.load_checkpoint(folder, "last.pt")  # --resume may have given it more steps
        changes = {name: last["config"][name] for name in ("data", "steps", "precision")}
        if data_path:
            changes["data"] = os.path.abspath(data_path)
        run = super().load(folder, "best.pt", device, **changes)
        best, run.progress = run.progress, train.Progress(**last["progress"])
        run.done, run.last_step, run.progress = run.is_done, run.progress.step, best
        run.hashes, run.learned_from = hashes, run.taught_by["train"]
        return run

    def write(self, name, **contents):
        """Write an .h5ad file into the run's folder."""
        data.write_h5ad(os.path.join(self.folder, name), **contents)

    def write_csv(self, name, header, rows):
        """Write a table into the run's folder, numbers to six digits."""
        with data.replacing(os.path.join(self.folder, name)) as path, open(
                path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(
                [f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row]
                for row in rows)])


# ============================================================================================
# Its evaluation: likelihood, effects, masks
# ============================================================================================

OPTIONS = [  # name, default, what is allowed, what it is and where the default comes from
    ("--iwelbo-particles", 100, AT_LEAST_1, "K of 3.1 (paper: 100, for Norman)"),
    ("--ate-particles", 2500, AT_LEAST_1, "K of 3.2 (paper: Replogle 10,000, Norman 2,500)"),
    ("--library", 10_000, AT_LEAST_1, "total counts of simulated cells (authors' code: 10,000; for "
     "a file without --preset, the median of its cells)"),
    ("--effects-from", "all", ["all", "test"], "cells that data effects are taken from (the paper "
     "does not say; authors' code for Table 1: all; for a file without --preset: test)"),
    ("--own-targets", True, bool, "count the gene that a perturbation targets among those of its "
     "effect (the paper; for a file without --preset: no)"),
    ("--evaluation-seed", 0, AT_LEAST_0, "of IWELBO and effects (ours)"),
]


def evaluate(run, iwelbo_particles=100, ate_particles=2500, library=None, effects_from=None,
             own_targets=None, evaluation_seed=0, pathways=None):
    """Evaluate a Run: write metrics.json and effects.h5ad and the tables beside them (README), and
    return the metrics.

    The arguments are OPTIONS; pathways is a file for data.read_pathways, by default the data. NaN
    is written as null.
    """
    of_paper = run.config["preset"] is not None
    options = {"iwelbo_particles": iwelbo_particles, "ate_particles": ate_particles,
               "library": library or library_of(run),
               "effects_from": effects_from or ("all" if of_paper else "test"),
               "own_targets": of_paper if own_targets is None else own_targets,
               "evaluation_seed": evaluation_seed, "pathways": pathways}
    known_pathways = load_pathways(run, pathways)  # before the long part: the file may be wrong
    torch.manual_seed(evaluation_seed)
    metrics = {"format": FORMAT, "config": run.config, "fingerprint": run.fixed["fingerprint"],
               "step": run.progress.step, "last_step": run.last_step, "done": run.done,
               "masks_from": run.progress.masks_from,
               "validation_loss": run.progress.best, "options": options}
    metrics |= likelihood(run, iwelbo_particles)
    metrics |= effects(run, ate_particles, *(
        options[k] for k in ("library", "effects_from", "own_targets")))
    truth = data.read_simulation(run.config["data"])
    metrics |= masks(run, known_pathways, truth)
    metrics |= latents(run, truth) if truth else {}
    metrics["warnings"] = warnings_of(metrics, train.read_log(run.folder))
    tables = ["iwelbo.csv", "top_genes.csv", *["masks.csv"] * run.model.has_effects]
    metrics = without_nan(metrics) | {
        "files": run.hashes | hashes_of(run.folder, ["effects.h5ad", *tables])}
    metrics["checksum"] = hash_of(io.BytesIO(json.dumps(metrics).encode())).decode()
    with data.replacing(os.path.join(run.folder, "metrics.json")) as path, open(path, "w") as file:
        json.dump(metrics, file, indent=2)
    return metrics


def library_of(run):
    """Total counts of simulated cells: 10,000, as in the authors' code, or for a file without a
    preset the median of its cells, so that logarithms of model and data are alike. (With the median
    the true effects had r = 0.9995 with those of cells of all depths, 40 to 600 counts, and with
    a mean over eight quantiles 0.9998, with 10,000 counts 0.90.)"""
    if run.config["preset"] is not None:
        return 10_000
    return int(np.median(run.screen.library))


def likelihood(run, n_particles):
    """Marginal likelihood of the test cells (3.1): both IWELBOs, in nats. Writes iwelbo.csv, the
    predictive one of each test cell."""
    test = run.split["test"]
    predictive, joint, effective_sample_size, error = iwelbo(
        run.model, run.batches.in_order(test), n_particles)
    predictive, n = predictive.double().cpu().numpy(), len(test)
    run.write_csv("iwelbo.csv", ["cell", "condition", "iwelbo"], zip(
        run.screen.cell_names[test], run.screen.conditions[test], predictive))
    return {"iwelbo": predictive.mean(),
            "iwelbo_se": predictive.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan,
            "iwelbo_monte_carlo_error": error,
            "n_test_cells": n, "iwelbo_joint_total": joint, "iwelbo_joint_per_cell": joint / n,
            "iwelbo_joint_effective_sample_size": effective_sample_size,
            **(of_new_perturbations(run, predictive, n_particles) if run.config["adapt"] else
               {})}


def of_new_perturbations(run, predictive, n_particles):
    """Of a run that adapts another (--adapt): mean predictive IWELBO of test cells with one of the
    perturbations that it has learned, after that, of `predictive` (N,), that of all test cells, and
    before, when the prior is all that is known of them (SVAE+ and the conditional VAE, which have
    none, take these cells for controls). And their conditions, to find them in another run."""
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


def effects(run, n_particles, library, effects_from, count_own_targets):
    """Average treatment effects of all conditions (3.2), by the model, the baselines and the data.

    Writes effects.h5ad and top_genes.csv. Returns metrics. ["effects"][cells][scale][group][row] is
    what `effect_metrics` says of a prediction (the model or a baseline), or what `noise_limit` says
    of a perfect one, over a group of conditions: all, pairs, held_out (no training cells), or those
    with cells in train, validation and test. `cells` are those that the data's effects are taken
    from, all or test. ["on_target"], ["known_pairs"][cells]: see the functions of these names.
    """
    screen, split = run.screen, run.split
    names, first, group = conditions_of(screen)
    n_conditions, dosages = len(names), screen.d[first]  # (C, P)
    n_perturbed = (dosages != data.NONE).sum(1)
    is_target = own_targets(dosages, screen.perturbations, screen.gene_names)
    strata, stratum = strata_of(screen)
    # Cells by condition, the last being the control, and covariates.
    shape, group_of_cell = (n_conditions + 1, len(strata)), group * len(strata) + stratum

    def means(cells):
        """{scale: mean expression of these cells and its squared standard error, (C + 1, S, G)},
        and their number (C + 1, S)."""
        found, n = mean_expression(run.batches, cells, group_of_cell[cells], math.prod(shape))
        return {scale: [v.reshape(*shape, -1) for v in m] for scale, m in found.items()}, (
            n.reshape(shape))

    sources = {"all": np.arange(len(group)),
               "test": with_controls(split["test"], split["train"], group == n_conditions)}
    trained, n_train = means(split["train"])
    n_trained = n_train[:-1].sum(1)
    of_all_cells = np.bincount(group_of_cell, minlength=math.prod(shape)).reshape(shape)[:-1]
    of_all_cells = of_all_cells / of_all_cells.sum(1, keepdims=True)

    metrics, layers, of_model = {"effects": {}, "known_pairs": {}}, {}, None
    for source in sorted(sources, key=lambda name: name == effects_from):  # that comes last
        observed, n_cells = means(sources[source])
        *_, weight = within_strata(*observed["counts"], n_cells)
        # By the model, which has its own dosages of a condition (SVAE+ knows labels).
        if of_model is None or len(strata) > 1:
            of_model = expected_of_conditions(
                run, torch.from_numpy(run.model_screen.d[first]),
                np.where(weight.any(1, keepdims=True), weight, of_all_cells), n_particles, library)
        # Groups of conditions. Those without cells to take data effects from are in none.
        known = weight.any(1)
        groups = {"all": known, "pairs": known & (n_perturbed == 2),
                  "held_out": known & (n_trained == 0)}
        for part, part_cells in split.items():
            groups[part] = known & np.isin(np.arange(n_conditions), group[part_cells])

        metrics["n_not_compared"] = int((~known & (n_cells[:-1].sum(1) > 0)).sum())
        metrics["known_pairs"][source] = known_pairs(dosages, n_trained, groups["pairs"])
        metrics["effects"][source] = {}
        for scale in SCALES:
            by_data, control, baselines, seen = effects_by_data(
                observed[scale], n_cells, trained[scale], n_train, dosages)
            by_data["counted"] = np.ones_like(is_target) if count_own_targets else ~is_target
            in_unit = 1e4 / library if scale == "counts" else 1  # the unit of the data's
            of_condition, of_control = (expected[scale] for expected in of_model)
            predictions = {"model": in_unit * (of_condition - of_control), **baselines}
            metrics["effects"][source][scale] = scores_by_group(
                groups, run.device, predictions, seen, by_data)
            for name, values in (("model", predictions["model"]), ("data", by_data["effect"]),
                                 ("data_se", np.sqrt(by_data["variance"]))):
                layers[f"{name}_{scale}"] = values.astype(np.float32)

    metrics["on_target"] = on_target(is_target & known[:, None], control, {
        "data": by_data["effect"], **predictions})  # on counts
    run.write("effects.h5ad", X=layers["model_log_normalised"],
              obs={"condition": names.astype(object), "n_cells": n_cells[:-1].sum(1),
                   "n_training_cells": n_trained, "n_perturbations": n_perturbed},
              var={"gene": screen.gene_names}, layers=layers,
              uns={"effects_from": effects_from, "library": library})
    write_top_genes(run, names, of_model, layers, library)
    return metrics


def known_pairs(dosages, n_train, chosen):
    """Of the chosen conditions, (C,) bool: how many have training cells, n_train (C,), and of how
    many both perturbations of dosages (C, P) have some alone."""
    alone = (dosages != data.NONE).sum(1) == 1
    parts = np.append(dosages[alone & (n_train > 0)].max(1), data.NONE)
    return [int((chosen & known).sum()) for known in (
        n_train > 0, np.isin(dosages, parts).all(1))]


def minus_mean(effect, seen):
    """Effects (C, G) minus their mean over the conditions that training has seen, (C,) bool."""
    difference = effect - effect[seen].mean(0) if seen.any() else effect
    # A prediction that is the same for all leaves nothing, also by rounding.
    return np.where(np.abs(difference) > 1e-9 * np.nanmax(np.abs(effect), initial=0), difference, 0)


def on_target(is_target, control, effects):
    """How much the genes that perturbations target change, in all: the sum of their effects on
    counts by that of the controls' means, -0.6 for a fall by 60 %.

    is_target (C, G) bool, control (C, G), effects {row: (C, G)}. Returns {row: change} and the
    number of targets, "n".
    """
    before = float(control[is_target].sum()) or math.nan
    return {"n": int(is_target.sum())} | {row: float(effect[is_target].sum()) / before
                                          for row, effect in effects.items()}


def write_top_genes(run, names, of_model, layers, library, n_top=20, n_particles=500):
    """Write top_genes.csv: the n_top genes of largest effect on log-normalised expression, by the
    model, of each condition and of each latent dimension.

    Of a condition beside the effect by the data with its standard error. Of latent dimension l it
    is the effect of moving the basal state by +1, its standard deviation a priori, along l, in the
    axes of the masks. log2_fold_change is that of expected counts, by the model.
    """
    model, genes = run.model, run.screen.gene_names
    rows = []

    def add(kind, name, effect, counts, control, *by_data):
        """The rows of one condition or latent dimension, of arrays (G,)."""
        for rank, g in enumerate(np.argsort(-np.abs(effect), kind="stable")[:n_top]):
            if effect[g] != 0:
                rows.append([kind, name, rank + 1, genes[g], effect[g], np.log2(
                    counts[g] / control[g]), *([v[g] for v in by_data] or ["", ""])])

    for i, name in enumerate(names):
        add("condition", name, layers["model_log_normalised"][i],
            *(expected["counts"][i] for expected in of_model),
            layers["data_log_normalised"][i], layers["data_se_log_normalised"][i])
    if model.has_effects:
        nothing = torch.full((1, 1), data.NONE, device=run.device)
        strata, stratum = strata_of(run.screen)
        c = torch.from_numpy(strata[np.resize(
            np.random.default_rng(0).permutation(stratum), n_particles)][None]).to(run.device)
        basal = sobol_normal(n_particles, model.n_latent, run.device)
        expected = []
        for move in torch.cat([torch.zeros_like(model.axes[:1]), model.axes.T]):
            torch.manual_seed(0)  # the same noise for all
            of_move = expected_expression(model, nothing, c, library=library, basal=basal + move)
            expected.append({scale: y[0].cpu().numpy() for scale, y in of_move.items()})
        for latent, moved in enumerate(expected[1:]):
            add("latent", latent, moved["log_normalised"] - expected[0]["log_normalised"],
                moved["counts"], expected[0]["counts"])
    run.write_csv("top_genes.csv", [
        "kind", "name", "rank", "gene", "effect_log_normalised", "log2_fold_change",
        "data_effect_log_normalised", "data_standard_error"], rows)


def expected_of_conditions(run, dosages, weight, n_particles, library):
    """Expected expression of conditions and of control cells, by the model: {scale: (C, G)} twice.

    dosages (C, P). Where there are covariates, averages over the S sets of their values with the
    weights (C, S) of each condition, for condition and control alike.
    """
    strata, _ = strata_of(run.screen)
    condition, stratum = np.nonzero(weight)
    rows = np.concatenate([np.arange(len(strata)), stratum])  # an arm's covariates
    dosages = dosages.to(run.device)
    arms = torch.cat([torch.full_like(dosages[:1], data.NONE).expand(len(strata), -1),
                      dosages[condition]])  # the controls first
    c = torch.from_numpy(strata[rows]).to(run.device)
    expected = expected_expression(run.model, arms, c, n_particles, library)
    results = []
    for arm in (len(strata) + np.arange(len(condition)), stratum):
        results.append({})
        for scale in SCALES:
            y = expected[scale].cpu().numpy()[arm] * weight[condition, stratum, None]
            total = np.zeros((len(dosages), y.shape[1]))
            np.add.at(total, condition, y)
            results[-1][scale] = total
    return results


def scores_by_group(groups, device, predictions, seen, by_data):
    """{group: {row: metrics}} of predicted effects {row: (C, G)} and of a perfect prediction, the
    row noise_limit: see `effect_metrics`, whose other arguments are by_data, (C, G) each. seen are
    the conditions with training cells. Conditions whose effects by the data are NaN, having no
    cells, are left out; discrimination ranks all others, whatever their group."""
    known = np.isfinite(by_data["effect"]).all(1)
    scores = {name: {} for name in groups}
    for row, predicted in predictions.items():
        discrimination = np.full((2, len(known)), math.nan)
        discrimination[:, known] = discrimination_scores(
            predicted[known], by_data["effect"][known], by_data["counted"][known], device)
        from_mean = minus_mean(predicted, seen)
        for name, chosen in groups.items():
            chosen = chosen & known
            scores[name][row] = effect_metrics(
                predicted[chosen], from_mean[chosen],
                **{k: v[chosen] for k, v in by_data.items()})
            for key, ranked in zip(("discrimination", "discrimination_by_prediction"),
                                   discrimination):
                scores[name][row][key] = float(ranked[chosen].mean()) if chosen.any() else math.nan
    for name, chosen in groups.items():
        scores[name]["noise_limit"] = noise_limit(
            **{k: v[chosen & known] for k, v in by_data.items()})
    return scores


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
    run.write_csv("masks.csv", ["perturbation", "latent", "probability", "offset"], (
        [names[t], latent, probability[t, latent], offset[t, latent]]
        for t, row in enumerate(probability) for latent in np.argsort(-row, kind="stable")
        if row[latent] > 0.01))
    if not model.has_mask:
        return {}
    trained = model.n_cells.numpy(force=True) > 0
    touched = (probability > 0.5).sum(1)
    metrics = {"mask_mean_probability": float(probability[trained].mean()),
               "n_trained_perturbations": int(trained.sum()),
               "n_empty_masks": int((touched[trained] == 0).sum()),
               "mask_mean_size": float(touched[trained].mean()),
               "mask": [" ".join(map(str, np.flatnonzero(row))) for row in probability > 0.5]}
    true_mask = true_mask_of(names, truth)
    if true_mask is not None:
        metrics |= mask_recovery(true_mask, probability)
    pathway = pathway_of(names, pathways)
    known = np.array([p is not None for p in pathway])
    if pathways and known.sum() < 10:
        print(f"mask pathway accuracy is left out: {known.sum()} of {len(names):,} perturbations "
              "are in a pathway, and 10 are needed")
    elif pathways:
        pathway = pathway[known].astype(str)
        try:
            accuracy, sd = mask_pathway_accuracy(probability[known] > 0.5, pathway)
        except ImportError:
            print("mask pathway accuracy is left out: pip install scikit-learn")
        else:
            commonest = np.unique(pathway, return_counts=True)[1].max()
            metrics |= {"mask_pathway_accuracy": accuracy, "mask_pathway_accuracy_sd": sd,
                        "mask_pathway_chance": float(commonest / len(pathway)),
                        "n_annotated": len(pathway)}
    return metrics


def true_mask_of(names, truth):
    """The true masks of perturbations of these names, (T, L) bool, of `data.read_simulation`; None
    where there is no truth, or other names."""
    row = {name: t for t, name in enumerate(truth[0])} if truth else {}
    return truth[1][[row[name] for name in names]] if row.keys() >= set(names) else None


def latents(run, truth):
    """`latent_recovery` in the test cells of a simulated screen, of posterior means of z in the
    axes of the masks. A perturbation with training cells touches the latents of mask probability
    above 0.5 or, where there are no masks, the two of largest offset (as Lopez et al. have it)."""
    model, test = run.model, run.split["test"]
    true_mask = true_mask_of(run.model_screen.perturbations, truth)
    probability, offset = probability_and_offset(model)
    third = np.sort(np.pad(np.abs(offset), ((0, 0), (3, 0))), axis=1)[:, [-3]]
    touches = probability > 0.5 if model.has_mask else np.abs(offset) > third
    torch.manual_seed(0)
    draws = model.sample_many_globals(model.all_perturbations(), 50)
    learned = np.concatenate([z for _, z in posterior_means(run, test, *draws)])
    known, trained = true_mask is not None and model.has_effects, model.n_cells.cpu().numpy() > 0
    return latent_recovery(truth[3][run.screen.rows[test]], learned.astype(float),
                           *((true_mask[trained], touches[trained]) if known else ()))


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


def warnings_of(metrics, log):
    """Sentences on what a user should know before believing anything of a run: a list.

    metrics are those of `likelihood`, `effects` and `masks`, log the lines of log.jsonl.
    """
    m, config, found = metrics, metrics["config"], []
    sparsest = config["axes"] == "sparsest"
    if "mask" in m and not config["adapt"]:
        steps = m["step"] - m["masks_from"]
        if sparsest and steps < 100:
            found.append("masks have hardly been trained and are a first guess: the lowest "
                         f"validation loss was {steps:,} steps after they began, at step "
                         f"{m['masks_from']:,}" + (
                             ", and rose from there: the training cells may be too few to say "
                             "which latent dimensions a perturbation touches"
                             if m["step"] < m["last_step"] else ", where training ended"))
        elif not sparsest and m["mask_mean_probability"] > 0.45:
            found.append(f"masks have hardly been trained: their mean probability is "
                         f"{m['mask_mean_probability']:.3f}, where training starts at 0.5, so "
                         "that effects mean little yet: more --steps, or a higher --lr")
        elif m["n_empty_masks"] > 0.5 * m["n_trained_perturbations"]:
            found.append(f"the masks of {m['n_empty_masks']:,} of {m['n_trained_perturbations']:,} "
                         "perturbations are empty: the model sees no effect of these. They have "
                         "none, too few cells for it, or --alpha is too small")
    if m["step"] == m["last_step"] == config["steps"]:
        found.append("the lowest validation loss was at the last step: training on may find a "
                     "lower one (python train.py --resume runs/NAME --steps MORE)")
    if m["n_not_compared"]:
        found.append(f"{m['n_not_compared']:,} conditions have no control cell with their "
                     "covariates and are compared with nothing")
    losses = [(line["step"], line["validation_loss"]) for line in log if "validation_loss" in line]
    since = [loss for step, loss in losses if step > m["step"]]
    if len(since) > 2 and m["step"] < m["last_step"] / 2 and (
            np.median(since[-3:]) > m["validation_loss"] + 0.005 * abs(m["validation_loss"])):
        found.append(f"validation loss has risen since step {m['step']:,}, from "
                     f"{m['validation_loss']:.2f} to {np.median(since[-3:]):.2f} at step "
                     f"{m['last_step']:,}: the model fits noise of the training cells, and what is "
                     "evaluated was trained for so few steps. Fewer latents, a smaller --lr or "
                     "more cells")
    for scale in SCALES:
        scores = m["effects"][m["options"]["effects_from"]][scale]["all"]
        words = f"effects ({scale.replace('_', '-')})"
        limit = scores["noise_limit"]
        if limit.get("pearson", 1) <= limit.get("pearson_se", 0):
            found.append(f"{words} by the data in {m['options']['effects_from']} cells do not "
                         "stand out of their noise: nothing can be learnt from comparing with them")
            continue
        for row in ("no_change", "perturbed_mean"):
            if scores[row]["rmse"] <= scores["model"]["rmse"]:
                found.append(f"predicted {words} are no nearer to the data than "
                             f"\"{BASELINES[row]}\" (RMSE {scores['model']['rmse']:.3f} and "
                             f"{scores[row]['rmse']:.3f}): trust none of them")
                break
    return found


def load_pathways(run, path=None):
    """The pathways of a .json file, or those of the data. Only the former must be readable."""
    if path is not None:
        return data.read_pathways(path)
    try:
        return data.read_pathways(run.config["data"])
    except DataError as error:
        print(f"{error}: passed over, --pathways FILE.json would do")
        return None


def without_nan(value):
    """The value with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ============================================================================================
# Tables
# ============================================================================================

COLUMNS = [("pearson", "ATE-Pearson"), ("pearson_per_condition", "per cond."),
           ("pearson_from_perturbed_mean", "from mean"), ("r_squared", "R2"),
           ("weighted_r_squared", "weighted R2"), ("discrimination", "discrim."),
           ("discrimination_by_prediction", "VCC")]  # of the metrics, those that tell models apart
RECOVERY = [("mcc_pearson", "MCC", 3), ("mcc_spearman", "MCC of ranks", 3),
            ("latent_r_squared", "R2 of z", 3), ("target_precision", "target precision", 3),
            ("target_recall", "recall", 3), ("target_f1", "F1", 3)]  # of simulated screens
ROWS = BASELINES | {"noise_limit": "noise limit"}  # what stands below a model


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


def table(metrics, scale=SCALES[0]):
    """The metrics of one run as text: likelihood, masks, effects beside baselines, warnings."""
    m = metrics
    lines = [options_line(m["options"]),
             f"test IWELBO, predictive: {in_words(m['iwelbo'], 2)} per cell, standard error "
             f"{in_words(m['iwelbo_se'], 2)} over {m['n_test_cells']:,} cells, "
             f"{in_words(m['iwelbo_monte_carlo_error'], 2)} by Monte Carlo",
             f"test IWELBO, joint:      {in_words(m['iwelbo_joint_per_cell'], 2)} per cell, "
             f"effective sample size {in_words(m['iwelbo_joint_effective_sample_size'], 2)}"]
    if "iwelbo_new" in m:
        lines.append(f"{m['n_new_cells']:,} of them with the {m['n_new_perturbations']:,} new "
                     f"perturbations: predictive {m['iwelbo_new_before']:.2f} before these were "
                     f"learned, {m['iwelbo_new']:.2f} after")
    if "mask" in m:
        lines.append(f"masks: {m['mask_mean_size']:.2f} latent dimensions per perturbation; "
                     f"{m['n_empty_masks']:,} of {m['n_trained_perturbations']:,} are empty")
    if "mask_f1" in m:
        lines.append(f"mask: precision {m['mask_precision']:.3f}, recall {m['mask_recall']:.3f}, "
                     f"F1 {m['mask_f1']:.3f}")
    if "mcc_pearson" in m:
        lines.append(f"latents: MCC {m['mcc_pearson']:.3f}, of ranks {m['mcc_spearman']:.3f}, R2 "
                     f"{in_words(m['latent_r_squared'])}" + (
                         f"; targets: precision {m['target_precision']:.3f}, recall "
                         f"{m['target_recall']:.3f}, F1 {m['target_f1']:.3f}"
                         if "target_f1" in m else ""))
    if "mask_pathway_accuracy" in m:
        lines.append(f"mask pathway accuracy: {m['mask_pathway_accuracy']:.3f}, sd over splits "
                     f"{m['mask_pathway_accuracy_sd']:.3f} ({m['n_annotated']:,} annotated; the "
                     f"commonest pathway for all: {m['mask_pathway_chance']:.3f})")
    if m["on_target"]["n"]:
        change = ", ".join(f"{100 * value:+.0f} % ({row})" for row, value in m["on_target"].items()
                           if row in ("data", "model", "additive") and value is not None)
        lines.append(f"targeted genes ({m['on_target']['n']:,})"
                     + (f": their counts change by {change}" if change else "")
                     + (";" if change else ":") * (not m["options"]["own_targets"])
                     + " not counted below" * (not m["options"]["own_targets"]))
    first = m["options"]["effects_from"]
    for source in sorted(m["effects"], key=lambda name: name != first):
        for group, words in (("all", "conditions"), ("pairs", "pairs"),
                             ("held_out", "conditions held out of training")):
            scores = m["effects"][source][scale][group]
            n = scores["model"]["n_conditions"]
            if not n or (source != first and group != "all"):
                continue
            rows = []
            for row, label in {"model": f"**{m['config']['model']}**", **ROWS}.items():
                if row != "matching_mean" or group != "all":
                    rows.append([label, *(in_words(scores[row].get(column)) for column, _ in
                                          COLUMNS)])
            rows[-1][1] += f" ± {in_words(scores['noise_limit'].get('pearson_se'))}"
            if group == "pairs":
                words += ", {:,} of them in training, {:,} with both parts alone there".format(
                    *m["known_pairs"][source])
            lines += ["", f"effects of {n:,} {words}, {scale.replace('_', '-')}, by the data in "
                          f"{source} cells", "",
                      markdown(["predicted by", *(title for _, title in COLUMNS)], rows)]
            if source == "all" and group == "all":
                lines.append("(predictions were trained on most of these cells, with their noise: "
                             "they may exceed its limit)")
            if m["config"]["adapt"] and group == "all":
                lines.append("(in this file the model has learned from the training cells with new "
                             f"perturbations; cells that {m['config']['adapt']} was trained on are "
                             "no test of it)")
    return "\n".join(lines + [""] * bool(m["warnings"]) + [f"warning: {w}" for w in m["warnings"]])


SEEDS = ("seed", "split_seed", "simulated_seed", "base_seed")  # a row is a mean over these
ROW = ("model", "axes", "correlated_basal", "correlated_effects", "train_combinations")  # its rows
NO_MATTER = ("data", "name", "preset", "log_every", "validate_every", "adapt")


def settings(metrics, without=()):
    """All that numbers of two runs must agree in to be comparable, as a dict: the data, the options
    of training but for some, the steps that were made, and the options of the evaluation."""
    config = metrics["config"]
    # How a file was read is in the fingerprint, but for the split; seeds may simulate screens.
    covered = {*NO_MATTER, *data.READING, *without} - {"split_column", "covariate", "min_cells"}
    steps = config["steps"] if metrics["done"] else metrics["last_step"]
    if "base" in config:  # with --adapt: how the other run was trained
        config = config | {"base": {k: v for k, v in config["base"].items()
                                    if k not in (*SEEDS, *NO_MATTER)}}
    screen = "simulated" if config.get("simulated") else metrics["fingerprint"]
    return {k: v for k, v in config.items() if k not in covered} | {
        "steps": steps, "data": screen} | metrics["options"]


def key(metrics, without=()):
    """The same as text, to compare."""
    return json.dumps(settings(metrics, without), sort_keys=True)


def without_repeats(runs):
    """The runs, of those that do not differ at all the first; a line names the others."""
    # Two seeds of one data set are two runs; the same seed twice would be a spread of zero.
    different = {}
    for m in runs:
        if different.setdefault(key(m), m) is not m:
            print(f"{m['folder']} is {different[key(m)]['folder']} once more, with the same data, "
                  "options and seeds: it is left out of the tables")
    return list(different.values())


def tables_of(runs):
    """Lists of runs that belong into one table, each in the order of Table 1: they differ in
    nothing but the model, its guide, the fraction of combinations, and seeds."""
    def order(m):
        """Table by table, row by row."""
        return (key(m, SEEDS + ROW), list(MODELS).index(m["config"]["model"]),
                *(m["config"][k] for k in (*ROW[1:], "split_seed", "seed")))

    tables = {}
    for m in sorted(runs, key=order):
        tables.setdefault(key(m, SEEDS + ROW), []).append(m)
    return list(tables.values())


def of_reference(m):
    """Whether a run is what the paper's Figure 4 compares with: SAMS-VAE with the correlated guide,
    and no combinations in training."""
    return (m["config"]["model"] == "sams-vae" and not m["config"]["train_combinations"]
            and guide_of(m["config"]) == "corr. z_basal and E")


def iwelbo_difference(runs, others):
    """Predictive IWELBO of some runs minus that of others: the mean over cells, its standard error,
    and the part of that by Monte Carlo.

    Cells differ much more than two models on the same cell do: differences are taken cell by cell,
    over the test cells of a screen and split that both have (of several model seeds, of their
    means; of several screens or splits, a mean of the means). How training with other seeds would
    change them is not in these errors. NaN where nothing is common.
    """
    def by_split(runs):
        """{screen and split: (IWELBO of each cell, its Monte Carlo variance)}."""
        cells = {}
        for m in runs:
            with contextlib.suppress(OSError, KeyError, ValueError):
                with open(os.path.join(m["folder"], "iwelbo.csv"), encoding="utf-8") as file:
                    names, values = zip(*((row["cell"], float(row["iwelbo"]))
                                          for row in csv.DictReader(file)))
                screen = m["fingerprint"], m["config"]["split_seed"], names
                error = m["iwelbo_monte_carlo_error"]
                cells.setdefault(screen, []).append((values, math.nan if error is None else error))
        return {screen: (np.mean([v for v, _ in found], axis=0),
                         np.sum([e**2 for _, e in found]) / len(found)**2)
                for screen, found in cells.items()}

    a, b = by_split(runs), by_split(others)
    both = [screen for screen in a if screen in b]
    if not both:
        return math.nan, math.nan, math.nan
    difference = [a[screen][0] - b[screen][0] for screen in both]
    return (np.mean([v.mean() for v in difference]),
            math.sqrt(sum(v.var() / max(1, len(v) - 1) for v in difference)) / len(both),
            math.sqrt(sum(a[screen][1] + b[screen][1] for screen in both)) / len(both))


def one_of_each_split(members, f):
    """Baselines depend on data, split and fraction f, not on the model: one run of each split."""
    return {(m["config"]["split_seed"], m["config"].get("simulated_seed")): m
            for m in members if m["config"]["train_combinations"] == f}.values()


def table_of_runs(runs, scale="log_normalised"):
    """Markdown of the metrics of many runs: a row per model and guide, mean ± sd over seeds.

    Runs that cannot be compared stand in different tables, and the line above each names the
    settings that differ. In the Norman splits, effects are those of conditions with test cells.
    "difference" is that of test IWELBO from a reference row, the best one, or in the Norman splits
    that of Figure 4, with its two errors: see `iwelbo_difference`.
    """
    tables, all_settings = [], [settings(m, SEEDS + ROW) for m in runs]
    for members in tables_of(runs):
        config = members[0]["config"]
        norman, source = config["split"] != "random", members[0]["options"]["effects_from"]
        effects_of = "test" if norman else "all"

        def row(same, label, guide, f, prediction):
            """A row: of a model all columns, of a baseline those of effects."""
            cells = {"model": label, "guide": guide, "f": f"{f:g}"} | {
                title: in_words([m["effects"][source][scale][effects_of][prediction].get(column)
                                 for m in same]) for column, title in COLUMNS}
            if prediction == "model":
                cells |= {"runs": str(len(same))} | {
                    title: in_words([m.get(name) for m in same], digits)
                    for name, title, digits in of_models}
                difference, *errors = iwelbo_difference(same, reference)
                cells["difference"] = "reference" if same is reference else (
                    "-" if math.isnan(difference) else
                    f"{difference:+.2f} ({', '.join(in_words(e, 2) for e in errors)})")
                if len({m["fingerprint"] for m in same}) == 1 and "mask" in same[0]:
                    agreement = mask_agreement([m["mask"] for m in same])
                    cells["masks agree"] = in_words(np.mean(agreement or math.nan))
            return cells

        of_models = [("iwelbo", "test IWELBO", 2), ("iwelbo_joint_per_cell", "joint IWELBO", 2),
                     ("mask_pathway_accuracy", "mask pathway acc.", 3), ("mask_f1", "mask F1", 3),
                     *RECOVERY]
        of_rows = list({key(m, SEEDS): [s for s in members if key(s, SEEDS) == key(m, SEEDS)]
                        for m in members}.values())
        reference = ([same for same in of_rows if norman and of_reference(same[0])]
                     or [max(of_rows, key=lambda same: np.mean([
                         -math.inf if m["iwelbo"] is None else m["iwelbo"] for m in same]))])[0]
        rows = []
        for same in of_rows:
            own = same[0]["config"]
            rows.append(row(same, model_of(own), guide_of(own), own["train_combinations"], "model"))
        for name, label in ROWS.items():
            if name == "matching_mean" and not norman:
                continue
            for f in sorted({m["config"]["train_combinations"] for m in members}):
                rows.append(row(one_of_each_split(members, f), label, "", f, name))
        header = ["model", "guide", "f", "runs", "test IWELBO", "difference", "joint IWELBO",
                  "mask pathway acc.", "mask F1", "masks agree",
                  *(title for _, title, _ in RECOVERY), *(title for _, title in COLUMNS)]
        unused = [title for title in header if title not in ("f", "guide") and all(
            cells.get(title, "-") == "-" for cells in rows)] + ["f"] * (not norman) + (
                ["difference"] * (len(of_rows) == 1))
        header = [title for title in header if title not in unused]

        of_table = settings(members[0], SEEDS + ROW)
        differing = [f"{k} {v if k != 'data' else config['data']}" for k, v in of_table.items()
                     if k not in ("split", "base") and any(s.get(k) != v for s in all_settings)]
        differing += [f"adapts {config['adapt']}"] if config["adapt"] else []
        if not members[0]["done"]:
            differing.append(f"stopped before step {config['steps']:,}")
        tables.append("\n".join([
            f"{os.path.basename(config['data'])}, split {config['split']}; effects of "
            f"{effects_of} conditions, {scale.replace('_', '-')}, by the data in {source} cells"
            + "; ".join(["", *differing]), options_line(members[0]["options"]), "",
            markdown(header, [[cells.get(title, "") for title in header] for cells in rows])]))
    return "\n\n".join(tables)


def table_of_adapted(runs):
    """Markdown of runs that adapt others: predictive IWELBO of test cells with new perturbations,
    before, after, and, of the same cells, by a run among these that was trained on all of the same
    file, with the same model, guide and seed. Empty without runs that adapt others."""
    def iwelbos(m, conditions):
        """{test cell: IWELBO} of these conditions."""
        with open(os.path.join(m["folder"], "iwelbo.csv"), encoding="utf-8") as file:
            return {row["cell"]: float(row["iwelbo"]) for row in csv.DictReader(file)
                    if row["condition"] in conditions}

    def alike(m):
        """What it must have in common."""
        config = m["config"] | {"adapt": None}
        return m["fingerprint"], model_of(config), guide_of(config), config["seed"]

    rows = []
    for m in (m for m in runs if m.get("iwelbo_new") is not None):
        of_all = [(iwelbos(other, m["new_conditions"]), other["folder"]) for other in runs
                  if not other["config"].get("adapt") and alike(other) == alike(m)]
        of_all = [(np.mean([*values.values()]), folder) for values, folder in of_all
                  if values.keys() == iwelbos(m, m["new_conditions"]).keys()] or [(math.nan, "-")]
        rows.append([m["folder"], f"{m['n_new_cells']:,}", *(
            in_words(v, 2) for v in (m["iwelbo_new_before"], m["iwelbo_new"], of_all[0][0])),
            of_all[0][1]])
    return markdown(["adapted", "cells", "before", "after", "trained on all", "by"],
                    rows) if rows else ""


# ============================================================================================
# Use of a trained model
# ============================================================================================


def dosages_of(run, conditions):
    """Dosages (C, P), for the run's model, of conditions such as "B+A" or "control"; and how the
    screen spells them, "A+B".

    Raises DataError for names that the screen does not have, with those that come near.
    """
    known = list(dict.fromkeys(run.screen.perturbations + run.model_screen.perturbations))
    rows, spelled = [], []
    index = {name: t for t, name in enumerate(run.model_screen.perturbations)}
    for condition in conditions:
        names = [condition] if condition in known else [
            name.strip() for name in condition.split(run.screen.joiner)]
        names = sorted(name for name in names if name != "control")
        for name in names:
            if name not in known:
                capitals = {n.upper(): n for n in known}
                near = difflib.get_close_matches(name.upper(), capitals, 5, 0.5)
                raise DataError(
                    f"{run.folder}: no perturbation is called {name!r}; " + (
                        f"near it are: {', '.join(capitals[n] for n in near)}" if near else
                        f"there are {', '.join(known[:5])} and others") + f" ({len(known):,} in "
                    f"all; the control is called control, a combination A{run.screen.joiner}B)")
        if len(set(names)) < len(names):
            raise DataError(f"{condition!r} names a perturbation twice")
        spelled.append(run.screen.joiner.join(names) or "control")
        if spelled[-1] in spelled[:-1]:
            raise DataError(f"--predict names {spelled[-1]!r} twice: once will do")
        if not run.model.adds_effects:  # one label per cell, and none for what it has not seen
            names = [spelled[-1]] if names else []
            if not set(names) <= index.keys():
                print(f"{condition}: not in the data, and {run.config['model']} cannot add effects "
                      "up: no effect")
                names = []
        rows.append([index[name] for name in names])
    d = np.full((len(rows), max(1, *map(len, rows))), data.NONE)
    for row, perturbations in zip(d, rows):
        row[:len(perturbations)] = perturbations
    return torch.from_numpy(d).to(run.device), spelled


@torch.no_grad()
def effect_interval(model, d, basal, c):
    """5 % and 95 % quantiles over particles of the effects of d (P,) on expected counts per 10,000,
    (G,) each.

    A particle is a basal state, of basal (K, L), with its covariates c (K, columns) and a draw of
    (M, E): the interval holds the effect on nine of ten cells of the population, by what the model
    knows of the effects. It is no standard error.
    """
    control = model.log_rho(basal, torch.full_like(d, data.NONE), c).exp()
    difference = 1e4 * (sample_frequencies(model, d, c, basal).exp() - control)  # (K, G)
    return torch.quantile(difference, torch.tensor([0.05, 0.95], device=d.device), dim=0)


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

    Basal states are from the prior, covariates and library sizes those of the screen's cells of the
    condition; if there are none, of those that received one of its perturbations, or of all. With
    `other`, from `controls_of_file`, they are those of its control cells, basal states drawn from
    q(z_basal | x).
    """
    torch.manual_seed(seed)
    rng, model, screen = np.random.default_rng(seed), run.model, other or run.screen
    chosen = np.ones(len(screen.d), bool)
    if other is None:
        parts = [t for t, name in enumerate(screen.perturbations)
                 if name in condition.split(screen.joiner)]
        for chosen in (screen.conditions == condition, np.isin(screen.d, parts).any(1),
                       np.ones(len(screen.d), bool)):
            if chosen.any():
                break
    cells = np.resize(rng.permutation(np.flatnonzero(chosen)), n)
    c = torch.from_numpy(screen.c[cells]).to(run.device)
    if other is None:
        basal = sobol_normal(n, model.n_latent, run.device)
    else:
        x = torch.from_numpy(screen.counts.dense(cells).astype(np.float32)).to(run.device)
        nothing = torch.full_like(d, data.NONE)
        posterior = [model.encode(x, x.new_zeros(1, len(x), model.n_latent), nothing.expand(
            len(x), -1), c) for x, c in zip(x.split(512), c.split(512))]
        loc, var = (torch.cat([v.reshape(-1, model.n_latent) for v in part])
                    for part in zip(*posterior))
        basal = loc + var.sqrt() * torch.randn_like(loc)
    return basal, c, screen.library[cells]


def predict(run, conditions, ate_particles=2500, library=None, evaluation_seed=0, other=None,
            n_rows=10):
    """Write predictions.h5ad: expression and effects, (condition, gene), by the model.

    X and the layer expected_log_normalised, expected_counts; effect_log_normalised and
    effect_counts, differences from control cells; effect_counts_low and _high, see effect_interval;
    log2_fold_change, of expected counts. Counts are per 10,000, and log-normalised expression is
    that of cells of the given library, see `library_of`. `other`, from `controls_of_file`: of that
    file's control cells. Each condition's numbers depend on no other one. Returns lines on what is
    known of each, and a table of its n_rows strongest effects.
    """
    dosages, spelled = dosages_of(run, conditions)
    trained_on = run.screen.conditions[run.learned_from]
    lines, rows, layers = [], [], {}
    for d, name in zip(dosages, spelled):
        basal, c, libraries = population(run, d, name, ate_particles, evaluation_seed, other)
        depth = library or (library_of(run) if other is None else int(np.median(libraries)))
        arms = torch.stack([torch.full_like(d, data.NONE), d])
        expected = expected_expression(run.model, arms, c.expand(2, -1, -1), library=depth,
                                       basal=basal)
        low, high = effect_interval(run.model, d, basal[:1000], c[:1000])
        control, counts = expected["counts"].cpu().numpy() * (1e4 / depth)
        of_condition = {"effect_counts_low": low.cpu().numpy(), "log2_fold_change": np.log2(
            counts / control), "effect_counts_high": high.cpu().numpy()}
        for scale, y in (("counts", (control, counts)),
                         ("log_normalised", expected["log_normalised"].cpu().numpy())):
            of_condition |= {f"expected_{scale}": y[1], f"effect_{scale}": y[1] - y[0]}
        for key, values in of_condition.items():
            layers.setdefault(key, []).append(values.astype(np.float32))
        lines.append(f"{name}: {known_of(run, d, name, c)}")
        by_data, error = effect_by_data(run, name) if other is None else (None, None)
        effect = of_condition["effect_log_normalised"]
        for g in np.argsort(-np.abs(effect), kind="stable")[:n_rows]:
            if effect[g] != 0:
                rows.append([
                    name, str(run.screen.gene_names[g]), f"{control[g]:.2f}",
                    f"{counts[g] - control[g]:+.2f}", f"{low[g]:+.2f} to {high[g]:+.2f}",
                    "-" if by_data is None else f"{by_data[g]:+.2f} ± {error[g]:.2f}",
                    f"{of_condition['log2_fold_change'][g]:+.2f}"])
    run.write("predictions.h5ad", X=np.stack(layers["expected_log_normalised"]),
              obs={"condition": spelled,
                   "n_training_cells": np.array([(trained_on == name).sum() for name in spelled])},
              var={"gene": run.screen.gene_names},
              layers={key: np.stack(values) for key, values in layers.items()},
              uns={"library": depth, "basal_states": "prior" if other is None else other.path})
    lines.append("\ncounts per 10,000, of the genes of largest effect on log-normalised expression "
                 f"(cells of {depth:,})" + "; data: all cells, those trained on, too, ± standard "
                 "error" * (other is None) + "\n")
    return "\n".join([*lines, markdown(["condition", "gene", "control", "effect",
                                        "5 % to 95 % of cells", "effect by the data",
                                        "log2 fold change"], rows)])


def known_of(run, d, condition, c):
    """What is known of a condition with dosages d (P,), in words: its training cells and those of
    its parts, masks that are empty, and whether covariates c (K, columns) were seen."""
    cells, model, words = run.learned_from, run.model, []
    n = int((run.screen.conditions[cells] == condition).sum())
    words.append(f"{n:,} training cells" if n else "no training cells of its own" + (
        f" since {run.config['adapt']}" if run.config["adapt"] else ""))
    for t in d[d != data.NONE].tolist():
        name, n_own = run.model_screen.perturbations[t], int(model.n_cells[t])
        received = cells[(run.model_screen.d[cells] == t).any(1)]
        if not n:
            words.append(f"{name} has {n_own:,}, alone and in combinations")
        if not n_own:
            words.append(f"WHAT IS PREDICTED FOR {name} IS THE PRIOR'S, NOT THE DATA'S"
                         if model.has_effects and model.adds_effects else
                         f"{name} HAS NO EFFECT IN THE MODEL")
        elif model.has_mask and model.mask_probability()[t].max() <= 0.5:
            words.append(f"the mask of {name} is empty: hardly any effect")
        if c.shape[1] and len(received):
            rows = c.cpu().numpy()[:, None] == np.unique(run.screen.c[received], axis=0)
            unseen = 1 - rows.all(2).any(1).mean()
            if unseen > 0:
                words.append(f"{unseen:.0%} of the cells that it is predicted for have covariates "
                             f"that no training cell of {name} has: EXTRAPOLATED")
    return "; ".join(words)


def effect_by_data(run, condition):
    """The effect of a condition on counts per 10,000 by all cells of the data, and its standard
    error, (G,) each; None twice where there is nothing to compare."""
    screen, (strata, stratum) = run.screen, strata_of(run.screen)
    group = np.where(screen.conditions == "control", 1, 0)
    cells = np.flatnonzero((screen.conditions == condition) | (group == 1))
    if condition == "control" or group[cells].all():
        return None, None
    found, n = mean_expression(run.batches, cells, (group * len(strata) + stratum)[cells],
                               2 * len(strata))
    mean, control, variance, of_control, weight = within_strata(
        *(v.reshape(2, len(strata), -1) for v in found["counts"]), n.reshape(2, -1))
    return ((mean - control)[0], np.sqrt(variance + of_control)[0]) if weight.any() else (
        None, None)


def sample(run, conditions, n, library=None, evaluation_seed=0, other=None):
    """Write samples.h5ad: counts of n simulated cells of each condition, for scanpy and others.

    Basal states, covariates and library sizes as in `population` (`library` for all, if given),
    each cell with a draw of (M, E) of its own. obs has the columns of the data's labels, spelled as
    there, and of its covariates.
    """
    screen, (dosages, spelled) = run.screen, dosages_of(run, conditions)
    column = screen.label_column or data.free("condition", run.config["covariate"] or [])
    index = data.free("cell", [column, *(run.config["covariate"] or [])])
    labels = screen.obs(column) if screen.label_column else screen.conditions
    x, obs = [], {index: [], column: [], **{name: [] for name in run.config["covariate"] or []}}
    for d, name in zip(dosages, spelled):
        basal, c, libraries = population(run, d, name, n, evaluation_seed, other)
        sizes = np.full(n, library) if library else libraries
        for few in torch.arange(n).split(1000):
            log_rho = sample_frequencies(run.model, d, c[few], basal[few])
            counts = sample_counts(run.model, log_rho, torch.as_tensor(
                sizes[few.numpy()], dtype=torch.float32, device=run.device))
            x.append(counts.cpu().numpy().astype(np.uint32))
        same = np.flatnonzero(screen.conditions == name)
        obs[index] += [f"{name}-{i + 1}" for i in range(n)]
        obs[column] += [str(labels[same[0]]) if len(same) else name] * n
        for j, covariate in enumerate(run.config["covariate"] or []):
            obs[covariate] += ["" if v == data.NONE else screen.covariates[v].split("=", 1)[1]
                               for v in c[:, j].tolist()]
    x = np.concatenate(x)
    run.write("samples.h5ad", X=x.astype(np.uint16) if x.max() < 2**16 else x, obs=obs,
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
    # In files, not in memory: there may be many cells.
    shape, files = (len(screen.d), model.n_latent), []
    for _ in range(2):
        files.append(tempfile.TemporaryFile(dir=run.folder))
        if hasattr(os, "posix_fallocate"):  # else a full disk would be noticed by a crash
            try:
                os.posix_fallocate(files[-1].fileno(), 0, 4 * math.prod(shape))
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise DataError(f"{run.folder}: {error.strerror}") from None
    basal, total = (np.memmap(file, np.float32, shape=shape) for file in files)
    n = 0
    for of_batch in posterior_means(run, np.arange(len(screen.d)), mask, effect):
        for values, part in zip((basal, total), of_batch):
            values[n:n + len(part)] = part
        n += len(of_batch[0])

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
    run.write("latents.h5ad", X=None, obs=obs, var={"gene": screen.gene_names},
              obsm={"X_z_basal": basal, "X_z": total}, uns=uns)


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


def save_figure(figure, path):
    """Write a PNG file, or nothing."""
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
    scores = np.pad(u * s, ((0, 0), (0, 1)))
    return np.argsort(np.arctan2(scores[:, 1], scores[:, 0]), kind="stable")


def figure_of_training(folder, step):
    """Loss, KL terms and masks over the steps of log.jsonl; a line at the step of best.pt."""
    log = train.read_log(folder)
    if not log:
        raise DataError(f"{folder}/log.jsonl: no line to draw")
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3), layout="constrained", sharex=True)
    for axis, names, unit in zip(axes, (
            ("loss", "validation_loss"), ("kl_basal", "kl_mask", "kl_effect"),
            ("mask_probability",), ("mask_size",)), (
            "nats per cell", "nats per cell", "mean probability", "latents of probability > 0.5")):
        for name in names:
            points = [(line["step"], line[name]) for line in log if name in line]
            if points:
                axis.plot(*zip(*points), label=name.replace("_", " "),
                          marker="." if name == "validation_loss" else None)
        axis.set(xlabel=f"step (line: the best, {step:,})", ylabel=unit)
        if axis.lines:  # above the axes, where it hides nothing
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
        else:
            axis.text(0.5, 0.5, "no masks to learn", transform=axis.transAxes, ha="center")
        axis.axvline(step, color="0.6", linewidth=0.8)
    losses = [line[name] for line in log for name in ("loss", "validation_loss") if name in line]
    axes[0].set_ylim(min(losses) - 1, np.quantile(losses, 0.95) + 1)  # the first would hide others
    axes[1].set_yscale("symlog", linthresh=0.01)
    for axis in axes[1:]:
        axis.set_ylim(bottom=0)
    figure.suptitle(os.path.basename(folder))
    return save_figure(figure, os.path.join(folder, "training.png"))


def figure_of_masks(run, pathways=None):
    """Figure 2: mask probabilities and mean offsets of perturbations, ordered by pathway; with
    turned axes also the offsets as encoder and decoder see them."""
    model, names = run.model, run.model_screen.perturbations
    probability, offset = probability_and_offset(model)
    unturned = offset @ model.axes.numpy(force=True).T
    pathway = pathway_of(names, load_pathways(run, pathways))
    if not any(p is not None for p in pathway):
        pathway = np.full(len(names), "all perturbations", dtype=object)
    groups = sorted({p for p in pathway if p is not None})
    members = [np.flatnonzero(pathway == group) for group in groups]
    rows = np.concatenate([m[in_order_of_angle(offset[m])] for m in members])
    # Latents have no order of their own: each stands where the pathway stands that it matters most
    # to, so that a mask that follows pathways shows as blocks along the diagonal. Those that no
    # perturbation touches are left out.
    strength = np.stack([np.abs(offset[m]).mean(0) for m in members])
    latents = np.lexsort((-strength.max(0), strength.argmax(0)))
    if (probability > 0.5).any():
        latents = latents[(probability > 0.5).any(0)[latents]]
    unit = f"{len(latents)} of {offset.shape[1]} latent dimensions" + (
        ", with the genes each changes most" if len(latents) <= 40 else "")
    names_of_latents = names_of_genes(run.folder) if len(latents) <= 40 else {}

    panels = [("mask probability", probability[:, latents], 1)] if model.has_mask else []
    limit = max(1e-6, np.quantile(np.abs(offset), 0.99))
    panels += [("mean offset E[m e]", offset[:, latents], limit)]
    if run.config["axes"] == "sparsest":
        panels += [("offset in the networks' axes", unturned, limit)]
    by_name = len(groups) == 1 and len(rows) <= 80
    figure, axes = pyplot().subplots(1, len(panels), squeeze=False, layout="constrained",
                                     sharey=True, figsize=(2 + 5 * len(panels), max(
                                         7, 3 + 0.16 * len(rows) * by_name)))
    edges = np.cumsum([0, *map(len, members)])
    for axis, (title, values, limit) in zip(axes[0], panels):
        image = heat_map(axis, values[rows], limit, title, xlabel=unit)
        if values is unturned:
            axis.set_xlabel(f"{values.shape[1]} dimensions")
        elif len(latents) <= 40:
            axis.set_xticks(np.arange(len(latents)), [
                f"{latent}: {names_of_latents.get(str(latent), '')}" for latent in latents],
                rotation=90, fontsize=7)
        figure.colorbar(image, ax=axis, shrink=0.5, extend="neither" if limit == 1 else "both")
        for edge in edges[1:-1]:
            axis.axhline(edge - 0.5, color="0.3", linewidth=0.5)
    labels = [f"{group if len(group) <= 28 else group[:26] + '...'} ({len(m)})"
              for group, m in zip(groups, members)]
    axes[0, 0].set_yticks((edges[1:] + edges[:-1] - 1) / 2, labels)
    if by_name:
        axes[0, 0].set_yticks(np.arange(len(rows)), [names[t] for t in rows], fontsize=7)
    some = f"{len(names):,} perturbations" if len(rows) == len(names) else (
        f"{len(rows):,} of {len(names):,} perturbations, those with a pathway")
    figure.suptitle(f"{os.path.basename(run.folder)}: {some}")
    return save_figure(figure, os.path.join(run.folder, "masks.png"))


def names_of_genes(folder):
    """{latent dimension: the three genes that it changes most, with signs}, of top_genes.csv."""
    found = {}
    with open(os.path.join(folder, "top_genes.csv"), encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "latent" and int(row["rank"]) <= 3:
                sign = "-" if row["effect_log_normalised"][0] == "-" else "+"
                found.setdefault(row["name"], []).append(sign + row["gene"])
    return {name: " ".join(genes) for name, genes in found.items()}


def figure_of_effects(run, metrics):
    """Figure 3: effects by the data and by the model, as heat maps and as a density of points. With
    60 conditions or fewer the maps have names, and the 50 genes of largest effect by the data."""
    folder, (names, _, _) = run.folder, conditions_of(run.screen)
    layers = data.read_layers(os.path.join(folder, "effects.h5ad"))
    kept = np.isfinite(layers["data_log_normalised"]).all(1)
    observed, predicted = (layers[f"{name}_log_normalised"][kept] for name in ("data", "model"))
    if not len(observed):
        raise DataError(f"{folder}: no condition has cells that effects could be taken from")
    rows, columns = in_order_of_angle(observed), in_order_of_angle(observed.T)
    by_name = len(rows) <= 60
    if by_name:
        columns = columns[np.isin(columns, np.argsort(-np.abs(observed).mean(0))[:50])]
    limit = max(1e-6, np.quantile(np.abs(observed[:, columns]), 0.99))
    figure, axes = pyplot().subplots(1, 3, layout="constrained", width_ratios=(1, 1, 0.8),
                                     figsize=(18 if by_name else 14, max(
                                         4.8, 2 + 0.16 * len(rows) * by_name)))
    for axis, values, title in ((axes[0], observed, "data"), (axes[1], predicted, "model")):
        image = heat_map(axis, values[rows][:, columns], limit, f"effects by the {title}",
                         xlabel=f"{len(columns):,} of {observed.shape[1]:,} genes",
                         ylabel=f"{len(values):,} conditions")
        if by_name:
            axis.set_xticks(np.arange(len(columns)), run.screen.gene_names[columns], rotation=90,
                            fontsize=6)
            axis.set_yticks(np.arange(len(rows)), names[kept][rows], fontsize=7)
    figure.colorbar(image, ax=axes[:2], shrink=0.6, extend="both",
                    label="difference from control of log2(1 + counts per 10,000)")
    hexagons = axes[2].hexbin(observed.ravel(), predicted.ravel(), gridsize=70, bins="log",
                              mincnt=1, cmap="viridis")
    figure.colorbar(hexagons, ax=axes[2], label="condition-gene pairs")
    axes[2].axline((0, 0), slope=1, color="C3", linewidth=0.8)
    axes[2].set(xlabel="effect by the data", ylabel="effect by the model",
                title=f"all genes: Pearson r = {pearson(predicted, observed):.3f}",
                aspect="equal", adjustable="datalim")
    figure.suptitle(f"{os.path.basename(folder)}, data effects from "
                    f"{metrics['options']['effects_from']} cells, log-normalised")
    return save_figure(figure, os.path.join(folder, "effects.png"))


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

        def name_of(m):
            """Model and guide."""
            return f"{model_of(m['config'])}, {guide_of(m['config'])}"

        def at_each_f(runs, value):
            """The finite values of these runs at each f."""
            values = [np.array([value(m) for m in runs if m["config"]["train_combinations"] == f],
                               float) for f in fractions]
            return [v[np.isfinite(v)] for v in values]

        def test_pearson(prediction):
            """A function of a run: ATE-Pearson of the conditions with test cells."""
            return lambda m: m["effects"][m["options"]["effects_from"]]["log_normalised"]["test"][
                prediction]["pearson"]

        # A row of bars for each model and guide, and, where effects are compared, each baseline.
        models = {name_of(m): [r for r in members if name_of(r) == name_of(m)] for m in members}
        splits = [m for f in fractions for m in one_of_each_split(members, f)]
        reference = [m for m in members if of_reference(m)]
        iwelbos = {name: at_each_f(same, lambda m: iwelbo_difference([m], reference)[0])
                   for name, same in models.items()}
        pearsons = {name: at_each_f(same, test_pearson("model")) for name, same in models.items()}
        pearsons |= {BASELINES[name]: at_each_f(splits, test_pearson(name))
                     for name in ("perturbed_mean", "additive")}
        figure, axes = pyplot().subplots(1, 2, figsize=(12, 4), layout="constrained")
        for axis, rows, title in (
                (axes[0], iwelbos, "test IWELBO relative to\nSAMS-VAE (correlated), f = 0"),
                (axes[1], pearsons, "ATE-Pearson, test conditions")):
            for i, (name, values) in enumerate(rows.items()):
                axis.bar(np.arange(len(fractions)) + 0.85 * ((i + 0.5) / len(rows) - 0.5),
                         [v.mean() if len(v) else math.nan for v in values], 0.8 / len(rows),
                         yerr=[v.std(ddof=1) if len(v) > 1 else math.nan for v in values],
                         color=f"C{i}" if name in models else str(0.25 * (i - len(models) + 2)),
                         capsize=2, label=name)
            axis.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
            axis.set(xlabel="fraction f of training combinations", ylabel=title)
            axis.axhline(0, color="0.3", linewidth=0.8)
        if not any(len(v) for values in iwelbos.values() for v in values):
            axes[0].set_title("needs the run of SAMS-VAE with f = 0 on the same split")
        figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle(f"{split}, {os.path.basename(members[0]['config']['data'])}")
        path, n = os.path.join(folder, f"{split}.png"), 1
        while path in paths:  # runs of other data, or with other settings
            path, n = os.path.join(folder, f"{split}-{n + 1}.png"), n + 1
        paths.append(save_figure(figure, path))
    return paths


# ============================================================================================
# The command line
# ============================================================================================


def evaluated(folder, options):
    """The metrics of metrics.json if they are those of the checkpoints under these options, and
    neither they nor the other results were changed; else None."""
    try:
        with open(os.path.join(folder, "metrics.json")) as file:
            metrics = json.load(file)
        whole = {k: v for k, v in metrics.items() if k != "checksum"}
        same = (metrics["checksum"] == hash_of(io.BytesIO(json.dumps(whole).encode())).decode()
                and metrics["format"] == FORMAT and metrics["options"].items() >= options.items()
                and metrics["files"] == hashes_of(folder, metrics["files"]))
        return metrics if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def main(arguments=None):
    """Evaluate runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+")
    add_options(parser, OPTIONS)
    parser.add_argument("--pathways", metavar="FILE.json", default=argparse.SUPPRESS,
                        help="pathway -> list of genes (default: uns/pathways of the data)")
    parser.add_argument("--again", action="store_true", help="evaluate what is evaluated already")
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0], help="of effects in tables",
                        type=lambda text: text.replace("-", "_"))
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
    names = [option_name(flag) for flag, *_ in OPTIONS] + ["pathways"]
    options = {name: value for name, value in vars(args).items() if name in names}
    if "pathways" in options:
        options["pathways"] = os.path.abspath(options["pathways"])
    if args.figures and (args.predict or args.latents):
        parser.error("--figures evaluates, --predict and --latents do not: use two commands")
    if args.sample and not args.predict:
        parser.error("--sample N needs --predict CONDITION ..., the conditions to sample")
    if args.figures:
        pyplot()

    folders, evaluations, failed = [folder.rstrip("/") for folder in args.runs], [], 0
    if len(folders) > 1:  # runs/* holds runs that have only begun, and figures
        unfinished = [f for f in folders
                      if os.path.isdir(f) and not os.path.isfile(os.path.join(f, "best.pt"))]
        print(*(f"{folder}: passed over, it has no best.pt" for folder in unfinished), sep="\n")
        folders = [f for f in folders if f not in unfinished and not os.path.isfile(f)]
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
            failed += 1
    evaluations = without_repeats(evaluations)
    if len(evaluations) > 1:
        print(f"\n{table_of_runs(evaluations, args.scale)}")
        adapted = table_of_adapted(evaluations)
        if adapted:
            print("\ntest cells with new perturbations, predictive IWELBO\n\n" + adapted)
    warned = [m["folder"] for m in evaluations if m["warnings"]]
    if len(evaluations) > 1 and warned:
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
            raise DataError("--latents are those of the run's own data: leave out --data")
        run = Run.load(folder, args.device)
        other = controls_of_file(run, args.data)
        print(f"of the {len(other.d):,} control cells of {args.data}:")
    else:
        run = Run.load(folder, args.device, args.data)
    own = {k: v for k, v in options.items() if k in ("library", "evaluation_seed")}
    if args.predict:
        particles = {k: v for k, v in options.items() if k == "ate_particles"}
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
    run = Run.load(folder, args.device, args.data) if args.data else None  # the file may be wrong
    metrics = None if args.again else evaluated(folder, options)
    if metrics is None:
        run = run or Run.load(folder, args.device, args.data)
        metrics = evaluate(run, **options)
        print(f"\n{folder}\n{table(metrics, args.scale)}\n\nwritten: {folder}/metrics.json, "
              "effects.h5ad, iwelbo.csv, top_genes.csv" + ", masks.csv" * run.model.has_effects)
    elif alone:
        print(f"\n{folder}, as evaluated before (--again evaluates anew)\n"
              f"{table(metrics, args.scale)}")
    if args.figures:
        run = run or Run.load(folder, args.device, args.data)
        figures = [figure_of_training(folder, metrics["step"])] if metrics["last_step"] else []
        figures.append(figure_of_effects(run, metrics))
        if run.model.has_effects:
            figures.append(figure_of_masks(run, metrics["options"]["pathways"]))
        print("written: " + ", ".join(figures))
    return metrics | {"folder": folder}


if __name__ == "__main__":
    data.run(main)
