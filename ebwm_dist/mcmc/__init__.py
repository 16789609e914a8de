"""Refinement by gradient descent on an energy: spaces, noise, schedules, replay, the second-order engine, the EBT."""
