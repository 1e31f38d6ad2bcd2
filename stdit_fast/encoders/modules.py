"""What models and pipelines that can be saved are made of: diffusers' bases.

diffusers is imported without what an unused library says on the way: it imports bitsandbytes where that
is installed (ColossalAI needs it), which logs a warning about kernels that nothing here uses.
"""

import logging

from torch import nn

_bitsandbytes = logging.getLogger("bitsandbytes")
_level = _bitsandbytes.level
_bitsandbytes.setLevel(logging.CRITICAL)
try:
    from diffusers import DiffusionPipeline
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
finally:
    _bitsandbytes.setLevel(_level)

__all__ = ["DiffusionPipeline", "ModelMixin", "SavableModule", "register_to_config"]


class SavableModule(ModelMixin, ConfigMixin):
    """A module with save_pretrained and from_pretrained.

    A pipeline loads a class only if the name ModelMixin is known in the class's own file.
    """

    def to(self, *args, **kwargs) -> "SavableModule":
        # Not ModelMixin's, which warns of modules that stay float32, even where there are none.
        return nn.Module.to(self, *args, **kwargs)
