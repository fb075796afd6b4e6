"""Analysis: what an adversary finds, and how flat a minimum is.

    sharpness(sharp, loader, L2(0.05), steps=10)        # the largest rise of the loss in a ball
    average_sharpness(sharp, loader, L2(0.05))          # the mean rise in random directions
    zero_one_sharpness(sharp, loader, L2(0.05))         # the largest error in the ball
    flips(sharp, loader, L2(0.05))                      # what each adversary changes, at equal radius
    eigenvalues(sharp, loader, k=5)                     # of the Hessian or the Gauss-Newton matrix
    trace(sharp, loader), spectral_density(sharp, loader)
    landscape(sharp, loader, "random")                  # loss and error along a line or on a plane
    connectivity(sharp, loader, checkpoint)             # loss and error on the line to another checkpoint
    margins(sharp, loader), calibration(sharp, loader)  # of the predictions
    corruptions(sharp, loader, mean=..., std=...)       # the error under corruptions of images
    feature_rank(sharp, loader)                         # of the inputs of the last layer
    gradient_norm(sharp, loader)                        # and the noise scale
    Monitor(sharp, loader, every=100)                   # records measures during training

Each function takes a `SharpnessAware` loss or an oracle, and batches; it leaves the model as it is, and returns a
frozen value with `to_dict()` and `plot()`.
"""

from bisam.analysis.calibration import Calibration as Calibration, calibration as calibration
from bisam.analysis.connectivity import Connectivity as Connectivity, connectivity as connectivity
from bisam.analysis.corruptions import (
    CORRUPTIONS as CORRUPTIONS,
    Corruptions as Corruptions,
    corruptions as corruptions,
)
from bisam.analysis.curvature import (
    Eigenvalues as Eigenvalues,
    SpectralDensity as SpectralDensity,
    Trace as Trace,
    eigenvalues as eigenvalues,
    spectral_density as spectral_density,
    trace as trace,
)
from bisam.analysis.features import FeatureRank as FeatureRank, feature_rank as feature_rank
from bisam.analysis.flips import Flips as Flips, flips as flips
from bisam.analysis.gradients import GradientNorm as GradientNorm, gradient_norm as gradient_norm
from bisam.analysis.landscape import Landscape as Landscape, landscape as landscape
from bisam.analysis.margins import Margins as Margins, margins as margins
from bisam.analysis.monitor import Cost as Cost, Monitor as Monitor, standard as standard
from bisam.analysis.sharpness import (
    Normalized as Normalized,
    Sharpness as Sharpness,
    average_sharpness as average_sharpness,
    sharpness as sharpness,
)
from bisam.analysis.zero_one import (
    ZeroOne as ZeroOne,
    ZeroOneSharpness as ZeroOneSharpness,
    zero_one_sharpness as zero_one_sharpness,
)
