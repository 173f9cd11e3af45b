"""Errors of the text side: both are ValueErrors whose message names the file or field at fault."""


class TokenizerError(ValueError):
    """A tokenizer file, or a text handed to a tokenizer, that cannot be used."""


class ChatError(ValueError):
    """Messages or template options that cannot be rendered.

    `param` is the field in the request's own spelling ("messages[2].content"), `index` the message's
    position, or None where the fault is not in one message.
    """

    def __init__(self, problem: str, *, param: str, index: int | None = None) -> None:
        super().__init__(f"{param}: {problem}")
        self.problem = problem
        self.param = param
        self.index = index
