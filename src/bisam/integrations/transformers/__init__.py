"""Transformers: the Trainer of Hugging Face with any sharpness-aware method.

Requires the package `transformers`:

    from bisam.integrations.transformers import AnalysisCallback, SharpnessAwareTrainer
"""

try:
    from bisam.integrations.transformers.callback import AnalysisCallback as AnalysisCallback
    from bisam.integrations.transformers.trainer import SharpnessAwareTrainer as SharpnessAwareTrainer
except ImportError as error:
    raise ImportError('SharpnessAwareTrainer needs transformers: pip install "bisam[transformers]"') from error
