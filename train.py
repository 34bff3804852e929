"""Train SAMS-VAE, or a model it is compared with, on an .h5ad file or on a simulated screen.

    python train.py                               simulate a screen, train on it, evaluate: minutes
    python train.py --data replogle.h5ad --preset replogle         as in the paper's Table 1
    python train.py --data norman.h5ad --preset norman-ood --train-combinations 0.5 --split-seed 1
    python train.py --data screen.h5ad --perturbation-column gene --control non-targeting
    python train.py --resume runs/NAME            go on where a run was stopped

A run is a folder, runs/NAME: config.json (every option), log.jsonl (a line per log step and per
validation), best.pt (lowest validation loss) and last.pt (to resume). Then: evaluate.py runs/NAME.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import signal
import sys
import time

# Before torch is imported: for how many turns its CPU threads (GNU OpenMP) spin while they wait for
# each other, before they sleep. A small step on two idle cores takes 5.0, 5.5 and 10.8 ms with the
# default, with 1,000 turns and with none; with another program on one of the cores, 17, 13 and 8.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch

import data
from data import DataError
from sams_vae import (CPAVAE, SAMSVAE, BetaBernoulliSAMSVAE, ConditionalVAE, SVAEPlus,
                      average_treatment_effects, elbo, iwelbo)

# glibc returns freed arrays to the system, and the system fills the next ones with zeros, page by
# page: an eighth of a step on a CPU. Ask it to keep them, up to 32 MB each (M_MMAP_THRESHOLD is -3,
# M_TRIM_THRESHOLD is -1). Other C libraries have no mallopt.
with contextlib.suppress(AttributeError, OSError, TypeError):
    for parameter, value in ((-3, 2**25), (-1, -1)):
        ctypes.CDLL(None).mallopt(parameter, value)

MODELS = {"sams-vae": SAMSVAE, "sams-vae-beta-bernoulli": BetaBernoulliSAMSVAE, "cpa-vae": CPAVAE,
          "svae+": SVAEPlus, "cvae": ConditionalVAE}

# Every option that is not about reading the file: its default, and where the default comes from.
# "Replogle" and "Norman" are the paper's settings for its two data sets (A.4).
OPTIONS = [
    # the model (2.1 to 2.4)
    ("--model", "sams-vae", "sams-vae; the same with a Beta-Bernoulli prior of the mask; cpa-vae: "
                            "every mask entry is 1; svae+; cvae: the conditional VAE"),
    ("--correlated-basal", True, "q(z_basal) sees z_pert too (paper: best row of Table 1)"),
    ("--correlated-effects", True, "q(e | m) in place of q(e) (paper: best row of Table 1)"),
    ("--n-latent", 100, "latent dimensions (Replogle; Norman 200)"),
    ("--n-hidden", 400, "width of encoder and decoder (paper)"),
    ("--n-layers", 1, "hidden layers of encoder and decoder (paper)"),
    ("--effect-hidden", 200, "width of f_emb (Replogle; Norman 400)"),
    ("--effect-layers", 2, "hidden layers of f_emb (Replogle; Norman 4)"),
    ("--alpha", 0.001, "prior probability of a mask entry (Replogle; Norman 0.01)"),
    ("--beta", 1.0, "prior variance of an effect (paper)"),
    ("--mask-a", 1.0, "a of the prior Beta(a, b) of mask probabilities, Beta-Bernoulli (ours)"),
    ("--mask-b", 2.0, "b of the same, and of SVAE+'s Beta(1, b) (paper, for SVAE+)"),
    # the optimisation
    ("--steps", 150_000, "training steps (Replogle; Norman 30,000)"),
    ("--batch-size", 512, "cells per step (paper)"),
    ("--particles", 5, "Monte Carlo samples per step (paper)"),
    ("--lr", 3e-4, "learning rate of Adam (paper)"),
    ("--weight-decay", 1e-6, "of Adam (paper)"),
    ("--clip", 0.0, "largest gradient norm, 0 for none (Replogle none; Norman 100)"),
    ("--seed", 0, "of the weights and of training (paper: five seeds)"),
    # the split
    ("--split", "random", "how cells are split (Replogle random; Norman two tasks, see data.py)"),
    ("--train-combinations", 1.0, "fraction of the combinations, or of their cells, that the "
                                  "Norman splits train on (Norman 0, 0.25, 0.5, 0.75 and 1)"),
    ("--split-seed", 0, "of the random split (Replogle 0, Norman 0 to 4)"),
    # the run
    ("--compile", False, "compile the objective with torch.compile (ours)"),
    ("--tf32", False, "on a GPU, matrix products of TensorFloat-32 precision (ours)"),
    ("--bf16", False, "matrix products of bfloat16 precision in training (ours)"),
    ("--log-every", 50, "steps between lines of log.jsonl (ours)"),
    ("--validate-every", 500, "steps between validations, each saving last.pt (ours)"),
]

# What --preset changes. All of it can be overridden by its flag, too. OPTIONS holds the values for
# Replogle already, so that its row says how to read the file.
NORMAN = dict(layer="counts", gene_column="highly_variable", n_latent=200, effect_hidden=400,
              effect_layers=4, alpha=0.01, steps=30_000, clip=100.0)
PRESETS = {
    "replogle": dict(perturbation_column="sgID_AB", control="*non-targeting*"),
    "norman-ood": NORMAN | dict(split="norman-ood"),
    "norman-data-efficiency": NORMAN | dict(split="norman-data-efficiency"),
    # Where there is no --data. A small screen needs a small model, and minutes allow few steps:
    # hence the higher learning rate.
    "simulated": dict(n_latent=10, n_hidden=100, effect_hidden=100, alpha=0.01, steps=5000,
                      batch_size=256, lr=1e-2, split_column="split"),
}
SIMULATION_OPTIONS = [
    ("--simulated-perturbations", 500, "perturbations of the simulated screen"),
    ("--simulated-cells", 25, "cells per perturbation and pair of the simulated screen"),
    ("--simulated-pairs", 60, "pairs of the simulated screen; half of them are held out"),
    ("--simulated-effect", 4.0, "size of the simulated effects, in units of the basal state's sd"),
    ("--simulated-seed", 0, "of the simulated screen; if not given, --seed"),
]

POSITIVE = 1e-30
LEAST = [  # the least values that make sense
    (0, "seed split_seed weight_decay clip train_combinations simulated_effect simulated_pairs "
        "simulated_seed"), (POSITIVE, "lr beta mask_a mask_b"),
    (1, "n_latent n_hidden n_layers effect_hidden effect_layers steps batch_size particles "
        "log_every validate_every simulated_cells"), (2, "simulated_perturbations")]


def name_of(flag):
    """--like-this -> like_this."""
    return flag[2:].replace("-", "_")


def parse_arguments(arguments=None):
    """(arguments, configuration, the part of the configuration that was given explicitly)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE.h5ad", help="counts (default: simulate a screen)")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="settings of the paper's experiments")
    parser.add_argument("--resume", metavar="runs/NAME", help="go on with this run")
    parser.add_argument("--name", help="the run's folder is runs/NAME (default: from the options)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--benchmark", action="store_true",
                        help="time a step, IWELBO and effects on random data; write benchmark.json")
    data.add_screen_options(parser)
    group = parser.add_argument_group("the model and its training")
    choices = {"--model": list(MODELS), "--split": data.SPLITS}
    for flag, default, text in OPTIONS + SIMULATION_OPTIONS:
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else {
            "type": type(default), "choices": choices.get(flag)}
        text += f" [{default}]"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    args = parser.parse_args(arguments)

    own = {name_of(flag) for flag, _, _ in OPTIONS + SIMULATION_OPTIONS}
    given = {k: v for k, v in vars(args).items() if k in own}
    given |= {k: getattr(args, k) for k in data.SCREEN_OPTIONS if getattr(args, k) is not None}
    if args.preset is not None:
        given["preset"] = args.preset
    if args.data is None and args.preset not in (None, "simulated") and not (
            args.resume or args.benchmark):
        parser.error(f"--preset {args.preset} needs --data")
    config = {"data": args.data and os.path.abspath(args.data),
              "preset": args.preset if args.data or args.preset or args.benchmark else "simulated"}
    config |= dict.fromkeys(data.SCREEN_OPTIONS)
    config |= {name_of(flag): default for flag, default, _ in OPTIONS}
    if args.data is None:
        config |= {name_of(flag): default for flag, default, _ in SIMULATION_OPTIONS}
    config |= PRESETS.get(config["preset"], {}) | given
    if "simulated_seed" in config and "simulated_seed" not in given:
        config["simulated_seed"] = config["seed"]
    if config["model"] in ("svae+", "cvae"):  # in the paper, too, their guide is mean-field
        if given.get("correlated_basal") or given.get("correlated_effects"):
            parser.error(f"--model {config['model']} has no correlated guide")
        config["correlated_basal"] = config["correlated_effects"] = False
    for option, least in ((option, least) for least, names in LEAST for option in names.split()):
        value = config.get(option, least)
        if not least <= value < 2**32:
            words = "positive" if least == POSITIVE else f"at least {least}"
            parser.error(f"--{option.replace('_', '-')} must be {words}, not {value}")
    if not 1e-12 <= config["alpha"] < 1:
        parser.error(f"--alpha must lie between 1e-12 and 1, not {config['alpha']}")
    if config["train_combinations"] > 1:
        parser.error("--train-combinations is a fraction: at most 1")
    # What is given takes the place of what a preset says of the same thing.
    if "split" in given:
        if given.get("split_column"):
            parser.error("--split and --split-column exclude each other")
        config["split_column"] = None
    elif given.get("split_column"):
        config["split"] = "random"
    if given.get("one_hot_prefix"):
        config |= dict.fromkeys({"perturbation_column", "control", "combination_separator"}
                                - given.keys())
    if "train_combinations" in given and config["split"] == "random" and not args.resume:
        parser.error("--train-combinations needs --split norman-ood or norman-data-efficiency")
    of_a_file = [option for option in data.SCREEN_OPTIONS if option in given]
    if args.data is None and not args.resume and set(of_a_file) - {"split_column"}:
        parser.error(f"--{of_a_file[0].replace('_', '-')} says how to read a file: it needs --data")
    if args.data and not args.resume and any(option.startswith("simulated") for option in given):
        parser.error("--simulated-... options describe the screen that is simulated without --data")
    if args.name is not None and (args.name in ("", ".", "..")
                                  or args.name != os.path.basename(args.name)):
        parser.error(f"--name must be a plain name, not {args.name!r}")
    return args, config, given


def default_device(name=None):
    """The device of that name, or a GPU if there is one, or the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise DataError(f"--device {name}: only cpu and cuda have all that is needed")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def new_folder(name, config):
    """Create runs/NAME; without a name, one made of the options that is still free."""
    if name is not None:
        if os.path.exists(os.path.join("runs", name)):
            raise DataError(f"runs/{name} exists: choose another --name, or --resume runs/{name}")
    else:
        source = os.path.splitext(os.path.basename(config["data"] or "simulated"))[0]
        guide = "-".join(word for word, on in (("basal", config["correlated_basal"]),
                                               ("effects", config["correlated_effects"])) if on)
        base = f"{source}-{config['model']}-{guide or 'mean-field'}"
        if config["split"] != "random":
            base += f"-f{config['train_combinations']:g}-split{config['split_seed']}"
        base += f"-seed{config['seed']}"
        name, n = base, 1
        while os.path.exists(os.path.join("runs", name)):
            name, n = f"{base}-{n + 1}", n + 1
    folder = os.path.join("runs", name)
    os.makedirs(folder)
    return folder


def build_model(config, training):
    """The model of a configuration; `training` holds n_cells (T,), x_mean and x_std (G,)."""
    options = ("n_latent", "n_hidden", "n_layers", "effect_hidden", "effect_layers",
               "correlated_basal", "correlated_effects", "alpha", "beta", "mask_a", "mask_b")
    return MODELS[config["model"]](training["n_cells"], training["x_mean"], training["x_std"],
                                   **{option: config[option] for option in options})


def new_optimizer(model, config):
    """Adam, all parameters in one kernel."""
    return torch.optim.Adam(model.parameters(), lr=config["lr"],
                            weight_decay=config["weight_decay"], fused=True)


def load_checkpoint(folder, name):
    """Read runs/NAME/best.pt or last.pt. Nothing in it is unpickled into code."""
    path = os.path.join(folder, name)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        if name == "best.pt" and os.path.exists(os.path.join(folder, "last.pt")):
            raise DataError(f"{folder} has not reached its first validation: go on with python "
                            f"train.py --resume {folder}, or start a new run if its loss was not "
                            "finite") from None
        raise DataError(f"{path}: no such file; a run is a folder, runs/NAME, that train.py made, "
                        "and this one has no checkpoint to go on from") from None
    except Exception as error:  # damaged files raise a dozen kinds of exception
        raise DataError(f"{path}: damaged, or no checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "fingerprint" not in checkpoint:
        raise DataError(f"{path}: is no checkpoint of train.py")
    checkpoint["config"] = with_defaults(checkpoint["config"])
    return checkpoint


def with_defaults(config):
    """The options of a run; those that are younger than the run have their defaults."""
    return (dict.fromkeys(("preset", *data.SCREEN_OPTIONS))
            | {name_of(flag): default for flag, default, _ in OPTIONS} | config)


def read_config_screen(config, checkpoint=None):
    """The screen of a configuration; with a checkpoint, checked to be the one it was trained on."""
    screen = data.read_screen(config["data"], **{k: config[k] for k in data.SCREEN_OPTIONS})
    if checkpoint is not None and checkpoint["fingerprint"] != screen.fingerprint():
        raise DataError(f"{config['data']}: other cells, genes or labels, or another order, than "
                        "the run was trained on; it needs the same file, and --data says where")
    return screen


def split_of(config, screen):
    """The cells of the configuration's split; see data.split_cells."""
    return data.split_cells(screen, config["split_seed"], config["split"],
                            config["train_combinations"])


def as_the_model_sees(screen, model):
    """SVAE+ knows labels, not combinations: for it, each combination is a label of its own."""
    return data.one_label_per_cell(screen) if model == "svae+" else screen


def read_log(folder):
    """The lines of log.jsonl as dicts; a last line that was cut off does not count."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as file:
            return [json.loads(line) for line in file if line.endswith("}\n")]
    except FileNotFoundError:
        return []


def drop_later_lines(folder, step):
    """Drop the lines of a log that a run resumed at this step will write again."""
    kept = [line for line in read_log(folder) if line["step"] <= step]
    with data.replacing(os.path.join(folder, "log.jsonl")) as path, open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)


def choose_objective(config, model, x, d):
    """elbo, with matrix products in bfloat16 if that is wanted, and compiled if that is wanted.

    A compiled one is tried on a batch: raises DataError where it fails."""
    # Parameters stay in single precision. So does everything that is no product: torch.autocast
    # lowers matrix products alone, and MLP adds the biases to them in single precision.
    objective = torch.autocast(x.device.type, torch.bfloat16)(elbo) if config["bf16"] else elbo
    if not config["compile"]:
        return objective
    objective = torch.compile(objective)
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            objective(model, x, d, config["particles"])[0].backward()
    except Exception as error:  # no compiler, or whatever goes wrong in one
        raise DataError(f"--compile: torch.compile fails on this machine ({type(error).__name__}): "
                        "leave it out, or --no-compile with --resume") from None
    model.zero_grad(set_to_none=True)
    return objective


@torch.no_grad()
def validation_loss(model, batches, cells, n_particles):
    """-ELBO / N over the validation cells, with n_t of the training cells.

    Always with the same random numbers, so that checkpoints are compared under the same noise, and
    without touching the generator that training uses.
    """
    devices = [batches.device] if batches.device.type == "cuda" else []
    total = 0.0
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for x, d in batches.in_order(cells):
            total = total - elbo(model, x, d, n_particles)[0].double() * len(x)
    return float(total) / len(cells)


# ============================================================================================
# How fast is it? (--benchmark)
# ============================================================================================

SHAPES = {  # cells, genes, perturbations, perturbations per cell
    "replogle": (118_461, 1187, 722, 1), "norman-ood": (111_255, 5000, 105, 2),
    "norman-data-efficiency": (111_255, 5000, 105, 2), "simulated": (16_000, 200, 500, 2)}


def benchmark(config, device):
    """Time training, IWELBO and treatment effects on random counts; write benchmark.json.

    Everything is timed beside its own matrix products alone, the same shapes in the same run: no
    code can be faster than those. Numbers are medians.
    """
    from torch.utils._python_dispatch import TorchDispatchMode  # torch's own, not documented
    from torch.utils._pytree import tree_leaves

    torch.set_float32_matmul_precision("high" if config["tf32"] else "highest")
    n_cells, n_genes, n_perturbations, most = SHAPES[config["preset"] or "replogle"]
    rng = np.random.default_rng(0)
    counts = data.Counts((n_cells, n_genes), rng.integers(0, 9, (n_cells, n_genes), dtype=np.uint8))
    d = rng.integers(0, n_perturbations, (n_cells, most))
    batches = data.Batches(argparse.Namespace(counts=counts, rows=np.arange(n_cells), d=d), device)
    shuffle = data.Shuffle(np.arange(n_cells), config["batch_size"], 0, device)
    training = {"n_cells": torch.full((n_perturbations,), n_cells * most / n_perturbations),
                "x_mean": torch.full((n_genes,), 1.5), "x_std": torch.full((n_genes,), 0.7)}
    torch.manual_seed(0)
    model = build_model(config, training).to(device)
    optimizer = new_optimizer(model, config)

    def seconds(function, repeats=1):
        """Of one call, all its work on the device included."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    def matrix_products(function):
        """A function that repeats all matrix products of the given one; the number of their
        operations; and how many bytes all of its operations read and write."""
        pairs, total = [], {"operations": 0, "bytes": 0}

        class Recorder(TorchDispatchMode):
            """Sees every operation."""

            def __torch_dispatch__(self, operation, types, arguments=(), options=None):
                result = operation(*arguments, **(options or {}))
                if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    a, b = arguments[-2:]
                    total["operations"] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
                    pairs.append([torch.empty_strided(
                        m.shape, m.stride(), dtype=m.dtype, device=device).uniform_()
                                  for m in (a, b)])
                if not operation.is_view:
                    total["bytes"] += sum(t.nbytes for t in tree_leaves(
                        (arguments, options, result)) if isinstance(t, torch.Tensor))
                return result

        with Recorder():
            function()
        return lambda: [a @ b for a, b in pairs], total

    x, d = batches(next(shuffle))
    objective, state = choose_objective(config, model, x, d), {}
    plain = choose_objective(config | {"compile": False}, model, x, d)  # for the recorder

    def forward(objective=objective):
        """Minus the ELBO of a batch."""
        state["loss"] = -objective(model, x, d, config["particles"])[0]

    def backward():
        """Its gradient."""
        optimizer.zero_grad(set_to_none=True)
        state["loss"].backward()

    for _ in range(3):
        forward(), backward(), optimizer.step()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
    floor, of_step = matrix_products(lambda: (forward(plain), backward(), optimizer.step()))
    parts = {"batch": lambda: batches(next(shuffle)), "forward": forward, "backward": backward,
             "optimizer": optimizer.step, "its matrix products": floor}
    times = {name: [] for name in parts}
    for _ in range(30):  # interleaved: a busy machine slows all of them
        for name, function in parts.items():
            times[name].append(seconds(function))
    result = {name: float(np.median(t)) for name, t in times.items()}
    whole = sum(result[name] for name in list(parts)[:4])
    rows = [(f"step: {name}", f"{1e3 * t:.2f} ms") for name, t in result.items()]
    result |= {"peak_memory": peak, "step": whole,
               "step_ratio": whole / result["its matrix products"],
               "cells_per_second": config["batch_size"] / whole}
    rows += [("step: all four", f"{1e3 * whole:.2f} ms"),
             ("step / its matrix products", f"{result['step_ratio']:.2f}"),
             ("cells per second", f"{result['cells_per_second']:,.0f}"),
             (f"{config['steps']:,} steps would take", f"{config['steps'] * whole / 3600:.2f} h")]

    # IWELBO with 100 particles (3.1). The draws of (M, E) are made once, however many cells.
    cells = np.arange(min(4000, n_cells))
    of_iwelbo, _ = matrix_products(lambda: iwelbo(model, batches.in_order(cells), 100))
    times = [(seconds(lambda: iwelbo(model, batches.in_order(cells), 100)), seconds(of_iwelbo))
             for _ in range(3)]
    whole_iwelbo, products = np.median(times, axis=0).tolist()
    result["iwelbo_per_1000_cells"] = 1000 * whole_iwelbo / len(cells)
    result["iwelbo_ratio"] = whole_iwelbo / products
    rows += [("IWELBO, 1,000 cells, K = 100", f"{result['iwelbo_per_1000_cells']:.2f} s"),
             ("IWELBO / its matrix products", f"{result['iwelbo_ratio']:.2f}")]

    # Treatment effects on both scales: 1,000 particles of 50 perturbations (3.2).
    dosages = torch.arange(min(50, n_perturbations), device=device)[:, None]
    t = np.median([seconds(lambda: average_treatment_effects(model, dosages, 1000))
                   for _ in range(3)])
    result["ate_per_perturbation_and_1000_particles"] = t / len(dosages)
    rows += [("effects, a perturbation, 1,000 particles", f"{1e3 * t / len(dosages):.1f} ms")]

    if device.type == "cuda":
        a, long = torch.randn(8192, 8192, device=device), torch.empty(2**28, device=device)
        a = a.bfloat16() if config["bf16"] else a
        a @ a
        rate = 2 * 8192**3 / seconds(lambda: a @ a, 10)
        bandwidth = 2 * long.nbytes / seconds(lambda: long.neg_(), 10)  # read and written
        result |= {"share_of_matrix_rate": of_step["operations"] / whole / rate,
                   "share_of_bandwidth": of_step["bytes"] / whole / bandwidth}
        rows += [(f"share of the measured {name}", f"{of_step[unit] / whole / limit:.2f} of "
                  f"{limit / 1e12:.2f} T{unit}/s") for name, unit, limit in (
                      ("matrix rate", "operations", rate), ("bandwidth", "bytes", bandwidth))]
    rows += [("peak memory of training", f"{peak / 1e9:.2f} GB")]
    print(f"{config['model']}, {n_cells:,} cells x {n_genes:,} genes, {n_perturbations:,} "
          f"perturbations, {config['batch_size']} cells a step, {device}\n")
    width = max(len(name) for name, _ in rows)
    print(f"| {'':{width}} | |\n|---|---|",
          *(f"| {name:{width}} | {value} |" for name, value in rows), sep="\n")
    with data.replacing("benchmark.json") as path, open(path, "w") as file:
        json.dump({"config": config, "device": str(device)} | result, file, indent=2)


# ============================================================================================
# Training
# ============================================================================================


def main(arguments=None):
    """Train."""
    args, config, given = parse_arguments(arguments)
    device = default_device(args.device)
    if args.benchmark:
        return benchmark(config, device)

    # A new run, or an old one from where it stopped.
    if args.resume:
        folder = args.resume.rstrip("/")
        checkpoint = load_checkpoint(folder, "last.pt")
        config, free = checkpoint["config"], ("steps", "compile", "tf32")
        if args.name or any(given[k] != config.get(k) for k in given if k not in free):
            raise DataError(f"--resume takes its options from {folder}; only --steps, --compile, "
                            "--tf32, --device and --data (a file that has moved) can be given")
        config |= {k: given[k] for k in free if k in given}
        config["data"] = os.path.abspath(args.data) if args.data else config["data"]
        if config["steps"] < checkpoint["step"]:
            raise DataError(f"{folder} is at step {checkpoint['step']:,} already: --steps must be "
                            "larger")
        screen = read_config_screen(config, checkpoint)
        split = {name: cells.numpy() for name, cells in checkpoint["split"].items()}
    else:
        checkpoint = None
        if config["data"] is not None:  # before the folder is made: a wrong file leaves nothing
            screen = read_config_screen(config)
            split = split_of(config, screen)
        folder = new_folder(args.name, config)
        if config["data"] is None:
            config["data"] = os.path.abspath(os.path.join(folder, "simulated.h5ad"))
            config["simulated"] = True
            data.simulate(config["data"], config["simulated_seed"],
                          config["simulated_perturbations"], config["simulated_cells"],
                          config["simulated_effect"], n_pairs=config["simulated_pairs"])
            screen = read_config_screen(config)
            split = split_of(config, screen)
    with data.replacing(os.path.join(folder, "config.json")) as path, open(path, "w") as file:
        json.dump(config, file, indent=2)
    print(f"{screen.path}", *screen.notes, sep="\n  ")
    fingerprint = screen.fingerprint()
    n_perturbations = len(screen.perturbations)
    screen = as_the_model_sees(screen, config["model"])
    if len(screen.perturbations) > n_perturbations:
        print(f"  {config['model']} does not add effects up: the combinations are perturbations of "
              f"their own, {len(screen.perturbations):,} in all; those without training cells have "
              "no effect")
    print("  split: " + ", ".join(f"{len(cells):,} {name}" for name, cells in split.items()))

    torch.set_float32_matmul_precision("high" if config["tf32"] else "highest")

    # The screen moves to the device once; what the model knows of the training cells is computed.
    batches = data.Batches(screen, device)
    if checkpoint is None:
        d = screen.d[split["train"]]
        n_cells = np.bincount(d[d != data.NONE], minlength=len(screen.perturbations))
        x_mean, x_std = data.training_statistics(batches, split["train"])
        training = {"n_cells": torch.from_numpy(n_cells), "x_mean": x_mean.cpu(),
                    "x_std": x_std.cpu()}
    else:
        training = checkpoint["training"]

    torch.manual_seed(config["seed"])
    model = build_model(config, training).to(device)
    optimizer = new_optimizer(model, config)
    progress = {} if checkpoint is None else checkpoint["shuffle"]
    shuffle = data.Shuffle(split["train"], config["batch_size"], config["seed"], device, **progress)
    step, best = 0, math.inf
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, best = checkpoint["step"], checkpoint["best"]
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], device)
        drop_later_lines(folder, step)
    log = open(os.path.join(folder, "log.jsonl"), "a", buffering=1)

    def save(name):
        """Write best.pt or last.pt: everything that is needed to go on."""
        rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(device)
        with data.replacing(os.path.join(folder, name)) as path:
            torch.save({
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "best": best, "config": config, "rng": rng,
                "shuffle": {"epoch": shuffle.epoch, "position": shuffle.position},
                "training": training, "split": {k: torch.from_numpy(v) for k, v in split.items()},
                "gene_names": list(screen.gene_names), "perturbations": screen.perturbations,
                "fingerprint": fingerprint}, path)

    # Ctrl-C and a polite kill end the loop after the step that is running, a second one at once.
    stop, handlers = [], {}

    def stop_soon(number, frame):
        """Remember the signal, and let the next one do what it always did."""
        stop.append(number)
        signal.signal(number, handlers[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, stop_soon)

    first_cells = torch.from_numpy(np.resize(split["train"], config["batch_size"])).to(device)
    objective = choose_objective(config, model, *batches(first_cells))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {config['model']}, {n_parameters:,} parameters, {len(split['train']):,} "
          f"training cells, steps {step:,} to {config['steps']:,} on {device}")
    terminal = sys.stdout.isatty()
    if checkpoint is None:
        save("last.pt")
    totals, n_since, since, first_step, started = {}, 0, time.time(), step, time.time()
    first_bad = torch.full((), math.inf, device=device)

    def check_finite():
        """Stop before anything is saved if a loss was not finite."""
        if math.isfinite(first_bad.item()):
            sys.exit(f"error: the loss was not finite at step {int(first_bad)}: start a new run "
                     "with a lower --lr, or with --clip 100")

    while step < config["steps"] and not stop:
        # One step: a batch, an estimate of the ELBO, its gradient, Adam.
        x, d = batches(next(shuffle))
        value, terms = objective(model, x, d, config["particles"])
        optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        if config["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        step, n_since = step + 1, n_since + 1

        # Nothing here waits for a GPU, but for the copy of the order of cells once per epoch:
        # sums, and the number of the first non-finite step, stay on the device.
        terms["loss"] = -value.detach()
        totals = {name: totals.get(name, 0) + term for name, term in terms.items()}
        first_bad = torch.where(torch.isfinite(value.detach()), first_bad,
                                first_bad.clamp(max=step))
        validate = step % config["validate_every"] == 0 or step == config["steps"]
        if step % config["log_every"] and not validate:
            continue

        # Every now and then: look at the numbers.
        check_finite()
        seconds = time.time() - since
        line = {"step": step, "epoch": shuffle.epoch}
        line |= {name: round(float(total) / n_since, 4) for name, total in totals.items()}
        if model.has_mask:
            with torch.no_grad():
                probability = model.mask_probability()[model.n_cells > 0]
            line["mask_probability"] = round(probability.mean().item(), 5)
            line["mask_size"] = round((probability > 0.5).sum(1).float().mean().item(), 3)
        line["cells_per_second"] = round(n_since * config["batch_size"] / seconds)
        totals, n_since = {}, 0
        if validate:
            loss = validation_loss(model, batches, split["validation"], config["particles"])
            line["validation_loss"] = round(loss, 4)
            if not math.isfinite(loss):
                sys.exit(f"error: the validation loss was not finite at step {step}: start a new "
                         "run with a lower --lr, or with --clip 100")
            if loss < best:
                best = loss
                save("best.pt")
            save("last.pt")
        log.write(json.dumps(line) + "\n")
        since = time.time()
        if terminal:
            left = (config["steps"] - step) * (time.time() - started) / (step - first_step)
            print(f"\rstep {step:,}  loss {line['loss']:.2f} = data {-line['log_likelihood']:.2f} "
                  f"+ basal {line['kl_basal']:.2f} + mask {line['kl_mask']:.3f} + effect "
                  f"{line['kl_effect']:.3f}  "
                  + (f"mask probability {line['mask_probability']:.4f}  " if model.has_mask else "")
                  + f"{line['cells_per_second']:,} cells/s  {left // 60:.0f}:{left % 60:02.0f} left"
                  + (f"  best validation {best:.2f} " if best < math.inf else " "), end="",
                  flush=True)
    log.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if terminal:
        print()
    if stop:
        check_finite()
        save("last.pt")
        print(f"stopped at step {step:,}; to go on: python train.py --resume {folder}")
        sys.exit(128 + stop[0])
    print(f"{step - first_step:,} steps in {time.time() - started:.0f} s; "
          f"lowest validation loss {best:.2f}")
    if config.get("simulated"):
        import evaluate  # it imports this module

        torch.set_float32_matmul_precision("highest")
        evaluate.main([folder, "--device", str(device)])
    else:
        print(f"next: python evaluate.py {folder}")


if __name__ == "__main__":
    data.run(main)
