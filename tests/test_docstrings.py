import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Mapping

import pytest

import trimtab.optim
import trimtab.rl
import trimtab.stability
from trimtab.integrations import lightning, megatron, transformers, vllm
from trimtab.rl import (
    answer_figures,
    compare,
    dashboard,
    doctor,
    evaluate_run,
    evaluate_server,
    evaluation_output,
    families,
    html_parts,
    html_report,
    html_transcripts,
    lora,
    pass_at_k,
    run_record,
    sampling_checks,
    server_client,
    smollm2,
    svg,
    text_server,
    vllm_engine,
)
from trimtab.triton_kernels import (
    divergence,
    gem,
    imitation,
    linear_token_stats,
    prefix_attention,
    soft_value,
    token_stats,
)

SECTION = re.compile(r"^(Args|Returns|Raises|Yields):", re.MULTILINE)


def defined_in(module):
    names = [
        n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__
    ]
    return [name for name in names if not name.startswith("_") and callable(getattr(module, name))]


PUBLIC = {
    f"{module.__name__.removeprefix('trimtab.')}.{name}": getattr(module, name)
    for module, names in (
        (trimtab.optim, trimtab.optim.__all__),
        (trimtab.stability, trimtab.stability.__all__),
        (trimtab.rl, trimtab.rl.__all__),
        (lightning, lightning.__all__),
        (megatron, megatron.__all__),
        (transformers, transformers.__all__),
        *(
            (module, defined_in(module))
            for module in (
                answer_figures,
                compare,
                dashboard,
                divergence,
                doctor,
                evaluate_run,
                evaluate_server,
                evaluation_output,
                families,
                gem,
                html_parts,
                html_report,
                html_transcripts,
                imitation,
                linear_token_stats,
                lora,
                pass_at_k,
                prefix_attention,
                run_record,
                smollm2,
                soft_value,
                sampling_checks,
                server_client,
                svg,
                text_server,
                vllm_engine,
                token_stats,
                vllm,
            )
        ),
    )
    for name in names
    if callable(getattr(module, name))
}


def is_plain_class(thing):
    return inspect.isclass(thing) and "__init__" not in vars(thing) and not fields(thing)


def fields(thing):
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if field.init]
    return list(getattr(thing, "_fields", ()))


def parameters(thing):
    if inspect.isclass(thing) and fields(thing):
        return fields(thing)
    if is_plain_class(thing) or getattr(thing, "_is_protocol", False):
        return []
    names = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters
    return [name for name in names if name not in ("self", "cls")]


def sections(thing):
    """{"Args": text, ...} of a docstring; "" holds what stands before the first section."""
    parts = SECTION.split(inspect.getdoc(thing) or "")
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def own_code(thing):
    """Source of a function, or of a class's `__init__` (also the one of a dataclass's checks)."""
    if not inspect.isclass(thing):
        return inspect.getsource(thing)
    checks = [vars(thing).get(name) for name in ("__init__", "__post_init__")]
    return "".join(
        inspect.getsource(f)
        for f in checks
        if hasattr(f, "__code__") and f.__code__.co_filename[:1] != "<"
    )


REARRANGES = {"broadcast_advantages", "overall", "pack_padded", "pad_packed", "pad_support"}
ALGORITHMS = sorted(
    name
    for name, thing in PUBLIC.items()
    if name.startswith(("optim.", "stability."))
    and name.removeprefix("stability.") not in REARRANGES
    and not (fields(thing) or issubclass(thing if inspect.isclass(thing) else object, Mapping))
)
each = pytest.mark.parametrize("name", sorted(PUBLIC))


@each
def test_public_name_is_documented(name):
    thing = PUBLIC[name]
    first = (thing.__doc__ or "").strip().split("\n\n")[0]
    made_up = first.startswith(f"{thing.__name__}(")  # by dataclass and NamedTuple
    assert first and not made_up and first[-1] in ".:`", f"no sentence: {first!r}"
    parts = sections(thing)
    if issubclass(thing if inspect.isclass(thing) else object, tuple):  # an output, not an input
        told = thing.__doc__ + importlib.import_module(thing.__module__).__doc__
        assert [f for f in fields(thing) if not re.search(rf"\b{f}\b", told)] == []
        return
    twin = PUBLIC.get(name.removesuffix("_reference"))
    if twin not in (None, thing) and f"`{twin.__name__}`" in first:  # documented at its twin
        assert set(parameters(thing)) <= set(parameters(twin))
        return
    for parameter in parameters(thing):
        listed = re.search(
            rf"^\s+(\w+, )*\**{parameter}(, \w+)*:", parts.get("Args", ""), re.MULTILINE
        )
        assert listed, f"Args: lacks {parameter}"
    if inspect.isfunction(thing):
        returns = inspect.signature(thing).return_annotation
        assert returns is not inspect.Signature.empty, "no annotation of what it returns"
        assert returns in (None, "None") or "Returns" in parts, "no Returns:"
    if "raise ValueError" in own_code(thing):
        assert "ValueError" in parts.get("Raises", ""), (
            "raises ValueError, and Raises: does not say so"
        )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithm_names_its_source(name):
    assert re.search(r"Source:", inspect.getdoc(PUBLIC[name]) or ""), "no Source:"


@pytest.mark.parametrize("name", sorted(n for n in PUBLIC if inspect.isclass(PUBLIC[n])))
def test_public_methods_have_a_docstring(name):
    """Overrides of torch's and Lightning's hooks are documented where they come from."""
    thing = PUBLIC[name]
    bare = [
        attribute
        for attribute, value in vars(thing).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property)))
        and not inspect.getdoc(getattr(thing, attribute))
    ]
    assert bare == []


def test_every_module_says_what_it_is():
    names = {thing.__module__ for thing in PUBLIC.values()} | {
        f"trimtab.rl.{name}" for name in ("chain_sum", "cli", "recording", "report", "run")
    }
    assert [
        n for n in sorted(names) if not (importlib.import_module(n).__doc__ or "").strip()
    ] == []


def test_the_walk_sees_what_it_should():
    def bare(x):
        raise ValueError(x)

    assert parameters(bare) == ["x"] and "raise ValueError" in own_code(bare)
    assert len(PUBLIC) > 50 and "rl.RLConfig" in PUBLIC and "optim.AdamMini" in PUBLIC
    bare.__doc__ = textwrap.dedent(
        "One.\n\nArgs:\n    x: it.\n\nRaises:\n    ValueError: always.\n"
    )
    assert set(sections(bare)) == {"", "Args", "Raises"}


# Edits that must turn this file red:
#   rl/rewards.py: the line `timeout: seconds one rollout may take ...`            ->  removed
#   rl/prefix_support.py: Raises: of refuse_unsupported                            ->  removed
#   stability/aggregation.py: Source: of aggregation_weights                       ->  removed
#   rl/config.py: a field `x: int = 0` in RolloutConfig without a line in Args
#   rl/loop.py: the docstring of RLModule.sampling                                 ->  removed
