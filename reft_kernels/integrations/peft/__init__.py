"""ReFT as a PEFT method: ``get_peft_model(model, ReftConfig(...))``, and everything PEFT does with
a model after that.

Importing this module registers the method, so import it before loading a saved adapter too.
"""

from reft_kernels.integrations.peft.config import ReftConfig
from reft_kernels.integrations.peft.layer import ReftLayer
from reft_kernels.integrations.peft.register import register
from reft_kernels.integrations.peft.sharing import share_build
from reft_kernels.integrations.peft.tuner import ReftTuner
from reft_kernels.integrations.response_template import from_chat_template

register(ReftConfig, ReftTuner)

__all__ = ["ReftConfig", "ReftLayer", "ReftTuner", "from_chat_template", "share_build"]
