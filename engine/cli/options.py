"""The options of a request, with the words that ``--help`` says about them. Their ranges are the engine's to check."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

SAMPLING, REASONING, OUTPUT = "Sampling", "Reasoning", "Output"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder of a checkpoint.", show_default="the embedded model")
]
Device = Annotated[str, typer.Option("--device", help="cpu (native kernels), or cuda, cuda:N (Triton kernels).")]
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
