"""Flower: its FedAvg strategy on its simulation, which runs clients in Ray's processes (https://flower.ai/docs/framework).

`run_simulation` is older than the command `flwr run` but runs the same engine, without a server and an application folder around it.
"""

# mypy: disable-error-code="import-not-found, untyped-decorator, no-untyped-call"
# The package lies in an environment of its own.
from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from resident import tree_peak_rss_mb
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from peers.job import Job, Watch, load_job, options


def train(network: nn.Module, batches: DataLoader[tuple[Tensor, ...]], lr: float) -> None:
    """Run one local epoch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    network.train()
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()


def client_app(path: Path) -> ClientApp:
    """Return the clients' side."""
    app = ClientApp()

    @app.train()
    def train_client(message: Message, context: Context) -> Message:
        job = load_job(path)
        job.network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        client = int(context.node_config["partition-id"])
        batches = DataLoader(TensorDataset(job.x[client], job.y[client]), batch_size=job.batch_size, shuffle=True)
        train(job.network, batches, job.lr)
        metrics = MetricRecord({"num-examples": len(job.y[client])})
        return Message(content=RecordDict({"arrays": ArrayRecord(job.network.state_dict()), "metrics": metrics}), reply_to=message)

    return app


def server_app(job: Job, watch: Watch) -> ServerApp:
    """Return the server's side, which reports when its rounds are done: Ray's processes are still there."""
    app, cohort = ServerApp(), job.cohorts.shape[1]

    def everyone(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        # Flower goes on without clients that failed.
        assert len(replies) == cohort, f"expected {cohort} clients to train but got {len(replies)}"
        return MetricRecord()

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord:
        if number:  # 0 is before the first
            job.network.load_state_dict(arrays.to_torch_state_dict())
            watch.round_ends(job.network)
        return MetricRecord()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=cohort / len(job.y),
            fraction_evaluate=0.0,
            min_train_nodes=cohort,  # a fraction is of those that have connected, at first of none
            min_available_nodes=len(job.y),
            train_metrics_aggr_fn=everyone,
        )
        strategy.start(grid, ArrayRecord(job.network.state_dict()), num_rounds=watch.warm + watch.rounds, evaluate_fn=after_round)
        watch.print("flwr", "ray", peak=tree_peak_rss_mb())

    return app


def main() -> None:
    """Run the rounds."""
    arguments = options(__doc__)
    job = load_job(arguments.job)
    watch = Watch(job.network, arguments.warm, arguments.rounds, job.steps)
    # Flower gives a client two cores if not told otherwise.
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}} if arguments.processes > 1 else None
    run_simulation(server_app(job, watch), client_app(arguments.job), num_supernodes=len(job.y), backend_config=resources)


if __name__ == "__main__":
    main()
