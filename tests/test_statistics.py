import pytest
import torch

from trimtab.stability import (
    linear_response_statistics,
    pack_padded,
    pad_packed,
    response_statistics,
)

# (B, T, V): one of each; ragged rows; V past one block of the kernel (4096)
SHAPES = [(1, 1, 1), (3, 5, 11), (2, 3, 4100)]
FIELDS = ("logp", "entropy", "sum_p2", "logsumexp", "max_logit")


def batch(b, t, v, device):
    generator = torch.Generator().manual_seed(b * 100 + t)
    logits = 3 * torch.randn(b, t, v, generator=generator)
    tokens = torch.randint(v, (b, t), generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    mask[0, 0] = True
    return logits.to(device), tokens.to(device), mask.to(device)


def by_loops(logits, tokens, mask, temperature, rho):
    """float64, one token at a time, straight from the definitions."""
    out = {name: torch.zeros(mask.shape, dtype=torch.float64) for name in FIELDS}
    out["log_kept_mass"] = torch.zeros(mask.shape, dtype=torch.float64)
    for i, t in mask.cpu().nonzero().tolist():
        x = logits[i, t].cpu().double() / temperature
        y = int(tokens[i, t])
        inside = x >= x.max() + torch.tensor(rho, dtype=torch.float64).log() if rho else x == x
        inside[y] = True
        p = x.softmax(-1)
        q = torch.where(inside, p, 0) / p[inside].sum()
        out["logp"][i, t] = q[y].log()
        out["entropy"][i, t] = -torch.special.xlogy(q, q).sum()
        out["sum_p2"][i, t] = q.square().sum()
        out["logsumexp"][i, t] = x.logsumexp(-1)
        out["max_logit"][i, t] = x.max()
        out["log_kept_mass"][i, t] = p[inside].sum().log()
    return out


@pytest.mark.parametrize("rho", [None, 0.05], ids=["whole", "pruned"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-V{}".format(*s))
def test_every_field_matches_its_definition(shape, rho, device):
    logits, tokens, mask = batch(*shape, device)
    stats = response_statistics(logits, tokens, mask, temperature=0.7, prune=rho)
    truth = by_loops(logits, tokens, mask, 0.7, rho)
    for name in (*FIELDS, "log_kept_mass") if rho else FIELDS:
        value = getattr(stats, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double().cpu(), truth[name], atol=2e-5, rtol=2e-5)
    if rho is None:
        assert stats.log_kept_mass is None and stats.safe_count is None
    else:
        assert stats.in_safe_set.dtype == torch.bool and not stats.in_safe_set[~mask].any()
        assert (stats.safe_count[mask] >= 1).all() and (stats.safe_count[~mask] == 0).all()


def test_the_gradient_is_that_of_log_softmax_and_zero_at_masked_positions(device):
    logits, tokens, mask = batch(3, 5, 11, device)
    upstream = torch.randn(mask.shape, device=device)
    logits.requires_grad_()
    (upstream * response_statistics(logits, tokens, mask, temperature=2.0).logp).sum().backward()
    twin = logits.detach().double().requires_grad_()
    logp = (twin / 2).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.where(mask, upstream.double() * logp, 0).sum().backward()
    torch.testing.assert_close(logits.grad.double(), twin.grad, atol=1e-6, rtol=1e-5)
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("rho", [None, 0.05], ids=["whole", "pruned"])
def test_a_head_without_its_logits_gives_the_same(rho, device):
    _, tokens, mask = batch(3, 5, 70, device)
    hidden = torch.randn(3, 5, 12, device=device, requires_grad=True)
    weight = torch.randn(70, 12, device=device, requires_grad=True)
    bias = torch.randn(70, device=device, requires_grad=True)
    options = {"temperature": 0.7, "prune": rho, "softcap": 4.0}
    fused = linear_response_statistics(hidden, weight, tokens, mask, bias=bias, **options)
    plain = response_statistics(hidden @ weight.t() + bias, tokens, mask, **options)
    for name, a, b in zip(fused._fields, fused, plain, strict=True):
        if name == "skipped_fraction":
            assert (a is None) == (rho is None) and b is None
        elif b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)
    inputs = (hidden, weight, bias)
    ours, theirs = (torch.autograd.grad((s.logp + s.entropy).sum(), inputs) for s in (fused, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"hidden \[B, T, D\]"):
        linear_response_statistics(hidden[0], weight, tokens, mask)
    with pytest.raises(ValueError, match=r"weight \[V, D\] .*not transposed.*\(12, 70\)"):
        linear_response_statistics(hidden, weight.t(), tokens, mask)


@pytest.mark.parametrize("token", [-100, -1, 11])
def test_a_generated_token_that_is_none_is_named(token, device):
    """Also -100, which other libraries ignore: the mask says that it counts."""
    logits, tokens, mask = batch(3, 5, 11, device)
    tokens[0, 0] = token
    with pytest.raises(ValueError, match=rf"tokens in \[0, 11\) .*got {token} at \(0, 0\)"):
        response_statistics(logits, tokens, mask)


def test_masked_positions_may_hold_anything(device):
    logits, tokens, mask = batch(3, 5, 11, device)
    clean = response_statistics(logits, tokens, mask, prune=0.05)
    logits[~mask] = float("nan")
    tokens[~mask] = -(10**6)
    logits.requires_grad_()
    dirty = response_statistics(logits, tokens, mask, prune=0.05)
    for a, b in zip(clean, dirty, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    dirty.logp.sum().backward()
    assert (logits.grad[~mask] == 0).all() and logits.grad.isfinite().all()


def test_an_all_masked_batch_is_all_zero(device):
    logits, tokens, mask = batch(2, 3, 5, device)
    stats = response_statistics(logits, tokens, torch.zeros_like(mask))
    assert all((x == 0).all() for x in stats if x is not None)


def test_fp64_stays_fp64_and_strided_logits_are_read_right():
    logits, tokens, mask = batch(3, 5, 11, "cpu")
    whole = response_statistics(logits.double(), tokens, mask)
    assert whole.logp.dtype == torch.float64
    part = response_statistics(logits.double()[:, 1:], tokens[:, 1:], mask[:, 1:])
    assert torch.equal(part.logp, whole.logp[:, 1:])


def test_bad_inputs_are_named():
    logits, tokens, mask = batch(3, 5, 11, "cpu")
    with pytest.raises(ValueError, match=r"expected logits \[B, T, V\]"):
        response_statistics(logits[0], tokens, mask)
    with pytest.raises(ValueError, match=r"expected tokens \[B, T\] = \(3, 5\), got \(3, 4\)"):
        response_statistics(logits, tokens[:, 1:], mask)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        response_statistics(logits, tokens, mask.long())
    with pytest.raises(ValueError, match="int64"):
        response_statistics(logits, tokens.int(), mask)
    logits[0, 0, 3] = float("nan")
    with pytest.raises(ValueError, match=r"logits, tokens.*at \(0, 0\)"):
        response_statistics(logits, tokens, mask)


def test_packing_is_padding_and_back():
    values = torch.arange(6.0).view(6, 1).expand(6, 2)
    lengths = torch.tensor([2, 0, 3, 1])
    padded, mask = pad_packed(values, lengths)
    assert padded.shape == (4, 3, 2) and mask.sum(1).tolist() == [2, 0, 3, 1]
    assert padded[2, :, 0].tolist() == [2.0, 3.0, 4.0] and (padded[~mask] == 0).all()
    assert torch.equal(pack_padded(padded, lengths), values)
    wide, _ = pad_packed(values, lengths, width=5)
    assert wide.shape == (4, 5, 2) and torch.equal(pack_padded(wide, lengths), values)
    nothing, mask = pad_packed(values[:0], torch.zeros(2, dtype=torch.long))
    assert nothing.shape == (2, 1, 2) and not mask.any()


def test_packing_refuses_lengths_that_do_not_fit():
    values = torch.zeros(6)
    for lengths, message in (
        (torch.tensor([2, 3]), "sum to 6, got 5"),
        (torch.tensor([7, -1]), "whole numbers >= 0"),
        (torch.tensor([6.0]), "whole numbers >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_packed(values, lengths)
    with pytest.raises(ValueError, match="width >= 4, got 3"):
        pad_packed(values, torch.tensor([4, 2]), width=3)
    with pytest.raises(ValueError, match=r"lengths in \[0, 3\]"):
        pack_padded(values.view(2, 3), torch.tensor([1, 4]))


# Edits to stability/statistics.py that must turn this file red:
#   labels = tokens.reshape(-1)                         (masked garbage is read)
#   temperature=temperature  ->  temperature=1.0
#   masked(x.reshape(mask.shape), mask) -> x.reshape(mask.shape)   (in_safe_set True at masked)
#   prune=prune  ->  prune=None
#   drop the check_finite line
