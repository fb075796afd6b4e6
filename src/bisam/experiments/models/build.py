"""Build: models by name: our networks for small images, and the classifiers of torchvision, timm and Hugging Face.

>>> model = build("resnet56", 10)
>>> model = build("torchvision:resnet50", 37, weights="pretrained")
>>> model = build("hf:bert-base-uncased", 2, weights="pretrained")
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisam.experiments.errors import RunWarning, is_out_of_memory, reason_not_loaded, unknown
from bisam.experiments.models import initial
from bisam.experiments.models.frozen import freeze, with_frozen
from bisam.experiments.models.gpt import GPT
from bisam.experiments.models.initial import PRETRAINED as PRETRAINED, WEIGHTS, classes_of, local, without_prefixes
from bisam.experiments.models.logits import Logits
from bisam.experiments.models.networks import MLP, VGG, ConvNet, DenseNet, ResNet, WideResNet

NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "convnet": (ConvNet, "three convolutions, for digits of 8x8"),
    "mlp": (MLP, "two hidden layers of 64 with batch normalisation, for digits of 8x8"),
    "resnet8": (partial(ResNet, 8), "CIFAR ResNet (He et al. 2016) of three blocks, 0.08M parameters"),
    "resnet20": (partial(ResNet, 20), "CIFAR ResNet (He et al. 2016), 0.27M parameters"),
    "resnet32": (partial(ResNet, 32), "CIFAR ResNet (He et al. 2016), 0.46M parameters"),
    "resnet44": (partial(ResNet, 44), "CIFAR ResNet (He et al. 2016), 0.66M parameters"),
    "resnet56": (partial(ResNet, 56), "CIFAR ResNet (He et al. 2016), 0.85M parameters"),
    "wrn28_2": (partial(WideResNet, 34, 2), "WRN-28-2 as in the SAM literature, really of 34 layers, 1.9M parameters"),
    "wrn28_10": (
        partial(WideResNet, 34, 10),
        "WRN-28-10 as in the SAM literature, really of 34 layers, 46M parameters",
    ),
    "wrn28_2_published": (partial(WideResNet, 28, 2), "WRN-28-2 (Zagoruyko and Komodakis 2016), 1.5M parameters"),
    "wrn28_10_published": (partial(WideResNet, 28, 10), "WRN-28-10 (Zagoruyko and Komodakis 2016), 36M parameters"),
    "densenet121": (DenseNet, "DenseNet-121 for images of 32x32 (Huang et al. 2017), 7.0M parameters"),
    "vgg19_bn": (
        VGG,
        "VGG-19 with batch normalisation for images of 32x32 (Simonyan and Zisserman 2015), 21M parameters",
    ),
    "gpt": (
        lambda classes, channels: GPT(classes),
        "a decoder of three blocks of width 96 for tokens (text:NAME), 0.35M parameters",
    ),
}

NAMES: dict[str, str] = {name: line for name, (_, line) in NETWORKS.items()} | {
    "torchvision:NAME": "a classifier of torchvision.models, as torchvision:resnet50",
    "timm:NAME": "a classifier of timm, as timm:vit_base_patch16_224",
    "hf:NAME": "a classifier of Hugging Face of texts or images, as hf:bert-base-uncased: of a folder (here, or in the "
    "folder weights of the data folder), or of the hub",
}


def build(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    weights: str | None = None,
    new_head: bool = True,
    frozen: int | None = None,
    root: Path | None = None,
) -> nn.Module:
    """Build the network `name` for `classes` classes, in float32 and in training mode.

    Its input is images (N, channels, H, W), or for texts the dict of tensors that the tokenizer returns. Its output is
    logits (N, classes). `gpt` takes tokens (N, T) and returns logits (N, classes, T). Initial weights are drawn from
    torch's global generator.

    Args:
        name: one of `NAMES`.
        classes: number of logits.
        channels: of the images; torchvision's networks accept 3 only.
        weights: None for random ones, "pretrained" for the source's own, or the path of a state dict that torch.save
            or safetensors wrote, or of a finished run, see `initial.read`. A head for another number of classes is
            replaced by a new one, with a warning.
        new_head: whether the head may be replaced so, if the weights are those of a file; else it does not fit.
        frozen: number of lower layers that are not trained, see `freeze`; None: all are.
        root: folder of the data sets. A relative path of weights, or of a folder of Hugging Face, that does not exist
            is looked for in its folder `weights`.

    Raises:
        ValueError: the name is unknown, a package is missing, the weights cannot be loaded or do not fit, or the
            network has no such layers.
        RunError: the weights are those of a run that is not finished, has diverged, or has no such weights.

    Warns:
        RunWarning: the head is a new one, and not that of the file or run.
    """
    source, colon, rest = name.partition(":")
    pretrained = weights == PRETRAINED
    if not colon:
        model = _ours(name, classes, channels, pretrained)
    elif source == "torchvision":
        model = _torchvision(rest, classes, channels, pretrained)
    elif source == "timm":
        model = _timm(rest, classes, channels, pretrained)
    elif source == "hf":
        model = _hugging_face(rest, classes, channels, pretrained, root)
    else:
        raise unknown("source of models", source, ["torchvision", "timm", "hf"])
    if weights is not None and not pretrained:
        network = model.network if isinstance(model, Logits) else model
        state = without_prefixes(_initial(weights, channels, root))
        heads = _fit(network, state, classes if new_head else None, f"weights {weights!r} do not fit {name!r}")
        if heads:
            warnings.warn(
                f"weights {weights!r} are those of {len(state[heads[0]])} classes, and the model has {classes}: all "
                f"but the head ({', '.join(heads)}) are kept",
                RunWarning,
                stacklevel=2,
            )
    if frozen is not None:
        freeze(model, name, frozen)
    return model


def tokenizer(name: str, root: Path | None = None) -> Any:
    """Load the tokenizer of the model `hf:...`.

    Args:
        name: of the model.
        root: see `build`.

    Raises:
        ValueError: the name is not one of Hugging Face, transformers is missing, or the tokenizer cannot be loaded.
    """
    source, _, rest = name.partition(":")
    if source != "hf":
        raise ValueError(f"model {name!r} has no tokenizer: use a model of Hugging Face, such as hf:bert-base-uncased")
    transformers = _package("transformers", f"the tokenizer of {name!r}")
    place = _place(rest, root)
    with _loading(f"the tokenizer of {name!r}", _hf_remedy(rest, root)), _hub(place):
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def image_processor(name: str, root: Path | None = None) -> Any:
    """Load the image processor of the model `hf:...`, which says how its images are prepared.

    Args:
        name: of the model.
        root: see `build`.

    Raises:
        ValueError: transformers is missing, or the processor cannot be loaded.
    """
    transformers, rest = _package("transformers", f"the image processor of {name!r}"), name.partition(":")[2]
    place = _place(rest, root)
    with _loading(f"the image processor of {name!r}", _hf_remedy(rest, root)), _hub(place):
        return transformers.AutoImageProcessor.from_pretrained(place, trust_remote_code=False)


def statistics(name: str, root: Path | None = None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and standard deviation of the channels for a model's pretrained weights, as shares of 255.

    The result is None for models of this package, for those without pretrained weights, and for folders of Hugging Face
    that do not say it.

    Args:
        name: of the model.
        root: see `build`.

    Raises:
        ValueError: a package is missing, or has no such model.
    """
    source, _, rest = name.partition(":")
    if source == "hf":
        place = Path(_place(rest, root))
        if place.is_dir() and not (place / _PROCESSOR).is_file():
            return None
        processor = image_processor(name, root)
        mean, std = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
        return None if mean is None or std is None else (tuple(map(float, mean)), tuple(map(float, std)))
    if source == "timm":
        settings = _timm_with(rest).get_pretrained_cfg(rest)
    elif source == "torchvision":
        weights = _torchvision_with(rest).get_model_weights(rest)
        settings = weights.DEFAULT.transforms() if len(weights) else None
    else:
        return None
    return None if settings is None or len(settings.mean) != 3 else (tuple(settings.mean), tuple(settings.std))


def check_name(name: str) -> None:
    """Check the name of a network of bisam; those of other packages are looked for when they are built.

    Raises:
        ValueError: there is none of this name.
    """
    if ":" not in name and name not in NETWORKS:
        raise unknown("model", name, NAMES, "bisam list")


def _ours(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    check_name(name)
    if pretrained:
        raise ValueError(f"model {name!r} has no pretrained weights: give a file with weights, or leave --weights out")
    network, _ = NETWORKS[name]
    return network(classes, channels)


def _torchvision(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    full, models = f"torchvision:{name}", _torchvision_with(name)
    if channels != 3:
        raise ValueError(
            f"model {full!r} accepts images of 3 channels, not of {channels}: use one of our models or timm's"
        )
    # With auxiliary heads these two return tuples in training mode; without `init_weights` one of them warns.
    settings = {"aux_logits": False, "init_weights": True} if name in {"googlenet", "inception_v3"} else {}
    if not pretrained:
        return models.get_model(name, weights=None, num_classes=classes, **settings)
    with _loading(f"the pretrained weights of {full!r}", "give a file of weights, or set TORCH_HOME to a filled cache"):
        model = models.get_model(name, weights="DEFAULT")
    if name == "inception_v3":
        model.aux_logits, model.AuxLogits = False, None
    _renew_head(model, classes)
    return model


def _timm(name: str, classes: int, channels: int, pretrained: bool) -> nn.Module:
    full, timm = f"timm:{name}", _timm_with(name)
    settings = {"num_classes": classes, "in_chans": channels}
    if not pretrained:
        return timm.create_model(name, **settings)
    if not timm.models.is_model_pretrained(name.partition(".")[0]):
        raise ValueError(f"model {full!r} has no pretrained weights: give a file with weights, or leave --weights out")
    with (
        _loading(f"the pretrained weights of {full!r}", "give a file of weights, or set HF_HOME to a filled cache"),
        _hub(None),
    ):
        return timm.create_model(name, pretrained=True, **settings)


def _torchvision_with(name: str) -> Any:
    """Import torchvision's models, and check that `name` is one of them."""
    models = _package("torchvision", f"model 'torchvision:{name}'").models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown_of("torchvision", name, known, "torchvision.models.list_models()")
    return models


def _timm_with(name: str) -> Any:
    """Import timm, and check that it has the architecture and the tag of `name`."""
    timm = _package("timm", f"model 'timm:{name}'")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown_of("timm", name, timm.list_models(), "timm.list_models()")
    tagged = timm.list_pretrained(f"{architecture}.*") if tag else []
    if tag and name not in tagged:
        raise _unknown_of("timm", name, tagged or [architecture], f"timm.list_pretrained('{architecture}*')")
    return timm


def _hf_remedy(name: str, root: Path | None) -> str:
    placed = "" if root is None else f"put it into {root / WEIGHTS / name} (or set --data-dir), "
    return f"{placed}give a local folder as hf:FOLDER, or set HF_HOME to a filled cache"


_PROCESSOR = "preprocessor_config.json"


def _hugging_face(name: str, classes: int, channels: int, pretrained: bool, root: Path | None) -> Logits:
    full = f"hf:{name}"
    transformers = _package("transformers", f"model {full!r}")
    place = _place(name, root)
    with _loading(f"model {full!r}", _hf_remedy(name, root)), _hub(place), _quiet(transformers.logging):
        config = transformers.AutoConfig.from_pretrained(place, num_labels=classes, trust_remote_code=False)
        classifier = transformers.AutoModelForSequenceClassification
        if takes_images := _takes_images(config, transformers):
            classifier = transformers.AutoModelForImageClassification
            if not pretrained and hasattr(config, "num_channels"):
                config.num_channels = channels
    if takes_images and getattr(config, "num_channels", channels) != channels:
        raise ValueError(f"model {full!r} accepts images of {config.num_channels} channels, not of {channels}")
    with _loading(f"model {full!r}", _hf_remedy(name, root)), _hub(place), _quiet(transformers.logging):
        if pretrained:
            network = classifier.from_pretrained(
                place, config=config, ignore_mismatched_sizes=True, trust_remote_code=False
            )
        else:
            network = classifier.from_config(config, trust_remote_code=False)
    # It is loaded in the precision of its file, and in evaluation mode.
    return Logits(network.float()).train()


def _takes_images(config: Any, transformers: Any) -> bool:
    """Whether a model of Hugging Face classifies images, and not sequences of tokens."""
    texts, images = (
        getattr(transformers, f"MODEL_FOR_{what}_CLASSIFICATION_MAPPING") for what in ("SEQUENCE", "IMAGE")
    )
    return type(config) in images and type(config) not in texts


def _place(name: str, root: Path | None) -> str:
    """Return the local folder or the name on the hub after `hf:`."""
    folder = local(name, root)
    if name and folder.is_dir():
        return str(folder)
    if not name or name[0] in "./~" or name.count("/") > 1:
        raise ValueError(
            f"model 'hf:{name}' is neither a local folder nor a name on the hub, such as hf:bert-base-uncased"
        )
    return name


def _package(package: str, what: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        package = package.partition(".")[0]
        raise ValueError(f"{what} needs {package}: pip install 'bisam[experiments]'") from error


def _unknown_of(source: str, name: str, known: Iterable[str], see: str) -> ValueError:
    """Return the error for an unknown name of a package, which `see` lists."""
    near = get_close_matches(name, list(known), 3)  # without the source, which would make all names alike
    return unknown("model", f"{source}:{name}", [f"{source}:{one}" for one in near], see)


@contextmanager
def _loading(what: str, remedy: str) -> Generator[None]:
    """Turn an error in the block into a message of one line: no network, an unknown name, a missing or broken file."""
    try:
        yield
    # The libraries raise a dozen unrelated types here, including those of their HTTP clients.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{what} cannot be loaded ({_line(error)}): {remedy}") from error


def _line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return reason_not_loaded(error)
    return str(error).strip().partition("\n")[0].rstrip(" :.") or type(error).__name__


@contextmanager
def _hub(place: str | None) -> Generator[None]:
    """Set Hugging Face's hub to offline mode if it cannot be reached; else it would try six times, 23 s for each file.

    In offline mode it reads its cache. A `place` that is a folder needs no hub.
    """
    constants: Any = import_module("huggingface_hub.constants")
    utils: Any = import_module("huggingface_hub.utils")
    offline = constants.HF_HUB_OFFLINE
    if not offline and (place is None or not Path(place).is_dir()):
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def _quiet(logging: Any) -> Generator[None]:
    """Suppress the report that the head is newly initialised, which is intended, and the bar of loading weights."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _renew_head(model: nn.Module, classes: int) -> None:
    """Replace the last layer with weights by a new head, if it has another number of classes."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    name, old = layers[-1]
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        if old.out_features != classes:
            model.set_submodule(name, nn.Linear(old.in_features, classes, bias=bias))
    elif old.out_channels != classes:
        model.set_submodule(name, nn.Conv2d(old.in_channels, classes, 1, bias=bias))


def _initial(given: str, channels: int, root: Path | None) -> dict[str, Tensor]:
    """The weights of a file or a run; those that the run did not train are those that it started with."""
    found = initial.read(given, root)
    if (recipe := found.recipe) is None or recipe.frozen is None:
        return found.state
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # about the head of that run, which it has trained
        whole = build(
            recipe.model,
            classes_of(found.state),
            channels=channels,
            weights=recipe.weights,
            frozen=recipe.frozen,
            root=root,
        )
    return with_frozen(found.state, whole)


def _fit(model: nn.Module, state: dict[str, Tensor], classes: int | None, complaint: str) -> list[str]:
    """Load `state` into `model`, except a head that differs from `classes` classes in their number only.

    It returns the names of the weights of that head.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    reshaped = {
        name: (tensor.shape, own[name]) for name, tensor in state.items() if tensor.shape != own.get(name, tensor.shape)
    }
    lengths = {theirs[:1] for theirs, _ in reshaped.values()}
    heads = {name for name, (theirs, ours) in reshaped.items() if ours == (classes, *theirs[1:]) and len(lengths) == 1}
    kept = {name: tensor for name, tensor in state.items() if name not in reshaped}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    faults = {
        "missing": [name for name in missing if name not in reshaped],
        "unexpected": unexpected,
        "of another shape": [
            f"{name} {tuple(theirs)}, not {tuple(ours)}"
            for name, (theirs, ours) in reshaped.items()
            if name not in heads
        ],
    }
    if any(faults.values()):
        raise ValueError(
            f"{complaint}: " + "; ".join(f"{kind} {_few(names)}" for kind, names in faults.items() if names)
        )
    return sorted(heads)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
