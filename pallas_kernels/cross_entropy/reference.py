"""Cross-entropy by its definition, in the operands' own precision."""

import jax
import jax.numpy as jnp


def cross_entropy(hidden, head, labels, weights, *, z_loss=0.0, label_smoothing=0.0,
                  softcap=None, vocab_size=None):
    """See `pallas_kernels.cross_entropy.cross_entropy`; holds all logits."""
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = logits[..., :vocab_size]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    spread = -jnp.mean(log_p, axis=-1)
    correct = jnp.argmax(logits, axis=-1) == labels

    def total(x):
        return jnp.sum(weights * x)[None]

    loss = total((1 - label_smoothing) * nll + label_smoothing * spread + z_loss * log_z**2)
    metrics = {"nll": total(nll), "z_squared": total(log_z**2), "correct": total(correct)}
    return loss, jnp.sum(weights)[None], jax.lax.stop_gradient(metrics)
