"""Losses by MCMC step, thinking, uncertainty, multiple choice and baselines, on text and on video; reports."""
