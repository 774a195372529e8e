"""What can go wrong, as sentences: what was wrong, the value received, what to do."""


class Error(Exception):
    """Base of every error that cnn raises on purpose."""


class ModelError(Error):
    """A model file, a network or an input that does not fit it."""


class ImageError(Error):
    """A picture that is missing, broken, too large or not a picture."""


class DeviceError(Error):
    """A device, dtype or thread count that can not be had here."""
