"""The product of an activation and a parameter, in the forms that XLA's CPU back end is fast at."""

import functools
import math

import jax
import jax.numpy as jnp

# Few rows on a CPU: how many, of a matrix of how many elements, in how many parts.
_ROWS = range(1, 5)
_ELEMENTS = range(2**16, 2**22 + 1)
_PARTS = 4


def product(expression: str, x: jax.Array, w: jax.Array, preferred_element_type=None, *,
            whole: bool) -> jax.Array:
    """``jnp.einsum(expression, x, w)`` of an activation and a parameter, in that function's dtype.

    It has gradients for both operands, in reverse mode. Raises what ``jnp.einsum`` raises.

    Args:
      expression: the einsum, one letter a dimension, e.g. ``"btd,dhk->bthk"``.
      x: the activation, e.g. [B, T, D].
      w: the parameter, e.g. [D, H, K].
      preferred_element_type: as in ``jnp.einsum``.
      whole: whether one device holds both operands, so that reshaping them moves nothing.
    """
    return _product(expression, x, w, preferred_element_type, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def _product(expression, x, w, preferred_element_type, whole):
    """Its weight gradient has the activation as its left operand.

    JAX's own rule puts the result's cotangent there. XLA's CPU back end then transposes that, and
    computes whatever made it inside a strided copy: a training step of llama-tiny took 0.88 s
    instead of 0.63 s.
    """
    def plain(x, w):
        return jnp.einsum(expression, x, w, preferred_element_type=preferred_element_type)

    summed = _summed(expression) if whole else None
    if summed is None or not _pays(x, w, preferred_element_type, summed):
        return plain(x, w)
    return jax.lax.platform_dependent(
        x, w, cpu=functools.partial(_row_by_row, summed=summed), default=plain)


def _forward(expression, x, w, preferred_element_type, whole):
    return _product(expression, x, w, preferred_element_type, whole), (x, w)


def _backward(expression, preferred_element_type, whole, operands, cotangent):
    x, w = operands
    inputs, _, result = expression.partition("->")
    left, _, right = inputs.partition(",")
    cotangent = cotangent.astype(x.dtype)
    d_x = jnp.einsum(f"{result},{right}->{left}", cotangent, w)
    d_w = jnp.einsum(f"{left},{result}->{right}", x, cotangent)
    return d_x, d_w.astype(w.dtype)


_product.defvjp(_forward, _backward)


def _summed(expression: str) -> int | None:
    """How many dimensions of x, its last, are summed with w's first; None for other einsums."""
    inputs, _, result = expression.partition("->")
    left, _, right = inputs.partition(",")
    summed = (len(left) + len(right) - len(result)) // 2
    plain = f"{left[:len(left) - summed]}{right[summed:]}" == result
    return summed if plain and left[len(left) - summed:] == right[:summed] else None


def _pays(x: jax.Array, w: jax.Array, preferred_element_type, summed: int) -> bool:
    """Whether `_row_by_row` is the faster one on a CPU."""
    if not all(isinstance(n, int) for n in x.shape):  # A symbolic batch of an export.
        return False
    kinds = {jnp.dtype(t) for t in (x.dtype, w.dtype, preferred_element_type or x.dtype)}
    return (kinds == {jnp.dtype("float32")} and w.size in _ELEMENTS
            and x.shape[x.ndim - summed:] == w.shape[:summed]  # Else einsum says what is wrong.
            and math.prod(x.shape[:x.ndim - summed]) in _ROWS
            and math.prod(w.shape[:summed]) % _PARTS == 0)


def _row_by_row(x: jax.Array, w: jax.Array, *, summed: int) -> jax.Array:
    """The sum over x's last and w's first dimensions, in parts, for one row of x after another.

    XLA reads a matrix for one row with one thread, and for several rows it rearranges the matrix
    first. Products of a batch it runs on several threads: here, the parts of a sum.
    """
    k = math.prod(w.shape[:summed])
    parts = w.reshape(_PARTS, k // _PARTS, -1)
    y = [jnp.einsum("smk,skn->smn", row.reshape(_PARTS, 1, -1), parts).sum(0)
         for row in x.reshape(-1, k)]
    return jnp.concatenate(y).reshape(*x.shape[:x.ndim - summed], *w.shape[summed:])
