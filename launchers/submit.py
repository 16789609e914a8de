"""Submit a run to a Ray cluster and follow it, or look after those that are there.

python launchers/submit.py --config configs/ebt_1b.yaml --num-nodes 4 --gpus-per-node 8 [key=value ...]
python launchers/submit.py status|logs|stop NAME
python launchers/submit.py list
"""

from __future__ import annotations

import argparse
import os
import sys

from ebwm_dist.cluster.jobs import Jobs, arguments_of_cluster
from ebwm_dist.config.loading import load_config
from ebwm_dist.errors import UserError

ACTIONS = ("status", "logs", "stop", "list")


def main() -> int:
    """Parse the command line, and submit or ask."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--address", default=address, help="of the cluster's dashboard (default: %(default)s)")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, parents=[common])
    words = common.parse_known_args()[1]
    asks = bool(words) and words[0] in ACTIONS
    if asks:
        parser.add_argument("action", choices=ACTIONS)
        parser.add_argument("name", nargs="*" if words[0] == "list" else 1, help="of the run")
    else:
        _add_arguments(parser)
    args = parser.parse_intermixed_args()
    try:
        return _ask(args) if asks else _submit(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nthe job goes on; `submit.py stop NAME` ends it", file=sys.stderr)
    return 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--num-nodes", type=int, default=1, help="nodes to train on (default: 1)")
    parser.add_argument("--min-nodes", type=int, help="go on with as few as this while nodes are missing")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of each node, and so workers")
    parser.add_argument("--cpus-per-node", type=int, help="workers of each node where there are no GPUs")
    parser.add_argument("--name", help="of the run and its job (default: the name of run_dir)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="variable that the run gets from here"
    )
    parser.add_argument("--installed", action="store_true", help="use the package that is installed on the nodes")
    parser.add_argument("--detach", action="store_true", help="do not follow the logs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.max_steps=1000")


def _submit(args: argparse.Namespace) -> int:
    cluster = arguments_of_cluster(args.num_nodes, args.min_nodes, args.gpus_per_node, args.cpus_per_node)
    config = load_config(args.config, [*args.overrides, *cluster])
    if missing := [name for name in args.env if name not in os.environ]:
        raise UserError(f"--env {missing[0]}: no such variable is set here")
    jobs = Jobs(args.address)
    name, found = jobs.submit(config, args.name, args.installed, {name: os.environ[name] for name in args.env})
    print(found, flush=True)
    return 0 if args.detach or found.endswith("finished already") else jobs.follow(name)


def _ask(args: argparse.Namespace) -> int:
    jobs = Jobs(args.address)
    if args.action == "logs":
        return jobs.follow(args.name[0])
    told = jobs.list() if args.action == "list" else [getattr(jobs, args.action)(args.name[0])]
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
