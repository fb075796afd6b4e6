"""TensorFlow: the ascent losses of table 12 in the other framework of the table, written as its users would."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from bisam import NegLog, Tanh
from bisam.objectives import GAMMA, LowerBound

Loss = Callable[[Any, Any], Any]
"""From logits (n, K) and labels (n,) to the mean loss, all tensors of TensorFlow."""


def gradients(
    logits: torch.Tensor, labels: torch.Tensor, names: tuple[str, str, str, str], *, compiled: bool, threads: int
) -> dict[str, Callable[[], Any]]:
    """Return functions that compute the gradient of a loss with respect to the logits.

    Args:
        logits: (n, K), on the CPU.
        labels: (n,), on the CPU.
        names: of the losses: cross-entropy, the same with label smoothing 0.1, BiSAM (-log), BiSAM (tanh).
        compiled: whether XLA compiles each function, with its gradient; by default TensorFlow runs it eagerly.
        threads: threads of TensorFlow. It can be set once in a process.

    Raises:
        ValueError: TensorFlow is missing, or it runs with another number of threads.
    """
    tf = _tensorflow(threads)
    with tf.device("CPU:0"):
        z, y = tf.constant(logits.detach().numpy()), tf.constant(labels.numpy())
    made = {name: partial(_gradient, tf, loss) for name, loss in zip(names, _losses(tf), strict=True)}
    if compiled:
        made = {name: tf.function(gradient, jit_compile=True) for name, gradient in made.items()}
    return {name: partial(gradient, z, y) for name, gradient in made.items()}


def _losses(tf: Any) -> tuple[Loss, ...]:
    negative_log, tanh = NegLog(), Tanh()

    def cross_entropy(z: Any, y: Any) -> Any:
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=z))

    def smoothed(z: Any, y: Any) -> Any:
        classes = z.shape[1]
        targets = 0.9 * tf.one_hot(y, classes, dtype=z.dtype) + 0.1 / classes
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=targets, logits=z))

    def log_sigmoid(x: Any) -> Any:
        return 1 + tf.math.log_sigmoid(x - GAMMA)

    def soft_maximum(bound: LowerBound, phi: Callable[[Any], Any], z: Any, y: Any) -> Any:
        margins = z - tf.gather(z, y, axis=1, batch_dims=1)[:, None]
        return tf.reduce_mean(tf.reduce_logsumexp(bound.mu * phi(margins), axis=1)) / bound.mu

    return (
        cross_entropy,
        smoothed,
        partial(soft_maximum, negative_log, log_sigmoid),
        partial(soft_maximum, tanh, lambda x: tf.tanh(tanh.alpha * x)),
    )


def _gradient(tf: Any, loss: Loss, z: Any, y: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(z, y)
    return tape.gradient(value, z)


def _tensorflow(threads: int) -> Any:
    import_module("torch._dynamo")  # loads triton, which ends the process if TensorFlow is loaded before it
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it prints what its build can do
    try:
        tf = import_module("tensorflow")
    except ImportError as error:
        raise ValueError(
            f"the rows of TensorFlow need it ({error}): pip install 'bisam[experiments,tensorflow]', or give "
            "--set frameworks=torch"
        ) from error
    settings = tf.config.threading
    for name in ("intra_op", "inter_op"):
        if getattr(settings, f"get_{name}_parallelism_threads")() != threads:
            try:
                getattr(settings, f"set_{name}_parallelism_threads")(threads)
            except RuntimeError as error:
                raise ValueError(
                    f"TensorFlow runs in this process with another number of threads than {threads}, and cannot change "
                    "it: start a new process"
                ) from error
    return tf
