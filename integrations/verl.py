"""verl 0.9: advantages, policy losses and AdamMini by their names in verl's own configuration.

    VERL_USE_EXTERNAL_MODULES=trimtab.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=trimtab_rloo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=trimtab_trust_region \\
        actor_rollout_ref.actor.strategy=fsdp2 \\
        actor_rollout_ref.actor.optim.optimizer_impl=trimtab.integrations.verl \\
        actor_rollout_ref.actor.optim.optimizer=adam_mini

The import registers, in whichever process it happens; verl imports what the variable names in the
driver and in every worker. Where a Ray cluster is up already, its workers see the variable by
`+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=...`, and
`actor_rollout_ref.model.external_lib=trimtab.integrations.verl` loads losses and optimizer in the
workers without it.

    verl_advantages.py   algorithm.adv_estimator=trimtab_..., options in algorithm.trimtab
    verl_losses.py       policy_loss.loss_mode=trimtab_..., thresholds in the policy_loss section
    verl_optimizer.py    optim.optimizer=adam_mini, options in optim.override_optimizer_config
    verl_replace_otb.py  a second module to name: verl's optimal token baseline becomes ours
"""

from ._versions import require, version_of

require("verl", version_of("verl"), "0.9", "0.10")

from .verl_advantages import ESTIMATORS, register_estimators, replace_estimators
from .verl_losses import LOSSES, TrustRegionPolicyLossConfig, register_losses
from .verl_optimizer import adam_mini

__all__ = [
    "ESTIMATORS",
    "LOSSES",
    "TrustRegionPolicyLossConfig",
    "adam_mini",
    "replace_estimators",
]

register_estimators()
register_losses()
