"""Every function of trimtab.stability as one call on one batch, for the tests of what all share.

A case is a function of a batch (a dict of tensors whose first dimension is rows) and a process
group, and gives {name: tensor}: those with "row" in front have one entry a row, the others are of
the whole batch. Shapes: B rows, T tokens, D depths.
"""

import torch

from trimtab import stability as s


def problem(seed, rows=None, width=None):
    """A batch: groups of unequal size (one of one), gaps, an all-masked and a one-token row."""
    generator = torch.Generator().manual_seed(seed)
    b = rows or int(torch.randint(4, 12, (), generator=generator))
    t = width or int(torch.randint(2, 9, (), generator=generator))

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = rand(b, t) < 0.7
    mask[0], mask[1] = False, torch.arange(t) == 0
    logp = -3 * rand(b, t) - 1e-3
    ids = 5 * torch.randint(-1, 2, (b,), generator=generator)
    ids[2] = 77  # a group of one
    greedy = torch.zeros(b, dtype=torch.bool)
    for i in ids.unique():
        greedy[(ids == i).nonzero()[-1]] = True
    return {
        "mask": mask,
        "logp": logp,
        "old": (logp + 0.5 * normal(b, t)).clamp_max(-1e-4),
        "sum_p2": (2 * logp).exp() + (1 - logp.exp()).square() * rand(b, t),
        "entropy": 2 * rand(b, t),
        "advantages": normal(b, t),
        "token_rewards": normal(b, t),
        "kl": rand(b, t),
        "rewards": (10 * rand(b)).round() / 10,
        "outcome": normal(b).round(decimals=1),
        "ids": ids,
        "greedy": greedy,
        "paths": torch.randint(0, 2, (b, 3), generator=generator),
        "value": normal(b),
        "ref_value": normal(b),
    }


def tokens(x):
    return {"row": x}


def with_metrics(found):
    row, metrics = found
    return {"row": row, **metrics}


def weights_of(p, g, **options):
    return s.aggregation_weights(p["mask"], p["ids"], p["outcome"], process_group=g, **options)


def otb(p, g, **options):
    names = ("token_rewards", "mask", "logp", "sum_p2", "ids")
    return tokens(s.optimal_token_baseline(*(p[n] for n in names), process_group=g, **options))


def ratio(p):
    return p["logp"] - p["old"]


def by_rewards(fn, *between, **options):
    def case(p, g):
        extra = [p["mask"].sum(1) if name == "lengths" else p[name] for name in between]
        return fn(p["rewards"], *extra, process_group=g, **options)

    return case


def loss(fn, *names, **options):
    def case(p, g):
        return tokens(fn(*(p[n] for n in names), mask=p["mask"], **options))

    return case


ADVANTAGES = {
    "grpo": lambda p, g: tokens(by_rewards(s.grpo_advantages, "ids")(p, g)),
    "grpo batch": lambda p, g: tokens(
        by_rewards(s.grpo_advantages, "ids", deviation="batch")(p, g)
    ),
    "dr_grpo": lambda p, g: tokens(by_rewards(s.dr_grpo_advantages, "ids")(p, g)),
    "rloo": lambda p, g: tokens(by_rewards(s.rloo_advantages, "ids")(p, g)),
    "opo": lambda p, g: tokens(by_rewards(s.opo_advantages, "lengths", "ids")(p, g)),
    "reinforce advantages": lambda p, g: tokens(s.reinforce_advantages(p["rewards"])),
    "remax": lambda p, g: with_metrics(by_rewards(s.remax_advantages, "ids", "greedy")(p, g)),
    "tree": lambda p, g: tokens(by_rewards(s.tree_advantages, "ids", "paths")(p, g)),
    "tree sizes": lambda p, g: tokens(
        by_rewards(s.tree_advantages, "ids", "paths", combine="group_size")(p, g)
    ),
    "reinforce_pp": lambda p, g: tokens(
        s.reinforce_pp_advantages(p["token_rewards"], p["mask"], gamma=0.9, process_group=g)
    ),
    "reinforce_pp baseline": lambda p, g: tokens(
        s.reinforce_pp_advantages(
            p["token_rewards"], p["mask"], group_ids=p["ids"], process_group=g
        )
    ),
    "otb": otb,
    "otb keep": lambda p, g: otb(p, g, tail="keep"),
    "otb leave one out": lambda p, g: otb(p, g, leave_one_out=True),
    "otb model_token": lambda p, g: otb(p, g, alignment="model_token"),
    "otb importance": lambda p, g: otb(p, g, importance=ratio(p).exp().clamp_max(2)),
    "kl penalty": lambda p, g: tokens(
        s.kl_penalty(p["advantages"], p["logp"], p["old"], p["mask"], coefficient=0.3)
    ),
    "imitation": lambda p, g: tokens(
        s.imitation_advantages(ratio(p), p["token_rewards"], p["mask"], gamma=0.8)
    ),
}
WEIGHTS = {
    "aggregation by the sign of advantages": lambda p, g: tokens(
        s.aggregation_weights(  # fp32, so that rounding could decide a sign
            p["mask"],
            p["ids"],
            s.dr_grpo_advantages(p["rewards"].float(), p["ids"], process_group=g),
            process_group=g,
        )
    ),
    **{
        f"aggregation {rule}": lambda p, g, rule=rule: tokens(
            weights_of(p, g, rule=rule, max_length=7)
        )
        for rule in (
            "balanced", "seq_mean", "token_mean", "token_mean_group", "seq_mean_token_sum_norm",
        )
    },
    **{
        f"aggregation of {denominator}": lambda p, g, d=denominator: tokens(
            weights_of(p, g, keep=p["rewards"] > 0.3, denominator=d)
        )
        for denominator in ("total", "kept")
    },
    **{
        f"importance {level} {outside}{' normalized' * norm}": (
            lambda p, g, level=level, outside=outside, norm=norm: with_metrics(
                s.importance_weights(
                    ratio(p),
                    p["mask"],
                    level=level,
                    outside=outside,
                    low=0.5,
                    normalize=norm,
                    process_group=g,
                )
            )
        )
        for level in ("token", "sequence", "geometric")
        for outside in ("truncate", "zero", "reject")
        for norm in (False, True)
    },
}  # fmt: skip
MASKS = {
    "trust region": lambda p, g: with_metrics(
        s.trust_region_mask(
            ratio(p), p["mask"], max_threshold=0.3, mean_threshold=0.1, process_group=g
        )
    ),
    "trust region exact": lambda p, g: with_metrics(
        s.trust_region_mask(
            ratio(p),
            p["mask"],
            max_statistic="exact_kl",
            max_threshold=0.9,
            mean_statistic="exact_kl",
            mean_threshold=0.5,
            exact_kl=p["kl"],
            process_group=g,
        )
    ),
    "sequence error rate": lambda p, g: with_metrics(
        s.sequence_error_rate_mask(ratio(p), p["mask"], threshold=0.4, process_group=g)
    ),
    "length neutral": lambda p, g: with_metrics(
        s.length_neutral_mask(
            ratio(p), p["mask"], horizon=40, max_tv=0.1, max_kl=0.1, threshold=0.4, process_group=g
        )
    ),
    "out of set": lambda p, g: with_metrics(
        s.out_of_set_mask(p["kl"] > 0.2, p["mask"], policy="reject_sequence", process_group=g)
    ),
}
LOSSES = {
    "reinforce": loss(s.reinforce, "logp", "advantages"),
    "ratio": loss(s.ratio_policy_loss, "logp", "old", "advantages"),
    "ppo_clip": loss(s.ppo_clip, "logp", "old", "advantages", clip_high=0.3, dual_clip=3.0),
    "gspo": loss(s.gspo, "logp", "old", "advantages", clip_low=0.1, clip_high=0.2),
    "cispo": loss(s.cispo, "logp", "old", "advantages"),
    "dppo_tv": loss(s.dppo_tv, "logp", "old", "advantages", threshold_low=0.1),
    "dppo_kl": loss(s.dppo_kl, "logp", "old", "advantages", threshold_high=0.02),
    "hybrid": loss(s.hybrid_imitation_loss, "kl", "logp", "advantages"),
    "reval": lambda p, g: tokens(
        s.reval_loss(
            *(p[n] for n in ("logp", "old", "value", "ref_value", "rewards", "mask")), beta=0.5
        )
    ),
}
METRICS = {
    "groups": lambda p, g: s.group_metrics(p["rewards"], p["ids"], process_group=g),
    "clip": lambda p, g: s.clip_metrics(ratio(p), p["advantages"], p["mask"], process_group=g),
    "entropy": lambda p, g: s.entropy_metrics(
        p["entropy"], p["logp"], p["advantages"], p["mask"], process_group=g
    ),
    "variance": lambda p, g: s.gradient_variance_proxy(
        p["advantages"], p["logp"], p["sum_p2"], p["mask"], grad_norm=2.0, process_group=g
    ),
    "coupling": lambda p, g: s.sign_length_metrics(
        weights_of(p, g, rule="token_mean"), p["outcome"], p["mask"], p["ids"], process_group=g
    ),
    "bounds": lambda p, g: s.trust_region_indicators(ratio(p), p["mask"], process_group=g),
    "mismatch": lambda p, g: mismatch(p, g).metrics(),
}


def mismatch(p, g):
    return s.mismatch_report(
        p["logp"],
        p["old"],
        p["mask"],
        weights=ratio(p).clamp(-20, 20).exp(),
        kept=p["kl"] > 0.2,
        process_group=g,
    )


# a row's numbers are its own, or (out of set) there is no number that could be NaN
OF_ROWS_ALONE = ("reinforce advantages", "imitation", "kl penalty", "out of set")
CASES = ADVANTAGES | WEIGHTS | MASKS | LOSSES | METRICS


def padded(p, columns, garbage=float("nan")):
    """The batch with masked columns of garbage in front of the given ones (T puts them last)."""
    t = p["mask"].shape[1]
    place = [c + sum(x <= c for x in columns) for c in range(t)]
    out = {}
    for name, x in p.items():
        if x.shape[1:] != (t,) or name == "paths":
            out[name] = x
            continue
        fill = False if x.dtype == torch.bool else garbage
        wide = torch.full((len(x), t + len(columns)), fill, dtype=x.dtype)
        wide[:, place] = x
        out[name] = wide
    return out


def dirty(p):
    """The batch with NaN at every masked position."""
    return {
        name: torch.where(p["mask"], x, float("nan"))
        if x.shape == p["mask"].shape and x.is_floating_point()
        else x
        for name, x in p.items()
    }


def rows_of(p, rows):
    return {name: x[rows] for name, x in p.items()}
