"""Lightning: what a training script on it imports; each part is in a file of its own.

    Trainer(callbacks=[
        AdamMiniCallback(),                          lightning_optimizer.py
        LengthTriggeredLRCallback("mean_length"),    lightning_rate.py
        StabilityMonitorCallback([...]),             lightning_monitor.py
    ])
    class Module(SharedPrefixMixin, LightningModule)    lightning_prefix.py

Everything works in both namespaces, `pytorch_lightning` and `lightning.pytorch`.
"""

from .lightning_monitor import StabilityMonitorCallback
from .lightning_optimizer import AdamMiniCallback
from .lightning_prefix import SharedPrefixMixin
from .lightning_rate import LengthTriggeredLRCallback

__all__ = [
    "AdamMiniCallback",
    "LengthTriggeredLRCallback",
    "SharedPrefixMixin",
    "StabilityMonitorCallback",
]
