"""Few-shot compression methods behind one call, `dcvit.compress(..., method=NAME)`, so that they compare.

`dcvit`, the default, is in `dcvit.compression`; here are the others, one module each.
"""

from dcvit.methods.cd import CD
from dcvit.methods.fskd import FSKD
from dcvit.methods.mir import MIR
from dcvit.methods.practise import PRACTISE
from dcvit.methods.registry import METHODS, Method, Outcome, Task, Timer, method, register

__all__ = ["CD", "FSKD", "METHODS", "MIR", "PRACTISE", "Method", "Outcome", "Task", "Timer", "method", "register"]
