"""Networks that follow a script, and small random real ones: what the engine tests put in place of a big model."""

import json
import shutil
import threading
from pathlib import Path

import torch

from headrace.engine import Engine, EngineConfig
from headrace.engine.config import ModelConfig
from headrace.engine.engine import EMBEDDED_MODEL
from headrace.engine.model.nemotron_h import NemotronH
from headrace.kernels import select
from headrace.tokenizer import ChatTemplate
from headrace.tokenizer import load as load_tokenizer

EOS, THINK, END_THINK, TOOL_CALL = 11, 12, 13, 14
VOCAB = 768

CONFIG = {
    "model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "hidden_size": 32, "vocab_size": VOCAB,
    "hybrid_override_pattern": "ME*M", "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 16, "conv_kernel": 4, "chunk_size": 8, "use_conv_bias": True, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "moe_latent_size": 16, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 32,
    "intermediate_size": 32, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "layer_norm_epsilon": 1e-5, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
}  # fmt: skip


def text_folder(tmp_path: Path) -> Path:
    """The embedded model's tokenizer and template with the ids that the tests rely on."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("tokenizer.model", "chat_template.jinja"):
        shutil.copy(EMBEDDED_MODEL / name, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, EOS]}))
    return folder


class Scripted:
    """A network whose most likely next token is a function of the last one; ``poison`` ids give NaN logits.

    With a ``gate`` every step waits for it to be released once.
    """

    def __init__(
        self, successor, *, vocab: int = VOCAB, sharpness: float = 50.0, gate: threading.Semaphore | None = None
    ) -> None:
        self.table = torch.tensor([successor(i) for i in range(vocab)])
        self.vocab = vocab
        self.sharpness = sharpness
        self.poison: set[int] = set()
        self.gate = gate
        self.fail_on: int | None = None
        self.rows_seen: list[int] = []

    def forward(self, batch, caches):
        assert self.gate is None or self.gate.acquire(timeout=20), "the gate stayed shut"
        self.rows_seen.append(batch.token_ids.numel())
        if self.fail_on is not None and (batch.token_ids == self.fail_on).any():
            raise RuntimeError("planted kernel failure")
        return batch.token_ids[:, None].float()

    def logits(self, hidden):
        ids = hidden[:, 0].long()
        logits = torch.zeros(len(ids), self.vocab)
        logits[torch.arange(len(ids)), self.table[ids]] = self.sharpness
        for row, token in enumerate(ids.tolist()):
            if token in self.poison:
                logits[row, 5] = torch.nan
        return logits


def scripted_engine(folder: Path, network: Scripted, **options) -> Engine:
    tokenizer = load_tokenizer(folder)
    return checked(
        Engine.from_parts(
            network,
            ModelConfig.from_json(CONFIG),
            tokenizer,
            template=ChatTemplate.load(folder, tokenizer),
            config=EngineConfig(
                **{"max_sequences": 8, "prefill_chunk": 16, "num_pages": 256, "page_size": 4, **options}
            ),
        )
    )


def checked(engine: Engine) -> Engine:
    """Conservation of pages and slots is asserted after every step."""
    scheduler, commit = engine._scheduler, engine._scheduler.commit

    def commit_and_check(result):
        outcome = commit(result)
        scheduler.check()
        return outcome

    scheduler.commit = commit_and_check
    return engine


def random_network(
    seed: int = 0, backend: str = "reference", dtype: torch.dtype = torch.float32, **changes
) -> NemotronH:
    """A real NemotronH with seeded weights, large enough in spread that its argmax is not a tie."""
    from headrace.engine.model.weights.names import memory_shapes

    config = ModelConfig.from_json({**CONFIG, **changes})
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in memory_shapes(config).items():
        scale = 1.0 if "norm" in name or name.endswith(".D") else 0.3
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if "norm" in name else noise * scale
        if name.endswith("A_log"):
            weights[name] = noise.abs()
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return NemotronH(config, weights, select(backend))


def random_engine(
    folder: Path, seed: int = 0, backend: str = "reference", dtype: torch.dtype = torch.float32, **options
) -> Engine:
    tokenizer = load_tokenizer(folder)
    network = random_network(seed, backend, dtype)
    return checked(
        Engine.from_parts(
            network,
            network.config,
            tokenizer,
            template=ChatTemplate.load(folder, tokenizer),
            config=EngineConfig(
                backend=backend,
                **{"max_sequences": 8, "prefill_chunk": 16, "num_pages": 256, "page_size": 4, **options},
            ),
        )
    )
