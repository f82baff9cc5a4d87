"""verl's own functions with our names: advantages and a policy loss of one batch.

    python examples/verl_batch.py

What a run of verl does in its driver and its workers after
`VERL_USE_EXTERNAL_MODULES=trimtab.integrations.verl`; the keys of its configuration are in the
docstring of `trimtab.integrations.verl`.
"""

import importlib

import numpy as np
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.workers.config import ActorConfig

importlib.import_module("trimtab.integrations.verl")  # verl does this for what the variable names

torch.manual_seed(0)
B, T = 8, 6
lengths = torch.randint(2, T + 1, (B, 1))
mask = (torch.arange(T) < lengths).long()
rewards = torch.zeros(B, T).scatter(1, lengths - 1, torch.rand(B, 1).round())
data = DataProto.from_dict(
    tensors={"token_level_rewards": rewards, "response_mask": mask},
    non_tensors={"uid": np.repeat(["first prompt", "second prompt"], B // 2)},
)

# algorithm.adv_estimator=trimtab_rloo
algorithm = OmegaConf.create({"adv_estimator": "trimtab_rloo", "gamma": 1.0, "lam": 1.0})
data = compute_advantage(data, adv_estimator=algorithm.adv_estimator, config=algorithm)
advantages = data.batch["advantages"]
print("advantages of responses:", [round(float(a), 3) for a in advantages[:, 0]])

# actor_rollout_ref.actor.policy_loss.loss_mode=trimtab_trust_region
actor = ActorConfig(
    strategy="fsdp2", rollout_n=4, ppo_mini_batch_size=B, ppo_micro_batch_size_per_gpu=B,
    policy_loss={"loss_mode": "trimtab_trust_region"},
)  # fmt: skip
old = -torch.rand(B, T)
new = (old + 0.02 * torch.randn(B, T)).requires_grad_()
loss, metrics = get_policy_loss_fn(actor.policy_loss["loss_mode"])(
    old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask,
    loss_agg_mode="token-mean", config=actor,
)  # fmt: skip
loss.backward()
print(f"loss: {float(loss.detach()):.4f}", {k: round(v, 4) for k, v in metrics.items()})
