"""The trainable network is the published one, packed examples do not leak, and the MTP head has its shapes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tiny import data, export, mtp, problems, train
from benchmarks.tiny.network import Config, Network, balance
from benchmarks.tiny.optimizer import orthogonal
from benchmarks.tiny.run import Progress
from benchmarks.tiny.team import Team, spread

SMALL = Config(hidden_size=48, mamba_head_dim=8, ssm_state_size=8, head_dim=8, chunk_size=16, moe_latent_size=16)


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, biases and norms included, rounded as the export rounds them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            exact = tensor + noise * (0.02 if "A_log" in name or tensor.ndim > 1 else 0.1)
            tensor.copy_(exact if name.endswith("correction_bias") else exact.bfloat16().float())
    return module.eval()


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return scrambled(Network(SMALL))


@pytest.fixture(scope="module")
def head() -> mtp.Mtp:
    torch.manual_seed(1)
    return scrambled(mtp.Mtp(SMALL))


@pytest.fixture(scope="module")
def batch() -> data.Batch:
    return data.batch(0, 0, 3, problems.CATEGORIES)


def logits(network: Network, ids: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.lm_head(network(ids, network.packing(document)))


def test_packing_is_invisible(network, batch):
    packed = logits(network, batch.ids, batch.document)
    for row in range(len(batch.ids)):
        for number in range(int(batch.document[row].max()) + 1):
            inside = batch.document[row] == number
            alone = batch.ids[row][inside][None]
            torch.testing.assert_close(
                packed[row][inside], logits(network, alone, torch.zeros_like(alone))[0], rtol=1e-3, atol=1e-4
            )


def test_equals_transformers(network, head, tmp_path):
    transformers = pytest.importorskip("transformers")
    export.write(tmp_path, network, head)
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    ids = torch.randint(0, SMALL.vocab_size, (2, 75), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(network, ids, torch.zeros_like(ids)), expected, rtol=1e-3, atol=1e-4)


def test_export_layout(network, head, tmp_path):
    export.write(tmp_path, network, head)
    found = load_file(tmp_path / "model.safetensors")
    assert found["backbone.layers.0.mixer.conv1d.weight"].shape == (SMALL.conv_channels, 1, 4)
    assert found["backbone.layers.1.mixer.experts.15.up_proj.weight"].shape == (128, 16)
    assert found["backbone.layers.1.mixer.experts.15.down_proj.weight"].shape == (16, 128)
    assert found["mtp.layers.0.eh_proj.weight"].shape == (48, 96)
    for norm in ("0.enorm", "0.hnorm", "0.norm", "1.norm", "1.final_layernorm"):
        assert found[f"mtp.layers.{norm}.weight"].shape == (48,)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 11]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["hybrid_override_pattern"])


def test_mtp_drafts_have_one_row_per_wanted_token(network, head, batch):
    learned = batch.targets >= 0
    for depth, (scores, wanted) in enumerate(mtp.drafts(network, network, head, batch), 1):
        inside = (batch.document == mtp.ahead(batch.document, depth, -1)) & mtp.ahead(learned.int(), depth, 0).bool()
        assert scores.shape == (int(inside.sum()), SMALL.vocab_size)
        assert wanted.shape == scores.shape[:1]


def test_balance_moves_towards_idle_experts(network, batch):
    network.train()
    logits(network, batch.ids, batch.document)
    mixer = network.backbone.layers[1].mixer
    before, load = mixer.gate.e_score_correction_bias.clone(), mixer.load.clone()
    balance(network, rate=0.1)
    moved = mixer.gate.e_score_correction_bias - before
    mixer.gate.e_score_correction_bias.copy_(before)
    network.eval()
    assert torch.equal(moved.sign(), (0.25 - load).sign())


def test_orthogonal_flattens_singular_values():
    matrices = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_learning_rate_follows_the_clock():
    progress = Progress(minutes=10, step=1000)
    rates = []
    for minutes in (0, 4, 7, 10):
        progress.elapsed = 60 * minutes
        rates.append(progress.learning_rate(1.0, 100))
    assert rates == [1.0, 1.0, pytest.approx(0.55), pytest.approx(0.01)]


def test_resume_continues_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Config", lambda: SMALL)
    monkeypatch.setattr(train, "accuracy", lambda network: dict.fromkeys(problems.CATEGORIES, 1.0))
    monkeypatch.setattr(Progress, "learning_rate", lambda self, peak, warmup_steps: peak)

    def run(folder, steps, *options):
        monkeypatch.setattr(Progress, "done", property(lambda self: min(1.0, self.step / steps)))
        arguments = ["train", "--out", str(folder), "--rows", "2", "--workers", "1", "--evaluations", "1", *options]
        monkeypatch.setattr("sys.argv", arguments)
        train.main()
        return torch.load(folder / "backbone.pt", weights_only=True)

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "broken", 2)
    broken = run(tmp_path / "broken", 4, "--resume")
    assert straight["progress"]["step"] == broken["progress"]["step"] == 4
    for name, tensor in straight["modules"]["network"].items():
        torch.testing.assert_close(broken["modules"]["network"][name], tensor, rtol=1e-5, atol=1e-6)


def average_ranks(team: Team, folder: str) -> None:
    """Run by each worker: note what it ends up with."""
    value = torch.full((2, 2), float(team.rank))
    team.average([value, torch.zeros(1)])
    torch.save((value, team.told(f"from {team.rank}"), team.rows(torch.arange(4))), f"{folder}/{team.rank}.pt")


def test_workers_average_and_follow_the_leader(tmp_path):
    spread(average_ranks, str(tmp_path), workers=2)
    for rank, rows in enumerate(([0, 2], [1, 3])):
        value, told, mine = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert value.tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert told == "from 0"
        assert mine.tolist() == rows
