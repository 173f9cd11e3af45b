"""Reading checkpoints: every layout gives the same tensors, every kind of damage one clear error."""

import json
import os
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint, write_tensors
from safetensors.torch import load_file, save_file

from headrace.engine.config import ConfigError, ModelConfig
from headrace.engine.model import CheckpointError, NemotronH, load_model
from headrace.engine.model.weights import loader, open_weights
from headrace.engine.model.weights.names import memory_shapes, places

SMALL = {
    "vocab_size": 11, "hidden_size": 8, "mamba_num_heads": 2, "mamba_head_dim": 4, "ssm_state_size": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 6, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_latent_size": 4, "moe_intermediate_size": 6,
    "moe_shared_expert_intermediate_size": 5,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[int, Path]:
    """The same checkpoint in one file and in three shards."""
    folders = {shards: tmp_path_factory.mktemp(f"in-{shards}") for shards in (1, 3)}
    for shards, folder in folders.items():
        make_checkpoint(folder, "ME*-", mtp="*E", shards=shards, **SMALL)
    return folders


@pytest.fixture
def single(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals[1], tmp_path / "single"))


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals[3], tmp_path / "sharded"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, experts stacked."""
    with open_weights(folder, ModelConfig.load(folder)) as weights:
        return {name: value if isinstance(value, torch.Tensor) else stacked(value) for name, value in weights.items()}


def stacked(experts) -> torch.Tensor:
    return torch.stack([experts[i].clone() for i in range(len(experts))])


class Recorded(Mapping):
    """Weights that count who asks for what."""

    def __init__(self, weights, asked):
        self.weights, self.asked = weights, asked

    def __getitem__(self, name):
        value = self.weights[name]
        self.asked[name] += 1
        return value

    def __contains__(self, name):
        return name in self.weights

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def refused(folder: Path, *fragments: str) -> None:
    """Loading fails with one line that says what is wrong and where."""
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert str(folder) in message
    for fragment in fragments:
        assert fragment in message, message


# Layouts


def test_tensors_arrive_where_they_belong(single):
    files = load_file(single / SINGLE)
    config = ModelConfig.load(single)
    weights = load(single)
    assert {name: tuple(t.shape) for name, t in weights.items()} == memory_shapes(config)
    used = set()
    for name, place in places(config).items():
        file_name = name if name.startswith(("mtp.", "lm_head.")) else f"backbone.{name}"
        target = weights[place.name] if place.row is None else weights[place.name][place.row]
        assert torch.equal(target, files[file_name]), name
        used.add(file_name)
    assert used == set(files)


def test_shards_and_prefix_change_nothing(single, sharded):
    expected = load(single)
    files = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    write_tensors(single, {name.replace("backbone.", "model."): t for name, t in files.items()}, shards=2)
    for folder in (sharded, single):
        weights = load(folder)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(single, dtype):
    files = {name: t.to(dtype) for name, t in load_file(single / SINGLE).items()}
    mixed = "backbone.layers.1.mixer.experts.2.up_proj.weight"
    files[mixed] = files[mixed].float()
    save_file(files, single / SINGLE)
    weights = load(single)
    assert weights["embeddings.weight"].dtype == dtype
    # One wider expert widens the stack, so that nothing is rounded.
    assert weights["layers.1.mixer.experts.up_proj"].dtype == torch.float32
    assert torch.equal(weights["layers.1.mixer.experts.up_proj"][2], files[mixed])


@pytest.mark.parametrize("mapped", [loader.MAPPED, 1])
def test_files_may_go_after_loading(single, monkeypatch, mapped):
    """Also where every tensor is read as a view of the file."""
    monkeypatch.setattr(loader, "MAPPED", mapped)
    model = load_model(single)
    token_ids = torch.tensor([3, 1, 4, 1, 5])
    before = model.embeddings(token_ids)
    file = single / SINGLE
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(model.embeddings(token_ids), before)


def test_every_tensor_is_read_once(single):
    """Packed weights are all that stays: peak memory is theirs and one tensor."""
    config = ModelConfig.load(single)
    with open_weights(single, config) as weights:
        asked = Counter()
        NemotronH(config, Recorded(weights, asked))
        assert set(asked) == set(weights)
        assert set(asked.values()) == {1}, asked


def test_a_file_that_shrinks_while_it_is_read(single):
    config = ModelConfig.load(single)
    with open_weights(single, config) as weights:
        os.truncate(single / SINGLE, 4096)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside tensor '.*'"):
            NemotronH(config, weights)


def test_progress_goes_to_stderr(single, capsys):
    load_model(single)
    assert capsys.readouterr() == ("", "")
    load_model(single, progress=True)
    assert capsys.readouterr().out == ""


def test_symlinked_files_are_read(single, tmp_path):
    """As the hub's cache lays them out."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in list(single.iterdir()):
        shutil.move(file, cache / file.name)
        file.symlink_to(cache / file.name)
    load_model(single)


# Damage


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage done to the parsed header."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / SINGLE)
        change(header)
        write_raw(folder / SINGLE, json.dumps(header).encode(), data)

    return damage


def raw_edit(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))

    return damage


NAME = "backbone.norm_f.weight"
EMBEDDING = "backbone.embeddings.weight"


def shift(header: dict, by: int) -> None:
    header[NAME]["data_offsets"] = [offset + by for offset in header[NAME]["data_offsets"]]


def duplicate(folder: Path) -> None:
    header, data = header_of(folder / SINGLE)
    text = json.dumps(header)
    write_raw(folder / SINGLE, (text[:-1] + f', "{NAME}": {json.dumps(header[NAME])}' + "}").encode(), data)


def set_entry(key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda header: header[NAME].__setitem__(key, value))


def header_text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: write_raw(folder / SINGLE, text, header_of(folder / SINGLE)[1])


DAMAGE = {
    "no file": (lambda folder: (folder / SINGLE).unlink(), ["neither", SINGLE, INDEX]),
    "empty file": (raw_edit(lambda raw: b""), [SINGLE, "truncated"]),
    "seven bytes": (raw_edit(lambda raw: raw[:7]), [SINGLE, "truncated"]),
    "cut in the header": (raw_edit(lambda raw: raw[:100]), [SINGLE, "truncated"]),
    "cut in the data": (raw_edit(lambda raw: raw[:-1]), [SINGLE, "truncated"]),
    "bytes too many": (raw_edit(lambda raw: raw + b"\0"), [SINGLE, "1 bytes after the last tensor"]),
    "header length beyond the file": (raw_edit(lambda raw: b"\xff" * 8 + raw[8:]), [SINGLE, "truncated"]),
    "header is not JSON": (header_text(b"{nonsense"), [SINGLE, "header is not JSON"]),
    "header is not UTF-8": (header_text(b'{"\xff": 1}'), [SINGLE, "header is not JSON"]),
    "header is nested without end": (header_text(b"[" * 50_000), [SINGLE, "header is not JSON"]),
    "header is a list": (header_text(b"[]"), [SINGLE, "not a JSON object"]),
    "header is empty": (header_text(b"{}"), [SINGLE, "after the last tensor"]),
    "overlap": (edit(lambda header: shift(header, -4)), [SINGLE, "overlaps"]),
    "gap": (edit(lambda header: shift(header, 4)), [SINGLE]),
    "the same bytes twice": (edit(lambda header: header.update({"lm_head.twin": header[NAME]})), [SINGLE, "overlaps"]),
    "twice in one header": (duplicate, [SINGLE, NAME, "twice"]),
    "offsets backwards": (edit(lambda header: header[NAME]["data_offsets"].reverse()), [NAME, "data_offsets"]),
    "offsets negative": (set_entry("data_offsets", [-32, 0]), [NAME, "data_offsets", "-32"]),
    "offsets a string": (set_entry("data_offsets", "0-8"), [NAME, "data_offsets"]),
    "three offsets": (set_entry("data_offsets", [0, 1, 2]), [NAME, "data_offsets"]),
    "offsets without entries": (edit(lambda header: header[NAME].pop("data_offsets")), [NAME, "lacks"]),
    "entry of another type": (edit(lambda header: header.update({NAME: 5})), [NAME, "lacks"]),
    "bytes and shape disagree": (set_entry("shape", [9]), [NAME, "36 bytes", "32"]),
    "shape negative": (set_entry("shape", [-8]), [NAME, "shape", "-8"]),
    "shape a float": (set_entry("shape", [8.0]), [NAME, "shape", "8.0"]),
    "shape astronomical": (set_entry("shape", [10**30]), [NAME, "bytes"]),
    "wrong shape": (edit(lambda header: header[EMBEDDING].update(shape=[8, 11])), [EMBEDDING, "[8, 11]", "[11, 8]"]),
    "flat shape": (edit(lambda header: header[EMBEDDING].update(shape=[88])), [EMBEDDING, "[88]", "[11, 8]"]),
    "wrong dtype": (set_entry("dtype", "I32"), [NAME, "'I32'", "BF16"]),
    "quantised dtype": (set_entry("dtype", "F8_E5M2"), [NAME, "'F8_E5M2'", "F8_E4M3"]),
    "dtype of another type": (set_entry("dtype", ["F32"]), [NAME, "['F32']"]),
    "metadata of another type": (edit(lambda header: header.update({"__metadata__": [1]})), [SINGLE]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(single, name):
    damage, fragments = DAMAGE[name]
    damage(single)
    refused(single, *fragments)


def test_a_header_over_the_limit(single):
    """The limit, not memory, ends it: the file is sparse."""
    with (single / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    refused(single, SINGLE, "100000001", "too long")


def test_a_folder_in_place_of_the_file(single):
    (single / SINGLE).unlink()
    (single / SINGLE).mkdir()
    refused(single, SINGLE)


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda header: header.update({new: header.pop(old)})


def test_missing_and_left_over_tensors(single):
    edit(rename(NAME, "backbone.norm_g.weight"))(single)
    refused(single, "missing 'norm_f.weight'", "left over 'backbone.norm_g.weight'")


@pytest.mark.parametrize("name", ["norm_f.weight", "backbone.lm_head.weight", "other.norm_f.weight"])
def test_names_need_the_published_prefix(single, name):
    edit(rename(NAME if "norm" in name else "lm_head.weight", name))(single)
    refused(single, "missing", f"left over '{name}'")


def test_both_prefixes_at_once(single):
    files = load_file(single / SINGLE)
    save_file(files | {"model.norm_f.weight": files[NAME].clone()}, single / SINGLE)
    refused(single, "model.norm_f.weight", NAME, "also")


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"num_nextn_predict_layers": 0}, ["left over 'mtp.", "more tensors"]),
        ({"mtp_hybrid_override_pattern": "*E-"}, ["missing 'mtp.layers.2"]),
        ({"use_conv_bias": False}, ["left over 'backbone.layers.0.mixer.conv1d.bias'"]),
        ({"attention_bias": True}, ["missing 'layers.2.mixer.q_proj.bias'"]),
        ({"moe_latent_size": None}, ["experts.0.down_proj", "[4, 6]", "[8, 6]"]),
        ({"n_routed_experts": 5}, ["gate", "[4]", "[5]"]),
        ({"vocab_size": 12}, ["[11, 8]", "[12, 8]"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configuration_and_tensors_must_agree(single, change, fragments):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | change))
    refused(single, *fragments)


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_shard(sharded):
    (sharded / SHARD).unlink()
    refused(sharded, INDEX, SHARD, "does not exist")


def test_truncated_shard(sharded):
    (sharded / SHARD).write_bytes((sharded / SHARD).read_bytes()[:-8])
    refused(sharded, SHARD, "truncated")


def test_index_names_a_tensor_that_is_nowhere(sharded):
    change_index(sharded, lambda index: index["weight_map"].update({"backbone.extra": SHARD}))
    refused(sharded, INDEX, "backbone.extra", SHARD)


def test_index_names_the_wrong_shard(sharded):
    in_it = next(iter(load_file(sharded / SHARD)))
    change_index(sharded, lambda index: index["weight_map"].update({in_it: SHARD.replace("2-of", "3-of")}))
    refused(sharded, INDEX, in_it, "00003")


def test_shard_holds_what_the_index_does_not_name(sharded):
    change_index(sharded, lambda index: index["weight_map"].pop(NAME))
    refused(sharded, INDEX, NAME, "does not place")


def test_tensor_in_two_shards(sharded):
    files = load_file(sharded / SHARD)
    save_file(files | {NAME: load_file_with(sharded, NAME)}, sharded / SHARD)
    refused(sharded, INDEX, NAME)


def load_file_with(folder: Path, name: str) -> torch.Tensor:
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    assert shard != SHARD
    return load_file(folder / shard)[name]


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b.safetensors", "c:x.safetensors",
     "nul\0.safetensors", 5, None, ["model.safetensors"]],
)  # fmt: skip
def test_index_cannot_leave_the_folder(sharded, shard):
    shutil.copy(sharded / SHARD, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update({NAME: shard}))
    refused(sharded, INDEX, NAME, "plain")


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", "null", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 50_000]
)
def test_damaged_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX)


def test_random_damage_is_never_a_crash(single):
    """Flipped, cut and inserted bytes, mostly in the header: an error of ours, or a load that still fits."""
    file = single / SINGLE
    intact = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", intact[:8])[0]
    generator = random.Random(0)
    config, refusals = ModelConfig.load(single), 0
    for _ in range(400):
        raw = bytearray(intact)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(header_end if generator.random() < 0.9 else len(raw))
            kind = generator.choice(("flip", "replace", "insert", "cut"))
            if kind == "flip":
                raw[at] ^= 1 << generator.randrange(8)
            elif kind == "replace":
                raw[at] = generator.choice(b'0123456789[]{}",:-')
            elif kind == "insert":
                raw[at:at] = generator.choice((b"0", b'"', b"{", b"\xff", b"-"))
            else:
                del raw[at : at + generator.randint(1, 50)]
        file.write_bytes(raw)
        try:
            with open_weights(single, config) as weights:
                NemotronH(config, weights)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 300


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        load_model(tmp_path / "nowhere")
