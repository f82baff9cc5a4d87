import pytest
import torch
from torch import Tensor

from trimtab.stability import apply_weights, hybrid_imitation_loss, imitation_advantages
from trimtab.triton_kernels.divergence import token_kl

V, DEPTH = 3, 3


def tree(seed):
    """Logits of every state of a full tree, for a policy and a teacher; a reward for each token."""
    generator = torch.Generator().manual_seed(seed)
    states = sum(V**d for d in range(DEPTH))
    logits, teacher = (
        torch.randn(states, V, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    rewards = torch.randn(states, V, generator=generator, dtype=torch.float64)
    paths = torch.cartesian_prod(*[torch.arange(V)] * DEPTH)
    state = torch.zeros(len(paths), DEPTH, dtype=torch.long)  # index of the state at each step
    for d in range(1, DEPTH):
        state[:, d] = state[:, d - 1] * V + 1 + paths[:, d - 1]
    return logits, teacher, rewards, paths, state


def objective(logits: Tensor, teacher: Tensor, rewards, paths, state, weight):
    """E_p [sum_t c_t - weight sum_t r_t] by enumeration."""
    lp = logits.log_softmax(-1)[state, paths]
    lq = teacher.log_softmax(-1)[state, paths]
    return (lp.sum(1).exp() * (lp - lq - weight * rewards[state, paths]).sum(1)).sum()


@pytest.mark.parametrize("exact_cost", [False, True], ids=["sampled cost", "exact cost"])
@pytest.mark.parametrize("seed", range(3))
def test_dense_plus_sparse_is_the_exact_gradient(seed, exact_cost):
    logits, teacher, rewards, paths, state = tree(seed)
    weight = 0.7
    x = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(objective(x, teacher, rewards, paths, state, weight), x)

    x = logits.clone().requires_grad_()
    kl = token_kl(x, teacher)[state]
    lp = x.log_softmax(-1)[state, paths]
    costs = kl.detach() if exact_cost else (lp - teacher.log_softmax(-1)[state, paths]).detach()
    mask = torch.ones_like(paths, dtype=torch.bool)
    advantages = imitation_advantages(costs, rewards[state, paths], mask, reward_weight=weight)
    loss = hybrid_imitation_loss(kl, lp, advantages, mask=mask)
    probability = lp.detach().sum(1).exp()
    (grad,) = torch.autograd.grad(apply_weights(loss, probability[:, None] * mask), x)
    torch.testing.assert_close(grad, truth)


def test_without_discount_it_is_distillation_and_the_own_reward():
    costs, rewards = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.0, 4.0]])
    mask = torch.tensor([[True, False, True]])
    out = imitation_advantages(costs, rewards, mask, gamma=0.0, reward_weight=2.0)
    assert torch.equal(out, torch.tensor([[1.0, 0.0, 8.0]]))
    out = imitation_advantages(costs, rewards, mask, gamma=0.5, reward_weight=2.0)
    assert torch.equal(out, torch.tensor([[1.0 + 0.5 * 8 - 0.5 * 3, 0.0, 8.0]]))


def test_bad_inputs_are_named():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="gamma"):
        imitation_advantages(x, x, mask, gamma=-0.1)
    with pytest.raises(ValueError, match="reward_weight"):
        imitation_advantages(x, x, mask, reward_weight=float("nan"))
    with pytest.raises(ValueError, match="costs"):
        imitation_advantages(x[:1], x, mask)
    with pytest.raises(ValueError, match="token_kl"):
        hybrid_imitation_loss(x[:1], x, x, mask=mask)


# Edits to stability/imitation.py that must turn this file red:
#   reward_to_go(cost, mask, gamma) - cost  ->  reward_to_go(cost, mask, gamma)   (own cost twice)
#   reward_weight * reward_to_go(...)       ->  reward_to_go(...)
#   + sparse                                ->  - sparse
