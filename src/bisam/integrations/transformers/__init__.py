"""Transformers: the Hugging Face Trainer with any sharpness-aware method.

from bisam.integrations.transformers import SharpnessAwareTrainer
"""

try:
    from bisam.integrations.transformers.trainer import SharpnessAwareTrainer as SharpnessAwareTrainer
except ImportError as error:
    raise ImportError('SharpnessAwareTrainer needs transformers: pip install "bisam[transformers]"') from error
