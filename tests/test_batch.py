import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.rl.advantages import outcome_advantages
from trimtab.rl.batch import collate
from trimtab.rl.config import UpdateConfig
from trimtab.rl.objective import token_weights
from trimtab.rl.rollout import Sample

PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8]]


def sample(*ids, reason="stop"):
    return Sample(list(ids), [-0.5 * i for i in ids], reason)


GROUPS = [
    [sample(11, 12), sample(13), sample(14, 15, 16, 17, 18)],
    [sample(21), sample(22)],
    [sample(31, 32, 33, reason="length")],
    [sample(41, 42, 43), sample(44, 45)],
]


def test_collate():
    rewards = [[1.0, 0.25, None], [None, None], [-2.0], [0.0, 1.0]]
    batch = collate(PROMPTS, [50, 51, 62, 73], GROUPS, rewards)
    assert len(batch) == 5
    assert batch.prompts == PROMPTS
    assert batch.tokens.tolist() == [
        [11, 12, 0],
        [13, 0, 0],
        [31, 32, 33],
        [41, 42, 43],
        [44, 45, 0],
    ]  # the lost rollout of five tokens does not widen it
    assert batch.mask.tolist() == (batch.tokens != 0).tolist()
    torch.testing.assert_close(batch.rollout_logp, -0.5 * batch.tokens, check_dtype=False)
    assert batch.group_index.tolist() == [0, 0, 2, 3, 3]
    assert batch.group_ids.tolist() == [50, 50, 62, 73, 73]
    assert batch.rewards.tolist() == [1.0, 0.25, -2.0, 0.0, 1.0]
    assert batch.truncated.tolist() == [False, False, True, False, False]
    dtypes = {name: x.dtype for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    assert dtypes == {
        "tokens": torch.int64,
        "mask": torch.bool,
        "rollout_logp": torch.float32,
        "group_index": torch.int64,
        "group_ids": torch.int64,
        "rewards": torch.float32,
        "truncated": torch.bool,
    }


def test_a_batch_without_rewards_is_still_a_batch():
    # one process can lose all its rewards and must still take part in the others' counts
    batch = collate(PROMPTS, [0, 1, 2, 3], GROUPS, [[None] * len(group) for group in GROUPS])
    assert len(batch) == 0
    for rule in ("balanced", "seq_mean", "token_mean", "token_mean_group"):
        config = UpdateConfig(aggregation=rule)
        outcome, _ = outcome_advantages(batch, config)
        weights = token_weights(batch, outcome, config, 8, None)
        assert weights.shape == batch.mask.shape
    assert len(batch.select(batch.rows_of_prompts(0, 4))) == 0
    assert len(collate([], [], [], [])) == 0


def test_select_and_rows_of_prompts():
    batch = collate(
        PROMPTS, [50, 51, 62, 73], GROUPS, [[1.0, 2.0, 3.0], [4.0, 5.0], [6.0], [7.0, 8.0]]
    )
    rows = batch.rows_of_prompts(1, 3)
    assert rows.tolist() == [False] * 3 + [True] * 3 + [False] * 2
    part = batch.select(rows)
    assert part.prompts == [[4], [5, 6]]
    assert part.group_index.tolist() == [0, 0, 1]
    assert part.group_ids.tolist() == [51, 51, 62]
    assert part.tokens.tolist() == [[21, 0, 0], [22, 0, 0], [31, 32, 33]]
    assert part.rewards.tolist() == [4.0, 5.0, 6.0]
    assert part.truncated.tolist() == [False, False, True]
    last = part.select(torch.tensor([False, True, False]))
    assert (last.prompts, last.group_index.tolist(), last.group_ids.tolist()) == ([[4]], [0], [51])
    assert last.tokens.tolist() == [[22]]
    torch.testing.assert_close(last.rollout_logp, torch.tensor([[-11.0]]))
    assert len(batch.select(batch.rows_of_prompts(4, 9))) == 0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=4), max_size=5),
    st.data(),
)
def test_any_selection_holds_the_chosen_rollouts(shape, data):
    numbers = iter(range(1, 10**6))
    groups = [[sample(*(next(numbers) for _ in range(n))) for n, _ in group] for group in shape]
    rewards = [[float(next(numbers)) if kept else None for _, kept in group] for group in shape]
    prompts = [[next(numbers), next(numbers)] for _ in shape]
    batch = collate(prompts, [10 * p for p in range(len(shape))], groups, rewards)
    expected = [
        (prompts[p], 10 * p, s.token_ids, s.logprobs, r)
        for p in range(len(shape))
        for s, r in zip(groups[p], rewards[p], strict=True)
        if r is not None
    ]

    def contents(batch):
        for row in range(len(batch)):
            mask, index = batch.mask[row], batch.group_index[row]
            yield (
                batch.prompts[index],
                int(batch.group_ids[row]),
                batch.tokens[row, mask].tolist(),
                batch.rollout_logp[row, mask].tolist(),
                float(batch.rewards[row]),
            )

    assert list(contents(batch)) == expected
    chosen = [data.draw(st.booleans()) for _ in expected]
    part = batch.select(torch.tensor(chosen, dtype=torch.bool))
    assert list(contents(part)) == [e for e, c in zip(expected, chosen, strict=True) if c]
    assert sorted(set(part.group_index.tolist())) == list(range(len(part.prompts)))
    assert not len(part) or part.mask.any(0).all()  # no column of nothing but padding


# Edits to rl/batch.py that must turn this file red:
#   if reward is not None           ->  if reward                 (a reward of 0 is lost)
#   torch.tensor(list(prompt_ids), dtype=torch.long)[index]  ->  index
#   index (of select)               ->  self.group_index[rows]
#   self.tokens[rows, :width]       ->  self.tokens[rows]
#   default=1 of collate's width    ->  default=0
