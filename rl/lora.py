"""Low-rank adapters on a policy (LoRA), by peft: only they are trained; rollouts are made by the
merged weights.

peft puts them into the policy's linear layers, which stays the transformers model that the rest of
the loop takes: y = W x + alpha / r * B A x. Its other tensors are frozen, and shared by the views
and the copies of it that are made here: one base in memory, whatever stands beside the policy.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import LoraConfig

ADAPTER = "default"  # the name peft gives an adapter
_WRAPPED = ".base_layer."


def add_adapters(policy: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Puts fresh adapters into a policy, which computes what it did, and freezes all else.

    Args:
        policy: causal LM; changed in place.
        config: rank, scale and layers.
        seed: of their first weights.

    Raises:
        ValueError: peft is not installed, no layer or another kind of layer has such a name, or the
            output head has.
    """
    if importlib.util.find_spec("peft") is None:
        raise ValueError("policy.lora: peft is not installed; pip install 'trimtab[lora]'")
    from peft import inject_adapter_in_model

    head = policy.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_peft_config(config), policy, ADAPTER)
        except ValueError as refused:
            raise ValueError(
                f"policy.lora.target_modules: expected names of the policy's linear layers, got "
                f"{config.target_modules}: {refused}"
            ) from refused
    for name, layer in _adapted(policy):
        base = layer.get_base_layer()
        if base is head:  # tied to the embeddings in many models: merged, it would change both
            raise ValueError(
                f"policy.lora.target_modules: expected layers below the output head, got {name}"
            )
        if not _is_linear(layer):
            raise ValueError(
                f"policy.lora.target_modules: expected linear layers, {name} is a "
                f"{type(base).__name__}"
            )
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def has_adapters(policy: nn.Module) -> bool:
    """Whether a model has adapters.

    Args:
        policy: any module.

    Returns:
        Whether `add_adapters` was called on it.
    """
    return any(is_adapter(name) for name, _ in policy.named_parameters())


def is_adapter(name: str) -> bool:
    """Whether a tensor of a model is an adapter's.

    Args:
        name: of a parameter or a checkpoint's tensor.

    Returns:
        Whether its name is one that peft gives.
    """
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def merged_parameters(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights of the model without adapters that computes the same, by its checkpoint names.

    Args:
        policy: with adapters; not changed.

    Returns:
        Pairs (name, tensor), made one at a time; a merged one is computed in the weight's dtype, at
        least in fp32.
    """
    layers = dict(_adapted(policy))
    for name, parameter in policy.named_parameters():
        if is_adapter(name):
            continue
        path, wrapped, leaf = name.rpartition(_WRAPPED)
        if not wrapped:
            yield name, parameter.detach()
        elif leaf != "weight":
            yield f"{path}.{leaf}", parameter.detach()
        else:
            yield f"{path}.{leaf}", _merged_weight(layers[path], parameter)


def base_view(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy without its adapters, in the same memory.

    Args:
        policy: with or without adapters; not changed.

    Returns:
        A model of the same tensors; the policy itself where it has no adapters.
    """
    if not has_adapters(policy):
        return policy
    shared = {id(t): t for t in chain(policy.parameters(), policy.buffers())}
    view = copy.deepcopy(policy, shared)
    for name, layer in list(_adapted(view)):
        parent, _, leaf = name.rpartition(".")
        setattr(view.get_submodule(parent), leaf, layer.get_base_layer())
    return view


def copy_of_trained(policy: PreTrainedModel) -> PreTrainedModel:
    """A copy of a policy that has only its trained tensors twice.

    Args:
        policy: with adapters; not changed.

    Returns:
        A model with adapters of its own on the same frozen tensors.
    """
    return copy.deepcopy(policy, {id(p): p for p in policy.parameters() if not p.requires_grad})


def fingerprint(policy: PreTrainedModel) -> str:
    """SHA-256 of a model's names, shapes and values; about a second a gigabyte.

    Args:
        policy: without adapters.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def refuse_other_base(stored: Mapping[str, Any], found: str, path: str | None) -> None:
    """Raises unless a checkpoint's adapters were trained on this base, which it does not hold.

    Args:
        stored: what a checkpoint says of its base: `sha256` and `path`.
        found: fingerprint of the base that is here.
        path: where this one comes from, for the error.

    Raises:
        ValueError: another base.
    """
    if stored["sha256"] != found:
        raise ValueError(
            f"resume: expected the base that the checkpoint's adapters were trained on, "
            f"{stored['path']} with SHA-256 {stored['sha256'][:12]}.., got {path} with "
            f"{found[:12]}..; its files were changed or replaced"
        )


def save_adapter(policy: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    """Writes the adapters in peft's format, for `PeftModel.from_pretrained`.

    Args:
        policy: with adapters.
        config: that they were made by.
        folder: is made.
    """
    made = _peft_config(config)
    made.target_modules = list(
        config.target_modules
        or dict.fromkeys(name.rpartition(".")[2] for name, _ in _adapted(policy))
    )
    made.base_model_name_or_path = policy.name_or_path
    made.inference_mode = True
    folder.mkdir(parents=True)
    weights = {
        f"base_model.model.{name}".replace(f".{ADAPTER}.", "."): parameter.detach().cpu()
        for name, parameter in policy.named_parameters()
        if is_adapter(name)
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    made.save_pretrained(folder)


def _peft_config(config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftConfig

    targets = config.target_modules
    return PeftConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if targets is None else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _is_linear(layer: Any) -> bool:
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear)


def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
    # a trainer's autocast around the call would make the product in half precision
    with torch.autocast(weight.device.type, enabled=False):
        delta = layer.get_delta_weight(ADAPTER)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) + delta.to(wide)
