"""The one error a checkpoint's files can cause."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as its config.json describes it; the message names file and tensor."""
