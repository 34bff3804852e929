"""SAMS-VAE, the Sparse Additive Mechanism Shift Variational Autoencoder, in plain PyTorch.

Michael Bereket and Theofanis Karaletsos, "Modelling Cellular Perturbations with the Sparse Additive
Mechanism Shift Variational Autoencoder", NeurIPS 2023, arXiv 2311.02794. All section, equation and
algorithm numbers in this file are those of the paper. The file needs torch alone: copy it.

The generative process (Algorithm 1 with the likelihood of section 2.2):

    for each perturbation t
        e_t   ~ N(0, beta I), beta = 1            where it moves the latent state
        m_t   ~ Bern(alpha)                       which latent dimensions it touches
    for each cell i
        z_i^b ~ N(0, I)                           the basal state
        z_i   = z_i^b + sum_t d_it (e_t * m_t)    eq. 1: its perturbations add up to z_i^p
        rho_i = softmax(decoder(z_i))             expected transcript frequencies
        x_i   ~ NB(mean l_i rho_i, inverse dispersion theta)

Symbols and shapes. K Monte Carlo particles, B cells of a minibatch, N cells in all, G genes,
T perturbations, L latent dimensions, P the largest number of perturbations in one cell, U draws.

    paper    code        shape      meaning
    x_i      x           (B, G)     transcript counts, as floats
    l_i      library     (B, 1)     total counts of the cell over the G genes
    d_i      d           (B, P)     dosages in index form: the perturbations of each cell, filled up
                                    with NONE = -1; a control cell is a row of NONE
    z^b      z_basal     (K, B, L)  basal state
    m_t      mask        (K, U, L)  0 or 1; U draws of the perturbations `t`, an index tensor (U,)
    e_t      effect      (K, U, L)
    z^p      z_pert      (K, B, L)  latent offset of a cell
    rho_i    log_rho     (K, B, G)  log expected frequencies
    theta_d  log_theta   (G,)       log inverse dispersion, one per gene
    n_t      n_cells     (T,)       training cells that received perturbation t

The paper's D_x is G and its D_z is L; f_theta is `decoder`, f_enc `encoder`, f_emb `f_emb`; the
free parameters of its mean-field guide are mask_logits, effect_loc and effect_log_var. Where a
minibatch has fewer cells than there are perturbations, (m, e) is drawn for the perturbations of its
cells only (see `elbo`): hence U draws in place of T.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NONE = -1  # fills the free places of a row of dosages


# ============================================================================================
# The likelihood (section 2.2)
# ============================================================================================


def nb_log_likelihood(x, log_mean, log_theta):
    """log NB(x | mean, inverse dispersion theta), summed over genes (section 2.2).

    The Gamma-Poisson mixture lambda ~ Gamma(shape theta, rate theta / mean), x ~ Poisson(lambda)
    has E[x] = mean, Var[x] = mean + mean^2 / theta and, marginally over lambda,

        log p(x) = log G(x + theta) - log G(theta) - log G(x + 1)
                   + x log(mean / (mean + theta)) + theta log(theta / (mean + theta)),

    where G is the gamma function. The two fractions are sigmoid(s) and sigmoid(-s) of
    s = log mean - log theta, which keeps everything in log space.

    x          (B, G)      counts
    log_mean   (..., B, G)
    log_theta  (G,)        used between -20 and 20: beyond, the distribution does not change within
                           floating-point precision (Poisson above), but gamma functions overflow
    returns    (..., B)    nats
    """
    log_theta = log_theta.clamp(-20, 20)
    # A small difference of large numbers: in double precision. Every particle shares it, so that it
    # is computed once and not K times.
    x_, theta_ = x.double(), log_theta.double().exp()
    log_gammas = torch.lgamma(x_ + theta_) - torch.lgamma(theta_) - torch.lgamma(x_ + 1)

    s = log_mean - log_theta  # (..., B, G)
    return (log_gammas.sum(-1).to(s.dtype) + (x * F.logsigmoid(s)).sum(-1)
            + F.logsigmoid(-s) @ log_theta.exp())


# ============================================================================================
# The pieces of the guide (section 2.3): straight-through masks, Gaussians, networks
# ============================================================================================


def straight_through_bernoulli(logits, temperature=1.0):
    """Sample m ~ Bern(sigmoid(logits)) with a gradient: Gumbel-softmax, straight through (2.3).

    The difference of two Gumbel variables is logistic noise, so logits + noise > 0 has probability
    sigmoid(logits) exactly: the forward value is a true Bernoulli sample, 0 or 1. The backward pass
    pretends that the sample had been the relaxed one, sigmoid((logits + noise) / temperature).
    """
    noise = torch.rand_like(logits).logit()
    soft = torch.sigmoid((logits + noise) / temperature)
    hard = (logits + noise > 0).to(soft.dtype)
    # hard - soft is exact in floating point because soft >= 1/2 wherever hard = 1, so that adding
    # soft again gives 0 or 1 to the last bit. (hard + soft) - soft would round.
    return soft + (hard - soft).detach()


def kl_bernoulli(logits, alpha):
    """KL(Bern(sigmoid(logits)) || Bern(alpha)), elementwise and finite for every finite logit.

    p log(p / alpha) + (1 - p) log((1 - p) / (1 - alpha)), with log(1 - p) = -softplus(logits).
    """
    p = torch.sigmoid(logits)
    prior_logit = math.log(alpha) - math.log1p(-alpha)
    return p * (logits - prior_logit) - F.softplus(logits) - math.log1p(-alpha)


def kl_normal(loc, var, prior_var=1.0):
    """KL(N(loc, var) || N(0, prior_var)), elementwise."""
    return 0.5 * ((var + loc**2) / prior_var - 1 - (var / prior_var).log())


class MLP(nn.Module):
    """Linear, LeakyReLU, further hidden layers with a residual connection, Linear.

    The input is the concatenation of several parts, and is never concatenated: a linear map of
    [a, b] is W_a a + W_b b, so each part is multiplied in its own shape and the products are
    broadcast. What every particle shares, such as x (B, G) beside z_pert (K, B, L), thus costs one
    product and not K. A part that holds integers stands for their one-hot vectors: it selects
    columns of W.
    """

    def __init__(self, part_sizes, n_hidden, n_layers, n_out):
        super().__init__()
        self.part_sizes = part_sizes
        self.first = nn.Linear(sum(part_sizes), n_hidden)
        self.residual = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))
        self.last = nn.Linear(n_hidden, n_out)

    def forward(self, *parts):
        h = self.first.bias
        for part, weight in zip(parts, self.first.weight.split(self.part_sizes, dim=1)):
            one_hot = not part.is_floating_point()
            h = h + (F.embedding(part, weight.T) if one_hot else F.linear(part, weight))
        h = F.leaky_relu(h)
        for layer in self.residual:
            h = h + F.leaky_relu(layer(h))
        return self.last(h)


def loc_and_variance(output):
    """Split a network's output (..., 2 L) into mean and variance of a Gaussian, each (..., L)."""
    loc, log_var = output.chunk(2, dim=-1)
    return loc, log_var.exp() + 1e-4


# ============================================================================================
# SAMS-VAE (sections 2.1 and 2.3)
# ============================================================================================


def sum_effects(mask, effect, d):
    """Eq. 1: z_pert_i = sum over t of d_it (e_t * m_t).

    mask, effect (K, U, L); d (B, P) holds positions 0..U-1 on their second axis, or NONE.
    Returns (K, B, L); zero for a row of NONE, a control cell.
    """
    offset = F.pad(mask * effect, (0, 0, 1, 0))  # a row of zeros in front: where NONE + 1 points
    # index_select, here and below: on a CPU the gradient of x[index] adds up in random order.
    return offset.index_select(1, (d + 1).flatten()).unflatten(1, d.shape).sum(dim=-2)


class SAMSVAE(nn.Module):
    """Generative model p (2.1, 2.2) and guide q (2.3) of SAMS-VAE.

    n_cells            (T,) training cells that received each perturbation
    x_mean, x_std      (G,) mean and standard deviation of log(1 + x) over the training cells
    n_latent           L
    n_hidden, n_layers width and number of the hidden layers of encoder and decoder
    effect_hidden, effect_layers    the same for f_emb
    correlated_basal   q(z_basal) sees [x, z_pert] rather than x alone ("correlated encoder", 2.3)
    correlated_effects q(e_t | m_t) = N(f_emb(m_t, t)) rather than free ("correlated embeddings")
    alpha, beta        the priors m ~ Bern(alpha), e ~ N(0, beta I)
    """

    def __init__(self, n_cells, x_mean, x_std, n_latent=100, n_hidden=400, n_layers=1,
                 effect_hidden=200, effect_layers=2, correlated_basal=True,
                 correlated_effects=True, alpha=0.001, beta=1.0):
        super().__init__()
        n_perturbations, n_genes = len(n_cells), len(x_mean)
        self.correlated_basal, self.correlated_effects = correlated_basal, correlated_effects
        self.alpha, self.beta = alpha, beta
        self.register_buffer("n_cells", torch.as_tensor(n_cells, dtype=torch.float32))
        self.register_buffer("x_mean", torch.as_tensor(x_mean, dtype=torch.float32))
        # A gene that is constant in training, up to rounding, must not divide by zero.
        x_std = torch.as_tensor(x_std, dtype=torch.float32)
        self.register_buffer("x_std", torch.where(x_std > 1e-6, x_std, 1.0))

        # p(x | z): decoder and inverse dispersion (2.2).
        self.decoder = MLP([n_latent], n_hidden, n_layers, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))

        # q(m), q(e | m) and q(z_basal | ...) (2.3).
        self.init_mask(n_perturbations, n_latent)
        if correlated_effects:
            self.f_emb = MLP([n_latent, n_perturbations], effect_hidden, effect_layers,
                             2 * n_latent)
        else:
            self.effect_loc = nn.Parameter(torch.zeros(n_perturbations, n_latent))
            self.effect_log_var = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        encoder_parts = [n_genes, n_latent] if correlated_basal else [n_genes]
        self.encoder = MLP(encoder_parts, n_hidden, n_layers, 2 * n_latent)

    # The mask and its prior. Another kind of mask is another version of these three methods.

    def init_mask(self, n_perturbations, n_latent):
        """Create the guide's mask parameters: q(m_tl) = Bern(sigmoid(mask_logits_tl))."""
        self.mask_logits = nn.Parameter(torch.zeros(n_perturbations, n_latent))

    def mask_probability(self):
        """q(m_tl = 1), (T, L)."""
        t = torch.arange(len(self.n_cells), device=self.n_cells.device)
        return torch.sigmoid(self._posterior_logits(t))

    def sample_mask(self, t, n_particles):
        """Draw m_t ~ q: masks (K, U, L) of 0 and 1, and KL(q(m_t) || Bern(alpha)), (U,)."""
        logits = self._posterior_logits(t)
        mask = straight_through_bernoulli(logits.expand(n_particles, *logits.shape))
        return mask, kl_bernoulli(logits, self.alpha).sum(-1)

    def _posterior_logits(self, t):
        prior_logit = math.log(self.alpha) - math.log1p(-self.alpha)
        return torch.where(self._seen(t), self.mask_logits.index_select(0, t), prior_logit)

    def _seen(self, t):
        return self.n_cells[t].unsqueeze(-1) > 0

    # The other latent variables.

    def sample_effects(self, t, n_particles):
        """Draw (m_t, e_t) ~ q(m_t) q(e_t | m_t), eq. 4 and 5.

        t (U,) perturbations; repeats are allowed, every place is a draw of its own.
        Returns mask, effect (K, U, L) and kl_mask (U,), kl_effect (K, U): the KL to the prior,
        summed over latents, in closed form given the sampled mask.

        A perturbation that no training cell received has its prior as its exact posterior. q is set
        to the prior there: its KL is zero, and what the model predicts for it is the prior's.
        """
        mask, kl_mask = self.sample_mask(t, n_particles)
        if self.correlated_effects:
            loc, var = loc_and_variance(self.f_emb(mask, t))  # (K, U, L)
        else:
            loc = self.effect_loc.index_select(0, t)  # (U, L)
            var = self.effect_log_var.index_select(0, t).exp()
        seen = self._seen(t)
        loc, var = torch.where(seen, loc, 0.0), torch.where(seen, var, self.beta)
        effect = loc + var.sqrt() * torch.randn_like(mask)
        kl_effect = kl_normal(loc, var, self.beta).sum(-1).expand(n_particles, -1)
        return mask, effect, kl_mask, kl_effect

    def encode(self, x, z_pert):
        """Mean and variance of q(z_basal | x, z_pert): (K, B, L), or (B, L) if it sees x alone."""
        x = (torch.log1p(x) - self.x_mean) / self.x_std
        parts = (x, z_pert) if self.correlated_basal else (x,)
        return loc_and_variance(self.encoder(*parts))

    def log_rho(self, z):
        """Log expected transcript frequencies (..., G) of latent states z (..., L)."""
        return F.log_softmax(self.decoder(z), dim=-1)

    def log_likelihood(self, x, z):
        """log p(x | z), (K, B), of counts x (B, G) with their observed library size (2.2)."""
        library = x.sum(-1, keepdim=True)
        return nb_log_likelihood(x, self.log_rho(z) + library.log(), self.log_theta)


# ============================================================================================
# CPA-VAE (section 2.4)
# ============================================================================================


class CPAVAE(SAMSVAE):
    """SAMS-VAE with every mask entry fixed to 1: z_i^p = sum over t of d_it e_t (2.4).

    With correlated_effects, f_emb(1, t) is a network in place of a table of the same e_t.
    """

    def init_mask(self, n_perturbations, n_latent):
        """A fixed mask has no parameters."""
        self.mask_shape = (n_perturbations, n_latent)

    def mask_probability(self):
        """One everywhere, (T, L)."""
        return torch.ones(self.mask_shape, device=self.n_cells.device)

    def sample_mask(self, t, n_particles):
        """Masks of one (K, U, L), and no KL (U,)."""
        mask = torch.ones(n_particles, len(t), self.mask_shape[1], device=t.device)
        return mask, torch.zeros(len(t), device=t.device)


# ============================================================================================
# The training objective (section 2.3, eq. 3, and A.1)
# ============================================================================================


def elbo(model, x, d, n_particles=5):
    """Unbiased estimate, from a minibatch, of ELBO / N (eq. 3; per minibatch: A.1).

    x (B, G) counts, no row all zero; d (B, P) dosages. With KL_t = KL(q(m_t) q(e_t|m_t) || p),

        1/B sum_i [ log p(x_i | z_i) - KL(q(z_i^b) || p) - sum_{t in d_i} KL_t / n_t ].

    Returns the estimate, a scalar, and a dict of its terms by name: detached scalars, per cell,
    that stay on the device. elbo = log_likelihood - kl_basal - kl_mask - kl_effect.
    """
    # Which (m_t, e_t) to draw? A cell's term depends on nothing but the marginal draw of its own
    # perturbations. Cells may share one draw of all T or have draws of their own: the expectation
    # is the same, and we take whichever is fewer.
    n_perturbations = len(model.n_cells)
    if n_perturbations <= d.numel():
        t, place = torch.arange(n_perturbations, device=d.device), d
    else:
        t = d.clamp(min=0).flatten()
        place = torch.where(d == NONE, NONE, torch.arange(d.numel(), device=d.device).view_as(d))
    mask, effect, kl_mask, kl_effect = model.sample_effects(t, n_particles)  # (K, U, L), .. (K, U)

    z_pert = sum_effects(mask, effect, place)  # eq. 1: (K, B, L)
    loc, var = model.encode(x, z_pert)
    z_basal = loc + var.sqrt() * torch.randn_like(z_pert)
    z = z_basal + z_pert  # (K, B, L)

    # Effect and mask of t are shared by every cell that received t: the full ELBO holds their KL
    # once. A cell that received t pays 1/n_t of it, so that over an epoch the shares of all its
    # cells sum to exactly one, however the cells fall into minibatches. n_t counts training cells;
    # where there are none the KL is zero and so is the share.
    n_t = model.n_cells[t]
    share = (n_t > 0) / n_t.clamp(min=1)  # (U,)

    def paid(kl):
        """(..., U) -> (..., B): what each cell pays of its perturbations' KL."""
        in_front = F.pad(share * kl, (1, 0))  # as in sum_effects
        return in_front.index_select(-1, (place + 1).flatten()).unflatten(-1, place.shape).sum(-1)

    terms = {
        "log_likelihood": model.log_likelihood(x, z).mean(),
        "kl_basal": kl_normal(loc, var).sum(-1).mean(),
        "kl_mask": paid(kl_mask).mean(),
        "kl_effect": paid(kl_effect).mean(),
    }
    value = terms["log_likelihood"] - terms["kl_basal"] - terms["kl_mask"] - terms["kl_effect"]
    return value, {name: term.detach() for name, term in terms.items()}


# ============================================================================================
# Marginal likelihood (section 3.1)
# ============================================================================================


@torch.no_grad()
def predictive_iwelbo(model, batches, n_particles=100, chunk=2**23):
    """Predictive importance-weighted ELBO of each cell, (N,) nats.

    (M, E)_k ~ q, k = 1..K, is drawn once and shared by all cells. Then, for every cell,

        log 1/K sum_k p(x, z_k^b | M_k, E_k) / q(z_k^b | x, M_k, E_k),   z_k^b ~ q:

    a lower bound, tight as K grows, on log E_q(M,E)[p(x | M, E)], the log density of a new cell
    under the posterior predictive. The ratio p/q of the global latents does not enter, as it does
    in the joint IWELBO of eq. 6 and 7. The mean of this quantity over test cells is what the
    authors' code computes for Table 1.

    batches yields (x (B, G), d (B, P)). At most about `chunk` numbers per temporary array: memory
    grows with neither K nor N, except for the draws of (M, E) themselves, (K, T, L).
    """
    t = torch.arange(len(model.n_cells), device=model.n_cells.device)
    mask, effect, _, _ = model.sample_effects(t, n_particles)
    result = []
    for x, d in batches:
        log_w = []
        for k in torch.arange(n_particles).split(max(1, chunk // x.numel())):
            z_pert = sum_effects(mask[k], effect[k], d)
            loc, var = model.encode(x, z_pert)
            noise = torch.randn_like(z_pert)
            z_basal = loc + var.sqrt() * noise
            # log N(z; 0, I) - log N(z; loc, var); the factors (2 pi)^(-L/2) cancel.
            log_p_over_q = 0.5 * (noise**2 + var.log() - z_basal**2).sum(-1)
            log_w.append(model.log_likelihood(x, z_basal + z_pert) + log_p_over_q)
        result.append(torch.logsumexp(torch.cat(log_w), dim=0) - math.log(n_particles))
    return torch.cat(result)


# ============================================================================================
# Average treatment effects (section 3.2)
# ============================================================================================


@torch.no_grad()
def average_treatment_effects(model, dosages, n_particles=2500, n_samples=1, library=1e4, seed=0,
                              chunk=2**22):
    """Model-based average treatment effect of each row of dosages against control (3.2).

    ATE(d*) = E over z_basal ~ p, (M, E) ~ q of [ E[y | do(d*)] - E[y | do(no perturbation)] ],

    where y is one of two functions of the counts x of a cell with the given library size:

        counts           y = x: the inner expectation is exactly library * rho
        log_normalised   y = log2(1 + 1e4 x / sum x), by n_samples sampled cells per particle

    All arms share every latent: z_basal, masks, effects and the gamma variables of the likelihood.
    They also start their Poisson draws from the same random numbers: a dosage without any
    perturbation has an effect of exactly zero.

    dosages (C, P). Returns a dict of two (C, G) tensors, "counts" and "log_normalised".
    At most about `chunk` numbers per temporary array.
    Differs from the authors' code, which draws a new z_basal for each arm.
    """
    device = model.n_cells.device
    n_genes, n_latent = len(model.log_theta), model.decoder.part_sizes[0]
    t = torch.arange(len(model.n_cells), device=device)
    theta = model.log_theta.clamp(-20, 20).exp()  # as in nb_log_likelihood
    poisson_noise = torch.Generator(device)

    arms = F.pad(dosages, (0, 0, 1, 0), value=NONE)  # (1 + C, P): the first is the control
    counts = torch.zeros(len(arms), n_genes, dtype=torch.float64, device=device)
    log_normalised = torch.zeros_like(counts)
    n_chunk = max(1, chunk // max(n_latent * max(len(t), len(arms)), n_samples * n_genes))
    for k in torch.arange(n_particles).split(n_chunk):
        mask, effect, _, _ = model.sample_effects(t, len(k))
        z_basal = torch.randn(len(k), 1, n_latent, device=device)
        z = z_basal + sum_effects(mask, effect, arms)  # (K, 1 + C, L): the arms share z_basal
        # Gamma-Poisson mixture: lambda = mean * gamma with E[gamma] = 1, Var[gamma] = 1 / theta.
        gamma = torch.distributions.Gamma(theta, theta).sample((n_samples, len(k)))  # (S, K, G)
        for arm in range(len(arms)):
            mean = library * model.log_rho(z[:, arm]).exp()  # (K, G)
            poisson_noise.manual_seed(seed + int(k[0]))  # the same for every arm
            x = torch.poisson(mean * gamma, poisson_noise)  # (S, K, G)
            y = torch.log2(1 + 1e4 * x / x.sum(-1, keepdim=True).clamp(min=1))
            counts[arm] += mean.double().sum(0)
            log_normalised[arm] += y.mean(0).double().sum(0)

    expected = {"counts": counts / n_particles, "log_normalised": log_normalised / n_particles}
    return {scale: (y[1:] - y[0]).float() for scale, y in expected.items()}
