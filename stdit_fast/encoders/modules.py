"""The base of encoders that a diffusers pipeline can save and load.

diffusers is imported without what an unused library says on the way: it imports bitsandbytes where that
is installed (ColossalAI needs it), which logs a warning about kernels that nothing here uses.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """For imports of diffusers' models and pipelines."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


with quiet_bitsandbytes():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

__all__ = ["ModelMixin", "SavableModule", "quiet_bitsandbytes", "register_to_config"]


class SavableModule(ModelMixin, ConfigMixin):
    """A module with save_pretrained and from_pretrained.

    A pipeline loads a class only if the name ModelMixin is known in the class's own file.
    """

    def to(self, *args, **kwargs) -> "SavableModule":
        # Not ModelMixin's, which warns of modules that stay float32, even where there are none.
        return nn.Module.to(self, *args, **kwargs)
