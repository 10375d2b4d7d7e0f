"""The calls by which rms_norm and layer_norm are tested, compiled and timed."""

from pallas_kernels.cases import Case
from pallas_kernels.rms_norm import dims

TOLERANCE = {"float32": (1e-5, 2e-5), "bfloat16": (2e-2, 2e-2)}
# With a residual; without one it is 1.5. Passes over memory are what counts.
BACKWARD = 1.0


def work(operands, options):
    """Ten FLOPs an element; x, the residual, their sum and y pass through memory once each."""
    x, _, residual, _ = operands
    return 10 * x.size, (2 if residual is None else 4) * x.nbytes


def _case(name, *shape, residual=False, bias=False, shift=0.5, core=False, compiled=False,
          **options):
    def make(rng):
        width = shape[-1]
        # Far enough from a mean of zero that RMSNorm and LayerNorm differ.
        return (shift + rng.normal(size=shape), 1 + 0.3 * rng.normal(size=width),
                rng.normal(size=shape) if residual else None,
                rng.normal(size=width) if bias else None)

    differentiable = (0, 1, *((2,) if residual else ()), *((3,) if bias else ()))
    return Case(name, make, {"eps": 1e-5, **options}, differentiable, TOLERANCE, core, compiled,
                dims("batch", "seq", "heads") if len(shape) == 4 else None)


CASES = [
    _case("plain-512", 2, 8, 512, core=True),
    _case("residual-128-odd", 1, 37, 128, residual=True, core=True),
    _case("residual-bias-64-heads", 2, 5, 3, 64, residual=True, bias=True, core=True),
    _case("bias-offset-96-odd", 3, 11, 96, bias=True, offset=1.0, eps=0.1, core=True),
    # Several tiles a core, the last ones cut short or empty.
    _case("tiles-128", 1, 1100, 128, residual=True, bias=True),
    _case("tiles-64-odd", 2, 521, 64),
    _case("three-tiles-512", 3, 401, 512, residual=True),
    _case("wide-8192", 1, 300, 8192, residual=True),
    _case("one-row", 1, 1, 128, residual=True, bias=True),
    _case("heads-128", 2, 33, 4, 128),
    _case("odd-width-200", 2, 9, 200, residual=True, offset=1.0),
    _case("far-from-zero", 1, 16, 256, shift=30.0),
    # Widths of the presets: the stream's, and a head's.
    *(_case(f"stream-{d}", 2, 1024, d, residual=True, compiled=True)
      for d in (512, 768, 1024, 3584, 4096, 8192)),
    _case("stream-768-bias", 2, 1024, 768, residual=True, bias=True, compiled=True),
    _case("first-4096", 2, 1024, 4096, compiled=True),
    _case("heads-32x128", 2, 1024, 32, 128, compiled=True),
    _case("heads-8x128", 2, 1024, 8, 128, compiled=True),
    _case("heads-8x64", 2, 1024, 8, 64, compiled=True),
    _case("heads-8x96-odd", 1, 1023, 8, 96, compiled=True),
]
