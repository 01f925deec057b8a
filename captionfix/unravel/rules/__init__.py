"""One file per family of operations; importing this package registers them all."""

from . import attention, convolution, layout, pointwise, pooling, products, recurrent, sums, writes  # noqa: F401
