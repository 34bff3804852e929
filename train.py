"""Train SAMS-VAE, or a model it is compared with, on an .h5ad file or on a simulated screen.

    python train.py                               simulate a screen, train on it, evaluate: minutes
    python train.py --data replogle.h5ad --preset replogle         as in the paper's Table 1
    python train.py --data norman.h5ad --preset norman-ood --train-combinations 0.5 --split-seed 1
    python train.py --data screen.h5ad --perturbation-column gene --control non-targeting
    python train.py --resume runs/NAME            go on where a run was stopped
    python train.py --adapt runs/NAME --data new.h5ad       what other perturbations do, in minutes
    torchrun --nproc-per-node 4 train.py --data screen.h5ad        a process for each of 4 GPUs
    python train.py --benchmark --preset replogle          how fast is it on this machine?

Defaults in brackets are the paper's; for a file without --preset, `own_settings` below says what
takes the place of many.

A run is a folder, runs/NAME: config.json (every option), log.jsonl (a line per log step and per
validation), best.pt (lowest validation loss) and last.pt (to resume). Then: evaluate.py runs/NAME.
In reading order: the options; the loop (`train`); how a run begins and goes on; the pieces of the
loop; several processes; how options are read; the benchmark.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import types

import data  # before torch: it sets what makes a CPU fast
import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode  # undocumented; --benchmark alone

import evaluate
from data import AT_LEAST_0, AT_LEAST_1, DataError, add_options, option_name
from sams_vae import (MODELS, average_treatment_effects, begin_masks, continue_from, elbo, iwelbo,
                      kept_weights, learn_others_only)

# ============================================================================================
# The options: name, default, what is allowed, what it is and where the default comes from
# ============================================================================================

POSITIVE = (1e-30, 2**32, "positive and below 2^32")

# "Replogle" and "Norman" are the settings of the paper (A.4) and its code for its two data sets.
MODEL_OPTIONS = [  # 2.1 to 2.4: the arguments of SAMSVAE
    ("--correlated-basal", True, bool, "q(z_basal) sees z_pert too (paper: best row of Table 1)"),
    ("--correlated-effects", True, bool, "q(e | m) in place of q(e) (paper: best of "
     "Table 1); always off with --axes sparsest"),
    ("--n-latent", 100, AT_LEAST_1, "latent dimensions (Replogle; Norman 200)"),
    ("--n-hidden", 400, AT_LEAST_1, "width of encoder and decoder (paper)"),
    ("--n-layers", 1, AT_LEAST_1, "hidden layers of encoder and decoder (paper)"),
    ("--effect-hidden", 200, AT_LEAST_1, "width of f_emb (Replogle; Norman 400)"),
    ("--effect-layers", 2, AT_LEAST_1, "hidden layers of f_emb (Replogle; Norman 4)"),
    ("--alpha", 0.001, (1e-30, 1 - 1e-6, "from 1e-30 to 1 - 1e-6"),
     "prior probability of a mask entry (Replogle; Norman 0.01)"),
    ("--beta", 1.0, POSITIVE, "prior variance of an effect (paper)"),
    ("--mask-a", 1.0, POSITIVE, "a of the Beta(a, b) of mask probabilities, Beta-Bernoulli (ours)"),
    ("--mask-b", 2.0, POSITIVE, "b of the same, and of SVAE+'s Beta(1, b) (paper, for SVAE+)"),
]
OPTIONS = [
    ("--model", "sams-vae", list(MODELS), "sams-vae; the same with a Beta-Bernoulli prior of the "
     "mask; cpa-vae: every mask entry is 1; svae+; cvae: the conditional VAE"),
    ("--axes", "sparsest", ["learned", "sparsest"], "of the masks: as training leaves them (paper) "
     "or the sparsest, with masks from half of the steps on at the latest (ours: see begin_masks)"),
    *MODEL_OPTIONS,
    # the optimisation (2.3, A.4)
    ("--steps", 150_000, AT_LEAST_1, "training steps (Replogle; Norman 30,000)"),
    ("--batch-size", 512, AT_LEAST_1, "cells per step, of all processes together (paper)"),
    ("--particles", 5, AT_LEAST_1, "Monte Carlo samples per step (paper)"),
    ("--lr", 3e-4, POSITIVE, "learning rate of Adam (paper)"),
    ("--mask-lr", 0.03, POSITIVE, "that of masks with --axes sparsest: of logits, which have a "
     "scale of their own (ours)"),
    ("--effect-lr", 0.0, AT_LEAST_0, "that of a free q(e), which few cells of a batch move; 0 for "
     "that of the networks (paper; ours 0.01)"),
    ("--weight-decay", 1e-6, AT_LEAST_0, "of Adam (paper)"),
    ("--start", "data", ["data", "zero"], "of the decoder's last bias and of dispersions: from the "
     "training cells (ours: see training_statistics in data.py), or zero (paper)"),
    ("--kl-warmup", 0, AT_LEAST_0, "first steps, in which the weight of all KL rises to 1: what "
     "changes one gene alone is lost less (ours; off)"),
    ("--patience", 0, AT_LEAST_0, "steps without a lower validation loss after which masks begin, "
     "from the best weights so far, or training ends; 0 for never (paper; ours by the screen)"),
    ("--clip", 0.0, AT_LEAST_0, "largest gradient norm, 0 for none (Replogle none; Norman 100)"),
    ("--seed", 0, AT_LEAST_0, "of the weights and of training (paper: five seeds)"),
    # the split (4.1, 4.2)
    ("--split", "random", data.SPLITS, "Replogle random; Norman two tasks, see data.py"),
    ("--train-combinations", 1.0, (0, 1, "a fraction, from 0 to 1"), "part of the combinations, or "
     "of their cells, that the Norman splits train on (Norman 0, 0.25, 0.5, 0.75 and 1)"),
    ("--split-seed", 0, AT_LEAST_0, "of the split (Replogle 0, Norman 0 to 4)"),
    # the run (ours)
    ("--precision", "float32", ["float32", "tf32", "bf16"], "of matrix products in training; tf32 "
     "makes a difference on a GPU only"),
    ("--compile", False, bool, "compile the objective with torch.compile"),
    ("--stream", None, bool, "leave the counts in the file and read them as they are needed; by "
     "default where they may take half of the memory"),
    ("--log-every", 50, AT_LEAST_1, "steps between lines of log.jsonl"),
    ("--validate-every", 500, AT_LEAST_1, "steps between validations, each saving last.pt"),
]
SIMULATION_OPTIONS = [  # of the screen that is simulated without --data
    *(("--simulated-" + flag[2:], *row) for flag, *row in data.SIMULATION_OPTIONS
      if flag not in ("--sparse-shift", "--seed")),  # the former: --preset sparse-shift
    ("--simulated-seed", 0, AT_LEAST_0, "its seed; if not given, --seed"),
]


def own_settings(n_cells, n_perturbations, n_latent=None):
    """Settings of a file without --preset, by its training cells (64 % of all; those of the other
    splits would differ between seeds), its perturbations and --n-latent (ours).

    A flag overrides each. Chosen by validation loss, and by treatment effects in validation cells,
    on two real files and four simulated screens like those of the README, of 4,000 to 13,000
    training cells; above 50,000 cells or 300 perturbations nothing was measured, and what changes
    leans on the paper.

    A free q(e), since f_emb costs a small screen much. One particle: a step takes about 0.6 times
    as long as with five, and more steps are worth more. Effects learn faster than networks, as few
    cells of a batch move each. A perturbation touches three latents a priori. A small screen is
    soon known by heart, the more so the shallower it is: hence the patience.
    """
    epoch = math.ceil(n_cells / 256)  # steps
    large, n_latent = n_cells > 50_000, n_latent or (30 if n_perturbations <= 300 else 100)
    return dict(
        correlated_effects=False, n_latent=n_latent, alpha=min(0.5, 3 / n_latent),
        n_hidden=400 if large else 100,
        batch_size=256, particles=1, lr=1e-3 if large else 3e-3, effect_lr=0.01, clip=100.0,
        steps=min(max(3000, 100 * epoch), 50_000), validate_every=min(max(50, epoch), 500),
        patience=max(500, 20 * epoch))


# What --adapt changes of the run that it adapts. Chosen on the screen that the preset sparse-shift
# was chosen on, by validation loss.
ADAPTED = dict(steps=2000, lr=5e-3, effect_lr=0.02, mask_lr=0.03, patience=500, validate_every=100)
# What --preset changes. A flag overrides it. The defaults above are those for Replogle already, so
# that its row says how to read the file, and what of ours is not the paper's.
PAPER = dict(axes="learned", start="zero", min_cells=0)
NORMAN = PAPER | dict(one_hot_prefix="guide_", layer="counts", gene_column="highly_variable",
                      n_latent=200, effect_hidden=400, effect_layers=4, alpha=0.01, steps=30_000,
                      clip=100.0)
PRESETS = {
    "replogle": PAPER | dict(perturbation_column="sgID_AB", control=["*non-targeting*"]),
    "norman-ood": NORMAN | dict(split="norman-ood"),
    "norman-data-efficiency": NORMAN | dict(split="norman-data-efficiency"),
    # Where there is no --data. A small screen needs a small model, and minutes allow few steps:
    # hence the higher learning rate.
    "simulated": dict(n_latent=10, n_hidden=100, effect_hidden=100, alpha=0.01, steps=5000,
                      batch_size=256, lr=1e-2, start="zero", min_cells=0, split_column="split"),
    # The benchmark of the SVAE+ paper, without --data or on a file of data.py simulate. Chosen on a
    # screen of seed 100: sizes and rates by validation loss, what makes masks sparse (alpha,
    # mask_b) by F1 of targets. So small an alpha, since the latent space is bent, and what is zero
    # in the true one is small here, but clear in hundreds of cells.
    "sparse-shift": dict(n_latent=15, n_hidden=200, n_layers=2, alpha=1e-30, mask_b=100.0,
                         steps=5000, batch_size=256, particles=1, lr=1e-3, effect_lr=0.01,
                         clip=100.0, min_cells=0, split_column="split") | {
        f"simulated_{name}": data.SPARSE_SHIFT[name]
        for name in ("perturbations", "cells", "pairs", "effect")},
}


# ============================================================================================
# The loop
# ============================================================================================


def main(arguments=None):
    """Train: read the options, begin a run or go on with one, train, evaluate a simulated one.
    Returns the run's folder."""
    args, given = parse_arguments(arguments)
    device = begin_processes(args.device)  # more than one if torchrun starts this
    if args.benchmark:
        if n_ranks() > 1:
            raise DataError("--benchmark is for one process: leave torchrun out")
        return benchmark(configuration(args, given), device)
    # A new run is written down at step 0. From here on, every run is one that is gone on with.
    with contextlib.ExitStack() as lock:  # of the run's folder
        if rank() == 0:
            folder, screen, state = (
                resume_run(args, given, lock) if args.resume is not None else
                new_run(args.name, configuration(args, given), device, lock))
            from_first((folder, state["config"]))
        else:
            try:
                folder, config = from_first()
            except DataError:  # the first one has said what is wrong
                sys.exit(2)
            state = evaluate.load_checkpoint(folder, "last.pt") | {"config": config}
            screen = evaluate.as_the_model_sees(
                evaluate.read_screen_of(config, state), config["model"], state["perturbations"])
        if state["done"] and not state["step"]:
            print(f"{folder}: no perturbation is new, so that there is nothing to learn; what the "
                  "model knows can be tried on this file")
        else:
            train(folder, screen, state, device, "steps" in given)
    if rank() == 0 and state["config"].get("simulated"):
        torch.set_float32_matmul_precision("highest")
        evaluate.main([folder, "--device", str(device)])
    else:
        print(f"next: python evaluate.py {folder}")
    return folder


def train(folder, screen, state, device, more_steps):
    """The loop: go on from a state, to the number of steps, until a signal comes or, unless
    more_steps were asked for, until it is done by --patience. Ends the program at a signal."""
    config, split = state["config"], {k: v.numpy() for k, v in state["split"].items()}
    step, best, best_step = state["step"], state["best"], state["best_step"]
    print("  split: " + ", ".join(f"{len(cells):,} {name}" for name, cells in split.items()))

    with signals_remembered() as stop:  # Ctrl-C ends the loop after the step that is running
        # What moves while the model is trained, all of it where the run had it.
        batches = data.Batches(screen, device)
        model = evaluate.build_model(state).to(device)
        model.masks_of_one = model.masks_of_one or step < config["masks_from"]
        taught_by = split
        if config.get("adapt"):
            learn_others_only(model, state["known"])
            taught_by = evaluate.with_new_perturbations(split, screen, state["n_known"])
        optimizer = new_optimizer(model, config)
        optimizer.load_state_dict(state["optimizer"])
        shuffle = data.Shuffle(batches, taught_by["train"], config["batch_size"], config["seed"],
                               **state["shuffle"], rank=rank(), n_ranks=n_ranks())
        # Any batch of the right size, to try --compile on; the shuffle does not move.
        batch = batches(np.resize(taught_by["train"], config["batch_size"] // n_ranks()))
        objective = choose_objective(config, model, *batch)
        seconds = seconds_per_step(objective, model, config["particles"], *batch)
        log = Log(folder, config, state)
        # Last of all, since what was built above has drawn random numbers of its own.
        set_random_state(state["rng"], config["seed"], device)

        def save(name):
            """Write best.pt or last.pt: everything that is needed to go on."""
            state.update(step=step, best=best, best_step=best_step, done=done,
                         model=model.state_dict(), log=log.state(),
                         optimizer=optimizer.state_dict(), rng=of_all(random_state(device)),
                         shuffle={"epoch": shuffle.epoch, "position": shuffle.position})
            if rank() == 0:
                evaluate.save_checkpoint(state, folder, name)

        print(f"{folder}: {config['model']}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {len(taught_by['train']):,} training cells"
              + " with new perturbations" * bool(config.get("adapt")) + f", steps {step:,} to "
              f"{config['steps']:,} on {device}, "
              + (f"{n_ranks()} processes of {config['batch_size'] // n_ranks()} cells a step, "
                 if n_ranks() > 1 else "") + f"counts {batches.where}, at most about "
              f"{clock((config['steps'] - step) * seconds)}")
        # A step: a batch, one draw of every latent per particle, the ELBO per cell, its gradient,
        # Adam. Each cell pays its share of the global KL (A.1), so no step looks beyond its batch.
        done = step >= config["steps"] or (state["done"] and not more_steps)
        if done:
            print(f"{folder} has ended, at step {step:,}: more --steps would go on")
        while not done and not one_of_all(stop, step):
            x, d, c = next(shuffle)
            weight = ({"kl_weight": torch.tensor((step + 1) / config["kl_warmup"], device=device)}
                      if step + 1 < config["kl_warmup"] else {})
            # The ELBO: eq. 3, A.1
            value, terms = objective(model, x, d, config["particles"], c, **weight)
            optimizer.zero_grad(set_to_none=True)
            (-value).backward()
            average_gradients(model)
            if config["clip"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
            optimizer.step()
            step += 1
            masks_begin = step == config["masks_from"]
            if masks_begin:  # --axes sparsest: so far they were masks of one
                if config["patience"] and best < math.inf:  # their best weights
                    warm = evaluate.load_checkpoint(folder, "warm.pt")
                    model.load_state_dict(warm["model"])
                    optimizer.load_state_dict(warm["optimizer"])
                best, best_step = math.inf, step
                touched = begin_masks(model)
                as_first(model)
                for name, parameter in model.named_parameters():
                    if name.startswith("effect_"):  # Adam's moments are in the old axes
                        optimizer.state.pop(parameter, None)
            # Sums on the device: but for the order of cells, once per epoch, nothing has waited for
            # a GPU so far.
            log.add(terms, value)

            validate = (step % config["validate_every"] == 0 or step == config["steps"]
                        or masks_begin)
            if validate or step % config["log_every"] == 0:
                line = log.means(step, shuffle.epoch, model)
                if masks_begin:
                    line["latents_touched"] = [round(n, 2) for n in touched]
                if validate:
                    loss = from_first(validation_loss(
                        model, batches, taught_by["validation"], config["particles"])
                        if rank() == 0 else None)
                    if not math.isfinite(loss):
                        raise DataError("the validation loss was not finite: start a new run with "
                                        "a lower --lr, or with --clip 100")
                    line["validation_loss"] = round(loss, 4)
                    has_masks = step >= config["masks_from"]
                    if loss < best and step >= config["kl_warmup"]:
                        best, best_step = loss, step
                        if has_masks or config["patience"]:
                            save("best.pt" if has_masks else "warm.pt")
                    since = step - max(best_step, config["kl_warmup"])
                    if config["patience"] and since >= config["patience"]:
                        if has_masks:
                            done = True
                        else:
                            config["masks_from"] = min(config["masks_from"], step + 1)
                            if rank() == 0:
                                write_config(folder, config)
                done = done or step == config["steps"]
                log.write(line, best, done)
                if validate:
                    save("last.pt")  # after the line: what stands beyond last.pt is written again
                if masks_begin and rank() == 0:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(os.path.join(folder, "warm.pt"))
        if not done:
            log.check_finite(step)
            save("last.pt")
            print(f"\nstopped at step {step:,}; to go on: python train.py --resume {folder}")
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
    print(f"{log.steps_here:,} steps in {time.time() - log.started:.0f} s; lowest validation loss "
          f"{best:.2f}, at step {best_step:,}" + ("; ended by --patience" if step < config["steps"]
                                                  else ""))


# ============================================================================================
# How a run begins, and how it goes on
# ============================================================================================


def new_run(name, config, device, lock):
    """Begin a run: its folder, its screen, and the state that last.pt holds at step 0.

    Raises DataError for a wrong file or option, and leaves nothing then."""
    simulated = config["data"] is None
    if not simulated:  # the folder comes last: reading may take long, and fail
        screen, state = first_state(config, device)
    folder = new_folder(name, config, lock)
    try:
        if simulated:
            config |= {"data": os.path.abspath(f"{folder}/simulated.h5ad"), "simulated": True}
            data.simulate(config["data"], **(
                data.SPARSE_SHIFT if config["preset"] == "sparse-shift" else {}) | {
                    name.removeprefix("simulated_"): value for name, value in config.items()
                    if name.startswith("simulated_")})
            screen, state = first_state(config, device)
        write_config(folder, config)
        evaluate.save_checkpoint(state, folder, "last.pt")
        if state["done"]:  # with --adapt: there is nothing to learn
            evaluate.save_checkpoint(state, folder, "best.pt")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, screen, state


def new_folder(name, config, lock):
    """Create runs/NAME, locked; without a name, one made of the options that is still free. One
    that a killed start has left is free, too."""
    source = os.path.splitext(os.path.basename(config["data"] or "simulated"))[0][:80]
    guide = "-".join(word for word, on in (("basal", config["correlated_basal"]),
                                           ("effects", config["correlated_effects"]),
                                           ("sparsest", config["axes"] == "sparsest")) if on)
    base = f"{source}-{config['model']}-{guide or 'mean-field'}"
    if config["adapt"]:
        base = f"{source}-adapted-{os.path.basename(config['adapt'])[:80]}"
    elif config["split"] != "random":
        base += f"-f{config['train_combinations']:g}-split{config['split_seed']}"
    base, n = name or f"{base}-seed{config['seed']}", 1
    while True:
        folder = os.path.join("runs", base if n == 1 else f"{base}-{n}")
        is_new = True
        try:
            os.makedirs(folder)  # of several processes, one makes it
        except FileExistsError:
            is_new = False
        with contextlib.suppress(DataError):  # another process has it
            if is_new or is_left_over(folder):
                if lock.enter_context(alone_in(folder)) or is_new:
                    return folder
        if name:
            raise DataError(f"{folder} exists: choose another --name, or --resume {folder}")
        n += 1


def is_left_over(folder):
    """Whether it holds no more than what a start writes before its first checkpoint."""
    first = r"(simulated\.h5ad|config\.json)(\.writing)?|last\.pt\.writing"
    return os.path.isdir(folder) and all(re.fullmatch(first, name) for name in os.listdir(folder))


@contextlib.contextmanager
def alone_in(folder):
    """Lock a run's folder, as two processes that train one run would write over each other's files.
    The system frees it when this process ends, in whatever way. Gives whether that can be done.
    Raises DataError where another process has locked it."""
    try:
        import fcntl  # not on Windows

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # or there is no such folder
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except BlockingIOError:
        os.close(handle)
        raise DataError(f"{folder}: another process is training this run: wait for it, or stop it"
                        ) from None
    except OSError:  # a file system without locks
        locked = False
    try:
        yield locked
    finally:
        os.close(handle)


def first_state(config, device):
    """The screen of a new run as its model sees it, and the state of step 0."""
    if config["adapt"]:
        return adapted_state(config)
    screen = evaluate.read_screen_of(config)
    data.say(screen.path, *screen.notes, *data.unbalanced(screen, [
        screen.label_column, config["split_column"], *(config["covariate"] or [])]))
    split = data.split_cells(screen, config["split_seed"], config["split"],
                             config["train_combinations"])
    fingerprint, n_perturbations = screen.fingerprint(), len(screen.perturbations)
    screen = evaluate.as_the_model_sees(screen, config["model"])
    if len(screen.perturbations) > n_perturbations:
        print(f"  {config['model']} does not add effects up: the combinations are perturbations of "
              f"their own, {len(screen.perturbations):,} in all; those without training cells have "
              "no effect")

    # What the model knows of the training cells (n_t of A.1; the encoder's standardisation), and
    # its first weights.
    batches = data.Batches(screen, device)
    if batches.from_file:  # in which neighbours are read together
        split = {name: np.sort(cells) for name, cells in split.items()}
    x_mean, x_std, log_frequency, log_theta = data.training_statistics(batches, split["train"])
    by_screen = own_settings(0.64 * len(screen.rows), n_perturbations, config["n_latent"])
    config |= {option: by_screen[option] for option in by_screen if config[option] is None}
    config |= {"stream": batches.from_file, "processes": n_ranks()}
    check_shares(config)
    if config["axes"] == "sparsest":
        config["masks_from"] = math.ceil(config["steps"] / 2)
    if config["kl_warmup"] >= (config["masks_from"] or config["steps"] + 1):
        raise DataError(f"--kl-warmup {config['kl_warmup']} is too long: it must end before masks "
                        f"begin, at step {config['masks_from']}, of {config['steps']} steps")
    d = screen.d[split["train"]]
    n_cells = np.bincount(d[d != data.NONE], minlength=len(screen.perturbations))
    arguments = {option_name(flag): config[option_name(flag)] for flag, *_ in MODEL_OPTIONS}
    arguments |= {"n_cells": torch.from_numpy(n_cells), "x_mean": x_mean.cpu(),
                  "x_std": x_std.cpu(), "n_covariates": len(screen.covariates)}
    with torch.device("meta"):  # takes no memory
        n_parameters = sum(p.numel() for p in MODELS[config["model"]](**arguments).parameters())
    if 16 * n_parameters > data.memory():  # with gradient and Adam's two moments
        raise DataError(f"the model would take {data.size_in_words(16 * n_parameters)} in training "
                        f"of {data.size_in_words(data.memory())} of memory: it needs a smaller "
                        "--n-hidden, --n-latent or --n-layers")
    torch.manual_seed(config["seed"])
    model = MODELS[config["model"]](**arguments)
    for value, name in enumerate(screen.covariates):
        if not (screen.c[split["train"]] == value).any():
            print(f"  {name}: no training cell; its cells are taken as of unknown covariate")
            for network in (model.encoder, model.decoder):
                network.first.weight.data[:, network.part_sizes[0] + value] = 0
    if config["start"] == "data":
        model.start_from(log_frequency, log_theta)
    return screen, state_of(config, screen, fingerprint, split, arguments, model)


def state_of(config, screen, fingerprint, split, arguments, model):
    """What best.pt and last.pt hold, at step 0."""
    return {
        "config": config, "fingerprint": fingerprint, "gene_names": list(screen.gene_names),
        "perturbations": screen.perturbations, "covariates": screen.covariates,
        "model_arguments": arguments,
        "split": {k: torch.from_numpy(v) for k, v in split.items()},
        # ... and what moves:
        "step": 0, "best": math.inf, "best_step": 0, "done": False,
        "model": model.state_dict(), "log": ({}, 0, 0.0),
        "optimizer": new_optimizer(model, config).state_dict(),
        "rng": [{"cpu": torch.get_rng_state()}], "shuffle": {"epoch": 0, "position": 0}}


def adapted_state(config):
    """The same of --adapt: the model of another run, with places for the perturbations of this
    file that it does not know. It keeps what it knows of cells, and of the others."""
    base = evaluate.load_checkpoint(config["adapt"], "best.pt")
    screen = evaluate.read_screen_of(config, adapt=base)
    data.say(screen.path, *screen.notes)
    split, fingerprint = data.split_cells(screen, config["split_seed"]), screen.fingerprint()
    config |= {"stream": isinstance(screen.counts, data.StoredCounts), "processes": n_ranks()}
    if config["stream"]:  # neighbours are read together
        split = {name: np.sort(cells) for name, cells in split.items()}

    # Perturbations: first those that the model has been trained on.
    arguments, model_class = base["model_arguments"], MODELS[config["model"]]
    trained = torch.nonzero(base["model"]["n_cells"] > 0).flatten()
    known = [base["perturbations"][t] for t in trained]
    screen = evaluate.as_the_model_sees(screen, config["model"])
    new = sorted(set(screen.perturbations) - set(known))
    shared = len(screen.perturbations) - len(new)
    screen = data.renumbered(screen, known + new)
    d = screen.d[split["train"]]
    n_cells = torch.from_numpy(np.bincount(d[d != data.NONE], minlength=len(known) + len(new)))
    unknown = int((n_cells[len(known):] == 0).sum())
    print(f"  perturbations: {len(known):,} known to {config['adapt']}, {shared:,} of them in this "
          f"file; {len(new):,} new ones"
          + (": " + ", ".join(new[:5]) + ", ..." * (len(new) > 5) if new else "")
          + f"; {unknown:,} of these have no training cells" * (unknown > 0))
    probability = evaluate.build_model(base).mask_probability()[trained]
    vague = ((probability > 0.1) & (probability < 0.9)).float().mean().item()
    if vague > 0.01:
        print(f"  warning: {vague:.0%} of the mask entries of {config['adapt']} have a probability "
              "between 0.1 and 0.9, and are rounded, which changes the effects of known "
              "perturbations: more --steps for that run would make it surer of them")

    weights = kept_weights(model_class, arguments, base["model"], trained,
                           torch.arange(len(screen.gene_names)))
    n_cells[:len(known)] = weights["n_cells"]
    arguments = arguments | {
        "n_cells": n_cells, "x_mean": weights["x_mean"], "x_std": weights["x_std"]}
    torch.manual_seed(config["seed"])
    model = model_class(**arguments)
    continue_from(model, weights)
    shapes = {name: list(value.shape) for name, value in weights.items()}
    learn_others_only(model, shapes)
    learned_from = evaluate.with_new_perturbations(split, screen, len(known))
    if new and not (len(learned_from["train"]) and len(learned_from["validation"])):
        raise DataError(f"{config['data']}: no training cell, or no validation cell, has a new "
                        "perturbation: more cells, or another --split-seed, are needed")
    return screen, state_of(config, screen, fingerprint, split, arguments, model) | {
        "known": shapes, "n_known": len(known), "done": not new}


def resume_run(args, given, lock):
    """Go on with args.resume: its folder, locked, its screen, and the state of last.pt."""
    folder = args.resume.rstrip("/")
    lock.enter_context(alone_in(folder))
    state = evaluate.load_checkpoint(folder, "last.pt")
    # What may change: how long and how fast, not what is trained. A file may have moved; the
    # fingerprint says whether it is the same.
    config, free = state["config"], ("steps", "compile", "precision")
    if args.name or any(given[k] != config.get(k) for k in given if k not in free):
        raise DataError(f"--resume takes its options from {folder}; only --steps, --compile, "
                        "--precision, --device and --data (a file that has moved) can be given")
    # Masks begin at half of the steps that are asked for now, unless patience said when.
    moves = config["masks_from"] == math.ceil(config["steps"] / 2)
    config |= {k: given[k] for k in free if k in given} | {"processes": n_ranks()}
    check_shares(config)
    config["data"] = os.path.abspath(args.data) if args.data else config["data"]
    if config["steps"] < state["step"]:
        raise DataError(f"{folder} is at step {state['step']:,} already: --steps must be larger")
    if moves and state["step"] < config["masks_from"]:
        config["masks_from"] = max(state["step"] + 1, math.ceil(config["steps"] / 2))
    screen = evaluate.read_screen_of(config, state)
    data.say(screen.path, *screen.notes)
    write_config(folder, config)
    return folder, evaluate.as_the_model_sees(
        screen, config["model"], state["perturbations"]), state


def write_config(folder, config):
    """config.json, for people; programs read the configuration of a checkpoint."""
    with data.replacing(os.path.join(folder, "config.json")) as path, open(path, "w") as file:
        json.dump(config, file, indent=2)


# ============================================================================================
# The pieces of the loop
# ============================================================================================


def new_optimizer(model, config):
    """Adam (A.4); masks and effects may have learning rates of their own (ours)."""
    own = config["axes"] == "sparsest" or config.get("adapt")
    lr = {"mask": config["mask_lr"] if own else config["lr"],
          "effect": config["effect_lr"] or config["lr"], "": config["lr"]}
    groups = {kind: [] for kind in ("", "mask", "effect")}
    for name, parameter in model.named_parameters():
        kind = name.split("_")[0]
        groups[kind if kind in groups else ""] += [parameter] * parameter.requires_grad
    return torch.optim.Adam([{"params": groups[kind], "lr": lr[kind]} for kind in groups],
                            weight_decay=config["weight_decay"], fused=True)


def choose_objective(config, model, x, d, c):
    """The ELBO of eq. 3 in the precision that is wanted, and compiled if that is wanted.

    A compiled one is tried on the batch x, d, c: raises DataError where it fails."""
    torch.set_float32_matmul_precision("high" if config["precision"] == "tf32" else "highest")
    # Parameters stay in single precision, and so does nearly everything that is no product:
    # torch.autocast lowers linear layers alone, and MLP makes its output float32 again.
    objective = elbo
    if config["precision"] == "bf16":
        objective = torch.autocast(x.device.type, torch.bfloat16)(elbo)
    if not config["compile"]:
        return objective
    objective = torch.compile(objective)
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            objective(model, x, d, config["particles"], c)[0].backward()
    except Exception as error:  # no compiler, or whatever goes wrong in one
        raise DataError(f"--compile: torch.compile fails on this machine ({type(error).__name__}): "
                        "leave it out, or --no-compile with --resume") from None
    model.zero_grad(set_to_none=True)
    return objective


def seconds_per_step(objective, model, n_particles, x, d, c):
    """How long a step will take, about: of three, the fastest. Trains nothing, draws no random
    numbers that training would."""
    seconds = []
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        for _ in range(3):
            start = time.perf_counter()
            value, _ = objective(model, x, d, n_particles, c)
            value.backward()
            model.zero_grad(set_to_none=True)
            value.item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
    return min(seconds)


@torch.no_grad()
def validation_loss(model, batches, cells, n_particles):
    """Mean over the validation cells of what `elbo` says of each, negated.

    n_t is that of the training cells: the KL of t weighs as much beside a cell as in training.
    Always with the same random numbers, so that checkpoints are compared under the same noise, and
    without touching the generator that training uses.
    """
    total = 0.0  # then a tensor: the loop below does not wait for a GPU either
    with torch.random.fork_rng([batches.device] if batches.device.type == "cuda" else []):
        torch.manual_seed(0)
        for x, d, c in batches.in_order(cells):
            total = total - elbo(model, x, d, n_particles, c)[0].double() * len(x)
    return float(total) / len(cells)


class Log:
    """log.jsonl and the line on the screen: means of all terms over the steps since the last line.

    The sums are a part of last.pt, so that a run that was interrupted leaves the same lines as one
    that was not (but for cells per second)."""

    def __init__(self, folder, config, state):
        self.path, self.config = os.path.join(folder, "log.jsonl"), config
        self.totals, self.n_steps, seconds = state["log"]
        self.started, self.steps_here = time.time(), 0
        self.since = self.started - seconds
        self.terminal = sys.stdout.isatty()
        if rank() > 0:
            return
        # The steps after last.pt are done again: their lines go.
        kept = [line for line in evaluate.read_log(folder) if line["step"] <= state["step"]]
        with data.replacing(self.path) as path, open(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def state(self):
        """What last.pt keeps of it."""
        self.totals = average(self.totals)
        totals = {name: total.cpu() for name, total in self.totals.items()}
        return totals, self.n_steps, time.time() - self.since

    def add(self, terms, value):
        """A step: the terms of the objective and its value, scalars on the device."""
        terms = terms | {"loss": -value.detach()}
        # .to: the sums of a resumed run were loaded on the CPU. There is no waiting for a GPU.
        self.totals = {name: self.totals[name].to(term.device) + term if self.totals else term
                       for name, term in terms.items()}
        self.n_steps, self.steps_here = self.n_steps + 1, self.steps_here + 1

    def check_finite(self, step):
        """Stop before anything is saved if a loss was not finite."""
        self.totals = average(self.totals)
        if self.totals and not math.isfinite(self.totals["loss"].item()):
            raise DataError(f"the loss was not finite in steps {step - self.n_steps + 1} to {step}:"
                            " start a new run with a lower --lr, or with --clip 100")

    def means(self, step, epoch, model):
        """The next line, as a dict; begins anew."""
        self.check_finite(step)
        line = {"step": step, "epoch": epoch}
        line |= {name: round(float(total) / self.n_steps, 4) for name, total in self.totals.items()}
        if model.has_mask and not model.masks_of_one:
            with torch.no_grad():
                probability = model.mask_probability()[model.n_cells > 0]
            line["mask_probability"] = round(probability.mean().item(), 5)
            line["mask_size"] = round((probability > 0.5).sum(1).float().mean().item(), 3)
        seconds = time.time() - self.since
        line["cells_per_second"] = round(self.n_steps * self.config["batch_size"] / seconds)
        self.totals, self.n_steps, self.since = {}, 0, time.time()
        return line

    def write(self, line, best, done):
        """Write the line, and say it: on a terminal in place, elsewhere at each validation."""
        if rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.since = time.time()  # validation is no training time
        left = (self.config["steps"] - line["step"]) * (self.since - self.started)
        text = (f"step {line['step']:,}  loss {line['loss']:.2f} = data "
                f"{-line['log_likelihood']:.2f} + basal {line['kl_basal']:.2f} + mask "
                f"{line['kl_mask']:.3f} + effect {line['kl_effect']:.3f}  ")
        if "mask_probability" in line:
            text += f"mask probability {line['mask_probability']:.4f}  "
        if "latents_touched" in line:
            before, after = line["latents_touched"]
            text += f"axes turned: {before:.1f} -> {after:.1f} latents per perturbation  "
        if "validation_loss" in line:
            text += f"validation {line['validation_loss']:.2f}  "
        if best < math.inf:
            text += f"best validation {best:.2f}  "
        text += f"{line['cells_per_second']:,} cells/s  {clock(left / self.steps_here)} left"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a longer line would not be overwritten
            text, end = "\r" + text[:width].ljust(width), "\n" if done else ""
        elif "validation_loss" in line:
            end = "\n"
        else:
            return
        with contextlib.suppress(OSError):  # a run outlives its terminal
            print(text, end=end, flush=True)


def clock(seconds):
    """90 -> 1:30."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"


@contextlib.contextmanager
def signals_remembered():
    """A list that fills when Ctrl-C or a polite kill comes, or the terminal closes; a second Ctrl-C
    or kill does what it always did. Outside of the main thread, where none can come, it is empty.
    """
    came, handlers = [], {}
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def remember(number, frame):
        """Note the signal, and let the next one through. (Terminals that close send several.)"""
        came.append(number)
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handlers[number])

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not on Windows
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            handlers[number] = signal.signal(number, remember)
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def random_state(device):
    """The states of the random number generators that training uses."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states, seed, device):
    """Set them again, this process's of the list; what was not in use is seeded."""
    # (On a CPU a generator takes 32 bits of its seed: rank times a large number would be too few.)
    torch.manual_seed(seed if rank() == 0 else
                      int(np.random.SeedSequence((seed, rank())).generate_state(1)[0]))
    state = dict(enumerate(states)).get(rank(), {})
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ============================================================================================
# Several processes: torchrun --nproc-per-node N train.py ...
# ============================================================================================

# Every process has the model, and makes the same steps with it. One random order of cells is for
# all of them: each takes its share of every batch and draws its own latents, and gradients are
# averaged. So two processes do what one does with the same --batch-size, but for masks and effects,
# of which each draws its own. The first one (rank 0) validates, writes and prints.


def begin_processes(device):
    """Join the other processes, if torchrun has started several. Returns this one's device."""
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return evaluate.choose_device(device)
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = evaluate.choose_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # They wait for each other where the first one validates: let it have the time.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=12))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_shares(config):
    """Raise DataError where the cells of a batch cannot be shared out evenly."""
    if config["batch_size"] and config["batch_size"] % n_ranks():  # None: not known yet
        raise DataError(f"--batch-size {config['batch_size']} is no multiple of {n_ranks()}, the "
                        "number of processes")


def together(exchange):
    """A decorator: what all processes do together says in a sentence if one of them has ended."""
    @functools.wraps(exchange)
    def function(*arguments):
        """The same."""
        try:
            return exchange(*arguments)
        except RuntimeError as error:
            if n_ranks() == 1:
                raise
            raise DataError(f"process {rank()} stops, since another one has ended; if the run has "
                            "begun, --resume goes on from its last validation "
                            f"({' '.join(str(error).split())[:100]})") from None
    return function


@together
def from_first(value=None):
    """The first process's value, for all of them."""
    values = [value]
    if n_ranks() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


@together
def of_all(value):
    """The values of all processes, a list."""
    values = [value] * n_ranks()
    if n_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


@together
def one_of_all(flag, step):
    """Whether the flag of one is true. With several they ask each other every tenth step only, so
    as not to wait for each other in each."""
    if n_ranks() == 1 or step % 10:
        return bool(flag) and n_ranks() == 1
    flag = torch.tensor(float(bool(flag)))
    dist.all_reduce(flag)
    return flag.item() > 0


@together
def average(values):
    """A dict of scalars on the device, averaged over processes."""
    if n_ranks() == 1 or not values:
        return values
    mean = torch.stack(list(values.values()))
    dist.all_reduce(mean)
    return dict(zip(values, mean / n_ranks()))


@together
def average_gradients(model):
    """The gradient of the whole batch: the mean of its shares, in one exchange for all parameters.

    A batch, or a share, without a cell that they concern (of controls, say) gives parameters no
    gradient: that is one of zero. But masks of one have none in any batch."""
    parameters = [p for name, p in model.named_parameters()
                  if p.requires_grad and not (model.masks_of_one and name.startswith("mask"))]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if n_ranks() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    parts = (flat / n_ranks()).split([parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad.copy_(part.view_as(parameter))


@together
def as_first(model):
    """Make the model that of the first process."""
    if n_ranks() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


# ============================================================================================
# How the options are read
# ============================================================================================


def parse_arguments(arguments=None):
    """The arguments, and what of a configuration they give explicitly, a dict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--data", metavar="FILE.h5ad", help="counts (default: simulate a screen)")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="settings of the paper's experiments")
    parser.add_argument("--resume", metavar="runs/NAME", help="go on with this run")
    parser.add_argument("--adapt", metavar="runs/NAME", help="a new run: the model of this one, "
                        "which learns the perturbations of --data that it does not know (after "
                        "Lopez et al. 2023)")
    parser.add_argument("--name", help="the run's folder is runs/NAME (default: from the options)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--benchmark", action="store_true",
                        help="time a step, IWELBO and effects on random data; write benchmark.json")
    data.add_screen_options(parser)
    add_options(parser.add_argument_group("the model and its training"),
                OPTIONS + SIMULATION_OPTIONS)
    args = parser.parse_args(arguments)
    own = {option_name(flag) for flag, *_ in OPTIONS + SIMULATION_OPTIONS} | {"preset"}
    given = {k: v for k, v in vars(args).items()
             if k in own.union(data.READING) and v is not None}
    if [args.benchmark, args.resume is not None, args.adapt is not None].count(True) > 1:
        raise DataError("--benchmark, --resume and --adapt exclude each other: each has a model of "
                        "its own")
    if args.name is not None and (args.name in ("", ".", "..")
                                  or args.name != os.path.basename(args.name)):
        raise DataError(f"--name must be a plain name, not {args.name!r}")
    return args, given


def configuration(args, given):
    """Every option of a new run: the default, what the preset changes, what was given."""
    if args.adapt is not None:
        return configuration_of_adapted(args, given)
    if args.data is None and not args.benchmark and args.preset not in (
            None, "simulated", "sparse-shift"):
        raise DataError(f"--preset {args.preset} needs --data")
    config = {"data": args.data and os.path.abspath(args.data), "adapt": None,
              "preset": args.preset if args.data or args.preset or args.benchmark else "simulated"}
    rows = OPTIONS + (SIMULATION_OPTIONS if args.data is None else [])
    config |= dict.fromkeys(data.READING) | {"min_cells": data.MIN_CELLS}
    config |= {option_name(flag): default for flag, default, *_ in rows}
    if args.data and not args.preset and not args.benchmark:  # None: `first_state` knows them
        config |= dict.fromkeys(own_settings(1, 1))
    preset = PRESETS.get(config["preset"], {})
    config |= {option: preset[option] for option in preset if option in config} | given
    if args.data is None and "simulated_seed" not in given:
        config["simulated_seed"] = config["seed"]

    # In the paper, too, the guides of SVAE+ and of the conditional VAE are mean-field. (Runs that
    # differ in an option without meaning would be two rows of a table.)
    if not MODELS[config["model"]].has_correlated_guide:
        if given.get("correlated_basal") or given.get("correlated_effects"):
            raise DataError(f"--model {config['model']} has no correlated guide")
        config["correlated_basal"] = config["correlated_effects"] = False
    # The sparsest axes: masks from half of the steps on, and effects that can be turned, q(e).
    if not MODELS[config["model"]].has_mask:
        if given.get("axes") == "sparsest":
            raise DataError(f"--model {config['model']} has no masks: leave out --axes")
        config["axes"] = "learned"
    config["masks_from"] = 0  # with --axes sparsest, `first_state` sets it
    if config["axes"] == "sparsest":
        if given.get("correlated_effects"):
            raise DataError("--correlated-effects needs --axes learned: the sparsest axes, the "
                            "default without a preset of the paper, take a free q(e)")
        config["correlated_effects"] = False
    elif "mask_lr" in given:
        raise DataError("--mask-lr needs --axes sparsest: else masks learn as fast as the networks")
    # What is given takes the place of what a preset says of the same thing.
    if "split" in given and given.get("split_column"):
        raise DataError("--split and --split-column exclude each other")
    if "split" in given:
        config["split_column"] = None
    elif given.get("split_column"):
        config["split"] = "random"
    if given.get("one_hot_prefix"):
        config |= dict.fromkeys({"perturbation_column", "control", "combination_separator"}
                                - given.keys())
    elif given.get("perturbation_column"):
        config["one_hot_prefix"] = None
    # What would be ignored is refused.
    if "train_combinations" in given and config["split"] == "random":
        raise DataError("--train-combinations needs --split norman-ood or norman-data-efficiency")
    of_a_file = [option for option in data.READING if option in given]
    if args.data is None and set(of_a_file) - {"split_column", "min_cells", "covariate"}:
        raise DataError(f"--{of_a_file[0].replace('_', '-')} says how to read a file: it needs "
                        "--data")
    if args.data and any(option.startswith("simulated") for option in given):
        raise DataError("--simulated-... options describe the screen that is simulated without "
                        "--data")
    check_shares(config)
    return config


def configuration_of_adapted(args, given):
    """The same of --adapt: what is said of model and labels is that of the other run."""
    folder, own = args.adapt.rstrip("/"), {*data.READING} - {"covariate"} | {
        "steps", "batch_size", "particles", "lr", "mask_lr", "effect_lr", "patience", "clip",
        "seed", "split_seed", "precision", "compile", "stream", "log_every", "validate_every"}
    if args.data is None:
        raise DataError("--adapt needs --data, a file with other perturbations")
    if set(given) - own:
        raise DataError(f"--{min(set(given) - own).replace('_', '-')} is that of {folder} in a run "
                        "that adapts it: leave it out")
    base = evaluate.load_checkpoint(folder, "last.pt")
    config = dict(base["config"])
    if config["covariate"] and "covariates" not in base:
        raise DataError(f"{folder} was trained by an earlier version, which did not write down the "
                        "values of covariates: train it again")
    # How it was trained, for tables: else two runs that adapt two others would look alike.
    config["base"] = {name: config.get(name) for name in (
        *(option_name(flag) for flag, *_ in OPTIONS), "base") if name not in (
            *evaluate.SEEDS, *evaluate.NO_MATTER)} | {"fingerprint": base["fingerprint"]}
    config["base_seed"] = config["seed"]
    config.pop("simulated", None)
    config |= dict.fromkeys(["gene_column", "gene_names", "subset", "exclude", "keep",
                             "split_column", "stream"])
    if given.get("one_hot_prefix"):
        config |= dict.fromkeys(["perturbation_column", "control", "combination_separator"])
    elif given.get("perturbation_column"):
        config["one_hot_prefix"] = None
    config |= ADAPTED | {
        "data": os.path.abspath(args.data), "adapt": folder, "preset": None, "split": "random",
        "train_combinations": 1.0, "masks_from": 0, "weight_decay": 0.0, "kl_warmup": 0} | given
    check_shares(config)
    return config


# ============================================================================================
# How fast is it? (--benchmark)
# ============================================================================================

SHAPES = {  # cells, genes, perturbations, perturbations per cell
    "replogle": (118_461, 1187, 722, 1), "norman-ood": (111_255, 5000, 105, 2),
    "norman-data-efficiency": (111_255, 5000, 105, 2), "simulated": (14_100, 200, 500, 2),
    "sparse-shift": (37_875, 100, 100, 1)}


def benchmark(config, device):
    """Time training, IWELBO and treatment effects on random counts; write benchmark.json.

    Step and IWELBO stand beside the matrix products of their layers alone, repeated with the same
    shapes in the same minutes: no code can be faster than those. All times are medians.
    """
    n_cells, n_genes, n_perturbations, most = SHAPES[config["preset"] or "replogle"]
    rng, cells = np.random.default_rng(0), np.arange(n_cells)
    counts = data.Counts(  # without any that is 0, as sparse counts are slowest
        (n_cells, n_genes), rng.integers(1, 9, n_cells * n_genes, dtype=np.uint8),
        np.tile(np.arange(n_genes, dtype=np.uint16), n_cells), n_genes * np.arange(n_cells + 1))
    d = rng.integers(0, n_perturbations, (n_cells, most))
    batches = data.Batches(types.SimpleNamespace(
        counts=counts, d=d, c=np.zeros((n_cells, 0), np.int64)), device)
    shuffle = data.Shuffle(batches, cells, config["batch_size"], 0)
    model = MODELS[config["model"]](
        np.bincount(d.ravel()), np.full(n_genes, 1.5), np.full(n_genes, 0.7),
        **{option_name(flag): config[option_name(flag)] for flag, *_ in MODEL_OPTIONS}).to(device)
    optimizer, (x, d, c), loss = new_optimizer(model, config), next(shuffle), []
    dosages = torch.arange(min(50, n_perturbations), device=device)[:, None]
    objective = choose_objective(config, model, x, d, c)
    phases = {"batch": lambda: next(shuffle),
              "forward": lambda: loss.append(objective(model, x, d, config["particles"], c)[0]),
              "backward": lambda: (optimizer.zero_grad(), (-loss.pop()).backward()),
              "optimizer": optimizer.step}
    others = {"iwelbo": lambda: iwelbo(model, batches.in_order(cells[:4000]), 100),
              "effects": lambda: average_treatment_effects(model, dosages, 1000)}
    phases["forward"](), phases["backward"](), optimizer.step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    with Products() as of_iwelbo:
        others["iwelbo"]()
    plain = choose_objective(config | {"compile": False}, model, x, d, c)
    with Products() as of_step:
        plain(model, x, d, config["particles"], c)[0].backward()
    result = medians(phases | {"products": of_step.repeat}, 30, device)
    result |= medians(others | {"iwelbo_products": of_iwelbo.repeat}, 3, device)
    result["step"] = sum(result[name] for name in phases)
    result["step_ratio"] = result["step"] / result["products"]
    result["cells_per_second"] = config["batch_size"] / result["step"]
    result["iwelbo_ratio"] = result["iwelbo"] / result["iwelbo_products"]
    result["peak_memory"] = peak
    print(f"{config['model']}, {n_cells:,} cells x {n_genes:,} genes, {n_perturbations:,} "
          f"perturbations, {config['batch_size']} cells a step, {device}; in seconds and bytes\n"
          f"(IWELBO: {len(cells[:4000]):,} cells, 100 particles; effects: of {len(dosages)} "
          "perturbations, 1,000 particles)")
    print(evaluate.markdown(["", ""], [[name, f"{value:,.4g}"] for name, value in result.items()]))
    with data.replacing("benchmark.json") as path, open(path, "w") as file:
        json.dump({"config": config, "device": str(device)} | result, file, indent=2)


def peak_memory():
    """The most memory that this process has held up to now, in bytes."""
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


class Products(TorchDispatchMode):
    """Sees all operations inside of its `with`; repeat() does the matrix products alone again."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.pairs.append([torch.rand_like(matrix) for matrix in arguments[-2:]])
        return operation(*arguments, **(options or {}))

    def repeat(self):
        """The products, of random numbers of the same shapes."""
        for a, b in self.pairs:
            a @ b


def medians(functions, repeats, device):
    """Seconds of each, its work on the device included; interleaved, as machines are noisy."""
    times = {name: [] for name in functions}
    for name, function in list(functions.items()) * repeats:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


if __name__ == "__main__":
    data.run(main)
