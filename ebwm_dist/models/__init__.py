"""Layers that carry tangents, the energy transformer, its autoregressive and diffusion twins, FLOPs."""
