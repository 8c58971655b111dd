"""ReFT as a PEFT method, for ``get_peft_model(model, ReftConfig(...))``.

Importing this module registers the method; import it before loading a saved adapter as well.
"""

from reft_kernels.integrations.peft import atomic, combining
from reft_kernels.integrations.peft.config import ReftConfig
from reft_kernels.integrations.peft.layer import ReftLayer
from reft_kernels.integrations.peft.logits import keep_supervised_logits
from reft_kernels.integrations.peft.prefix_states import keep_prefix_states
from reft_kernels.integrations.peft.register import register
from reft_kernels.integrations.peft.sharing import share_build
from reft_kernels.integrations.peft.tuner import ReftTuner
from reft_kernels.integrations.response_template import from_chat_template

register(ReftConfig, ReftTuner)
atomic.install()
combining.install()

__all__ = [
    "ReftConfig",
    "ReftLayer",
    "ReftTuner",
    "from_chat_template",
    "keep_prefix_states",
    "keep_supervised_logits",
    "share_build",
]
