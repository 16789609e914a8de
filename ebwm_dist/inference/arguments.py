"""The options of thinking, for every command that predicts."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ebwm_dist.inference.settings import Thinking


def add_thinking_arguments(parser: argparse._ActionsContainer) -> None:
    """Add an option for every setting of thinking."""
    parser.add_argument("--think-steps", dest="steps", type=int, help="most MCMC steps for a token")
    parser.add_argument("--candidates", type=int, default=1, help="refinements of every token, the best is taken")
    parser.add_argument(
        "--select",
        choices=("energy", "drop", "surprisal"),
        default="energy",
        help="best: lowest energy, largest drop of it, or most certain steps",
    )
    parser.add_argument(
        "--energy-tolerance", type=float, help="stop when a step changes the energy by no more than this"
    )
    parser.add_argument(
        "--prediction-tolerance", type=float, help="stop when a step changes no probability by more than this"
    )
    parser.add_argument(
        "--accept-only-decrease",
        action="store_true",
        help="take only steps that lower the energy; assumes that training made it fall on the way",
    )
    parser.add_argument("--max-nfe", type=int, help="most energy evaluations for a token")
    parser.add_argument("--langevin-noise", type=float)
    parser.add_argument("--step-size", type=float, help="alpha")


def thinking_of(args: argparse.Namespace) -> Thinking:
    """Return what those options say."""
    return Thinking(**{field.name: getattr(args, field.name) for field in fields(Thinking)})
