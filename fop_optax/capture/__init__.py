"""From a loss to its layers, gradients by group of examples, and Kronecker statistics."""

from fop_optax.capture.api import capture as capture
from fop_optax.capture.captured import Captured as Captured
