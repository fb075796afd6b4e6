"""Integrations: support for frameworks in which replacing the loss is not enough. Each requires its framework.

Import an integration by its own name:

    from bisam.integrations.transformers import SharpnessAwareTrainer
"""
