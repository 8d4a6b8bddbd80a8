"""The bare loop, as a system among others; under `torchrun` each process trains its part of a cohort and means are all-reduced."""

from __future__ import annotations

import copy
import os

import torch
from bare import BareLoop, BareThreads, ClientTurn
from torch import Tensor, distributed, nn

from fedlight.clients.layers import quicken_pooling
from fedlight.core.process import keep_freed_memory, usable_cores
from peers.job import Job, Watch, load_job, options


def plan_rounds(job: Job, rounds: int, rank: int, world: int) -> list[list[ClientTurn]]:
    """Return a process's clients and their batch orders, drawn before the clock starts."""
    generator, samples = torch.Generator().manual_seed(0), job.y.shape[1]

    def task(client: int) -> ClientTurn:
        return ClientTurn(client * samples + torch.randperm(samples, generator=generator), client)

    return [[task(client) for client in cohort[rank::world].tolist()] for cohort in job.cohorts[:rounds]]


def main() -> None:
    """Run the rounds."""
    arguments = options(__doc__)
    keep_freed_memory()  # as fedlight does
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")

    def share(mean: Tensor) -> None:
        if world > 1:
            distributed.all_reduce(mean)
            mean.div_(world)

    job = load_job(arguments.job)
    if arguments.engine in ("pooling", "threads"):
        quicken_pooling(job.network)

    def make(network: nn.Module) -> BareLoop:
        return BareLoop(network, job.x.flatten(0, 1), job.y.flatten(), job.lr, job.batch_size, share)

    copies = [copy.deepcopy(job.network) for _ in range(usable_cores() - 1)] if arguments.engine == "threads" else []
    loop = make(job.network)
    run = BareThreads([loop, *map(make, copies)]).run if copies else loop.run
    watch = Watch(job.network, arguments.warm, arguments.rounds, job.steps)
    for cohort in plan_rounds(job, arguments.warm + arguments.rounds, int(os.environ.get("RANK", "0")), world):
        run([cohort])
        watch.round_ends(loop.network)
    watch.print()
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
