"""The options of an engine and of a request, with the words that ``--help`` says about them.

Their ranges are the engine's to check.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

SAMPLING, REASONING, OUTPUT = "Sampling", "Reasoning", "Output"
KERNELS, ENGINE = "Kernels", "Engine"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder of a checkpoint.", show_default="the embedded model")
]
Device = Annotated[str, typer.Option("--device", help="cpu (native kernels), or cuda, cuda:N (Triton kernels).")]
Backend = Annotated[
    Literal["auto", "reference", "native", "triton"],
    typer.Option("--backend", help="Kernels; auto: the device's own.", rich_help_panel=KERNELS),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Of the native kernels.", show_default="one per core", rich_help_panel=KERNELS, min=1
    ),
]
Instructions = Annotated[
    Literal["auto", "portable", "avx2", "avx512", "avx512_bf16"],
    typer.Option(
        "--instructions",
        help="Of the native kernels; avx512_bf16 rounds activations, the others give the same tokens.",
        rich_help_panel=KERNELS,
    ),
]
MaxSequences = Annotated[
    int | None,
    typer.Option("--max-sequences", help="Answers generated together.", show_default="64", rich_help_panel=ENGINE),
]
MaxWaiting = Annotated[
    int | None,
    typer.Option("--max-waiting", help="Answers that may queue.", show_default="1024", rich_help_panel=ENGINE),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context", help="Tokens per conversation.", show_default="the model's limit", rich_help_panel=ENGINE
    ),
]
KvDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "fp8"],
    typer.Option("--kv-dtype", help="Of keys and values; auto: as the checkpoint asks.", rich_help_panel=ENGINE),
]
System = Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)]

Effort = Annotated[
    Literal["none", "low", "high"], typer.Option("--effort", help="How much to reason.", rich_help_panel=REASONING)
]
Budget = Annotated[
    int,
    typer.Option("--budget", help="Tokens of reasoning before it is ended, -1: no limit.", rich_help_panel=REASONING),
]

Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy, at most 2.", rich_help_panel=SAMPLING)
]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus, 0 to 1.", rich_help_panel=SAMPLING)]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", help="Tokens to generate, reasoning included.", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="0 to 2^64-1: same seed, same answer.", show_default="random", rich_help_panel=SAMPLING
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End the answer before this text (repeatable).", rich_help_panel=SAMPLING),
]
Choices = Annotated[int, typer.Option("--n", help="Number of answers, 1 to 8.", rich_help_panel=SAMPLING)]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after the end of the text.", rich_help_panel=SAMPLING)
]

Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Json = Annotated[
    bool, typer.Option("--json", help="One JSON object at the end instead of a stream.", rich_help_panel=OUTPUT)
]
Logprobs = Annotated[
    bool, typer.Option("--logprobs", help="Log-probabilities of the tokens, with --json.", rich_help_panel=OUTPUT)
]
TopLogprobs = Annotated[
    int, typer.Option("--top-logprobs", help="Alternatives per token, 0 to 20, with --json.", rich_help_panel=OUTPUT)
]
AnswerOnly = Annotated[bool, typer.Option("--answer-only", help="Do not show the reasoning.", rich_help_panel=OUTPUT)]
