"""What any part of a step raises that a recording could not repeat."""

__all__ = ["NotRecordable"]


class NotRecordable(RuntimeError):  # noqa: N818
    """A program asks for the value of a tensor: what it does next depends on it."""
