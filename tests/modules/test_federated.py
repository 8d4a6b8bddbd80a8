import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from fedlight.callbacks import GradientDecoder, GradientEncoder, codec_callbacks
from fedlight.clients import FedAvg, FedSGD
from fedlight.clients.personal import personal_forward
from fedlight.clients.store import ClientStore
from fedlight.codecs import IdentityCodec
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import flatten, float_buffers
from fedlight.data import IID
from tests.federation import Fixed, Spy, federated, federated_data, learned, mlp, pretraining, run, trainer, weights_of


def test_a_fedavg_round_is_the_loop_one_would_write_by_hand():
    """w <- mean_i (w after two epochs of full-batch SGD on client i), from the paper's Algorithm 1."""
    module, data = federated(algorithm=FedAvg(lr=0.1, epochs=2, batch_size=1000)), federated_data()
    start = copy.deepcopy(module.network)
    run(module, rounds=1, data=data)
    ends = []
    for client in data.cohort(0):
        x, y = data.client_data(int(client))
        local = copy.deepcopy(start)
        optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(local(x), y).backward()
            optimizer.step()
        ends.append(weights_of(local))
    torch.testing.assert_close(weights_of(module), torch.stack(ends).mean(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights_of(module), weights_of(start), atol=1e-3)


@pytest.mark.parametrize(("weighting", "partitioner"), [("samples", None), ("equal", IID())])
def test_a_fedsgd_round_is_a_gradient_step_on_the_pooled_data(weighting, partitioner):
    changes = {"partitioner": partitioner, "num_clients": 10} if partitioner else {}
    data = federated_data(**changes)
    module = federated(algorithm=FedSGD(), weighting=weighting, server_optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    pooled = copy.deepcopy(module.network)
    run(module, rounds=1, data=data)
    sizes = {data.client_size(client) for client in range(data.num_population)}
    assert (len(sizes) == 1) == (weighting == "equal")  # equal weights only are the pooled gradient where sizes are equal
    F.cross_entropy(pooled(data.x), data.y).backward()
    torch.optim.SGD(pooled.parameters(), lr=0.5).step()
    torch.testing.assert_close(weights_of(module), weights_of(pooled), rtol=1e-5, atol=1e-6)


def test_equal_weighting_is_not_the_pooled_gradient_for_clients_of_unequal_size():
    equal, samples = (federated(algorithm=FedSGD(), weighting=weighting) for weighting in ("equal", "samples"))
    run(equal, rounds=1), run(samples, rounds=1)
    assert not torch.allclose(weights_of(equal), weights_of(samples), atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.Adagrad(p, lr=0.05),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
    ids=["nesterov", "adam", "adamw", "adagrad", "rmsprop"],
)
def test_the_server_optimizer_takes_the_aggregate_for_a_gradient(make):
    module = federated(server_optimizer=make)
    by_hand = copy.deepcopy(module.network)
    spy = run(module, rounds=3)
    optimizer = make(list(by_hand.parameters()))
    for number in range(3):
        for parameter, piece in zip(by_hand.parameters(), module.layout.split(spy.aggregates[number]), strict=True):
            parameter.grad = piece.clone()
        optimizer.step()
    assert torch.equal(weights_of(module), weights_of(by_hand))


def test_the_server_scheduler_steps_once_a_round_and_global_step_counts_rounds():
    module = federated(server_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    before = weights_of(module)
    spy = Spy()
    runner = trainer(3, callbacks=[spy])
    runner.fit(module, datamodule=federated_data())
    assert runner.global_step == 3
    assert module.optimizers().param_groups[0]["lr"] == 0.125
    for number, lr in enumerate((1.0, 0.5, 0.25)):
        torch.testing.assert_close(spy.weights[number], before - lr * spy.aggregates[number])
        before = spy.weights[number]


def test_the_order_of_callbacks_does_not_matter():
    ends = []
    for order in ((0, 1), (1, 0)):
        codec = learned()
        pair = codec_callbacks(codec)
        module = federated(codec=codec)
        run(module, callbacks=[pair[i] for i in order])
        ends.append(weights_of(module))
    module = federated(codec=learned())
    run(module)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], weights_of(module))


@pytest.mark.parametrize("half", [GradientEncoder, GradientDecoder])
@pytest.mark.parametrize("own", [True, False], ids=["the module's codec", "another codec"])
def test_one_half_alone_is_refused(half, own):
    codec = IdentityCodec()
    module = federated(codec=codec)
    with pytest.raises(ConfigurationError, match="one GradientEncoder and one GradientDecoder"):
        trainer(callbacks=[half(codec if own else IdentityCodec())]).fit(module, datamodule=federated_data())


def test_a_pair_of_another_codec_than_the_modules_is_refused():
    with pytest.raises(ConfigurationError, match="model.codec"):
        trainer(callbacks=[*codec_callbacks(learned())]).fit(federated(), datamodule=federated_data())


def test_a_module_without_rounds_is_refused():
    with pytest.raises(ConfigurationError, match="Expected a FederatedModule but got BoringModel"):
        trainer(callbacks=[*codec_callbacks(IdentityCodec())], max_epochs=1).fit(BoringModel())


def test_data_that_is_not_federated_is_refused():
    with pytest.raises(ConfigurationError, match="Expected a FederatedDataModule, or the data.*but got `train_dataloaders`"):
        trainer().fit(federated(), train_dataloaders=[torch.zeros(1)])


# -- law 5 -------------------------------------------------------------------------------------------------------------


def uploads_of(clients: list[int], seed_before: int = 0, **changes):
    codec = learned()
    module = federated(mlp(dropout=0.5), codec=codec, **changes)
    torch.manual_seed(seed_before)
    spy = run(module, rounds=1, data=federated_data(sampler=Fixed(clients)))
    return spy, module


def test_a_client_does_not_depend_on_who_else_takes_part_nor_in_which_order():
    reference, module = uploads_of([1, 3, 5, 7])
    for clients in ([7, 5, 3, 1], [3], [3, 7]):
        spy, other = uploads_of(clients, seed_before=len(clients))
        for client in clients:
            mine, same = spy.replies[0, 0, client], reference.replies[0, 0, client]
            assert torch.equal(mine.simulation.update, same.simulation.update)
            assert mine.payload == same.payload
            assert mine.simulation.loss == same.simulation.loss
        if len(clients) == 4:
            assert torch.equal(weights_of(module), weights_of(other))


def test_integer_codes_of_parts_of_a_cohort_add_up_to_the_codes_of_the_whole():
    whole = uploads_of([1, 3, 5, 7])[0].totals[0]
    parts = [uploads_of(clients)[0].totals[0] for clients in ([1, 3], [5], [7])]
    assert whole.dtype == torch.int64
    assert torch.equal(sum(parts), whole)


def test_dropout_differs_between_clients_rounds_and_seeds():
    """Each draws its own masks: with the same data, start and batches, only the masks can differ."""
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    data = federated_data()
    data.setup()
    data.train_partition = type(data.train_partition)(np.tile(np.arange(20), 8), np.arange(9) * 20)
    module = federated(network, algorithm=FedSGD(), server_optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    spy = run(module, rounds=2, data=data)
    updates = [reply.simulation.update for reply in spy.replies.values()]
    assert len(updates) == 16
    assert not any(torch.equal(updates[0], other) for other in updates[1:])
    again = run(federated(copy.deepcopy(network), algorithm=FedSGD(), seed=4), rounds=1, data=data)
    assert not torch.equal(again.replies[0, 0, 0].simulation.update, updates[0])


def test_rounds_and_pretraining_leave_the_global_generators_alone():
    module = federated(mlp(dropout=0.5), codec=learned())
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    run(module)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_a_run_does_not_depend_on_the_global_generator():
    ends = []
    for seed in (1, 2):
        module = federated(mlp(dropout=0.5), codec=learned())
        torch.manual_seed(seed)
        run(module)
        ends.append(weights_of(module))
    assert torch.equal(*ends)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_batch_norm_statistics_are_averaged_over_the_cohort(weighting):
    module = federated(mlp(norm=True), weighting=weighting)
    spy = run(module, rounds=1)
    replies = [spy.replies[0, 0, client] for client in range(8)]
    assert {reply.weight is None for reply in replies} == {weighting == "equal"}, "a weight that all have is not sent"
    weights = torch.tensor([float(reply.weight or 1) for reply in replies])
    assert (weights.unique().numel() > 1) == (weighting == "samples")
    expected = (torch.stack([reply.buffers for reply in replies]) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(flatten(float_buffers(module.network)), expected)
    assert not torch.allclose(expected[:8], torch.zeros(8), atol=1e-3)


def personal_logits(module, client: int, x: torch.Tensor) -> torch.Tensor:
    """Return logits of the global model with the layers that a client kept, as evaluation does."""
    return personal_forward(module.network, module.task.norm, module.store.peek(client)["norm"], x)


def test_local_batch_norm_stays_with_the_client():
    """FedBN: no statistics are sent, the update is zero there, and the client goes on from its own layers."""
    module = federated(mlp(norm=True), batch_norm="local")
    start = {name: value.clone() for name, value in module.network.state_dict().items()}
    data = federated_data(client_holdout=0.3)
    spy = run(module, rounds=2, data=data)
    end = module.network.state_dict()
    norm = [name for name in start if name.startswith("1.")]
    assert len(norm) == 5
    assert all(torch.equal(start[name], end[name]) for name in norm)
    assert not torch.equal(start["0.weight"], end["0.weight"])
    assert all(len(reply.buffers) == 0 for reply in spy.replies.values())
    pieces = dict(zip(module.layout.names, module.layout.split(spy.aggregates[1]), strict=True))
    assert not pieces["1.weight"].any() and not pieces["1.bias"].any() and pieces["0.weight"].any()
    kept = [module.store.peek(client)["norm"] for client in range(8)]
    assert all(state["norm_weights"].shape == (16,) and state["norm_buffers"].shape == (16,) for state in kept)
    assert not torch.equal(kept[0]["norm_buffers"], kept[1]["norm_buffers"])

    personal = copy.deepcopy(module.network).eval()
    weight, bias = kept[2]["norm_weights"].split(8)
    mean, variance = kept[2]["norm_buffers"].split(8)
    personal.load_state_dict(end | {"1.weight": weight, "1.bias": bias, "1.running_mean": mean, "1.running_var": variance})
    module.eval()
    torch.testing.assert_close(personal_logits(module, 2, data.x[:9]), personal(data.x[:9]))
    assert not torch.allclose(personal_logits(module, 2, data.x[:9]), personal_logits(module, 3, data.x[:9]))


def test_local_batch_norm_is_evaluated_client_by_client_with_its_own_layers():
    module = federated(mlp(norm=True), batch_norm="local")
    data = federated_data(client_holdout=0.3)
    runner = trainer(3, limit_val_batches=1.0)
    runner.fit(module, datamodule=data)
    figures = runner.validate(module, datamodule=data, verbose=False)[0]
    module.eval()
    accuracies = []
    for client in range(8):
        index = torch.from_numpy(data.holdout[client])
        with torch.no_grad():
            accuracies.append(float((personal_logits(module, client, data.x[index]).argmax(-1) == data.y[index]).float().mean()))
    assert len(set(accuracies)) > 1
    assert figures["val/client_accuracy_mean"] == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_local_batch_norm_is_in_the_checkpoint(tmp_path):
    data, changes = federated_data(client_holdout=0.3), {"batch_norm": "local"}
    module = federated(mlp(norm=True), **changes)
    runner = trainer(2)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "two.ckpt")
    module = federated(mlp(norm=True), **changes)
    trainer(4).fit(module, datamodule=federated_data(client_holdout=0.3), ckpt_path=tmp_path / "two.ckpt", weights_only=False)
    straight = federated(mlp(norm=True), **changes)
    run(straight, rounds=4, data=federated_data(client_holdout=0.3))
    assert torch.equal(weights_of(module), weights_of(straight))
    for client in range(8):
        mine, theirs = module.store.peek(client)["norm"], straight.store.peek(client)["norm"]
        assert torch.equal(mine["norm_buffers"], theirs["norm_buffers"])


def test_a_draft_of_client_state_is_kept_only_if_the_round_succeeds():
    store = ClientStore()
    store.draft(1)["seen"] = torch.ones(1)
    store.commit(store.take_draft(()))
    assert store.peek(1) == {}
    for client in (1, 2, 3):
        store.draft(client)["seen"] = torch.ones(1)
    store.drop(2)
    store.commit(store.take_draft({1, 2}))
    assert set(store.state_dict()["kept"]) == {1} and store.state_dict()["drafts"] == {}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_clients": 0}, "^Expected `min_clients` >= 1 but got 0$"),
        ({"max_attempts": 0}, "`max_attempts` >= 1 but got 0$"),
        ({"sim_every": -1}, "`sim_every` >= 0 but got -1$"),
    ],
)
def test_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        federated(**changes)


def test_a_trained_codec_beside_another_configuration_is_refused(tmp_path):
    from fedlight.core.export import save_codec

    module = federated(codec=learned())
    run(module, rounds=1)
    save_codec(module.codec, tmp_path)
    assert federated(codec=learned(), codec_path=str(tmp_path)).codec.fitted
    with pytest.raises(ConfigurationError, match="leave one out"):
        federated(codec=learned(bits=8), codec_path=str(tmp_path))


def test_a_round_with_too_few_clients_is_repeated_with_another_cohort_and_counts_once():
    from fedlight.data import Poisson

    module, spy = federated(min_clients=5, max_attempts=200), Spy()
    runner = trainer(3, callbacks=[spy, pretraining()])
    runner.fit(module, datamodule=federated_data(sampler=Poisson(0.4)))
    attempts = {number: max(a for n, a, _ in spy.replies if n == number) for number in range(3)}
    assert runner.global_step == 3
    assert max(attempts.values()) > 0
    for number, last in attempts.items():
        assert sum((n, a) == (number, last) for n, a, _ in spy.replies) >= 5


def test_on_the_cpu_freed_memory_is_kept_from_the_first_round_on(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr("fedlight.modules.federated.keep_freed_memory", lambda: calls.append(True))
    run(federated(), rounds=1, data=federated_data())
    assert calls == [True]
