"""Decode steps of one padded size launch the same at the same addresses; a warm-up leaves nothing to compile."""

from dataclasses import fields

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from networks import CONFIG, random_network
from test_step import SUPER

from headrace.engine.config import ModelConfig
from headrace.engine.model import Caches, NemotronH
from headrace.engine.model.weights.names import memory_shapes
from headrace.engine.run.device import Device
from headrace.engine.run.memory import CacheSizes
from headrace.engine.run.padding import padding_rows
from headrace.engine.run.runner import Runner
from headrace.engine.run.warm_up import warm_up_plans
from headrace.engine.schedule.plan import Chunk, SlotParams, Start, StepPlan
from headrace.engine.schedule.scheduler import Limits
from headrace.kernels import select
from headrace.kernels.control import ControlIds
from headrace.kernels.lab.launches import Launch, capture

SLOTS, PAGES, PAGE_SIZE, CONTEXT, CHUNK = 32, 300, 16, 512, 64
LIMITS = Limits(SLOTS, PAGES, PAGE_SIZE, CHUNK, 192, 8, CONTEXT)
PARAMS = SlotParams(9, 1.0, 0.9, 1, 0, thinking=False, budget=-1, ignore_eos=False)


@pytest.fixture
def runner() -> Runner:
    """A real network on the Triton kernels, in memory that a test's launches can be told apart by."""
    sizes = CacheSizes(SLOTS, PAGES, PAGE_SIZE, CONTEXT, 1, 1, padding_rows("triton", SLOTS))
    assert sizes.padding == 7
    caches = Caches.allocate(ModelConfig.from_json(CONFIG), SLOTS + 7, PAGES + 7, PAGE_SIZE)
    control = ControlIds(eos=(2,), think=12, end_think=13, closing=(13,))
    return Runner(random_network(backend="triton"), select("triton"), caches, sizes, control, Device("cpu"))


def decoding(slots: list[int], writes: list[tuple[int, int, int]] = (), **more: object) -> StepPlan:
    return StepPlan(1, np.array(slots), page_writes=np.array(writes, np.int64).reshape(-1, 3), **more)


def described(runner: Runner, launch: Launch, keep: list[object]) -> tuple[object, ...]:
    """Kernel, grid and arguments: of what lives as long as the runner, and of integers that travel, the address too."""
    caches, state = runner.caches, runner.state
    lasting = [runner.page_table, runner._integers, *caches.keys, *caches.values, *caches.conv, *caches.ssm]
    lasting += [getattr(state, field.name) for field in fields(state)]
    lasting += [] if runner._allowed is None else [runner._allowed]
    places = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    parts: list[object] = [launch.name, launch.grid]
    for name, value in launch.parameters():
        if isinstance(value, torch.Tensor):
            keep.append(value)  # memory of one launch must not be taken for another's
            stays = value.untyped_storage().data_ptr() in places
            parts.append((name, value.shape, value.stride(), value.dtype, value.data_ptr() if stays else None))
        else:
            parts.append((name, value))
    return tuple(parts)


@pytest.mark.parametrize("masked", [False, True])
def test_batches_of_one_padded_size_launch_the_same(runner, masked):
    """9 rows and 12 are both 16, in whatever slots they are, opening pages or not; 17 are not."""
    seen, keep, rows = [], [], torch.ones(768, dtype=torch.bool).numpy()
    plans = [
        decoding(list(range(9)), masks=((2, rows),) if masked else ()),
        decoding([30, *range(20, 9, -1)], [(30, 1, 7), (12, 0, 9)], masks=((11, rows), (0, rows)) if masked else ()),
        decoding(list(range(17)), masks=((2, rows),) if masked else ()),
    ]
    for plan in plans:
        with capture(90) as launches:
            runner.execute(plan)
        seen.append([described(runner, launch, keep) for launch in launches])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    arguments = [argument for launch in seen[0] for argument in launch[2:] if len(argument) == 5]
    placed = {argument[0] for argument in arguments if argument[-1] is not None}
    assert {"slots", "page_writes", "page_table", "last_token", "ssm", "conv", "keys", "values"} <= placed
    assert ("mask" in placed) == masked
    inputs = {argument[0] for argument in arguments if argument[-1] is None and argument[3] is torch.int64}
    # Made by the step's own launches: its first one's outputs, and what the sampler's kernels tell each other.
    assert inputs <= {"token_ids", "positions", "picked", "records", "tile_best", "histograms", "tokens", "phases",
                      "finish", "control"}  # fmt: skip


def compiled(launches: list[Launch]) -> set[object]:
    """What each launch would be compiled as."""
    return {
        (launch.name, repr(launch.signature), repr(launch.constants), repr(launch.attributes), repr(launch.options))
        for launch in launches
    }


def test_after_the_warm_up_nothing_is_compiled(runner):
    """Random steps of any composition, and everything that can be asked of the sampler."""
    with capture(90) as launches:
        runner.warm_up(warm_up_plans(LIMITS, 768))
    known, generator = compiled(launches), np.random.default_rng(0)
    assert len(known) < len(launches) / 4
    with capture(90) as launches:
        for number in range(150):
            slots = generator.permutation(SLOTS).tolist()
            decodes, left = slots[: generator.integers(0, 29)], slots[29:]
            lengths = generator.integers(1, CHUNK + 1, generator.integers(0, 3)).tolist()
            lasts = generator.integers(0, 2, len(lengths)).tolist()
            starts = [Start(slot, np.zeros(n, np.int64), PARAMS) for slot, n in zip(left, lengths, strict=False)]
            chunks = [Chunk(slot, 0, n, bool(last)) for slot, n, last in zip(left, lengths, lasts, strict=False)]
            sampled = len(decodes) + sum(lasts)
            top = int(generator.integers(0, 21)) if number % 3 == 0 else 0
            masks = ((sampled - 1, np.ones(768, np.bool_)),) if number % 4 == 0 and sampled else ()
            writes = [(slot, 1, 5) for slot in slots[: generator.integers(0, SLOTS)]]
            runner.execute(
                decoding(decodes, writes, starts=tuple(starts), chunks=tuple(chunks), masks=masks,
                         logprobs=top > 0 or number % 5 == 0, top_logprobs=top)
            )  # fmt: skip
    new = compiled(launches) - known
    assert not new, f"{len(new)} beyond the {len(known)} of the warm-up: {sorted(map(str, new))[:3]}"


class MetaDevice(Device):
    """Tensors without memory."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.torch = torch.device("meta")

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def test_what_the_warm_up_of_the_published_model_compiles():
    """The figures in the README: one layer of each kind has all kernels of the 88."""
    config = ModelConfig.from_json(SUPER)
    shapes, padding = memory_shapes(config), padding_rows("triton", 64)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    caches = Caches.allocate(config, 64 + padding, 4096 + padding, 16, "meta", torch.bfloat16)
    sizes = CacheSizes(64, 4096, 16, 8192, 1, 1, padding)
    control = ControlIds(eos=(2, 11), think=12, end_think=13, closing=(13,))
    plans = list(warm_up_plans(Limits(64, 4096, 16, 256, 320, 128, 8192), config.vocab_size))
    with capture(90) as launches:
        model = NemotronH(config, weights, select("triton"))
        Runner(model, select("triton"), caches, sizes, control, MetaDevice()).warm_up(plans)
    assert (len(plans), len(compiled(launches))) == (45, 63)
    state = sum(layer[0].nbytes for layer in (*caches.conv, *caches.ssm)) * 40  # Mamba layers
    assert round(padding * state / 1e9, 1) == 1.2


def test_drafts_of_any_length_are_compiled_once():
    """Kernels see a page size and a chunk, not how long a sequence is."""
    pattern = {"mtp_hybrid_override_pattern": "*E", "num_nextn_predict_layers": 1}
    module, known = random_network(backend="triton", **pattern).mtp, []
    for length in (129, 200, 255, 256):  # of as many token tiles
        with capture(90) as launches:
            module.forward(torch.zeros(length, 32), torch.zeros(length, dtype=torch.int64))
        known.append(compiled(launches))
    assert {"_append", "_prefill", "_linear", "_route"} <= {name for name, *_ in known[0]}
    assert all(other == known[0] for other in known)
