"""Continue text: `python launchers/generate.py --checkpoint runs/quickstart --prompt "In the beginning"`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ebwm_dist.errors import UserError


def main() -> int:
    """Parse the command line and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder, checkpoint or export")
    parser.add_argument("--prompt", nargs="+", default=[""], help="one or more texts; none: begin a document")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise and sampling; also of each further prompt")
    parser.add_argument("--stop", nargs="+", default=[], help="strings that end a text")
    parser.add_argument("--slide", action="store_true", help="go beyond the trained context, forgetting its older half")
    parser.add_argument("--json", action="store_true", help="print text, tokens, and energies and steps of each token")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--min-p", type=float)
    thinking = parser.add_argument_group("thinking (default: as the model was trained)")
    thinking.add_argument("--think-steps", type=int, help="most MCMC steps for a token")
    thinking.add_argument("--candidates", type=int, default=1, help="refinements of every token, the best is taken")
    thinking.add_argument("--select", choices=("energy", "drop"), default="energy", help="best: lowest energy, or drop")
    thinking.add_argument("--stop-energy", type=float, help="stop when a step changes the energy by no more than this")
    thinking.add_argument("--accept", action="store_true", help="take only steps that lower the energy")
    thinking.add_argument("--budget", type=int, help="most candidate passes for a token")
    thinking.add_argument("--langevin-noise", type=float)
    thinking.add_argument("--step-size", type=float, help="alpha")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Generate; a single text is written as it comes."""
    import ebwm_dist
    from ebwm_dist.inference.sampling import Sampling
    from ebwm_dist.inference.thinking import Thinking

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    thinking = Thinking(
        steps=args.think_steps,
        candidates=args.candidates,
        select=args.select,
        langevin_noise=args.langevin_noise,
        step_size=args.step_size,
        accept=args.accept,
        stop_energy=args.stop_energy,
        budget=args.budget,
    )
    predictor = ebwm_dist.load(args.checkpoint)
    streamed = len(args.prompt) == 1 and not args.json
    shown: list[str] = []

    def show(_: int, text: str) -> None:
        if streamed:
            print(text if shown else args.prompt[0] + text, end="", flush=True)
            shown.append(text)

    texts = predictor.generate(
        args.prompt,
        args.tokens,
        thinking=thinking,
        sampling=sampling,
        stop=args.stop,
        seeds=[args.seed + number for number in range(len(args.prompt))],
        slide=args.slide,
        on_text=show,
    )
    if args.json:
        records = [{"prompt": prompt, **asdict(text)} for prompt, text in zip(args.prompt, texts, strict=True)]
        print(json.dumps(records if len(records) > 1 else records[0], ensure_ascii=False))
    elif streamed:
        print("" if shown else args.prompt[0])
    else:
        for prompt, text in zip(args.prompt, texts, strict=True):
            print(f"{prompt}{text.text}\n")


if __name__ == "__main__":
    sys.exit(main())
