# SPDX-License-Identifier: Apache-2.0
"""Stochastic neurons and their gradient estimators: the origin of hard, learned choices of which units to compute.

Each has a forward function and the estimator of the gradient with respect to its input a. Chance is an argument: u is
uniform in [0, 1), z standard normal. `upstream` is the gradient of the loss with respect to the output. The functions
are for reading and for tests; the routers of this package need no gradient.

Bengio, Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
Computation" (arXiv 1308.3432). All functions are elementwise.
"""

from __future__ import annotations

from refmoe.arithmetic.arrays import Array, ArrayOps


def hard_threshold(ops: ArrayOps, a: Array) -> Array:
    """NEURON-1  h = 1 where a > 0, else 0: no noise; its true gradient is 0 almost everywhere."""
    return ops.array(ops.integers(a > 0))


def stochastic_binary(ops: ArrayOps, a: Array, u: Array) -> Array:
    """NEURON-2  h = 1 where u < sigmoid(a), else 0: P(h = 1) = sigmoid(a)."""
    return ops.array(ops.integers(u < ops.sigmoid(a)))


def straight_through(ops: ArrayOps, a: Array, upstream: Array) -> Array:
    """NEURON-3  The estimate is the upstream gradient itself, as if h were a: biased, but of the right sign for one
    layer.

    Introduced by Hinton in his lectures of 2012, for `hard_threshold` and for `stochastic_binary`.
    """
    return upstream + a * 0


def straight_through_sigmoid(ops: ArrayOps, a: Array, upstream: Array) -> Array:
    """NEURON-4  The variant: upstream times sigmoid'(a) = s (1 - s), as if h were its expectation."""
    s = ops.sigmoid(a)
    return upstream * (s * (1 - s))


def unbiased(ops: ArrayOps, a: Array, h: Array, loss: Array, baseline: Array | float = 0.0) -> Array:
    """NEURON-5  The estimate for `stochastic_binary` is (h - sigmoid(a)) * (loss - baseline).

    Its expectation over h is the derivative of the expected loss, s (1 - s) (loss at h=1 - loss at h=0), for every
    baseline that does not depend on h. It needs only the loss, no upstream gradient.
    """
    return (h - ops.sigmoid(a)) * (loss - baseline)


def best_baseline(ops: ArrayOps, a: Array, h: Array, loss: Array) -> Array:
    """NEURON-6  The baseline of least variance: E[(h - s)^2 loss] / E[(h - s)^2], here over the n samples of axis 0.

    a, h, loss: [n, ...], h not always equal to s   returns: [...]
    """
    square = (h - ops.sigmoid(a)) * (h - ops.sigmoid(a))
    return ops.sum(square * loss, axis=0) / ops.sum(square, axis=0)


def noisy_rectifier(ops: ArrayOps, a: Array, z: Array) -> Array:
    """NEURON-7  h = max(0, a + z): the noise decides whether the unit is active; the gradient passes where it is."""
    return ops.where(a + z > 0, a + z, 0.0)


def noisy_rectifier_gradient(ops: ArrayOps, a: Array, z: Array, upstream: Array) -> Array:
    """NEURON-8  The gradient of `noisy_rectifier` at fixed noise: upstream where a + z > 0, else 0."""
    return ops.where(a + z > 0, upstream + a * 0, 0.0)


def stochastic_times_smooth(ops: ArrayOps, a: Array, u: Array) -> Array:
    """NEURON-9  h = b * sqrt(p), b = 1 where u < sqrt(p), else 0, p = sigmoid(a): E[h] = p."""
    root = ops.sqrt(ops.sigmoid(a))
    return ops.where(u < root, root, 0.0)


def stochastic_times_smooth_gradient(ops: ArrayOps, a: Array, u: Array, upstream: Array) -> Array:
    """NEURON-10  Only through the smooth factor: upstream * b * d sqrt(p)/da, which is b sqrt(p) (1 - p) / 2.

    Its expectation is half the derivative of E[h], p (1 - p): the other half would go through b.
    """
    return upstream * (stochastic_times_smooth(ops, a, u) * (1 - ops.sigmoid(a)) / 2)
