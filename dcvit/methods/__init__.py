"""Few-shot compression methods behind one call, `dcvit.compress(..., method=...)`, so that they can be compared.

Each method has one module, which also holds its config class. `dcvit.config.DCViT` is the default.
"""

from dcvit.config import DCViT
from dcvit.methods.baselines.autoformer import AutoFormer
from dcvit.methods.baselines.cd import CD
from dcvit.methods.baselines.evit import EViT
from dcvit.methods.baselines.fskd import FSKD
from dcvit.methods.baselines.mini_deit import MiniDeiT
from dcvit.methods.baselines.mir import MiR
from dcvit.methods.baselines.practise import Practise
from dcvit.methods.baselines.s2vite import S2ViTE
from dcvit.methods.baselines.spvit import SPViT
from dcvit.methods.baselines.vtp import VTP
from dcvit.methods.dcvit.method import make_proxy_set
from dcvit.methods.registry import METHODS, Method, Outcome, Task, method_of, register

__all__ = [
    "CD", "FSKD", "METHODS", "VTP", "AutoFormer", "DCViT", "EViT", "Method", "MiR", "MiniDeiT", "Outcome", "Practise",
    "S2ViTE", "SPViT", "Task", "make_proxy_set", "method_of", "register",
]  # fmt: skip
