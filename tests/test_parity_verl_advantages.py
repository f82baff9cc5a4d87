"""Advantages against verl's estimators (how to run it: tests/verl_cases.py)."""

import pytest
import torch
from verl_cases import NAN, at_last_token, batch, close, core, few, seeds, uid_of

from trimtab.stability import (
    broadcast_advantages,
    dr_grpo_advantages,
    grpo_advantages,
    opo_advantages,
    optimal_token_baseline,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)


@pytest.mark.parametrize("tail", ["zero_baseline", "keep"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("alignment", ["column", "model_token"])
@few
@seeds
def test_optimal_token_baseline(alignment, weighted, tail, seed):
    """In columns without gaps, with a reward at every token; the other with gaps as well."""
    b = batch(seed, gaps=alignment == "model_token")
    weights = b.weights if weighted else None
    ours = optimal_token_baseline(
        b.dense,
        b.mask,
        b.logp,
        b.sum_p2,
        b.ids,
        alignment=alignment,
        importance=weights,
        tail=tail,
    )
    column = alignment == "column"
    name = "optimal_token_baseline" if column else "tir_optimal_token_baseline"
    theirs, _ = core.get_adv_estimator_fn(name)(
        b.dense,
        b.ints,
        b.uid,
        b.logp,
        b.sum_p2,
        rollout_is_weights=weights,
        handle_zero_tail=tail == "zero_baseline",
    )
    close(ours, theirs)


@few
@seeds
def test_optimal_token_baseline_in_columns_with_gaps(seed):
    """Where no tail is cut, gaps are the same to both."""
    b = batch(seed)
    ours = optimal_token_baseline(b.dense, b.mask, b.logp, b.sum_p2, b.ids, tail="keep")
    theirs, _ = core.compute_optimal_token_baseline_advantage(
        b.dense, b.ints, b.uid, b.logp, b.sum_p2, handle_zero_tail=False
    )
    close(ours, theirs)


@few
@seeds
def test_optimal_token_baseline_in_float32(seed):
    b = batch(seed, gaps=False)
    single = [x.float() for x in (b.dense, b.logp, b.sum_p2)]
    ours = optimal_token_baseline(single[0], b.mask, *single[1:], b.ids)
    theirs, _ = core.compute_optimal_token_baseline_advantage(single[0], b.ints, b.uid, *single[1:])
    close(ours, theirs, 1e-4)  # theirs takes W and R in fp32


OUTCOME = {
    "grpo": (lambda b: grpo_advantages(b.outcome, b.ids), "grpo", {}, 1e-9),
    "dr_grpo": (
        lambda b: dr_grpo_advantages(b.outcome, b.ids),
        "grpo",
        {"norm_adv_by_std_in_grpo": False},
        1e-9,
    ),
    # theirs in fp32, whatever comes in
    "grpo_vectorized": (lambda b: grpo_advantages(b.outcome, b.ids), "grpo_vectorized", {}, 1e-4),
    "dr_grpo_vectorized": (
        lambda b: dr_grpo_advantages(b.outcome, b.ids),
        "grpo_vectorized",
        {"norm_adv_by_std_in_grpo": False},
        1e-5,
    ),
    "rloo": (lambda b: rloo_advantages(b.outcome, b.ids), "rloo", {}, 1e-9),
    "rloo_vectorized": (lambda b: rloo_advantages(b.outcome, b.ids), "rloo_vectorized", {}, 1e-9),
    "opo": (lambda b: opo_advantages(b.outcome, b.mask.sum(1), b.ids), "opo", {}, 1e-9),
}


@pytest.mark.parametrize("name", OUTCOME)
@few
@seeds
def test_outcome_advantages(name, seed):
    ours, estimator, options, tolerance = OUTCOME[name]
    b = batch(seed)
    theirs, _ = core.get_adv_estimator_fn(estimator)(b.sparse, b.ints, b.uid, **options)
    close(broadcast_advantages(ours(b), b.mask), theirs, tolerance)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@few
@seeds
def test_reinforce_plus_plus(gamma, seed):
    """Rewards at any token, and gaps that neither add nor discount."""
    b = batch(seed)
    if b.mask.sum() < 2:
        return  # theirs raises
    theirs, _ = core.compute_reinforce_plus_plus_outcome_advantage(
        b.dense, b.ints, config=configs_of_algorithm(gamma=gamma)
    )
    # theirs has 1e-8 in the denominator of its means
    close(reinforce_pp_advantages(b.dense, b.mask, gamma=gamma), theirs, 1e-6)


@few
@seeds
def test_reinforce_plus_plus_baseline(seed):
    b = batch(seed)
    if b.mask.sum() < 2:
        return
    theirs, _ = core.compute_reinforce_plus_plus_baseline_outcome_advantage(b.sparse, b.ints, b.uid)
    close(reinforce_pp_advantages(b.sparse, b.mask, group_ids=b.ids), theirs, 1e-6)


@few
@seeds
def test_remax(seed):
    """verl takes the greedy rewards beside the batch, we take the greedy rows in it."""
    b = batch(seed)
    greedy_rows = torch.tensor(
        [i for i, x in enumerate(b.ids.tolist()) if x not in b.ids.tolist()[:i]]
    )
    greedy = torch.zeros_like(b.ids, dtype=torch.bool)
    greedy[greedy_rows] = True
    ours, _ = remax_advantages(b.outcome, b.ids, greedy)
    baseline = {int(b.ids[i]): b.outcome[i] for i in greedy_rows}
    rollouts = ~greedy
    theirs, _ = core.compute_remax_outcome_advantage(
        b.sparse[rollouts],
        torch.stack([baseline[int(i)] for i in b.ids[rollouts]]),
        b.ints[rollouts],
    )
    # in a gap theirs holds the reward to go, which the loss masks
    close(broadcast_advantages(ours, b.mask)[rollouts], theirs * b.mask[rollouts])


def configs_of_algorithm(**options):
    return pytest.importorskip("verl.trainer.config").AlgoConfig(**options)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "opo", "reinforce_plus_plus_baseline"])
def test_difference_group_of_one(estimator):
    """A convention, by which a lone rollout trains on its raw reward; 0 for us."""
    outcome = torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64)
    ids = torch.tensor([0, 1, 1])
    mask = torch.ones(3, 2, dtype=torch.bool)
    sparse = at_last_token(outcome, mask)
    theirs, _ = core.get_adv_estimator_fn(estimator)(sparse, mask.long(), uid_of(ids))
    if estimator == "reinforce_plus_plus_baseline":  # 5, -1/2 and 1/2, before whitening
        raw = torch.tensor([5.0, -0.5, 0.5], dtype=torch.float64)
        close((theirs[:, 0] - theirs[1, 0]) / (theirs[2, 0] - theirs[1, 0]), raw + 0.5, 1e-6)
        ours = reinforce_pp_advantages(sparse, mask, group_ids=ids)
        assert ours[0, 0].abs() < 1e-12
        return
    assert theirs[0, 0] == pytest.approx(5.0, rel=1e-5)
    ours = {
        "grpo": lambda: grpo_advantages(outcome, ids),
        "rloo": lambda: rloo_advantages(outcome, ids),
        "opo": lambda: opo_advantages(outcome, mask.sum(1), ids),
    }[estimator]()
    assert ours[0] == 0


def test_difference_rloo_vectorized_gives_zero_to_a_group_of_one():
    """A bug: two functions of verl under one name; the vectorised one agrees with us."""
    outcome, ids = torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0, 1, 1])
    mask = torch.ones(3, 1, dtype=torch.bool)
    args = (outcome[:, None], mask.long(), uid_of(ids))
    assert core.compute_rloo_outcome_advantage(*args)[0][0, 0] == 5
    assert core.compute_rloo_vectorized_outcome_advantage(*args)[0][0, 0] == 0
    assert rloo_advantages(outcome, ids)[0] == 0


def test_difference_equal_rewards_are_exactly_zero_for_us():
    """A bug: rounding of the mean over a deviation that is rounding too gives them a sign."""
    rewards, ids = torch.full((6,), 1000.1), torch.zeros(6, dtype=torch.int64)
    mask = torch.ones(6, 1, dtype=torch.bool)
    theirs, _ = core.compute_grpo_outcome_advantage(rewards[:, None], mask.long(), uid_of(ids))
    assert theirs.abs().max() > 0.1
    assert (grpo_advantages(rewards, ids) == 0).all()


def test_difference_rewards_at_masked_positions_count():
    """A bug: outcome estimators sum token rewards without the mask; we mask, or take the sum."""
    rewards = torch.tensor([[1.0, 7.0], [0.0, 2.0]])
    mask, ids = torch.tensor([[True, False], [True, True]]), torch.zeros(2, dtype=torch.int64)
    theirs, _ = core.compute_grpo_outcome_advantage(
        rewards.clone(), mask.long(), uid_of(ids), norm_adv_by_std_in_grpo=False
    )
    assert theirs[0, 0] == 3  # of rewards 8 and 2
    ours = reinforce_pp_advantages(rewards, mask, group_ids=ids)
    assert ours[0, 0] < 0  # of rewards 1 and 2


def test_difference_dense_rewards_with_a_group_baseline():
    """A convention: theirs repeats the response's sum at each token, ours is the reward to go."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    mask, ids = torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    theirs, _ = core.compute_reinforce_plus_plus_baseline_outcome_advantage(
        rewards, mask.long(), uid_of(ids)
    )
    ours = reinforce_pp_advantages(rewards, mask, group_ids=ids)
    assert theirs[0, 0] == theirs[0, 1]
    assert ours[0, 0] > ours[0, 1]  # 1 to go, then nothing


def test_difference_remax_with_dense_rewards():
    """A convention: theirs subtracts the whole greedy reward from each token's reward to go."""
    rewards = torch.tensor([[1.0, 2.0]])
    theirs, _ = core.compute_remax_outcome_advantage(
        rewards, torch.tensor([3.0]), torch.ones(1, 2, dtype=torch.int64)
    )
    assert theirs.tolist() == [[0.0, -1.0]]
    ours, _ = remax_advantages(
        torch.tensor([3.0, 3.0]), torch.zeros(2, dtype=torch.int64), torch.tensor([False, True])
    )
    assert ours[0] == 0


def test_difference_a_group_without_a_token_in_opo():
    """A bug: 0 / 0 there, and NaN at every position of the group; 0 for us."""
    outcome, ids = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    rewards = torch.zeros(2, 3)
    rewards[:, 0] = outcome
    theirs, _ = core.compute_opo_outcome_advantage(rewards, mask.long(), uid_of(ids))
    assert theirs.isnan().all()
    assert opo_advantages(outcome, mask.sum(1), ids).isfinite().all()


def test_difference_a_batch_of_one_token():
    """A convention: theirs raises, because the variance has no degree of freedom; 0 for us."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="division by zero"):
        core.compute_reinforce_plus_plus_outcome_advantage(
            torch.ones(1, 1), mask.long(), config=configs_of_algorithm()
        )
    assert reinforce_pp_advantages(torch.ones(1, 1), mask).item() == 0


def test_difference_the_tail_in_columns_with_gaps():
    """A bug: lengths are counts of tokens and used as columns, so a gap moves the cut."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    ids, half = torch.zeros(2, dtype=torch.int64), torch.full((2, 6), 0.5, dtype=torch.float64)
    rewards = torch.zeros(2, 6, dtype=torch.float64)
    rewards[0, 5], rewards[1, 4] = 1.0, 3.0
    theirs, _ = core.compute_optimal_token_baseline_advantage(
        rewards, mask.long(), uid_of(ids), half.log(), half
    )
    ours = optimal_token_baseline(rewards, mask, half.log(), half, ids)
    assert theirs[0].tolist()[2:5] == [1.0, 1.0, 1.0]  # no baseline from column 2, its tokens
    assert ours[0, 5] == 1  # from column 5, where the other has ended
    assert ours[0, 3] < 0.5 and ours[0, 4] < 0.5
    kept = optimal_token_baseline(rewards, mask, half.log(), half, ids, tail="keep")
    close(ours[:, :5], kept[:, :5])


def test_difference_a_rollout_without_tokens_is_company_in_columns():
    """A bug: the other rollout becomes its own baseline there, in their multi-turn form it is not.

    Only without zero_baseline, which hides it.
    """
    mask = torch.tensor([[True, True], [False, False]])
    ids, half = torch.zeros(2, dtype=torch.int64), torch.full((2, 2), 0.5, dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    args = (rewards, mask.long(), uid_of(ids), half.log(), half)
    columns, _ = core.compute_optimal_token_baseline_advantage(*args, handle_zero_tail=False)
    turns, _ = core.compute_multi_turn_optimal_token_baseline_advantage(
        *args, handle_zero_tail=False
    )
    ours = optimal_token_baseline(rewards, mask, half.log(), half, ids, tail="keep")
    close(columns, torch.zeros_like(columns), 1e-6)
    close(ours, turns)
    assert ours[0].tolist() == [1, 1]


def test_difference_nan_at_a_masked_position_poisons_advantages():
    """A bug: masked by a product; NaN there reaches every later token of the group."""
    b = batch(11, gaps=False)
    mask = b.mask.clone()
    mask[:, 0] = False
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    values = [torch.cat([x, x[:, :1]], 1) for x in (b.logp, b.sum_p2, b.dense)]
    logp, sum_p2, dense = (torch.where(mask, x, NAN) for x in values)
    theirs, _ = core.compute_optimal_token_baseline_advantage(
        dense, mask.long(), b.uid, logp, sum_p2
    )
    assert theirs.isnan().any()
    ours = optimal_token_baseline(dense, mask, logp, sum_p2, b.ids)
    clean = optimal_token_baseline(values[2] * mask, mask, *values[:2], b.ids)
    assert torch.equal(ours, clean)


def test_difference_energy_below_zero():
    """Rounding: theirs keeps 1 - 2p + sum p^2 as it comes, ours holds it in its range."""
    p = torch.tensor(1 - 1e-7)
    sum_p2 = p.square() - 6e-8  # a second kernel's rounding
    logp = p.log().view(1, 1).repeat(2, 1)
    rewards, mask = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1, dtype=torch.bool)
    ids = torch.zeros(2, dtype=torch.int64)
    both = torch.stack([sum_p2, p.square()]).view(2, 1)
    theirs, _ = core.compute_optimal_token_baseline_advantage(
        rewards, mask.long(), uid_of(ids), logp, both
    )
    assert theirs[0, 0] < 0 or theirs[0, 0] > 1  # outside of what rewards of 0 and 1 can give
    ours = optimal_token_baseline(rewards, mask, logp, both, ids)
    assert 0 <= ours[0, 0] <= 1
