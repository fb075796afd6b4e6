"""Recipes: a training run as a value."""
