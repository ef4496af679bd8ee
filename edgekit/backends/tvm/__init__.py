"""TVM: machine code for 64-bit ARM on Android, as a shared library that needs nothing but itself."""

from edgekit.backends.tvm.compile import build
from edgekit.backends.tvm.session import open_session

__all__ = ["build", "open_session"]
