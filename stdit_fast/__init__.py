"""STDiT-2, the video diffusion transformer of Open-Sora 1.1: its training and its sampling."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stdit_fast.model.patch import patch_opensora
    from stdit_fast.model.stdit2 import STDiT2, STDiT2Config
    from stdit_fast.reporting import report
    from stdit_fast.sample import Condition, STDiT2Pipeline

__all__ = ["Condition", "STDiT2", "STDiT2Config", "STDiT2Pipeline", "patch_opensora", "report"]

# Loaded when first asked for: `import stdit_fast` is quick and imports no torch. No submodule bears one of these
# names, so that importing it could not take the name over.
_HOMES = {
    "STDiT2": "stdit_fast.model.stdit2",
    "STDiT2Config": "stdit_fast.model.stdit2",
    "patch_opensora": "stdit_fast.model.patch",
    "report": "stdit_fast.reporting",
    "STDiT2Pipeline": "stdit_fast.sample",
    "Condition": "stdit_fast.sample",
}

# Parts of the package that stand beside this folder in a checkout and inside it once installed.
_MAPPED = ("kernels", "train", "benchmarks")


def _check_whole() -> None:
    missing = [name for name in _MAPPED if importlib.util.find_spec(f"{__name__}.{name}") is None]
    if missing:
        checkout = Path(__file__).resolve().parents[1]
        raise ImportError(
            f"stdit_fast was imported from {checkout}, a checkout that is not installed as editable: "
            f"{', '.join(f'stdit_fast.{name}' for name in missing)} cannot be found from there. "
            f"Either install the checkout, `pip install -e {checkout}`, or, to use an installed stdit_fast, "
            "start Python in another folder."
        )


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_check_whole()
