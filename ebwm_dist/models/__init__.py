"""Layers that carry tangents, the energy transformer, its autoregressive twins, FLOPs."""
