"""What can go wrong, as sentences: what was wrong, the value received, what to do."""


class Error(Exception):
    """Base of every error that cnn raises on purpose."""


class ModelError(Error):
    """A model file, a network or an input that does not fit it."""


class ImageError(Error):
    """A picture that is missing, broken, too large or not a picture."""


class DeviceError(Error):
    """A device, dtype or thread count that can not be had here."""


class OutOfMemory(DeviceError):
    """A device, or "the host", has no room for `needed` bytes, 0 where nobody says how many; `free`
    are left on it.

    words: (what they are for, what to do)
    """

    def __init__(self, device: str, needed: int, free: int,
                 words: tuple[str, str] = ("a buffer", "use a smaller batch")) -> None:
        what, advice = words
        wanted = f"{in_words(needed)} are needed and " if needed else ""
        super().__init__(f"{device} has no room for {what}: {wanted}{in_words(free)} are free; "
                         f"{advice}")
        self.device, self.needed, self.free = device, needed, free


def in_words(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
