"""One numerics, seen in the structure: what batch sizes must not change in the launches of an op.

Tile sizes may follow the batch; the tensor-core instruction, the K step and the number of splits may not, or a row's
sum would be taken in another order when its neighbours change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.kernels.lab.compile import compile_launch
from headrace.kernels.lab.launches import Launch


class NumericsError(AssertionError):
    """Two batches of one op would compute a row by different instructions or in a different order."""


def fingerprint(launch: Launch, steps: Sequence[str]) -> dict[str, Any]:
    """What decides the bits of a row: tensor-core opcodes, the constexprs named in ``steps``, contraction."""
    found: dict[str, Any] = {"mma": tuple(sorted(compile_launch(launch).report().mma))}
    found.update({name: launch.constexprs[name] for name in steps if name in launch.constexprs})
    found["enable_fp_fusion"] = launch.options.enable_fp_fusion
    return found


def same_numerics(launches: Mapping[object, Sequence[Launch]], steps: Sequence[str] = ("BLOCK_K", "SPLITS")) -> None:
    """Raise NumericsError unless all batches launch the same kernels in the same order with one fingerprint each.

    launches: batch (whatever names it) -> the launches of the op on it, for one architecture and weight shape.
    """
    reference: tuple[object, Sequence[Launch]] | None = None
    for batch, found in launches.items():
        if reference is None:
            reference = batch, found
            continue
        first, expected = reference
        names, others = [one.name for one in expected], [one.name for one in found]
        if names != others:
            raise NumericsError(f"batch {first} launches {names}, batch {batch} launches {others}")
        for one, other in zip(expected, found, strict=True):
            before, after = fingerprint(one, steps), fingerprint(other, steps)
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key):
                    raise NumericsError(
                        f"{one.name} on sm_{one.arch}: {key} is {before.get(key)} for batch {first} "
                        f"and {after.get(key)} for batch {batch}"
                    )
