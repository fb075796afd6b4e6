"""Measurements: results of the papers that need no training run: times, memory, an example, the bounds, gradients."""

from bisam.experiments.measurements.adversaries import COSINES, LABEL_GRADIENT
from bisam.experiments.measurements.bounds import FIGURE_1
from bisam.experiments.measurements.epochs import TABLE_11
from bisam.experiments.measurements.example import EXAMPLE
from bisam.experiments.measurements.games import RAPP_FIGURES
from bisam.experiments.measurements.gan import GAN
from bisam.experiments.measurements.losses import TABLE_12
from bisam.experiments.measurements.measurement import Measurement as Measurement, report as report, run as run
from bisam.experiments.measurements.sampa import COSTS, GRADIENTS

MEASUREMENTS = {
    measurement.name: measurement
    for measurement in (
        *(FIGURE_1, EXAMPLE, LABEL_GRADIENT, COSINES, TABLE_11, TABLE_12),
        *(RAPP_FIGURES, GAN, COSTS, GRADIENTS),
    )
}
"""By name."""
