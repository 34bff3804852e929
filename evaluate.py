"""Evaluate and use trained runs: likelihood, treatment effects, masks, tables, figures.

    python evaluate.py runs/NAME                          one run
    python evaluate.py runs/*                             a table: models and guides, over seeds
    python evaluate.py runs/NAME --ate-particles 10000    as in the paper's Table 1
    python evaluate.py runs/NAME --figures                PNG files (needs matplotlib)
    python evaluate.py runs/NAME --predict "A+B" C        what these perturbations would do
    python evaluate.py runs/NAME --predict C --sample 99  and as many simulated cells, for scanpy
    python evaluate.py runs/NAME --latents                latent states of all cells, for scanpy

Writes, beside the checkpoint, metrics.json (see `evaluate`), effects.h5ad (condition x gene effects
by the model and by the data), and the tables top_genes.csv, masks.csv and iwelbo.csv. In reading
order: metrics; what the data say, and baselines; the evaluation of a run; tables; use of a trained
model; figures; the command line.

A condition is a set of perturbations that some cell received; C conditions beside the control, G
genes. "Effect" means average treatment effect (3.2), a difference from control, (C, G); the latent
e_t of eq. 1 is called `effect` where it is drawn, as in sams_vae.py.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import sys
import typing

import data  # before torch: it sets what makes a CPU fast
import numpy as np
import torch

import train
from data import AT_LEAST_0, AT_LEAST_1, DataError, add_options, number_within, option_name
from sams_vae import (MODELS, expected_expression, iwelbo, sample_counts, sample_frequencies,
                      sobol_normal, sum_effects)

FORMAT = 13  # of metrics.json; a file of another format is not read
OURS = (None, "simulated", "sparse-shift")  # presets that are no experiment of the paper
SCALES = ("log_normalised", "counts")  # see `mean_expression`
SUPPORTED = 0.8  # the share of warm starts from which on a mask entry may be believed
BASELINES = {"no_change": "no change", "perturbed_mean": "perturbed mean", "additive": "additive",
             "matching_mean": "matching mean", "own_mean": "own mean",
             "shrunken_mean": "shrunken mean"}


# ============================================================================================
# Metrics of effects
# ============================================================================================


class Said(typing.NamedTuple):
    """What the data say of C conditions on one scale, (C, G) each (`effects_by_data`)."""

    effect: np.ndarray
    variance: np.ndarray            # its squared standard error
    from_mean: np.ndarray           # minus the mean effect of the other training conditions
    variance_from_mean: np.ndarray
    t: np.ndarray                   # see `t_against_others`


class Prediction(typing.NamedTuple):
    """Effects of C conditions by a model or a baseline, (C, G) each."""

    effect: np.ndarray
    from_mean: np.ndarray  # minus the mean of its effects for the other training conditions


def pearson(a, b):
    """Pearson correlation of two equally shaped arrays, flattened; NaN if one is constant.

    ATE-Pearson (3.2) is this for (condition, gene) matrices of model and data effects, pooled as in
    the paper's Figure 3, so that conditions with strong effects dominate.
    """
    a, b = (np.asarray(v, np.float64).ravel() - np.mean(v, dtype=np.float64) for v in (a, b))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def r_squared(predicted, observed):
    """1 - sum (observed - predicted)^2 / sum (observed - mean observed)^2, over all entries."""
    total = float(((observed - observed.mean()) ** 2).sum())
    return 1 - float(((observed - predicted) ** 2).sum()) / total if total > 0 else math.nan


def response_weights(t):
    """How clearly genes respond to conditions: weights (C, G) that sum to 1 for each condition.

    t (C, G) are t statistics of the condition's cells against all other perturbed cells. Their
    absolute values are scaled to reach from 0 to 1 in each condition and squared (Mejia et al.
    2025, "Diversity by Design"): most genes do not respond, and weigh next to nothing.
    """
    size = np.abs(t) - np.abs(t).min(1, keepdims=True)
    weight = (size / np.maximum(size.max(1, keepdims=True), 1e-30)) ** 2
    total = weight.sum(1, keepdims=True)
    return np.where(total > 0, weight / np.maximum(total, 1e-30), 1 / t.shape[1])


def weighted_r_squared(squared_error, observed, weights):
    """R2 of each condition over genes, weighted, and then averaged over conditions:
    1 - sum w (observed - predicted)^2 / sum w (observed - its weighted mean)^2.

    All (C, G); a condition of weights 0 is left out. With effects from the mean of the other
    conditions this is the R2_w(delta) of Mejia et al. (2025), weighted_r2_pert_exp2 in scPertEval:
    predicting that mean for all gets 0 or less.
    """
    mean = (weights * observed).sum(1, keepdims=True)
    total = (weights * (observed - mean) ** 2).sum(1)
    error = (weights * squared_error).sum(1)[total > 0] / total[total > 0]
    return float(np.mean(1 - error)) if len(error) else math.nan


def discrimination_scores(predicted, observed, device="cpu", most=1000):
    """How well a predicted effect is told from those of other conditions, in both orientations.

    All (C, G); distances are L1.

        first    the rank of its own prediction among all, by distance to its observed effect
        second   the rank of its own observed effect among all, by distance to its prediction (the
                 perturbation discrimination score of the Virtual Cell Challenge, 2025, which
                 divides by C in place of C - 1 and leaves targets out)

    A rank goes from 0 (nearest) to C - 1, ties at half, is divided by C - 1 and taken from one: 1
    is perfect, 1/2 is chance. At most `most` conditions, drawn at random, are the rivals of each:
    more would take hours. Returns (2, C), NaN for a single condition, which has no rival.
    """
    predicted, observed = (torch.as_tensor(v, dtype=torch.float32, device=device)
                           for v in (predicted, observed))
    n, scores = len(observed), []
    rivals = torch.from_numpy(np.random.default_rng(0).permutation(n)[:most]).to(device)
    is_other = rivals != torch.arange(n, device=device)[:, None]  # (C, rivals)
    mine = (predicted - observed).abs().sum(1, keepdim=True)
    for own, others in ((observed, predicted), (predicted, observed)):
        distance = torch.cdist(own, others[rivals], p=1)
        is_tie = (distance - mine).abs() <= 1e-5 * mine
        rank = torch.where(is_tie, 0.5, (distance < mine).float()) * is_other
        scores.append(1 - rank.sum(1) / is_other.sum(1))
    return torch.stack(scores).double().cpu().numpy()


def effect_metrics(prediction, said, weights):
    """Metrics of a Prediction beside what the data have Said, a dict; weights (C, G).

    The first two are of effects minus the mean effect of the other training conditions, as
    predicted and by the data: without the shift that all perturbations share, which flatters
    trivial predictions (Vinas Torne et al. 2025, "Systema")."""
    effect, from_mean = prediction
    return {"n_conditions": len(effect),
            "from_mean": pearson(from_mean, said.from_mean),
            "weighted_r_squared": weighted_r_squared(
                (from_mean - said.from_mean) ** 2, said.from_mean, weights),
            "pearson": pearson(effect, said.effect),
            "r_squared": r_squared(effect, said.effect)}


def noise_limit(said, weights):
    """What `effect_metrics` would say of a perfect prediction, estimated: a dict.

    The data's effects are the true ones plus noise. V is their variance over all entries, N the
    noise's, the mean of squared standard errors; V - N is left for the true effects. So the true
    effects have R2 = 1 - N / V with the data's, and r = sqrt(1 - N / V), 0 where that is negative.
    Ranks have no such estimate, nor has the weighted R2 of a condition whose weights come from the
    same noisy cells: these weights must be 0. (In screens simulated from trained models r was
    within 0.01 of the true effects' r with hundreds of controls, up to 0.08 below it with 8.)
    """
    def explained(effect, variance):
        """1 - N / V."""
        v = np.var(effect, dtype=np.float64)
        return float(1 - np.mean(variance, dtype=np.float64) / v) if v > 0 else math.nan

    of_effects = explained(said.effect, said.variance)
    of_from_mean = explained(said.from_mean, said.variance_from_mean)
    return {"n_conditions": len(said.effect), "r_squared": of_effects,
            "pearson": np.sqrt(np.maximum(0, of_effects)),
            "from_mean": np.sqrt(np.maximum(0, of_from_mean)),
            "weighted_r_squared": weighted_r_squared(
                said.variance_from_mean, said.from_mean, weights)}


def scores(groups, predictions, said, independent, is_left_out, device):
    """Rows of metrics, dicts, of {row: Prediction} in groups of conditions {name: (C,) bool}.

    Entries of is_left_out (C, G) do not count: they are zero on both sides. independent (C,): which
    conditions have weights from other cells than the compared ones. Discrimination ranks all
    conditions that can be compared, whatever their group, unless a prediction is the same for all.
    """
    known, rows = groups["all"], []
    said = Said(*(np.where(is_left_out, 0, v) for v in said))
    predictions = {row: Prediction(*(np.where(is_left_out, 0, v) for v in prediction))
                   for row, prediction in predictions.items()}
    weights, ranks = response_weights(said.t), np.full((len(predictions), 2, len(known)), math.nan)
    for rank, prediction in zip(ranks, predictions.values()):
        if prediction.from_mean.any():
            rank[:, known] = discrimination_scores(
                prediction.effect[known], said.effect[known], device)
    for group, chosen in groups.items():
        if not chosen.any():
            continue
        by_data = Said(*(v[chosen] for v in said))
        for rank, (row, prediction) in zip(ranks, predictions.items()):
            by_row = Prediction(*(v[chosen] for v in prediction))
            first, second = rank[:, chosen].mean(1)
            rows.append({"group": group, "row": row,
                         **effect_metrics(by_row, by_data, weights[chosen]),
                         "discrimination": first, "discrimination_by_prediction": second})
        rows.append({"group": group, "row": "noise_limit", **noise_limit(
            by_data, (weights * independent[:, None])[chosen])})
    return rows


# ============================================================================================
# Metrics of masks and latents
# ============================================================================================


def best_matching(score):
    """Rows and columns of score (n, m) in pairs, min(n, m) of each, so that the sum of
    score[best_matching(score)] is the largest (exact, by augmenting paths)."""
    n, m = score.shape
    if n > m:
        return best_matching(score.T)[::-1]
    row_of = np.full(m, -1)  # the row matched to each column
    for new_row in range(n):
        # The new row takes a column, its row moves on to another one, and so on to a free column:
        # the most that such moves gain up to each column (Bellman and Ford), and the column before.
        taken = np.flatnonzero(row_of >= 0)
        rows, before = row_of[taken], np.full(m, -1)
        gain = score[new_row].astype(float)
        while len(taken):
            moved = (gain[taken] - score[rows, taken])[:, None] + score[rows]
            better = moved.max(0) > gain + 1e-9
            if not better.any():
                break
            gain[better], before[better] = moved.max(0)[better], taken[moved.argmax(0)][better]
        column = np.argmax(np.where(row_of < 0, gain, -np.inf))
        while before[column] >= 0:  # move the rows along the path
            row_of[column] = row_of[before[column]]
            column = before[column]
        row_of[column] = new_row
    return np.arange(n), np.argsort(row_of)[m - n:]


def mask_recovery(true_mask, mask):
    """Precision, recall and F1 of masks, (T, L) and (T, L') bool, under a matching of latents.

    Latents have no names, so each true one is matched with at most one of the model's: to the
    largest number of entries that agree on 1, which gives the best F1. Entries of latents without
    a partner count as errors. NaN where nothing is to be found.
    """
    agree = true_mask.T.astype(float) @ mask  # (L, L'): perturbations that both touch
    hits = agree[best_matching(agree)].sum()
    n_true, n_found = int(true_mask.sum()), int(mask.sum())
    return {name: float(hits / n) if n else math.nan for name, n in (
        ("precision", n_found), ("recall", n_true), ("f1", (n_true + n_found) / 2))}


def mask_agreement(masks, n_permutations=10):
    """Do several runs find the same masks? Mean F1 between each two, under the best matching of
    their latents, and by chance, when the perturbations of one are permuted. A mask is a dict of
    perturbations and texts such as "0 3", the latents that one touches (as in metrics.json); those
    that all masks have are compared."""
    words = sorted({word for mask in masks for row in mask.values() for word in row.split()}) or [
        "0"]
    names = [name for name in masks[0] if all(name in mask for mask in masks)] if masks else []
    arrays = [np.array([[word in mask[name].split() for word in words] for name in names])
              for mask in masks]
    pairs, rng = list(itertools.combinations(arrays, 2)), np.random.default_rng(0)

    def mean_f1(pairs):
        """The mean over the pairs for which it is defined."""
        found = [f1 for f1 in (mask_recovery(a, b)["f1"] for a, b in pairs) if not math.isnan(f1)]
        return float(np.mean(found)) if found else math.nan

    return mean_f1(pairs), mean_f1([(a, rng.permutation(b)) for a, b in pairs
                                    for _ in range(n_permutations)])


def latent_recovery(true, learned):
    """How well latent states of simulated cells are found, true (N, L) and learned (N, L'), as
    Lopez et al. (2023) ask: a dict.

    mcc         mean over true latents of |Pearson's r| with a learned one of its own, matched to
                the largest sum; 0 for one that is constant or without a partner, where L' < L
    r_squared   R2 of true latents by a linear map of all learned ones, fitted to every other cell,
                in the others: the mean over true ones. NaN where these are too few
    """
    a, b = (v - v.mean(0) for v in (true, learned))
    size = np.sqrt(np.outer((a**2).sum(0), (b**2).sum(0)))
    r = np.abs(a.T @ b) / np.where(size > 0, size, 1)  # (L, L')
    found = {"mcc": float(r[best_matching(r)].sum() / len(r)), "r_squared": math.nan}
    inputs = np.column_stack([learned, np.ones(len(learned))])
    if len(inputs) > 2 * inputs.shape[1]:
        weight, *_ = np.linalg.lstsq(inputs[::2], true[::2], rcond=None)
        error = ((true[1::2] - inputs[1::2] @ weight) ** 2).mean(0)
        found["r_squared"] = float((1 - error / true[1::2].var(0)).mean())
    return found


def mask_pathway_accuracy(mask, pathway, n_splits=10):
    """Accuracy of predicting a perturbation's pathway from its mask (4.1.1), and of the commonest
    pathway for all: a dict, empty without scikit-learn.

    mask (T, L) bool, probabilities above 0.5; pathway (T,) names. A random forest (scikit-learn's
    defaults) learns from 70 % of the perturbations and is scored on the others, in random splits.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError:
        print("mask pathway accuracy is left out: pip install scikit-learn")
        return {}
    accuracy = []
    for seed in range(n_splits):
        train, test = data.train_test_split(len(mask), 0.7, seed)
        forest = RandomForestClassifier(random_state=seed).fit(mask[train], pathway[train])
        accuracy.append(forest.score(mask[test], pathway[test]))
    return {"mask_pathway_accuracy": float(np.mean(accuracy)), "n_annotated": len(mask),
            "mask_pathway_accuracy_sd": float(np.std(accuracy, ddof=1)),
            "mask_pathway_chance": np.unique(pathway, return_counts=True)[1].max() / len(mask)}


def pathway_of(perturbations, pathways):
    """The pathway of each perturbation, (T,), or ""; pathways {pathway: genes}: the first that has
    the perturbation's gene, its name up to the first "_"."""
    of_gene = {gene: pathway for pathway in reversed(pathways or {}) for gene in pathways[pathway]}
    return np.array([of_gene.get(name.split("_")[0], "") for name in perturbations])


# ============================================================================================
# What the data say, and what needs no model
# ============================================================================================


class Arms:
    """Pairs (condition, covariates) that some cell of a run's screen has, A arms.

    The first S are the controls, with each of the S sets of covariate values that occur (one set,
    of nothing, where there are no covariates). Every other, treated, arm is compared with the
    control cells of the same covariates, and a condition's effect is the mean over its arms,
    weighted by its cells.
    """

    def __init__(self, run):
        screen = run.screen
        strata, stratum = np.unique(screen.c, axis=0, return_inverse=True)
        S = self.n_controls = len(strata)
        label = np.where(screen.conditions == "control", "", screen.conditions).astype(str)
        names, condition = np.unique(label, return_inverse=True)  # "" comes first
        # Each control arm is listed before the cells, so that none is missing.
        pair = np.append(np.arange(S), condition * S + stratum.reshape(-1))
        arm, cell, of_cell = np.unique(pair, return_index=True, return_inverse=True)
        cell = cell[S:] - S                # the first of each treated arm
        self.strata = strata               # (S, columns)
        self.names = names[1:]             # (C,) conditions beside the control, sorted
        self.of_cell = of_cell[S:]         # (N,) the arm of every cell
        self.condition = arm[S:] // S - 1  # (A - S,) of each treated arm: they are sorted by it
        self.control = arm[S:] % S         # (A - S,) the control arm of each
        self.first = np.flatnonzero(np.diff(self.condition, prepend=-1))  # (C,) treated arms
        self.dosages = screen.d[cell[self.first]]  # (C, P) of the conditions
        self.d = torch.from_numpy(np.pad(run.model_screen.d[cell], (  # (A, P) as the model sees it
            (S, 0), (0, 0)), constant_values=data.NONE)).to(run.device)
        self.c = torch.from_numpy(strata[arm % S]).to(run.device)  # (A, columns)

    def n_cells(self, cells):
        """How many of these cells each arm has, (A,)."""
        return np.bincount(self.of_cell[cells], minlength=len(self.d))

    def of_condition(self, n):
        """Sums over each condition of n (A - S, ...), (C, ...)."""
        return np.add.reduceat(n, self.first, axis=0)

    def shares(self, n):
        """The weight of each treated arm in its condition, (A - S, 1): its part of the condition's
        cells, of n (A,), where there are control cells to compare with."""
        n = n[self.n_controls:] * (n[self.control] > 0)
        share = n / np.maximum(self.of_condition(n), 1)[self.condition]
        return share[:, None].astype(np.float32)  # of large arrays there are many

    def have_some(self, share):
        """Which conditions have cells and control cells, (C,) bool."""
        return self.of_condition(share)[:, 0] > 0

    def compared(self, y, share):
        """Means over arms y (A, G) of conditions, and of their controls, (C, G) each."""
        return (self.of_condition(share * y[self.n_controls:]),
                self.of_condition(share * y[self.control]))


class Means(typing.NamedTuple):
    """Of some cells, by arm: mean expression (A, G), its squared standard error, their number."""

    mean: np.ndarray
    variance: np.ndarray
    n: np.ndarray


def mean_expression(batches, cells, arms):
    """Mean expression of cells, positions (n,), by arm: {scale: Means}. counts: 1e4 x / sum x (3.2
    has x). log_normalised: log2(1 + 1e4 x / sum x), as in the authors' code for Table 1. An arm
    without cells has zeros; one of a single cell has the pooled variance of all arms."""
    n = arms.n_cells(cells)[:, None]
    arm = torch.from_numpy(arms.of_cell[cells]).to(batches.device)
    total = torch.zeros(2, 2, len(n), batches.n_genes, dtype=torch.float64, device=batches.device)
    for (x, *_), part in zip(batches.in_order(cells, 512), arm.split(512)):
        per_10k = (1e4 * x / x.sum(-1, keepdim=True)).double()  # (B, G)
        for (y_sum, y2_sum), y in zip(total, (torch.log2(1 + per_10k), per_10k)):
            y_sum.index_add_(0, part, y)
            y2_sum.index_add_(0, part, y**2)
    means = {}
    for scale, sums in zip(SCALES, total):
        y, y2 = sums.cpu().numpy()
        mean = y / np.maximum(n, 1)
        squares = np.maximum(y2 - n * mean**2, 0)  # around the mean
        pooled = squares.sum(0) / max(1, np.maximum(n - 1, 0).sum())
        variance = np.where(n > 1, squares / np.maximum(n - 1, 1), pooled) / np.maximum(n, 1)
        means[scale] = Means(mean.astype(np.float32), variance.astype(np.float32), n[:, 0])
    return means


def with_controls(cells, train, is_control):
    """Test cells with control cells: their own, or, if they have hardly any (none in the Norman
    splits), the controls that are not in `train`, or else all. is_control (N,) bool."""
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


def prediction(effect, seen):
    """The Prediction of these effects (C, G); seen (C,): which conditions training has seen."""
    return Prediction(effect, effect - mean_of_others(effect, seen))


def t_against_others(arms, means):
    """Welch's t of each condition's cells against all other perturbed cells, (C, G), compared
    within covariates; 0 for a gene that does not vary."""
    n = means.n[arms.n_controls:, None].astype(np.float32)
    mean, variance = means.mean[arms.n_controls:], means.variance[arms.n_controls:]
    mean = mean - mean.mean(0)  # else squares would lose digits
    squares = np.maximum(n - 1, 0) * n * variance + n * mean**2  # sums of y^2
    same = np.float32(arms.control == np.arange(arms.n_controls)[:, None])  # (S, A - S)

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


def effects_by_data(arms, observed, trained, enough):
    """On one scale, what predictions are compared with, Said, and the baselines {row: Prediction}.

    observed, trained   Means of the cells to compare with, and of the training cells
    enough (C,)         which conditions have training cells enough for their t; others have the t
                        of the compared cells
    """
    S = arms.n_controls
    share, share_trained = arms.shares(observed.n), arms.shares(trained.n)
    treated, control = arms.compared(observed.mean, share)
    noise, noise_of_control = arms.compared(observed.variance, share**2)
    own = np.subtract(*arms.compared(trained.mean, share_trained))
    noise_trained, noise_trained_control = arms.compared(trained.variance, share_trained**2)
    seen = arms.have_some(share_trained)
    others = mean_of_others(own, seen)

    # Effects minus the mean of others: both terms use the same controls, the training ones if
    # there are any, so that the controls' noise cancels except where covariates differ.
    has_control = trained.n[:S, None] > 0
    controls = np.where(has_control, trained.mean[:S], observed.mean[:S])
    noise_of_controls = np.where(has_control, trained.variance[:S], observed.variance[:S])
    which = arms.control[:, None] == np.arange(S)
    differ = arms.of_condition(share * which) - mean_of_others(
        arms.of_condition(share_trained * which), seen)  # (C, S)
    n_others = np.maximum(seen.sum() - seen, 1)[:, None]

    said = Said(
        treated - control, noise + noise_of_control,
        treated - arms.of_condition(share * controls[arms.control]) - others,
        noise + mean_of_others(noise_trained, seen) / n_others + differ**2 @ noise_of_controls,
        np.where(enough[:, None], t_against_others(arms, trained),
                 t_against_others(arms, observed)))
    return said, baseline_effects(own, noise_trained + noise_trained_control, seen, arms.dosages)


def shrunken(effect, variance, seen):
    """Effects (C, G) shrunken towards zero, as far as they are noise (empirical Bayes).

    Each is multiplied by S / (S + N), the posterior mean if true effects are N(0, S); N is
    `variance`. Over the conditions in seen, (C,) bool, S_tg = S_t S_g / S_0: S_t and S_g are means
    of effect^2 - N over genes and over conditions, 0 where negative, and S_0 is the mean of S_t or
    of S_g, the larger one (they are equal if none was negative). S = 0 where nothing is left."""
    signal = np.where(seen[:, None], effect**2 - variance, 0)
    of_condition, of_gene = (np.maximum(signal.sum(axis, keepdims=True, dtype=np.float64), 0)
                             for axis in (1, 0))
    of_all = max(of_condition.sum(), of_gene.sum())
    s = np.zeros_like(effect)
    if signal.sum(dtype=np.float64) > 0:
        s += of_condition / of_all * of_gene
    return effect * np.divide(s, s + variance, out=np.zeros_like(s), where=s > 0)


def baseline_effects(effect, variance, seen, dosages):
    """Six predictions that need no model, from training cells, on one scale: {row: Prediction}.

    effect, variance (C, G) in the training cells; seen (C,): which conditions have some;
    dosages (C, P).

        no_change       0: the prediction is the control
        perturbed_mean  the mean effect of the other training conditions
        additive        sum over the condition's perturbations g of the effect of cells with g
                        alone; 0 for a g that no training cell has alone
        matching_mean   the mean of the same, in place of their sum, perturbed_mean for a g that no
                        training cell has alone (after Vinas Torne et al. 2025, "Systema")
        own_mean        the effect in the condition's own training cells; additive without these
        shrunken_mean   the same of `shrunken` effects
    """
    n_parts = (dosages != data.NONE).sum(1)
    alone = np.full(dosages.max() + 2, -1)  # the condition of a perturbation alone; NONE has none
    alone[dosages[n_parts == 1].max(1)] = np.where(seen, np.arange(len(seen)), -1)[n_parts == 1]
    parts = alone[dosages]  # (C, P)

    def additive(effect):
        """The sum over parts."""
        return sum(np.where(part[:, None] >= 0, effect[part], 0) for part in parts.T)

    unknown = (n_parts - (parts >= 0).sum(1))[:, None]
    others, shrunk = mean_of_others(effect, seen), shrunken(effect, variance, seen)
    of_parts = additive(effect)
    matching = (of_parts + unknown * others) / n_parts[:, None]
    return {"no_change": Prediction(0 * effect, 0 * effect),
            "perturbed_mean": Prediction(others, 0 * effect),
            "additive": prediction(of_parts, seen),
            "matching_mean": Prediction(matching, matching - others),  # of which others are a part
            "own_mean": prediction(np.where(seen[:, None], effect, of_parts), seen),
            "shrunken_mean": prediction(np.where(seen[:, None], shrunk, additive(shrunk)), seen)}


# ============================================================================================
# The evaluation of a run: likelihood, effects, masks
# ============================================================================================

OPTIONS = [  # name, default, what is allowed, what it is and where the default comes from
    ("--iwelbo-particles", 100, AT_LEAST_1, "K of 3.1 (paper: 100, for Norman)"),
    ("--ate-particles", 2500, AT_LEAST_1, "K of 3.2 (paper: Replogle 10,000, Norman 2,500)"),
    ("--library", 0, AT_LEAST_0, "total counts of simulated cells; 0 for 10,000 with a preset of "
     "the paper (authors' code), else for the median of the data's cells"),
    ("--effects-from", None, ["all", "test"], "cells that data effects are taken from (the paper "
     "does not say; authors' code for Table 1, and with a preset of the paper: all; else test)"),
    ("--basal", None, ["aggregated", "prior"], "basal states: N(0, I) for all cells (paper, and "
     "with a preset), or with a mean for treated and one for control cells, as found there (else)"),
    ("--evaluation-seed", 0, AT_LEAST_0, "of IWELBO and effects (ours)"),
]
DEFAULTS = {option_name(flag): default for flag, default, *_ in OPTIONS} | {"pathways": None}


def open_run(folder, device=None, data_path=None):
    """The run of runs/NAME as best.pt has it; data_path says where its data are, if they moved."""
    config = train.load_checkpoint(folder, "last.pt")["config"]  # --resume may have changed it
    changes = {name: config[name] for name in ("data", "steps", "precision")}
    if data_path:
        changes["data"] = os.path.abspath(data_path)
    return train.Run.load(folder, "best.pt", device, **changes)


def library_of(run):
    """Total counts of simulated cells: 10,000 with a preset of the paper, as in the authors' code,
    else the data's median, at which logarithms of model and data are alike."""
    return int(np.median(run.screen.library)) if run.config["preset"] in OURS else 10_000


def basal_of(run):
    """Where basal states are from: with a preset from the prior, as in the paper."""
    return "aggregated" if run.config["preset"] is None else "prior"


def evaluate(run, pathways=None, **options):
    """Evaluate a run, write its metrics.json and tables, and return the metrics, a flat dict:

        config, options     of the run, and of this evaluation (OPTIONS; own_targets: whether the
                            gene that a perturbation targets counts, as with the paper's presets)
        step, masks_from    where best.pt was, and where masks began; last_step, done: how far
                            training has come, and whether it has ended
        iwelbo ... see `likelihood`; effects ... see `effects`; mask ... see `masks`; and, of
        simulated screens, latent ... see `latents`; warnings: sentences

    pathways is a .json file for data.read_pathways, by default the data. NaN becomes null.
    """
    last = train.load_checkpoint(run.folder, "last.pt")["progress"]
    ours = run.config["preset"] in OURS
    given = {k: v for k, v in (options | {"pathways": pathways}).items() if v}
    options = DEFAULTS | {
        "library": library_of(run), "effects_from": "test" if ours else "all",
        "basal": basal_of(run), "own_targets": not ours} | given
    known_pathways = data.read_pathways(pathways or run.config["data"])  # it may be wrong
    metrics = {"format": FORMAT, "checkpoints": checkpoints(run.folder), "config": run.config,
               "fingerprint": run.fixed["fingerprint"], "options": options,
               "step": run.progress.step, "masks_from": run.progress.masks_from,
               "validation_loss": run.progress.best, "last_step": last["step"],
               "done": run.has_ended(train.Progress(**last))}
    torch.manual_seed(options["evaluation_seed"])
    truth = data.read_simulation(run.config["data"])
    metrics |= likelihood(run, options) | effects(run, options)
    metrics |= masks(run, known_pathways, truth) | (latents(run, truth) if truth else {})
    metrics["warnings"] = warnings_of(metrics)
    metrics = json.loads(json.dumps(metrics), parse_constant=lambda nan: None)
    with data.replacing(os.path.join(run.folder, "metrics.json")) as path:
        pathlib.Path(path).write_text(json.dumps(metrics, indent=2))
    return metrics


def checkpoints(folder):
    """The hashes at the end of best.pt and last.pt, which tell whether metrics are still theirs."""
    return [pathlib.Path(folder, name).read_bytes()[-64:].decode(errors="replace")
            for name in ("best.pt", "last.pt")]


def evaluated(folder, options):
    """The metrics of metrics.json, if they are of these checkpoints and of the options that are
    given, whatever the others were; else None."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        metrics = json.loads(pathlib.Path(folder, "metrics.json").read_text())
        if metrics["format"] == FORMAT and metrics["checkpoints"] == checkpoints(folder) and (
                metrics["options"].items() >= {k: v for k, v in options.items() if v}.items()):
            return metrics
    return None


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

    Its Monte Carlo error is the standard deviation of the mean over repeats, with some of the cells
    (the delta method gave half of it). With --adapt, iwelbo_new is of test cells with new
    perturbations, and iwelbo_new_before is the same before these were learned, under their prior
    (SVAE+ and the conditional VAE have no such prior: they take these cells for controls)."""
    test, n_particles = run.split["test"], options["iwelbo_particles"]

    def predictive(cells):
        """The predictive IWELBO of each cell, the joint one, and its effective sample size."""
        values, *joint = iwelbo(run.model, run.batches.in_order(cells), n_particles)
        return values.double().cpu().numpy(), *joint

    values, joint, effective_sample_size = predictive(test)
    write_csv(run, "iwelbo.csv", ["cell", "condition", "iwelbo"], zip(
        run.screen.cell_names[test], run.screen.conditions[test], values))
    some = np.sort(np.random.default_rng(0).permutation(test)[:500])
    repeats = [predictive(some)[0].mean() for _ in range(8)]
    metrics = {"iwelbo": values.mean(), "n_test_cells": len(test),
               "iwelbo_se": values.std() / math.sqrt(max(1, len(test) - 1)),
               "iwelbo_monte_carlo_error": np.std(repeats, ddof=1),
               "iwelbo_joint_per_cell": joint / len(test),
               "iwelbo_joint_effective_sample_size": effective_sample_size}
    if run.config["adapt"]:
        is_new = (run.model_screen.d[test] >= run.n_known).any(1)
        n_cells, learned = run.model.n_cells, run.model.n_cells.clone()
        if is_new.any():
            n_cells[run.n_known:] = 0
            metrics |= {"n_new_cells": int(is_new.sum()), "iwelbo_new": values[is_new].mean(),
                        "iwelbo_new_before": predictive(test[is_new])[0].mean()}
            n_cells.copy_(learned)
    return metrics


@torch.no_grad()
def q_of_cells(model, batches, n_draws=20):
    """Mean and variance of z_basal ~ q(z_basal | x, z_pert) q(M, E), over n_draws of (M, E), of all
    cells of the batches, (n, L) each."""
    mask, effect = model.sample_many_globals(model.all_perturbations(), n_draws)
    found = []
    for x, d, c in batches:
        z_pert = sum_effects(mask, effect, d, model.axes)  # (draws, B, L)
        loc, var = (v.expand_as(z_pert) for v in model.encode(x, z_pert, d, c))
        found.append([loc.mean(0), var.mean(0) + loc.var(0, unbiased=False)])
    return [torch.cat(parts) for parts in zip(*found)]


def cells_of_stratum(run, values, n_most=10_000):
    """For `basal_states`, the posteriors of training cells with these covariates, always the same:
    their mean (L,); for each cell the mean, less the mean of its kind, and the variance, (n, L)
    each; the shrunken difference between the two means; and the part of treated cells. None with
    fewer than three cells; of each kind at most n_most are taken."""
    rng, cells = np.random.default_rng(0), run.split["train"]
    cells = rng.permutation(cells[(run.screen.c[cells] == values).all(1)])
    is_treated = run.screen.conditions[cells] != "control"
    cells = rng.permutation(np.append(cells[is_treated][:n_most], cells[~is_treated][:n_most]))
    if len(cells) < 3:
        return None
    with torch.random.fork_rng():  # what is drawn here does not move what is drawn elsewhere
        torch.manual_seed(0)
        loc, var = q_of_cells(run.model, run.batches.in_order(cells))
    is_treated = torch.from_numpy(run.screen.conditions[cells] != "control").to(run.device)
    kinds = [kind if kind.any() else ~kind for kind in (is_treated, ~is_treated)]
    mean, mean_of_control = (loc[kind].mean(0) for kind in kinds)
    centred = loc - torch.where(is_treated[:, None], mean, mean_of_control)
    s2 = centred.square().sum(0) / (len(cells) - 2) * sum(1 / kind.sum() for kind in kinds)
    difference = mean - mean_of_control
    difference *= (1 - s2 / difference.square().clamp(min=1e-20)).clamp(min=0)
    return loc.mean(0), centred, var, difference, is_treated.float().mean()


def basal_states(run, c, basal):
    """Basal states of treated and of control cells, (n, L) each, with covariates c (n, columns).

    prior        draws of N(0, I), the same for both: what perturbations do to one population, the
                 ATE of 3.2
    aggregated   draws from the posteriors of training cells with these covariates, the same cells
                 for both, moved to the mean of treated cells of all conditions or to the mean of
                 controls: how treated cells differ from controls, whatever made them differ, such
                 as which cells survived

    The controls may be few, so the difference between the two means is shrunken, in each dimension
    by 1 - s^2 / difference^2, or to 0, where s is its standard error over cells. It is 0 without
    cells of both kinds; with fewer than three cells both are the prior's.
    """
    treated = sobol_normal(len(c), run.model.n_latent, run.device)
    control = treated.clone()
    if basal == "prior":
        return treated, control
    strata, stratum = np.unique(c, axis=0, return_inverse=True)
    for s, values in enumerate(strata):
        key = tuple(values.tolist())
        if key not in run.posteriors:
            run.posteriors[key] = cells_of_stratum(run, values)
        if run.posteriors[key]:
            mean, centred, var, difference, part = run.posteriors[key]
            mine = torch.from_numpy(np.flatnonzero(stratum.ravel() == s)).to(run.device)
            k = torch.arange(len(mine), device=run.device) % len(centred)  # in random order
            draws = mean + centred[k] + var[k].sqrt() * torch.randn_like(centred[k])
            treated[mine] = draws + (1 - part) * difference  # so that the mean of all cells stays
            control[mine] = draws - part * difference
    return treated, control


def expected(run, d, c, basal, library):
    """`expected_expression` by the names of SCALES, as arrays."""
    y = expected_expression(run.model, d, c, library=library, basal=basal)
    return {"log_normalised": y["log_normalised"].float().cpu().numpy(),
            "counts": y["per_10k"].float().cpu().numpy()}


def effects(run, options):
    """Average treatment effects of all conditions (3.2), by the model, the baselines and the data.

    Writes effects.h5ad and top_genes.csv. Returns metrics. Rows of ["effects"] are {scale, group,
    row, `effect_metrics` and discrimination}: a group is of conditions, all that can be compared,
    pairs, held_out (no training cells), or test (with test cells); a row is the model, a baseline
    or noise_limit. ["n_pairs"]: how many pairs have training cells, and of how many both parts have
    some alone. ["on_target"]: the sum of effects on counts over the n_targets genes that
    perturbations target, divided by the controls' sum: -0.6 for a fall by 60 %.
    """
    screen, split, arms = run.screen, run.split, Arms(run)
    every, from_test = np.arange(len(screen.d)), options["effects_from"] == "test"
    cells = with_controls(split["test"], split["train"],
                          screen.conditions == "control") if from_test else every
    n_cells, n_trained, n_test = (arms.of_condition(arms.n_cells(some)[arms.n_controls:])
                                  for some in (cells, split["train"], split["test"]))
    share, share_trained, share_of_all = (arms.shares(n) for n in (
        arms.n_cells(cells), arms.n_cells(split["train"]), np.maximum(arms.n_cells(every), 1)))
    known, seen, enough = arms.have_some(share), arms.have_some(share_trained), n_trained >= 10
    n_parts = (arms.dosages != data.NONE).sum(1)
    groups = {"all": known, "pairs": known & (n_parts == 2), "held_out": known & (n_trained == 0),
              "test": known & (n_test > 0)}
    is_target = own_targets(arms.dosages, screen.perturbations, screen.gene_names)
    left_out = is_target & (not options["own_targets"])

    observed, trained = (mean_expression(run.batches, some, arms)
                         for some in (cells, split["train"]))
    treated_of, control_of = zip(*(  # of each of the S sets of covariate values
        basal_states(run, np.tile(values, (options["ate_particles"], 1)), options["basal"])
        for values in arms.strata))
    basal = [*control_of, *(treated_of[stratum] for stratum in arms.control)]
    y = expected(run, arms.d, arms.c, basal, options["library"])
    # Without cells to compare, the model's arms are weighted by the whole screen's cells.
    share = np.where(known[arms.condition, None], share, share_of_all)
    rows, layers = [], {}
    for scale in SCALES:
        said, baselines = effects_by_data(arms, observed[scale], trained[scale], enough)
        treated, control = arms.compared(y[scale], share)
        predictions = {"model": prediction(treated - control, seen), **baselines}
        rows += [{"scale": scale, **row} for row in scores(
            groups, predictions, said, enough & from_test, left_out, run.device)]
        layers |= {f"{name}_{scale}": values.astype(np.float32) for name, values in (
            ("model", treated - control), ("data", np.where(known[:, None], said.effect, np.nan)),
            ("data_se", np.where(known[:, None], np.sqrt(said.variance), np.nan)))}
    data.write_h5ad(os.path.join(run.folder, "effects.h5ad"), X=layers["model_log_normalised"],
                    obs={"condition": arms.names.astype(object), "n_cells": n_cells,
                         "n_training_cells": n_trained, "n_perturbations": n_parts},
                    var={"gene": screen.gene_names}, layers=layers,
                    uns={"effects_from": options["effects_from"], "library": options["library"]})
    # What follows is of counts, the last scale.
    write_top_genes(run, arms.names, np.log2(treated / control), layers, options)
    on_target = is_target & known[:, None]
    before = float(arms.compared(observed["counts"].mean, share)[1][on_target].sum())
    alone = arms.dosages[(n_parts == 1) & (n_trained > 0)].max(1)
    both_alone = np.isin(arms.dosages, [*alone, data.NONE]).all(1)
    return {"effects": rows, "n_targets": int(on_target.sum()) if before else 0,
            "on_target": {row: float(effect[on_target].sum()) / before for row, (effect, *_) in (
                {"data": said} | predictions).items()} if before else {},
            "n_pairs": [int((groups["pairs"] & so).sum()) for so in (n_trained > 0, both_alone)]}


def strongest(effect, n):
    """The n genes of largest effect (G,), without those that have none."""
    return [g for g in np.argsort(-np.abs(effect), kind="stable")[:n] if effect[g] != 0]


def write_top_genes(run, names, log2_fold_change, layers, options, n_top=20, n_particles=500):
    """Write top_genes.csv: for each condition and each latent dimension the n_top genes whose
    log-normalised expression changes most by the model. For a latent, the basal state moves by +1,
    its standard deviation a priori, along this axis of the masks."""
    model, genes = run.model, run.screen.gene_names
    found = [("condition", *of_condition) for of_condition in zip(
        names, layers["model_log_normalised"], log2_fold_change,
        layers["data_log_normalised"], layers["data_se_log_normalised"])]
    if model.has_effects:
        nothing = torch.full((1, 1), data.NONE, device=run.device)
        cells = np.resize(np.random.default_rng(0).permutation(len(run.screen.c)), n_particles)
        _, basal = basal_states(run, run.screen.c[cells], options["basal"])
        c, moved = torch.from_numpy(run.screen.c[cells][None]).to(run.device), []
        for move in [0, *model.axes.T]:
            torch.manual_seed(0)  # the same noise for all
            y = expected(run, nothing, c, basal + move, options["library"])
            moved.append([y["log_normalised"][0], np.log2(y["counts"][0])])
        not_by_data = np.full(len(genes), "")
        found += [("latent", latent, *np.subtract(y, moved[0]), not_by_data, not_by_data)
                  for latent, y in enumerate(moved[1:])]
    write_csv(run, "top_genes.csv", [
        "kind", "name", "rank", "gene", "effect_log_normalised", "log2_fold_change",
        "data_effect_log_normalised", "data_standard_error"], (
        [kind, name, rank, genes[g], effect[g], *(v[g] for v in others)]
        for kind, name, effect, *others in found
        for rank, g in enumerate(strongest(effect, n_top), 1)))


@torch.no_grad()
def drawn_effects(model, n_draws=50):
    """Draws of masks and effects of all perturbations, (draws, T, L) each: always the same."""
    torch.manual_seed(0)
    return model.sample_many_globals(model.all_perturbations(), n_draws)


def probability_and_offset(model):
    """Mask probabilities, and mean offsets E[m e], (T, L) each."""
    mask, effect = drawn_effects(model)
    return model.mask_probability().numpy(force=True), (mask * effect).mean(0).numpy(force=True)


def masks(run, pathways, truth=None):
    """Metrics of masks, a dict, empty for a model without masks: over perturbations with training
    cells the mean probability and size, how many masks are empty, and, after several warm starts,
    how many entries these support; `mask_recovery` on a simulated screen; `mask_pathway_accuracy`
    with pathways. Writes masks.csv: the entries of probability above 0.01, the likeliest first,
    with their mean offset E[m e] and their support (`begin_masks`)."""
    model, names = run.model, run.model_screen.perturbations
    if not model.has_effects:
        return {}
    probability, offset = probability_and_offset(model)
    support = np.full(probability.shape, "") if run.support is None else run.support.numpy()
    write_csv(run, "masks.csv", ["perturbation", "latent", "probability", "offset", "support"], (
        [names[t], latent, probability[t, latent], offset[t, latent], support[t, latent]]
        for t, row in enumerate(probability) for latent in np.argsort(-row, kind="stable")
        if row[latent] > 0.01))
    if not model.has_mask:
        return {}
    trained, mask = model.n_cells.numpy(force=True) > 0, probability > 0.5
    further = sorted(further_rows(run))
    trained[further] = False
    metrics = {"mask_mean_probability": float(probability[trained].mean()),
               "n_trained_perturbations": int(trained.sum()),
               "n_empty_masks": int((~mask[trained].any(1)).sum()),
               "mask_mean_size": float(mask[trained].sum(1).mean()),
               "mask": {name: " ".join(map(str, np.flatnonzero(row)))
                        for name, row in zip(names, mask)}}
    if further:
        metrics |= {"n_interactions": len(further), "n_acting": int(mask[further].any(1).sum())}
    if run.support is not None:
        metrics |= {"n_entries": int(mask.sum()),
                    "n_supported": int((mask & (support >= SUPPORTED)).sum())}
    true_mask = dict(zip(*truth[:2])) if truth else {}
    if true_mask.keys() >= {*names}:  # (SVAE+ may have labels for pairs)
        found = mask_recovery(np.stack([true_mask[name] for name in names]), mask)
        metrics |= {f"mask_{name}": value for name, value in found.items()}
    pathway = pathway_of(names, pathways)
    known = pathway != ""
    if known.sum() >= 10:
        metrics |= mask_pathway_accuracy(mask[known], pathway[known])
    elif pathways:
        print(f"mask pathway accuracy is left out: {known.sum()} of {len(names):,} perturbations "
              "are in a pathway, and 10 are needed")
    return metrics


def latents(run, truth):
    """`latent_recovery` in the test cells of a simulated screen, of posterior means in the axes of
    the masks: latent_* of z (as in Lopez et al.), and basal_* of z_basal."""
    test = run.split["test"]
    z, z_basal = (v[run.screen.rows[test]].astype(float) for v in truth[3:])
    basal, total = (v.astype(float) for v in posterior_means(run, test))
    return {f"{of}_{name}": value for of, pair in (
        ("latent", (z, total)), ("basal", (z_basal, basal)))
        for name, value in latent_recovery(*pair).items()}


@torch.no_grad()
def posterior_means(run, cells):
    """Posterior means of z_basal and of z = z_basal + z_pert, (n, L) each, of n cells, over
    `drawn_effects`, in the axes of the masks: column l of `model.axes` is latent l of masks."""
    model, (mask, effect), means = run.model, drawn_effects(run.model), []
    for x, d, c in run.batches.in_order(cells):
        z_pert = sum_effects(mask, effect, d, model.axes)  # (draws, B, L)
        loc, _ = model.encode(x, z_pert, d, c)
        means.append([(z.mean(0) @ model.axes).numpy(force=True)
                      for z in (loc.expand_as(z_pert), loc + z_pert)])
    return map(np.concatenate, zip(*means))


def warnings_of(m):
    """Sentences on what a user should know before believing anything of metrics m: a list."""
    found = []
    if "mask" in m and not m["config"]["adapt"]:
        n_steps, probability = m["step"] - m["masks_from"], m["mask_mean_probability"]
        learned = m["config"]["axes"] == "learned"
        if probability > 0.45 if learned else n_steps < 100:
            found.append(f"masks have hardly been trained, in {n_steps:,} steps: their mean "
                         f"probability is {probability:.3f}" + ", where training starts at 0.5"
                         * learned + "; more cells or --steps may help")
        elif m["n_empty_masks"] > 0.5 * m["n_trained_perturbations"]:
            found.append(f"the masks of {m['n_empty_masks']:,} of {m['n_trained_perturbations']:,} "
                         "perturbations are empty: they have no effect, too few cells for it, or "
                         "--alpha is too small")
    source = m["options"]["effects_from"]  # a baseline made of the compared cells is no rival
    rivals = BASELINES if source == "test" else ("no_change", "perturbed_mean")
    for scale in SCALES:
        words = f"effects ({scale.replace('_', '-')})"
        r2, *of_rivals = (score(m, scale, "all", row).get("r_squared", math.nan)
                          for row in ("model", *rivals))
        better = [f"{BASELINES[row]} ({v:.3f})" for row, v in zip(rivals, of_rivals) if v >= r2]
        if score(m, scale, "all", "noise_limit").get("pearson") == 0:
            found.append(f"{words} by the data in {source} cells do not stand out of their noise: "
                         "comparing with them says nothing")
        elif better:
            found.append(f"predicted {words} have an R2 of {r2:.3f} with the data's, no better "
                         f"than {', '.join(better)}, which need no model")
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
OPTIONS_LINE = ("(IWELBO with {options[iwelbo_particles]:,} particles; effects with "
                "{options[ate_particles]:,} particles, {options[basal]} basal states, cells of "
                "{options[library]:,} counts)")
LINES = {  # of one run: the metric that a line needs, and the line
    "options": OPTIONS_LINE,
    "iwelbo": "test IWELBO, predictive: {iwelbo:.2f} per cell, standard error {iwelbo_se:.2f} over "
    "{n_test_cells:,} cells, {iwelbo_monte_carlo_error:.2f} by Monte Carlo\n"
    "test IWELBO, joint:      {iwelbo_joint_per_cell:.2f} per cell, effective sample size "
    "{iwelbo_joint_effective_sample_size:.2f}",
    "iwelbo_new": "{n_new_cells:,} of them with new perturbations: predictive "
    "{iwelbo_new_before:.2f} before these were learned, {iwelbo_new:.2f} after",
    "mask": "masks: {mask_mean_size:.2f} latent dimensions per perturbation; {n_empty_masks:,} of "
    "{n_trained_perturbations:,} are empty",
    "n_interactions": "interactions with {config[interactions]}: the masks of {n_acting:,} of "
    "{n_interactions:,} are not empty",
    "n_supported": "of all {n_entries:,} mask entries, {n_supported:,} have a support of at least "
    f"{SUPPORTED} by {{config[warm_starts]}} warm starts",
    "mask_f1": "true masks: precision {mask_precision:.3f}, recall {mask_recall:.3f}, "
    "F1 {mask_f1:.3f}",
    "latent_mcc": "latents z: MCC {latent_mcc:.3f}, R2 {latent_r_squared:.3f}",
    "basal_mcc": "basal states: MCC {basal_mcc:.3f}, R2 {basal_r_squared:.3f}",
    "n_annotated": "mask pathway accuracy: {mask_pathway_accuracy:.3f}, sd over splits "
    "{mask_pathway_accuracy_sd:.3f} ({n_annotated:,} annotated; the commonest pathway for all: "
    "{mask_pathway_chance:.3f})",
    "on_target": "targeted genes ({n_targets:,}): counts change by {on_target[data]:+.0%} (data), "
    "{on_target[model]:+.0%} (model), {on_target[own_mean]:+.0%} (own mean); below, they are left "
    "out unless the preset is the paper's"}


def markdown(rows):
    """A Markdown table, aligned in a terminal, too. Rows are dicts; the first has all columns, and
    those that hold nothing are left out."""
    header = [k for k in rows[0] if any(row.get(k, "-") not in ("", "-") for row in rows)]
    cells = [[row.get(k, "") for k in header] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *cells)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def in_words(values, digits=3):
    """Text of a number, of several as mean ± sd; "-" for one that is undefined."""
    values = np.atleast_1d(np.array(values, float))  # None is NaN
    values = values[~np.isnan(values)]
    text = f"{round(np.mean(values), digits) + 0.0:.{digits}f}" if len(values) else "-"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def in_columns(runs, scale, group, row):
    """The metrics of effects in a row of a table, {column: text}, over runs."""
    return {title: in_words([score(m, scale, group, row).get(column) for m in runs])
            for column, title in COLUMNS.items()}


def table(m, scale="log_normalised"):
    """The metrics of one run as text: likelihood, masks, effects beside baselines, warnings."""
    numbers = {name: math.nan if value is None else value for name, value in m.items()}
    lines = [text.format(**numbers).replace("nan", "-") for name, text in LINES.items()
             if m.get(name, {}) != {}]
    source = m["options"]["effects_from"]
    for group, words, without in (
            ("all", "conditions", "matching_mean"),
            ("held_out", "conditions held out of training", "own_mean"),
            ("pairs", "pairs, {:,} in training, {:,} with both parts alone there".format(
                *m["n_pairs"]), "")):
        of_model = score(m, scale, group, "model")
        if of_model:
            rows = {"model": f"**{m['config']['model']}**", **ROWS}
            lines += [f"\neffects of {of_model['n_conditions']:,} {words}, "
                      f"{scale.replace('_', '-')}, by the data in {source} cells\n",
                      markdown([{"predicted by": label} | in_columns([m], scale, group, row)
                                for row, label in rows.items() if row != without])]
    lines += ["", CAUTION]
    if source == "all":
        lines.append("(predictions may exceed the noise limit: they were trained on most cells)")
    return "\n".join(lines + [f"\nwarning: {w}" for w in m["warnings"]])


SEEDS = ("seed", "split_seed", "simulated_seed")  # a row is a mean over these
IN_COLUMNS = ("model", "axes", "correlated_basal", "correlated_effects", "train_combinations")
NO_MATTER = ("data", "name", "preset", "simulated", "log_every", "validate_every", "precision",
             "stream")
OF_MODELS = {"iwelbo_joint_per_cell": ("joint IWELBO", 2),
             "mask_pathway_accuracy": ("mask pathway acc.", 3), "mask_f1": ("mask F1", 3),
             "latent_mcc": ("MCC", 3), "basal_mcc": ("basal", 3),
             "latent_r_squared": ("R2 of z", 3)}


def model_and_guide(config):
    """How tables and figures call a run's model, and its guide as in Table 1."""
    correlated = [name for name, on in (("z_basal", config["correlated_basal"]),
                                        ("E", config["correlated_effects"])) if on]
    return (config["model"] + ", sparsest axes" * (config["axes"] == "sparsest")
            + ", adapted" * bool(config["adapt"]),
            "corr. " + " and ".join(correlated) if correlated else "mean-field")


def settings(m):
    """What the runs in one row of a table share, a dict: all options of training but the seeds.
    (How a file was read is in its fingerprint, or does not change the numbers.)"""
    left_out = {*SEEDS, *NO_MATTER, *data.READING} - {"covariate", "split_column", "min_cells"}
    config = {k: v for k, v in m["config"].items() if k not in left_out}
    return config | ({} if m["done"] else {"stopped at step": m["last_step"]})


def grouped(runs, key):
    """Lists of the runs that have the same key(run)."""
    groups = {}
    for m in runs:
        groups.setdefault(json.dumps(key(m), sort_keys=True), []).append(m)
    return list(groups.values())


def tables_of(runs):
    """Runs in lists, one for each table, in the order of Table 1: of one screen (simulated ones
    differ by their seeds) and split, evaluated alike."""
    def of_table(m):
        """What a table has in common."""
        config = m["config"]
        screen = [v for k, v in config.items() if k.startswith("simulated_") and k not in SEEDS]
        return screen if config["simulated"] else m["fingerprint"], config["split"], m["options"]

    def place(m):
        """What the rows of a table are sorted by."""
        return [list(MODELS).index(m["config"]["model"]), *(
            m["config"][k] for k in (*IN_COLUMNS[1:], "split_seed", "seed"))]

    # Of runs that differ in nothing, not even in seeds, one counts.
    different = [same[0] for same in grouped(runs, lambda m: (
        of_table(m), settings(m), [m["config"].get(k) for k in SEEDS]))]
    return grouped(sorted(different, key=place), of_table)


def of_reference(m):
    """Whether a run is what the paper's Figure 4 compares with."""
    return not m["config"]["train_combinations"] and model_and_guide(m["config"]) == (
        "sams-vae", "corr. z_basal and E")


def iwelbo_of_cells(runs):
    """Predictive IWELBO of each test cell, a mean over the runs' iwelbo.csv: {(screen, seed of the
    split, number and name of the cell): nats}."""
    values = {}
    for m in runs:
        with open(os.path.join(m["folder"], "iwelbo.csv"), encoding="utf-8") as file:
            for i, row in enumerate(csv.DictReader(file)):
                cell = m["fingerprint"], m["config"]["split_seed"], i, row["cell"]
                values.setdefault(cell, []).append(float(row["iwelbo"]))
    return {cell: np.mean(of_cell) for cell, of_cell in values.items()}


def iwelbo_difference(runs, others):
    """Predictive IWELBO of some runs minus the others' IWELBO: the mean over cells, its standard
    error over cells, and a bound on its Monte Carlo error, which comes on top (runs of one
    evaluation seed share draws, and most of it cancels). NaN without a test cell in common.

    Cells differ much more than two models on the same cell do: differences are taken cell by cell.
    """
    a, b = iwelbo_of_cells(runs), iwelbo_of_cells(others)
    difference = np.array([a[cell] - b[cell] for cell in a if cell in b])
    if not len(difference):
        return math.nan, math.nan, math.nan
    noise = [sum((m["iwelbo_monte_carlo_error"] or 0) ** 2 for m in some) / len(some) ** 2
             for some in (runs, others)]
    return (difference.mean(), difference.std() / math.sqrt(max(1, len(difference) - 1)),
            math.sqrt(sum(noise)))


def one_of_each_split(members):
    """One run of each split: baselines depend on data and split, not on the model."""
    return [same[0] for same in grouped(members, lambda m: [
        m["config"].get(k) for k in ("train_combinations", "split_seed", "simulated_seed")])]


def row_of_runs(same, reference, differing, scale, group):
    """A row of `table_of_runs`: runs of the same settings."""
    own, (model, guide) = settings(same[0]), model_and_guide(same[0]["config"])
    difference, *errors = iwelbo_difference(same, reference)
    one_screen = len({m["fingerprint"] for m in same}) == 1
    agreement, chance = mask_agreement([m["mask"] for m in same if "mask" in m and one_screen])
    return {"model": model, "guide": guide,
            "settings": ", ".join(f"{k} {own[k]}" for k in differing if k in own),
            "f": f"{own['train_combinations']:g}" * (group == "test"), "runs": str(len(same)),
            "test IWELBO": in_words([m["iwelbo"] for m in same], 2),
            "difference": "reference" if same is reference else
            f"{difference:+.2f} ({', '.join(in_words(v, 2) for v in errors)})",
            **{title: in_words([m.get(name) for m in same], digits)
               for name, (title, digits) in OF_MODELS.items()},
            "masks agree": "-" if math.isnan(agreement) else
            f"{agreement:.3f} (chance {chance:.3f})",
            **in_columns(same, scale, group, "model")}


def table_of_runs(runs, scale="log_normalised"):
    """Markdown of the metrics of many runs: a table per screen, split and way of evaluating, a row
    per model and settings, mean ± sd over seeds, and a column of the settings that differ.

    "difference" is `iwelbo_difference`, with its two errors, from the best row. In the Norman
    splits it is from Figure 4's reference, and effects are of conditions with test cells.
    """
    tables = []
    for members in tables_of(runs):
        config, rows_of = members[0]["config"], grouped(members, settings)
        norman = config["split"] != "random"
        group, source = "test" if norman else "all", members[0]["options"]["effects_from"]
        differing = [k for k in settings(members[0]) | {"stopped at step": 0} if k not in IN_COLUMNS
                     and len(grouped(members, lambda m: settings(m).get(k))) > 1]
        reference = ([same for same in rows_of if norman and of_reference(same[0])] or [max(
            rows_of, key=lambda same: np.mean([m["iwelbo"] or -math.inf for m in same]))])[0]
        rows = [row_of_runs(same, reference, differing, scale, group) for same in rows_of]
        fractions = grouped(members, lambda m: m["config"]["train_combinations"])
        for (row, label), of_f in itertools.product(ROWS.items(), fractions):
            if norman or row != "matching_mean":
                rows.append({"model": label, "f": f"{of_f[0]['config']['train_combinations']:g}"
                             * norman} | in_columns(one_of_each_split(of_f), scale, group, row))
        covariates = "".join(f", covariate {column}" for column in config["covariate"] or ())
        tables.append(f"{os.path.basename(config['data'])}, split {config['split']}{covariates}; "
                      f"effects of {group} conditions, {scale.replace('_', '-')}, by the data in "
                      f"{source} cells\n{OPTIONS_LINE.format(**members[0])}\n\n{markdown(rows)}")
    return "\n\n".join([*tables, CAUTION])


# ============================================================================================
# Use of a trained model
# ============================================================================================


def dosages_of(run, conditions):
    """Dosages (C, P), for the run's model, of conditions such as "B+A" or "control", each once; and
    how the screen spells them, "A+B". Raises DataError for names that the screen does not have."""
    screen, further = run.screen, further_rows(run)
    index = {name: t for t, name in enumerate(run.model_screen.perturbations) if t not in further}
    known, rows = {name.upper(): name for name in sorted({*screen.perturbations, *index})}, {}
    for condition in conditions:
        names = [condition] if condition in known.values() else sorted(
            {name.strip() for name in condition.split(screen.joiner)} - {"control"})
        for name in {*names} - {*known.values()}:
            near = difflib.get_close_matches(name.upper(), known, 5, 0.5) or list(known)[:5]
            raise DataError(
                f"{run.folder}: no perturbation is called {name!r}; of {len(known):,}, these come "
                f"near: {', '.join(known[n] for n in near)} (the control is called control, a "
                f"combination A{screen.joiner}B)")
        spelled = screen.joiner.join(names) or "control"
        if not run.model.adds_effects:  # it has one label per cell
            names = {spelled} & index.keys()
        rows[spelled] = [index[name] for name in names]
    longest = max(1, *map(len, rows.values()))
    return torch.tensor([row + [data.NONE] * (longest - len(row)) for row in rows.values()],
                        device=run.device), list(rows)


def further_rows(run):
    """The rows `A @ value` of the run's model, a set."""
    return {row for rows in run.interaction_rows.values() for row in rows.values()}


def contexts(run, screen):
    """The value of the --interactions column in a screen's cells, (N,), a position in the run's
    covariates; 0 for all without interactions."""
    column, n = run.config["interactions"], len(screen.d)
    return screen.c[:, run.config["covariate"].index(column)] if column else np.zeros(n, int)


def in_contexts(run, conditions, screen):
    """Yield every condition in every context of the screen's cells: dosages (P,), the condition,
    the context, and what to call the condition in it."""
    table, values = run.interaction_rows, sorted({*contexts(run, screen)} - {data.NONE})
    for (d, name), value in itertools.product(zip(*dosages_of(run, conditions)), values):
        rows = [table[t][value] for t in d.tolist() if value in table.get(t, ())]
        yield torch.cat([d, d.new_tensor(rows)]), name, value, (data.interaction_name(
            run.screen, name, value) if run.config["interactions"] else name)


def controls_of_file(run, path):
    """The control cells of another file: a Screen, with genes and c as in the run. It is read like
    the run's, but for --subset and --exclude."""
    options = {k: run.config.get(k) for k in ("control", "one_hot_prefix", "combination_separator",
                                              "label_pattern", "layer")}
    screen = data.read_screen(path, perturbation_column=run.screen.label_column, **options,
                              only_controls=True, genes_of=run.screen.gene_names)
    if run.config["covariate"]:
        screen.c = train.known_covariates(screen, run.config["covariate"], run.screen.covariates)
    return screen


@torch.no_grad()
def population(run, condition, n, basal, seed, other=None, value=0):
    """n cells to receive a condition: their basal states and those of as many controls (n, L) each,
    covariates (n, columns), and library sizes (n,). The same for the same arguments.

    Basal states are as in `basal_states`, covariates and library sizes from the screen's cells of
    the condition in the context `value`; if there are none, of one of its perturbations, or of
    all there. With `other` (see `controls_of_file`) all are from its cells, and both basal states
    from their q(z_basal | x).
    """
    torch.manual_seed(seed)
    screen = other or run.screen
    parts = [t for t, name in enumerate(screen.perturbations)
             if name in condition.split(screen.joiner)]
    every = contexts(run, screen) == value
    chosen = every if other else next(cells for cells in (
        every & (screen.conditions == condition), every & np.isin(screen.d, parts).any(1), every)
        if cells.any())
    cells = np.resize(np.random.default_rng(seed).permutation(np.flatnonzero(chosen)), n)
    if other:
        loc, var = q_of_cells(run.model, data.Batches(other, run.device).in_order(cells))
        treated = control = loc + var.sqrt() * torch.randn_like(loc)
    else:
        treated, control = basal_states(run, screen.c[cells], basal)
    treated = control if condition == "control" else treated
    return treated, control, torch.from_numpy(screen.c[cells]).to(run.device), screen.library[cells]


@torch.no_grad()
def interval_of_effect(model, d, treated, control, c):
    """5 % and 95 % quantiles over cells of the effects of d (P,) on expected counts per 10,000,
    1e4 rho, (G,) each: treated and control basal states (K, L), covariates c (K, columns), and a
    draw of (M, E) each. An effect is what d changes in a cell of the treated basal state, plus what
    the difference in basal states changes in the mean. This is no standard error."""
    nothing = torch.full_like(d, data.NONE)
    before, of_control = (model.log_rho(z, nothing, c).exp() for z in (treated, control))
    effect = sample_frequencies(model, d, c, treated).exp() - before  # (K, G)
    in_order = 1e4 * (effect + (before - of_control).mean(0)).sort(0).values.cpu().numpy()
    return in_order[len(in_order) // 20], in_order[-1 - len(in_order) // 20]


def predict(run, conditions, ate_particles=2500, library=0, basal=None, seed=0, other=None):
    """Write predictions.h5ad: expression and effects, (condition, gene), by the model.

    Layers: expected_* on both scales (X: log-normalised); effect_*, differences from control cells;
    effect_counts_low and _high, see `interval_of_effect`; log2_fold_change, of expected counts.
    Counts are per 10,000, in cells of the given library (0: see `library_of`) and basal states
    (None: see `basal_of`), or of `other`'s control cells, see `controls_of_file`. Each condition's
    numbers depend on no other one. Returns lines on what is known of each, and a table of its ten
    strongest effects.
    """
    lines, rows, layers, basal = [], [], {}, basal or basal_of(run)
    labels, n_training_cells, trained_on = [], [], run.taught_by["train"]
    predicted = list(in_contexts(run, conditions, other or run.screen))
    _, names, values, _ = map(set, zip(*predicted))
    by_data = {value: {} if other else effects_of_data(run, names, value) for value in values}
    for d, condition, value, name in predicted:
        treated, control, c, libraries = population(
            run, condition, ate_particles, basal, seed, other, value)
        depth = library or (int(np.median(libraries)) if other else library_of(run))
        arms = torch.stack([torch.full_like(d, data.NONE), d])
        y = expected(run, arms, c.expand(2, -1, -1), [control, treated], depth)
        low, high = interval_of_effect(run.model, d, treated[:1000], control[:1000], c[:1000])
        of_one = {f"expected_{scale}": after for scale, (_, after) in y.items()}
        of_one |= {f"effect_{scale}": after - before for scale, (before, after) in y.items()}
        control, counts = y["counts"]
        of_one |= {"effect_counts_low": low, "effect_counts_high": high,
                   "log2_fold_change": np.log2(counts / control)}
        for layer, values in of_one.items():
            layers.setdefault(layer, []).append(values.astype(np.float32))
        labels.append(name)
        n_training_cells.append(int(((contexts(run, run.screen) == value) & (
            run.screen.conditions == condition))[trained_on].sum()))
        lines.append(f"{name}: {known_of(run, d, condition, n_training_cells[-1], c, value)}")
        for g in strongest(of_one["effect_log_normalised"], 10):
            rows.append({
                "condition": name, "gene": str(run.screen.gene_names[g]),
                "control": f"{control[g]:.2f}", "effect": f"{of_one['effect_counts'][g]:+.2f}",
                "5 % to 95 % of cells": f"{low[g]:+.2f} to {high[g]:+.2f}",
                "effect by the data": "{:+.2f} ± {:.2f}".format(
                    *by_data[value][condition][:, g]) if condition in by_data[value] else "-",
                "log2 fold change": f"{of_one['log2_fold_change'][g]:+.2f}"})
    data.write_h5ad(
        os.path.join(run.folder, "predictions.h5ad"), X=np.stack(layers["expected_log_normalised"]),
        obs={"condition": labels, "n_training_cells": np.array(n_training_cells)},
        var={"gene": run.screen.gene_names}, layers={k: np.stack(v) for k, v in layers.items()},
        uns={"library": depth, "basal_states": other.path if other else basal})
    lines.append("\ncounts per 10,000, of the genes of largest effect on log-normalised expression "
                 f"({f'{basal} basal states, ' * (not other)}cells of {depth:,})" + "; data: all "
                 "cells, those trained on, too, ± standard error" * (not other) + "\n")
    return "\n".join([*lines, markdown(rows) if rows else ""])


def known_of(run, d, condition, n, c, value):
    """What training, on n cells of it, says of a condition with dosages d (P,) and its parts, in
    words; it is predicted for covariates c (K, columns) and the context `value`."""
    cells, model, further = run.taught_by["train"], run.model, further_rows(run)
    parts = [t for t in d.tolist() if t != data.NONE and t not in further]
    words = [f"{n:,} training cells" if n else "no training cells of its own"]
    never_seen = " WAS NEVER SEEN: " + ("ITS EFFECT IS DRAWN FROM THE PRIOR" if model.has_effects
                                        and model.adds_effects else "IT HAS NO EFFECT OF ITS OWN")
    if not parts and condition != "control":  # SVAE+ cannot add effects up
        words.append(condition + never_seen)
    for t in parts:
        name, n_own = run.model_screen.perturbations[t], int(model.n_cells[t])
        rows = [row for v, row in run.interaction_rows.get(t, {}).items() if v == value]
        if not n_own:
            words.append(name + never_seen)
            continue
        if not n:
            words.append(f"{name} has {n_own:,}, alone and in combinations")
        if model.has_mask and model.mask_probability()[[t, *rows]].max() <= 0.5:
            words.append(f"the mask of {name} is empty: hardly any effect of its own")
        received = cells[(run.model_screen.d[cells] == t).any(1)]
        seen = (c.cpu().numpy()[:, None] == np.unique(run.screen.c[received], axis=0)).all(2).any(1)
        if run.config["interactions"]:
            values = {*contexts(run, run.screen)[received]} - {data.NONE}
            known = ", ".join(run.screen.covariates[v] for v in sorted(values))
            words.append(f"{name} was seen with {known}" + ", and has no effect of its own here"
                         * (not rows))
        if len(received) and not seen.all():
            words.append(f"{1 - seen.mean():.0%} of its cells have covariates unseen with {name}")
    return "; ".join(words)


def effects_of_data(run, conditions, value=0):
    """Effects of conditions on counts per 10,000 by all their cells in the context `value`, and
    standard errors: {name: (2, G)}, without those that the data do not have or cannot compare."""
    arms = Arms(run)
    cells = np.flatnonzero((contexts(run, run.screen) == value) & np.isin(
        run.screen.conditions, [*conditions, "control"]))
    means = mean_expression(run.batches, cells, arms)["counts"]
    share = arms.shares(means.n)
    found = np.stack([np.subtract(*arms.compared(means.mean, share)),
                      np.sqrt(np.add(*arms.compared(means.variance, share**2)))], axis=1)
    known = arms.have_some(share)
    return dict(zip(arms.names[known], found[known]))


def sample(run, conditions, n, library=0, basal=None, seed=0, other=None):
    """Write samples.h5ad: counts of n simulated cells of each condition, for scanpy and others.

    Cells are as in `population` (but for `library`, if given), each with a draw of (M, E) of its
    own. obs has the columns of the data's labels, spelled as there, and of its covariates.
    """
    screen, covariates = run.screen, run.config["covariate"] or []
    column = screen.label_column or data.free("condition", covariates)
    index = data.free("cell", [column, *covariates])
    labels = screen.obs(column) if screen.label_column else screen.conditions
    x, obs = [], {name: [] for name in (index, column, *covariates)}
    for d, name, value, label in in_contexts(run, conditions, other or screen):
        z_basal, _, c, libraries = population(
            run, name, n, basal or basal_of(run), seed, other, value)
        sizes = torch.as_tensor(np.full(n, library) if library else libraries,
                                dtype=torch.float32, device=run.device)
        for few in torch.arange(n).split(1000):
            log_rho = sample_frequencies(run.model, d, c[few], z_basal[few])
            counts = sample_counts(run.model, log_rho, sizes[few])
            x.append(counts.cpu().numpy().astype(np.uint32))
        same = np.flatnonzero(screen.conditions == name)
        obs[index] += [f"{label}-{i + 1}" for i in range(n)]
        obs[column] += [str(labels[same[0]]) if len(same) else name] * n
        for covariate, values in zip(covariates, c.T.tolist()):
            obs[covariate] += ["" if v == data.NONE else screen.covariates[v].split("=", 1)[1]
                               for v in values]
    data.write_h5ad(os.path.join(run.folder, "samples.h5ad"), X=np.concatenate(x), obs=obs,
                    var={"gene": screen.gene_names})


def write_latents(run):
    """Write latents.h5ad: the screen's cells and genes without counts, and latent states.

    obsm X_z_basal and X_z = z_basal + z_pert (N, L), posterior means, in the axes of the masks; all
    columns of obs, and sams_vae_condition and sams_vae_split; uns: perturbations, mask_probability,
    mask_support, effect = E[e_t] and offset = E[m_t * e_t] (T, L), where the model has them.
    """
    model, screen = run.model, run.screen
    basal, total = posterior_means(run, np.arange(len(screen.d)))
    columns = {name: functools.partial(screen.obs, name) for name in screen.file.obs_columns}
    split = np.full(len(screen.d), "", dtype=object)
    for name, cells in run.split.items():
        split[cells] = name
    obs = {data.free("cell", columns): screen.cell_names, **columns,
           data.free("sams_vae_condition", columns): screen.conditions,
           data.free("sams_vae_split", columns): split}
    uns = {"perturbations": list(run.model_screen.perturbations)}
    if model.has_effects:
        probability, uns["offset"] = probability_and_offset(model)
        uns["effect"] = drawn_effects(model)[1].mean(0).numpy(force=True)
        uns |= {"mask_probability": probability} if model.has_mask else {}
        uns |= {} if run.support is None else {"mask_support": run.support.numpy()}
    data.write_h5ad(os.path.join(run.folder, "latents.h5ad"), X=None, obs=obs, uns=uns,
                    var={"gene": screen.gene_names}, obsm={"X_z_basal": basal, "X_z": total})


# ============================================================================================
# Figures (matplotlib is imported here only)
# ============================================================================================


@contextlib.contextmanager
def panels(path, title, n, size):
    """A figure and its n panels, side by side, to draw on; then a PNG file, whole or not at all."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    yield figure, figure.subplots(1, n)
    figure.suptitle(title)
    with data.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def heat_map(figure, axis, values, limit, title, **names):
    """Values (y, x), from -limit, blue, or 0, white, to limit; y and x name rows and columns where
    there is room for names."""
    signed = values.min() < 0
    image = axis.imshow(values, aspect="auto", cmap="RdBu_r" if signed else "Greys",
                        vmin=-limit * signed, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=axis, shrink=0.5)
    axis.set_title(title)
    for side, of_side in names.items():
        ticks = range(len(of_side)) if len(of_side) <= 60 else []
        axis.set(**{f"{side}ticks": ticks, f"{side}ticklabels": [of_side[i] for i in ticks]})
        axis.tick_params(side, labelsize=6, rotation=90 * (side == "x"))


def in_order_of_angle(matrix):
    """An order of the rows, neighbours alike: by angle in the first two principal components."""
    u, s, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    first, second = np.pad(u * s, ((0, 0), (0, 1)))[:, :2].T
    return np.argsort(np.arctan2(second, first), kind="stable")


def figure_of_training(run):
    """Loss, KL terms and masks over the steps of log.jsonl, without those of other warm starts; a
    line at the step of best.pt."""
    progress, path = run.progress, os.path.join(run.folder, "training.png")
    log, step = train.read_log(run.folder), progress.step
    log = [line for line in log if line.get("phase", 0) in (progress.start, progress.phase)]
    with panels(path, os.path.basename(run.folder), 4, (15, 3)) as (_, axes):
        for axis, names in zip(axes, (("loss", "validation_loss"), (
                "kl_basal", "kl_mask", "kl_effect"), ("mask_probability",), ("mask_size",))):
            for name in names:
                lines = [line for line in log if name in line]
                axis.plot([line["step"] for line in lines], [line[name] for line in lines],
                          label=name.replace("_", " "))
            axis.set_xlabel(f"step (line: the best, {step:,})")
            axis.legend(frameon=False)
            axis.axvline(step, color="0.6", linewidth=0.8)
        losses = [line["loss"] for line in log]
        if losses:  # the first ones would hide the others
            axes[0].set_ylim(min(losses) - 1, np.quantile(losses, 0.95) + 1)
        axes[1].set_yscale("symlog", linthresh=0.01)
    return path


def figure_of_masks(run, pathways=None):
    """Figure 2: mask probabilities and mean offsets of perturbations, ordered by pathway; with
    turned axes also the offsets as encoder and decoder see them."""
    model, names = run.model, np.array(run.model_screen.perturbations)
    probability, offset = probability_and_offset(model)
    pathway = pathway_of(names, data.read_pathways(pathways or run.config["data"]))
    rows = in_order_of_angle(offset)
    rows = rows[np.argsort(pathway[rows], kind="stable")]
    # Latents have no order of their own. Each stands where its offsets stand, in the mean, so that
    # masks that follow pathways show as blocks along the diagonal.
    size = np.abs(offset[rows])
    latents = np.argsort(np.arange(len(rows)) @ size / np.maximum(size.sum(0), 1e-30))
    limit = max(1e-6, np.quantile(size, 0.99))
    title = "mask probability"
    if run.support is not None:  # the more warm starts have an entry, the darker it is
        title, probability = f"{title} x support", probability * run.support.numpy()
    shown = [(title, probability, 1, latents)] * model.has_mask + [
        ("mean offset E[m e]", offset, limit, latents),
        ("offset in the networks' axes", offset @ model.axes.numpy(force=True).T, limit,
         np.arange(model.n_latent))]
    path = os.path.join(run.folder, "masks.png")
    with panels(path, os.path.basename(run.folder), len(shown), (5 * len(shown), 9)) as (
            figure, axes):
        groups, first = np.unique(pathway[rows], return_index=True)
        for axis, (title, values, limit, which) in zip(axes, shown):
            heat_map(figure, axis, values[rows][:, which], limit, title, y=names[rows], x=which)
            axis.set_xlabel("latent dimension")
            for start in first[1:]:
                axis.axhline(start - 0.5, color="0.3", linewidth=0.5)
        if len(groups) > 1:
            axes[0].set_yticks((first + [*first[1:], len(rows)]) / 2, [
                group or "no pathway" for group in groups])
    return path


def figure_of_effects(run, metrics):
    """Figure 3: effects by the data and by the model, as heat maps of the 60 genes of largest
    effect by the data, and of all genes as a density of points."""
    layers = data.read_layers(os.path.join(run.folder, "effects.h5ad"))
    kept = np.isfinite(layers["data_log_normalised"]).all(1)
    observed, predicted = (layers[f"{name}_log_normalised"][kept] for name in ("data", "model"))
    rows, genes = in_order_of_angle(observed), np.argsort(-np.abs(observed).mean(0))[:60]
    genes = genes[in_order_of_angle(observed[:, genes].T)]
    limit = max(1e-6, np.quantile(np.abs(observed[:, genes]), 0.99))
    path = os.path.join(run.folder, "effects.png")
    title = (f"{os.path.basename(run.folder)}: log-normalised effects, data: "
             f"{metrics['options']['effects_from']} cells")
    with panels(path, title, 3, (18, 8)) as (figure, axes):
        for axis, values, by in zip(axes, (observed, predicted), ("data", "model")):
            heat_map(figure, axis, values[rows][:, genes], limit, f"effects by the {by}",
                     y=Arms(run).names[kept][rows], x=run.screen.gene_names[genes])
        axes[2].hexbin(observed.ravel(), predicted.ravel(), gridsize=70, bins="log", mincnt=1)
        axes[2].axline((0, 0), slope=1, color="C3", linewidth=0.8)
        axes[2].set(xlabel="effect by the data", ylabel="effect by the model", aspect="equal",
                    title=f"all genes: Pearson r = {pearson(predicted, observed):.3f}",
                    adjustable="datalim")
    return path


def figures_of_combinations(runs, folder):
    """Figure 4: relative IWELBO and ATE-Pearson of the Norman runs over f, mean and sd over splits.

    One file for each table of the runs. Returns their paths.
    """
    paths = []
    for members in tables_of(runs):
        split, reference = members[0]["config"]["split"], [m for m in members if of_reference(m)]
        if split == "random":
            continue
        found = {}, {}  # of each panel {(row, f): values}
        for m in members:
            place = ", ".join(model_and_guide(m["config"])), m["config"]["train_combinations"]
            found[0].setdefault(place, []).append(iwelbo_difference([m], reference)[0])
            found[1].setdefault(place, []).append(
                score(m, "log_normalised", "test", "model").get("pearson"))
        for row, m in itertools.product(("perturbed_mean", "additive"), one_of_each_split(members)):
            place = BASELINES[row], m["config"]["train_combinations"]
            found[1].setdefault(place, []).append(
                score(m, "log_normalised", "test", row).get("pearson"))
        paths.append(os.path.join(folder, split + f"-{len(paths) + 1}" * bool(paths) + ".png"))
        with panels(paths[-1], split, 2, (12, 4)) as (figure, axes):
            for axis, title, values in zip(axes, (
                    "test IWELBO relative to SAMS-VAE (correlated), f = 0",
                    "ATE-Pearson, test conditions"), found):
                rows, fractions = (list(dict.fromkeys(v)) for v in zip(*values))
                for i, row in enumerate(rows):
                    bars = [np.array(values.get((row, f), [math.nan]), float) for f in fractions]
                    axis.bar(np.arange(len(bars)) + 0.85 * ((i + 0.5) / len(rows) - 0.5),
                             [v.mean() for v in bars], 0.8 / len(rows), capsize=2, label=row,
                             yerr=[v.std(ddof=1) if len(v) > 1 else 0 for v in bars])
                axis.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
                axis.set(xlabel="fraction f of training combinations", title=title)
            figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return paths


# ============================================================================================
# The command line
# ============================================================================================


def parse_arguments(arguments=None):
    """The arguments, and the options of an evaluation that they give, a dict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+", type=os.path.normpath)
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
    return args, {name: value for name, value in vars(args).items() if name in DEFAULTS}


def main(arguments=None):
    """Evaluate or use runs."""
    args, options = parse_arguments(arguments)
    if args.figures and not importlib.util.find_spec("matplotlib"):
        raise DataError("--figures needs matplotlib: pip install matplotlib")
    found, failed = [], False
    for folder in args.runs:
        if len(args.runs) > 1 and not os.path.isfile(os.path.join(folder, "best.pt")):
            print(f"{folder}: passed over, it has no best.pt")  # runs/* has figures, too
            continue
        try:
            if args.predict or args.latents:
                use_run(folder, args, DEFAULTS | options)
            else:
                found.append(evaluate_run(folder, args, options))
        except DataError as error:  # of several runs, the others go on
            if len(args.runs) == 1:
                raise
            print(f"error: {folder}: {error}", file=sys.stderr)
            failed = True
    if len(found) > 1:
        print(f"\n{table_of_runs(found, args.scale)}")
        warned = [m["folder"] for m in found if m["warnings"]]
        if warned:
            print("\nwith warnings, which python evaluate.py runs/NAME shows: " + ", ".join(warned))
    if args.figures and found:
        for path in figures_of_combinations(found, os.path.dirname(found[0]["folder"]) or "."):
            print(f"written: {path}")
    if failed:
        sys.exit(2)


def evaluate_run(folder, args, options):
    """Evaluate one run unless that was done before, and draw its figures. Returns its metrics."""
    stored = None if args.again else evaluated(folder, options)
    run = open_run(folder, args.device, args.data) if (
        not stored or args.figures or args.data) else None
    metrics = stored or evaluate(run, **options)
    if not stored or len(args.runs) == 1:
        print(f"\n{folder}\n{table(metrics, args.scale)}\n\nmore in {folder}: metrics.json, "
              "effects.h5ad, top_genes.csv")
    if args.figures:
        figures = [figure_of_training(run), figure_of_effects(run, metrics)]
        if run.model.has_effects:
            figures.append(figure_of_masks(run, metrics["options"]["pathways"]))
        print("written: " + ", ".join(figures))
    return metrics | {"folder": folder}


def use_run(folder, args, options):
    """--predict and --latents of one run."""
    own_data, other = train.load_checkpoint(folder, "last.pt")["config"]["data"], None
    is_other = args.predict and args.data and os.path.exists(own_data) and (
        os.path.realpath(args.data) != os.path.realpath(own_data))
    run = open_run(folder, args.device, None if is_other else args.data)
    if is_other:
        other = controls_of_file(run, args.data)
        print(f"of the {len(other.d):,} control cells of {args.data}:")
    how = {"library": options["library"], "basal": options["basal"], "other": other,
           "seed": options["evaluation_seed"]}
    if args.predict:
        print(predict(run, args.predict, options["ate_particles"], **how))
        print(f"\nwritten: {folder}/predictions.h5ad")
    if args.predict and args.sample:
        sample(run, args.predict, args.sample, **how)
        print(f"written: {folder}/samples.h5ad")
    if args.latents:
        write_latents(run)
        print(f"written: {folder}/latents.h5ad")


if __name__ == "__main__":
    data.run(main)
