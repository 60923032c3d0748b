"""Small models, and the exact gradients of their bounds by enumeration of all K-tuples and by quadrature."""

import itertools
import math

import numpy as np
import torch
from gradients_of_models import exact_gradients

from lightning_modules import VAE
from stochastic_layers.testing import enumerate_outcomes

LINEAR = {"name": "mlp", "hidden_features": []}


def discrete_model(objective, num_samples, layer="reinforce", **options):
    torch.manual_seed(3)
    options = {"latent_dim": 2, "num_samples": num_samples, **options}
    model = VAE(layer, options, encoder=LINEAR, decoder=LINEAR, prior="learned", objective=objective, data_shape=(3,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.double(), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def gaussian_model(objective, num_samples, layer="gaussian", prior="learned"):
    torch.manual_seed(4)
    options = {"latent_dim": 1, "num_samples": num_samples, **({"family": "gaussian"} if layer != "gaussian" else {})}
    likelihood = {"name": "gaussian", "initial_scale": 1.0}
    model = VAE(
        layer, options, encoder=LINEAR, decoder=LINEAR, prior=prior, likelihood=likelihood, objective=objective,
        data_shape=(2,),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        if prior == "learned":
            model.prior.params.copy_(torch.tensor([0.4, 0.2]))
    return model.double(), torch.tensor([1.2, -0.7], dtype=torch.float64)


def log_joint(model, x, z):
    """log p(x, z) ``[N]`` of points z ``[N, out_features]`` and one example x."""
    log_prior = model.layer.family.log_prob(model.prior(x.device), z)
    return log_prior + model.log_likelihood(z.unsqueeze(1), x.unsqueeze(0)).squeeze(1)


def tuples(model, x, k):
    """Probability ``[T]``, log-weights, log q and log p ``[T, K]`` of every K-tuple of outcomes."""
    z = enumerate_outcomes(model.layer)
    log_q = model.layer.family.log_prob(model.layer.distribution(model.encode(x.unsqueeze(0))), z)
    log_p = log_joint(model, x, z)
    index = torch.tensor(list(itertools.product(range(len(z)), repeat=k)))
    return log_q[index].sum(1).exp(), (log_p - log_q)[index], log_q[index], log_p[index]


def bound(log_weights):
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def renyi(log_weights, alpha):
    return bound((1 - alpha) * log_weights) / (1 - alpha)


def enumerated(model, x, k, value=bound):
    probability, log_weights, *_ = tuples(model, x, k)
    return exact_gradients(model, -(probability * value(log_weights)).sum())


def integrated(model, x, k, nodes, value=bound):
    """The same for one Gaussian variable, by a product of Gauss-Hermite rules; tuples count up to their order."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    q = model.layer.distribution(model.encode(x.unsqueeze(0)))
    z = q.mean + q.stddev * points.unsqueeze(-1)
    log_weights = log_joint(model, x, z) - model.layer.family.log_prob(q, z)
    index = torch.tensor(list(itertools.combinations_with_replacement(range(nodes), k)))
    counts = torch.nn.functional.one_hot(index, nodes).sum(1).double()
    orders = (math.lgamma(k + 1) - (counts + 1).lgamma().sum(1)).exp()
    probability = (weights / math.sqrt(2 * math.pi))[index].prod(1) * orders
    return exact_gradients(model, -(probability * value(log_weights[index])).sum())


def sampled(model, x, objective, seed=0):
    """Loss and gradient of an objective on the draws of one seed."""
    model.objective = objective
    torch.manual_seed(seed)
    loss = model.loss(model.terms(x.expand(5, *x.shape)))
    gradient = torch.autograd.grad(loss.sum(), [*model.encoder.parameters(), *model.decoder.parameters()])
    return loss.detach(), torch.cat([g.flatten() for g in gradient])


def fresh_log_weights(model, x):
    """Log-weights ``[S, 5]`` of the draws of :func:`sampled`."""
    torch.manual_seed(0)
    return model.terms(x.expand(5, *x.shape)).log_weights.detach()
