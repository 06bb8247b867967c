"""Words of messages."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """So many of something: "1 image", "0 images", "1,250 images".

    Args:
        one: what one is called; several: what others are called, by default the same with an s.
    """
    return f"{number:,} {one if number == 1 else several or one + 's'}"
