"""Files: a trained model in the formats of torch, safetensors, ONNX, timm and Hugging Face."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisam.experiments.models.build import image_processor, tokenizer
from bisam.experiments.models.initial import WEIGHTS_FILE as WEIGHTS_FILE, classes_of as classes_of
from bisam.experiments.models.logits import Logits
from bisam.experiments.runs.files import write

STATES = (".safetensors", ".pt", ".pth")
"""Names of files of weights alone end so."""
PROGRAMS = (".pt2", ".onnx")
"""Names of files of a program end so: the computation with its weights, which needs no code of the model."""


def write_state(model: nn.Module, to: Path, facts: Mapping[str, Any]) -> None:
    """Write the weights of a model to a file: those of the network itself for models of Hugging Face.

    Args:
        model: any model.
        to: a file of `STATES`; it must not be in use.
        facts: for the metadata of the safetensors format, under the key `bisam`, as JSON.

    Raises:
        ValueError: the package safetensors is missing.
        OSError: the file cannot be written.
    """
    # A copy of each: tied weights share memory, which safetensors refuses.
    state = {name: value.detach().cpu().clone().contiguous() for name, value in _network(model).state_dict().items()}
    if to.suffix == ".safetensors":
        save: Any = _package("safetensors.torch", "a file of safetensors")
        # Not save_file, which lets nobody else read the file.
        write(to, save.save(state, {"format": "pt", "bisam": json.dumps(facts)}))
    else:
        write(to, _saved(torch.save, state))


def _saved(save: Callable[[Any, io.BytesIO], None], what: Any) -> bytes:
    """The content of a file of torch, which to a full disk raises no error of the system, or ends the process."""
    content = io.BytesIO()
    save(what, content)
    return content.getvalue()


def write_program(model: nn.Module, to: Path, images: Tensor) -> None:
    """Write a model as a program for batches of any size, in eval mode.

    Args:
        model: a model of images or of tokens.
        to: a file of `PROGRAMS`.
        images: two or more inputs: images (N, channels, height, width), whose shape but for N is that of the program;
            or tokens (N, T), of which the program takes any number T >= 2.

    Raises:
        ValueError: packages for ONNX are missing, or the model cannot be written as a program.
        OSError: the file cannot be written.
    """
    if isinstance(model, Logits):
        raise ValueError(f"{to.name}: models of Hugging Face are exported to a folder; give --to a name without suffix")
    if to.suffix == ".onnx":
        for package in ("onnx", "onnxscript"):
            _package(package, "a file of ONNX")
    model = model.eval()
    any_size: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if not images.is_floating_point():
        any_size[1] = torch.export.Dim("length", min=2)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=(any_size,))
        onnx: Any = torch.onnx.export(program, (images,), dynamo=True, verbose=False) if to.suffix == ".onnx" else None
    except Exception as error:  # torch raises errors of many types for what it cannot trace
        raise ValueError(f"the model cannot be exported as a program ({_line(error)}): export its weights") from error
    if onnx is None:
        write(to, _saved(torch.export.save, program))
    else:
        onnx.save(to)


def write_folder(model: nn.Module, name: str, to: Path, facts: Mapping[str, Any], root: Path | None = None) -> None:
    """Write a model to a folder that its own library reads, as `code_of` does.

    Args:
        model: any model.
        name: of the model, as `build` takes it.
        to: an empty folder.
        facts: see `write_state`.
        root: folder of the data sets, see `build`.

    Raises:
        ValueError: a package is missing, or the tokenizer or image processor cannot be loaded.
        OSError: a file cannot be written.
    """
    if isinstance(model, Logits):
        network: Any = model.network
        network.save_pretrained(to)
        (image_processor if model.takes_images else tokenizer)(name, root).save_pretrained(to)
    elif name.startswith("timm:"):
        timm: Any = _package("timm.models", "a folder of timm")
        timm.save_for_hf(model, str(to), safe_serialization=True)
    else:
        write_state(model, to / WEIGHTS_FILE, facts)


def code_of(model: nn.Module, name: str, channels: int, place: str, *, on_hub: bool = False) -> str:
    """Return Python code that loads a folder that `write_folder` wrote.

    Args:
        model: that is in the folder.
        name: of the model, as `build` takes it.
        channels: of its images.
        place: the folder, or the name of a repository on the Hugging Face hub.
        on_hub: whether it is on the hub.
    """
    source, _, rest = name.partition(":")
    classes = classes_of(model.state_dict())
    if isinstance(model, Logits):
        kind, prepares, called = "SequenceClassification", "AutoTokenizer", "tokenizer"
        if model.takes_images:
            kind, prepares, called = "ImageClassification", "AutoImageProcessor", "processor"
        return (
            f"from transformers import {', '.join(sorted((f'AutoModelFor{kind}', prepares)))}\n\n"
            f'model = AutoModelFor{kind}.from_pretrained("{place}")\n'
            f'{called} = {prepares}.from_pretrained("{place}")'
        )
    if source == "timm" and on_hub:
        return f'import timm\n\nmodel = timm.create_model("hf_hub:{place}", pretrained=True)'
    if source == "timm":
        shape = f"num_classes={classes}, in_chans={channels}"
        return f'import timm\n\nmodel = timm.create_model("{rest}", {shape}, checkpoint_path="{place}/{WEIGHTS_FILE}")'
    imports, file = "from safetensors.torch import load_file\n", f'"{place}/{WEIGHTS_FILE}"'
    if on_hub:
        imports = "from huggingface_hub import hf_hub_download\n" + imports
        file = f'hf_hub_download("{place}", "{WEIGHTS_FILE}")'
    if source == "torchvision":
        imports += "from torchvision.models import get_model\n"
        built = f'get_model("{rest}", num_classes={classes})'
    else:
        imports += "from bisam.experiments.models.build import build\n"
        built = f'build("{name}", {classes}, channels={channels})'
    return f"{imports}\nmodel = {built}\nmodel.load_state_dict(load_file({file}))"


def _network(model: nn.Module) -> nn.Module:
    return model.network if isinstance(model, Logits) else model


def _package(package: str, what: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        package = package.partition(".")[0]
        raise ValueError(f"{what} needs {package}: pip install 'bisam[experiments,onnx]'") from error


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
