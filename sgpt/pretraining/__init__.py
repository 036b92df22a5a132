"""Pretraining of the small base `nano`: text, stages, losses and model."""
