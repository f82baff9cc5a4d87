import pytest
import torch
import workers
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks

from trimtab.stability import (
    aggregation_weights,
    apply_weights,
    dr_grpo_advantages,
    pack_padded,
    pad_packed,
    sign_length_coupling,
)

RULES = ["balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm"]
each_rule = pytest.mark.parametrize("rule", RULES)


def weights_of(rule, mask, ids, advantages, **options):
    return aggregation_weights(mask, ids, advantages, rule=rule, max_length=10, **options)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    b, t = (int(torch.randint(1, n, (), generator=generator)) for n in (11, 7))
    mask = torch.rand(b, t, generator=generator) < 0.6
    ids = 3 * torch.randint(-1, 3, (b,), generator=generator)
    advantages = torch.randint(-1, 2, (b,), generator=generator) * torch.rand(
        b, generator=generator
    )
    valid = torch.rand(b, generator=generator) < 0.85
    return mask, ids, advantages.double(), valid


def lengths_to_mask(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def by_loops(rule, mask, ids, advantages, valid, zero_advantage):
    """One row at a time, straight from the table."""
    rows = [i for i in range(len(mask)) if valid[i]]
    if zero_advantage == "exclude":
        rows = [i for i in rows if advantages[i] != 0]
    tokens = lambda these: sum(int(mask[i].sum()) for i in these)
    sign = advantages.sign().tolist()
    n_groups = len({int(ids[i]) for i in rows})
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i in rows:
        group = [j for j in rows if ids[j] == ids[i]]
        side = [j for j in group if sign[j] == sign[i]]
        if not mask[i].any():
            continue
        denominators = {
            "seq_mean": len(group) * tokens([i]) * n_groups,
            "token_mean": tokens(rows),
            "token_mean_group": tokens(group) * n_groups,
            "seq_mean_token_sum_norm": len(group) * 10 * n_groups,
            "balanced": len(group) / len(side) * tokens(side) * n_groups,
        }
        out[i, mask[i]] = 1 / denominators[rule]
    return out


@each_rule
@pytest.mark.parametrize("zero_advantage", ["count", "exclude"])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_matches_the_table(rule, zero_advantage, seed):
    mask, ids, advantages, valid = batch(seed)
    truth = by_loops(rule, mask, ids, advantages, valid, zero_advantage)
    dirty = torch.where(valid, advantages, float("nan"))
    options = {"valid": valid, "zero_advantage": zero_advantage}
    torch.testing.assert_close(weights_of(rule, mask, ids, dirty, **options), truth)
    out = weights_of(rule, mask, ids.int(), dirty.float(), **options)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth)


@each_rule
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 100))
def test_order_padding_and_scale(rule, seed, scale):
    mask, ids, advantages, valid = batch(seed)
    out = weights_of(rule, mask, ids, advantages, valid=valid)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    permuted = weights_of(rule, mask[order], ids[order], advantages[order], valid=valid[order])
    assert torch.equal(permuted, out[order])
    padded = weights_of(rule, torch.nn.functional.pad(mask, (0, 3)), ids, advantages, valid=valid)
    assert torch.equal(padded, torch.nn.functional.pad(out, (0, 3)))
    assert torch.equal(weights_of(rule, mask, ids, scale * advantages, valid=valid), out)
    if rule != "seq_mean_token_sum_norm":
        full = mask.clone()
        full[:, 0] = True  # every row has a token: the weights are a mean
        total = weights_of(rule, full, ids, advantages).sum()
        torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_equal_lengths_within_each_sign_make_balanced_a_sequence_mean():
    mask = lengths_to_mask([5, 2, 2, 5, 2, 3, 3, 1])
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    advantages = torch.tensor([1.0, -1.0, -2.0, 3.0, -1.0, -1.0, -1.0, 2.0])
    expected = weights_of("seq_mean", mask, ids, advantages)
    torch.testing.assert_close(weights_of("balanced", mask, ids, advantages), expected)


def test_equal_mean_length_of_both_signs_makes_balanced_a_token_mean_of_the_group():
    mask = lengths_to_mask([5, 1, 4, 3, 2, 6, 6])
    ids = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -2.0, 1.0, -1.0])  # means 3 and 3; 6 and 6
    expected = weights_of("token_mean_group", mask, ids, advantages)
    torch.testing.assert_close(weights_of("balanced", mask, ids, advantages), expected)


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_one_sided_groups_are_a_token_mean_of_the_group(sign):
    mask, ids = lengths_to_mask([5, 1, 4, 2]), torch.tensor([0, 0, 0, 1])
    advantages = sign * torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = weights_of("token_mean_group", mask, ids, advantages)
    torch.testing.assert_close(weights_of("balanced", mask, ids, advantages), expected)


def test_sign_length_coupling():
    # rewards 0 and 1, short successes and long failures
    mask, ids = lengths_to_mask([1, 2, 6, 7, 4, 1, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    advantages = dr_grpo_advantages(torch.tensor([1, 1, 0, 0, 1, 0, 0]), ids).double()
    coupling = {
        rule: sign_length_coupling(weights_of(rule, mask, ids, advantages), advantages).item()
        for rule in RULES
    }
    assert coupling["balanced"] == pytest.approx(0, abs=1e-7)
    assert coupling["seq_mean"] == pytest.approx(0, abs=1e-7)
    assert abs(coupling["token_mean"]) > 0.05 and abs(coupling["token_mean_group"]) > 0.05
    by_hand = (1 * 0.5 + 2 * 0.5 - 6 * 0.5 - 7 * 0.5 + 4 * 2 / 3 - 1 / 3 - 3 / 3) / 24
    assert coupling["token_mean"] == pytest.approx(by_hand, abs=1e-7)


def test_graded_rewards_couple_in_balanced_but_not_in_the_sequence_mean():
    mask, ids = lengths_to_mask([1, 7, 4]), torch.zeros(3, dtype=torch.long)
    advantages = dr_grpo_advantages(torch.tensor([1.0, 0.8, 0.0]), ids)
    weights = weights_of("seq_mean", mask, ids, advantages)
    assert sign_length_coupling(weights, advantages).item() == pytest.approx(0, abs=1e-6)
    weights = weights_of("balanced", mask, ids, advantages)
    assert sign_length_coupling(weights, advantages).item() < -0.01


def test_excluded_zeros_leave_the_group_and_an_empty_group_is_none():
    mask, ids = lengths_to_mask([2, 3, 4, 2]), torch.tensor([0, 0, 0, 1])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    for rule in RULES:
        out = weights_of(rule, mask, ids, advantages, zero_advantage="exclude")
        alone = weights_of(rule, mask[:2], ids[:2], advantages[:2])
        assert torch.equal(out, torch.cat([alone, torch.zeros(2, 4)]))


def test_an_all_masked_rollout_counts_in_its_group():
    mask = lengths_to_mask([2, 3])
    mask[1] = False
    ids, advantages = torch.zeros(2, dtype=torch.long), torch.tensor([1.0, -1.0])
    for rule, expected in {"seq_mean": 1 / 4, "balanced": 1 / 4, "token_mean_group": 1 / 2}.items():
        out = weights_of(rule, mask, ids, advantages)
        assert torch.equal(out, torch.tensor([[expected, expected, 0.0], [0.0, 0.0, 0.0]]))
    for rule in RULES:
        assert (weights_of(rule, torch.zeros_like(mask), ids, advantages) == 0).all()
        assert weights_of(rule, mask[:0], ids[:0], advantages[:0]).shape == (0, 3)


@each_rule
@pytest.mark.parametrize("zero_advantage", ["count", "exclude"])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_denominators_of_kept_rollouts(rule, zero_advantage, seed):
    """Total: the weights as they are, 0 where dropped. Kept: as if the dropped were not there."""
    mask, ids, advantages, valid = batch(seed)
    keep = torch.rand(len(mask), generator=torch.Generator().manual_seed(seed)) < 0.6
    options = {"zero_advantage": zero_advantage}
    plain = weights_of(rule, mask, ids, advantages, valid=valid, **options)
    total = weights_of(rule, mask, ids, advantages, valid=valid, keep=keep, **options)
    assert torch.equal(total, plain * keep[:, None])
    kept = weights_of(
        rule, mask, ids, advantages, valid=valid, keep=keep, denominator="kept", **options
    )
    alone = weights_of(rule, mask, ids, advantages, valid=valid & keep, **options)
    assert torch.equal(kept, alone)


def test_packed_rows_have_the_weights_of_padded_ones():
    lengths = torch.tensor([3, 0, 1, 4])
    ids, advantages = torch.tensor([1, 1, 2, 2]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    x = torch.randn(8, requires_grad=True)  # one row of all responses, as a packed model gives
    padded, mask = pad_packed(x, lengths)
    weights = aggregation_weights(mask, ids, advantages)
    (grad,) = torch.autograd.grad(apply_weights(padded.square(), weights), x)
    torch.testing.assert_close(grad, 2 * x.detach() * pack_padded(weights, lengths))


@each_rule
def test_the_gradient_is_the_same_under_any_micro_batch_split(rule):
    inputs, parameter = workers.aggregation_problem()
    weights = weights_of(rule, inputs["mask"], inputs["ids"], inputs["advantages"])
    (whole,) = torch.autograd.grad(
        apply_weights(workers.aggregation_loss(parameter, inputs), weights), parameter
    )
    assert whole.abs().max() > 1e-3
    for sizes in ([1] * 8, [3, 5], [7, 1]):
        total = torch.zeros_like(parameter)
        for rows in torch.arange(8).split(sizes):
            part = {name: x[rows] for name, x in inputs.items()}
            loss = apply_weights(workers.aggregation_loss(parameter, part), weights[rows])
            total += torch.autograd.grad(loss, parameter)[0]
        torch.testing.assert_close(total, whole)


def test_the_gradient_is_the_same_over_two_processes(tmp_path):
    # groups straddle the ranks, the ranks hold unequal numbers of rows and of groups
    run_ranks(workers.aggregation_over_ranks, (2, str(tmp_path), RULES), 2)
    inputs, parameter = workers.aggregation_problem()
    gradients = torch.load(tmp_path / "gradients.pt")
    for rule in RULES:
        for zero_advantage in ("count", "exclude"):
            weights = weights_of(
                rule,
                inputs["mask"],
                inputs["ids"],
                inputs["advantages"],
                zero_advantage=zero_advantage,
            )
            loss = apply_weights(workers.aggregation_loss(parameter, inputs), weights)
            (expected,) = torch.autograd.grad(loss, parameter)
            torch.testing.assert_close(gradients[rule, zero_advantage], expected)


def test_bad_inputs_are_named():
    mask, ids, advantages = lengths_to_mask([1, 2]), torch.tensor([0, 0]), torch.tensor([1.0, -1.0])
    with pytest.raises(ValueError, match="max_length"):
        aggregation_weights(mask, ids, advantages, rule="seq_mean_token_sum_norm")
    with pytest.raises(ValueError, match="rule"):
        aggregation_weights(mask, ids, advantages, rule="mean")
    with pytest.raises(ValueError, match="denominator"):
        aggregation_weights(mask, ids, advantages, denominator="all")
    with pytest.raises(ValueError, match=r"keep \[B\] = \(2,\)"):
        aggregation_weights(mask, ids, advantages, keep=mask)
    with pytest.raises(ValueError, match="zero_advantage"):
        aggregation_weights(mask, ids, advantages, zero_advantage="drop")
    with pytest.raises(ValueError, match=r"outcome_advantages \[B\] = \(2,\), got \(2, 2\)"):
        aggregation_weights(mask, ids, advantages.expand(2, 2))
    with pytest.raises(ValueError, match=r"outcome_advantages.*nan at \(1,\)"):
        aggregation_weights(mask, ids, torch.tensor([1.0, float("nan")]))


# Edits to stability/aggregation.py that must turn this file red:
#   masked(outcome_advantages, rows).sign() -> .sign().clamp_min(0)   (zeros join the negatives)
#   groups = (rollouts.sum(1) > 0).sum()    -> len(rollouts)
#   groups * size * side_tokens             -> groups * size * tokens.sum(1)[index]
#   own_tokens = counted.sum(1)             -> mask.sum(1)        (excluded tokens count)
#   segment_sum(counts, index, n, process_group) -> segment_sum(counts, index, n)
#   rows = rows & kept -> rows        (the kept denominator counts all)
