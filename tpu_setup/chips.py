"""Checks that this host and all others see all chips, and that they can work together.

Run at the same time on every host of the slices: `python chips.py HOSTS CHIPS`. Each of them joins
the others, adds up a number from every chip, and fails with a line if a host or a chip is missing,
or the sum is wrong. That the chips are listed would not be enough: the TPU's runtime finds them
without the hosts knowing of each other.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def check(hosts: int, chips: int) -> str:
    """Says what is wrong, in one line; nothing if all is well.

    Args:
        hosts: processes that take part, one a host.
        chips: devices of all of them.
    """
    if coordinator := os.environ.get("DDK_COORDINATOR"):
        count, number = (int(os.environ[f"DDK_{x}"]) for x in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(coordinator, count, number)
    elif hosts > 1:
        jax.distributed.initialize()
    if jax.process_count() != hosts:
        return f"{jax.process_count()} hosts take part, {hosts} were asked for"
    if jax.device_count() != chips:
        return f"{jax.device_count()} chips are there, {chips} were asked for"
    mesh = Mesh(np.array(jax.devices()), ("chip",))
    numbers = np.arange(1, chips + 1, dtype=np.int32)
    sharding = NamedSharding(mesh, PartitionSpec("chip"))
    placed = jax.make_array_from_callback(numbers.shape, sharding, lambda index: numbers[index])
    total = int(
        jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(placed)
    )
    if total != chips * (chips + 1) // 2:
        return f"the sum over all chips is {total}, not {chips * (chips + 1) // 2}"
    return ""


def main() -> int:
    """Checks, and says how it went."""
    parser = argparse.ArgumentParser(description="Do all hosts see all chips?")
    parser.add_argument("hosts", type=int, help="hosts that take part")
    parser.add_argument("chips", type=int, help="chips of all hosts")
    wanted = parser.parse_args()
    here = socket.gethostname()
    try:
        wrong = check(wanted.hosts, wanted.chips)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        wrong = " ".join(str(error).split())[:300]
    if wrong:
        print(f"{here}: {wrong}", file=sys.stderr)
        return 1
    device = jax.local_devices()[0]
    print(
        f"{here}: host {jax.process_index()} of {wanted.hosts}, {jax.local_device_count()} of "
        f"{wanted.chips} chips ({device.device_kind})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
