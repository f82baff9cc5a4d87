"""Vocabulary pruning in vLLM, as the trainer prunes: its `min_p`, and processed log-probs.

    llm = vllm.LLM(model, **PRUNED_ENGINE)
    outputs = llm.generate(prompts, vllm.SamplingParams(n=8, **pruned_sampling(temperature=0.7)))

The returned log-probs are what `response_statistics(..., temperature=0.7, prune=rho).logp` computes
in the trainer, up to the rounding of the two engines. For a server: `vllm serve --logprobs-mode
processed_logprobs`, and the same keywords in the body of /v1/completions. vLLM is not imported.

Of vLLM (read in its files at 0.9.2, 0.10.0-0.10.2 and 0.32.0, run at 0.32.0):
* min_p drops v if p_v < min_p * max p, after the temperature, so p_v = rho * max p is kept as in S:
  on probabilities in v1/sample/logits_processor/builtin.py, on logits (z < max z + ln min_p) in
  v1/worker/gpu/sample/min_p.py. Both in fp32: they differ from ours by rounding at the threshold.
* `logprobs_mode` (config/model.py) came with 0.10.0 and is "raw_logprobs" by default: before the
  temperature and min_p. "processed_logprobs" is after both only from 0.10.2 on; before, the
  log-probs were taken ahead of the temperature (v1/sample/sampler.py).
* top_k is off at 0 (or -1). Temperatures below 0.01 are raised to 0.01, and 0 is greedy decoding,
  for which SamplingParams sets min_p to 0 (sampling_params.py).
* With speculative decoding min_p does nothing, and vLLM refuses it only above 1e-5, which
  DEFAULT_RHO = e^-13 is not: nothing is pruned then (sampling_params.py, `_validate_spec_decode`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..stability import DEFAULT_RHO

# of vllm.LLM, 0.28 or later, for `replayed_sampling` and `sampling_support`
REPLAY_ENGINE = {"logprobs_mode": "processed_logprobs", "return_sampling_mask": True}
PRUNED_ENGINE = {"logprobs_mode": "processed_logprobs"}  # of vllm.LLM and vllm.EngineArgs

_LEAST_TEMPERATURE = 0.01  # of vLLM, which raises smaller ones to it

# Options of SamplingParams that change the distribution, and the values at which they do not.
_NEUTRAL = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "min_tokens": (0,),
    "structured_outputs": (None,),
    "guided_decoding": (None,),  # the name of structured_outputs in 0.10
    "logits_processors": (None, []),
    "thinking_token_budget": (None, -1),
    "trace_decode_token_ids": (None,),
}


def pruned_sampling(
    rho: float = DEFAULT_RHO,
    *,
    temperature: float = 1.0,
    logprobs: int | None = 0,
    **others: Any,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.SamplingParams` that sample from the softmax over the safe set.

    Args:
        rho: smallest kept probability relative to the largest, in (0, 1); vLLM's min_p.
        temperature: >= 0.01. For greedy decoding pass SamplingParams(temperature=0) itself.
        logprobs: how many other tokens' log-probs come beside the sampled one's (0: none, None: not
            even that one's).
        others: more arguments of SamplingParams (n, max_tokens, seed, stop_token_ids, ...). Those
            that change the distribution are refused, since the trainer does not know of them; with
            min_tokens, say, write `pruned_sampling() | {"min_tokens": 4}` and expect log-probs of
            the constrained distribution.

    Returns:
        A new dict. top_p, top_k and repetition_penalty are spelled out, because a server takes
        absent ones from the checkpoint's generation_config.json.

    Raises:
        ValueError: rho or temperature out of range, or another argument that changes the
            distribution.

    Source:
        arXiv 2512.23087 (abstract read).
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho: expected a ratio in (0, 1), found {rho}")
    if not (temperature >= _LEAST_TEMPERATURE and math.isfinite(temperature)):
        raise ValueError(
            f"temperature: expected a finite number >= {_LEAST_TEMPERATURE} (vLLM raises smaller "
            f"ones to it, and decodes greedily at 0), found {temperature}"
        )
    if "min_p" in others:
        raise ValueError(f"min_p: expected none, it is rho = {rho}, found {others['min_p']}")
    for name, value in others.items():
        if name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise ValueError(
                f"{name}: expected {_NEUTRAL[name][0]}, another value samples from a distribution "
                f"that the trainer does not compute, found {value!r}"
            )
    neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return neutral | {"temperature": temperature, "min_p": rho, "logprobs": logprobs} | others


def replayed_sampling(
    *,
    top_k: int,
    top_p: float = 1.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    logprobs: int | None = 0,
    **others: Any,
) -> dict[str, Any]:
    """Keyword arguments of `vllm.SamplingParams` for an engine made with REPLAY_ENGINE.

    The trainer renormalises over the sets that the engine returns (`sampling_support`, then
    `pruned_statistics(..., out_of_set="replay")`), so any truncation is right here.

    Args:
        top_k: >= 1; vLLM returns no set without it, because it bounds the set's size.
        top_p: in (0, 1].
        min_p: in [0, 1).
        temperature: >= 0.01, and the trainer's.
        logprobs: as in `pruned_sampling`.
        others: more arguments of SamplingParams, none that changes the distribution otherwise.

    Returns:
        A new dict.

    Raises:
        ValueError: a number is out of range, or another argument changes the distribution.

    Source:
        arXiv 2512.02556; vLLM 0.28 or later.
    """
    for name, holds, expected, found in (
        ("top_k", top_k >= 1, "a count >= 1, without which vLLM returns no set", top_k),
        ("top_p", 0 < top_p <= 1, "a mass in (0, 1]", top_p),
        ("min_p", 0 <= min_p < 1, "a ratio in [0, 1)", min_p),
    ):
        if not holds:
            raise ValueError(f"{name}: expected {expected}, found {found}")
    options = pruned_sampling(temperature=temperature, logprobs=logprobs, **others)
    return options | {"top_k": top_k, "top_p": top_p, "min_p": min_p}


def check_pruned_engine(vllm_config: Any) -> None:
    """Raises if an engine's log-probs are not of the pruned distribution.

    Args:
        vllm_config: the engine's VllmConfig: `llm.llm_engine.vllm_config` of a vllm.LLM,
            `engine.vllm_config` of an AsyncLLM.

    Raises:
        ValueError: its logprobs_mode is not "processed_logprobs", or it decodes speculatively.
    """
    mode = vllm_config.model_config.logprobs_mode
    mode = getattr(mode, "value", mode)  # an enum in 0.10.2
    if mode != PRUNED_ENGINE["logprobs_mode"]:
        raise ValueError(
            f"logprobs_mode: expected {PRUNED_ENGINE['logprobs_mode']!r}, found {mode!r}"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative_config: expected None, since min_p does nothing with speculative "
            f"decoding, found {vllm_config.speculative_config!r}"
        )


def sampling_support(outputs: Sequence[Any]) -> list[list[list[int]]]:
    """The sets that vLLM sampled from, for `trimtab.stability.pad_support`.

    Args:
        outputs: completions of an engine made with REPLAY_ENGINE (`request_output.outputs`), or the
            `choices` of its `/inference/v1/generate` as dicts; one for each response, in order.

    Returns:
        For each response, for each generated token, the ids of the tokens that were left after
        top_k, top_p and min_p.

    Raises:
        ValueError: an output has no sampling mask, or not one set for each token.

    Source:
        vLLM 0.28 to 0.32, `SamplingMask.token_ids` in vllm/outputs.py, read there. The engine does
        not return it on a CPU, so it was not run.
    """
    support = []
    for i, output in enumerate(outputs):
        is_dict = isinstance(output, Mapping)
        found = output.get("sampling_mask") if is_dict else getattr(output, "sampling_mask", None)
        if found is None:
            raise ValueError(
                f"outputs[{i}]: expected a sampling_mask, got none; make the engine with "
                "**REPLAY_ENGINE and requests by `replayed_sampling`"
            )
        sets = [list(kept) for kept in getattr(found, "token_ids", found)]
        tokens = len(output["token_ids"] if is_dict else output.token_ids)
        if len(sets) != tokens:
            raise ValueError(f"outputs[{i}]: expected {tokens} sets, one a token, got {len(sets)}")
        support.append(sets)
    return support
