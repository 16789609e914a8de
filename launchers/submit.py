"""Submit a run to a Ray cluster and follow it, or list, show and stop submitted runs.

python launchers/submit.py --config configs/ebt_1b.yaml --num-nodes 4 --gpus-per-node 8 [key=value ...]
python launchers/submit.py status|logs|stop NAME
python launchers/submit.py list
"""

from __future__ import annotations

import argparse
import os
import sys

from ebwm_dist.cluster.jobs import Jobs
from ebwm_dist.config.loading import load_config, override_keys
from ebwm_dist.errors import UserError

ACTIONS = ("status", "logs", "stop", "list")
CLUSTER_OPTIONS = {
    "num_nodes": "nodes to train on",
    "min_nodes": "go on with as few as this while nodes are missing",
    "gpus_per_node": "GPUs of each node, and so workers",
    "cpus_per_node": "workers of each node where there are no GPUs",
}


def main() -> int:
    """Parse the command line; submit a run or act on submitted ones."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--address", default=address, help="of the cluster's dashboard (default: %(default)s)")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, parents=[common])
    words = common.parse_known_args()[1]
    is_action = bool(words) and words[0] in ACTIONS
    if is_action:
        parser.add_argument("action", choices=ACTIONS)
        parser.add_argument("name", nargs="*" if words[0] == "list" else 1, help="of the run")
    else:
        _add_arguments(parser)
    args = parser.parse_intermixed_args()
    try:
        return _act(args) if is_action else _submit(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nthe job goes on; `submit.py stop NAME` ends it", file=sys.stderr)
    return 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    for name, meaning in CLUSTER_OPTIONS.items():
        parser.add_argument(_option(name), type=int, help=f"{meaning} (default: cluster.{name} of the configuration)")
    parser.add_argument("--name", help="of the run and its job (default: the name of run_dir)")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="variable that the run gets from here"
    )
    parser.add_argument("--installed", action="store_true", help="use the package that is installed on the nodes")
    parser.add_argument(
        "--check-hardware", action="store_true", help="look for slow or wrong devices in a job NAME-hardware; no run"
    )
    parser.add_argument("--detach", action="store_true", help="do not follow the logs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.max_steps=1000")


def _submit(args: argparse.Namespace) -> int:
    config = load_config(args.config, [*args.overrides, *_cluster_overrides(args)])
    if missing := [name for name in args.env if name not in os.environ]:
        raise UserError(f"--env {missing[0]}: no such variable is set here")
    jobs = Jobs(args.address)
    variables = {name: os.environ[name] for name in args.env}
    name, outcome = jobs.submit(config, args.name, args.installed, variables, args.check_hardware)
    print(outcome, flush=True)
    return 0 if args.detach or outcome.endswith("finished already") else jobs.follow(name)


def _cluster_overrides(args: argparse.Namespace) -> list[str]:
    """Return the options of the cluster as overrides; a key is set by its option or by an override, not by both."""
    given = {key: text for text in args.overrides for key in override_keys(text)}
    overrides = {name: getattr(args, name) for name in CLUSTER_OPTIONS if getattr(args, name) is not None}
    for name, value in overrides.items():
        if (twice := given.get(f"cluster.{name}")) is not None:
            raise UserError(f"{_option(name)} {value}: the command also sets {twice}; leave out one of the two")
    return [f"cluster.{name}={value}" for name, value in overrides.items()]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _act(args: argparse.Namespace) -> int:
    jobs = Jobs(args.address)
    if args.action == "logs":
        return jobs.follow(args.name[0])
    lines = jobs.list() if args.action == "list" else [getattr(jobs, args.action)(args.name[0])]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
