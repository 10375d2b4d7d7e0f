"""assert_close accepts what is close and names what is not."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import EXACT, assert_close


def test_tolerance_is_relative_to_the_largest_reference():
    reference = {"w": np.array([1000.0, 0.0]), "b": [np.array(0.5)]}
    assert_close({"w": np.array([1000.0, 9e-3]), "b": [jnp.float32(0.5)]}, reference)
    assert_close(reference, reference, EXACT)
    with pytest.raises(AssertionError, match=r"1 of 2 leaves differ\n  \['w'\]: max.* at \(1,\)"):
        assert_close({"w": np.array([1000.0, 1.1e-2]), "b": [np.array(0.5)]}, reference)
    with pytest.raises(AssertionError, match=r"\['b'\]\[0\]"):
        assert_close({"w": reference["w"], "b": [np.array(0.50002)]}, reference)


def test_low_precision_and_infinities():
    assert_close(jnp.array([1.0, -jnp.inf], jnp.bfloat16), np.array([1.0, -np.inf]))


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (np.zeros(3), np.zeros((3, 1)), "shape"),
        (np.array([7, 8]), np.array([7, 9]), r"must be equal at \(1,\): 8 against 9"),
        (np.array([True]), np.array([False]), "must be equal"),
        (np.array([np.nan]), np.array([np.nan]), "NaN"),
        (np.array([1.0, 0.0]), np.array([1.0, np.nan]), "NaN"),
        (np.array([np.inf]), np.array([-np.inf]), "infinities"),
        (np.array([np.inf]), np.array([1e30]), "infinities"),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}, r"only in actual .*'a'.*expected .*'b'"),
        ({}, {}, "nothing to compare"),
        (np.float32(1 + 1e-6), np.float32(1), None),
        (1 + 2j, 1 + 2.1j, "max"),
    ],
)
def test_differences(actual, expected, message):
    if message is None:
        assert_close(actual, expected)
        message = "max"
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, EXACT)
