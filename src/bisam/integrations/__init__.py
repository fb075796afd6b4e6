"""Integrations: one file for each host of which a plain loss is not enough. Each needs its host installed.

from bisam.integrations.transformers import SharpnessAwareTrainer
"""
