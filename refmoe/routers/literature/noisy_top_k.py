# SPDX-License-Identifier: Apache-2.0
"""The sparsely-gated mixture of experts: noisy top-k gating, with its importance and load losses."""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.normal import normal_cdf, softplus
from refmoe.routers.literature.record import Routing, gates
from refmoe.spec.softmax import softmax


def noisy_logits(ops: ArrayOps, logits: Array, noise_logits: Array, noise: Array) -> Array:
    """The noisy logits, by which experts are selected.

    NOISY-1  H = x Wg + noise * softplus(x Wnoise), noise independent and standard normal.

    logits (x Wg), noise_logits (x Wnoise), noise: [T, E]   returns: [T, E]
    Shazeer et al. 2017, eq. 4. (tensor2tensor adds 0.01 to the softplus.)
    """
    return logits + noise * softplus(ops, noise_logits)


def noisy_top_k(ops: ArrayOps, logits: Array, noise_logits: Array, noise: Array, k: int) -> Routing:
    """Softmax over the k largest noisy logits.

    NOISY-2  G = softmax(keep-top-k(H, k)): all but the k largest of H become minus infinity, of equal ones the lower id
             stays. The weights come from the noisy logits and sum to 1.

    logits, noise_logits, noise: [T, E]
    Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. 3 to 5.
    """
    noisy = noisy_logits(ops, logits, noise_logits, noise)
    ids = ops.top_k(noisy, k)
    return admit(ops, ids, softmax(ops, ops.gather(noisy, ids)), logits.shape[1])


def squared_variation(ops: ArrayOps, x: Array) -> Array:
    """The square of the coefficient of variation: the variance over the square of the mean.

    NOISY-3  The variance is that of the population, over n and not n - 1. It is 0 when all are equal, and n - 1 when
             all but one are 0.

    x: [n], at least one positive   returns: a scalar
    """
    mean = ops.sum(x, axis=0) / len(x)
    return ops.sum((x - mean) * (x - mean), axis=0) / len(x) / (mean * mean)


def importance_loss(ops: ArrayOps, routing: Routing) -> Array:
    """How unevenly the weights are spread, without the coefficient w_importance.

    NOISY-4  Importance_e = the sum over tokens of the weight on e; loss = CV(Importance)^2.

    returns: a scalar. Shazeer et al. 2017, eq. 6 and 7.
    """
    return squared_variation(ops, ops.sum(gates(ops, routing), axis=0))


def load(ops: ArrayOps, logits: Array, noise_logits: Array, noise: Array, k: int) -> Array:
    """A smooth estimate of how many tokens each expert gets.

    NOISY-5  P(x, e) = Phi((logit_e - kth_excluding(H, k, e)) / softplus(noise_logit_e)): the chance that e is among the
             k if its own noise is drawn again. kth_excluding is the k-th largest of H without component e: the
             (k+1)-th largest where e is among the k, else the k-th. With k = E the chance is 1.
    NOISY-6  Load_e = the sum over tokens of P(x, e).

    logits, noise_logits, noise: [T, E]; noise_logits above -700, or the softplus is 0   returns: [E]
    Shazeer et al. 2017, appendix A, eq. 8 to 10.
    """
    tokens, experts = logits.shape
    if k == experts:
        return ops.array([tokens] * experts)
    noisy = noisy_logits(ops, logits, noise_logits, noise)
    top = ops.top_k(noisy, k + 1)
    values = ops.gather(noisy, top)
    among = (top[:, :k, None] == ops.integers(range(experts))).any(axis=1)
    excluding = ops.where(among, values[:, k:] + noisy * 0, values[:, k - 1 : k])
    return ops.sum(normal_cdf(ops, (logits - excluding) / softplus(ops, noise_logits)), axis=0)


def load_loss(ops: ArrayOps, logits: Array, noise_logits: Array, noise: Array, k: int) -> Array:
    """How unevenly the tokens are spread, without the coefficient w_load.

    NOISY-7  loss = CV(Load)^2.

    returns: a scalar. Shazeer et al. 2017, appendix A, eq. 11.
    """
    return squared_variation(ops, load(ops, logits, noise_logits, noise, k))
