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
        x_i   ~ NB(mean l_i rho_i, inverse dispersion theta_d)

Symbols and shapes. K Monte Carlo particles, B cells of a minibatch, N cells of a data set, G genes,
T perturbations, L latent dimensions, P the largest number of perturbations in one cell.

    paper    code        shape      meaning
    x_i      x           (B, G)     transcript counts, as floats
    l_i      library     (B, 1)     total counts of the cell over the G genes
    d_i      d           (B, P)     dosages in index form: the perturbations of each cell, filled up
                                    with NONE = -1; a control cell is a row of NONE
             c           (B, C)     covariates in index form, such as a donor or a batch, which
                                    networks see, too; C = 0 in the paper (ours)
    z^b      z_basal     (K, B, L)  basal state
    m_t      mask        (K, U, L)  0 or 1, for U perturbations named by an index tensor t (U,)
    e_t      effect      (K, U, L)
    z^p      z_pert      (K, B, L)  latent offset of a cell
    rho_i    log_rho     (K, B, G)  log expected frequencies
    theta_d  log_theta   (G,)       log inverse dispersion, one per gene
    R        axes        (L, L)     the axes of masks and effects in the space of z: the identity in
                                    the paper, or the sparsest ones (ours)
    n_t      n_cells     (T,)       training cells that received perturbation t

The paper's D_x is G and its D_z is L; f_theta is `decoder`, f_enc `encoder`, f_emb `f_emb`. Its
variational family q is called the guide here (2.3; no guide RNA is meant). U is T, or fewer where
`draws_for` draws (m, e) for the cells' own perturbations only.

In reading order: the likelihood (2.2); pieces of the guide (2.3); SAMS-VAE (2.1); masks in the
sparsest axes (ours); CPA-VAE (2.4); other baselines (4); unseen perturbations (ours); the ELBO
(A.1); the importance-weighted ELBO (3.1); treatment effects (3.2), and what makes them fast.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NONE = -1  # fills the free places of a row of dosages


# ============================================================================================
# The likelihood (section 2.2)
# ============================================================================================


def nb_log_likelihood(x, log_rho, log_theta, log_library=0.0):
    """log NB(x | mean library * rho, inverse dispersion theta), summed over genes (section 2.2).

    The Gamma-Poisson mixture lambda ~ Gamma(shape theta, rate theta / mean), x ~ Poisson(lambda)
    has E[x] = mean, Var[x] = mean + mean^2 / theta and, marginally over lambda,

        log p(x) = lgamma(x + theta) - lgamma(theta) - lgamma(x + 1)
                   + x log(mean / (mean + theta)) + theta log(theta / (mean + theta)),

    with lgamma the log gamma function. With s = log mean - log theta the second line is

        x log sigmoid(s) + theta log sigmoid(-s):

    everything stays in log space. (The paper writes Gamma(rho l, theta_d): mean and inverse
    dispersion, not shape and rate.)

    x            (B, G)         counts; like log_library, without a gradient
    log_rho      (..., B, G)    log mean, up to
    log_library  (B, 1) or 0    which is added to it; finite: a cell must have a count
    log_theta    (G,) or ()     clamped to -20 .. 20: beyond 20 it is a Poisson distribution within
                                floating-point precision, below -20 nearly always zero
    returns      (..., B)       nats
    """
    x, log_theta = x.to(log_rho.dtype), log_theta.to(log_rho.dtype).clamp(-20, 20)
    theta = log_theta.double().exp().expand(x.shape[-1:])  # (G,)
    s = log_rho + (log_library - log_theta)  # (..., B, G): the largest arrays of a training step
    # Sums over genes are in double precision, except in training: there it would take a fifth of
    # this function's time.
    exact = s.dtype if torch.is_grad_enabled() else torch.float64
    # The same for all particles. With a large theta it is a small difference of large numbers.
    first_line = (torch.lgamma(x + theta) - torch.lgamma(theta)
                  - torch.lgamma(x.to(exact) + 1)).sum(-1)  # (B,)
    # log sigmoid(-s) is -softplus(s). (And log sigmoid(s) is s - softplus(s), but that loses digits
    # where theta is small.) Each term is summed before the two are added: fewer large arrays.
    # softplus @ theta would be a matrix product, in bfloat16 under autocast: hence not used.
    second_line = ((x * F.logsigmoid(s)).sum(-1, dtype=exact)
                   - (F.softplus(s) * theta.to(s.dtype)).sum(-1, dtype=exact))
    return (first_line.to(exact) + second_line).to(s.dtype)


# ============================================================================================
# The pieces of the guide (section 2.3): straight-through masks, Gaussians, networks
# ============================================================================================


def straight_through_bernoulli(logits, temperature=1.0):
    """Sample m ~ Bern(sigmoid(logits)) with a gradient: Gumbel-softmax, straight through (2.3).

    The difference of two Gumbel variables is logistic noise, so logits + noise > 0 has probability
    sigmoid(logits) exactly: the forward value is a true Bernoulli sample, 0 or 1. The backward pass
    pretends that the sample had been the relaxed one, sigmoid((logits + noise) / temperature).
    """
    noisy_logits = (logits + torch.rand_like(logits).logit()) / temperature
    soft = torch.sigmoid(noisy_logits)
    hard = (noisy_logits > 0).to(soft.dtype)
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
    return 0.5 * ((var + loc**2) / prior_var - 1 - var.log() + math.log(prior_var))


class MLP(nn.Module):
    """Linear, LeakyReLU, further hidden layers with a residual connection, Linear.

    The input has several parts, which are never concatenated: a linear map of [a, b] is
    W_a a + W_b b, so each part is multiplied in its own shape, and the products are broadcast. What
    all particles share, such as x (B, G) beside z_pert (K, B, L), costs one product and not K. A
    part of integers is in index form, (..., P): it selects columns of W, and sums them.
    """

    def __init__(self, part_sizes, n_hidden, n_layers, n_out):
        super().__init__()
        self.part_sizes = part_sizes
        self.first = nn.Linear(sum(part_sizes), n_hidden)
        self.residual = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))
        self.last = nn.Linear(n_hidden, n_out)

    def forward(self, *parts):
        """Parts of shapes (..., size) or, of integers, (..., P), that broadcast -> (..., n_out)."""
        h = self.first.bias
        for part, weight in zip(parts, self.first.weight.split(self.part_sizes, dim=1)):
            if part.is_floating_point():
                h = h + F.linear(part, weight)
            elif part.shape[-1]:
                columns = F.embedding(part.clamp(min=0), weight.T)  # (..., P, hidden)
                h = h + (columns * (part != NONE).unsqueeze(-1)).sum(-2)
        h = F.leaky_relu(h)
        for layer in self.residual:
            h = h + F.leaky_relu(layer(h))
        # self.last(h), but the output is in float32 even where products are in bfloat16.
        return F.linear(h, self.last.weight) + self.last.bias


def loc_and_variance(output):
    """Split a network's output (..., 2 L) into mean and variance of a Gaussian, each (..., L)."""
    loc, log_var = output.chunk(2, dim=-1)
    return loc, log_var.exp() + 1e-4


# ============================================================================================
# SAMS-VAE (sections 2.1 and 2.3)
# ============================================================================================


def per_dosage(values, d):
    """values (..., U, L) of the perturbations at positions d (B, P): (..., B, P, L), 0 for NONE."""
    # index_select, here and below: on a CPU the gradient of x[index] adds up in random order.
    chosen = values.index_select(-2, d.clamp(min=0).flatten()).unflatten(-2, d.shape)
    return chosen * (d != NONE).unsqueeze(-1)


def sum_effects(mask, effect, d, axes):
    """Eq. 1: z_pert_i = sum over t of d_it R (e_t * m_t), where R = I in the paper.

    mask, effect (K, U, L); d (B, P) holds positions 0..U-1 on their second axis, or NONE; axes
    (L, L) is R, orthogonal: its column l is the direction in the space of z that entry l of masks
    and effects stands for. Returns (K, B, L); zero for a row of NONE, a control cell.
    """
    # Gathered first, multiplied then: test cells come few at a time, beside all T perturbations.
    offset = (per_dosage(effect, d) * per_dosage(mask, d)).sum(-2)  # (K, B, P, L) -> (K, B, L)
    with torch.autocast(offset.device.type, enabled=False):  # never in bfloat16: I is exact
        return offset @ axes.T


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
    mask_a, mask_b     for the models below with a prior Beta(a, b) on mask probabilities
    n_covariates       number of values of all covariates together: c (B, C) holds positions in
                       these, or NONE. Encoder and decoder see them, and effects do not

    The models below override a few methods of this one. Callers tell them apart by these flags,
    never by class.
    """

    has_mask = True              # which latents a perturbation touches is learned
    has_effects = True           # a perturbation moves the latent state: there is an e_t
    adds_effects = True          # a combination sums its perturbations; it is no label of its own
    has_correlated_guide = True  # correlated_basal and correlated_effects mean something

    def __init__(self, n_cells, x_mean, x_std, n_latent=100, n_hidden=400, n_layers=1,
                 effect_hidden=200, effect_layers=2, correlated_basal=True,
                 correlated_effects=True, alpha=0.001, beta=1.0, mask_a=1.0, mask_b=2.0,
                 n_covariates=0):
        super().__init__()
        n_perturbations, n_genes = len(n_cells), len(x_mean)
        self.correlated_basal = correlated_basal and self.has_correlated_guide
        self.correlated_effects = correlated_effects and self.has_correlated_guide
        self.alpha, self.beta, self.mask_a, self.mask_b = alpha, beta, mask_a, mask_b
        self.n_latent, self.n_covariates = n_latent, n_covariates
        self.widest = max(n_latent, effect_hidden)  # numbers per drawn (m_t, e_t), to choose chunks
        self.masks_of_one = False  # every mask drawn is 1: in CPA-VAE, and until `begin_masks`
        self.register_buffer("axes", torch.eye(n_latent))  # R of eq. 1
        self.register_buffer("n_cells", torch.as_tensor(n_cells, dtype=torch.float32))
        self.register_buffer("x_mean", torch.as_tensor(x_mean, dtype=torch.float32))
        x_std = torch.as_tensor(x_std, dtype=torch.float32)  # 0, but for rounding, if x is constant
        self.register_buffer("x_std", torch.where(x_std > 1e-6, x_std, 1.0))

        # p(x | z), 2.2: decoder f_theta and inverse dispersion. Then the guide, 2.3: q(m), q(e | m)
        # and f_enc, which makes mean and log variance of q(z_basal | ...).
        dosages = [n_perturbations] * (not self.has_effects)  # for the conditional VAE alone
        self.decoder = MLP([n_latent, n_covariates, *dosages], n_hidden, n_layers, n_genes)
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.init_mask(n_perturbations)
        self.init_effects(n_perturbations, effect_hidden, effect_layers)
        parts = [n_genes, n_covariates] + [n_latent] * self.correlated_basal + dosages
        self.encoder = MLP(parts, n_hidden, n_layers, 2 * n_latent)

    @torch.no_grad()
    def start_from(self, log_frequency, log_theta):
        """Start training from these values, (G,) each. (Ours. Otherwise rho starts at 1 / G and
        theta at 1; where that is far off, the latents at first make up for it.)"""
        self.decoder.last.bias.copy_(log_frequency)
        self.log_theta.copy_(log_theta)

    def get_extra_state(self):
        """Save masks_of_one with the weights: state_dict calls this, load_state_dict the next."""
        return self.masks_of_one

    def set_extra_state(self, state):
        """Take it from loaded weights."""
        self.masks_of_one = state

    # The masks m_t.

    def init_mask(self, n_perturbations):
        """The guide's mask parameters, q(m_tl) = Bern(sigmoid(mask_logits_tl)): 1/2 at first."""
        self.mask_logits = nn.Parameter(torch.zeros(n_perturbations, self.n_latent))

    @torch.no_grad()
    def set_masks(self, logits):
        """q(m_tl = 1) = sigmoid(logits), (T, L)."""
        self.mask_logits.copy_(logits)

    def prior_logit(self):
        """log p(m_tl = 1) / p(m_tl = 0), a number."""
        return math.log(self.alpha) - math.log1p(-self.alpha)

    def posterior_logits(self, t):
        """log q(m_tl = 1) / q(m_tl = 0) of perturbations t (U,): (U, L)."""
        return torch.where(self.trained(t), self.mask_logits.index_select(0, t),
                           self.prior_logit())

    def kl_mask(self, t):
        """KL(q(m_t) || Bern(alpha)) of perturbations t (U,): (U,)."""
        return kl_bernoulli(self.posterior_logits(t), self.alpha).sum(-1)

    def sample_mask(self, t, n_particles):
        """Draw m_t ~ q: masks (K, U, L) of 0 and 1, and the KL to their prior, (U,)."""
        if self.masks_of_one:
            mask = self.n_cells.new_ones(n_particles, len(t), self.n_latent)
            return mask, mask.new_zeros(len(t))
        logits = self.posterior_logits(t)
        mask = straight_through_bernoulli(logits.expand(n_particles, *logits.shape))
        return mask, self.kl_mask(t)

    def mask_probability(self):
        """q(m_tl = 1), (T, L)."""
        if self.masks_of_one:
            return self.n_cells.new_ones(len(self.n_cells), self.n_latent)
        return torch.sigmoid(self.posterior_logits(self.all_perturbations()))

    # The effects e_t.

    def init_effects(self, n_perturbations, effect_hidden, effect_layers):
        """The parameters of q(e_t | m_t): the network f_emb, or free ones, N(0, 1) at first."""
        if self.correlated_effects:
            self.f_emb = MLP([self.n_latent, n_perturbations], effect_hidden, effect_layers,
                             2 * self.n_latent)
        else:
            self.effect_loc = nn.Parameter(torch.zeros(n_perturbations, self.n_latent))
            self.effect_log_var = nn.Parameter(torch.zeros(n_perturbations, self.n_latent))

    def effect_posterior(self, mask, t):
        """Mean and variance of q(e_t | m_t), masks (K, U, L): (K, U, L), or (U, L) if free."""
        if self.correlated_effects:
            loc, var = loc_and_variance(self.f_emb(mask, t.unsqueeze(-1)))
        else:
            loc = self.effect_loc.index_select(0, t)
            var = self.effect_log_var.index_select(0, t).exp()
        return torch.where(self.trained(t), loc, 0.0), torch.where(self.trained(t), var, self.beta)

    @torch.no_grad()
    def turn(self, axes):
        """Express the effects of masks of one in other axes (L, L), columns: R becomes R axes.

        Offsets stay where they are in the space of z: means up to rounding, variances as nearly as
        a diagonal covariance can. Needs a free q(e).
        """
        self.axes.copy_(self.axes @ axes)
        self.effect_loc.copy_(self.effect_loc @ axes)
        if hasattr(self, "effect_log_var"):  # not in SVAE+
            self.effect_log_var.copy_((self.effect_log_var.exp() @ axes**2).log())

    # Both: the global latent variables (M, E).

    def sample_globals(self, t, n_particles):
        """Draw (m_t, e_t) ~ q(m_t) q(e_t | m_t), eq. 4 and 5.

        t (U,) perturbations: one that is listed twice is drawn twice.
        Returns mask, effect (K, U, L) and kl_mask (U,), kl_effect (K, U): the KL to the prior,
        summed over latents, in closed form given the sampled mask. For a perturbation without
        training cells q is the prior, its exact posterior, and the KL is zero.
        """
        mask, kl_mask = self.sample_mask(t, n_particles)
        loc, var = self.effect_posterior(mask, t)
        effect = loc + var.sqrt() * torch.randn_like(mask)
        kl_effect = kl_normal(loc, var, self.beta).sum(-1).expand(n_particles, -1)
        return mask, effect, kl_mask, kl_effect

    def sample_many_globals(self, t, n_particles, chunk=2**22):
        """mask, effect (K, U, L) of `sample_globals`; about `chunk` numbers per temporary array."""
        n = max(1, chunk // (self.widest * len(t)))
        draws = [self.sample_globals(t, min(n, n_particles - k))[:2]
                 for k in range(0, n_particles, n)]
        return [torch.cat(parts) for parts in zip(*draws)]

    def log_global_ratio(self, mask, effect):
        """log p(m_t, e_t) - log q(m_t, e_t) of draws (K, T, L) of all perturbations, (K, T)."""
        t, normal = self.all_perturbations(), torch.distributions.Normal
        loc, var = self.effect_posterior(mask, t)
        log_ratio = (normal(0, math.sqrt(self.beta)).log_prob(effect)
                     - normal(loc, var.sqrt()).log_prob(effect)).double()
        if not self.masks_of_one:  # log Bern(m) = m logit - softplus(logit)
            q = self.posterior_logits(t).double()
            p = torch.full_like(q, self.prior_logit())
            log_ratio = log_ratio + mask * (p - q) - F.softplus(p) + F.softplus(q)
        return log_ratio.sum(-1)

    def all_perturbations(self):
        """0, 1, ..., T - 1."""
        return torch.arange(len(self.n_cells), device=self.n_cells.device)

    def trained(self, t):
        """Whether any training cell received t (U,), as (U, 1)."""
        return self.n_cells[t].unsqueeze(-1) > 0

    # The cells.

    def encode(self, x, z_pert, d, c):
        """Mean and variance of q(z_basal | x, z_pert): (K, B, L), or (B, L) if it sees x alone."""
        x = (torch.log1p(x) - self.x_mean) / self.x_std
        parts = (x, c) + (z_pert,) * self.correlated_basal + self.seen_dosages(d)
        return loc_and_variance(self.encoder(*parts))

    def log_rho(self, z, d, c):
        """Log expected transcript frequencies (..., G) of latent states z (..., L), dosages
        d (..., P) and covariates c (..., C)."""
        return F.log_softmax(self.decoder(z, c, *self.seen_dosages(d)), dim=-1)

    def seen_dosages(self, d):
        """The dosages that encoder and decoder see, a tuple: empty but for the conditional VAE."""
        return ()

    def log_likelihood(self, x, z, d, c):
        """log p(x | z), (K, B), of counts x (B, G) with their observed library size (2.2)."""
        library = x.sum(-1, keepdim=True)
        return nb_log_likelihood(x, self.log_rho(z, d, c), self.log_theta, library.log())


class BetaBernoulliSAMSVAE(SAMSVAE):
    """SAMS-VAE with the Beta-Bernoulli prior, "an easy plug-in replacement" (2.1).

    Generative: p_tl ~ Beta(a, b), m_tl ~ Bern(p_tl). Guide: q(p_tl) is a Beta with free parameters,
    and q(m_tl | p_tl) = Bern(p_tl) is the generative one: it cancels in the KL, and what is left is
    KL(q(p_tl) || Beta(a, b)). Beta(1, 1) at the start.

    With one p per entry, masks have the prior Bern(a / (a + b)), 1/3 by default. Only the objective
    differs: its KL is the masks' own plus a slack, how far q(p | m) is from p(p | m).
    """

    def init_mask(self, n_perturbations):
        """q(p_tl) = Beta(exp(log_a_tl), exp(log_b_tl))."""
        self.mask_log_a = nn.Parameter(torch.zeros(n_perturbations, self.n_latent))
        self.mask_log_b = nn.Parameter(torch.zeros(n_perturbations, self.n_latent))

    @torch.no_grad()
    def set_masks(self, logits):
        """E_q[p_tl] = sigmoid(logits), (T, L)."""
        # With the smaller of a and b at 1, the KL is nearly the least for this mean.
        self.mask_log_a.copy_(logits.clamp(min=0))
        self.mask_log_b.copy_((-logits).clamp(min=0))

    def prior_logit(self):
        """The log odds of E[p_tl] = a / (a + b)."""
        return math.log(self.mask_a) - math.log(self.mask_b)

    def posterior_logits(self, t):
        """The log odds of E_q[p_tl], (U, L): with p_tl integrated out, m_tl ~ Bern(E_q[p_tl])."""
        a, b = self.posterior(t)
        return a.log() - b.log()

    def kl_mask(self, t):
        """KL(q(p_t) || Beta(a, b)), (U,)."""
        a, b = self.posterior(t)
        prior = torch.full_like(a, self.mask_a), torch.full_like(b, self.mask_b)
        return torch.distributions.kl_divergence(*(  # a check of values would wait for a GPU
            torch.distributions.Beta(*ab, validate_args=False) for ab in ((a, b), prior))).sum(-1)

    def posterior(self, t):
        """a and b of q(p_t), (U, L) each."""
        return [torch.where(self.trained(t), log.index_select(0, t).exp(), prior)
                for log, prior in ((self.mask_log_a, self.mask_a), (self.mask_log_b, self.mask_b))]


# ============================================================================================
# Masks in the sparsest axes (ours; the paper has R = I in eq. 1)
# ============================================================================================
#
# The prior N(0, I) of the basal state looks the same from every angle, and decoder and encoder can
# undo any rotation R of the latent space: only the sparsity of the masks says which axes are right.
# Gradient descent on masks that start at 1/2 often does not find them: masks become sparse around
# whatever axes the networks took in their first steps, and stay there, because every small turn
# towards sparser masks needs denser ones first. So we look for the axes where that is easy, between
# two parts of the training:
#
#   1. masks of one, q(m_tl = 1) = 1: the effects e_t are free to be dense, as in CPA-VAE (2.4);
#      from one seed or, as chance has a part in them, from several (`--warm-starts`)
#   2. `begin_masks`: the axes in which these effects are sparsest, and a first mask for each entry
#   3. SAMS-VAE in these axes, with the paper's objective
#
# Only eq. 1 has to know of R: networks, z_basal and its guide keep their coordinates, in which the
# guide's diagonal covariance fits.
#
# In linear factor models minimising L1 over rotations recovers sparse loadings under sufficient
# conditions, and there is a test for local factors (Freyaldenhoven, "Identification Through
# Sparsity in Factor Models: the l1-rotation criterion"); for varimax, Rohe and Zeng have a
# condition on kurtosis. We have neither condition nor test: the decoder bends the latent space.


def sparsest_axes(offsets, n_starts=3, n_steps=600, eps=0.1):
    """The orthogonal R (L, L) that makes offsets R sparsest: the sum of |entries| is smallest.

    offsets (T, L), a row for each perturbation. Why this sum, L1? R leaves the length of every row
    as it is, and of all rows of one length those with a single entry have the smallest sum. Near
    zero |y| is rounded off, sqrt(y^2 + eps^2), with an eps that is small beside effects (the unit
    is the standard deviation of the basal state).

    R exp(S - S^T) is orthogonal for every S, and to first order in S it is R + R (S - S^T). Each
    step of Adam starts from S = 0 at the R of the last. There are local minima: the best of
    n_starts random starts counts. Order and signs of the axes mean nothing.
    """
    n_latent = offsets.shape[1]
    R, _ = torch.linalg.qr(torch.randn(n_starts, n_latent, n_latent, device=offsets.device))
    S = torch.zeros_like(R, requires_grad=True)
    optimizer = torch.optim.Adam([S], lr=0.02)
    for _ in range(n_steps):
        with torch.enable_grad():
            turned = offsets @ (R + R @ (S - S.mT))  # (n_starts, T, L)
            size = (turned.square() + eps**2).sqrt().sum((1, 2))  # (n_starts,)
            optimizer.zero_grad()
            size.sum().backward()
        optimizer.step()
        R = R @ torch.matrix_exp(S - S.mT).detach()
        S.detach().zero_()
    return torch.linalg.qr(R[size.argmin()])[0]  # undoes the rounding of so many products


def mask_log_odds(loc, var, prior_logit, beta, largest, misfit=0.1):
    """log p(m_tl = 1) / p(m_tl = 0) given q(e_tl) = N(loc, var) of masks of one, all (T, L).

    q(e) combines the prior N(0, beta) with the cells. The cells alone observe e as y, with a
    variance w: 1/var = 1/w + 1/beta and loc/var = y/w. Under m = 1 that y
    has the distribution N(0, w + beta); under m = 0, where e does not matter and the cells look as
    if it were 0, N(0, w). The log ratio of these two densities at y is added to the prior's. (It is
    the Savage-Dickey ratio, log p(e = 0) / q(e = 0).)

    The latent space is learned, and bent: an entry that should be zero comes out as some tenth of
    the largest entry of e_t, with a far smaller w. So w also gets the square of `misfit` times
    `largest` (T, 1), the size of the largest entry of t's offset.
    """
    by_cells = (1 - var / beta).clamp(min=1e-3)  # a perturbation without cells has var = beta
    y, w = loc / by_cells, var / by_cells
    w = w + (misfit * largest).square()
    return prior_logit + 0.5 * (w / (w + beta)).log() + 0.5 * y.square() * (1 / w - 1 / (w + beta))


def common_axes(offsets, variance, n_rounds=100):
    """Axes (N, L, L) for each of N models: the sparsest of the mean of their offsets (N, T, L).

    variance (N, T, L): of the noise in offsets. First, rotations Q_n bring all offsets_n Q_n as
    near to their mean as rotations can, in the sum of squares: rotations and mean follow in turn
    (generalised Procrustes analysis). Then R turns the mean, but only in the directions that it
    occupies: noise can be made sparse, too, and with T near L it would decide. The right singular
    vectors of the mean, the largest first, are occupied while the singular value is above
    sqrt(variance) (sqrt(T) + sqrt(L')), about the largest one that noise has in the L' directions
    left (Marchenko and Pastur). The axes of model n are Q_n R. (A single model is turned in all
    directions: `begin_masks`.)
    """
    mean = offsets[0]
    for _ in range(n_rounds):
        u, _, vh = torch.linalg.svd(offsets.mT @ mean)
        Q = u @ vh
        mean = (offsets @ Q).mean(0)
    _, size, vh = torch.linalg.svd(mean)
    noise = (variance @ (Q @ vh.T).square()).mean((0, 1)).sqrt()  # (L,)
    n_left = torch.arange(len(vh), 0, -1, device=mean.device)
    largest = noise * (math.sqrt(len(mean)) + n_left.sqrt())
    n = max(1, int((size > largest[:len(size)]).cumprod(0).sum()))
    occupied, others = vh.T.split([n, len(vh) - n], dim=1)
    return Q @ torch.cat([occupied @ sparsest_axes(mean @ occupied), others], dim=1)


@torch.no_grad()
def begin_masks(models, interactions=None):
    """Turn models that were trained with masks of one to their sparsest axes, and begin masks.

    models are N warm starts of one model, from different seeds: latents differ by a rotation, and
    by chance. Masks begin at the mean of their log odds. Returns which of the models is nearest to
    the mean of all; the support of mask entries (T, L), the share of models in which log odds are
    above 0; and, before and after, how many latents a perturbation with training cells touches in
    that model: the mean of the effective number (sum |e|)^2 / sum e^2.

    interactions {t: {value: row}}: cells with t and a value have the effect e_t + e_row. Trained
    with masks of one, e_t has but a part of what is common to all values. It becomes the median of
    0 and these sums (of two medians the smaller one), entry by entry: then |e_t| plus all |e_row|
    is smallest.
    """
    t, trained = models[0].all_perturbations(), models[0].n_cells > 0
    loc, var = map(torch.stack, zip(*(model.effect_posterior(None, t) for model in models)))
    offsets, var = loc[:, trained], var[:, trained]  # (N, T', L)
    if len(models) == 1:
        axes = sparsest_axes(offsets[0])[None]
    else:  # if e_t is 0, its posterior mean has this variance: see `mask_log_odds`
        axes = common_axes(offsets, var * (1 - var / models[0].beta).clamp(min=0))
    log_odds = []
    for model, own_axes in zip(models, axes):
        model.turn(own_axes)
        largest = model.effect_posterior(None, t)[0].abs().amax(1, keepdim=True)
        for own, rows in (interactions or {}).items():
            rows = list(rows.values())
            sums = model.effect_loc[own] + model.effect_loc[rows]  # (V, L)
            lower, upper = (s * (s * F.pad(sums, (0, 0, 0, 1))).median(0).values for s in (1, -1))
            common = torch.where(lower.abs() < upper.abs(), lower, upper)  # of two medians
            model.effect_loc[own], model.effect_loc[rows] = common, sums - common
            largest[[own, *rows]] = sums.abs().max()
        log_odds.append(mask_log_odds(
            *model.effect_posterior(None, t), model.prior_logit(), model.beta, largest))
    log_odds = torch.stack(log_odds)
    for model in models:
        model.masks_of_one = False
        model.set_masks(log_odds.clamp(-4, 4).mean(0))  # within what training can still change

    turned = offsets @ axes
    nearest = (turned - turned.mean(0)).square().sum((1, 2)).argmin()
    touched = [(e.abs().sum(1).square() / e.square().sum(1).clamp(min=1e-30)).mean().item()
               for e in (offsets[nearest], turned[nearest])]
    return int(nearest), (log_odds > 0).float().mean(0), *touched


# ============================================================================================
# CPA-VAE (section 2.4)
# ============================================================================================


class CPAVAE(SAMSVAE):
    """SAMS-VAE with every mask entry fixed to 1: z_i^p = sum over t of d_it e_t (2.4).

    With correlated_effects, f_emb(1, t) is a network in place of a table of the same e_t.
    """

    has_mask = False

    def init_mask(self, n_perturbations):
        """A fixed mask has no parameters."""
        self.masks_of_one = True


# ============================================================================================
# The other baselines (section 4)
# ============================================================================================


class SVAEPlus(SAMSVAE):
    """SVAE+ (Lopez et al. 2023): z ~ N(m_d * mu_d, I), and q(z | x) that does not see d.

    In the symbols of this file: z = z_basal + z_pert with z_basal ~ N(0, I) and one label d per
    cell, whose effect mu_d is a parameter; z_pert = 0 for controls. A combination must be a label
    of its own (`one_label_per_cell` in data.py), and one without training cells has no effect. The
    mask is sampled, m_t ~ Bern(p_t), but p_t is a point estimate under a prior Beta(1, b): p and q
    of the mask are the same and cancel, and -log Beta(p_t; 1, b) is what t pays in place of a KL.
    (A density: it can be negative.)
    """

    adds_effects = False
    has_correlated_guide = False

    def init_effects(self, n_perturbations, effect_hidden, effect_layers):
        """mu starts at 0.1 N(0, I)."""
        self.effect_loc = nn.Parameter(0.1 * torch.randn(n_perturbations, self.n_latent))

    def prior_logit(self):
        """The log odds of E[p_tl] = 1 / (1 + b)."""
        return -math.log(self.mask_b)

    def posterior_logits(self, t):
        """The log odds of p_t; a label without training cells touches nothing."""
        return torch.where(self.trained(t), self.mask_logits.index_select(0, t), -math.inf)

    def kl_mask(self, t):
        """-log Beta(p_t; 1, b), (U,)."""
        # The density is b (1 - p)^(b - 1), and log(1 - p) = -softplus(logits).
        log_odds = self.posterior_logits(t)
        return ((self.mask_b - 1) * F.softplus(log_odds) - math.log(self.mask_b)).sum(-1)

    def effect_posterior(self, mask, t):
        """mu and, for `begin_masks`, the variance that it would have if z were observed, under the
        prior N(0, beta): (U, L) each."""
        loc = torch.where(self.trained(t), self.effect_loc.index_select(0, t), 0.0)
        return loc, 1 / (self.n_cells[t].unsqueeze(-1) + 1 / self.beta).expand_as(loc)

    def sample_globals(self, t, n_particles):
        """Draw m_t; mask, effect (K, U, L), -log Beta (U,), and no KL of mu (K, U)."""
        mask, minus_log_beta = self.sample_mask(t, n_particles)
        effect, _ = self.effect_posterior(mask, t)
        return mask, effect.expand_as(mask), minus_log_beta, mask.new_zeros(mask.shape[:2])

    def log_global_ratio(self, mask, effect):
        """Zero, (K, T): mu and p are parameters, and given p, p and q of the mask are the same."""
        return mask.new_zeros(mask.shape[:2], dtype=torch.float64)

    def encode(self, x, z_pert, d, c):
        """q(z | x) = N(loc, var) is q(z_basal | x, z_pert) = N(loc - z_pert, var), (K, B, L)."""
        loc, var = super().encode(x, z_pert, d, c)
        return loc - z_pert, var


class ConditionalVAE(SAMSVAE):
    """Conditional VAE: z ~ N(0, I), decoder([z, d]), encoder([x, d]). z_pert is zero.

    The dosages of a perturbation without training cells have untrained weights: left out of d.
    """

    has_mask = False
    has_effects = False
    has_correlated_guide = False

    def init_mask(self, n_perturbations):
        """There are no masks."""

    def init_effects(self, n_perturbations, effect_hidden, effect_layers):
        """There are no effects in latent space."""

    def sample_globals(self, t, n_particles):
        """There are no global latent variables: a mask and an effect of zero, and no KL."""
        zero = self.n_cells.new_zeros(n_particles, len(t), self.n_latent)
        return zero, zero, zero.new_zeros(len(t)), zero.new_zeros(n_particles, len(t))

    def seen_dosages(self, d):
        """d, without perturbations that no training cell received."""
        # n_cells[NONE] reads the last perturbation's entry, but NONE stays NONE either way.
        return (torch.where(self.n_cells[d] > 0, d, NONE),)


MODELS = {"sams-vae": SAMSVAE, "sams-vae-beta-bernoulli": BetaBernoulliSAMSVAE, "cpa-vae": CPAVAE,
          "svae+": SVAEPlus, "cvae": ConditionalVAE}  # the names that train.py and tables use


# ============================================================================================
# Unseen perturbations (after Lopez et al. 2023; not in the paper)
# ============================================================================================
#
# What a trained model knows of cells also holds under perturbations that it has not seen. New
# perturbations are new rows of the parameters of q(m) and q(e), or new columns of a network's first
# layer: only these are learned.

MASKS = ("mask_logits", "mask_log_a", "mask_log_b")  # (T, L) each, where a model has them
EFFECTS = ("effect_loc", "effect_log_var")


def perturbation_dims(model):
    """{name: dim} of all weights with a place per perturbation: the last T places along dim."""
    networks = ("f_emb",) if model.has_effects else ("encoder", "decoder")
    dims = dict.fromkeys(("n_cells", *MASKS, *EFFECTS), 0) | {
        f"{network}.first.weight": 1 for network in networks}
    return {name: dims[name] for name in model.state_dict() if name in dims}


@torch.no_grad()
def continue_from(model, base, known):
    """Give a model the weights of a trained one of its class, `base`. The perturbations of base at
    positions known (T',) become the model's first T', with certain masks: 1 where the probability
    is above 1/2, else 0. The model's other perturbations keep their initial values."""
    dims, weights = perturbation_dims(model), base.state_dict()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name not in dims:
            value.copy_(weights[name])
            continue
        n_others = weights[name].shape[dims[name]] - len(base.n_cells)  # what else a network sees
        places = torch.cat([torch.arange(n_others), n_others + known])
        value.narrow(dims[name], 0, len(places)).copy_(
            weights[name].index_select(dims[name], places))
    if model.has_mask:
        logits = torch.where(model.mask_probability() > 0.5, 20.0, -20.0)
        logits[len(known):] = 0
        model.set_masks(logits)


def learn_others_only(model, n_known):
    """Let training change only the parameters of perturbations after the first n_known."""
    dims, n_new = perturbation_dims(model), len(model.n_cells) - n_known
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in dims)
        if parameter.requires_grad:
            is_new = torch.zeros_like(parameter)
            is_new.narrow(dims[name], parameter.shape[dims[name]] - n_new, n_new).fill_(1)
            parameter.register_hook(lambda gradient, is_new=is_new: gradient * is_new)


# ============================================================================================
# The training objective (section 2.3, eq. 3, and A.1)
# ============================================================================================


def draws_for(d, n_perturbations, shared=False):
    """Which (m_t, e_t) to draw for cells of dosages d (B, P): t (U,), and d as positions in t.

    A cell's term depends on the draws of its own perturbations alone: cells may share one draw of
    all T or have draws of their own, and the expectation is the same. We take whichever is fewer:
    never more than B P. With `shared`, cells always share draws, but only of perturbations that
    some cell has (a GPU has to wait for their number).
    """
    if n_perturbations <= d.numel():
        return torch.arange(n_perturbations, device=d.device), d
    if shared:
        t, position = torch.unique(d.clamp(min=0), return_inverse=True)
    else:
        t, position = d.clamp(min=0).flatten(), torch.arange(d.numel(), device=d.device).view_as(d)
    return t, torch.where(d == NONE, NONE, position)


def elbo(model, x, d, c, n_particles=5):
    """Unbiased estimate, from a minibatch, of ELBO / N of the N training cells (eq. 3; A.1).

    (Its gradient is biased: masks have the straight-through one.) x (B, G) counts, no row all zero;
    d (B, P) dosages; c (B, C) covariates. With KL_t = KL(q(m_t) q(e_t|m_t) || p),

        1/B sum_i [ log p(x_i | z_i) - KL(q(z_i^b) || p) - sum_{t in d_i} KL_t / n_t ].

    Returns this, log_likelihood - kl_basal - kl_mask - kl_effect, and a dict of these four terms,
    detached scalars that stay on the device.
    """
    t, drawn = draws_for(d, len(model.n_cells))  # (U,); (B, P), d as positions in t
    mask, effect, kl_mask, kl_effect = model.sample_globals(t, n_particles)  # (K, U, L), .. (K, U)

    z_pert = sum_effects(mask, effect, drawn, model.axes)  # eq. 1: (K, B, L)
    loc, var = model.encode(x, z_pert, d, c)
    z_basal = loc + var.sqrt() * torch.randn_like(z_pert)
    z = z_basal + z_pert  # (K, B, L)

    # Effect and mask of t are shared by every cell that received t: the full ELBO holds their KL
    # once. Each of these n_t cells pays 1/n_t of it: over an epoch their shares sum to exactly one,
    # however they fall into minibatches. Without training cells the KL is zero.
    n_t = model.n_cells[t]
    share = (n_t > 0) / n_t.clamp(min=1)  # (U,)

    def paid(kl):
        """(..., U) -> (..., B): what each cell pays of its perturbations' KL."""
        return per_dosage((share * kl).unsqueeze(-1), drawn).sum((-2, -1))

    terms = {
        "log_likelihood": model.log_likelihood(x, z, d, c).mean(),
        "kl_basal": kl_normal(loc, var).sum(-1).mean(),
        "kl_mask": paid(kl_mask).mean(),
        "kl_effect": paid(kl_effect).mean(),
    }
    value = terms["log_likelihood"] - terms["kl_basal"] - terms["kl_mask"] - terms["kl_effect"]
    return value, {name: term.detach() for name, term in terms.items()}


# ============================================================================================
# Marginal likelihood (section 3.1)
# ============================================================================================


def log_weights(model, x, d, c, mask, effect):
    """The factor of each cell in eq. 7, for one draw of its z_basal per particle: (K, B).

        log w_ik = log [ p(x_i | z_ik^b, M_k, E_k) p(z_ik^b) / q(z_ik^b | x_i, M_k, E_k) ]

    x (B, G), d (B, P), c (B, C); mask, effect (K, T, L) are (M_k, E_k) ~ q of all perturbations.
    """
    z_pert = sum_effects(mask, effect, d, model.axes)  # (K, B, L)
    loc, var = model.encode(x, z_pert, d, c)
    noise = torch.randn_like(z_pert)
    z_basal = loc + var.sqrt() * noise
    # log N(z_basal; 0, I) - log N(z_basal; loc, var); the factors (2 pi)^(-L/2) cancel.
    log_p_over_q = 0.5 * (noise**2 + var.log() - z_basal**2).sum(-1)
    return model.log_likelihood(x, z_basal + z_pert, d, c) + log_p_over_q


@torch.no_grad()
def iwelbo(model, batches, n_particles=100, chunk=None):
    """Importance-weighted ELBO of test cells, by two definitions (3.1).

    (M_k, E_k) ~ q, k = 1..K, are drawn once and shared by all cells, z_ik^b ~ q(z_i^b | x_i, M_k,
    E_k) for each. With w_ik of `log_weights`:

        predictive   for each cell      log 1/K sum_k w_ik
        joint        for all together   log 1/K sum_k [ p(M_k, E_k) / q(M_k, E_k) prod_i w_ik ]

    The joint one is eq. 6 and 7: a bound on log p(X | D), the log marginal likelihood of all cells
    given the decoder, the dispersions and R, with M and E from their priors. With many cells few
    particles dominate it: see the effective sample size of its weights, (sum_k w_k)^2 /
    sum_k w_k^2, from 1 to K. Perturbations that no test cell has are left out of p/q: they are
    independent of all else, and their mean p/q is 1. Without global latents (the conditional VAE)
    joint is the sum over cells of predictive, and the effective sample size is NaN.

    The predictive one is a lower bound, tight as K grows, on log E_q(M,E)[p(x | M, E)]: the log
    density of a new cell under the approximate posterior predictive. The authors' code reports its
    mean over cells as test IWELBO.

    batches yields x (B, G), d (B, P), c (B, C). Returns predictive (N,), joint (a float, the total)
    and effective_sample_size (a float). About `chunk` numbers per temporary array (default:
    `chunk_on`), beside the draws of (M, E) themselves, (K, T, L).
    """
    chunk = chunk or chunk_on(model, 2**22)
    mask, effect = model.sample_many_globals(model.all_perturbations(), n_particles, chunk)
    log_w_joint, in_test = 0.0, torch.zeros_like(model.n_cells, dtype=torch.bool)
    predictive = []
    for batch in batches:
        # Few cells with all their particles at a time: what particles share is computed once.
        few = max(1, chunk // (n_particles * batch[0].shape[1]))
        for x, d, c in zip(*(part.split(few) for part in batch)):
            n_chunk = max(1, chunk // x.numel())
            log_w = torch.cat([log_weights(model, x, d, c, m, e) for m, e in zip(
                mask.split(n_chunk), effect.split(n_chunk))])  # (K, B)
            predictive.append(torch.logsumexp(log_w, dim=0) - math.log(n_particles))
            log_w_joint = log_w_joint + log_w.double().sum(-1)  # eq. 7: the product over cells
            in_test[d[d != NONE]] = True
    predictive = torch.cat(predictive)
    if not model.has_effects:
        return predictive, predictive.double().sum().item(), math.nan
    n_chunk = max(1, chunk // (model.widest * mask.shape[1]))
    log_ratio = torch.cat([model.log_global_ratio(m, e) for m, e in zip(
        mask.split(n_chunk), effect.split(n_chunk))])  # (K, T)
    log_w_joint = log_w_joint + log_ratio[:, in_test].sum(-1)
    joint = torch.logsumexp(log_w_joint, dim=0) - math.log(n_particles)  # eq. 6
    weight = torch.softmax(log_w_joint, dim=0)
    return predictive, joint.item(), 1 / weight.square().sum().item()


# ============================================================================================
# Average treatment effects (section 3.2)
# ============================================================================================


@torch.no_grad()
def expected_expression(model, arms, c, n_particles=2500, library=1e4, chunk=None, basal=None):
    """Mean expression of cells that receive the dosages arms (C, P), a row each. Covariates c are
    (C, columns), or (C, K, columns) if each particle has its own.

    E over z_basal ~ p and (M, E) ~ q of E[y | do(d*)], as in 3.2, where y is one of three functions
    of the counts x of a cell with the given library size:

        counts           y = x: the inner expectation is exactly library * rho
        per_10k          y = 1e4 x / sum x
        log_normalised   y = log2(1 + 1e4 x / sum x)

    (3.2 has the first; the authors' code for Table 1 takes the last. The second is not 1e4 rho.) A
    simulated cell without any count has only the first y; the others leave it out, as a data set
    does. All arms share every latent: z_basal, masks, effects and the noise of the likelihood, so
    that equal arms give equal results. basal are basal states (K, L), or a list of these for each
    arm, in place of n_particles draws from p. Returns a dict of three (C, G) tensors in double
    precision. About `chunk` numbers per temporary array (default: `chunk_on`).
    """
    chunk = chunk or chunk_on(model, 2**24)
    t, drawn = draws_for(arms, len(model.n_cells), shared=True)
    basal = sobol_normal(n_particles, model.n_latent, arms.device) if basal is None else basal
    basal = [basal] * len(arms) if torch.is_tensor(basal) else basal
    n_particles, n_genes = len(basal[0]), len(model.log_theta)
    c = c if c.ndim == 3 else c[:, None].expand(-1, n_particles, -1)
    theta = model.log_theta.clamp(-20, 20).exp()  # as in nb_log_likelihood
    mean_h, noise = mean_log_of_poisson(library, arms.device), torch.Generator(arms.device)
    sums = arms.new_zeros(len(arms), 5, n_genes, dtype=torch.float64)
    n_chunk = max(10, chunk // (model.widest * max(len(t), arms.numel()) + n_genes))
    for start in range(0, n_particles, n_chunk):
        k, n = slice(start, start + n_chunk), min(n_chunk, n_particles - start)
        mask, effect, _, _ = model.sample_globals(t, n)  # (M, E) ~ q
        z_pert = sum_effects(mask, effect, drawn, model.axes)  # (K, C, L)
        gamma = torch.distributions.Gamma(theta, theta).sample((n,))  # (K, G)
        log_scale = gamma.log().add_(math.log(library))
        seed, tenth = int(torch.randint(2**31, ())), -start % 10
        for arm in range(len(arms)):
            z = basal[arm][k] + z_pert[:, arm]  # eq. 1: (K, L)
            log_rho = model.log_rho(z, arms[arm], c[arm, k])  # (K, G)
            sums[arm] += sums_of_expression(log_rho, log_scale, library, mean_h, tenth,
                                            noise.manual_seed(seed))  # the same in every arm
    rho, per_10k, h, rest, not_empty = sums.unbind(1)
    mean_log = h / n_particles + rest / math.ceil(n_particles / 10)
    return {"counts": library * rho / n_particles, "per_10k": per_10k / not_empty,
            "log_normalised": mean_log / (not_empty / n_particles)}


def average_treatment_effects(model, dosages, n_particles=2500, library=1e4, chunk=None):
    """Model-based average treatment effect of each row of dosages (C, P) against control (3.2).

    ATE(d*) = E over z_basal ~ p, (M, E) ~ q of [ E[y | do(d*)] - E[y | do(no perturbation)] ]

    for the three y of `expected_expression`, whose arguments these are, in cells of unknown
    covariates; "no perturbation" is the paper's d_0. Returns a dict of three (C, G) tensors.
    Differs from the authors' code, which draws a new z_basal for each arm.

    This is the effect on one population of cells. The difference between perturbed and control
    cells as found in a screen also reflects, say, which cells survived. For that,
    evaluate.py gives the arms of `expected_expression` basal states of their own (`basal_states`).
    """
    arms = F.pad(dosages, (0, 0, 1, 0), value=NONE)  # (1 + C, P): the first is the control
    no_covariates = arms.new_empty(len(arms), 0)
    expected = expected_expression(model, arms, no_covariates, n_particles, library, chunk)
    return {scale: (y[1:] - y[0]).float() for scale, y in expected.items()}


@torch.no_grad()
def sample_frequencies(model, d, c, z_basal):
    """log rho (K, G) of cells of given basal states (K, L) that receive the dosages d (P,), each
    with a draw of (M, E) ~ q of its own; c (K, columns) are their covariates."""
    t, drawn = draws_for(d[None], len(model.n_cells), shared=True)
    mask, effect = model.sample_many_globals(t, len(z_basal))
    z_pert = sum_effects(mask, effect, drawn, model.axes)  # eq. 1: (K, 1, L)
    return model.log_rho(z_basal + z_pert.squeeze(1), d, c)


@torch.no_grad()
def sample_counts(model, log_rho, library):
    """Draw x ~ NB(mean library rho, inverse dispersion theta), (K, G), given log_rho (K, G) and
    library (K,): after `sample_frequencies`, the process at the head of this file."""
    theta = model.log_theta.clamp(-20, 20).exp()  # as in nb_log_likelihood
    gamma = torch.distributions.Gamma(theta, theta).sample(library.shape)
    return torch.poisson(library[:, None] * log_rho.exp() * gamma)


# ============================================================================================
# Treatment effects, fast and with little noise
# ============================================================================================


def chunk_on(model, chunk):
    """Numbers per temporary array: few on a CPU, whose caches are small; eight times as many on a
    GPU, where to launch a kernel costs more than to compute with few numbers."""
    return chunk if model.n_cells.device.type == "cpu" else 8 * chunk


def sobol_normal(n, n_latent, device):
    """n draws of N(0, I), (n, L), from a scrambled Sobol sequence: they lie more evenly than
    independent ones, so that means over them are as unbiased, and usually less noisy."""
    seed = int(torch.randint(2**31, ()))
    u = torch.quasirandom.SobolEngine(n_latent, scramble=True, seed=seed).draw(
        n, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-12, 1 - 1e-12)).float().to(device)  # ndtri: finite there


def sums_of_expression(log_rho, log_scale, library, mean_h, tenth, noise):
    """Sums over particles of five terms of `expected_expression`, (5, G), in double precision.

    log_rho and log_scale, log(library gamma), (K, G); mean_h from `mean_log_of_poisson`; Poisson
    draws from the generator `noise`, for every tenth particle from place `tenth` on.

    Sampled counts are a slow and noisy way to means of 1e4 x / sum x and y = log2(1 + 1e4 x /
    sum x) where sum x > 0. The counts are a Gamma-Poisson mixture: x ~ Poisson(rate), rate =
    library rho gamma, gamma ~ Gamma(theta, theta). Given gamma and sum x, x is multinomial:

        E[1e4 x / sum x | gamma, sum x > 0] = 1e4 rate / (sum of the rates).

    The mean of y has no closed form. With h = log2(1 + 1e4 x / library), a function of the gene's
    own count alone, E[y] = E[h] + E[y - h]. Given gamma, E[h] depends on the rate alone: a table.
    The rest, y - h, is small, since sum x is near the library: counts of every tenth particle
    suffice. Both are zero for an empty cell, which has probability exp(-sum of the rates), so
    dividing by the mean probability of not being empty leaves such cells out.

    All arms get the same gamma, and the same noise for Poisson draws. (The variance of a
    log-normalised effect was 1.4 to 89 times smaller than by as many cells sampled for each arm;
    least where a cell's counts are on few genes, and y - h is not small.)
    """
    log_rate = log_rho + log_scale
    rate = log_rate.exp()
    total = rate.sum(-1)
    not_empty = -torch.expm1(-total)  # its probability
    per_10k = (1e4 * not_empty / total.clamp(min=1e-30)) @ rate
    x = torch.poisson(rate[tenth::10], noise)
    y = torch.log2(1 + 1e4 * x / x.sum(-1, keepdim=True).clamp(min=1))
    h = torch.log2(1 + 1e4 / library * x)
    return torch.stack([log_rho.exp().sum(0, dtype=torch.float64), per_10k.double(),
                        mean_h(log_rate).sum(0, dtype=torch.float64),
                        (y - h).sum(0, dtype=torch.float64),
                        not_empty.sum().double().expand_as(per_10k)])


def mean_log_of_poisson(library, device, n_nodes=4096, largest=1e7):
    """A function log rate -> E[log2(1 + 1e4 x / library)], x ~ Poisson(rate), of tensors.

    It is tabulated at n_nodes equidistant values of log(1 + rate), in which it is nearly a line,
    and interpolated linearly. Values are exact to 2e-5.
    """
    u = torch.linspace(0, math.log1p(largest), n_nodes, dtype=torch.float64, device=device)
    rate, unit = torch.expm1(u), library / 1e4  # E log(1 + x / unit) = E log(unit + x) - log unit
    # Rates up to 1,000: the sum over x. Above: the Taylor series of the logarithm around unit +
    # rate, with the central moments rate, rate and rate + 3 rate^2; what is left out is < 1e-7.
    low = rate[rate <= 1000]
    x = torch.arange(1600, dtype=torch.float64, device=device)
    log_p = torch.xlogy(x, low[:, None]) - low[:, None] - torch.lgamma(x + 1)
    by_sum = log_p.exp() @ torch.log1p(x / unit)
    high, m = rate[rate > 1000], unit + rate[rate > 1000]
    by_series = (m / unit).log() - high / (2 * m**2) + high / (3 * m**3) - (
        high + 3 * high**2) / (4 * m**4)
    table = (torch.cat([by_sum, by_series]) / math.log(2)).float()
    slope, nodes_per_u = table.diff(), (n_nodes - 1) / math.log1p(largest)

    def function(log_rate):
        """log_rate (...,) -> (...,), in single precision; beyond the last node, along its line."""
        u = F.softplus(log_rate).mul_(nodes_per_u)  # log(1 + rate), in nodes
        node = u.clamp(max=n_nodes - 2).int()
        value = table.index_select(0, node.flatten()).view_as(u)
        return value.addcmul_(slope.index_select(0, node.flatten()).view_as(u), u - node)

    return function
