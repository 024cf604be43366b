"""From a loss to its layers, gradients by group of examples, and Kronecker statistics."""

from fop_optax.capture.api import Captured as Captured
from fop_optax.capture.api import capture as capture
