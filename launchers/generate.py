"""Continue text: `python launchers/generate.py --checkpoint runs/quickstart --prompt "In the beginning"`.

Models of video continue held-out samples instead: `... --checkpoint runs/video --observe 4 --out pictures`. Those of
images make new ones from noise, which `--out` shows: `... --checkpoint runs/images --samples 8 --out pictures`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import to_json
from ebwm_dist.inference.arguments import add_thinking_arguments, thinking_of
from ebwm_dist.inference.settings import Sampling, Thinking
from ebwm_dist.run import Run
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import positive_integer


def main() -> None:
    """Parse the command line and generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint, export or address")
    parser.add_argument("--prompt", nargs="+", default=[""], help="one or more texts; none: begin a document")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise and sampling; also of each further prompt")
    parser.add_argument("--stop", nargs="+", default=[], help="strings that end a text")
    parser.add_argument("--slide", action="store_true", help="go beyond the trained context, forgetting its older half")
    parser.add_argument("--json", action="store_true", help="print text, tokens, and energies and steps of each token")
    video = parser.add_argument_group("video")
    video.add_argument("--samples", type=int, default=3, help="held-out samples (default: %(default)s)")
    video.add_argument("--observe", type=int, default=1, help="frames of each to go on from (default: %(default)s)")
    video.add_argument("--data", help="data folder or address; default: the data it was trained on")
    video.add_argument(
        "--out", type=local_path, help="folder for a PNG strip and a GIF of each: truth above, model below"
    )
    images = parser.add_argument_group("images (also --samples, of each class, and --out)")
    images.add_argument("--class", dest="class_name", help="name of the only class, or none; default: a row of each")
    images.add_argument(
        "--passes", type=positive_integer, help="also of video: steps of a state; default: as trained, or 50"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--min-p", type=float)
    add_thinking_arguments(parser.add_argument_group("thinking (default: as the model was trained)"))
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Generate; a single text is written as it comes."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    thinking = thinking_of(args)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: must be at least 1")
    opened = Run(args.checkpoint)
    from ebwm_dist.devices import default_device  # torch takes seconds, and the errors above come at once
    from ebwm_dist.inference.api import Predictor
    from ebwm_dist.inference.images import generate_pictures, of_images

    opened.device = default_device()
    if of_images(opened):
        given = {"--json": args.json, "--prompt": args.prompt != [""], "--observe": args.observe != 1}
        given["--think-steps or another option of thinking"] = thinking != Thinking()
        if unread := [name for name, is_given in given.items() if is_given]:
            raise UserError(f"{unread[0]}: not of images, which take --samples, --class, --passes and --seed")
        if args.out is None:
            raise UserError("--out: name a folder for the picture of the images")
        args.out.mkdir(parents=True, exist_ok=True)
        sizes = {"class_name": args.class_name, "passes": args.passes, "seed": args.seed}
        print(generate_pictures(opened, args.out, args.samples, **sizes))
        return
    if opened.config.model.embedding_dim is not None:
        roll_out(args, opened, thinking if args.passes is None else replace(thinking, steps=args.passes))
        return
    predictor = Predictor(opened.model, opened.config, opened.tokenizer)
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
        print(to_json(records if len(records) > 1 else records[0], ensure_ascii=False))
    elif streamed:
        print("" if shown else args.prompt[0])
    else:
        for prompt, text in zip(args.prompt, texts, strict=True):
            print(f"{prompt}{text.text}\n")


def roll_out(args: argparse.Namespace, run: Run, thinking: Thinking) -> None:
    """Continue held-out samples of video."""
    from ebwm_dist.inference.video import roll_out_held_out

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    found = roll_out_held_out(
        run,
        args.data,
        samples=args.samples,
        observed=args.observe,
        thinking=thinking,
        seed=args.seed,
        pictures=args.out is not None,
    )
    pictures = [] if args.out is None else found.write_pictures(args.out)
    records = found.records()
    if args.json:
        print(to_json(records))
        return
    for record in records:
        errors = " ".join(f"{error:.3f}" for error in record["squared_errors"])
        print(f"{record['sample']}: squared error of each new frame {errors}")
    for path in pictures:
        print(path)


if __name__ == "__main__":
    run_tool(main)
