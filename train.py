"""Train SAMS-VAE, or a model it is compared with, on an .h5ad file or on a simulated screen.

    python train.py                               simulate a screen, train on it, evaluate: minutes
    python train.py --data replogle.h5ad --preset replogle         as in the paper's Table 1
    python train.py --data norman.h5ad --preset norman-ood --train-combinations 0.5 --split-seed 1
    python train.py --data screen.h5ad --perturbation-column gene --control non-targeting
    python train.py --resume runs/NAME            go on where a run was stopped
    python train.py --adapt runs/NAME --data new.h5ad       what other perturbations do, in minutes

Defaults in brackets are the paper's where they are not marked as ours; for a file without --preset,
`own_settings` below replaces many. A run is a folder, runs/NAME: config.json (every option),
log.jsonl, best.pt (lowest validation loss) and last.pt (to resume). Then: evaluate.py runs/NAME.

In reading order: the loop (`train`), its phases and its pieces; a run and its folder; how a run
begins, goes on and adapts; the options and how they become a configuration.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import typing

import data  # before torch: it sets what makes a CPU fast
import numpy as np
import torch

from data import AT_LEAST_0, AT_LEAST_1, DataError, add_options, option_name
from sams_vae import EFFECTS, MASKS, MODELS, begin_masks, continue_from, elbo, learn_others_only

# ============================================================================================
# The loop
# ============================================================================================


def train(run):
    """Train a run from where it is to its end: the phases of `phases`, each a loop of steps.

    A step: a batch, one draw of every latent per particle, the ELBO per cell, its gradient, Adam.
    Each cell pays its share of the global KL (A.1), so that no step looks beyond its batch. A run
    can be killed at any time: last.pt, which every validation writes, holds all that moves."""
    config, model, progress = run.config, run.model, run.progress
    if config["adapt"]:
        learn_others_only(model, run.n_known)
    optimizer = new_optimizer(run)
    seed_from_here(run)

    def step(x, d, c):
        """x (B, G) counts, d (B, P) dosages, c (B, C) covariates."""
        optimizer.zero_grad(set_to_none=True)
        torch.set_float32_matmul_precision("high" if config["precision"] == "tf32" else "highest")
        value, terms = objective(model, x, d, c, config)  # the ELBO: eq. 3, A.1
        (-value).backward()
        torch.set_float32_matmul_precision("highest")  # for validation and axes
        if config["clip"]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        log.add(value, terms)

    for number, phase in enumerate(phases(config)):
        if number > progress.phase:
            phase.begin(run, optimizer)
            progress.enter(number)
            seed_from_here(run)
        shuffle, log, launch = shuffle_from_here(run), Log(run), launch_once(step, run.device)
        while number == progress.phase and not progress.is_over(phase):
            launch(*next(shuffle))
            progress.step += 1
            validates = progress.step % config["validate_every"] == 0 or (
                progress.step == phase.last_step)
            if validates or progress.step % config["log_every"] == 0:
                line = log.means(shuffle.epoch)
                if validates:
                    loss = validation_loss(run)
                    line["validation_loss"] = round(loss, 4)
                    if progress.validated(loss) and phase.file:
                        run.save(phase.file, optimizer)
                log.write(line)
            if validates:
                run.save("last.pt", optimizer)  # after its line: --resume removes later ones
                seed_from_here(run)
    print(f"{run.folder} has ended, at step {progress.step:,}; lowest validation loss "
          f"{progress.best:.2f}, at step {progress.best_step:,}")


class Phase(typing.NamedTuple):
    """A part of training, in which validation losses can be compared."""

    last_step: int
    patience: float         # steps without a lower validation loss that end it; inf for never
    file: str | None        # receives its best weights
    begin: typing.Callable  # what changes before its first step: begin(run, optimizer)


def phases(config):
    """The phases of a run, a list. The paper has one; with --axes sparsest (ours) there are warm
    starts, from one seed or more, before the one with masks."""
    steps, patience = config["steps"], config["patience"] or math.inf
    if config["axes"] == "learned" or config["adapt"]:
        return [Phase(steps, patience, "best.pt", lambda run, optimizer: None)]
    return [*(Phase(steps // 2, patience, f"warm{n}.pt" if config["patience"] else None, warm_start)
              for n in range(config["warm_starts"])),
            Phase(steps, patience, "best.pt", turn_axes)]


def warm_start(run, optimizer):
    """Train with masks of one, as in CPA-VAE: see `begin_masks` in sams_vae.py. The second warm
    start is what the first would be in a run whose --seed is larger by 1, and so on: seeds of
    independent runs are N or more apart."""
    progress = run.progress
    if progress.phase >= 0:
        keep_warm_start(run, optimizer)
        progress.start, progress.step = len(progress.ends), 0
        model, _ = fresh_model(run.config, run.screen, run.batches, run.split["train"],
                               run.model.n_cells.cpu(), run.seed)
        run.model.load_state_dict(model.state_dict())
        optimizer.state.clear()
    run.model.masks_of_one = True


def keep_warm_start(run, optimizer):
    """Write the warm start that has ended, unless --patience has kept its best weights already."""
    progress, name = run.progress, f"warm{run.progress.start}.pt"
    if not run.config["patience"] or not os.path.exists(os.path.join(run.folder, name)):
        run.save(name, optimizer)
    progress.ends.append(progress.step)


def turn_axes(run, optimizer):
    """Turn effects to the sparsest axes of all warm starts and begin masks. The warm start that is
    nearest to their mean goes on; with --patience, from its best weights."""
    keep_warm_start(run, optimizer)
    model, progress = run.model, run.progress
    kept = [load_checkpoint(run.folder, f"warm{n}.pt") for n in range(len(progress.ends))]
    models = [build_model(checkpoint) for checkpoint in kept]
    torch.manual_seed(run.config["seed"])
    nearest, support, before, after = begin_masks(models, run.interaction_rows)
    model.load_state_dict(models[nearest].state_dict())
    set_moments(optimizer, kept[nearest]["optimizer"])
    for parameter in parameters_of(model, MASKS) + parameters_of(model, EFFECTS):
        optimizer.state.pop(parameter, None)  # Adam's moments are in the old axes
    progress.start, progress.step = nearest, progress.ends[nearest]
    progress.masks_from, run.support = progress.step, support if len(kept) > 1 else None
    print(f"step {progress.step:,}  axes turned, masks begin: {before:.1f} -> {after:.1f} latents "
          f"per perturbation; warm start {nearest + 1} of {len(kept)} goes on")


@dataclasses.dataclass
class Progress:
    """What changes in training, besides weights and Adam's moments. (The order of cells and
    all random numbers follow from the seed and the step.)"""

    step: int = 0
    phase: int = -1          # number of the phase that has begun; -1 for none
    best: float = math.inf   # lowest validation loss in this phase,
    best_step: int = 0       # and where it was; at first, where the phase began
    since_best: int = 0      # steps from there to the last validation
    masks_from: int = 0      # where masks began
    start: int = 0           # the warm start that is trained: its seed is --seed + start
    ends: list = dataclasses.field(default_factory=list)  # steps where warm starts ended

    def enter(self, phase):
        """Begin the phase of this number."""
        self.phase, self.best, self.best_step, self.since_best = phase, math.inf, self.step, 0

    def is_over(self, phase):
        """Whether the phase that has begun is over."""
        return self.step >= phase.last_step or self.since_best >= phase.patience

    def validated(self, loss):
        """Take note of a validation loss; whether it is the lowest (NaN never is)."""
        is_best = loss < self.best
        if is_best:
            self.best, self.best_step = loss, self.step
        self.since_best = self.step - self.best_step
        return is_best


# ============================================================================================
# The pieces of the loop
# ============================================================================================


def parameters_of(model, names):
    """A list of the parameters of these names that the model has."""
    return [parameter for name, parameter in model.named_parameters() if name in names]


def new_optimizer(run):
    """Adam (A.4), with the run's moments; masks and effects have rates of their own (ours)."""
    config = run.config
    others = [p for name, p in run.model.named_parameters() if name not in MASKS + EFFECTS]
    own = config["axes"] == "sparsest" or config["adapt"]
    optimizer = torch.optim.Adam(
        [{"params": others, "lr": config["lr"]},
         {"params": parameters_of(run.model, MASKS), "lr": config["mask_lr" if own else "lr"]},
         {"params": parameters_of(run.model, EFFECTS), "lr": config["effect_lr"] or config["lr"]}],
        weight_decay=config["weight_decay"], fused=True,
        capturable=run.device.type == "cuda")  # as launch_once needs it
    if run.optimizer_state:
        set_moments(optimizer, run.optimizer_state)
    return optimizer


def set_moments(optimizer, state):
    """Give it Adam's moments of a state_dict, but not its settings: devices may differ."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})


def objective(model, x, d, c, config):
    """`elbo`; with --precision bf16, linear layers multiply in bfloat16, all else in float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config["precision"] == "bf16"):
        return elbo(model, x, d, c, config["particles"])


def launch_once(step, device, n_first=3):
    """A function like step(*batch) whose kernels a GPU gets as one piece, a CUDA graph.

    To launch a step's hundreds of kernels from Python takes longer than to compute them. So the
    first steps run as they are (Adam makes its moments in them), the next is recorded, and from
    then on the record is played: the same kernels, on the same memory, with the generator's next
    random numbers. Whatever a step reads or writes must stay in place: batches are copied into
    `inputs`. On a CPU, and where a GPU cannot record, steps run as they are.
    """
    if device.type != "cuda":
        return step
    graph, inputs, n_steps = torch.cuda.CUDAGraph(), [], 0

    def launch(*batch):
        nonlocal graph, n_steps
        n_steps += 1
        if n_steps > n_first and graph and not inputs:
            inputs.extend(part.clone() for part in batch)
            try:
                # thread_local: another thread may be copying the next cells meanwhile.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    step(*inputs)  # recorded, not computed
            except RuntimeError as error:
                graph = None
                print(f"steps are launched kernel by kernel: {str(error).splitlines()[0]}")
        if n_steps <= n_first or not graph:
            return step(*batch)
        for own, new in zip(inputs, batch):
            own.copy_(new)
        graph.replay()

    return launch


def seed_from_here(run):
    """From here on, seed and step decide what is drawn: a resumed run draws the same."""
    key = run.seed, run.progress.step
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def shuffle_from_here(run):
    """Random batches of the training cells, from the run's step on."""
    cells, size = run.taught_by["train"], run.config["batch_size"]
    epoch, position = divmod(run.progress.step * size, len(cells))
    return data.Shuffle(run.batches, cells, size, run.seed, epoch, position)


@torch.no_grad()
def validation_loss(run):
    """The mean of minus `elbo` over the validation cells, in nats; n_t counts training cells, as in
    training. Always with the same random numbers: checkpoints see the same noise."""
    torch.manual_seed(0)
    total, cells = 0.0, run.taught_by["validation"]
    for x, d, c in run.batches.in_order(cells):
        value, _ = elbo(run.model, x, d, c, run.config["particles"])
        total = total + value.double() * len(x)  # a tensor: no waiting for a GPU
    return -float(total) / len(cells)


class Log:
    """log.jsonl, and lines on the screen: means of all terms over the steps since the last line."""

    TERMS = ("log_likelihood", "kl_basal", "kl_mask", "kl_effect", "loss")

    def __init__(self, run):
        self.run, self.path = run, os.path.join(run.folder, "log.jsonl")
        self.sums = torch.zeros(len(self.TERMS), device=run.device)  # nothing waits for a GPU
        self.first = self.step = run.progress.step
        self.began = self.since = time.time()
        # The steps after last.pt are done again: their lines go.
        here = run.progress.phase, self.step
        kept = [line for line in read_log(run.folder)
                if (line.get("phase", here[0]), line["step"]) <= here]
        with data.replacing(self.path) as path, open(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)

    def add(self, value, terms):
        """A step: the objective and its terms, scalars on the device."""
        self.sums += torch.stack([*(terms[name] for name in self.TERMS[:-1]), -value.detach()])

    def means(self, epoch):
        """The next line, a dict; resets the sums."""
        model, step = self.run.model, self.run.progress.step
        n, self.step = step - self.step, step
        means = (self.sums / n).tolist()  # waits for a GPU
        self.sums.zero_()
        line = {"phase": self.run.progress.phase, "step": step, "epoch": epoch} | {
            name: round(value, 4) for name, value in zip(self.TERMS, means)}
        if model.has_mask and not model.masks_of_one:
            with torch.no_grad():
                probability = model.mask_probability()[model.n_cells > 0]
            line["mask_probability"] = round(probability.mean().item(), 5)
            line["mask_size"] = round((probability > 0.5).sum(1).float().mean().item(), 3)
        rate = n * self.run.config["batch_size"] / (time.time() - self.since)
        return line | {"cells_per_second": round(rate)}

    def write(self, line):
        """Write a line, and print it if it has a validation. DataError if a loss is not finite."""
        self.since = time.time()  # validation is no training time
        if not all(map(math.isfinite, line.values())):
            raise DataError(f"the loss was not finite before step {self.step}: start a new run with"
                            " a lower --lr, or with --clip 100")
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if "validation_loss" in line:
            per_step, config = (self.since - self.began) / (self.step - self.first), self.run.config
            n_starts = max(0, len(phases(config)) - 2 - self.run.progress.phase)  # warm, to come
            seconds = round(per_step * (
                config["steps"] - self.step + n_starts * (config["steps"] // 2)))
            print(f"step {self.step:,}  loss {line['loss']:.2f}  validation "
                  f"{line['validation_loss']:.2f}  {line['cells_per_second']:,} cells/s  "
                  f"{datetime.timedelta(seconds=seconds)} left", flush=True)


def read_log(folder):
    """The lines of log.jsonl as dicts, without any line that a killed run left unfinished."""
    lines = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "log.jsonl")) as file:
        for text in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


# ============================================================================================
# A run: what its folder holds, and what training and evaluation need
# ============================================================================================


@dataclasses.dataclass
class Run:
    """runs/NAME, opened by `Run.load` or begun by `new_run`."""

    folder: str
    config: dict         # every option (`configuration`); what moves is not in it
    screen: data.Screen  # as the file has it,
    model_screen: data.Screen  # and with perturbations, and their order, as the model knows them
    batches: data.Batches      # of the latter, for the model's device
    split: dict          # {"train", "validation", "test": (n,) positions of cells}
    fixed: dict          # what else a checkpoint holds that never changes
    model: torch.nn.Module
    progress: Progress = dataclasses.field(default_factory=Progress)
    optimizer_state: dict | None = None  # at step 0 there is none
    support: torch.Tensor | None = None  # (T, L) of mask entries, by `begin_masks`
    posteriors: dict = dataclasses.field(default_factory=dict)  # by `basal_states` in evaluate.py

    @classmethod
    def load(cls, folder, name="best.pt", device=None, **changes):
        """Open a run as best.pt or last.pt has it; changes are options: data, steps, precision.
        Raises DataError if a file is missing, damaged or not the one the run was trained on."""
        device, state = choose_device(device), load_checkpoint(folder, name)
        config, fixed = DEFAULTS | state["config"] | changes, state["fixed"]
        if not os.path.exists(config["data"]):
            raise DataError(f"{config['data']}: not there any more; --data says where it is now")
        screen = read_screen_of(config, fixed)
        if fixed["fingerprint"] != screen.fingerprint():
            raise DataError(f"{config['data']}: other cells, genes, labels or counts, or another "
                            "order, than the run was trained on; --data names the same file")
        model_screen = as_the_model_sees(screen, config, fixed["perturbations"],
                                         fixed.get("interactions"))
        return cls(folder, config, screen, model_screen, data.Batches(model_screen, device),
                   {name: cells.numpy() for name, cells in state["split"].items()}, fixed,
                   build_model(state).to(device), Progress(**state["progress"]), state["optimizer"],
                   state.get("support"))

    @property
    def device(self):
        """Where the model is."""
        return self.batches.device

    @property
    def seed(self):
        """What weights and random numbers follow from: --seed, or of a later warm start more."""
        return self.config["seed"] + self.progress.start

    @property
    def n_known(self):
        """With --adapt, how many perturbations, the first, the model knew before; else None."""
        return self.fixed["n_known"]

    @functools.cached_property
    def taught_by(self):
        """The split's cells; with --adapt, only those with perturbations that are new."""
        return {name: cells if self.n_known is None else
                cells[(self.model_screen.d[cells] >= self.n_known).any(1)]
                for name, cells in self.split.items()}

    @functools.cached_property
    def interaction_rows(self):
        """With --interactions, the rows {t: {value: row}} of `A @ value` beside row t of A, all
        positions in the model's perturbations; values are positions in the covariates."""
        row, rows = {name: t for t, name in enumerate(self.model_screen.perturbations)}, {}
        for t, v in self.fixed.get("interactions") or ():
            name = self.screen.perturbations[t]
            rows.setdefault(row[name], {})[v] = row[data.interaction_name(self.screen, name, v)]
        return rows

    def has_ended(self, progress):
        """Whether training that has come as far as `progress` has ended."""
        plan = phases(self.config)
        return progress.phase == len(plan) - 1 and progress.is_over(plan[-1])

    def save(self, name, optimizer=None):
        """Write best.pt, last.pt or warm0.pt, whole or not at all; without an optimizer, with the
        optimizer state that the run began with. torch.load ignores the hash at the end."""
        buffer = io.BytesIO()
        torch.save({"config": self.config, "fixed": self.fixed, "model": self.model.state_dict(),
                    "split": {name: torch.from_numpy(v) for name, v in self.split.items()},
                    "progress": vars(self.progress), "support": self.support,
                    "optimizer": optimizer.state_dict() if optimizer else self.optimizer_state},
                   buffer)
        with data.replacing(os.path.join(self.folder, name)) as path, open(path, "wb") as file:
            file.write(buffer.getbuffer())
            file.write(hash_of(buffer.getbuffer()))
        with data.replacing(f"{self.folder}/config.json") as path, open(path, "w") as file:
            json.dump(self.config, file, indent=2)  # for people; programs read checkpoints


def hash_of(content):
    """A hash of bytes, 64 of them."""
    return hashlib.blake2b(content, digest_size=32).hexdigest().encode()


def load_checkpoint(folder, name):
    """The dict in runs/NAME/best.pt, last.pt or warm0.pt; nothing in it is unpickled into code.
    Raises DataError if it is missing, is no checkpoint or differs from what was saved."""
    path = os.path.join(folder, name)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: not there; a run's folder gets it at the first validation with "
                        f"masks, and python train.py --resume {folder} goes on") from None
    if hash_of(content[:-64]) != content[-64:]:
        raise DataError(f"{path}: is damaged, was changed, or is no checkpoint of train.py")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def build_model(state):
    """The model of a checkpoint, with its weights, on the CPU."""
    model = MODELS[state["config"]["model"]](**state["fixed"]["arguments"])
    model.load_state_dict(state["model"])
    return model


def read_screen_of(config, fixed=None):
    """The screen of a configuration. With --adapt, genes and covariates are the other run's, which
    a checkpoint's `fixed` names."""
    options = {name: config[name] for name in data.READING} | {"stream": config["stream"]}
    if not config["adapt"]:
        return data.read_screen(config["data"], **options)
    screen = data.read_screen(config["data"], **options | {"covariate": []},
                              genes_of=fixed["gene_names"])
    screen.covariates = fixed["covariates"]
    screen.c = known_covariates(screen, config["covariate"], screen.covariates)
    return screen


def known_covariates(screen, columns, known):
    """Covariates (N, columns) of a screen's cells as positions in `known`, the values that a run
    was trained on; others are unknown. Raises DataError where a column has none of them."""
    place = {name: i for i, name in enumerate(known)}
    c = np.full((len(screen.rows), len(columns)), data.NONE)
    for k, column in enumerate(columns):
        values = [f"{column}={value}" for value in screen.obs(column).astype(str)]
        c[:, k] = [place.get(value, data.NONE) for value in values]
        unknown = ", ".join(sorted({*values} - {*known})[:5])
        if unknown and (c[:, k] != data.NONE).any():
            print(f"{screen.path}: the run knows no {unknown}: cells count as of unknown value")
        if (c[:, k] == data.NONE).all():
            raise DataError(f"{screen.path}: has {values[0]}, and the run was trained on "
                            f"{', '.join(known[:10])}: one of these is needed")
    return c


def as_the_model_sees(screen, config, known, interactions=None):
    """The same screen; perturbations that a trained model knows come first, in its order. For a
    model that adds no effects up (SVAE+), each combination is a perturbation of its own. With
    --interactions, pairs by `data.interactions_of`, these are further perturbations."""
    if not MODELS[config["model"]].adds_effects:
        screen = data.one_label_per_cell(screen)
    if interactions:
        column = config["covariate"].index(config["interactions"])
        screen = data.with_interactions(screen, column, interactions)
    return data.renumbered(screen, [*known, *sorted({*screen.perturbations} - {*known})])


def choose_device(name=None):
    """The device of that name, or a GPU if there is one, or the CPU. Raises DataError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda have all that is needed")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


# ============================================================================================
# How a run begins, goes on, and adapts
# ============================================================================================


def main(arguments=None):
    """Train: begin a run or go on with one, train, evaluate a simulated one. Returns its folder."""
    args, given = parse_arguments(arguments)
    device = choose_device(args.device)
    run = resumed(args, given, device) if args.resume else new_run(args, given, device)
    cells = ", ".join(f"{len(v):,} {name}" for name, v in run.split.items())
    print(f"{run.folder}: {run.config['model']} on {run.device}; cells: {cells}; counts "
          f"{run.batches.where}", flush=True)
    try:
        train(run)
    except KeyboardInterrupt:
        print("\nstopped; to go on from the last validation: python train.py --resume "
              + run.folder)
        sys.exit(130)
    if run.config["simulated"]:
        sys.stdout.flush()
        program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "evaluate.py")
        done = subprocess.run([sys.executable, program, run.folder, "--device", str(device)])
        if done.returncode:
            sys.exit(done.returncode)
    else:
        print(f"next: python evaluate.py {run.folder}")
    return run.folder


def new_run(args, given, device):
    """Begin a run: its folder, as at step 0. Where that fails, no folder is left."""
    base = load_checkpoint(args.adapt, "best.pt") if args.adapt else None
    config = configuration(args, given, base)
    folder = new_folder(args.name, config)
    try:
        run = begin(folder, config, given, base, device)
        run.save("last.pt")
        return run
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def new_folder(name, config):
    """Create runs/NAME; without a name, one made of the options, with a number if it is taken."""
    words = [os.path.splitext(os.path.basename(config["data"] or "simulated"))[0][:80],
             "adapted" * bool(config["adapt"]), config["model"],
             "basal" * config["correlated_basal"], "effects" * config["correlated_effects"],
             "sparsest" * (config["axes"] == "sparsest")]
    if config["split"] != "random":
        words += [f"f{config['train_combinations']:g}", f"split{config['split_seed']}"]
    base = name or "-".join([*filter(None, words), f"seed{config['seed']}"])
    for n in itertools.count(1):
        folder = os.path.join("runs", base if n == 1 else f"{base}-{n}")
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)  # of commands that start side by side, one makes it
            return folder
        if name:
            raise DataError(f"{folder} exists: choose another --name, or --resume {folder}")


def begin(folder, config, given, base, device):
    """A run at step 0; base is the best.pt that --adapt starts from, or None. Options that the
    screen decides become part of config."""
    if config["simulated"]:
        config["data"] = os.path.abspath(os.path.join(folder, "simulated.h5ad"))
        of_preset = data.SPARSE_SHIFT if config["preset"] == "sparse-shift" else {}
        data.simulate(config["data"], **of_preset | {
            name.removeprefix("simulated_"): value for name, value in config.items()
            if name.startswith("simulated_")})
    screen = read_screen_of(config, base and base["fixed"])
    data.say(screen.path, *screen.notes, *([] if base else data.unbalanced(screen, [
        screen.label_column, config["split_column"], *config["covariate"]])))
    split = data.split_cells(screen, config["split_seed"], config["split"],
                             config["train_combinations"])
    known = [] if base is None else [  # a perturbation without training cells is not known
        t for t, n in zip(base["fixed"]["perturbations"], base["model"]["n_cells"]) if n > 0]
    interactions = config["interactions"] and data.interactions_of(
        screen, config["covariate"].index(config["interactions"]), split["train"],
        config["min_cells"])
    if interactions == []:
        raise DataError(f"{config['data']}: no perturbation has {config['min_cells']} training "
                        f"cells (--min-cells) with each of two values of {config['interactions']}")
    model_screen = as_the_model_sees(screen, config, known, interactions)
    batches = data.Batches(model_screen, device)
    config["stream"] = batches.from_file
    if batches.from_file:  # neighbours are read together: positions must rise
        split = {name: np.sort(cells) for name, cells in split.items()}
    d = model_screen.d[split["train"]]  # n_t of A.1, here for each t:
    n_cells = torch.from_numpy(np.bincount(d[d != data.NONE],
                                           minlength=len(model_screen.perturbations)))
    if base:
        model, arguments = adapted_model(config, base, n_cells)
    else:
        if config["preset"] is None:
            by_size = own_settings(0.64 * len(screen.rows), len(screen.perturbations),
                                   given.get("n_latent"))
            config |= {name: given.get(name, value) for name, value in by_size.items()}
        if config["axes"] == "learned":
            config["warm_starts"] = 1
        model, arguments = fresh_model(config, screen, batches, split["train"], n_cells,
                                       config["seed"])
    fixed = {"fingerprint": screen.fingerprint(), "gene_names": list(screen.gene_names),
             "perturbations": model_screen.perturbations, "covariates": screen.covariates,
             "interactions": interactions, "arguments": arguments,
             "n_known": len(known) if base else None}
    run = Run(folder, config, screen, model_screen, batches, split, fixed, model.to(device))
    if interactions:
        print(f"  {len(run.interaction_rows)} perturbations have {len(interactions)} interactions "
              f"with {config['interactions']}")
    if not (len(run.taught_by["train"]) and len(run.taught_by["validation"])):  # by --adapt
        raise DataError(f"{config['data']}: has no training or no validation cells with "
                        "perturbations that are new to the run")
    return run


def fresh_model(config, screen, batches, cells, n_cells, seed):
    """A new model and its arguments; `cells` are the positions of training cells."""
    x_mean, x_std, log_frequency, log_theta = data.training_statistics(batches, cells)
    arguments = {option_name(flag): config[option_name(flag)] for flag, *_ in MODEL_OPTIONS} | {
        "n_cells": n_cells, "x_mean": x_mean.cpu(), "x_std": x_std.cpu(),
        "n_covariates": len(screen.covariates)}
    torch.manual_seed(seed)
    model = MODELS[config["model"]](**arguments)
    for value, name in enumerate(screen.covariates):
        if not (screen.c[cells] == value).any():
            if seed == config["seed"]:  # the first time
                print(f"  {name}: no training cell has it; its cells count as of unknown value")
            for network in (model.encoder, model.decoder):
                network.first.weight.data[:, network.part_sizes[0] + value] = 0
    if config["start"] == "data":
        model.start_from(log_frequency, log_theta)
    return model, arguments


def adapted_model(config, base, n_cells):
    """A trained run's model with places for further perturbations, and its arguments."""
    old, arguments = build_model(base), base["fixed"]["arguments"] | {"n_cells": n_cells}
    torch.manual_seed(config["seed"])
    model = MODELS[config["model"]](**arguments)
    continue_from(model, old, torch.nonzero(old.n_cells > 0).flatten())
    return model, arguments | {"n_cells": model.n_cells.clone()}


def resumed(args, given, device):
    """The run of --resume, as last.pt has it. It may be trained longer or in another precision, and
    its file may have moved: its fingerprint says whether it is the same."""
    if args.name or args.preset or given.keys() - {"steps", "precision"}:
        raise DataError(f"--resume takes its options from {args.resume}; only --steps, --precision,"
                        " --device and --data can be given")
    changes = given | ({"data": os.path.abspath(args.data)} if args.data else {})
    run = Run.load(args.resume, "last.pt", device, **changes)
    step = max([run.progress.step, *run.progress.ends])
    if "steps" in given and (run.has_ended(run.progress) or given["steps"] <= step):
        raise DataError(f"{run.folder} is at step {step:,}, where --patience may have ended it: "
                        "--steps must be larger, and patience not at its end")
    if changes and not run.has_ended(run.progress):
        run.save("last.pt")
    return run


# ============================================================================================
# The options: name, default, what is allowed, what it is and where the default comes from
# ============================================================================================

POSITIVE = (1e-30, 2**32, "positive and below 2^32")
FRACTION = (0, 1, "a fraction, from 0 to 1")

# "Replogle" and "Norman" are the settings of the paper (A.4) and its code for its two data sets.
MODEL_OPTIONS = [  # 2.1 to 2.4: the arguments of SAMSVAE
    ("--correlated-basal", True, bool, "q(z_basal) sees z_pert too (paper: best of Table 1)"),
    ("--correlated-effects", True, bool, "q(e | m), not q(e), with --axes learned (paper: best)"),
    ("--n-latent", 100, AT_LEAST_1, "latent dimensions (Replogle; Norman 200)"),
    ("--n-hidden", 400, AT_LEAST_1, "width of encoder and decoder (paper)"),
    ("--n-layers", 1, AT_LEAST_1, "hidden layers of encoder and decoder (paper)"),
    ("--effect-hidden", 200, AT_LEAST_1, "width of f_emb (Replogle; Norman 400)"),
    ("--effect-layers", 2, AT_LEAST_1, "hidden layers of f_emb (Replogle; Norman 4)"),
    ("--alpha", 0.001, (1e-30, 1 - 1e-6, "from 1e-30 to 1 - 1e-6"),
     "prior probability of a mask entry (Replogle; Norman 0.01)"),
    ("--beta", 1.0, POSITIVE, "prior variance of an effect (paper)"),
    ("--mask-a", 1.0, POSITIVE, "a of Beta-Bernoulli masks, prior Beta(a, b) (ours)"),
    ("--mask-b", 2.0, POSITIVE, "b of the same, and of SVAE+'s Beta(1, b) (paper, for SVAE+)"),
]
OPTIONS = [
    ("--model", "sams-vae", list(MODELS), "cpa-vae: every mask entry is 1; cvae: conditional VAE"),
    ("--axes", "sparsest", ["learned", "sparsest"], "of masks: learned (paper), sparsest (ours)"),
    ("--warm-starts", 1, AT_LEAST_1, "runs of the first half of the steps, of seeds --seed, --seed "
     "+ 1, ..., whose mean decides on the sparsest axes and on the support of masks (ours)"),
    *MODEL_OPTIONS,
    ("--interactions", None, "COLUMN", "one of --covariate: a perturbation also has an effect for "
     "each value that it was seen with, if these are two or more (ours)"),
    # the optimisation (2.3, A.4)
    ("--steps", 150_000, AT_LEAST_1, "training steps (Replogle; Norman 30,000)"),
    ("--batch-size", 512, AT_LEAST_1, "cells per step (paper)"),
    ("--particles", 5, AT_LEAST_1, "Monte Carlo samples per step (paper)"),
    ("--lr", 3e-4, POSITIVE, "learning rate of Adam (paper)"),
    ("--mask-lr", 0.03, POSITIVE, "of mask logits with --axes sparsest or --adapt (ours)"),
    ("--effect-lr", 0.0, AT_LEAST_0, "of a free q(e); 0 for --lr (paper; ours 0.01)"),
    ("--weight-decay", 1e-6, AT_LEAST_0, "of Adam (paper)"),
    ("--start", "data", ["data", "zero"], "bias and dispersions by the data (ours), zero (paper)"),
    ("--patience", 0, AT_LEAST_0, "steps without better validation that end a phase; 0: never"),
    ("--clip", 0.0, AT_LEAST_0, "largest gradient norm, 0 for none (Replogle none; Norman 100)"),
    ("--seed", 0, AT_LEAST_0, "of the weights and of training (paper: five seeds)"),
    # the split (4.1, 4.2)
    ("--split", "random", list(data.SPLITS), "Replogle random; Norman two tasks, see data.py"),
    ("--train-combinations", 1.0, FRACTION, "part of combinations to train on (Norman 0 to 1)"),
    ("--split-seed", 0, AT_LEAST_0, "of the split (Replogle 0, Norman 0 to 4)"),
    # the run (ours)
    ("--precision", "float32", ["float32", "tf32", "bf16"], "of matrix products in training"),
    ("--stream", None, bool, "leave counts in the file (default: if they may take a third of RAM)"),
    ("--log-every", 50, AT_LEAST_1, "steps between lines of log.jsonl"),
    ("--validate-every", 500, AT_LEAST_1, "steps between validations, each saving last.pt"),
]
SIMULATION_OPTIONS = [  # of the screen that is simulated without --data
    *(("--simulated-" + flag[2:], *row) for flag, *row in data.SIMULATION_OPTIONS
      if flag not in ("--sparse-shift", "--seed")),  # the former: --preset sparse-shift
    ("--simulated-seed", 0, AT_LEAST_0, "its seed, if not --seed"),
]
DEFAULTS = {option_name(flag): default for flag, default, *_ in OPTIONS + SIMULATION_OPTIONS}
DEFAULTS |= {name: default for name, (default, *_) in data.READING.items()}
DEFAULTS["min_cells"] = data.MIN_CELLS


def own_settings(n_cells, n_perturbations, n_latent=None):
    """Settings of a file without --preset, by its training cells (64 % of all, whatever the split),
    its perturbations and --n-latent (ours). A perturbation touches three latents a priori.

    Chosen, with the first row of PRESETS, by validation loss and by effects in validation cells, on
    two real files and four simulated screens of 4,000 to 13,000 training cells. Above 50,000 cells
    or 300 perturbations nothing was measured: settings there lean on the paper. Four warm starts
    take 2.5 times as long as one; with 500 perturbations one finds the masks as well.
    """
    epoch = math.ceil(n_cells / 256)  # steps
    large, many = n_cells > 50_000, n_perturbations > 300
    n_latent = n_latent or (100 if many else 30)
    return dict(n_latent=n_latent, alpha=min(0.5, 3 / n_latent), n_hidden=400 if large else 100,
                lr=1e-3 if large else 3e-3, steps=min(max(3000, 100 * epoch), 50_000),
                validate_every=min(max(50, epoch), 500), patience=max(500, 20 * epoch),
                warm_starts=1 if large or many else 4)


# What --preset changes; a flag overrides it. The defaults above are Replogle's already.
PAPER = dict(axes="learned", start="zero", min_cells=0)
NORMAN = PAPER | dict(one_hot_prefix="guide_", layer="counts", gene_column="highly_variable",
                      n_latent=200, effect_hidden=400, effect_layers=4, alpha=0.01, steps=30_000,
                      clip=100.0)
PRESETS = {
    # A file of one's own, with `own_settings`: f_emb costs a small screen much; with one particle a
    # step takes 0.6 times as long as with five; few cells of a batch move an effect.
    None: dict(correlated_effects=False, batch_size=256, particles=1, effect_lr=0.01, clip=100.0),
    "replogle": PAPER | dict(perturbation_column="sgID_AB", control=["*non-targeting*"]),
    "norman-ood": NORMAN | dict(split="norman-ood"),
    "norman-data-efficiency": NORMAN | dict(split="norman-data-efficiency"),
    # Without --data: a small model, and few steps, hence the higher learning rate.
    "simulated": dict(n_latent=10, n_hidden=100, effect_hidden=100, alpha=0.01, steps=5000,
                      batch_size=256, lr=1e-2, start="zero", min_cells=0, split_column="split"),
    # The benchmark of the SVAE+ paper, without --data or on a file of data.py simulate. Chosen on a
    # screen of seed 100: sizes and rates by validation loss, alpha and mask_b by F1 of targets.
    "sparse-shift": dict(n_latent=15, n_hidden=200, n_layers=2, alpha=1e-30, mask_b=100.0,
                         steps=5000, batch_size=256, particles=1, lr=1e-3, effect_lr=0.01,
                         clip=100.0, min_cells=0, split_column="split") | {
        f"simulated_{name}": data.SPARSE_SHIFT[name]
        for name in ("perturbations", "cells", "pairs", "effect")},
}
# What --adapt changes of the other run's options: what its file held, and how it was trained. Rates
# were chosen by validation loss on the screen of the preset sparse-shift.
ADAPTED = dict(steps=2000, lr=5e-3, effect_lr=0.02, mask_lr=0.03, patience=500, validate_every=100,
               weight_decay=0.0, split="random", train_combinations=1.0, gene_column=None,
               gene_names=None, subset=[], exclude=[], split_column=None, stream=None)
# An option that is given resets its rivals, whether a preset or an adapted run had set them.
RIVALS = {"split": dict(split_column=None), "split_column": dict(split="random"),
          "perturbation_column": dict(one_hot_prefix=None),
          "one_hot_prefix": dict(perturbation_column=None, control=[], combination_separator=None)}


def parse_arguments(arguments=None):
    """The arguments, and which of DEFAULTS they give, a dict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("--data", metavar="FILE.h5ad", help="counts (default: simulate a screen)")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name],
                        help="settings of the paper's experiments")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", metavar="runs/NAME", type=os.path.normpath,
                       help="go on with this run")
    which.add_argument("--adapt", metavar="runs/NAME", type=os.path.normpath, help="a new run: "
                       "this one's model learns new perturbations of --data (Lopez et al. 2023)")
    parser.add_argument("--name", help="the run's folder is runs/NAME (default: from the options)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    data.add_screen_options(parser)
    add_options(parser.add_argument_group("the model and its training"),
                OPTIONS + SIMULATION_OPTIONS)
    args = parser.parse_args(arguments)
    return args, {name: value for name, value in vars(args).items()
                  if name in DEFAULTS and value is not None}


def configuration(args, given, base=None):
    """Every option of a new run: DEFAULTS, what the preset changes, what was given. (`begin` adds
    `own_settings`, which need the screen.) With --adapt the options of model and labels are
    the other run's, whose best.pt is `base`."""
    preset = args.preset or (None if args.data else "simulated")
    if args.data is None and (args.adapt or preset not in ("simulated", "sparse-shift")):
        raise DataError(f"{'--adapt' if args.adapt else '--preset ' + preset} needs --data")
    if args.adapt:
        of_model = {"model", "axes", *(option_name(flag) for flag, *_ in MODEL_OPTIONS)}
        if args.preset or given.keys() & {*of_model, "start", "covariate"}:
            raise DataError(f"the model's options, and covariates, come from {args.adapt} in a run "
                            "that adapts it: leave them out")
        config = DEFAULTS | base["config"] | ADAPTED
    else:
        config = DEFAULTS | PRESETS[preset] | {"simulated_seed": given.get("seed", 0)}
    for name in given:
        config |= RIVALS.get(name, {})
    config |= given | {"preset": preset, "data": args.data and os.path.abspath(args.data),
                       "adapt": args.adapt, "simulated": args.data is None}

    if config["interactions"] and (config["interactions"] not in config["covariate"] or args.adapt
                                   or not MODELS[config["model"]].adds_effects):
        raise DataError(f"--interactions {config['interactions']} needs the same --covariate and a "
                        "model that adds effects up (not svae+), and cannot be adapted")

    # Options that mean nothing for a model are off: runs that differ in them alone share a row of
    # a table. (In the paper, too, the guides of SVAE+ and the conditional VAE are mean-field.)
    model = MODELS[config["model"]]
    if not model.has_correlated_guide:
        config["correlated_basal"] = config["correlated_effects"] = False
    if not model.has_mask:
        config["axes"] = "learned"
    if config["axes"] == "sparsest":  # effects are turned, and f_emb cannot be
        if given.get("correlated_effects") and model.has_correlated_guide:
            raise DataError("--correlated-effects needs --axes learned")
        config["correlated_effects"] = False
    return config


if __name__ == "__main__":
    data.run(main)
