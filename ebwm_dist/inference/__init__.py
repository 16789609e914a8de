"""Predictions: context cache, thinking, sampling, generation, roll-outs, export and import."""
