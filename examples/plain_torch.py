"""RL in plain torch, in the order of the data: statistics, advantages, weights, loss, step.

    python examples/plain_torch.py --steps 60

The policy learns to repeat the prompt's token. The optimal token baseline, trust-region masking,
balanced aggregation, Adam-mini, a length-triggered rate and two monitors, each in its line.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import stability
from trimtab.optim import AdamMini, LengthTriggeredLR

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
steps = parser.parse_args().steps

torch.manual_seed(0)
VOCAB, PROMPTS, GROUP, LENGTH, END = 10, 16, 8, 5, 0
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
policy = LlamaForCausalLM(
    LlamaConfig(vocab_size=VOCAB, eos_token_id=END, pad_token_id=END, **sizes)
)
optimizer = AdamMini.for_model(policy, lr=2e-3)
schedule = LengthTriggeredLR(optimizer, warmup=10, ratio=3.0, max_length=10 * LENGTH)
watch = stability.StabilityWatch(
    [stability.GradientNormMonitor(), stability.ClipEntropyMonitor()], patience=3
)

for step in range(steps):
    # sampling: [B, T] tokens after a prompt of one token
    prompts = torch.randint(1, VOCAB, (PROMPTS, 1)).repeat_interleave(GROUP, 0)
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    with torch.no_grad():
        ids = policy.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=LENGTH,
        )  # fmt: skip
    tokens = ids[:, 1:]
    mask = (tokens == END).cumsum(1) - (tokens == END).int() == 0  # up to the first end
    hits = (tokens == prompts) & mask
    rewards = hits.float().sum(1) / LENGTH

    # statistics
    stats = stability.response_statistics(policy(ids).logits[:, :-1], tokens, mask)
    rollout_logp = stats.logp.detach()  # an engine would report its own

    # advantages: one a token
    token_rewards = torch.zeros(mask.shape).scatter(
        1, mask.sum(1, keepdim=True) - 1, rewards[:, None]
    )
    advantages = stability.optimal_token_baseline(
        token_rewards, mask, rollout_logp, stats.sum_p2.detach(), groups, leave_one_out=True
    )

    # weights
    log_ratio = stats.logp.detach() - rollout_logp
    keep, _ = stability.trust_region_mask(log_ratio, mask)
    outcome = stability.dr_grpo_advantages(rewards, groups)
    weights = stability.aggregation_weights(mask, groups, outcome, rule="balanced", keep=keep)

    # loss, step
    loss = stability.ratio_policy_loss(stats.logp, rollout_logp, advantages, mask=mask)
    optimizer.zero_grad()
    stability.apply_weights(loss, weights).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    schedule.observe(float(mask.sum(1).float().mean()))
    schedule.step()

    entropy = stability.entropy_metrics(stats.entropy.detach(), rollout_logp, advantages, mask)
    verdict = watch.judge({"grad_norm": norm, **entropy})
    if step % 10 == 0 or step == steps - 1:
        print(f"step {step}: reward {rewards.mean():.3f}, {verdict.reading.state}")
    if verdict.tripped:
        print(verdict.reading.reason)
