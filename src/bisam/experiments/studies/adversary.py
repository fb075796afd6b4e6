"""Adversary: studies of what BiSAM's adversaries do with one network, while it fits its data and after.

    bisam run adversary --data-dir DATA        # trains, measures at ten marks, and reports
    bisam run adversary-sgd --data-dir DATA    # the same with networks that SGD trains

The networks are small, so that they fit 2,000 images in minutes on one core.
"""

from __future__ import annotations

from dataclasses import replace

from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.study import Primary, Study

_EPOCHS = 40
_MARKS = 10
_SMOOTHED = 0.1


def _networks(method: str, rho: float | None, epochs: int | None) -> list[Recipe]:
    """The BiSAM authors' recipe, with and without label smoothing and label noise; without augmentation it is fitted.

    Its training images, its epochs and its network are smaller.
    """
    base = replace(
        CIFAR,
        dataset="cifar10:16",
        model="resnet8",
        method=method,
        rho=rho,
        limit=2000,
        augment=False,
        epochs=epochs or _EPOCHS,
        channels_last=True,
        measured_epochs=_MARKS,
        measured="ascents",
    )
    return [replace(base, noise=noise, label_smoothing=s) for noise in (0.0, 0.4) for s in (_SMOOTHED, 0.0)]


_NOTE = (
    "Question: what do the adversaries of BiSAM do that the cross-entropy does not, on networks that have fitted their "
    "data? Five ascents displace *the same weights on the same batches at the same radius*: cross-entropy, "
    "cross-entropy with label smoothing 0.1 (which SAM climbs in the BiSAM authors' code), BiSAM (tanh) with mu 10 and "
    "alpha 0.1, BiSAM (-log) with mu 1, and BiSAM (-log) with mu 5. Figure 2 of the paper is another comparison: there "
    "each method displaces the network that it has trained itself, so that the difference between two curves is one of "
    "networks and of adversaries at once; and SAM climbs the smoothed loss there, BiSAM does not. {networks} They have "
    "78,000 weights and 2,000 images of CIFAR-10 at 16 x 16 pixels, which the seed draws, without augmentation, so "
    "that they are past 99 % training accuracy at about half of their 40 epochs, also with 40 % wrong labels. The "
    "paper's are ResNet-56 on 45,000 images of 32 x 32 for 200 epochs; the network, the images and their number were "
    "made smaller for two cores. The measurements are at ten marks, every fourth epoch, on 1,024 of the training "
    "images with the labels that are trained on, in eval mode."
)
_REGISTERED = (
    " Fixed before the first run: n = 5 seeds, which is when the study stops. The *primary comparison* is the share of "
    "examples that one step of BiSAM (-log) with mu 1 flips minus the share that one step of cross-entropy flips, at "
    "the last mark, without label noise, with the smoothed descent loss, at radius 0.2: paired by network, two-sided "
    "at 5 %, by itself. Its interval is compared with the excess of -log that figure 2 of the paper shows at its last "
    "epoch, about a fifth of SAM's flips (read off the figure). All other comparisons are exploratory: those of the "
    "flips are adjusted together, and those of the largest errors (Holm). The radius 0.2, the number of epochs and the "
    "three steps of ascent were chosen by the size of the measures in three trial runs on other images, which are not "
    "part of the study: at the authors' radius 0.05 hardly anything flips once the data are fitted. In these trials "
    "the flips of -log and of cross-entropy differed by a few examples at most after the data were fitted."
)

ADVERSARY = (
    Study(
        "adversary",
        "What five ascents do with the same network, ResNet-8 trained by SAM",
        lambda epochs: _networks("sam", 0.05, epochs),
        seeds=5,
        figures=("ascents",),
        first_seed=300,
        note=_NOTE.format(
            networks="The networks are trained by SAM with the authors' radius 0.05, whatever that of the ascents is."
        )
        + _REGISTERED,
        primary=Primary(
            "the flips of BiSAM (-log) minus those of cross-entropy at radius 0.2, on the same networks at the last "
            "mark, without label noise, with the smoothed descent loss",
            where={"noise": 0.0, "label_smoothing": _SMOOTHED},
        ),
    ),
    Study(
        "adversary-sgd",
        "What five ascents do with the same network, ResNet-8 trained by SGD",
        lambda epochs: _networks(PLAIN, None, epochs),
        seeds=5,
        figures=("ascents",),
        first_seed=300,
        note=_NOTE.format(
            networks="The networks are trained by SGD, for as many epochs as those of the study adversary."
        )
        + " All comparisons are exploratory: those of the flips are adjusted together, and those of the largest errors "
        "(Holm).",
    ),
)
