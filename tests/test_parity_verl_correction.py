"""Rollout correction and its metrics against verl's (how to run it: tests/verl_cases.py)."""

import math

import pytest
import torch
from verl_cases import INF, NAN, batch, close, corr, few, seeds

from trimtab.stability import (
    importance_weights,
    mismatch_report,
    trust_region_mask,
)

CORRECTIONS = {
    "token": (dict(rollout_is="token", rollout_is_threshold=1.3), dict(high=1.3)),
    "sequence": (
        dict(rollout_is="sequence", rollout_is_threshold=1.5),
        dict(level="sequence", high=1.5),
    ),
    "icepop": (
        dict(rollout_is="token", rollout_is_threshold="0.6_1.3"),
        dict(outside="zero", low=0.6, high=1.3),
    ),
    "icepop of sequences": (
        dict(rollout_is="sequence", rollout_is_threshold="0.5_2.5"),
        dict(level="sequence", outside="zero", low=0.5, high=2.5),
    ),
}


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("name", CORRECTIONS)
@few
@seeds
def test_correction_weights(name, normalize, seed):
    options, ours = CORRECTIONS[name]
    b = batch(seed)
    log_ratio = b.logp - b.old
    weights, seen = importance_weights(log_ratio, b.mask, normalize=normalize, **ours)
    if not weights.any():
        return  # `test_difference_all_weights_zero`
    theirs, metrics = corr.compute_rollout_correction_weights(
        log_ratio, b.ints, rollout_is_batch_normalize=normalize, **options
    )
    close(weights, theirs, 1e-7)  # theirs divides by n + 1e-8
    if normalize:
        factor = metrics["rollout_is_batch_norm_factor"]
        assert factor == pytest.approx(seen["importance/normalizer"].item(), rel=1e-6)
    if "rollout_is_oob_ratio" in metrics:
        outside = seen["importance/fraction_high"] + seen["importance/fraction_low"]
        assert metrics["rollout_is_oob_ratio"] == pytest.approx(outside.item(), abs=1e-6)


REJECTIONS = {
    # option, threshold: our keep [B] or [B, T]
    ("seq_mean_k1", "0.8_1.1"): lambda x, m: rejected(x, m, "geometric", 0.8, 1.1),
    ("seq_mean_k1", "1.2"): lambda x, m: rejected(x, m, "geometric", 1 / 1.2, 1.2),
    ("seq_sum_k1", "0.5_1.5"): lambda x, m: rejected(x, m, "sequence", 0.5, 1.5),
    ("token_k1", "0.7_1.2"): lambda x, m: rejected(x, m, "token", 0.7, 1.2),
    ("token_k2", "0.1"): lambda x, m: rejected(x, m, "token", *k2_bounds(0.1)),
    ("seq_max_k2", "0.3"): lambda x, m: within(x, m, 0.3, INF),
    ("seq_mean_k3", "0.1"): lambda x, m: within(x, m, INF, 0.1),
    ("seq_max_k2,seq_mean_k3", "0.5,0.1"): lambda x, m: within(x, m, 0.5, 0.1),
}


def rejected(log_ratio, mask, level, low, high):
    """Our bounds are on train / rollout, theirs on its inverse (`test_difference_k1_bounds...`)."""
    kept, _ = importance_weights(
        log_ratio, mask, level=level, outside="reject", low=1 / high, high=1 / low
    )
    return kept > 0


def k2_bounds(threshold):
    reach = math.exp(math.sqrt(2 * threshold))
    return 1 / reach, reach


def within(log_ratio, mask, max_threshold, mean_threshold):
    keep, _ = trust_region_mask(
        log_ratio, mask, max_threshold=max_threshold, mean_threshold=mean_threshold
    )
    return keep[:, None] & mask


@pytest.mark.parametrize("case", REJECTIONS, ids=lambda case: f"{case[0]}-{case[1]}")
@few
@seeds
def test_rejection_masks(case, seed):
    """Also the fractions that are masked."""
    b = batch(seed)
    log_ratio = b.logp - b.old
    theirs, metrics = corr.compute_rollout_rejection_mask(log_ratio, b.ints, *case)
    kept = REJECTIONS[case](log_ratio, b.mask)
    assert torch.equal(kept & b.mask, theirs.bool())
    report = mismatch_report(b.logp, b.old, b.mask, kept=kept).metrics()
    for key, ours in RS_COUNTERPARTS.items():
        assert metrics[key] == pytest.approx(report[f"mismatch/{ours}"].item(), abs=1e-6)


def test_difference_k1_bounds_are_on_the_inverse_ratio():
    """A bug, or its documentation's: said to bound train / rollout, it bounds rollout / train."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    log_ratio = torch.tensor([[math.log(1.15)], [math.log(0.85)]])
    for option, level in (("token_k1", "token"), ("seq_mean_k1", "geometric")):
        theirs, _ = corr.compute_rollout_rejection_mask(log_ratio, mask.long(), option, "0.8_1.1")
        ours, _ = importance_weights(
            log_ratio, mask, level=level, outside="reject", low=0.8, high=1.1
        )
        assert theirs[:, 0].tolist() == [1, 0]  # 1.15 stays, 0.85 goes
        assert ours[:, 0].tolist() == [0, 1]


def test_difference_a_token_is_clamped_before_the_mean():
    """A convention: in the geometric mean theirs clamps each log-ratio to 20, ours the mean."""
    log_ratio = torch.zeros(1, 10)
    log_ratio[0, 0] = -40
    mask = torch.ones(1, 10, dtype=torch.bool)
    bounds = "0.01_20"  # rollout / train is e^2 = 7 or e^4 = 55
    theirs, _ = corr.compute_rollout_rejection_mask(log_ratio, mask.long(), "seq_mean_k1", bounds)
    assert theirs.all()
    assert not rejected(log_ratio, mask, "geometric", 0.01, 20).any()


def test_difference_all_weights_zero():
    """A bug: IcePop that drops the whole batch ends their run with a ZeroDivisionError."""
    log_ratio, mask = torch.full((1, 2), 5.0), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ZeroDivisionError):
        corr.compute_rollout_correction_weights(
            log_ratio, mask.long(), rollout_is_threshold="0.5_2.0"
        )
    weights, metrics = importance_weights(log_ratio, mask, outside="zero", low=0.5, normalize=True)
    assert not weights.any() and metrics["importance/weight_ess"] == 0


def test_difference_nan_at_a_masked_position_poisons_weights():
    """A bug: masked by a product, so a token's weight is NaN where there is no token."""
    log_ratio = torch.tensor([[0.1, NAN]])
    mask = torch.tensor([[True, False]])
    theirs, _ = corr.compute_rollout_correction_weights(log_ratio, mask.long())
    assert theirs[0, 1].isnan()
    assert importance_weights(log_ratio, mask)[0][0, 1] == 0


OFF_POLICY = {
    "training_ppl": "ppl_train",
    "training_log_ppl": "log_ppl_train",
    "rollout_ppl": "ppl_rollout",
    "rollout_log_ppl": "log_ppl_rollout",
    "kl": "k1",
    "k3_kl": "k3",
    "log_ppl_diff": "log_ppl_gap",
    "log_ppl_abs_diff": "log_ppl_gap_abs",
    "log_ppl_diff_max": "log_ppl_gap_max",
    "log_ppl_diff_min": "log_ppl_gap_min",
    "ppl_ratio": "ppl_ratio",
    "chi2_token": "chi2_token",
    "chi2_seq": "chi2_sequence",
}
RS_COUNTERPARTS = {
    "rollout_rs_masked_fraction": "masked_tokens",
    "rollout_rs_seq_masked_fraction": "masked_sequences",
}
TOKEN_IS = {
    "rollout_is_mean": "weight_mean",
    "rollout_is_max": "weight_max",
    "rollout_is_min": "weight_min",
    "rollout_is_std": "weight_std",
    "rollout_is_eff_sample_size": "weight_ess",
    "rollout_is_ratio_fraction_high": "fraction_high",
    "rollout_is_ratio_fraction_low": "fraction_low",
    "rollout_is_seq_mean": "response_weight_mean",
    "rollout_is_seq_std": "response_weight_std",
    "rollout_is_seq_max": "response_weight_max",
    "rollout_is_seq_min": "response_weight_min",
    "rollout_is_seq_max_deviation": "response_weight_max_deviation",
    "rollout_is_seq_fraction_high": "response_fraction_high",
    "rollout_is_seq_fraction_low": "response_fraction_low",
}
SEQUENCE_IS = TOKEN_IS | {
    "rollout_is_max": "sequence_ratio_max",
    "rollout_is_min": "sequence_ratio_min",
    "rollout_is_ratio_fraction_high": "sequence_fraction_high",
    "rollout_is_ratio_fraction_low": "sequence_fraction_low",
    "rollout_is_seq_fraction_high": "sequence_fraction_high",
    "rollout_is_seq_fraction_low": "sequence_fraction_low",
}


@few
@seeds
def test_off_policy_metrics(seed):
    b = batch(seed)
    theirs = corr.compute_offpolicy_metrics(b.logp, b.old, b.ints)
    ours = mismatch_report(b.logp, b.old, b.mask).metrics()
    assert theirs.keys() == OFF_POLICY.keys()
    for key, name in OFF_POLICY.items():
        found = ours[f"mismatch/{name}"].item()
        assert theirs[key] == pytest.approx(found, rel=1e-6, abs=1e-7), key


@pytest.mark.parametrize("name", CORRECTIONS)
@few
@seeds
def test_importance_metrics(name, seed):
    options, ours = CORRECTIONS[name]
    counterparts = TOKEN_IS if options["rollout_is"] == "token" else SEQUENCE_IS
    b = batch(seed)
    log_ratio = b.logp - b.old
    weights, _ = importance_weights(log_ratio, b.mask, **ours)
    if not weights.any():
        return  # `test_difference_all_weights_zero`
    _, theirs = corr.compute_rollout_correction_weights(log_ratio, b.ints, **options)
    theirs.pop("rollout_is_oob_ratio", None)  # `test_correction_weights`
    low = ours.get("low", 1 / ours["high"])
    report = mismatch_report(b.logp, b.old, b.mask, low=low, high=ours["high"], weights=weights)
    found = report.metrics()
    assert theirs.keys() == counterparts.keys()
    for key, mine in counterparts.items():
        expected = found[f"mismatch/{mine}"].item()
        if key == "rollout_is_std" and b.mask.sum() == 1:
            expected = 0
        if key == "rollout_is_seq_std":  # divided by n - 1 there
            expected *= math.sqrt(len(b.mask) / max(len(b.mask) - 1, 1))
        # a deviation is a root of a difference of means
        tolerance = 1e-3 if key.endswith("_std") else 1e-6
        assert theirs[key] == pytest.approx(expected, rel=1e-6, abs=tolerance), key


@few
@seeds
def test_the_whole_log_of_verl_is_accounted_for(seed):
    """What one call of theirs logs, weights, masks and divergences together."""
    b = batch(seed)
    _, _, theirs = corr.compute_rollout_correction_and_rejection_mask(
        b.logp,
        b.old,
        b.ints,
        rollout_is="token",
        rollout_is_batch_normalize=True,
        rollout_rs="seq_mean_k3",
        rollout_rs_threshold=0.1,
    )
    keys = {key.removeprefix("rollout_corr/") for key in theirs}
    of_the_option = {key for key in keys if key.startswith("rollout_rs_seq_mean_k3_")}
    known = OFF_POLICY | TOKEN_IS | RS_COUNTERPARTS
    assert keys - of_the_option == known.keys() | {"rollout_is_batch_norm_factor"}
    log_ratio, values = b.logp - b.old, lambda key: theirs[f"rollout_corr/rollout_rs_{key}"]
    _, ours = trust_region_mask(log_ratio, b.mask, max_threshold=INF, mean_threshold=0.1)
    for key, name in {
        "seq_mean_k3_seq_mean": "mean_before",
        "seq_mean_k3_seq_fraction_high": "rejected_by_mean",
        "seq_mean_k3_fraction_high": "rejected_by_mean",
        "seq_mean_k3_seq_masked_fraction": "rejected_by_mean",
    }.items():
        assert values(key) == pytest.approx(ours[f"trust_region/{name}"].item(), abs=1e-6), key
    kept_tokens = ours["trust_region/kept_tokens"].item()
    assert values("seq_mean_k3_masked_fraction") == pytest.approx(1 - kept_tokens, abs=1e-6)
    # the rest describes the statistic itself, which we log for the peak and by buckets
    rest = {"mean", "max", "min", "std", "seq_std", "seq_max", "seq_min", "seq_max_deviation"}
    rest |= {"fraction_low", "fraction_high", "masked_fraction", "seq_masked_fraction"}
    rest |= {"seq_mean", "seq_fraction_high"}
    assert of_the_option == {f"rollout_rs_seq_mean_k3_{key}" for key in rest}


def test_difference_rows_without_tokens_are_averaged_over():
    """A bug: an empty response is one of perplexity 1 there, and one whose ratio is in bounds."""
    mask = torch.tensor([[True, True], [False, False]])
    logp, old = torch.full((2, 2), -2.0), torch.full((2, 2), -3.0)
    theirs = corr.compute_offpolicy_metrics(logp, old, mask.long())
    ours = mismatch_report(logp, old, mask, high=2.0).metrics()
    assert theirs["training_ppl"] == pytest.approx((math.exp(2) + 1) / 2, rel=1e-5)
    assert ours["mismatch/ppl_train"].item() == pytest.approx(math.exp(2))
    assert theirs["log_ppl_diff_max"] == 0
    assert ours["mismatch/log_ppl_gap_max"] == -1
    _, theirs = corr.compute_rollout_correction_weights(
        logp - old, mask.long(), rollout_is="sequence"
    )
    assert theirs["rollout_is_ratio_fraction_high"] == 0.5
    assert ours["mismatch/sequence_fraction_high"] == 1
    assert theirs["rollout_is_min"] == 1  # of the empty one
    assert theirs["rollout_is_seq_min"] == 0
    _, theirs = corr.compute_rollout_rejection_mask(logp - old, mask.long(), "seq_max_k2", 0.1)
    assert theirs["rollout_rs_seq_masked_fraction"] == 0.5


def test_difference_extreme_ratios_overflow_in_k3_and_perplexity():
    """A bug: exp without a clamp is inf in the log; ours is finite."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    logp, old = torch.full((1, 1), -1.0), torch.full((1, 1), -100.0)
    theirs = corr.compute_offpolicy_metrics(logp, old, mask.long())
    ours = mismatch_report(logp, old, mask).metrics()
    assert theirs["k3_kl"] == INF and theirs["rollout_ppl"] == INF
    assert all(x.isfinite() for x in ours.values())


def test_difference_nan_in_an_input_is_an_error_for_us():
    """A convention: theirs logs NaN; ours names the position."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    logp = torch.tensor([[-1.0, NAN]])
    old = torch.full((1, 2), -1.0)
    assert math.isnan(corr.compute_offpolicy_metrics(logp, old, mask.long())["kl"])
    with pytest.raises(ValueError, match=r"expected finite logp .* at \(0, 1\)"):
        mismatch_report(logp, old, mask)


def test_difference_a_batch_without_a_token_raises():
    """A convention: theirs asserts; our metrics are empty."""
    mask, zeros = torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    with pytest.raises(AssertionError):
        corr.compute_offpolicy_metrics(zeros, zeros, mask.long())
    with pytest.raises(ValueError, match="at least one valid token"):
        corr.compute_rollout_correction_weights(zeros, mask.long())
    assert mismatch_report(zeros, zeros, mask).metrics() == {}
    assert importance_weights(zeros, mask)[1] == {}
