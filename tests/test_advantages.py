import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.stability import (
    aggregation_weights,
    broadcast_advantages,
    dr_grpo_advantages,
    grpo_advantages,
    kl_penalty,
    opo_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    tree_advantages,
)

ALL = [dr_grpo_advantages, grpo_advantages, rloo_advantages]


def by_loops(fn, rewards, group_ids, valid):
    """float64, one rollout at a time, straight from the definitions."""
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for i in valid.nonzero().flatten().tolist():
        group = [j for j in range(len(rewards)) if group_ids[j] == group_ids[i] and valid[j]]
        r = rewards.double()[group]
        own = rewards.double()[i]
        if len(group) == 1:
            continue
        if fn is rloo_advantages:
            out[i] = own - (r.sum() - own) / (len(group) - 1)
        else:
            out[i] = own - r.mean()
            if fn is grpo_advantages:
                out[i] /= r.std(correction=1) + 1e-6
    return out


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 13, (), generator=generator))
    rewards = torch.randn(n, generator=generator)
    group_ids = 7 * torch.randint(-2, 3, (n,), generator=generator)
    valid = torch.rand(n, generator=generator) < 0.8
    return rewards, group_ids, valid


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_matches_the_definition(fn, seed):
    rewards, group_ids, valid = batch(seed)
    rewards[~valid] = float("nan")  # the reward failed
    truth = by_loops(fn, rewards, group_ids, valid)
    out = fn(rewards, group_ids, valid=valid)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, atol=2e-5, rtol=2e-5)
    out64 = fn(rewards.double(), group_ids, valid=valid)
    torch.testing.assert_close(out64, truth, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("fn", ALL)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.01, 100))
def test_order_shift_and_scale_of_rewards(fn, seed, scale):
    rewards, group_ids, valid = batch(seed)
    rewards = rewards.double()
    out = fn(rewards, group_ids, valid=valid)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    permuted = fn(rewards[order], group_ids[order], valid=valid[order])
    torch.testing.assert_close(permuted, out[order])
    torch.testing.assert_close(fn(rewards + 3, group_ids, valid=valid), out)
    if fn is not grpo_advantages:
        torch.testing.assert_close(fn(scale * rewards, group_ids, valid=valid), scale * out)


@pytest.mark.parametrize("fn", ALL)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(fn, reward):
    for size in range(1, 12):
        out = fn(torch.full((size,), reward), torch.zeros(size, dtype=torch.long))
        assert (out == 0).all()


@pytest.mark.parametrize("fn", ALL)
def test_invalid_rollouts_change_nothing_for_the_others(fn):
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([3, 3, 3, 3])
    alone = fn(rewards[:3], ids[:3])
    out = fn(rewards, ids, valid=torch.tensor([True, True, True, False]))
    torch.testing.assert_close(out, torch.cat([alone, torch.zeros(1)]))


def test_known_values():
    rewards, ids = torch.tensor([1, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 0, 1])
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, 0.0])
    torch.testing.assert_close(dr_grpo_advantages(rewards, ids), centred)
    torch.testing.assert_close(grpo_advantages(rewards, ids), centred / 0.5)
    torch.testing.assert_close(rloo_advantages(rewards, ids), centred * 4 / 3)


def test_leave_one_out_is_unbiased_by_enumeration():
    # Bernoulli policy with logit z, reward = action, G = 3: all 8 tuples
    z = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_p = torch.stack([torch.nn.functional.logsigmoid(-z), torch.nn.functional.logsigmoid(z)])
    actions = torch.cartesian_prod(*[torch.tensor([0, 1])] * 3)
    lp = log_p[actions]
    ids = torch.arange(8).repeat_interleave(3)
    expected = {}
    for fn in (dr_grpo_advantages, rloo_advantages):
        a = fn(actions.flatten().double(), ids).view(8, 3)
        surrogate = (lp.sum(1).exp().detach() * (a * lp).mean(1)).sum()
        (expected[fn],) = torch.autograd.grad(surrogate, z, retain_graph=True)
    (truth,) = torch.autograd.grad(log_p[1].exp(), z)
    torch.testing.assert_close(expected[rloo_advantages], truth)
    torch.testing.assert_close(expected[dr_grpo_advantages], truth * 2 / 3)


def menu(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, ids, valid = batch(seed)
    n = len(rewards)
    lengths = torch.randint(0, 6, (n,), generator=generator)
    paths = torch.randint(0, 2, (n, 3), generator=generator)
    ends = torch.randint(0, 4, (n,), generator=generator)
    paths[torch.arange(3) >= ends[:, None]] = -1
    return rewards.double(), ids, valid, lengths, paths


def group_of(i, ids, valid):
    return [j for j in range(len(ids)) if ids[j] == ids[i] and valid[j]]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20))
def test_opo_is_the_length_weighted_mean(seed):
    rewards, ids, valid, lengths, _ = menu(seed)
    truth = torch.zeros_like(rewards)
    for i in valid.nonzero().flatten().tolist():
        group = group_of(i, ids, valid)
        tokens = lengths[group].double()
        tokens = tokens if tokens.sum() > 0 else torch.ones_like(tokens)
        truth[i] = rewards[i] - (tokens * rewards[group]).sum() / tokens.sum()
    torch.testing.assert_close(opo_advantages(rewards, lengths, ids, valid=valid), truth)
    same = opo_advantages(rewards, torch.full_like(lengths, 4), ids, valid=valid)
    torch.testing.assert_close(same, dr_grpo_advantages(rewards, ids, valid=valid))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20), combine=st.sampled_from(["average", "group_size"]))
def test_tree_compares_with_those_that_share_the_path(seed, combine):
    rewards, ids, valid, _, paths = menu(seed)
    truth = torch.zeros_like(rewards)
    for i in valid.nonzero().flatten().tolist():
        found = []
        for depth in range(4):
            own = paths[i, :depth].tolist()
            peers = [j for j in group_of(i, ids, valid) if paths[j, :depth].tolist() == own]
            if depth and (-1 in own or len(peers) == 1):
                continue
            weight = len(peers) if combine == "group_size" else 1
            found.append((weight, float(rewards[i] - rewards[peers].mean())))
        truth[i] = sum(w * a for w, a in found) / sum(w for w, _ in found)
    out = tree_advantages(rewards, ids, paths, combine=combine, valid=valid)
    torch.testing.assert_close(out, truth)
    shared = torch.zeros(
        len(ids), 2, dtype=torch.long
    )  # one path for all: every depth is the group
    torch.testing.assert_close(
        tree_advantages(rewards, ids, shared, valid=valid),
        dr_grpo_advantages(rewards, ids, valid=valid),
    )


def test_equal_segments_under_different_prefixes_are_different_segments():
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.long)
    paths = torch.tensor([[0, 7], [0, 7], [1, 7], [1, 8]])
    out = tree_advantages(rewards, ids, paths)
    # rows 0 and 1 meet at depths 0, 1, 2; row 2 shares segment 7 with nobody of its prefix
    torch.testing.assert_close(out, torch.tensor([0.5, -0.5, 0.5, -0.5]))
    out = tree_advantages(torch.tensor([1.0, 0, 0, 0]), ids, paths)
    torch.testing.assert_close(out, torch.tensor([(0.75 + 1) / 3, (-0.25 - 1) / 3, -0.125, -0.125]))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**20), gamma=st.sampled_from([0.0, 0.5, 1.0]), grouped=st.booleans())
def test_reinforce_pp_whitens_the_reward_to_go(seed, gamma, grouped):
    rewards, ids, valid, _, _ = menu(seed)
    generator = torch.Generator().manual_seed(seed)
    token_rewards = torch.randn(len(rewards), 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(len(rewards), 6, generator=generator) < 0.6
    counted = mask & valid[:, None]
    to_go, paid = torch.zeros_like(token_rewards), token_rewards.clone()
    has_tokens = counted.any(1)
    if grouped:  # the mean reward of the group is taken from the last token
        sums = (token_rewards * counted).sum(1)
        for i in has_tokens.nonzero().flatten().tolist():
            last = counted[i].nonzero()[-1]
            paid[i, last] -= sums[group_of(i, ids, has_tokens)].mean()
    for i, row in enumerate(counted):
        own = row.nonzero().flatten().tolist()
        for n, t in enumerate(own):
            to_go[i, t] = sum(gamma**k * paid[i, u] for k, u in enumerate(own[n:]))
    values = to_go[counted]
    out = reinforce_pp_advantages(
        token_rewards, mask, gamma=gamma, group_ids=ids if grouped else None, valid=valid
    )
    assert (out[~counted] == 0).all()
    if len(values) > 1:
        truth = (values - values.mean()) / (values.var() + 1e-8).sqrt()
        torch.testing.assert_close(out[counted], truth, rtol=1e-6, atol=1e-6)


def test_long_discounts_stay_finite_and_exact():
    """gamma^T underflows here: no prefix sum divided by it would do."""
    token_rewards = torch.zeros(1, 3000, dtype=torch.float64)
    token_rewards[0, -1] = token_rewards[0, 9] = 1
    mask = torch.ones(1, 3000, dtype=torch.bool)
    mask[0, 5] = False  # one step less from t < 5
    out = reinforce_pp_advantages(token_rewards, mask, gamma=0.5)
    shape = (out - out[0, 100]) / (out[0, -1] - out[0, 100])  # undoes the whitening
    torch.testing.assert_close(shape[0, -4:], torch.tensor([0.125, 0.25, 0.5, 1]).double())
    torch.testing.assert_close(shape[0, 3:5], torch.tensor([0.5**5, 0.5**4]).double())
    assert out.isfinite().all()


def test_equal_outcomes_are_zero_whatever_their_lengths_and_the_discount():
    mask = torch.arange(6) < torch.tensor([2, 6, 6, 2])[:, None]
    token_rewards = torch.zeros(4, 6)
    token_rewards[torch.arange(4), mask.sum(1) - 1] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1])
    out = reinforce_pp_advantages(token_rewards, mask, gamma=0.5, group_ids=ids)
    assert (out[:2][mask[:2]] == out[0, 0]).all()  # group 0, up to the whitening
    empty = reinforce_pp_advantages(  # a response without a token is no outcome of the group
        torch.cat([token_rewards, torch.zeros(1, 6)]),
        torch.cat([mask, torch.zeros(1, 6, dtype=torch.bool)]),
        gamma=0.5,
        group_ids=torch.cat([ids, ids[:1]]),
    )
    torch.testing.assert_close(empty[:4], out)


@pytest.mark.parametrize("fn", [*ALL, "opo"])
def test_the_sign_of_a_reward_that_is_the_mean_does_not_depend_on_the_order(fn):
    """Rounding would give it one, and `balanced` would put the rollout on a side."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(8, dtype=torch.long)
    lengths = torch.full((8,), 3)
    call = {
        "opo": lambda r: opo_advantages(r, lengths, ids),
    }.get(fn, lambda r: fn(r, ids))
    for _ in range(200):
        rewards = torch.randint(0, 11, (8,), generator=generator) / 10
        order = torch.randperm(8, generator=generator)
        signs = call(rewards).sign()
        assert torch.equal(call(rewards[order]).sign(), signs[order])
        exact = (rewards * 10).round()
        assert ((signs == 0) == (exact * 8 == exact.sum())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signs_of_large_groups_do_not_hang_on_the_order_of_a_sum(dtype):
    for size in (1024, 4096):
        quarter = size // 4
        rewards = torch.tensor([0.1, 0.3, 0.2, 0.2], dtype=dtype).repeat_interleave(quarter)
        ids = torch.zeros(size, dtype=torch.long)
        for order in (rewards.argsort(), rewards.argsort(descending=True), torch.arange(size)):
            out = rloo_advantages(rewards[order], ids)
            assert (out[rewards[order] == rewards[-1]] == 0).all()
        one = torch.zeros(size, dtype=dtype)
        one[0] = 1
        assert (dr_grpo_advantages(one, ids) != 0).all()  # what is real stays


def test_depths_that_cancel_leave_no_sign_in_a_tree():
    generator = torch.Generator().manual_seed(0)
    ids, zeros = torch.zeros(8, dtype=torch.long), 0
    for _ in range(300):
        rewards = torch.randint(0, 11, (8,), generator=generator) / 10
        paths = torch.randint(0, 2, (8, 2), generator=generator)
        order = torch.randperm(8, generator=generator)
        signs = tree_advantages(rewards, ids, paths).sign()
        assert torch.equal(tree_advantages(rewards[order], ids, paths[order]).sign(), signs[order])
        exact = tree_advantages((rewards * 10).round().double() * 840, ids, paths)
        assert torch.equal(signs == 0, exact.abs() < 1e-6)
        zeros += int((signs == 0).sum())
    assert zeros >= 5  # it was tried


def test_large_rewards_lose_nothing():
    ids = torch.zeros(2, dtype=torch.long)
    whole = torch.tensor([2**30, 2**30 + 1])  # fp32 does not know the second
    torch.testing.assert_close(dr_grpo_advantages(whole, ids), torch.tensor([-0.5, 0.5]))
    huge = grpo_advantages(torch.tensor([0.0, 1e25]), ids)
    torch.testing.assert_close(huge, torch.tensor([-1.0, 1.0]) / 2**0.5)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (4096,), generator=generator).float()
    many = torch.arange(4096) // 8
    expected = grpo_advantages(rewards, many, deviation="batch")
    found = grpo_advantages(rewards + 2**23, many, deviation="batch")
    torch.testing.assert_close(found, expected)


def test_the_kl_penalty_is_paid_by_each_token():
    mask = torch.tensor([[True, True, False]])
    lp, ref = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, 9.0]])
    out = kl_penalty(torch.ones(1, 3), lp, ref, mask, coefficient=0.1)
    torch.testing.assert_close(out, torch.tensor([[0.95, 1.1, 0.0]]))
    with pytest.raises(ValueError, match="coefficient"):
        kl_penalty(torch.ones(1, 3), lp, ref, mask, coefficient=-1.0)


def test_remax_does_not_ask_for_a_baseline_of_padding_rows():
    rewards = torch.tensor([1.0, 0.0, 5.0])
    ids, greedy = torch.tensor([3, 3, -1]), torch.tensor([False, True, False])
    valid = torch.tensor([True, True, False])
    out, _ = remax_advantages(rewards, ids, greedy, valid=valid)
    assert out.tolist() == [1.0, 0.0, 0.0]


def test_remax_takes_the_greedy_reward_away_and_leaves_greedy_rows_out():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 9.0, 0.25, 0.0])
    ids = torch.tensor([4, 4, 4, 9, 9, 9, 9])
    greedy = torch.tensor([False, True, False, False, False, True, False])
    out, metrics = remax_advantages(rewards, ids, greedy, clip=5)
    torch.testing.assert_close(out, torch.tensor([1.0, 0, 0, 0.75, 5, 0, -0.25]))
    assert metrics["remax/zero_fraction"].item() == pytest.approx(1 / 5)
    assert metrics["remax/greedy_reward"].item() == pytest.approx(0.125)
    assert metrics["remax/without_baseline"].item() == 0
    valid = torch.tensor([True, True, True, True, True, False, False])
    lost = torch.where(valid, rewards, float("nan"))  # the greedy reward of group 9 was lost
    out, metrics = remax_advantages(lost, ids, greedy, valid=valid)
    torch.testing.assert_close(out, torch.tensor([1.0, 0, 0, 0, 0, 0, 0]))
    assert metrics["remax/without_baseline"].item() == pytest.approx(2 / 4)
    assert metrics["remax/greedy_reward"].item() == 0
    weights = aggregation_weights(
        torch.ones(7, 2, dtype=torch.bool), ids, out, rule="seq_mean", valid=valid & ~greedy
    )
    assert (weights[greedy] == 0).all() and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("rows", "found"), [((), 0), ((0, 2), 2)])
def test_remax_refuses_a_group_without_exactly_one_greedy_row(rows, found):
    greedy = torch.zeros(3, dtype=torch.bool)
    greedy[list(rows)] = True
    with pytest.raises(ValueError, match=f"one greedy row.*got {found} in the group with id 6"):
        remax_advantages(torch.zeros(3), torch.full((3,), 6), greedy)


def test_reinforce_is_the_reward():
    valid = torch.tensor([True, False])
    out = reinforce_advantages(torch.tensor([2.0, float("nan")]), valid=valid)
    assert torch.equal(out, torch.tensor([2.0, 0.0]))


def test_the_batch_deviation_is_of_the_rewards():
    rewards, ids = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    out = grpo_advantages(rewards, ids, deviation="batch")
    torch.testing.assert_close(out, torch.tensor([0.5, -0.5, 0, 0]) / (0.5 + 1e-6))


def test_broadcast():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = broadcast_advantages(torch.tensor([2.0, float("nan")]), mask)
    assert torch.equal(out, torch.tensor([[2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"finite advantages.*\(0,\)"):
        broadcast_advantages(torch.tensor([float("inf"), 1.0]), mask)


def test_bad_inputs_are_named():
    rewards, ids = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"group_ids \[B\] = \(3,\), got \(2,\)"):
        dr_grpo_advantages(rewards, ids[:2])
    with pytest.raises(ValueError, match="integer dtype"):
        rloo_advantages(rewards, ids.float())
    with pytest.raises(ValueError, match=r"valid of torch\.bool"):
        rloo_advantages(rewards, ids, valid=ids)
    rewards[1] = float("nan")
    with pytest.raises(ValueError, match=r"finite rewards.*nan at \(1,\)"):
        dr_grpo_advantages(rewards, ids)
    with pytest.raises(ValueError, match="rewards as a tensor, got list"):
        dr_grpo_advantages([0.0, 1.0], ids)
    with pytest.raises(ValueError, match=r"expected rewards \[B\]"):
        dr_grpo_advantages(rewards[None], ids)
    with pytest.raises(ValueError, match="deviation"):
        grpo_advantages(rewards, ids, deviation="token")
    with pytest.raises(ValueError, match=r"lengths >= 0, got -1"):
        opo_advantages(torch.zeros(3), -torch.ones(3), ids)
    with pytest.raises(ValueError, match=r"paths \[B, D\]"):
        tree_advantages(torch.zeros(3), ids, ids)
    with pytest.raises(ValueError, match="clip > 0"):
        remax_advantages(torch.zeros(3), ids, ids == 0, clip=0.0)
    mask = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gamma in \[0, 1\]"):
        reinforce_pp_advantages(torch.zeros(3, 2), mask, gamma=1.1)


# Edits to stability/advantages.py that must turn this file red:
#   drop `- lowest[index]`                        (equal rewards: rounding noise)
#   (sizes - 1).clamp_min(1) -> sizes.clamp_min(1) in the variance
#   sizes / (sizes - 1).clamp_min(1) -> 1 in rloo_advantages
#   sizes = segment_sum(torch.ones_like(values), index, n)     (invalid rollouts count)
#   gamma**step * reach -> gamma * reach in statistics.reward_to_go
#   shared = inside & (sizes[index] > 1) -> inside   (a subgroup of one counts)
#   masked(wide(advantages)[:, None], mask) -> wide(advantages)[:, None] * mask
