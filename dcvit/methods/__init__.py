"""Few-shot compression methods behind one call, `dcvit.compress(..., method=NAME)`, so that they compare.

One module each; `dcvit` is the default.
"""

from dcvit.methods.autoformer import AUTOFORMER
from dcvit.methods.cd import CD
from dcvit.methods.dcvit import DCVIT
from dcvit.methods.evit import EVIT
from dcvit.methods.fskd import FSKD
from dcvit.methods.mini_deit import MINI_DEIT
from dcvit.methods.mir import MIR
from dcvit.methods.practise import PRACTISE
from dcvit.methods.registry import METHODS, Method, Outcome, Task, Timer, method, register
from dcvit.methods.s2vite import S2VITE
from dcvit.methods.spvit import SPVIT
from dcvit.methods.vtp import VTP

__all__ = [
    "AUTOFORMER", "CD", "DCVIT", "EVIT", "FSKD", "METHODS", "MINI_DEIT", "MIR", "PRACTISE", "S2VITE", "SPVIT", "VTP",
    "Method", "Outcome", "Task", "Timer", "method", "register",
]  # fmt: skip
