"""The replicas of the language model on a mesh, and which processes compute together.

There is one replica for each index of mesh axis `data`, cut over the devices of axis `model`.
Replicas don't communicate. The program that a replica runs, and so the bits of its result, depends
on the number of sequences it is given and of devices it is cut over; the number of replicas and
processes makes no difference.

A team is the processes that hold one replica together, or a single process that holds one or more
whole replicas. Teams compute different buckets and wait for each other only at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from activation_cache.config import MeshConfig
from activation_cache.mesh import devices_of_processes, make_mesh
from activation_cache.runtime.errors import UserError


@dataclass(frozen=True)
class Placement:
    """A process's part of the mesh.

    Attributes:
        meshes: one for each replica that has devices of this process.
        team: the number of this process's team, out of `num_teams`.
        member: the number of this process in its team, out of `num_members`; the members of a team
            call everything that computes in the same order.
    """

    meshes: list[Mesh]
    team: int
    num_teams: int
    member: int
    num_members: int


def place_replicas(config: MeshConfig) -> Placement:
    """This process's part of a mesh.

    Raises:
        UserError: JAX sees fewer devices than the mesh needs, or a replica would take a part of
            the devices of several processes.
    """
    groups = devices_of_processes(config)
    index, each, size = jax.process_index(), len(groups[0]), config.model
    if each % size == 0:
        own = groups[index]
        meshes = [make_mesh(own[start : start + size]) for start in range(0, each, size)]
        return Placement(meshes, team=index, num_teams=len(groups), member=0, num_members=1)
    members = size // each
    if size % each:
        raise UserError(
            f"mesh axis 'model' (size {size}) takes {size} of the {each} devices that each of "
            f"{len(groups)} processes has, so that a replica of the language model would take a "
            f"part of a process's devices: make mesh.model a multiple or a divisor of {each}"
        )
    team, member = divmod(index, members)
    devices = [d for group in groups[team * members : (team + 1) * members] for d in group]
    return Placement([make_mesh(devices)], team, len(groups) // members, member, members)
