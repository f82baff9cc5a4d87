"""TRL: what a training script on it imports; each part is in a file of its own.

SharedPrefixGRPOTrainer    trl_prefix.py: each distinct prompt of a batch computed once
"""

from .trl_prefix import SharedPrefixGRPOTrainer

__all__ = ["SharedPrefixGRPOTrainer"]
