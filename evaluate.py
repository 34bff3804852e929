"""Evaluate and use trained runs: likelihood, treatment effects, masks, tables, figures.

    python evaluate.py runs/NAME                          one run
    python evaluate.py runs/*                             a table: models and guides, over seeds
    python evaluate.py runs/NAME --ate-particles 10000    as in the paper's Table 1
    python evaluate.py runs/NAME --figures                PNG files (needs matplotlib)
    python evaluate.py runs/NAME --predict "A+B" C        what these perturbations would do
    python evaluate.py runs/NAME --latents                latent states of all cells, for scanpy

Writes, beside the checkpoint, metrics.json and effects.h5ad (condition x gene effects of the model
and of the data). In reading order: one function a metric; what the data say, and baselines; a run
and its three evaluations; tables; use of a trained model; figures; the command line.

A condition is a set of perturbations that some cell received; C conditions beside the control, G
genes. "Effect" means average treatment effect (3.2), a difference from control, (C, G); the latent
e_t of eq. 1 is called `effect` where it is drawn, as in sams_vae.py.
"""

import argparse
import contextlib
import ctypes
import difflib
import itertools
import json
import math
import os
import sys

# Two settings of the machine that a CPU needs for speed, the first before torch is imported: how
# many turns its threads (GNU OpenMP) spin while they wait for each other, before they sleep. The
# default is fast alone and slow beside another program, no turns the reverse.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# And: glibc returns freed arrays to the system, which fills the next ones with zeros, page by page.
# Ask it to keep them: M_MMAP_MAX is -4 (no arrays outside of the heap), M_TRIM_THRESHOLD is -1.
with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries: no mallopt
    for parameter, value in ((-4, 0), (-1, -1)):
        ctypes.CDLL(None).mallopt(parameter, value)

import numpy as np
import torch

import data
from data import DataError
from sams_vae import MODELS, draws_for, expected_expression, iwelbo, sum_effects

FORMAT = 4  # of metrics.json; a file of another format is not read
SCALES = ("log_normalised", "counts")
BASELINES = {"no_change": "no change", "perturbed_mean": "perturbed mean", "additive": "additive"}


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


def pearson_per_condition(a, b):
    """Pearson correlation over genes of each row, averaged over the rows where it is defined."""
    values = [r for r in map(pearson, a, b) if not math.isnan(r)]
    return float(np.mean(values)) if values else math.nan


def r_squared(predicted, observed):
    """1 - sum (observed - predicted)^2 / sum (observed - mean observed)^2, over all entries."""
    total = float(((observed - np.mean(observed)) ** 2).sum()) if np.size(observed) else 0.0
    return 1 - float(((observed - predicted) ** 2).sum()) / total if total > 0 else math.nan


def discrimination_scores(predicted, observed, device="cpu"):
    """How well each predicted effect is told from those of the others: 1 - normalised rank, (C,).

    For each of C conditions, all predicted effects (C, G) are ranked by their L1 distance to its
    observed one. The rank of its own, from 0 (nearest) to C - 1, ties at half, is divided by C - 1.
    The score is one minus that: 1 is perfect, 1/2 is chance and what a constant prediction gets.
    """
    predicted, observed = (torch.as_tensor(v, dtype=torch.float32, device=device)
                           for v in (predicted, observed))
    ranks = [torch.empty(0, device=device)]
    for i in torch.arange(len(observed)).split(256):
        distance = torch.cdist(observed[i], predicted, p=1)  # (256, C)
        own = distance.gather(1, i[:, None].to(device))
        ranks.append((distance < own).sum(1) + 0.5 * ((distance == own).sum(1) - 1))
    with np.errstate(invalid="ignore"):  # a single condition has no rank: 0 / 0 is NaN
        return 1 - torch.cat(ranks).cpu().numpy() / np.float64(len(observed) - 1)


def effect_metrics(predicted, observed, predicted_from_mean, observed_from_mean):
    """All metrics but discrimination of predicted against observed effects, (C, G) each: a dict.

    The names that end in _top20 are restricted to the 20 genes of largest absolute observed effect
    of each condition. pearson_from_perturbed_mean is Pearson's r of the last two arguments, (C, G):
    predicted and observed means minus the mean over training conditions (see `baseline_effects`),
    in place of the control. It is without the shift that all perturbations share, which makes
    trivial predictions look good, and without the noise of the controls.
    """
    predicted, observed = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    # The genes are chosen by the data, the same for every prediction.
    top = np.argsort(-np.abs(observed), axis=1, kind="stable")[:, :20]
    a, b = (np.take_along_axis(v, top, axis=1) for v in (predicted, observed))
    return {
        "n_conditions": len(observed),
        "pearson": pearson(predicted, observed),
        "pearson_per_condition": pearson_per_condition(predicted, observed),
        "r_squared": r_squared(predicted, observed),
        "pearson_top20": pearson(a, b),
        "pearson_per_condition_top20": pearson_per_condition(a, b),
        "r_squared_top20": r_squared(a, b),
        "pearson_from_perturbed_mean": pearson(predicted_from_mean, observed_from_mean),
        "rmse": math.sqrt(((predicted - observed) ** 2).mean()) if len(observed) else math.nan,
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
    c = np.zeros((len(screen.d), 0), int) if screen.c is None else screen.c
    if not c.shape[1]:
        return c[:1], np.zeros(len(c), int)
    strata, stratum = np.unique(c, axis=0, return_inverse=True)
    return strata, stratum.reshape(-1)


def mean_expression(batches, cells, group, n_groups):
    """Mean expression of groups of cells, on both scales, for cells of a library of 10,000.

    cells (n,) positions, group (n,) their groups. Returns {scale: (n_groups, G)} and the number of
    cells of each group (n_groups,). counts: 1e4 x / sum x. log_normalised: log2(1 + 1e4 x / sum x).
    A group without cells has NaN. (3.2 compares means of x, the counts; the second scale and its
    logarithm to base 2 are what the authors' code takes for Table 1.)
    """
    n_cells = np.bincount(group, minlength=n_groups)
    total = {scale: torch.zeros(n_groups, batches.n_genes, dtype=torch.float64,
                                device=batches.device) for scale in SCALES}
    parts = torch.from_numpy(group).to(batches.device).split(512)
    for (x, *_), part in zip(batches.in_order(cells), parts):
        per_10k = 1e4 * x / x.sum(-1, keepdim=True)  # (512, G)
        total["counts"].index_add_(0, part, per_10k.double())
        total["log_normalised"].index_add_(0, part, torch.log2(1 + per_10k).double())
    with np.errstate(invalid="ignore"):
        return {scale: t.cpu().numpy() / n_cells[:, None] for scale, t in total.items()}, n_cells


def within_strata(mean, n_cells):
    """Means of conditions, and of the control cells that each is compared with.

    mean (C + 1, S, G), n_cells (C + 1, S), by condition, the control last, and covariates. A
    condition is compared with control cells of the same covariates: averages over the S sets of
    values that have both, weighted by the condition's cells. Returns both, (C, G) each, and the
    weights (C, S). NaN for a condition that can be compared nowhere, whose weights are zero.
    """
    n = n_cells[:-1] * (n_cells[-1] > 0)
    total = n.sum(1, keepdims=True)
    weight = n / np.maximum(total, 1)
    condition = np.einsum("cs,csg->cg", weight, np.nan_to_num(mean[:-1]))
    control = weight @ np.nan_to_num(mean[-1])
    nowhere = np.where(total > 0, 0.0, np.nan)
    return condition + nowhere, control + nowhere, weight


def baseline_effects(effect, dosages):
    """Effects that need no model, from those of training cells on one scale (three baselines).

    effect (C, G), NaN for conditions without training cells; dosages (C, P). Returns a dict of
    (C, G):

        no_change       0: the prediction is the control
        perturbed_mean  the mean over training conditions of their effects, for every condition
        additive        sum over the condition's perturbations g of the effect of cells with g
                        alone; 0 for a g that no training cell has alone
    """
    seen = np.isfinite(effect).all(1)
    effect = np.where(seen[:, None], effect, 0.0)
    alone = np.zeros((int(dosages.max()) + 2, effect.shape[1]))  # the last row: NONE adds nothing
    is_single = (dosages != data.NONE).sum(1) == 1
    alone[dosages[is_single].max(1)] = effect[is_single]
    perturbed_mean = effect[seen].mean(0) if seen.any() else np.zeros(effect.shape[1])
    return {"no_change": np.zeros_like(effect),
            "perturbed_mean": np.broadcast_to(perturbed_mean, effect.shape),
            "additive": alone[dosages].sum(1)}


def split_halves(cells, group, seed=0):
    """One random half of the cells of each group, and the other half ("ceiling").

    How well do the effects of so many cells agree with those of as many others? A prediction is no
    worse for exceeding that: both halves are noisy here, and only one side is where a prediction
    is compared. cells (n,) positions, group (N,) of all cells.
    """
    chosen = np.random.default_rng(seed).permutation(cells)
    chosen = chosen[np.argsort(group[chosen], kind="stable")]
    # The cells of a group stand together now, in random order: every other one.
    _, start, n = np.unique(group[chosen], return_index=True, return_counts=True)
    number = np.arange(len(chosen)) - np.repeat(start, n)  # 0, 1, ... within the group
    return chosen[number % 2 == 0], chosen[number % 2 == 1]


# ============================================================================================
# A run, as a folder holds it
# ============================================================================================


def save_checkpoint(state, folder, name):
    """Write runs/NAME/best.pt or last.pt, whole or not at all. See `new_run` in train.py."""
    with data.replacing(os.path.join(folder, name)) as path:
        torch.save(state, path)


def load_checkpoint(folder, name):
    """Read runs/NAME/best.pt or last.pt. Nothing in it is unpickled into code.

    Raises DataError where it is missing, damaged, or no checkpoint."""
    path = os.path.join(folder, name)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        if name == "best.pt" and os.path.exists(os.path.join(folder, "last.pt")):
            raise DataError(f"{folder} has no best.pt yet, which validations write (with --axes "
                            "sparsest, once there are masks): go on with python train.py "
                            f"--resume {folder}, or start a new run if its loss was not finite"
                            ) from None
        raise DataError(f"{path}: no such file; a run is a folder, runs/NAME, that train.py made, "
                        "and this one has no checkpoint to go on from") from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file; a run is a folder, runs/NAME") from None
    except Exception as error:  # damaged files raise a dozen kinds of exception
        raise DataError(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "min_cells" not in checkpoint.get("config", {}):
        raise DataError(f"{path}: is no checkpoint of this version of train.py")
    return checkpoint


def build_model(checkpoint):
    """The model of a checkpoint, with its weights, on the CPU."""
    model = MODELS[checkpoint["config"]["model"]](**checkpoint["model_arguments"])
    model.load_state_dict(checkpoint["model"])
    return model


def read_screen_of(config, checkpoint=None):
    """The screen of a configuration; with a checkpoint, checked to be the one it was trained on."""
    screen = data.read_screen(config["data"], **{k: config[k] for k in data.SCREEN_OPTIONS})
    if checkpoint is not None and checkpoint["fingerprint"] != screen.fingerprint():
        raise DataError(f"{config['data']}: other cells, genes or labels, or another order, than "
                        "the run was trained on; it needs the same file, and --data says where")
    return screen


def as_the_model_sees(screen, model):
    """A model that adds no effects up (SVAE+) knows labels: each combination is one of its own."""
    return screen if MODELS[model].adds_effects else data.one_label_per_cell(screen)


def read_log(folder):
    """The lines of log.jsonl as dicts; a last line that was cut off does not count."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as file:
            return [json.loads(line) for line in file if line.endswith("}\n")]
    except FileNotFoundError:
        return []


def choose_device(name=None):
    """The device of that name, or a GPU if there is one, or the CPU. Raises DataError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise DataError(f"--device {name}: only cpu and cuda have all that is needed")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


class Run:
    """A trained run: its configuration, its screen on the device, and the model of best.pt.

    screen is the file's; model_screen is that as the model sees it (`as_the_model_sees`)."""

    def __init__(self, folder, device=None, data_path=None):
        self.folder, self.device = folder, choose_device(device)
        self.checkpoint, last = (load_checkpoint(folder, name) for name in ("best.pt", "last.pt"))
        self.last_step, self.done = last["step"], last["done"]
        self.config = last["config"] | ({"data": data_path} if data_path else {})
        if not os.path.exists(self.config["data"]):
            raise DataError(f"{folder}: its data, {self.config['data']}, are not there; --data "
                            "says where they are")
        self.screen = read_screen_of(self.config, self.checkpoint)
        self.model_screen = as_the_model_sees(self.screen, self.config["model"])
        self.batches = data.Batches(self.model_screen, self.device)
        self.model = build_model(self.checkpoint).to(self.device)
        self.split = {name: cells.numpy() for name, cells in self.checkpoint["split"].items()}

    def write(self, name, **contents):
        """Write an .h5ad file into the run's folder."""
        data.write_h5ad(os.path.join(self.folder, name), **contents)


# ============================================================================================
# Its evaluation: likelihood, effects, masks
# ============================================================================================

AT_LEAST_0 = (0, 2**32 - 1, "at least 0 and below 2^32")  # least, largest, the same in words
AT_LEAST_1 = (1, 2**32 - 1, "at least 1 and below 2^32")
OPTIONS = [  # name, default, what is allowed, what it is and where the default comes from
    ("--iwelbo-particles", 100, AT_LEAST_1, "K of 3.1 (paper: 100, for Norman)"),
    ("--ate-particles", 2500, AT_LEAST_1, "K of 3.2 (paper: Replogle 10,000, Norman 2,500)"),
    ("--library", 10_000, AT_LEAST_1, "total counts of simulated cells (authors' code: 10,000; for "
     "a file without --preset, the median of its cells)"),
    ("--effects-from", "all", ["all", "test"], "cells that data effects are taken from (the paper "
     "does not say; authors' code for Table 1: all; for a file without --preset: test)"),
    ("--evaluation-seed", 0, AT_LEAST_0, "of IWELBO and effects (ours)"),
]


def evaluate(run, iwelbo_particles=100, ate_particles=2500, library=None,
             effects_from=None, evaluation_seed=0, pathways=None):
    """Evaluate a Run: write metrics.json and effects.h5ad, return the metrics.

    The arguments are OPTIONS; pathways is a file for data.read_pathways, by default the data. NaN
    is written as null.
    """
    library = library or library_of(run)
    effects_from = effects_from or ("test" if run.config["preset"] is None else "all")
    options = {"iwelbo_particles": iwelbo_particles, "ate_particles": ate_particles,
               "library": library, "effects_from": effects_from,
               "evaluation_seed": evaluation_seed, "pathways": pathways}
    known_pathways = load_pathways(run, pathways)  # before the long part: the file may be wrong
    torch.manual_seed(evaluation_seed)
    metrics = {"format": FORMAT, "config": run.config, "fingerprint": run.checkpoint["fingerprint"],
               "step": run.checkpoint["step"], "last_step": run.last_step, "done": run.done,
               "validation_loss": run.checkpoint["best"], "options": options}
    metrics |= likelihood(run, iwelbo_particles)
    metrics |= effects(run, ate_particles, library, effects_from)
    metrics |= masks(run, known_pathways)
    metrics = without_nan(metrics)
    with data.replacing(os.path.join(run.folder, "metrics.json")) as path, open(path, "w") as file:
        json.dump(metrics, file, indent=2)
    return metrics


def library_of(run):
    """Total counts of simulated cells: 10,000, as in the authors' code, or for a file without a
    preset the median of its cells, so that logarithms of model and data are alike."""
    if run.config["preset"] is not None:
        return 10_000
    return int(np.median(run.screen.counts.library()))


def likelihood(run, n_particles):
    """Marginal likelihood of the test cells (3.1): both IWELBOs, in nats."""
    predictive, joint, effective_sample_size = iwelbo(
        run.model, run.batches.in_order(run.split["test"]), n_particles)
    n = len(predictive)
    return {"iwelbo": predictive.double().mean().item(),
            "iwelbo_se": predictive.double().std().item() / math.sqrt(n) if n > 1 else math.nan,
            "n_test_cells": n, "iwelbo_joint_total": joint, "iwelbo_joint_per_cell": joint / n,
            "iwelbo_joint_effective_sample_size": effective_sample_size}


def effects(run, n_particles, library, effects_from):
    """Average treatment effects of all conditions (3.2), by the model, the baselines and the data.

    Writes effects.h5ad. Returns metrics, of which ["effects"][scale][group][prediction] is what
    `effect_metrics` says of a prediction (the model, a baseline, or the ceiling: one half of the
    test cells predicts the other) over a group of conditions: all, pairs, held_out (no training
    cells), or those with cells in train, validation and test.
    """
    screen, split = run.screen, run.split
    names, first, group = conditions_of(screen)
    n_conditions, dosages = len(names), screen.d[first]  # (C, P)
    strata, stratum = strata_of(screen)
    # Cells by condition, the last being the control, and covariates.
    shape, group_of_cell = (n_conditions + 1, len(strata)), group * len(strata) + stratum

    def means(cells):
        """{scale: mean expression of these cells (C + 1, S, G)}, and their number (C + 1, S)."""
        mean, n = mean_expression(run.batches, cells, group_of_cell[cells], math.prod(shape))
        return {scale: m.reshape(*shape, -1) for scale, m in mean.items()}, n.reshape(shape)

    # By the data. The Norman splits have no controls among their test cells: then all controls
    # are taken.
    test = split["test"]
    controls = test[group[test] == n_conditions]
    if len(controls) < 2:
        controls = np.flatnonzero(group == n_conditions)
    test = np.union1d(test, controls)
    observed, n_cells = means(np.arange(len(group)) if effects_from == "all" else test)
    trained, n_train = means(split["train"])
    halves = [means(half) for half in split_halves(test, group_of_cell)]

    # By the model, which has its own dosages of a condition (SVAE+ knows labels).
    _, _, weight = within_strata(observed["counts"], n_cells)
    of_all_cells = np.bincount(group_of_cell, minlength=math.prod(shape)).reshape(shape)[:-1]
    of_all_cells = of_all_cells / of_all_cells.sum(1, keepdims=True)
    of_conditions, of_controls = expected_of_conditions(
        run, torch.from_numpy(run.model_screen.d[first]),
        np.where(weight.any(1, keepdims=True), weight, of_all_cells), n_particles, library)

    # Groups of conditions. Those without cells to take data effects from are in none.
    known, n_perturbed = weight.any(1), (dosages != data.NONE).sum(1)
    n_cells_of, n_train_of = n_cells[:-1].sum(1), n_train[:-1].sum(1)
    groups = {"all": known, "pairs": known & (n_perturbed == 2),
              "held_out": known & (n_train_of == 0)}
    for part, part_cells in split.items():
        groups[part] = known & np.isin(np.arange(n_conditions), group[part_cells])

    metrics = {"n_conditions": {name: int(chosen.sum()) for name, chosen in groups.items()},
               "effects": {}}
    layers = {}
    for scale in SCALES:
        mean_of_data, control_of_data, _ = within_strata(observed[scale], n_cells)
        effects_of_data = mean_of_data - control_of_data
        in_unit = 1e4 / library if scale == "counts" else 1  # the unit of the data's
        predictions = {"model": in_unit * (of_conditions[scale] - of_controls[scale])}
        mean_of_training, control_of_training, _ = within_strata(trained[scale], n_train)
        predictions |= baseline_effects(mean_of_training - control_of_training, dosages)
        layers |= {f"model_{scale}": predictions["model"], f"data_{scale}": effects_of_data}
        # The other reference: not the control, but what training conditions have in common.
        shared = predictions["perturbed_mean"]
        reference = shared + weight @ np.nan_to_num(np.where(
            n_train[-1, :, None] > 0, trained[scale][-1], observed[scale][-1]))
        scores = {name: scores_by_group(groups, run.device, predicted, effects_of_data,
                                        predicted - shared, mean_of_data - reference)
                  for name, predicted in predictions.items()}
        (a, control_a, _), (b, control_b, _) = (within_strata(half[scale], n) for half, n in halves)
        scores["ceiling"] = scores_by_group(groups, run.device, a - control_a, b - control_b,
                                            a - reference, b - reference)
        metrics["effects"][scale] = {name: {row: scores[row][name] for row in scores}
                                     for name in groups}
        # The most wanted of these once more, under flat names.
        for name, suffix in (("all", ""), ("pairs", "_pairs"), ("held_out", "_held_out")):
            for row, of_groups in scores.items():
                prefix = "" if row == "model" else f"{row}_"
                metrics[f"{prefix}ate_pearson_{scale}{suffix}"] = of_groups[name]["pearson"]
    run.write("effects.h5ad", X=layers["model_log_normalised"].astype(np.float32),
              obs={"condition": names.astype(object), "n_cells": n_cells_of,
                   "n_training_cells": n_train_of, "n_perturbations": n_perturbed},
              var={"gene": screen.gene_names},
              layers={k: v.astype(np.float32) for k, v in layers.items()},
              uns={"effects_from": effects_from, "library": library})
    return metrics


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
    c = None if run.screen.c is None else torch.from_numpy(strata[rows]).to(run.device)
    expected = expected_expression(run.model, arms, n_particles, library, c=c)
    results = []
    for arm in (len(strata) + np.arange(len(condition)), stratum):
        results.append({})
        for scale in SCALES:
            y = expected[scale].cpu().numpy()[arm] * weight[condition, stratum, None]
            total = np.zeros((len(dosages), y.shape[1]))
            np.add.at(total, condition, y)
            results[-1][scale] = total
    return results


def scores_by_group(groups, device, predicted, observed, *from_mean):
    """{group: metrics} of predicted against observed effects and of `from_mean`, (C, G) each: see
    `effect_metrics`. Conditions whose observed effects are NaN, having no cells, are left out;
    discrimination ranks all others, whatever their group."""
    known = np.isfinite(observed).all(1)
    discrimination = np.full(len(known), math.nan)
    discrimination[known] = discrimination_scores(predicted[known], observed[known], device)
    metrics = {}
    for name, chosen in groups.items():
        chosen = chosen & known
        metrics[name] = effect_metrics(predicted[chosen], observed[chosen],
                                       *(v[chosen] for v in from_mean))
        metrics[name]["discrimination"] = (float(discrimination[chosen].mean()) if chosen.any()
                                           else math.nan)
    return metrics


def masks(run, pathways):
    """The mean mask probability of perturbations with training cells, `mask_recovery` where the
    screen is simulated, `mask_pathway_accuracy` where there are pathways (10 annotated
    perturbations or more). Empty for models without masks."""
    if not run.model.has_mask:
        return {}
    names = run.model_screen.perturbations
    probability = run.model.mask_probability().numpy(force=True)
    trained = run.model.n_cells.numpy(force=True) > 0
    metrics = {"mask_mean_probability": float(probability[trained].mean()),
               "mask": [" ".join(map(str, np.flatnonzero(row))) for row in probability > 0.5]}
    truth = data.read_simulation(run.config["data"])
    row = {name: t for t, name in enumerate(truth[0])} if truth is not None else {}
    if row.keys() >= set(names):
        metrics |= mask_recovery(truth[1][[row[name] for name in names]], probability)
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
    """The value with null in place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


# ============================================================================================
# Tables
# ============================================================================================

COLUMNS = [("pearson", "ATE-Pearson"), ("pearson_per_condition", "per condition"),
           ("pearson_top20", "top 20 genes"), ("r_squared", "R2"),
           ("pearson_from_perturbed_mean", "from perturbed mean"), ("rmse", "RMSE"),
           ("discrimination", "discrimination")]


def markdown(header, rows):
    """A Markdown table that is aligned in a terminal, too."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def in_words(values, digits=3):
    """Text of a number, of several as mean ± sd; "-" for one that is undefined."""
    values = [v for v in np.atleast_1d(np.array(values, float)) if not math.isnan(v)]
    text = f"{np.mean(values):.{digits}f}" if values else "-"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def options_line(options):
    """How the numbers below were made."""
    return (f"(IWELBO with {options['iwelbo_particles']:,} particles; effects with "
            f"{options['ate_particles']:,} particles, cells of {options['library']:,} counts, by "
            f"the data in {options['effects_from']} cells)")


def guide_of(config):
    """The name of a run's guide in Table 1."""
    correlated = [name for name, on in (("z_basal", config["correlated_basal"]),
                                        ("E", config["correlated_effects"])) if on]
    return "corr. " + " and ".join(correlated) if correlated else "mean-field"


def model_of(config):
    """A run's model in the rows of a table."""
    return config["model"] + (", sparsest axes" if config["axes"] == "sparsest" else "")


def table(metrics):
    """The metrics of one run as text: likelihood, masks, effects beside baselines."""
    m = metrics
    lines = [options_line(m["options"]),
             f"test IWELBO, predictive: {in_words(m['iwelbo'], 2)} per cell, standard "
             f"error {in_words(m['iwelbo_se'], 2)} ({m['n_test_cells']:,} cells)",
             f"test IWELBO, joint:      {in_words(m['iwelbo_joint_per_cell'], 2)} per cell, "
             f"{m['iwelbo_joint_total']:,.1f} in all, effective sample size "
             f"{m['iwelbo_joint_effective_sample_size']:.2f}"]
    if m.get("mask_mean_probability", 0) > 0.45:
        lines.append(f"mask: mean probability {m['mask_mean_probability']:.3f}, where training "
                     "starts at 0.5: effects mean little yet (more --steps, or a higher --lr)")
    if "mask_f1" in m:
        lines.append(f"mask: precision {m['mask_precision']:.3f}, recall {m['mask_recall']:.3f}, "
                     f"F1 {m['mask_f1']:.3f}")
    if "mask_pathway_accuracy" in m:
        lines.append(f"mask pathway accuracy: {m['mask_pathway_accuracy']:.3f}, sd over splits "
                     f"{m['mask_pathway_accuracy_sd']:.3f} ({m['n_annotated']:,} annotated; the "
                     f"commonest pathway for all: {m['mask_pathway_chance']:.3f})")
    rows = []
    for scale in SCALES:
        for group, words in (("all", "all"), ("pairs", "pairs"),
                             ("held_out", "held out of training")):
            title = f"{scale.replace('_', '-')}, {words} ({m['n_conditions'][group]:,})"
            for row, label in {"model": f"**{m['config']['model']}**", **BASELINES,
                               "ceiling": "ceiling"}.items():
                scores = m["effects"][scale][group][row]
                label += f" ({scores['n_conditions']:,})" if row == "ceiling" else ""
                if m["n_conditions"][group]:
                    rows.append([title if row == "model" else "", label,
                                 *(in_words(scores[column]) for column, _ in COLUMNS)])
    return "\n".join([*lines, "", markdown(["effects of conditions", "predicted by",
                                            *(title for _, title in COLUMNS)], rows)])


SEEDS = ("seed", "split_seed", "simulated_seed")  # a row of a table is a mean over these
ROW = ("model", "axes", "correlated_basal", "correlated_effects", "train_combinations")  # its rows
NO_MATTER = ("data", "name", "preset", "compile", "log_every", "validate_every")


def settings(metrics, without=()):
    """All that numbers of two runs must agree in to be comparable, as a dict: the data, the options
    of training but for some, the steps that were made, and the options of the evaluation."""
    config = metrics["config"]
    # How a file was read is in the fingerprint, but for the split; seeds may simulate screens.
    covered = {*NO_MATTER, *data.SCREEN_OPTIONS, *without} - {"split_column", "covariate",
                                                              "min_cells"}
    steps = config["steps"] if metrics["done"] else metrics["last_step"]
    if config["patience"] or config["masks_from"] in (0, math.ceil(steps / 2)):
        covered.add("masks_from")  # as the axes and the steps say; after --resume it may not be
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


def relative_iwelbo(m, members):
    """Predictive IWELBO minus that of SAMS-VAE with the correlated guide and no combinations on the
    same split (Figure 4; of several model seeds, their mean). NaN where there is none."""
    reference = [r["iwelbo"] for r in members
                 if r["config"]["model"] == "sams-vae" and not r["config"]["train_combinations"]
                 and guide_of(r["config"]) == "corr. z_basal and E"
                 and r["config"]["split_seed"] == m["config"]["split_seed"]]
    return m["iwelbo"] - (np.mean(reference) if reference else math.nan)


def one_of_each_split(members, f):
    """Baselines depend on data, split and fraction f, not on the model: one run of each split."""
    return {(m["config"]["split_seed"], m["config"].get("simulated_seed")): m
            for m in members if m["config"]["train_combinations"] == f}.values()


def table_of_runs(runs, scale="log_normalised"):
    """Markdown of the metrics of many runs: a row per model and guide, mean ± sd over seeds.

    Runs that cannot be compared stand in different tables, and the line above each names the
    settings that differ. In the Norman splits, effects are those of conditions with test cells.
    """
    tables, all_settings = [], [settings(m, SEEDS + ROW) for m in runs]
    for members in tables_of(runs):
        config = members[0]["config"]
        norman = config["split"] != "random"
        effects_of = "test" if norman else "all"

        def row(same, label, guide, f, prediction):
            """A row: of a model all columns, of a baseline those of effects."""
            cells = {"model": label, "guide": guide, "f": f"{f:g}"} | {
                title: in_words([m["effects"][scale][effects_of][prediction][column] for m in same])
                for column, title in COLUMNS}
            if prediction == "model":
                cells |= {"runs": str(len(same))} | {
                    title: in_words([value(m) for m in same], digits)
                    for title, (value, digits) in of_models.items()}
                if len({m["fingerprint"] for m in same}) == 1 and "mask" in same[0]:
                    agreement = mask_agreement([m["mask"] for m in same])
                    cells["masks agree"] = in_words(np.mean(agreement or math.nan))
            return cells

        of_models = {"test IWELBO": (lambda m: m["iwelbo"], 2),
                     "relative IWELBO": (lambda m: relative_iwelbo(m, members), 2),
                     "joint IWELBO": (lambda m: m["iwelbo_joint_per_cell"], 2),
                     "mask pathway acc.": (lambda m: m.get("mask_pathway_accuracy", math.nan), 3),
                     "mask F1": (lambda m: m.get("mask_f1", math.nan), 3)}
        rows = []
        for same in {key(m, SEEDS): [s for s in members if key(s, SEEDS) == key(m, SEEDS)]
                     for m in members}.values():
            own = same[0]["config"]
            rows.append(row(same, model_of(own), guide_of(own), own["train_combinations"], "model"))
        for name, label in {**BASELINES, "ceiling": "ceiling"}.items():
            for f in sorted({m["config"]["train_combinations"] for m in members}):
                rows.append(row(one_of_each_split(members, f), label, "", f, name))
        header = ["model", "guide", "f", "runs", *of_models, "masks agree",
                  *(title for _, title in COLUMNS)]
        unused = {"mask pathway acc.": not any("mask_pathway_accuracy" in m for m in members),
                  "mask F1": not any("mask_f1" in m for m in members),
                  "masks agree": not any(cells.get("masks agree", "-") != "-" for cells in rows),
                  "f": not norman, "relative IWELBO": not norman}
        header = [title for title in header if not unused.get(title)]

        of_table = settings(members[0], SEEDS + ROW)
        differing = [f"{k} {v if k != 'data' else config['data']}" for k, v in of_table.items()
                     if k != "split" and any(s.get(k) != v for s in all_settings)]
        if not members[0]["done"]:
            differing.append(f"stopped before step {config['steps']:,}")
        tables.append("\n".join([
            f"{os.path.basename(config['data'])}, split {config['split']}; effects of "
            f"{effects_of} conditions, {scale.replace('_', '-')}" + "; ".join(["", *differing]),
            options_line(members[0]["options"]), "",
            markdown(header, [[cells.get(title, "") for title in header] for cells in rows])]))
    return "\n\n".join(tables)


# ============================================================================================
# Use of a trained model
# ============================================================================================


def dosages_of(run, conditions):
    """Dosages (C, P), for the run's model, of conditions such as "B+A" or "control"; and how the
    screen spells them, "A+B".

    Raises DataError for names that the screen does not have, with those that come near.
    """
    known, rows, spelled = run.screen.perturbations, [], []
    index = {name: t for t, name in enumerate(run.model_screen.perturbations)}
    for condition in conditions:
        names = [condition] if condition in known else [
            name.strip() for name in condition.split(run.screen.joiner)]
        names = sorted(name for name in names if name != "control")
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 5, 0.5) or known[:5]
                raise DataError(f"{run.folder}: no perturbation is called {name!r}; near it are: "
                                f"{', '.join(near)} ({len(known):,} in all; the control is "
                                "called control)")
        if len(set(names)) < len(names):
            raise DataError(f"{condition!r} names a perturbation twice")
        spelled.append(run.screen.joiner.join(names) or "control")
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
def effect_interval(model, dosages, n_particles=1000, library=1e4, c=None):
    """5 % and 95 % quantiles over particles of the effects on expected counts, (C, G) each.
    c (C, n_particles, columns) are the particles' covariates.

    A particle is a basal state and a draw of (M, E): the interval holds the effect on nine of ten
    cells of the population, by what the model knows of the effects. It is no standard error.
    """
    t, drawn = draws_for(dosages, len(model.n_cells), shared=True)
    mask, effect = model.sample_many_globals(t, n_particles)
    z_basal = torch.randn(n_particles, model.n_latent, device=dosages.device)
    nothing, c = torch.full_like(dosages[0], data.NONE), [None] * len(dosages) if c is None else c
    quantiles = torch.tensor([0.05, 0.95], device=dosages.device)
    low_and_high = []
    for d, row, c_of_d in zip(dosages, drawn, c):
        c_of_d = None if c_of_d is None else c_of_d.to(dosages.device)
        control = model.log_rho(z_basal, nothing, c_of_d).exp()
        z = z_basal + sum_effects(mask, effect, row[None], model.axes)[:, 0]  # eq. 1: (K, L)
        difference = library * (model.log_rho(z, d, c_of_d).exp() - control)  # (K, G)
        low_and_high.append(torch.quantile(difference, quantiles, dim=0))
    low, high = torch.stack(low_and_high, dim=1)
    return low, high


def predict(run, conditions, ate_particles=2500, library=None, evaluation_seed=0):
    """Write predictions.h5ad: expression and effects, (condition, gene), by the model.

    X and the layer expected_log_normalised, expected_counts; effect_log_normalised and
    effect_counts, differences from control cells; effect_counts_low and _high, see effect_interval.
    Returns a table of the ten strongest effects of each.
    """
    library = library or library_of(run)
    dosages, spelled = dosages_of(run, conditions)
    torch.manual_seed(evaluation_seed)
    # Covariates as the cells have them that received one of the perturbations.
    strata, stratum = strata_of(run.screen)
    received = [np.isin(run.model_screen.d, d[d != data.NONE]).any(1)
                for d in dosages.cpu().numpy()]
    cells = [np.flatnonzero(chosen if chosen.any() else ~chosen) for chosen in received]
    weight = np.stack([np.bincount(stratum[chosen], minlength=len(strata)) / len(chosen)
                       for chosen in cells])
    of_conditions, of_controls = expected_of_conditions(run, dosages, weight, ate_particles,
                                                        library)
    layers = {}
    for scale in SCALES:
        layers[f"expected_{scale}"] = of_conditions[scale]
        layers[f"effect_{scale}"] = of_conditions[scale] - of_controls[scale]
    rng = np.random.default_rng(evaluation_seed)
    c = None if run.screen.c is None else torch.from_numpy(
        np.stack([run.screen.c[rng.choice(chosen, 1000)] for chosen in cells]))
    layers["effect_counts_low"], layers["effect_counts_high"] = (
        v.cpu().numpy() for v in effect_interval(run.model, dosages, library=library, c=c))
    layers = {name: value.astype(np.float32) for name, value in layers.items()}
    trained_on = run.screen.conditions[run.split["train"]]
    n_cells = np.array([int((trained_on == name).sum()) for name in spelled])
    run.write("predictions.h5ad", X=layers["expected_log_normalised"],
              obs={"condition": list(conditions), "n_training_cells": n_cells},
              var={"gene": run.screen.gene_names}, layers=layers, uns={"library": library})
    rows, untrained = [], (run.model.n_cells[dosages] == 0) & (dosages != data.NONE)
    for i, condition in enumerate(conditions):
        if untrained[i].any():
            print(f"{condition}: in whole or in part without training cells: what is predicted for "
                  "that is the prior, or no effect")
        log2_effect = layers["effect_log_normalised"][i]
        for g in np.argsort(-np.abs(log2_effect), kind="stable")[:10]:
            rows.append([condition, str(run.screen.gene_names[g]), f"{log2_effect[g]:+.3f}",
                         f"{layers['expected_counts'][i, g]:.2f}",
                         f"{layers['effect_counts'][i, g]:+.2f}",
                         f"{layers['effect_counts_low'][i, g]:+.2f} to "
                         f"{layers['effect_counts_high'][i, g]:+.2f}"])
    return markdown(["condition", "gene", "log2 effect", f"counts of {library:,.0f}",
                     "effect on counts", "5 % to 95 % of particles"], rows)


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
    basal, total = [], []
    for x, d, *c in run.batches.in_order(np.arange(len(screen.d))):
        z_pert = sum_effects(mask, effect, d, model.axes)  # (draws, B, L)
        loc, _ = model.encode(x, z_pert, d, *c)
        basal.append((loc.expand_as(z_pert).mean(0) @ model.axes).cpu())
        total.append(((loc + z_pert).mean(0) @ model.axes).cpu())

    columns = {}
    for name in screen.file.obs_columns:
        try:
            values = screen.obs(name)
        except DataError as error:
            print(f"{run.config['data']}: {error}: this column is left out")
            continue
        if values.dtype == object:  # text, or something with missing values
            missing = np.array([v is None for v in values])
            numbers = all(isinstance(v, (int, float, np.number, np.bool_))
                          for v in values[~missing])
            values = (np.where(missing, np.nan, values).astype(float) if numbers else
                      np.where(missing, "", values))
        columns[name] = values

    def free(name):
        """The name, or one like it that no column of the file has."""
        while name in columns:
            name += "_"
        return name

    split = np.full(len(screen.d), "", dtype=object)
    for name, cells in run.split.items():
        split[cells] = name
    obs = {free("cell"): screen.cell_names, **columns,
           free("sams_vae_condition"): screen.conditions, free("sams_vae_split"): split}
    uns = {"perturbations": list(run.model_screen.perturbations)}
    if model.has_mask:
        uns["mask_probability"] = model.mask_probability().cpu().numpy()
    if model.has_effects:
        uns |= {"effect": effect.mean(0).cpu().numpy(),
                "offset": (mask * effect).mean(0).cpu().numpy()}
    run.write("latents.h5ad", X=None, obs=obs, var={"gene": screen.gene_names},
              obsm={"X_z_basal": torch.cat(basal).numpy(), "X_z": torch.cat(total).numpy()},
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


def figure_of_training(folder):
    """Loss, KL terms and masks over the steps of log.jsonl."""
    log = read_log(folder)
    if not log:
        raise DataError(f"{folder}/log.jsonl: no line to draw")
    figure, axes = pyplot().subplots(1, 4, figsize=(14, 3), layout="constrained")
    for axis, names, unit in zip(axes, (
            ("loss", "validation_loss"), ("kl_basal", "kl_mask", "kl_effect"),
            ("mask_probability",), ("mask_size",)), (
            "nats per cell", "nats per cell", "mean probability", "latents of probability > 0.5")):
        for name in names:
            points = [(line["step"], line[name]) for line in log if name in line]
            if points:
                axis.plot(*zip(*points), label=name.replace("_", " "),
                          marker="." if name == "validation_loss" else None)
        axis.set(xlabel="step", ylabel=unit)
        if axis.lines:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "no masks to learn", transform=axis.transAxes, ha="center")
    losses = [line[name] for line in log for name in ("loss", "validation_loss") if name in line]
    axes[0].set_ylim(min(losses) - 1, np.quantile(losses, 0.95) + 1)  # the first would hide others
    axes[1].set_yscale("symlog", linthresh=0.01)
    figure.suptitle(os.path.basename(folder))
    return save_figure(figure, os.path.join(folder, "training.png"))


def figure_of_masks(run, pathways=None):
    """Figure 2: mask probabilities and mean offsets of perturbations, ordered by pathway; with
    turned axes also the offsets as encoder and decoder see them."""
    model, names = run.model, run.model_screen.perturbations
    torch.manual_seed(0)
    with torch.no_grad():
        mask, effect = model.sample_many_globals(model.all_perturbations(), 50)
        probability = model.mask_probability().numpy(force=True)
        offset = (mask * effect).mean(0)
        unturned = (offset @ model.axes.T).numpy(force=True)
        offset = offset.numpy(force=True)
    pathway = pathway_of(names, load_pathways(run, pathways))
    if not any(p is not None for p in pathway):
        pathway = np.full(len(names), "all perturbations", dtype=object)
    groups = sorted({p for p in pathway if p is not None})
    members = [np.flatnonzero(pathway == group) for group in groups]
    rows = np.concatenate([m[in_order_of_angle(offset[m])] for m in members])
    # Latents have no order of their own: each stands where the pathway stands that it matters most
    # to, so that a mask that follows pathways shows as blocks along the diagonal.
    strength = np.stack([np.abs(offset[m]).mean(0) for m in members])
    latents = np.lexsort((-strength.max(0), strength.argmax(0)))

    panels = [("mask probability", probability[:, latents], 1)] if model.has_mask else []
    limit = max(1e-6, np.quantile(np.abs(offset), 0.99))
    panels += [("mean offset E[m e]", offset[:, latents], limit)]
    if run.config["axes"] == "sparsest":
        panels += [("the same in the networks' axes", unturned, limit)]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1 + 5 * len(panels), 7),
                                     squeeze=False, layout="constrained", sharey=True)
    edges = np.cumsum([0, *map(len, members)])
    for axis, (title, values, limit) in zip(axes[0], panels):
        image = heat_map(axis, values[rows], limit, title,
                         xlabel=f"{len(latents)} latent dimensions")
        figure.colorbar(image, ax=axis, shrink=0.5)
        for edge in edges[1:-1]:
            axis.axhline(edge - 0.5, color="0.3", linewidth=0.5)
    labels = [f"{group if len(group) <= 28 else group[:26] + '...'} ({len(m)})"
              for group, m in zip(groups, members)]
    axes[0, 0].set_yticks((edges[1:] + edges[:-1] - 1) / 2, labels)
    if len(groups) == 1 and len(rows) <= 60:
        axes[0, 0].set_yticks(np.arange(len(rows)), [names[t] for t in rows])
    figure.suptitle(f"{os.path.basename(run.folder)}: {len(rows):,} perturbations")
    return save_figure(figure, os.path.join(run.folder, "masks.png"))


def figure_of_effects(folder, metrics):
    """Figure 3: effects by the data and by the model, as heat maps and as a density of points."""
    layers = data.read_layers(os.path.join(folder, "effects.h5ad"))
    kept = np.isfinite(layers["data_log_normalised"]).all(1)
    observed, predicted = (layers[f"{name}_log_normalised"][kept] for name in ("data", "model"))
    if not len(observed):
        raise DataError(f"{folder}: no condition has cells that effects could be taken from")
    rows, columns = in_order_of_angle(observed), in_order_of_angle(observed.T)
    limit = max(1e-6, np.quantile(np.abs(observed), 0.99))
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4.8), layout="constrained",
                                     width_ratios=(1, 1, 1.1))
    for axis, values, title in ((axes[0], observed, "data"), (axes[1], predicted, "model")):
        image = heat_map(axis, values[rows][:, columns], limit, f"{title}: effects, log-normalised",
                         xlabel=f"{values.shape[1]:,} genes", ylabel=f"{len(values):,} conditions")
    figure.colorbar(image, ax=axes[:2], shrink=0.6)
    hexagons = axes[2].hexbin(observed.ravel(), predicted.ravel(), gridsize=70, bins="log",
                              mincnt=1, cmap="viridis")
    figure.colorbar(hexagons, ax=axes[2], label="condition-gene pairs")
    axes[2].axline((0, 0), slope=1, color="C3", linewidth=0.8)
    axes[2].set(xlabel="effect by the data", ylabel="effect by the model",
                title=f"Pearson r = {pearson(predicted, observed):.3f}")
    figure.suptitle(f"{os.path.basename(folder)}, data effects from "
                    f"{metrics['options']['effects_from']} cells")
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
            return lambda m: m["effects"]["log_normalised"]["test"][prediction]["pearson"]

        # A row of bars for each model and guide, and, where effects are compared, each baseline.
        models = {name_of(m): [r for r in members if name_of(r) == name_of(m)] for m in members}
        splits = [m for f in fractions for m in one_of_each_split(members, f)]
        iwelbos = {name: at_each_f(same, lambda m: relative_iwelbo(m, members))
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


def add_options(parser, rows):
    """Add options given as (--name, default, what is allowed, text): bool for a switch, a list of
    words, or (least, largest, the same in words). One that is not given is absent from the result.
    """
    for flag, default, allowed, text in rows:
        if allowed is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(allowed[0], str):
            how = {"choices": allowed}
        else:
            how = {"type": number_within(type(default), *allowed)}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} [{default}]", **how)


def option_name(flag):
    """--like-this -> like_this."""
    return flag[2:].replace("-", "_")


def number_within(kind, least, largest, words):
    """A function text -> number for argparse, which refuses what is outside of the bounds."""
    def parse(text):
        """The number; raises what argparse turns into a message."""
        value = kind(text)
        if not least <= value <= largest:  # also where it is NaN
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def evaluated(folder, options):
    """The metrics of metrics.json if they are those of best.pt under these options, else None."""
    try:
        with open(os.path.join(folder, "metrics.json")) as file:
            metrics = json.load(file)
        steps = [load_checkpoint(folder, name)["step"] for name in ("best.pt", "last.pt")]
        same = (metrics["format"] == FORMAT and [metrics["step"], metrics["last_step"]] == steps
                and metrics["options"].items() >= options.items()
                and os.path.exists(os.path.join(folder, "effects.h5ad")))
        return metrics if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0], help="of a table of runs")
    parser.add_argument("--figures", action="store_true", help="draw PNG files (needs matplotlib)")
    parser.add_argument("--predict", nargs="+", metavar="CONDITION",
                        help='such as "A+B" C: write predictions.h5ad')
    parser.add_argument("--latents", action="store_true", help="write latents.h5ad")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--data", metavar="FILE.h5ad", help="the data, if they have moved")
    args = parser.parse_args(arguments)
    names = [option_name(flag) for flag, *_ in OPTIONS] + ["pathways"]
    options = {name: value for name, value in vars(args).items() if name in names}
    if "pathways" in options:
        options["pathways"] = os.path.abspath(options["pathways"])
    if args.figures and (args.predict or args.latents):
        parser.error("--figures evaluates, --predict and --latents do not: use two commands")
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
    if evaluations and args.figures:
        for path in figure_of_combinations(evaluations, os.path.dirname(folders[0]) or "."):
            print(f"written: {path}")
    if failed or not folders:
        sys.exit(2)


def use_run(folder, args, options):
    """--predict and --latents of one run."""
    run = Run(folder, args.device, args.data)
    own = {k: v for k, v in options.items() if k in ("ate_particles", "library", "evaluation_seed")}
    if args.predict:
        print(f"{predict(run, args.predict, **own)}\n\nwritten: {folder}/predictions.h5ad")
    if args.latents:
        write_latents(run, evaluation_seed=own.get("evaluation_seed", 0))
        print(f"written: {folder}/latents.h5ad")


def evaluate_run(folder, args, options, alone):
    """Evaluate one run unless that was done before, and draw its figures. Returns its metrics."""
    run, metrics = None, None if args.again else evaluated(folder, options)
    if metrics is None:
        run = Run(folder, args.device, args.data)
        metrics = evaluate(run, **options)
        print(f"\n{folder}\n{table(metrics)}\n\nwritten: {folder}/metrics.json, "
              f"{folder}/effects.h5ad")
    elif alone:
        print(f"\n{folder}, as evaluated before (--again evaluates anew)\n{table(metrics)}")
    if args.figures:
        run = run or Run(folder, args.device, args.data)
        figures = [figure_of_training(folder), figure_of_effects(folder, metrics)]
        if run.model.has_effects:
            figures.append(figure_of_masks(run, metrics["options"]["pathways"]))
        print("written: " + ", ".join(figures))
    return metrics | {"folder": folder}


if __name__ == "__main__":
    data.run(main)
