"""The fields of a recipe, with their types and defaults, without the checks: they need torch, and flags do not."""

from __future__ import annotations

from dataclasses import dataclass

from bisam.experiments.recipes import versions


@dataclass(frozen=True)
class Fields:
    """The fields of `Recipe`, from which the flags of `bisam train` are derived. Their docstrings are the help."""

    dataset: str = "digits"
    """Data set: digits (no download), cifar10, cifar100, imagenet, flowers, pets, folder:PATH, glue:TASK, text:NAME
    (tokens; no download); cifar10:SIDE reduces the images to 4, 8 or 16 pixels, or enlarges them."""
    model: str = "convnet"
    """Network: a name from `bisam list`, torchvision:NAME, timm:NAME or hf:NAME; a local folder after hf: is looked for
    here and in DATA/weights."""
    weights: str | None = None
    """Initial weights: "pretrained", a file of weights (looked for here and in DATA/weights), a finished run as RUN,
    RUN:best, RUN:last or RUN:ema, or by default random. A head for another number of classes is replaced."""
    frozen: int | None = None
    """Number of lower layers (stages of a convolutional network) that keep their initial weights, besides the
    embeddings or the stem; 0: these alone. They are in eval mode, without gradient and perturbation. By default all
    weights are trained."""
    method: str = "bisam_log"
    """Method of the gradient: a name from `bisam methods`, or an expression such as "KSAM(32, BiSAM(0.1))"."""
    noise: float = 0.0
    """Share of the training labels that are replaced by another class, in [0, 1)."""
    validation_noise: bool = False
    """Replace the same share of the validation labels too; by default they are clean. Test labels are always clean."""
    limit: int | None = None
    """Largest number of training examples, of validation examples and of test examples."""
    train_examples: int | None = None
    """Number of training examples, which the seed draws; the validation and test examples stay complete."""
    imbalance: float = 1.0
    """Ratio of the training examples of the first class to those of the last one: their numbers fall exponentially with
    the number of the class (Cui et al., 2019), and the seed draws which are left. Scores are then balanced accuracy,
    and that of the classes with many, medium and few examples. Validation and test examples stay as they are."""
    held_out: float | None = None
    """Share of the training examples that is held out for validation, by default a tenth (of ImageNet a fiftieth). 0:
    none; then all are trained, and the validation score is that of the training examples, without augmentation."""
    augment: bool = True
    """Random crops and flips of the training images (not for digits)."""
    cutout: bool = False
    """Blank a square of half the side in half of the augmented images (CIFAR), as the BiSAM authors do."""
    randaugment: int | None = None
    """Magnitude of RandAugment, 0 to 30: two random operations on each training image, after crops and flips (CIFAR and
    image files). By default there are none."""
    erasing: float = 0.0
    """Share of the training images of which a random rectangle is erased, in [0, 1]."""
    mixup: float = 0.0
    """Mixup of pairs of training images and of their labels: parameter of the beta distribution, often 0.2; 0: none."""
    cutmix: float = 0.0
    """CutMix, rectangles of other training images and a share of their labels: the same parameter, often 1; 0: none.
    With mixup too, each batch has one of the two."""
    image_size: int = 224
    """Side of images that are read from files, in pixels."""
    max_length: int = 128
    """Largest number of tokens of a text. Longer texts are truncated, those of text:pydoc divided."""
    bucket: int = 1
    """Batches whose texts are drawn together and sorted by length before they are divided, so that there is less
    padding; 1: texts are not sorted."""
    rho: float | None = None
    """Radius of the neighbourhood; its default depends on the method, see `bisam methods`."""
    mu: float | None = None
    """Sharpness of BiSAM's soft maximum; its default depends on the bound, see `bisam methods`."""
    alpha: float | None = None
    """Slope of the tanh bound; for its default see `bisam methods`."""
    eta: float | None = None
    """Constant added to |w| in the adaptive methods; for its default see `bisam methods`."""
    epochs: int | None = None
    """Passes over the training data, by default 30; steps can be given instead."""
    steps: int | None = None
    """Optimizer steps of the run, in place of epochs; the last epoch ends with the last step."""
    batch_size: int = 64
    """Examples per step."""
    accumulate: int = 1
    """Number of losses, each over `batch_size` examples, that are averaged for one step of the optimizer."""
    optimizer: str = "sgd"
    """Base optimizer: sgd, adamw, another one of torch.optim (RMSprop, NAdam, ...), timm:NAME (timm:muon, timm:lion) or
    schedulefree:NAME (with the constant schedule); its other arguments in brackets, as "NAdam(betas=(0.9, 0.99))"."""
    learning_rate: float = 0.1
    """Highest learning rate."""
    schedule: str = "cosine"
    """Schedule of the learning rate: cosine (to 0, per epoch, or per step of a run of steps), linear (to 0, per step),
    constant, or wsd (warm-up, stable, then decay to 0, per step)."""
    warmup: int = 0
    """Optimizer steps of linear warm-up of the learning rate (linear, constant and wsd schedules)."""
    cooldown: float = 0.2
    """Share of the run in which the wsd schedule decays linearly to 0, at its end."""
    momentum: float = 0.9
    """Momentum of SGD, RMSprop, Muon and others that have one; AdamW does not."""
    weight_decay: float = 5e-4
    """Weight decay on all parameters."""
    label_smoothing: float = 0.0
    """Label smoothing of the descent loss, over the wrong classes as in the BiSAM authors' code."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters; by default gradients are not clipped."""
    ema: float | None = None
    """Decay of an average of the weights that is tested too, in (0, 1); by default there is no average."""
    update_bn: bool = False
    """Recompute the statistics of batch normalisation for averaged weights (of ema, or of a schedule-free optimizer),
    by a pass over the training examples after each epoch. By default ema averages them too."""
    precision: str = "32"
    """Precision of the model: 32, bf16 or 16 (autocast; the weights stay float32), or 64."""
    channels_last: bool = False
    """Store images in the channels-last memory format, which is faster for convolutions on most devices."""
    compile: bool = False
    """Compile the model."""
    compile_mode: str = "default"
    """Mode of torch.compile: default or max-autotune-no-cudagraphs. The modes with CUDA graphs overwrite the outputs of
    one pass in the next, and a method has several passes."""
    patience: int | None = None
    """Number of epochs in a row without a better validation score after which the run ends; by default it is trained to
    its last epoch."""
    measured_epochs: int = 0
    """Number of evenly spaced epochs, the last included, after which the run measures its weights."""
    measured: str = "ball"
    """Kind of the measurement: ball (the largest error in a ball around the weights, and what adversaries flip), or
    ascents (flips, cosines and largest error of five adversaries on the same weights)."""
    seed: int = 0
    """Seed of the initial weights, the label noise, the order of the batches, the examples that a limit or an imbalance
    keeps, and the split where the data set has none of its own."""
    version: int = versions.VERSION
    """Version of the meaning of the fields; no flag sets it.

    A change that alters the results of the same fields raises `versions.VERSION`, and `versions.CHANGES` says what it
    concerns. Recipes of earlier versions whose results it changed have another fingerprint: they can be read and
    reported, in groups of their own, and are not trained. A version that changed nothing for a recipe leaves it equal:
    it has the latest version with its results, and the same fingerprint as before.
    """
