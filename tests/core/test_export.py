from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlight.codecs import AutoencoderCodec, ChainCodec, CountSketchCodec, IdentityCodec, LinearCodec, QuantizeCodec
from fedlight.core import export
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
    load_replaying,
    restore_codec,
    save_codec,
)
from fedlight.core.layout import Layout
from tests.benchmarks.mutations import resident

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
    assert len(encoder_file(codec)) > sum(t.nbytes for t in codec.encoder.state_dict().values())


def test_byte_size_counts_the_tensors() -> None:
    codec = fitted(LinearCodec(3, "pca", "flat", 0))
    assert [sum(t.nbytes for t in half.state_dict().values()) for half in (codec.encoder, codec.decoder)] == [4 * 36 * 12] * 2


@pytest.mark.parametrize(
    "path", ["fedlight.codecs.Nothing", "no_such_package.Codec", "Codec", "", "torch.nn.Linear", "fedlight.core.codec.State"]
)
def test_a_class_path_that_names_no_codec_is_refused(path: str) -> None:
    with pytest.raises(CodecMismatchError, match=f"the class path of a codec but.*{path!r}"):
        codec_from_config({"class_path": path, "init_args": {}})


MODULE = """
from pathlib import Path
Path({marker!r}).write_text("this was run")
from fedlight.codecs import IdentityCodec
class Mine(IdentityCodec):
    pass
"""


def described(half: str, path: Path, description: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a half's file that describes this; a decoder's digest of its own fits."""
    metadata = {"half": half, "codec": json.dumps(description), "digest": "00" * 32}
    if half == "decoder":
        metadata["own"] = export._decoder_digest(description, metadata["digest"], tensors or {})
    save_file(tensors or {}, path, metadata)
    return path


def describing(class_path: str, shape: tuple[int, ...] = (36,), plan: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    config = {"class_path": class_path, "init_args": arguments}
    return {"config": config, "layout": Layout(("w",), (shape,)).to_json(), "plan": plan or {}, "version": 1}


def test_a_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "innocent_looking.py").write_text(MODULE.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    description = describing("innocent_looking.Mine")
    encoder = described("encoder", tmp_path / ENCODER_FILE, description)
    decoder = described("decoder", tmp_path / DECODER_FILE, description)
    for load, path in ((load_encoder, encoder), (load_decoder, decoder), (load_codec, tmp_path)):
        with pytest.raises(CodecMismatchError, match=r"'innocent_looking.Mine' is none of `fedlight.codecs`.*register_codec"):
            load(path)
    assert not marker.exists() and "innocent_looking" not in sys.modules
    export.register_codec(importlib.import_module("innocent_looking").Mine)
    try:
        save_codec(fitted(codec_from_config(description["config"])), tmp_path)
        assert type(load_codec(tmp_path)).__name__ == "Mine" and marker.exists()
    finally:
        del export._registered["innocent_looking.Mine"], sys.modules["innocent_looking"]


def test_a_class_that_the_process_has_imported_is_no_registered_one() -> None:
    class Mine(IdentityCodec):
        pass

    with pytest.raises(CodecMismatchError, match="register_codec"):
        codec_from_config(Mine().config())


COEFFICIENTS = base64.b85encode(zlib.compress(bytes(4_000_000))).decode()


@pytest.mark.parametrize(
    "description",
    [
        describing("fedlight.codecs.QuantizeCodec", (10**9,)),
        describing("fedlight.codecs.CountSketchCodec", (10**9,), ratio=8, rows=10**7),
        describing("fedlight.codecs.CountSketchCodec", (10**18,)),
        describing(
            "fedlight.codecs.LinearCodec", (10**9,), {"groups": [{"tensors": [0], "length": 30_000, "count": 33_334, "code": 30_000}]}
        ),
        describing(
            "fedlight.codecs.LinearCodec", (4000,), {"groups": [{"tensors": [0], "length": 4000, "count": 1, "code": 4000}]}, basis="random"
        ),
        describing(
            "fedlight.codecs.AutoencoderCodec", plan={"groups": [{"tensors": [0], "length": 36, "count": 1, "code": 4}]}, depth=10**9
        ),
        describing(
            "fedlight.codecs.AutoencoderCodec", plan={"groups": [{"tensors": [0], "length": 36, "count": 1, "code": 4}]}, width=10**8
        ),
        describing("fedlight.codecs.TwoSidedCodec", (10_000, 10_000), {"grids": [[10_000, 10_000]], "bits": COEFFICIENTS}),
        describing("fedlight.codecs.TwoSidedCodec", (3, 3), {"grids": [[2000, 2000]], "bits": COEFFICIENTS}),
        describing(
            "fedlight.codecs.StackedCodec",
            plan={"layout": Layout(("w",), ((36,),)).to_json(), "plan": {}, "version": 0},
            codec={"class_path": "fedlight.codecs.IdentityCodec", "init_args": {}},
            vectors=10**9,
        ),
    ],
)
def test_a_small_file_costs_little_memory_and_time_whatever_it_asks_for(description: dict[str, Any], tmp_path: Path) -> None:
    encoder = described("encoder", tmp_path / ENCODER_FILE, description)
    decoder = described("decoder", tmp_path / DECODER_FILE, description)
    for load, path in ((load_encoder, encoder), (load_decoder, decoder), (load_codec, tmp_path)):
        before, begin = resident(), time.process_time()
        with pytest.raises(CodecMismatchError):
            load(path)
        assert time.process_time() - begin < 1 and resident(most=True) - before < 100 * 1024


def test_a_layout_of_very_many_tensors_takes_no_longer_than_it_is() -> None:
    begin = time.process_time()
    assert Layout(("w",) * 100_000, ((1,),) * 100_000).offsets[-1] == 99_999
    assert time.process_time() - begin < 1


def test_a_larger_limit_takes_what_the_usual_one_refuses(tmp_path: Path) -> None:
    save_codec(CountSketchCodec(4).bind(Layout.vector(20_000)), tmp_path)
    for load, path in ((load_encoder, tmp_path / ENCODER_FILE), (load_decoder, tmp_path / DECODER_FILE), (load_codec, tmp_path)):
        load(path)
        with pytest.raises(CodecMismatchError, match="bytes in all but one of"):
            load(path, limit=4000)


def test_a_decoder_that_is_made_of_an_encoders_file_has_a_limit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ENCODER_FILE
    path.write_bytes(encoder_file(LinearCodec(3, "random", block_size=12).bind(Layout.vector(24))))
    make = LinearCodec.make_decoder
    assert load_replaying(path)[1].digest == load_encoder(path).digest

    def large(codec: LinearCodec, layout: Layout, plan: Any) -> Any:
        torch.zeros(10**12)
        return make(codec, layout, plan)

    monkeypatch.setattr(LinearCodec, "make_decoder", large)
    with pytest.raises(CodecMismatchError, match="bytes in all but one of 4,000,000,000,000"):
        load_replaying(path)


@pytest.mark.parametrize("codec", [chain(), LinearCodec(3, block_size=12)])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_flipped_bit_is_found_by_every_loader(half: str, codec: Codec, tmp_path: Path) -> None:
    save_codec(fitted(codec), tmp_path)
    path = tmp_path / f"{half}.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    for load, of in (({"encoder": load_encoder, "decoder": load_decoder}[half], path), (load_codec, tmp_path)):
        with pytest.raises(CodecMismatchError, match=f"the {half} at .*the digest that it was exported with"):
            load(of)


def test_tensors_of_another_type_are_refused(tmp_path: Path) -> None:
    """Though the numbers are the same."""
    codec = fitted(LinearCodec(3, block_size=12))
    save_codec(codec, tmp_path)
    with safe_open(tmp_path / ENCODER_FILE, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.double() for name, tensor in codec.encoder.state_dict().items()}, tmp_path / ENCODER_FILE, metadata)
    with pytest.raises(CodecMismatchError, match=r"the tensor 'bases.0' to be .*float32.*float64"):
        load_encoder(tmp_path / ENCODER_FILE)


def test_a_file_that_cannot_be_written_leaves_both_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls: list[int] = []

    def full(number: int) -> None:
        calls.append(number)
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_codec(fitted(chain(), seed=1), folder)
    assert calls and {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
