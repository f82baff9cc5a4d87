"""A group of ragged responses with a loss that uses every statistic, and its definition."""

import torch
from tiny_models import VOCAB

LENGTHS = (5, 1, 7, 7, 3, 9)


def group_of_responses(prompt=17, lengths=LENGTHS, seed=0):
    """Prompt, responses, and a weight for each response token."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(VOCAB, (n,), generator=g).tolist()

    weights = [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths]
    return tokens(prompt), [tokens(n) for n in lengths], weights


def token_loss(logp, entropy, sum_p2, weights):
    return (weights * (logp + 0.3 * weights * entropy - 0.2 * sum_p2)).sum()


def loss_of(weights):
    """The loss as `SharedPrefix` calls it."""

    def loss(out, wave):
        own = [weights[i] for i in wave.rows]
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True).to(out.logp)
        return token_loss(out.logp, out.stats.entropy, out.stats.sum_p2, padded)

    return loss


def dense_loss(model, context, response, weights, temperature=1.0):
    """One trajectory alone through the model as it is."""
    ids = torch.tensor([[*context, *response]])
    logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    p = logp.exp()
    own = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
    return token_loss(own, -(p * logp).sum(-1), p.square().sum(-1), weights.to(dtype))


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])


def dense_gradient(model, prompt, responses, weights, **options):
    """Sum of the losses, and all parameters' gradient, flat; gradients are None afterwards."""
    model.zero_grad()
    total = 0.0
    for response, w in zip(responses, weights, strict=True):
        loss = dense_loss(model, prompt, response, w, **options)
        loss.backward()
        total += float(loss.detach())
    found = gradient(model)
    model.zero_grad()
    return total, found


def relative_l2(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())
