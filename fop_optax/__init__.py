"""Curvature-aware optimizers as ordinary optax transformations, over any loss JAX can trace."""

from fop_optax.capture import Captured as Captured
from fop_optax.capture import capture as capture
from fop_optax.capture.quadratic_model import QuadraticModel as QuadraticModel
from fop_optax.capture.quadratic_model import quadratic_model as quadratic_model
from fop_optax.diagnostics import diagnostics as diagnostics
from fop_optax.diagnostics import diagnostics_table as diagnostics_table
from fop_optax.dimensions import DimensionNumbers as DimensionNumbers
from fop_optax.dimensions import LayerDimensionNumbers as LayerDimensionNumbers
from fop_optax.dimensions import dimension_numbers as dimension_numbers
from fop_optax.estimate import Estimate as Estimate
from fop_optax.estimate import LayerEstimate as LayerEstimate
from fop_optax.estimate import estimate as estimate
from fop_optax.layers import Layer as Layer
from fop_optax.layers import Layers as Layers
from fop_optax.layers import Stats as Stats
from fop_optax.losses import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from fop_optax.losses import softmax_cross_entropy as softmax_cross_entropy
from fop_optax.losses import squared_error as squared_error
from fop_optax.optimizers.adaptive_damping import adapt_damping as adapt_damping
from fop_optax.optimizers.bases import bases as bases
from fop_optax.optimizers.by_group import by_group as by_group
from fop_optax.optimizers.fop import ScaleByFopState as ScaleByFopState
from fop_optax.optimizers.fop import fop as fop
from fop_optax.optimizers.fop import scale_by_fop as scale_by_fop
from fop_optax.optimizers.fop_per_example import fop_per_example as fop_per_example
from fop_optax.optimizers.fop_per_example import (
  scale_by_fop_per_example as scale_by_fop_per_example,
)
from fop_optax.optimizers.hyperball import HyperballState as HyperballState
from fop_optax.optimizers.hyperball import hyperball as hyperball
from fop_optax.optimizers.kfac import ScaleByKfacState as ScaleByKfacState
from fop_optax.optimizers.kfac import kfac as kfac
from fop_optax.optimizers.kfac import scale_by_kfac as scale_by_kfac
from fop_optax.optimizers.kfac_per_example import kfac_per_example as kfac_per_example
from fop_optax.optimizers.kfac_per_example import (
  scale_by_kfac_per_example as scale_by_kfac_per_example,
)
from fop_optax.optimizers.neumann import ScaleByNeumannState as ScaleByNeumannState
from fop_optax.optimizers.neumann import neumann as neumann
from fop_optax.optimizers.neumann import neumann_eval_params as neumann_eval_params
from fop_optax.optimizers.neumann import scale_by_neumann as scale_by_neumann
from fop_optax.optimizers.orthogonalize import orthogonalize as orthogonalize
from fop_optax.optimizers.ownership import state_shardings as state_shardings
from fop_optax.optimizers.ownership import to_blocks as to_blocks
from fop_optax.optimizers.ownership import to_owners as to_owners
from fop_optax.optimizers.refresh import WarmupPeriod as WarmupPeriod
from fop_optax.optimizers.refresh import refresh_due as refresh_due
from fop_optax.optimizers.shampoo import ScaleByShampooState as ScaleByShampooState
from fop_optax.optimizers.shampoo import scale_by_shampoo as scale_by_shampoo
from fop_optax.optimizers.shampoo import shampoo as shampoo
from fop_optax.optimizers.soap import ScaleBySoapState as ScaleBySoapState
from fop_optax.optimizers.soap import scale_by_soap as scale_by_soap
from fop_optax.optimizers.soap import soap as soap
from fop_optax.projection import FopDirection as FopDirection
from fop_optax.projection import fop_direction as fop_direction
from fop_optax.sharding import Sharding as Sharding
