"""Cross-entropy by its definition, in the operands' own precision."""

import jax
import jax.numpy as jnp


def cross_entropy(hidden, head, labels, weights, *, z_loss=0.0, softcap=None):
    """(loss sum, weight sum, sum of log(Z)^2) of [B, T, D] @ [D, V]; holds all logits."""
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    z_sum = jnp.sum(weights * log_z**2)
    return jnp.sum(weights * (log_z - at_label)) + z_loss * z_sum, jnp.sum(weights), z_sum
