"""How close two results must be, and the one check that says whether they are."""

import jax
import numpy as np

EXACT = 0.0
"""Bit for bit: resuming on the same mesh, streaming against one call, save and load."""

EQUAL = 1e-5
"""The same float32 mathematics in another order: a parallel form against its recurrence."""

RESHARDED = 1e-4
"""Losses after training went on over another mesh or another number of processes."""

MAX_REPORTED = 8


def assert_close(actual, expected, tol: float = EQUAL) -> None:
    """Asserts max|actual - expected| <= tol * max(1, max|expected|) in every leaf of a pytree.

    Args:
      actual: array or pytree of arrays.
      expected: the reference; same paths and shapes. dtypes of floats may differ.
      tol: relative to the largest magnitude in the reference leaf, absolute where that is below 1.

    Integers and booleans must be equal whatever `tol`. Infinities must stand in the same places
    with the same sign. A NaN on either side is an error.

    Raises:
      AssertionError: names each leaf that differs, by how much and where.
    """
    actual, expected = _leaves(actual), _leaves(expected)
    if actual.keys() != expected.keys():
        raise AssertionError(
            f"paths differ: only in actual {sorted(actual.keys() - expected.keys())}, "
            f"only in expected {sorted(expected.keys() - actual.keys())}"
        )
    if not expected:
        raise AssertionError("nothing to compare: the expected tree has no leaves")
    problems = [
        f"{path or 'value'}: {problem}"
        for path in expected
        if (problem := _compare(actual[path], expected[path], tol))
    ]
    if problems:
        shown = "\n  ".join(problems[:MAX_REPORTED])
        raise AssertionError(f"{len(problems)} of {len(expected)} leaves differ\n  {shown}")


def _leaves(tree) -> dict[str, np.ndarray]:
    """The tree's leaves on the host, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf)) for path, leaf in leaves}


def _compare(actual: np.ndarray, expected: np.ndarray, tol: float) -> str | None:
    """Says how two arrays differ by more than `tol`, or None."""
    if actual.shape != expected.shape:
        return f"shape {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return None
    if all(np.issubdtype(x.dtype, np.integer) or x.dtype == bool for x in (actual, expected)):
        return _report(actual != expected, actual, expected, "must be equal")
    wide = complex if any(np.iscomplexobj(x) for x in (actual, expected)) else np.float64
    actual, expected = actual.astype(wide), expected.astype(wide)
    if (problem := _report(np.isnan(actual) | np.isnan(expected), actual, expected, "NaN")):
        return problem
    infinite = np.isinf(expected)
    apart = (infinite | np.isinf(actual)) & (actual != expected)
    if (problem := _report(apart, actual, expected, "infinities differ")):
        return problem
    reference = np.where(infinite, 0, expected)
    error = np.abs(np.where(infinite, 0, actual) - reference)
    bound = tol * max(1.0, np.abs(reference).max())
    if (worst := error.max()) <= bound:
        return None
    return _report(error == worst, actual, expected, f"max|Δ| {worst:.3g} > {bound:.3g}")


def _report(wrong: np.ndarray, actual: np.ndarray, expected: np.ndarray, what: str) -> str | None:
    """Describes the first place where `wrong` is true, or None where there is none."""
    if not wrong.any():
        return None
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{what} at {where}: {actual[where]} against {expected[where]}"
