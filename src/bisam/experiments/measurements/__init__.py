"""Measurements: the results of the paper that need no training run: times, an example, and the bounds."""

from bisam.experiments.measurements.bounds import FIGURE_1
from bisam.experiments.measurements.epochs import TABLE_11
from bisam.experiments.measurements.example import EXAMPLE
from bisam.experiments.measurements.games import RAPP_FIGURES
from bisam.experiments.measurements.gan import GAN
from bisam.experiments.measurements.losses import TABLE_12
from bisam.experiments.measurements.measurement import Measurement as Measurement, report as report, run as run

MEASUREMENTS = {
    measurement.name: measurement for measurement in (FIGURE_1, EXAMPLE, TABLE_11, TABLE_12, RAPP_FIGURES, GAN)
}
"""By name."""
