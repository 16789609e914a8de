"""The machines that a plan is made for: memory, peak and bandwidths, from a table that a file can extend."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ebwm_dist.errors import UserError
from ebwm_dist.files import printable

_TABLE = Path(__file__).with_name("machines.yaml")
_GIB, _GIGA, _MICRO = 2**30, 1e9, 1e-6


@dataclass(frozen=True)
class Machine:
    """A kind of GPU, and what connects GPUs of this kind."""

    name: str
    memory: float
    """Bytes of a GPU that programs can have."""
    peak_flops: float
    """Dense bf16 peak of a GPU, in FLOP/s."""
    link: float
    """Bytes per second between the GPUs of a node, in each direction."""
    link_latency: float
    """Seconds of a message between them."""
    network: float
    """Bytes per second between a node and others, in each direction, of all its GPUs together."""
    network_latency: float
    gpus_per_node: int


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind."""

    machine: Machine
    gpus: int
    gpus_per_node: int

    @staticmethod
    def of(machine: Machine, gpus: int, nodes: int | None) -> Cluster:
        """Return the GPUs on so many nodes, or on full ones; raises a UserError if they do not fit."""
        if gpus < 1:
            raise UserError(f"--gpus {gpus}: at least 1")
        if nodes is not None and (nodes < 1 or gpus % nodes):
            raise UserError(f"--gpus {gpus} on --nodes {nodes}: each node must have as many GPUs as the others")
        if nodes is None:
            return Cluster(machine, gpus, min(gpus, machine.gpus_per_node))
        if gpus // nodes > machine.gpus_per_node:
            most = f"a node of {machine.name} has {machine.gpus_per_node} at most"
            raise UserError(f"--gpus {gpus} on --nodes {nodes}: {gpus // nodes} GPUs each, but {most} (--machines)")
        return Cluster(machine, gpus, gpus // nodes)

    @property
    def nodes(self) -> int:
        """Return the number of nodes."""
        return -(-self.gpus // self.gpus_per_node)


def load_machine(name: str, extra: Path | None = None) -> Machine:
    """Return the machine of this name, in any case, from the table or from the file `extra`, which wins.

    Raises:
        UserError: it is not known, or the file is not such a table.
    """
    table = _read(_TABLE) | (_read(extra) if extra else {})
    known = {key.lower(): key for key in table}
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        meant = f"did you mean {known[close[0]]}? " if close else ""
        raise UserError(
            f"--gpu {printable(name)}: {meant}known are {', '.join(table)}; describe others in a file for --machines"
        )
    key = known[name.lower()]
    values = table[key]
    return Machine(
        name=key,
        memory=values["memory_gib"] * _GIB,
        peak_flops=values["peak_tflops"] * 1e12,
        link=values["link_gbps"] * _GIGA,
        link_latency=values["link_us"] * _MICRO,
        network=values["network_gbps"] * _GIGA,
        network_latency=values["network_us"] * _MICRO,
        gpus_per_node=int(values["gpus_per_node"]),
    )


_COLUMNS = ("memory_gib", "peak_tflops", "link_gbps", "link_us", "network_gbps", "network_us", "gpus_per_node")
assert len(_COLUMNS) == len(fields(Machine)) - 1


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return the rows of a table; raises a UserError that names what is wrong in it."""
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)} must hold a row for each machine, NAME: {{{', '.join(_COLUMNS)}}}")
    for name, row in content.items():
        if not isinstance(row, dict) or set(row) != set(_COLUMNS):
            raise UserError(f"{printable(path)}, {name}: needs exactly {', '.join(_COLUMNS)}")
        for column, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise UserError(f"{printable(path)}, {name}: {column} = {value!r} must be a number above 0")
    return {str(name): row for name, row in content.items()}
