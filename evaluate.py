"""Evaluate and use trained runs: likelihood, treatment effects, masks, tables, figures.

    python evaluate.py runs/NAME                          one run
    python evaluate.py runs/*                             a table: models and guides, over seeds
    python evaluate.py runs/NAME --ate-particles 10000    as in the paper's Table 1
    python evaluate.py runs/NAME --figures                PNG files (needs matplotlib)
    python evaluate.py runs/NAME --predict "A+B" C        what these perturbations would do
    python evaluate.py runs/NAME --latents                latent states of all cells, for scanpy

Writes, beside the checkpoint, metrics.json and effects.h5ad (condition x gene effects of the model
and of the data). In reading order: one function a metric; what the data say, and baselines; the
evaluation of a run; tables; use of a trained model; figures.
"""

import argparse
import difflib
import json
import math
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch; see train.py
import numpy as np
import torch

import data
from data import DataError
from sams_vae import average_treatment_effects, expected_expression, iwelbo, sum_effects
from train import (MODELS, as_the_model_sees, build_model, default_device, load_checkpoint,
                   read_config_screen, read_log, with_defaults)

FORMAT = 2  # of metrics.json; a file of another format is not read
SCALES = ("log_normalised", "counts")
BASELINES = {"no_change": "no change", "perturbed_mean": "perturbed mean", "additive": "additive"}

# How a run is evaluated: option, default, and where the default comes from.
OPTIONS = [
    ("--iwelbo-particles", 100, "K of 3.1 (paper: 100)"),
    ("--ate-particles", 2500, "K of 3.2 (paper: Replogle 10,000, Norman 2,500)"),
    ("--library", 10_000, "total counts of the simulated cells (authors' code: 10,000)"),
    ("--effects-from", "all", "cells data effects are taken from: all (paper's Table 1), or test"),
    ("--evaluation-seed", 0, "of IWELBO and effects (ours)"),
]


# ============================================================================================
# Metrics
# ============================================================================================


def pearson(a, b):
    """Pearson correlation of two equally shaped arrays, flattened; NaN if one is constant or empty.

    ATE-Pearson (3.2) is this for (condition, gene) matrices of model and data effects. Conditions
    are not scaled before they are pooled, so those with strong effects dominate it.
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
    with np.errstate(invalid="ignore"):
        return 1 - torch.cat(ranks).cpu().numpy() / np.float64(len(observed) - 1)


def effect_metrics(predicted, observed, predicted_from_mean, observed_from_mean):
    """All other metrics of predicted against observed effects, (C, G) each, as a dict.

    The names that end in _top20 are restricted to the 20 genes of largest absolute observed effect
    of each condition. pearson_from_perturbed_mean is Pearson's r of the last two arguments, (C, G):
    predicted and observed means minus the mean over training conditions (see `baseline_effects`),
    in place of the control. It is without the shift that all perturbations share, which makes
    trivial predictions look good, and without the noise of the controls.
    """
    predicted, observed = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
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
        distance, before = np.full(m, np.inf), np.full(m, -1)
        done = np.zeros(m, bool)
        row, column, length = new_row, -1, 0.0
        while row != -1:
            reach = length + cost[row] - u[row] - v
            closer = ~done & (reach < distance)
            distance[closer], before[closer] = reach[closer], column
            column = int(np.argmin(np.where(done, np.inf, distance)))
            done[column], length, row = True, distance[column], row_of[column]
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
    agree = true_mask.T.astype(float) @ predicted
    agree = agree if len(agree) <= len(agree.T) else agree.T
    hits = agree[np.arange(len(agree)), best_matching(agree)].sum()
    n_true, n_predicted = int(true_mask.sum()), int(predicted.sum())
    return {"mask_precision": hits / n_predicted if n_predicted else 0.0,
            "mask_recall": hits / n_true if n_true else 0.0,
            "mask_f1": 2 * hits / max(1, n_true + n_predicted)}


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


def mean_expression(batches, cells, group, n_groups):
    """Mean expression of groups of cells, on both scales, for cells of a library of 10,000.

    cells (n,) positions, group (n,) their groups. Returns {scale: (n_groups, G)} and the number of
    cells of each group (n_groups,). counts: 1e4 x / sum x. log_normalised: log2(1 + 1e4 x / sum x).
    A group without cells has NaN.
    """
    n_cells = np.bincount(group, minlength=n_groups)
    total = {scale: torch.zeros(n_groups, batches.n_genes, dtype=torch.float64,
                                device=batches.device) for scale in SCALES}
    parts = torch.from_numpy(group).to(batches.device).split(512)
    for (x, _), part in zip(batches.in_order(cells), parts):
        per_10k = 1e4 * x / x.sum(-1, keepdim=True)
        total["counts"].index_add_(0, part, per_10k.double())
        total["log_normalised"].index_add_(0, part, torch.log2(1 + per_10k).double())
    with np.errstate(invalid="ignore"):
        return {scale: t.cpu().numpy() / n_cells[:, None] for scale, t in total.items()}, n_cells


def baseline_effects(mean, n_cells, dosages):
    """Effects that need no model, from training means of one scale (three baselines).

    mean (C + 1, G), n_cells (C + 1,): training cells by condition, the control last (c below).
    dosages (C, P). Returns name -> (C, G):

        no_change       0: the prediction is c
        perturbed_mean  the mean over training conditions p of (mu_p - c), for every condition
        additive        sum over the condition's perturbations g of (mu_g - c), where mu_g is the
                        mean of cells with g alone; 0 for a g that no training cell has alone
    """
    control, mean = mean[-1], mean[:-1]
    seen = n_cells[:-1] > 0
    shift = np.where(seen[:, None], mean - control, 0.0)
    n_perturbations = int(dosages.max()) + 1
    alone = np.zeros((n_perturbations + 1, mean.shape[1]))  # the last row: NONE adds nothing
    is_single = (dosages != data.NONE).sum(1) == 1
    alone[dosages[is_single].max(1)] = shift[is_single]
    perturbed_mean = shift[seen].mean(0) if seen.any() else np.zeros_like(control)
    return {"no_change": np.zeros_like(shift),
            "perturbed_mean": np.broadcast_to(perturbed_mean, shift.shape),
            "additive": alone[dosages].sum(1)}


def split_half_means(batches, cells, controls, group, n_conditions, seed=0):
    """Means of one random half of the cells of each condition, and of the other half (ceiling).

    No prediction can be expected to agree with the effects of so many cells better than those of
    as many other cells do. cells and controls (n,) positions, group (N,) conditions of all cells,
    where C stands for the control. Returns {scale: (C + 1, G)} twice, as `mean_expression`, each
    half with a half of the controls; NaN for conditions with fewer than two cells.
    """
    perturbed = cells[group[cells] != n_conditions]
    chosen = np.random.default_rng(seed).permutation(np.concatenate([perturbed, controls]))
    chosen = chosen[np.argsort(group[chosen], kind="stable")]
    _, start, n = np.unique(group[chosen], return_index=True, return_counts=True)
    place = np.arange(len(chosen)) - np.repeat(start, n)  # within the condition
    return [mean_expression(batches, half, group[half], n_conditions + 1)[0]
            for half in (chosen[place % 2 == 0], chosen[place % 2 == 1])]


# ============================================================================================
# Evaluation of one run
# ============================================================================================


class Run:
    """A trained run: its configuration, its screen on the device, and the model of best.pt."""

    def __init__(self, folder, device=None, data_path=None):
        self.folder, self.device = folder, default_device(device)
        self.checkpoint, last = (load_checkpoint(folder, name) for name in ("best.pt", "last.pt"))
        self.last_step = last["step"]
        self.config = last["config"] | ({"data": data_path} if data_path else {})
        if not os.path.exists(self.config["data"]):
            raise DataError(f"{folder}: its data, {self.config['data']}, are not there; --data "
                            "says where they are")
        self.screen = read_config_screen(self.config, self.checkpoint)
        self.seen = as_the_model_sees(self.screen, self.config["model"])
        self.batches = data.Batches(self.seen, self.device)
        self.model = build_model(self.config, self.checkpoint["training"]).to(self.device)
        self.model.load_state_dict(self.checkpoint["model"])
        self.split = {name: cells.numpy() for name, cells in self.checkpoint["split"].items()}

    def write(self, name, **contents):
        """Write an .h5ad file into the run's folder."""
        data.write_h5ad(os.path.join(self.folder, name), **contents)


def conditions_of(screen):
    """The C conditions other than the control: their sorted names (C,), a cell of each (C,), and
    the condition of every cell (N,), where C stands for the control."""
    label = np.where(screen.conditions == "control", "", screen.conditions).astype(str)
    names, first, group = np.unique(label, return_index=True, return_inverse=True)
    return names[1:], first[1:], np.where(group == 0, len(names) - 1, group - 1)  # "" sorts first


def pathways_of(run, path=None):
    """The pathways of a .json file, or those of the data. Only the former must be readable."""
    if path is not None:
        return data.read_pathways(path)
    try:
        return data.read_pathways(run.config["data"])
    except DataError as error:
        print(f"{error}: passed over, --pathways FILE.json would do")
        return None


def mask_metrics(run, pathways):
    """The mean mask probability of perturbations with training cells, `mask_recovery` where the
    screen is simulated, `mask_pathway_accuracy` where there are pathways (10 annotated
    perturbations or more). Empty for models without masks."""
    if not run.model.has_mask:
        return {}
    names, probability = run.seen.perturbations, run.model.mask_probability().numpy(force=True)
    trained = run.model.n_cells.numpy(force=True) > 0
    metrics = {"mask_mean_probability": float(probability[trained].mean())}
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
        mask, pathway = probability[known] > 0.5, pathway[known].astype(str)
        try:
            accuracy, sd = mask_pathway_accuracy(mask, pathway)
        except ImportError:
            print("mask pathway accuracy is left out: pip install scikit-learn")
        else:
            commonest = np.unique(pathway, return_counts=True)[1].max()
            metrics |= {"mask_pathway_accuracy": accuracy, "mask_pathway_accuracy_sd": sd,
                        "mask_pathway_chance": float(commonest / len(pathway)),
                        "n_annotated": len(pathway)}
    return metrics


def evaluate(run, iwelbo_particles=100, ate_particles=2500, library=10_000,
             effects_from="all", evaluation_seed=0, pathways=None):
    """Evaluate a Run: write metrics.json and effects.h5ad, return the metrics.

    metrics["effects"][scale][group][prediction] is what `effect_metrics` says of the prediction
    (the model, a baseline, or the ceiling: one half of the test cells predicts the other), over a
    group of conditions: all, pairs, held_out (no training cells), or those with cells in train,
    validation and test. NaN is written as null. pathways is a file for data.read_pathways, by
    default the data.
    """
    screen, model, split = run.screen, run.model, run.split
    known_pathways = pathways_of(run, pathways)
    torch.manual_seed(evaluation_seed)
    metrics = {"format": FORMAT, "config": run.config, "fingerprint": run.checkpoint["fingerprint"],
               "step": run.checkpoint["step"], "last_step": run.last_step,
               "validation_loss": run.checkpoint["best"],
               "options": {"iwelbo_particles": iwelbo_particles, "ate_particles": ate_particles,
                           "library": library, "effects_from": effects_from,
                           "evaluation_seed": evaluation_seed, "pathways": pathways}}

    # Marginal likelihood of the test cells (3.1).
    values, joint, ess = iwelbo(model, run.batches.in_order(split["test"]), iwelbo_particles)
    metrics["iwelbo"] = values.double().mean().item()
    metrics["iwelbo_se"] = (values.double().std().item() / math.sqrt(len(values))
                                       if len(values) > 1 else math.nan)
    metrics |= {"n_test_cells": len(values), "iwelbo_joint_total": joint,
                "iwelbo_joint_per_cell": joint / len(values),
                "iwelbo_joint_effective_sample_size": ess}

    # Effects by the data and by the baselines (3.2). The control is the last group.
    names, first, group = conditions_of(screen)
    controls = {"all": np.flatnonzero(group == len(names))}
    for part, cells in split.items():
        controls[part] = cells[group[cells] == len(names)]
    # The Norman splits have no controls among their test cells: then all of them are taken.
    test_controls = controls["test"] if len(controls["test"]) > 1 else controls["all"]
    cells = np.arange(len(group)) if effects_from == "all" else np.union1d(split["test"],
                                                                           test_controls)
    observed, n_cells = mean_expression(run.batches, cells, group[cells], len(names) + 1)
    trained, n_train = mean_expression(run.batches, split["train"], group[split["train"]],
                                       len(names) + 1)
    halves = split_half_means(run.batches, split["test"], test_controls, group, len(names))

    # Effects by the model.
    dosages = torch.from_numpy(run.seen.d[first]).to(run.device)
    by_model = average_treatment_effects(model, dosages, ate_particles, library)
    n_perturbed = (screen.d[first] != data.NONE).sum(1)
    groups = {"all": n_cells[:-1] > 0}
    groups["pairs"] = groups["all"] & (n_perturbed == 2)
    groups["held_out"] = groups["all"] & (n_train[:-1] == 0)
    for part, cells in split.items():
        groups[part] = groups["all"] & np.isin(np.arange(len(names)), group[cells])
    metrics["n_conditions"] = {name: int(chosen.sum()) for name, chosen in groups.items()}
    by_model["counts"] *= 1e4 / library  # in the unit of the data's
    layers, metrics["effects"] = {}, {}
    for scale in SCALES:
        effect = {"data": observed[scale][:-1] - observed[scale][-1],
                  "model": by_model[scale].cpu().numpy()}
        effect |= baseline_effects(trained[scale], n_train, screen.d[first])
        layers |= {f"{name}_{scale}": effect[name] for name in ("model", "data")}
        mean = trained[scale][-1] + effect["perturbed_mean"]
        # What is compared with what, in which conditions, and the same from the perturbed mean.
        a, b = halves[0][scale], halves[1][scale]
        compared = {name: (effect[name], effect["data"], groups["all"],
                           effect[name] - effect["perturbed_mean"], observed[scale][:-1] - mean)
                    for name in ("model", *BASELINES)}
        compared["ceiling"] = (a[:-1] - a[-1], b[:-1] - b[-1],
                               groups["all"] & np.isfinite(a[:-1] + b[:-1]).all(1),
                               a[:-1] - mean, b[:-1] - mean)
        rows = metrics["effects"][scale] = {name: {} for name in groups}
        for name, (predicted, against, usable, *from_mean) in compared.items():
            score = np.full(len(names), math.nan)
            score[usable] = discrimination_scores(predicted[usable], against[usable], run.device)
            for group_name, chosen in groups.items():
                chosen = chosen & usable
                rows[group_name][name] = effect_metrics(
                    predicted[chosen], against[chosen], *(v[chosen] for v in from_mean)) | {
                    "discrimination": float(score[chosen].mean()) if chosen.any() else math.nan}
        # The most wanted of these once more, under flat names.
        for group_name, suffix in (("all", ""), ("pairs", "_pairs"), ("held_out", "_held_out")):
            for name, row in rows[group_name].items():
                prefix = "" if name == "model" else f"{name}_"
                metrics[f"{prefix}ate_pearson_{scale}{suffix}"] = row["pearson"]

    metrics |= mask_metrics(run, known_pathways)

    def without_nan(value):
        """The value with null in place of NaN, which JSON does not know."""
        if isinstance(value, dict):
            return {k: without_nan(v) for k, v in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    metrics = without_nan(metrics)
    run.write("effects.h5ad", X=layers["model_log_normalised"].astype(np.float32),
              obs={"condition": names.astype(object), "n_cells": n_cells[:-1],
                   "n_training_cells": n_train[:-1], "n_perturbations": n_perturbed},
              var={"gene": screen.gene_names},
              layers={k: v.astype(np.float32) for k, v in layers.items()},
              uns={"effects_from": effects_from, "library": library})
    with data.replacing(os.path.join(run.folder, "metrics.json")) as path, open(path, "w") as file:
        json.dump(metrics, file, indent=2)
    return metrics


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


def number(values, digits=3):
    """Text of a number, of several as mean +- sd; "-" for one that is undefined."""
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


def table(metrics):
    """The metrics of one run as text: likelihood, masks, effects beside baselines."""
    m = metrics
    lines = [options_line(m["options"]),
             f"test IWELBO, predictive: {number(m['iwelbo'], 2)} per cell, standard "
             f"error {number(m['iwelbo_se'], 2)} ({m['n_test_cells']:,} cells)",
             f"test IWELBO, joint:      {number(m['iwelbo_joint_per_cell'], 2)} per cell, "
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
    words = {"all": "all", "pairs": "pairs", "held_out": "held out of training"}
    rows = []
    for scale in SCALES:
        for name, text in words.items():
            if m["n_conditions"][name]:
                for row, label in {"model": f"**{m['config']['model']}**", **BASELINES,
                                   "ceiling": "ceiling"}.items():
                    scores = m["effects"][scale][name][row]
                    label += f" ({scores['n_conditions']:,})" if row == "ceiling" else ""
                    rows.append([f"{scale.replace('_', '-')}, {text} "
                                 f"({m['n_conditions'][name]:,})" if row == "model" else "", label,
                                 *(number(scores[column]) for column, _ in COLUMNS)])
    return "\n".join([*lines, "", markdown(["effects of conditions", "predicted by",
                                            *(title for _, title in COLUMNS)], rows)])


SEEDS = ("seed", "split_seed", "simulated_seed")
ROW = ("model", "correlated_basal", "correlated_effects", "train_combinations")
NO_MATTER = ("data", "name", "preset", "compile", "tf32", "log_every", "validate_every")


def key(metrics, without):
    """The options of a run that matter, but for some, and its data, as text."""
    config = with_defaults(metrics["config"])
    config = {k: v for k, v in config.items() if k not in (*NO_MATTER, *without)}
    config["fingerprint"] = "" if config.get("simulated") else metrics["fingerprint"]
    return json.dumps(config, sort_keys=True)


def tables_of(runs):
    """Lists of runs that belong into one table, each in the order of Table 1: they differ in
    nothing but the model, its guide, the fraction of combinations, and seeds. Of runs that do not
    differ at all, the first is kept."""
    def order(m):
        """Table by table, row by row."""
        return (key(m, SEEDS + ROW), list(MODELS).index(m["config"]["model"]),
                *(m["config"][k] for k in (*ROW[1:], "split_seed", "seed")))

    different = {}
    for m in sorted(runs, key=order):
        different.setdefault(key(m, ()), m)
    runs = different.values()
    return [[m for m in runs if key(m, SEEDS + ROW) == table]
            for table in unique(key(m, SEEDS + ROW) for m in runs)]


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
    """Markdown of the metrics of many runs: a row per model and guide, mean +- sd over seeds.

    In the Norman splits, effects are those of conditions with test cells.
    """
    tables = []
    for members in tables_of(runs):
        config, norman = members[0]["config"], members[0]["config"]["split"] != "random"
        effects_of = "test" if norman else "all"
        header = ["model", "guide", *(["f"] if norman else []), "runs", "test IWELBO",
                  *(["relative IWELBO"] if norman else []), "joint IWELBO",
                  *(["mask pathway acc."] if any("mask_pathway_accuracy" in m for m in members)
                    else []),
                  *(["mask F1"] if any("mask_f1" in m for m in members) else []),
                  *(title for _, title in COLUMNS)]
        rows = []
        for row in unique(key(m, SEEDS) for m in members):
            same = [m for m in members if key(m, SEEDS) == row]
            own = same[0]["config"]
            cells = {"model": own["model"], "guide": guide_of(own),
                     "f": f"{own['train_combinations']:g}", "runs": str(len(same)),
                     "test IWELBO": number([m["iwelbo"] for m in same], 2),
                     "relative IWELBO": number([relative_iwelbo(m, members) for m in same], 2),
                     "joint IWELBO": number([m["iwelbo_joint_per_cell"] for m in same], 2),
                     "mask pathway acc.": number([m.get("mask_pathway_accuracy", math.nan)
                                                  for m in same]),
                     "mask F1": number([m.get("mask_f1", math.nan) for m in same])}
            cells |= {title: number([m["effects"][scale][effects_of]["model"][column]
                                     for m in same]) for column, title in COLUMNS}
            rows.append([cells[title] for title in header])
        for name, label in {**BASELINES, "ceiling": "ceiling"}.items():
            for f in unique(m["config"]["train_combinations"] for m in members):
                same = one_of_each_split(members, f)
                cells = {"model": label, "f": f"{f:g}"} | {
                    title: number([m["effects"][scale][effects_of][name][column] for m in same])
                    for column, title in COLUMNS}
                rows.append([cells.get(title, "") for title in header])
        differing = [f"{k} {config.get(k)}" for k in sorted(config)
                     if k not in (*NO_MATTER, *SEEDS, *ROW)
                     and len({str(m["config"].get(k)) for m in runs}) > 1]
        lines = [f"{os.path.basename(config['data'])}, split {config['split']}; effects of "
                 f"{effects_of} conditions, {scale.replace('_', '-')}"
                 + "; ".join(["", *differing]), options_line(members[0]["options"])]
        if len({json.dumps(m["options"], sort_keys=True) for m in members}) > 1:
            lines.append("WARNING: not all were evaluated with the same options; --again does")
        unfinished = sum(m["last_step"] < m["config"]["steps"] for m in members)
        if unfinished:
            lines.append(f"WARNING: {unfinished} of these runs were stopped before their last step")
        tables.append("\n".join([*lines, "", markdown(header, rows)]))
    return "\n\n".join(tables)


def unique(values):
    """The values in their order, each once."""
    return list(dict.fromkeys(values))


# ============================================================================================
# Use of a trained model
# ============================================================================================


def dosages_of(run, conditions):
    """Dosages (C, P), for the run's model, of conditions such as "B+A" or "control"; and how the
    screen spells them, "A+B".

    Raises DataError for names that the screen does not have, with those that come near.
    """
    known, rows, spelled = run.screen.perturbations, [], []
    index = {name: t for t, name in enumerate(run.seen.perturbations)}
    for condition in conditions:
        names = [condition] if condition in known else [n.strip() for n in condition.split("+")]
        names = sorted(name for name in names if name != "control")
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 5, 0.5) or known[:5]
                raise DataError(f"{run.folder}: no perturbation is called {name!r}; near it are: "
                                f"{', '.join(near)} ({len(known):,} in all; the control is "
                                "called control)")
        if len(set(names)) < len(names):
            raise DataError(f"{condition!r} names a perturbation twice")
        spelled.append("+".join(names) or "control")
        if run.config["model"] == "svae+":  # one label per cell, and none for what it has not seen
            names = [spelled[-1]] if names else []
            if not set(names) <= index.keys():
                print(f"{condition}: not in the data, and svae+ cannot add effects up: no effect")
                names = []
        rows.append([index[name] for name in names])
    d = np.full((len(rows), max(1, *map(len, rows))), data.NONE)
    for row, perturbations in zip(d, rows):
        row[:len(perturbations)] = perturbations
    return torch.from_numpy(d).to(run.device), spelled


@torch.no_grad()
def effect_interval(model, dosages, n_particles=1000, library=1e4):
    """5 % and 95 % quantiles over particles of the effects on expected counts, (C, G) each.

    A particle is a basal state and a draw of (M, E): the interval holds the effect on nine of ten
    cells of the population, by what the model knows of the effects. It is no standard error.
    """
    t, place = torch.unique(dosages.clamp(min=0), return_inverse=True)
    place = torch.where(dosages == data.NONE, data.NONE, place)
    mask, effect = model.sample_many(t, n_particles)
    z_basal = torch.randn(n_particles, model.n_latent, device=dosages.device)
    control = model.log_rho(z_basal, torch.full_like(dosages[0], data.NONE)).exp()
    quantiles = torch.tensor([0.05, 0.95], device=dosages.device)
    low_and_high = []
    for d, p in zip(dosages, place):
        z = z_basal + sum_effects(mask, effect, p[None])[:, 0]
        difference = library * (model.log_rho(z, d).exp() - control)  # (K, G)
        low_and_high.append(torch.quantile(difference, quantiles, dim=0))
    low, high = torch.stack(low_and_high, dim=1)
    return low, high


def predict(run, conditions, ate_particles=2500, library=10_000, evaluation_seed=0):
    """Write predictions.h5ad: expression and effects, (condition, gene), by the model.

    X and the layer expected_log_normalised, expected_counts; effect_log_normalised and
    effect_counts, differences from control cells; effect_counts_low and _high, see effect_interval.
    Returns a table of the ten strongest effects of each.
    """
    dosages, spelled = dosages_of(run, conditions)
    torch.manual_seed(evaluation_seed)
    arms = torch.cat([torch.full_like(dosages[:1], data.NONE), dosages])
    expected = expected_expression(run.model, arms, ate_particles, library)
    layers = {}
    for scale in SCALES:
        layers[f"expected_{scale}"] = expected[scale][1:]
        layers[f"effect_{scale}"] = expected[scale][1:] - expected[scale][0]
    layers["effect_counts_low"], layers["effect_counts_high"] = effect_interval(
        run.model, dosages, library=library)
    layers = {name: value.cpu().numpy().astype(np.float32) for name, value in layers.items()}
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
        effect = layers["effect_log_normalised"][i]
        for g in np.argsort(-np.abs(effect), kind="stable")[:10]:
            rows.append([condition, str(run.screen.gene_names[g]), f"{effect[g]:+.3f}",
                         f"{layers['expected_counts'][i, g]:.2f}",
                         f"{layers['effect_counts'][i, g]:+.2f}",
                         f"{layers['effect_counts_low'][i, g]:+.2f} to "
                         f"{layers['effect_counts_high'][i, g]:+.2f}"])
    return markdown(["condition", "gene", "log2 effect", f"counts of {library:,.0f}",
                     "effect on counts", "5 % to 95 % of particles"], rows)


@torch.no_grad()
def write_latents(run, n_draws=50, evaluation_seed=0):
    """Write latents.h5ad: the screen's cells and genes without counts, and latent states.

    obsm X_z_basal and X_z = z_basal + z_pert (N, L), posterior means; all columns of obs, and
    sams_vae_condition and sams_vae_split; uns: perturbations, mask_probability, effect = E[e_t] and
    offset = E[m_t * e_t] (T, L), where the model has them.
    """
    model, screen = run.model, run.screen
    torch.manual_seed(evaluation_seed)
    mask, effect = model.sample_many(model.all_perturbations(), n_draws)
    basal, total = [], []
    for x, d in run.batches.in_order(np.arange(len(screen.rows))):
        z_pert = sum_effects(mask, effect, d)
        loc, _ = model.encode(x, z_pert, d)
        basal.append(loc.expand_as(z_pert).mean(0).cpu())
        total.append((loc + z_pert).mean(0).cpu())

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

    split = np.full(len(screen.rows), "", dtype=object)
    for name, cells in run.split.items():
        split[cells] = name
    obs = {free("cell"): screen.cell_names, **columns,
           free("sams_vae_condition"): screen.conditions, free("sams_vae_split"): split}
    uns = {"perturbations": list(run.seen.perturbations)}
    if model.has_mask:
        uns["mask_probability"] = model.mask_probability().cpu().numpy()
    if run.config["model"] != "cvae":
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
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, names in zip(axes, (("loss", "validation_loss"),
                                  ("kl_basal", "kl_mask", "kl_effect"), ("mask_probability",))):
        for name in names:
            steps, values = np.array([(line["step"], line[name]) for line in log if name in line]
                                     or np.empty((0, 2))).T
            axis.plot(steps, values, label=name.replace("_", " "),
                      marker="." if name == "validation_loss" else None)
        axis.set_xlabel("step")
    # The first steps would hide all others.
    losses = [line["loss"] for line in log]
    axes[0].set_ylim(min(losses) - 1, np.quantile(losses, 0.95) + 1)
    axes[0].set_ylabel("nats per cell")
    axes[1].set_ylabel("nats per cell")
    axes[1].set_yscale("symlog", linthresh=0.01)
    axes[2].set_ylabel("mean mask probability")
    axes[0].legend()
    axes[1].legend()
    if any("mask_size" in line for line in log):
        right = axes[2].twinx()
        right.plot([line["step"] for line in log], [line["mask_size"] for line in log], "C1")
        right.set_ylabel("latents of probability > 0.5", color="C1")
    else:
        axes[2].text(0.5, 0.5, "no masks to learn", transform=axes[2].transAxes, ha="center")
    figure.suptitle(os.path.basename(folder))
    return save_figure(figure, os.path.join(folder, "training.png"))


def figure_of_masks(run, pathways=None):
    """Figure 2: mask probabilities and mean offsets of perturbations, ordered by pathway."""
    model, names = run.model, run.seen.perturbations
    torch.manual_seed(0)
    with torch.no_grad():
        mask, effect = model.sample_many(model.all_perturbations(), 50)
        probability, offset = model.mask_probability().numpy(force=True), (
            mask * effect).mean(0).numpy(force=True)
    pathway = pathway_of(names, pathways_of(run, pathways))
    if any(p is not None for p in pathway):
        rows = np.flatnonzero([p is not None for p in pathway])
        groups = unique(sorted(pathway[rows].astype(str)))
    else:
        rows, groups, pathway = np.arange(len(names)), ["all perturbations"], np.full(
            len(names), "all perturbations", dtype=object)
    rows = np.concatenate([members[in_order_of_angle(offset[members])] for members in (
        rows[pathway[rows] == group] for group in groups)])
    # Latents stand where the pathway stands that they matter most to.
    strength = np.stack([np.abs(offset[rows[pathway[rows] == g]]).mean(0) for g in groups])
    latents = np.lexsort((-strength.max(0), strength.argmax(0)))

    panels = [("mask probability", probability, "Greys", 0, 1)] if model.has_mask else []
    limit = max(1e-6, np.quantile(np.abs(offset), 0.99))
    panels += [("mean offset E[m e]", offset, "RdBu_r", -limit, limit)]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(1 + 5 * len(panels), 7),
                                     squeeze=False, layout="constrained", sharey=True)
    n = np.cumsum([0] + [(pathway[rows] == g).sum() for g in groups])
    for axis, (title, values, colours, low, high) in zip(axes[0], panels):
        image = axis.imshow(values[rows][:, latents], aspect="auto", cmap=colours, vmin=low,
                            vmax=high, interpolation="nearest")
        figure.colorbar(image, ax=axis, shrink=0.5)
        axis.set_title(title)
        axis.set_xlabel(f"{len(latents)} latent dimensions")
        axis.set_xticks([])
        for edge in n[1:-1]:
            axis.axhline(edge - 0.5, color="C1", linewidth=0.8)
    labels = [f"{g if len(g) <= 28 else g[:26] + '...'} ({k})" for g, k in zip(groups, np.diff(n))]
    axes[0, 0].set_yticks((n[1:] + n[:-1] - 1) / 2, labels)
    if len(groups) == 1 and len(rows) <= 60:
        axes[0, 0].set_yticks(np.arange(len(rows)), [names[t] for t in rows])
    figure.suptitle(f"{os.path.basename(run.folder)}: {len(rows):,} perturbations")
    return save_figure(figure, os.path.join(run.folder, "masks.png"))


def figure_of_effects(folder, metrics):
    """Figure 3: effects by the data and by the model, as heat maps and as a density of points."""
    effects = data.read_layers(os.path.join(folder, "effects.h5ad"))
    kept = np.isfinite(effects["data_log_normalised"]).all(1)
    observed, predicted = (effects[f"{name}_log_normalised"][kept] for name in ("data", "model"))
    if not len(observed):
        raise DataError(f"{folder}: no condition has cells that effects could be taken from")
    rows, columns = in_order_of_angle(observed), in_order_of_angle(observed.T)
    limit = max(1e-6, np.quantile(np.abs(observed), 0.99))
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained",
                                width_ratios=(1, 1, 1.1))
    for axis, values, title in ((axes[0], observed, "data"), (axes[1], predicted, "model")):
        image = axis.imshow(values[rows][:, columns], aspect="auto", cmap="RdBu_r", vmin=-limit,
                            vmax=limit, interpolation="nearest")
        axis.set(title=f"{title}: effects, log-normalised", xticks=[], yticks=[],
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
        kinds = unique((m["config"]["model"], guide_of(m["config"])) for m in sorted(
            members, key=lambda m: list(MODELS).index(m["config"]["model"])))
        plt = pyplot()
        figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")

        def bars(axis, i, n, values, colour):
            """The i-th of n bars at every f: mean and sd of values(f)."""
            width = 0.85 / n
            for j, f in enumerate(fractions):
                v = np.array(values(f), float)
                v = v[np.isfinite(v)]
                if len(v):
                    axis.bar(j + (i - (n - 1) / 2) * width, v.mean(), 0.92 * width, color=colour,
                             yerr=v.std(ddof=1) if len(v) > 1 else None, capsize=2)

        for i, kind in enumerate(kinds):
            same = [m for m in members if (m["config"]["model"], guide_of(m["config"])) == kind]
            of = {f: [m for m in same if m["config"]["train_combinations"] == f] for f in fractions}
            bars(axes[0], i, len(kinds), lambda f: [
                relative_iwelbo(m, members) for m in of[f]], f"C{i}")
            bars(axes[1], i, len(kinds) + 2, lambda f: [
                m["effects"]["log_normalised"]["test"]["model"]["pearson"] for m in of[f]], f"C{i}")
        greys = ("0.75", "0.5")
        for i, name in enumerate(("perturbed_mean", "additive")):
            bars(axes[1], len(kinds) + i, len(kinds) + 2, lambda f: [
                m["effects"]["log_normalised"]["test"][name]["pearson"]
                for m in one_of_each_split(members, f)], greys[i])
        axes[0].set_ylabel("test IWELBO relative to\nSAMS-VAE (correlated), f = 0")
        if not axes[0].patches:
            axes[0].text(0.5, 0.5, "needs the run of SAMS-VAE\nwith f = 0 on the same split",
                         ha="center", va="center", transform=axes[0].transAxes)
        axes[1].set_ylabel("ATE-Pearson, test conditions")
        for axis in axes:
            axis.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
            axis.set_xlabel("fraction f of training combinations")
            axis.axhline(0, color="0.3", linewidth=0.8)
        labels = [", ".join(kind) for kind in kinds] + ["perturbed mean", "additive"]
        colours = [f"C{i}" for i in range(len(kinds))] + list(greys)
        figure.legend([plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours], labels,
                      loc="outside lower center", ncols=4)
        data_name = os.path.basename(members[0]["config"]["data"])
        figure.suptitle(f"{split}, {data_name}")
        path, n = os.path.join(folder, f"{split}.png"), 1
        while path in paths:  # runs of other data, or with other settings
            path, n = os.path.join(folder, f"{split}-{n + 1}.png"), n + 1
        paths.append(save_figure(figure, path))
    return paths


# ============================================================================================
# The command line
# ============================================================================================


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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="runs/NAME", nargs="+")
    for flag, default, text in OPTIONS:
        parser.add_argument(flag, type=type(default), default=argparse.SUPPRESS,
                            choices=("all", "test") if flag == "--effects-from" else None,
                            help=f"{text} [{default}]")
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
    names = [flag[2:].replace("-", "_") for flag, _, _ in OPTIONS] + ["pathways"]
    options = {name: value for name, value in vars(args).items() if name in names}
    for name, value in options.items():
        least = 0 if name == "evaluation_seed" else 1
        if isinstance(value, int) and not least <= value < 2**32:
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and below 2^32")
    if "pathways" in options:
        options["pathways"] = os.path.abspath(options["pathways"])
    if args.figures and (args.predict or args.latents):
        parser.error("--figures evaluates, --predict and --latents do not: use two commands")
    if args.figures:
        pyplot()

    def one(folder):
        """Do what was asked for with one run. Returns its metrics, if it was evaluated."""
        if args.predict or args.latents:
            run = Run(folder, args.device, args.data)
            own = {k: v for k, v in options.items() if k in (
                "ate_particles", "library", "evaluation_seed")}
            if args.predict:
                print(f"{predict(run, args.predict, **own)}\n\nwritten: {folder}/predictions.h5ad")
            if args.latents:
                write_latents(run, evaluation_seed=own.get("evaluation_seed", 0))
                print(f"written: {folder}/latents.h5ad")
            return None
        run, metrics = None, None if args.again else evaluated(folder, options)
        if metrics is None:
            run = Run(folder, args.device, args.data)
            metrics = evaluate(run, **options)
            written = f"\n\nwritten: {folder}/metrics.json, {folder}/effects.h5ad"
            print(f"\n{folder}\n{table(metrics)}{written}")
        elif len(folders) == 1:
            print(f"\n{folder}, as evaluated before (--again evaluates anew)\n{table(metrics)}")
        if args.figures:
            run = run or Run(folder, args.device, args.data)
            figures = [figure_of_training(folder), figure_of_effects(folder, metrics)]
            if run.config["model"] != "cvae":  # it has neither masks nor effects in latent space
                figures.append(figure_of_masks(run, metrics["options"]["pathways"]))
            print("written: " + ", ".join(figures))
        return metrics

    folders, results, failed = [folder.rstrip("/") for folder in args.runs], [], False
    for folder in folders:
        if len(folders) > 1 and not os.path.isfile(os.path.join(folder, "best.pt")):
            print(f"{folder}: passed over, it has no best.pt")
            continue
        try:
            results.append(one(folder))
        except DataError as error:  # of several runs, the others go on
            if len(folders) == 1:
                raise
            print(f"error: {folder}: {error}", file=sys.stderr)
            failed = True
    evaluations = [metrics for metrics in results if metrics is not None]
    if len(evaluations) > 1:
        print(f"\n{table_of_runs(evaluations, args.scale)}")
    if evaluations and args.figures:
        for path in figure_of_combinations(evaluations, os.path.dirname(folders[0]) or "."):
            print(f"written: {path}")
    if failed or not results:
        sys.exit(2)


if __name__ == "__main__":
    data.run(main)
