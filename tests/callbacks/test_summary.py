import json

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from fedlight.callbacks import RunSummary
from fedlight.core.codec import Context, Private
from fedlight.core.export import load_decoder, load_encoder
from tests.federation import federated, federated_data, learned, mlp, pretraining, trainer, weights_of

KEYS = {
    "val_accuracy",
    "test_accuracy",
    "rounds",
    "clients",
    "seed",
    "uplink_bytes_per_client",
    "uplink_bytes",
    "downlink_bytes",
    "total_bytes",
    "codec_bytes",
    "encoder_bytes",
    "additive",
    "uplink_ratio",
    "train_seconds",
    "pretrain_seconds",
    "versions",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tested run of a network with BatchNorm: (module, folder)."""
    folder = tmp_path_factory.mktemp("summary")
    module, data = federated(mlp(norm=True), codec=learned()), federated_data(client_holdout=0.2)
    runner = trainer(
        4,
        callbacks=[RunSummary(), pretraining()],
        logger=CSVLogger(folder, name="run"),
        limit_val_batches=1.0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    runner.fit(module, datamodule=data)
    runner.test(module, datamodule=data, verbose=False)
    return module, folder / "run" / "version_0"


def test_every_promised_figure_is_there_and_right(finished):
    module, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert (summary["rounds"], summary["clients"], summary["seed"]) == (4, 8, 3)
    traffic = module.server_state.traffic
    assert (summary["uplink_bytes"], summary["downlink_bytes"]) == (traffic.uplink, traffic.downlink)
    assert summary["total_bytes"] == traffic.uplink + traffic.downlink
    assert summary["codec_bytes"] == traffic.codec > 0
    assert summary["encoder_bytes"] == len((folder / "encoder.safetensors").read_bytes())
    assert summary["additive"] is True
    assert summary["uplink_bytes_per_client"] == traffic.uplink / 32
    assert summary["uplink_ratio"] == 4 * module.layout.dim / summary["uplink_bytes_per_client"]
    assert summary["train_seconds"] > 0 and summary["pretrain_seconds"] > 0
    assert set(summary["versions"]) == {"fedlight", "lightning", "torch"}
    assert 0 <= summary["test_accuracy"] <= 1
    assert "val_client_accuracy_mean" in summary


def test_the_model_file_loads_into_the_network(finished):
    module, folder = finished
    fresh = mlp(norm=True)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(weights_of(fresh), weights_of(module))
    x = torch.randn(5, 6)
    assert torch.equal(fresh.eval()(x), module.eval()(x))


def test_one_file_encodes_what_the_other_alone_decodes(finished):
    """A phone has encoder.safetensors, a server decoder.safetensors; nothing else goes between them but bytes."""
    module, folder = finished
    encoder, decoder = load_encoder(folder / "encoder.safetensors"), load_decoder(folder / "decoder.safetensors")
    update = torch.randn(module.layout.dim) * 0.01
    context = Context(round=4, broadcast=decoder.broadcast({}))
    messages = [encoder.encode_message(update, context, Private(torch.Generator().manual_seed(i))) for i in range(3)]
    decoded = decoder.decode_sum(messages, [1, 1, 1], context, {})
    own = [module.codec.encoder.encode_message(update, context, Private(torch.Generator().manual_seed(i))) for i in range(3)]
    assert messages == own
    torch.testing.assert_close(decoded, module.codec.decoder.decode_sum(own, [1, 1, 1], context, {}))
    assert len(messages[0]) < 4 * module.layout.dim / 2


def test_a_network_that_shares_weights_can_be_exported(tmp_path):
    network = mlp()
    network[3].extra = network[3].bias
    module = federated(network)
    trainer(1, callbacks=[RunSummary()], logger=CSVLogger(tmp_path, name="run")).fit(module, datamodule=federated_data())
    assert "3.extra" in load_file(tmp_path / "run" / "version_0" / "model.safetensors")


def test_without_a_logger_the_figures_go_to_the_default_folder_or_nowhere(tmp_path):
    callback = RunSummary()
    trainer(1, callbacks=[callback], fast_dev_run=True, default_root_dir=tmp_path).fit(federated(), datamodule=federated_data())
    assert list(tmp_path.iterdir()) == []
