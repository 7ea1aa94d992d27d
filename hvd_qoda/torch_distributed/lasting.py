"""What the process must not destroy while a collective is under way.

The destructor of a Gloo process group waits for its collectives, up to the group's own timeout (half an hour by
default), and so does the process of a program that ends with an exception while another rank does not answer. Two such
ranks wait for each other. So a group and a collective under way stay alive until the collective has come in; otherwise
until the process is gone, which closes its connections, and the other ranks learn of it at once.
"""

import ctypes

__all__ = ["Lasting"]

# Functions of our own, because the attributes of `ctypes.pythonapi` are shared with everybody.
_ON_OBJECT = ctypes.PYFUNCTYPE(None, ctypes.py_object)
_add_reference = _ON_OBJECT(("Py_IncRef", ctypes.pythonapi))
_drop_reference = _ON_OBJECT(("Py_DecRef", ctypes.pythonapi))


class Lasting:
    """Keeps objects alive from `begin` to `end`, beyond the interpreter's end if need be.

    No list can do that: the interpreter empties all of them when it ends.

    Args:
        things: what is to be kept alive.
    """

    def __init__(self, *things: object) -> None:
        self._things = things
        self._begun = False

    def begin(self) -> None:
        """Keep them alive from now on; a second call does nothing."""
        if not self._begun:
            self._begun = True
            _add_reference(self)

    def end(self) -> None:
        """Keep them no longer; a second call does nothing."""
        if self._begun:
            self._begun = False
            _drop_reference(self)
