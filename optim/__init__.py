"""Optimizers, learning-rate schedules, and what helps to choose blocks."""

from .adam_mini import AdamMini
from .block_stats import BlockStats, block_stats
from .blocks import infer_blocks
from .conversion import from_adamw_state, from_authors_state, to_adamw_state
from .heterogeneity import BlockSpectra, BlockSpectrum, Heterogeneity
from .layouts import BlockEntry, BlockLayout, BlockMap, geometric_layout
from .length_detector import LengthDetector
from .lr_scheduler import LengthTriggeredLR
from .reference import AdamMiniState, adam_mini_reference
from .sharding import flat_shards, parameter_layouts
from .spectrum import hessian_spectrum
from .step_factor import StepFactor

__all__ = [
    "AdamMini",
    "AdamMiniState",
    "BlockEntry",
    "BlockLayout",
    "BlockMap",
    "BlockSpectra",
    "BlockSpectrum",
    "BlockStats",
    "Heterogeneity",
    "LengthDetector",
    "LengthTriggeredLR",
    "StepFactor",
    "adam_mini_reference",
    "block_stats",
    "flat_shards",
    "from_adamw_state",
    "from_authors_state",
    "geometric_layout",
    "hessian_spectrum",
    "infer_blocks",
    "parameter_layouts",
    "to_adamw_state",
]
