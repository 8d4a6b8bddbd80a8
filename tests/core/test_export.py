from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fedlight.codecs import AutoencoderCodec, ChainCodec, IdentityCodec, LinearCodec, QuantizeCodec
from fedlight.core.bank import UpdateBank
from fedlight.core.codec import Codec, Context, Private
from fedlight.core.errors import CodecMismatchError
from fedlight.core.export import (
    DECODER_FILE,
    ENCODER_FILE,
    codec_from_config,
    codec_state,
    encoder_file,
    load_codec,
    load_decoder,
    load_encoder,
    restore_codec,
    save_codec,
)
from fedlight.core.layout import Layout

LAYOUT = Layout(("w", "b"), ((6, 5), (6,)))


def fitted(codec: Codec, seed: int = 0) -> Codec:
    bank = UpdateBank(torch.randn(6, 4, 36, generator=torch.Generator().manual_seed(seed)), LAYOUT)
    codec.fit(bank, lambda codec, bank: {})
    return codec


def chain() -> ChainCodec:
    return ChainCodec([AutoencoderCodec(3, block_size=12, width=4), QuantizeCodec(5)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_codec(fitted(chain()), tmp_path / "new" / "folder")
    return tmp_path / "new" / "folder"


def test_a_chain_comes_back_from_its_two_files(folder: Path) -> None:
    codec, again = fitted(chain()), load_codec(folder)
    assert again.describe() == codec.describe() and again.fitted
    update, context = torch.linspace(-1, 1, 36), Context(round=2, broadcast=codec.decoder.broadcast({}))
    messages = [c.encoder.encode_message(update, context, Private(torch.Generator().manual_seed(0))) for c in (codec, again)]
    assert messages[0] == messages[1]
    decoded = [c.decoder.decode_sum(messages, [1, 2], context, {}) for c in (codec, again)]
    assert torch.equal(*decoded)


def test_a_client_needs_the_encoders_file_alone_and_the_server_the_decoders(folder: Path) -> None:
    codec, context = fitted(chain()), Context(broadcast={"1": {"gain": 0.7}})
    update = torch.linspace(-1, 1, 36)
    moved = (folder / DECODER_FILE).rename(folder.parent / "server.safetensors")
    message = load_encoder(folder / ENCODER_FILE).encode_message(update, context, Private(torch.Generator().manual_seed(0)))
    (folder / ENCODER_FILE).unlink()
    decoder = load_decoder(moved)
    assert message == codec.encoder.encode_message(update, context, Private(torch.Generator().manual_seed(0)))
    state, other = {}, {}
    assert torch.equal(decoder.decode_sum([message], [1], context, state), codec.decoder.decode_sum([message], [1], context, other))
    assert state == other


@pytest.mark.parametrize("codec", [chain(), IdentityCodec(), LinearCodec(3, block_size=12)])
def test_the_download_weighs_what_the_encoders_file_weighs(codec: Codec, tmp_path: Path) -> None:
    save_codec(fitted(codec), tmp_path)
    assert len(encoder_file(codec)) == (tmp_path / ENCODER_FILE).stat().st_size
    assert len(encoder_file(codec)) > codec.encoder.byte_size()


def test_byte_size_counts_the_tensors() -> None:
    codec = fitted(LinearCodec(3, "pca", "flat", 0))
    assert codec.encoder.byte_size() == codec.decoder.byte_size() == 4 * 36 * 12


@pytest.mark.parametrize(
    "path", ["fedlight.codecs.Nothing", "no_such_package.Codec", "Codec", "", "torch.nn.Linear", "fedlight.core.codec.State"]
)
def test_a_class_path_that_names_no_codec_is_refused(path: str) -> None:
    with pytest.raises(CodecMismatchError, match=f"the class path of a codec but.*{path!r}"):
        codec_from_config({"class_path": path, "init_args": {}})


def test_an_argument_that_the_codec_does_not_have_is_refused() -> None:
    with pytest.raises(CodecMismatchError, match="IdentityCodec.*rate"):
        codec_from_config({"class_path": "fedlight.codecs.IdentityCodec", "init_args": {"rate": 3}})


def test_configuration_survives_json_with_nested_codecs() -> None:
    config = json.loads(json.dumps(chain().config()))
    again = codec_from_config(config)
    assert isinstance(again, ChainCodec) and again.config() == config
    assert [type(codec) for codec in again.codecs] == [AutoencoderCodec, QuantizeCodec]


@pytest.mark.parametrize("load", [load_encoder, load_decoder, load_codec])
def test_a_missing_file_is_named(load, tmp_path: Path) -> None:
    with pytest.raises(CodecMismatchError, match=r"Expected an exported codec at .*absent"):
        load(tmp_path / "absent")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_corrupt_file_is_refused(folder: Path, length: int) -> None:
    whole = (folder / ENCODER_FILE).read_bytes()
    (folder / ENCODER_FILE).write_bytes(whole[:length])
    for load, path in ((load_encoder, folder / ENCODER_FILE), (load_codec, folder)):
        with pytest.raises(CodecMismatchError, match="could not read it"):
            load(path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / ENCODER_FILE)
    with pytest.raises(CodecMismatchError, match="no codec description"):
        load_encoder(tmp_path / ENCODER_FILE)


@pytest.mark.parametrize("codec", [chain(), LinearCodec(3, block_size=12)])
def test_the_other_halfs_file_is_refused(codec: Codec, tmp_path: Path) -> None:
    save_codec(fitted(codec), tmp_path)
    with pytest.raises(CodecMismatchError, match="Expected an exported encoder .* holds the codec's decoder"):
        load_encoder(tmp_path / DECODER_FILE)
    with pytest.raises(CodecMismatchError, match="Expected an exported decoder .* holds the codec's encoder"):
        load_decoder(tmp_path / ENCODER_FILE)


def test_halves_of_different_versions_are_refused(folder: Path, tmp_path: Path) -> None:
    save_codec(fitted(fitted(chain())), tmp_path / "refreshed")
    (tmp_path / "refreshed" / DECODER_FILE).replace(folder / DECODER_FILE)
    with pytest.raises(CodecMismatchError, match="different codecs or versions"):
        load_codec(folder)


def test_halves_fitted_to_different_banks_are_refused(folder: Path, tmp_path: Path) -> None:
    save_codec(fitted(chain(), seed=1), tmp_path / "other")
    (tmp_path / "other" / DECODER_FILE).replace(folder / DECODER_FILE)
    with pytest.raises(CodecMismatchError, match="different codecs or versions"):
        load_codec(folder)


def test_saving_again_replaces_the_files(folder: Path) -> None:
    codec = fitted(chain(), seed=1)
    save_codec(codec, folder)
    assert load_codec(folder).encoder.fingerprint == codec.encoder.fingerprint


@pytest.mark.parametrize("codec", [chain(), LinearCodec(3, block_size=12)])
def test_each_half_alone_has_the_codecs_digest(codec: Codec, tmp_path: Path) -> None:
    save_codec(fitted(codec), tmp_path)
    assert load_encoder(tmp_path / ENCODER_FILE).digest == load_decoder(tmp_path / DECODER_FILE).digest == codec.encoder.digest


def test_an_encoder_that_is_not_what_its_digest_says_is_refused(folder: Path) -> None:
    """Whoever swaps the tensors and leaves the rest of the file cannot pass them off as the encoder that others hold."""
    with safe_open(folder / ENCODER_FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / ENCODER_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / ENCODER_FILE, metadata)
    with pytest.raises(CodecMismatchError, match="the digest that it was exported with"):
        load_encoder(folder / ENCODER_FILE)


def test_exported_tensors_are_plain_safetensors(folder: Path) -> None:
    tensors = load_file(folder / DECODER_FILE)
    assert tensors.keys() == fitted(chain()).decoder.state_dict().keys()


def test_a_checkpoint_of_another_configuration_is_refused() -> None:
    state = codec_state(fitted(LinearCodec(3, block_size=12)))
    codec = LinearCodec(4, block_size=12)
    with pytest.raises(CodecMismatchError, match=r'"ratio": 3.*but the configuration says.*"ratio": 4'):
        restore_codec(codec, state)
    assert not codec.bound


def test_a_checkpoint_keeps_its_tensors_when_the_codec_is_fitted_again() -> None:
    codec = fitted(LinearCodec(3, block_size=12))
    state = codec_state(codec)
    kept = {key: value.clone() for key, value in state["encoder"].items()}
    fitted(codec, seed=1)
    assert all(torch.equal(state["encoder"][key], kept[key]) for key in kept)


def test_a_codec_without_shapes_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CodecMismatchError, match=r"call bind\(layout\) first"):
        save_codec(chain(), tmp_path)
