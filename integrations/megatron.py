"""Megatron-core: what a training script on it imports; each part is in a file of its own.

step = MegatronSharedPrefix(model)    megatron_prefix.py: each prompt computed once
"""

from .megatron_prefix import MegatronSharedPrefix

__all__ = ["MegatronSharedPrefix"]
