"""`python -m cnn` is the command `cnn`."""
from .cli import entry

entry()
