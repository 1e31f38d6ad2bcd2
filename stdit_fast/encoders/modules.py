"""diffusers' bases of models that a pipeline can save, imported without what an unused library says on the way.

diffusers imports bitsandbytes where it is installed (ColossalAI needs it), and that logs a warning about kernels that
nothing here uses.
"""

import logging

_bitsandbytes = logging.getLogger("bitsandbytes")
_level = _bitsandbytes.level
_bitsandbytes.setLevel(logging.CRITICAL)
try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
finally:
    _bitsandbytes.setLevel(_level)

__all__ = ["ConfigMixin", "ModelMixin", "register_to_config"]
