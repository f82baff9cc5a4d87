import functools
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, causal_lm, keep_norm_dtype
from transformers import Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from trimtab.rl.advantages import outcome_advantages
from trimtab.rl.batch import RolloutBatch
from trimtab.rl.objective import (
    Prepared,
    batch_metrics,
    objective,
    policy_statistics,
    token_weights,
    trusted_rollouts,
)
from trimtab.rl.update_config import (
    ImitationConfig,
    PruningConfig,
    ReferenceConfig,
    ReplayConfig,
    RevalConfig,
    TokenBaselineConfig,
    TrustRegionConfig,
    UpdateConfig,
)

TEMPERATURE, MAX_TOKENS = 0.8, 9
ADVANTAGES = ["otb", "dr_grpo", "grpo", "rloo", "opo", "reinforce", "reinforce_pp", "remax"]
LOSSES = ["ratio", "ppo_clip", "reinforce", "gspo", "cispo", "dppo_tv", "dppo_kl"]
RULES = ["balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm"]
REGION = TrustRegionConfig(max_threshold=0.02, mean_threshold=0.01)  # keeps some of the rollouts
SWITCHES = [
    {},
    {"trust_region": REGION},
    {"trust_region": replace(REGION, denominator="kept", max_statistic="abs_log_ratio",
                             max_threshold=0.2)},
    *({"pruning": PruningConfig(rho=0.1, out_of_set=policy)}
      for policy in ("include", "mask_token", "reject_sequence")),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return keep_norm_dtype(causal_lm("llama_gqa", dtype=torch.float64))


@pytest.fixture(scope="module")
def float32_model():
    return causal_lm("llama_gqa")


def logits_alone(model, batch, row):
    """[T_row, V] of one trajectory, at the temperature."""
    prompt = batch.prompts[batch.group_index[row]]
    ids = torch.tensor(prompt + batch.tokens[row, batch.mask[row]].tolist())
    return model(ids[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE


@functools.cache
def make_batch(model, seed=0, rho=0.0, spread=0.12):
    """Samples of the model; rollout_logp is its own plus noise, old_logp its own plus less noise.

    rho > 0: both are pruned, a sampled token outside its safe set forced in.
    """
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(VOCAB, (n,), generator=g).tolist() for n in (5, 1, 3, 4)]
    index = torch.tensor([2, 0, 0, 1, 3, 0, 1, 2, 1, 0, 1])[torch.randperm(11, generator=g)]
    mask = torch.arange(7) < torch.randint(1, 8, (11, 1), generator=g)
    tokens = torch.randint(VOCAB, mask.shape, generator=g).masked_fill(~mask, 0)
    rewards = torch.randint(3, (11,), generator=g).float() / 2
    logp = torch.zeros(mask.shape, dtype=torch.float64)
    batch = RolloutBatch(prompts, tokens, mask, logp, index, 100 - 7 * index, rewards, ~mask[:, -1])
    batch = replace(batch, greedy_rewards=torch.tensor([0.5, 0.0, float("nan"), 1.0]))
    with torch.no_grad():
        for row, t in mask.nonzero():
            p = logits_alone(model, batch, row)[t].softmax(-1)
            token = torch.multinomial(p, 1, generator=g)
            tokens[row, t] = token
            kept = (p >= rho * p.max()).index_fill(0, token, True)
            logp[row, t] = p[token].log() - p[kept].sum().log()
    noise = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64) * mask
    rollout = (logp + spread * noise[0] * (torch.arange(11) % 3 / 2)[:, None]).float()
    return replace(batch, rollout_logp=rollout), (logp + 0.3 * spread * noise[1]).detach()


def run(model, batch, old_logp, config, parts):
    """The loop's update without its trainer: loss and flat gradient, the batch taken in parts."""
    model.zero_grad()
    keep = None
    if config.trust_region is not None and config.trust_region.denominator == "kept":
        keep = batch.mask.new_zeros(len(batch))
        for rows in parts:
            part = batch.select(rows)
            stats = policy_statistics(model, part, config, TEMPERATURE).policy
            keep[rows] = trusted_rollouts(stats, part, config)[0]
    outcome, _ = outcome_advantages(batch, config)
    weights, loss = token_weights(batch, outcome, config, MAX_TOKENS, None, keep), 0.0
    prepared, done = Prepared(batch, outcome, weights, old_logp), []
    for rows in parts:
        part = prepared.select(rows)
        found = policy_statistics(model, part.batch, config, TEMPERATURE)
        result = objective(found, part, config)
        result.loss.backward()
        loss += result.loss.item()
        done.append((rows, result))
    metrics = batch_metrics(done, prepared, config)
    assert not any(x.requires_grad for x in metrics.values())
    assert all(math.isfinite(float(x)) for x in metrics.values())
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def whole(batch):
    return [torch.ones(len(batch), dtype=torch.bool)]


def assert_parts_add_up(model, config, seed):
    batch, old_logp = make_batch(model, seed, 0.0 if config.pruning is None else config.pruning.rho)
    loss, grad = run(model, batch, old_logp, config, whole(batch))
    assert grad.norm() > 1e-3
    parts = [batch.rows_of_prompts(first, last) for first, last in ((0, 1), (1, 3), (3, 4))]
    other_loss, other_grad = run(model, batch, old_logp, config, parts)
    assert other_loss == pytest.approx(loss, rel=1e-10, abs=1e-10)
    assert (grad - other_grad).norm() < 1e-10 * grad.norm()


@pytest.mark.parametrize("switch", SWITCHES, ids=range(len(SWITCHES)))
@pytest.mark.parametrize("route", ["packed", "dense"])
def test_the_fused_head_gives_the_update_of_the_logits(model, route, switch):
    config = UpdateConfig(route=route, **switch)
    batch, old_logp = make_batch(model, 8, 0.0 if config.pruning is None else config.pruning.rho)
    loss, grad = run(model, batch, old_logp, config, whole(batch))
    fused_loss, fused_grad = run(
        model, batch, old_logp, replace(config, head="fused"), whole(batch)
    )
    assert fused_loss == pytest.approx(loss, rel=1e-10, abs=1e-10)
    assert grad.norm() > 1e-3 and (grad - fused_grad).norm() < 1e-10 * grad.norm()


@pytest.mark.parametrize(
    ("config", "kind"),
    [(Gemma2Config(final_logit_softcapping=0.5, head_dim=16), Gemma2ForCausalLM),
     (PhiConfig(), PhiForCausalLM)],
    ids=["softcap", "bias"],
)  # fmt: skip
def test_softcap_and_bias_of_a_head_are_in_its_statistics(model, config, kind):
    batch, _ = make_batch(model, 8)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64}
    config.update(sizes | {"num_hidden_layers": 1, "num_attention_heads": 2})
    config.update({"num_key_value_heads": 2, "pad_token_id": 0})
    torch.manual_seed(0)
    other = kind(config).eval()
    if other.lm_head.bias is not None:
        torch.nn.init.normal_(other.lm_head.bias)
    stats = [
        policy_statistics(other, batch, UpdateConfig(route="dense", head=head), TEMPERATURE).policy
        for head in ("logits", "fused")
    ]
    torch.testing.assert_close(stats[0][:5], stats[1][:5], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switch", SWITCHES, ids=range(len(SWITCHES)))
@pytest.mark.parametrize("rule", RULES)
def test_parts_add_up_for_every_rule_and_switch(model, rule, switch):
    assert_parts_add_up(model, UpdateConfig(aggregation=rule, **switch), seed=8)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_for_every_advantage_and_loss(model, loss, advantage):
    both = SWITCHES[1] | SWITCHES[3]
    assert_parts_add_up(model, UpdateConfig(loss=loss, advantage=advantage), seed=8)
    assert_parts_add_up(model, UpdateConfig(loss=loss, advantage=advantage, **both), seed=8)


def centred(batch):
    """[B] reward minus the group's mean."""
    return [
        float(r - batch.rewards[batch.group_ids == g].double().mean())
        for r, g in zip(batch.rewards, batch.group_ids, strict=True)
    ]


def weights_by_loops(batch, rule, counts):
    """[B] weight of one token of each rollout, from the table; `counts` are the rows that count."""
    lengths, advantage = batch.mask.sum(-1).tolist(), centred(batch)
    ids = batch.group_ids.tolist()
    groups = len({ids[i] for i in counts})
    weights = torch.zeros(len(batch), dtype=torch.float64)
    for i in counts:
        group = [j for j in counts if ids[j] == ids[i]]
        side = [j for j in group if (advantage[j] > 0) - (advantage[j] < 0)
                == (advantage[i] > 0) - (advantage[i] < 0)]  # fmt: skip
        weights[i] = {
            "seq_mean": 1 / (groups * len(group) * lengths[i]),
            "token_mean": 1 / sum(lengths[j] for j in counts),
            "token_mean_group": 1 / (groups * sum(lengths[j] for j in group)),
            "seq_mean_token_sum_norm": 1 / (groups * len(group) * MAX_TOKENS),
            "balanced": len(side) / len(group) / (groups * sum(lengths[j] for j in side)),
        }[rule]
    return weights


@pytest.mark.parametrize("rule", RULES)
def test_denominators(model, rule):
    batch, _ = make_batch(model, 3)
    config = UpdateConfig(aggregation=rule)
    everyone = list(range(len(batch)))
    outcome, _ = outcome_advantages(batch, config)
    weights = token_weights(batch, outcome, config, MAX_TOKENS, None)
    truth = weights_by_loops(batch, rule, everyone)[:, None] * batch.mask
    torch.testing.assert_close(weights.double(), truth, rtol=1e-6, atol=0)
    keep = torch.arange(len(batch)) % 3 != 1
    keep &= batch.group_index != 3  # a group of which nothing is left is no group
    kept = [i for i in everyone if keep[i]]
    weights = token_weights(batch, outcome, config, MAX_TOKENS, None, keep)
    truth = weights_by_loops(batch, rule, kept)[:, None] * batch.mask
    torch.testing.assert_close(weights.double(), truth, rtol=1e-6, atol=0)


def loss_by_loops(model, batch, old_logp, config):
    """`ratio` loss, optimal token baseline, balanced aggregation: one token at a time."""
    rows = range(len(batch))
    lp, energy, inside = [], [], []  # per rollout: tensors with gradient; W_t; safe-set membership
    for i in rows:
        x, y = logits_alone(model, batch, i), batch.tokens[i, batch.mask[i]]
        safe = torch.ones_like(x, dtype=torch.bool)
        if config.pruning is not None:
            safe = x.softmax(-1) >= config.pruning.rho * x.softmax(-1).amax(-1, keepdim=True)
        inside.append(safe.gather(-1, y[:, None])[:, 0])
        log_q = x.masked_fill(~safe.scatter(-1, y[:, None], True), -torch.inf).log_softmax(-1)
        lp.append(log_q.gather(-1, y[:, None])[:, 0])
        w = 1 - 2 * lp[i].exp() + log_q.exp().square().sum(-1)
        correction = (old_logp[i, : len(y)] - batch.rollout_logp[i, : len(y)]).exp().clamp_max(2)
        energy.append((correction**2 * w).detach().cumsum(0))
    ratio = [(lp[i] - batch.rollout_logp[i, : len(lp[i])]).clamp(-20, 20).exp() for i in rows]

    keep, region = list(rows), config.trust_region
    if region is not None:
        assert region.max_statistic == "k2"
        keep = [
            i
            for i in rows
            if (ratio[i].log() ** 2 / 2).max() <= region.max_threshold
            and (ratio[i] - 1 - ratio[i].log()).mean() <= region.mean_threshold
        ]
        assert 0 < len(keep) < len(batch)
    counts = keep if region is not None and region.denominator == "kept" else list(rows)
    weights = weights_by_loops(batch, "balanced", counts)
    loss = torch.zeros((), dtype=torch.float64)
    for i in keep:
        group = [j for j in rows if batch.group_ids[j] == batch.group_ids[i]]
        second = sorted(len(lp[j]) for j in group)[-2] if len(group) > 1 else 0
        for t in range(len(lp[i])):
            there = [j for j in group if len(lp[j]) > t]
            above = sum(energy[j][t] * batch.rewards[j] for j in there)
            baseline = above / (sum(energy[j][t] for j in there) + 1e-8)
            advantage = batch.rewards[i] - (baseline if t < second else 0.0)
            policy = "include" if config.pruning is None else config.pruning.out_of_set
            dropped = (policy == "mask_token" and not inside[i][t]) or (
                policy == "reject_sequence" and not inside[i].all()
            )
            if not dropped:
                loss = loss - weights[i] * advantage * ratio[i][t]
    return loss, inside


@pytest.mark.parametrize(
    "switch",
    [
        *SWITCHES[:2],
        {"trust_region": replace(REGION, denominator="kept")},
        *SWITCHES[3:],
        SWITCHES[1] | SWITCHES[4],
    ],
    ids=["plain", "total", "kept", "include", "mask_token", "reject_sequence", "total+mask_token"],
)
@pytest.mark.parametrize("route", ["packed", "dense"])
def test_the_objective_is_its_definition(model, route, switch):
    config = UpdateConfig(route=route, **switch)
    batch, old_logp = make_batch(model, 8, 0.0 if config.pruning is None else config.pruning.rho)
    truth, inside = loss_by_loops(model, batch, old_logp, config)
    outside = sum(int((~x).sum()) for x in inside)
    assert (0 < outside < int(batch.mask.sum())) == ("pruning" in switch)
    true_grad = torch.autograd.grad(truth, list(model.parameters()))
    true_grad = torch.cat([x.flatten() for x in true_grad])
    loss, grad = run(model, batch, old_logp, config, whole(batch))
    assert loss == pytest.approx(truth.item(), rel=1e-6)
    assert (grad - true_grad).norm() < 1e-6 * true_grad.norm()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("advantage", ["dr_grpo", "grpo", "rloo"])
def test_on_policy_every_loss_has_the_vanilla_gradient(model, advantage, rule):
    batch, _ = make_batch(model, 5)
    config = UpdateConfig(advantage=advantage, aggregation=rule)
    logp = policy_statistics(model, batch, config, TEMPERATURE).policy.logp
    batch = replace(batch, rollout_logp=logp.detach())
    values, weight = centred(batch), weights_by_loops(batch, rule, list(range(len(batch))))
    truth = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(values):
        others = [
            v for v, g in zip(values, batch.group_ids, strict=True) if g == batch.group_ids[i]
        ]
        n = len(others)
        if advantage == "grpo":
            a = a / (math.sqrt(sum(v * v for v in others) / max(n - 1, 1)) + 1e-6)
        elif advantage == "rloo":
            a = a * n / max(n - 1, 1)
        truth = truth - weight[i] * a * logp[i, batch.mask[i]].sum()
    true_grad = torch.autograd.grad(truth, list(model.parameters()))
    true_grad = torch.cat([x.flatten() for x in true_grad])
    for loss in set(LOSSES) - {"gspo"}:  # which has another ratio for each rule
        _, grad = run(model, batch, logp.detach(), replace(config, loss=loss), whole(batch))
        assert (grad - true_grad).norm() < 1e-6 * true_grad.norm(), loss


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_log_ratios_stay_finite(float32_model, loss, size):
    model = float32_model  # e^30 squared is still finite, e^1e4 is not
    batch, _ = make_batch(model, 2)
    signs = torch.where(torch.arange(7) % 2 == 0, 1.0, -1.0)
    batch = replace(batch, rollout_logp=batch.rollout_logp + size * signs)
    for switch in SWITCHES[:4:3]:
        for old in (batch.rollout_logp, torch.zeros_like(batch.rollout_logp)):  # both far off
            loss_value, grad = run(
                model, batch, old, UpdateConfig(loss=loss, **switch), whole(batch)
            )
            assert math.isfinite(loss_value) and grad.isfinite().all()


def test_nothing_at_padding_matters(model):
    batch, old_logp = make_batch(model, 4)
    for config in (
        UpdateConfig(),
        UpdateConfig(loss="ppo_clip", advantage="dr_grpo", **SWITCHES[1]),
    ):
        loss, grad = run(model, batch, old_logp, config, whole(batch))
        nan = torch.tensor(float("nan"))
        dirty = replace(batch, rollout_logp=torch.where(batch.mask, batch.rollout_logp, nan))
        old = torch.where(batch.mask, old_logp, nan.double())
        other_loss, other_grad = run(model, dirty, old, config, whole(batch))
        assert loss == other_loss and torch.equal(grad, other_grad)


@pytest.fixture(scope="module")
def other_model():
    return keep_norm_dtype(causal_lm("llama_gqa", dtype=torch.float64, seed=1))


def run_beside(model, batch, config, other):
    """`run` in one part, with another model as the reference or the teacher."""
    model.zero_grad()
    outcome, _ = outcome_advantages(batch, config)
    weights = token_weights(batch, outcome, config, MAX_TOKENS, None)
    teacher = other if config.loss == "imitation" else None
    found = policy_statistics(model, batch, config, TEMPERATURE, teacher)
    if config.reference is not None:
        with torch.no_grad():
            reference = policy_statistics(other, batch, config, TEMPERATURE).policy
        found = found._replace(reference=reference)
    old_logp = found.policy.logp.detach()
    prepared = Prepared(batch, outcome, weights, old_logp)
    result = objective(found, prepared, config)
    result.loss.backward()
    metrics = batch_metrics([(whole(batch)[0], result)], prepared, config)
    return (
        result.loss.item(),
        torch.cat([p.grad.flatten() for p in model.parameters()]),
        {name: float(x) for name, x in metrics.items()},
    )


def flat_grad(loss, model):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def taken(x, batch, row):
    """Log-probs [T_row] of a row's tokens from its logits [T_row, V]."""
    ids = batch.tokens[row, batch.mask[row]]
    return x.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@pytest.mark.parametrize("route", ["packed", "dense"])
@pytest.mark.parametrize("truncated", ["count", "zero", "mask"])
@pytest.mark.parametrize("head", ["logits", "fused"])
def test_reval_is_its_definition(model, other_model, route, truncated, head):
    options = RevalConfig(beta=0.3, truncated=truncated)
    config = UpdateConfig(
        loss="reval", reval=options, reference=ReferenceConfig(), route=route, head=head
    )
    batch, _ = make_batch(model, 8)
    assert 0 < batch.truncated.sum() < len(batch)
    targets, terms = centred(batch), []
    for i in range(len(batch)):
        x, ref = logits_alone(model, batch, i), logits_alone(other_model, batch, i).detach()
        if truncated == "mask" and batch.truncated[i]:
            continue
        target = 0.0 if truncated == "zero" and batch.truncated[i] else targets[i]
        value = x[0].logsumexp(-1) - ref[0].logsumexp(-1)
        path = (taken(x, batch, i) - taken(ref, batch, i)).sum()
        terms.append((value + path - target / 0.3) ** 2)
    truth = sum(terms) / len(terms)
    true_grad = flat_grad(truth, model)
    loss, grad, metrics = run_beside(model, batch, config, other_model)
    assert loss == pytest.approx(truth.item(), rel=1e-6)
    assert (grad - true_grad).norm() < 1e-6 * true_grad.norm()
    mean = sum(term.sqrt().item() for term in terms) / len(terms)
    assert metrics["reval/abs_residual"] == pytest.approx(mean, rel=1e-6)


def test_reval_at_its_reference_and_without_rewards_is_at_rest(model):
    config = UpdateConfig(loss="reval", reference=ReferenceConfig())
    batch, _ = make_batch(model, 8)
    batch = replace(batch, rewards=torch.zeros_like(batch.rewards))
    loss, grad, _ = run_beside(model, batch, config, model)
    assert loss < 1e-20 and grad.norm() < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("baseline", [False, True])
def test_imitation_is_its_definition(model, other_model, gamma, baseline):
    """Dense KL at the logits; sparse: what comes later, less the others' mean at that position."""
    options = ImitationConfig(gamma=gamma, reward_weight=0.7, baseline=baseline)
    config = UpdateConfig(loss="imitation", imitation=options)
    batch, _ = make_batch(model, 8, spread=0.0)
    kl, advantage, logp = [], [], []
    for i in range(len(batch)):
        p = logits_alone(model, batch, i).log_softmax(-1)
        q = logits_alone(other_model, batch, i).log_softmax(-1).detach()
        kl.append((p.exp() * (p - q)).sum(-1))
        logp.append(taken(p, batch, i))
        cost, length = kl[i].detach().tolist(), len(kl[i])
        advantage.append(
            [
                0.7 * gamma ** (length - 1 - t) * float(batch.rewards[i])
                - sum(gamma ** (k - t) * cost[k] for k in range(t + 1, length))
                for t in range(length)
            ]
        )
    weight = weights_by_loops(batch, "seq_mean_token_sum_norm", list(range(len(batch))))
    truth = torch.zeros((), dtype=torch.float64)
    for i, of_row in enumerate(advantage):
        for t, own in enumerate(of_row):
            others = [
                advantage[j][t]
                for j in range(len(batch))
                if j != i and batch.group_ids[j] == batch.group_ids[i] and len(advantage[j]) > t
            ]
            mean = sum(others) / len(others) if baseline and others else 0.0
            truth = truth + weight[i] * (kl[i][t] - (own - mean) * logp[i][t])
    true_grad = flat_grad(truth, model)
    loss, grad, metrics = run_beside(model, batch, config, other_model)
    assert loss == pytest.approx(truth.item(), rel=1e-5)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm()
    mean = torch.cat(kl).mean().item()
    assert metrics["imitation/kl"] == pytest.approx(mean, rel=1e-6)


def test_a_teacher_with_all_its_tokens_at_the_top_is_a_full_one(model, other_model):
    batch, _ = make_batch(model, 8)
    found = {}
    for top_k in (None, VOCAB - 1, 3):
        config = UpdateConfig(loss="imitation", imitation=ImitationConfig(teacher_top_k=top_k))
        found[top_k] = run_beside(model, batch, config, other_model)
    full, nearly, few = found.values()
    assert nearly[2]["imitation/kl"] == pytest.approx(full[2]["imitation/kl"], rel=1e-5)
    assert (nearly[1] - full[1]).norm() < 1e-5 * full[1].norm()
    assert 0 < few[2]["imitation/kl"] < full[2]["imitation/kl"], "a tail as one says less"


def test_the_kl_term_adds_k3_to_the_reference(model, other_model):
    batch, _ = make_batch(model, 8)
    plain = UpdateConfig(loss="ppo_clip", advantage="grpo", aggregation="seq_mean")
    loss, grad, _ = run_beside(model, batch, plain, other_model)
    with_kl = replace(plain, reference=ReferenceConfig(kl=0.5))
    loss_kl, grad_kl, metrics = run_beside(model, batch, with_kl, other_model)
    weight = weights_by_loops(batch, "seq_mean", list(range(len(batch))))
    truth, sizes = torch.zeros((), dtype=torch.float64), []
    for i in range(len(batch)):
        lp = taken(logits_alone(model, batch, i), batch, i)
        d = taken(logits_alone(other_model, batch, i), batch, i).detach() - lp
        truth = truth + 0.5 * weight[i] * (d.exp() - 1 - d).sum()
        sizes.append(d.exp() - 1 - d)
    assert loss_kl - loss == pytest.approx(truth.item(), rel=1e-6)
    true_grad = flat_grad(truth, model)
    assert (grad_kl - grad - true_grad).norm() < 1e-6 * true_grad.norm()
    assert metrics["reference/k3"] == pytest.approx(torch.cat(sizes).mean().item(), rel=1e-6)


def test_a_penalty_off_the_advantage_is_the_one_step_kl(model, other_model):
    """ReMax's: each token pays kl (lp - lp_ref) for itself, and that carries no gradient."""
    batch, _ = make_batch(model, 8, spread=0.0)
    config = UpdateConfig(
        loss="reinforce",
        advantage="dr_grpo",
        aggregation="seq_mean",
        reference=ReferenceConfig(kl=0.5, penalty="advantage"),
    )
    loss, grad, _ = run_beside(model, batch, config, other_model)
    weight = weights_by_loops(batch, "seq_mean", list(range(len(batch))))
    truth = torch.zeros((), dtype=torch.float64)
    for i, outcome in enumerate(centred(batch)):
        lp = taken(logits_alone(model, batch, i), batch, i)
        ref = taken(logits_alone(other_model, batch, i), batch, i)
        advantage = outcome - 0.5 * (lp - ref).detach()
        truth = truth - weight[i] * (advantage * lp).sum()
    true_grad = flat_grad(truth, model)
    assert loss == pytest.approx(truth.item(), rel=1e-5)
    assert (grad - true_grad).norm() < 1e-5 * true_grad.norm()


def test_remax_subtracts_the_greedy_reward_and_leaves_a_group_without_one_out(model):
    batch, _ = make_batch(model, 8)
    config = UpdateConfig(advantage="remax", remax_clip=0.6)
    found, metrics = outcome_advantages(batch, config)
    for a, reward, group in zip(found, batch.rewards, batch.group_index, strict=True):
        greedy = float(batch.greedy_rewards[group])
        expected = 0.0 if math.isnan(greedy) else max(-0.6, min(0.6, float(reward) - greedy))
        assert float(a) == pytest.approx(expected)
    lost = (batch.group_index == 2).float().mean()
    assert float(metrics["remax/without_baseline"]) == pytest.approx(float(lost))
    assert float(metrics["remax/greedy_reward"]) == pytest.approx(0.5)


MIXTURES = {
    "advantage: expected null with the loss reval": dict(loss="reval", advantage="grpo"),
    "aggregation: expected null with the loss imitation": dict(
        loss="imitation", aggregation="seq_mean"
    ),
    "zero_advantage: expected count with the loss reval": dict(
        loss="reval", zero_advantage="exclude"
    ),
    "trust_region: expected null with the loss reval": dict(loss="reval", trust_region=REGION),
    "pruning: expected null with the loss reval": dict(loss="reval", pruning=PruningConfig(0.1)),
    "reference: expected one for the loss reval, got null": dict(loss="reval"),
    "reference.kl: expected 0 with the loss reval, got 0.1": dict(
        loss="reval", reference=ReferenceConfig(kl=0.1)
    ),
    "reference.kl: expected a weight > 0 with the loss ppo_clip": dict(
        loss="ppo_clip", reference=ReferenceConfig()
    ),
    "replay: expected null with the loss ratio": dict(replay=ReplayConfig()),
    "head: expected logits with the loss imitation": dict(loss="imitation", head="fused"),
    "route: expected packed or dense with the loss imitation": dict(
        loss="imitation", route="three_phase"
    ),
    "reference: expected null with the loss imitation": dict(
        loss="imitation", reference=ReferenceConfig(kl=0.1)
    ),
    "clip_low: expected null with the loss reinforce": dict(loss="reinforce", clip_low=0.2),
    "clip_high: expected a bound >= 0, got -1": dict(loss="cispo", clip_high=-1.0),
    r"clip_low: expected a bound in \[0, 1\], got 2": dict(loss="gspo", clip_low=2.0),
    r"clip_high: expected a bound in \[0, 1\], got 2": dict(loss="dppo_tv", clip_high=2.0),
    "epochs: expected 1 with the loss imitation": dict(loss="imitation", epochs=2),
    "reval.detach_value: expected false off-policy": dict(
        loss="reval",
        reference=ReferenceConfig(),
        reval=RevalConfig(detach_value=True),
        replay=ReplayConfig(),
    ),
    "tree_combine: expected its default with the advantage otb": dict(tree_combine="group_size"),
    "token_baseline: expected its default with the advantage grpo": dict(
        advantage="grpo", token_baseline=TokenBaselineConfig(leave_one_out=True)
    ),
    "remax_clip: expected a bound > 0, got 0": dict(advantage="remax", remax_clip=0.0),
    "remax_clip: expected its default with the advantage otb": dict(remax_clip=1.0),
}


@pytest.mark.parametrize("message", MIXTURES)
def test_mixtures_that_would_be_no_method_are_refused(message):
    with pytest.raises(ValueError, match=f"update.{message}"):
        UpdateConfig(**MIXTURES[message])


# Edits to rl/objective.py that must turn this file red:
#   outcome_advantages: batch.group_ids -> batch.group_index * 0       (one group)
#   old_logp - batch.rollout_logp (of correction)  ->  logp - batch.rollout_logp
#   apply_weights(token_loss, weights * mask, keep)  ->  without keep
#   last = batch.mask.sum(-1) - 1  ->  batch.mask.sum(-1) * 0
#   valid=keep  ->  valid=None
#   temperature=temperature, prune=rho  ->  prune=rho
#   found.policy.logsumexp[:, 0]  ->  [:, -1];  part.outcome  ->  batch.rewards         (reval)
#   k3(reference - policy)  ->  k3(policy - reference)
# Edits to rl/advantages.py:
#   mean of the others  ->  mean of the group;  last_token_rewards at the first token
