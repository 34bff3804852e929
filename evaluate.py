"""Evaluate a trained run on its test cells: marginal likelihood, treatment effects, masks.

    python evaluate.py runs/NAME
    python evaluate.py runs/NAME --ate-particles 10000      as in the paper's Table 1

Prints one table and writes, beside the checkpoint, metrics.json and effects.h5ad (perturbation x
gene effects of the model and of the data). In reading order: one function a metric; what the data
say; the baselines; the table.
"""

import argparse
import json
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; see train.py
import numpy as np
import torch

import data
from data import DataError
from sams_vae import average_treatment_effects, predictive_iwelbo
from train import build_model, default_device, load_checkpoint, read_config_screen

SCALES = ("log_normalised", "counts")


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


# ============================================================================================
# What the data say
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


# ============================================================================================
# Evaluation of one run
# ============================================================================================


def evaluate(folder, iwelbo_particles=100, ate_particles=2500, ate_samples=1, effects_from="all",
             seed=0, device=None, data_path=None):
    """Evaluate a run's best checkpoint, write metrics.json and effects.h5ad, return the metrics."""
    device = default_device(device)
    checkpoint = load_checkpoint(folder, "best.pt")
    config = checkpoint["config"] | ({"data": data_path} if data_path else {})
    screen = read_config_screen(config, checkpoint)
    batches = data.Batches(screen, device)
    model = build_model(config, checkpoint["training"]).to(device)
    model.load_state_dict(checkpoint["model"])
    split = {name: cells.numpy() for name, cells in checkpoint["split"].items()}
    torch.manual_seed(seed)

    metrics = {"model": config["model"], "correlated_basal": config["correlated_basal"],
               "correlated_effects": config["correlated_effects"], "seed": config["seed"],
               "step": checkpoint["step"], "validation_loss": checkpoint["best"],
               "iwelbo_particles": iwelbo_particles, "ate_particles": ate_particles,
               "ate_samples": ate_samples, "effects_from": effects_from}

    # Marginal likelihood of the test cells (3.1).
    values = predictive_iwelbo(model, batches.in_order(split["test"]), iwelbo_particles)
    metrics["iwelbo"] = values.double().mean().item()
    metrics["iwelbo_se"] = (values.double().std().item() / math.sqrt(len(values))
                            if len(values) > 1 else math.nan)

    # Effects by the model, by the data and by the baselines (3.2). The control is the last group.
    names, first, group = np.unique(np.where(screen.conditions == "control", "",
                                             screen.conditions).astype(str),
                                    return_index=True, return_inverse=True)
    names, dosages = names[1:], screen.d[first[1:]]  # "" sorts first
    group = np.where(group == 0, len(names), group - 1)
    cells = np.arange(len(group)) if effects_from == "all" else split["test"]
    observed, n_cells = mean_expression(batches, cells, group[cells], len(names) + 1)
    trained, n_train = mean_expression(batches, split["train"], group[split["train"]],
                                       len(names) + 1)
    for n, where in ((n_cells, "cells that effects are taken from"), (n_train, "training cells")):
        if not n[-1]:
            raise DataError(f"{screen.path}: no control among the {where}: there is nothing to "
                            "compare with")
    by_model = average_treatment_effects(model, torch.from_numpy(dosages).to(device),
                                         ate_particles, ate_samples, seed=seed)
    n_perturbed = (dosages != data.NONE).sum(1)
    groups = {"": n_cells[:-1] > 0}
    groups["_pairs"] = groups[""] & (n_perturbed == 2)
    groups["_held_out"] = groups[""] & (n_train[:-1] == 0)
    effects = {}
    for scale in SCALES:
        effects[f"data_{scale}"] = observed[scale][:-1] - observed[scale][-1]
        effects[f"model_{scale}"] = by_model[scale].cpu().numpy()
        rows = {"": effects[f"model_{scale}"]}
        rows |= {f"{name}_": effect for name, effect in
                 baseline_effects(trained[scale], n_train, dosages).items()}
        for prefix, effect in rows.items():
            for suffix, chosen in groups.items():
                metrics[f"{prefix}ate_pearson_{scale}{suffix}"] = pearson(
                    effect[chosen], effects[f"data_{scale}"][chosen])
    metrics |= {f"n_conditions{suffix}": int(chosen.sum()) for suffix, chosen in groups.items()}

    # Masks, where the truth is known.
    truth = data.read_simulation(config["data"])
    row = {name: t for t, name in enumerate(truth[0])} if truth is not None else {}
    if row.keys() >= set(screen.perturbations):
        true_mask = truth[1][[row[name] for name in screen.perturbations]]
        metrics |= mask_recovery(true_mask, model.mask_probability().detach().cpu().numpy())

    metrics = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in metrics.items()}
    data.write_h5ad(
        os.path.join(folder, "effects.h5ad"), X=effects["model_log_normalised"].astype(np.float32),
        obs={"condition": names.astype(object), "n_cells": n_cells[:-1],
             "n_training_cells": n_train[:-1], "n_perturbations": n_perturbed},
        var={"gene": screen.gene_names},
        layers={k: v.astype(np.float32) for k, v in effects.items()},
        uns={"effects_from": effects_from})
    with data.replacing(os.path.join(folder, "metrics.json")) as path, open(path, "w") as file:
        json.dump(metrics, file, indent=2)
    return metrics


def table(metrics):
    """The metrics of one run as Markdown, the model beside the baselines."""
    lines = [f"test IWELBO (predictive, K = {metrics['iwelbo_particles']}): "
             f"{metrics['iwelbo']:.2f}" + (
                 f" +- {metrics['iwelbo_se']:.2f} (standard error over cells)"
                 if metrics["iwelbo_se"] is not None else "")]
    if "mask_f1" in metrics:
        lines.append(f"mask: precision {metrics['mask_precision']:.3f}, recall "
                     f"{metrics['mask_recall']:.3f}, F1 {metrics['mask_f1']:.3f}")
    columns = [("", metrics["model"]), ("no_change_", "no change"),
               ("perturbed_mean_", "perturbed mean"), ("additive_", "additive")]
    lines += ["", f"| ATE-Pearson, effects in {metrics['effects_from']} cells | "
              + " | ".join(name for _, name in columns) + " |", "|---|" + "---|" * len(columns)]
    for scale in SCALES:
        for suffix, words in (("", "conditions"), ("_pairs", "pairs"), ("_held_out", "held out")):
            n = metrics[f"n_conditions{suffix}"]
            values = [metrics[f"{name}ate_pearson_{scale}{suffix}"] for name, _ in columns]
            if n:
                lines.append(f"| {scale.replace('_', '-')}, {n} {words} | " + " | ".join(
                    "-" if v is None else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def main(arguments=None):
    """Evaluate a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="runs/NAME")
    parser.add_argument("--iwelbo-particles", type=int, default=100, help="K of 3.1 (paper: 100)")
    parser.add_argument("--ate-particles", type=int, default=2500,
                        help="K of 3.2 (paper: Replogle 10,000, Norman 2,500)")
    parser.add_argument("--ate-samples", type=int, default=1, help="sampled cells per particle; 1")
    parser.add_argument("--effects-from", choices=("all", "test"), default="all",
                        help="cells that data effects are taken from (paper's Table 1: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all sampling; 0")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--data", metavar="FILE.h5ad", help="the data, if they have moved")
    args = parser.parse_args(arguments)
    for option, least in (("iwelbo_particles", 1), ("ate_particles", 1), ("ate_samples", 1),
                          ("seed", 0)):
        if not least <= getattr(args, option) < 2**32:
            parser.error(f"--{option.replace('_', '-')} must be at least {least} and below 2^32")
    folder = args.run.rstrip("/")
    metrics = evaluate(folder, args.iwelbo_particles, args.ate_particles, args.ate_samples,
                       args.effects_from, args.seed, args.device, args.data)
    print(f"\n{folder}\n{table(metrics)}\n\nwritten: {folder}/metrics.json, {folder}/effects.h5ad")


if __name__ == "__main__":
    data.run(main)
